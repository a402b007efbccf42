"""A whole sweep: what it writes and says, also when it is interrupted."""

import json
import math

import pandas
import pytest
from models import assert_unchanged, snapshot
from sweep_setting import FACTS
from wording import says

from moeprof import files
from moeprof.studies.sweep import COLUMNS, SweepFiles, configurations, sweep
from moeprof.studies.sweep import runner as runner_module
from moeprof.studies.sweep.report import report


def is_patched(model):
    return any("forward" in vars(module) for module in model.modules())


@pytest.mark.slow  # test_sweep_run runs what it is made of on both versions
def test_the_sweep_writes_its_files(run):
    result, files = run
    names = [configuration.name for configuration in configurations(8, 2)]
    table = pandas.read_csv(files.csv)
    assert list(table.columns) == list(COLUMNS)
    assert table["config"].tolist() == names
    assert table["avg_experts"].tolist() == [r["avg_experts"] for r in result["results"]]
    assert math.isnan(table["alpha"][0]) and table["avg_experts_medium"].isna().all()
    loaded = json.loads(files.json.read_text(), parse_constant=pytest.fail)
    assert loaded == json.loads(json.dumps(result))
    assert loaded["dropped_max_k"] == [16, 32, 64]
    assert [r["config"] for r in loaded["results"]] == names
    assert files.figure.read_bytes().startswith(b"\x89PNG")
    assert files.report.read_text() == report(result)


@pytest.mark.slow
def test_the_sweep_says_where_it_is(swept):
    lines = [line.rstrip() for line in swept[2].splitlines()]
    assert lines[0] == "Total configurations: 9"
    assert "[1/9] Running: topk_2_baseline" in lines
    assert "[9/9] Running: bh_k8_a020" in lines
    assert "Avg experts: 2.00" in lines
    assert sum(line.startswith("Completed in ") and line.endswith("s") for line in lines) == 9
    assert "ALL EXPERIMENTS COMPLETE!" in lines
    code = [line for line in lines if line.startswith("    moeprof.patch(")]
    text = lines[lines.index("ALL EXPERIMENTS COMPLETE!") : -5]
    assert code and max(len(line) for line in text if line not in code) <= 100
    assert any(line.startswith("For 1 experts per token on average, ") for line in text)
    caution = " ".join(text).partition("For 1 experts")[0]  # before what it is about
    assert f"{len(swept[0]['heldout_documents'])} documents only" in caution


@pytest.mark.slow
def test_interrupted(experiment, tmp_path, monkeypatch, capsys):
    """What is finished is on disk and the model is unpatched, whenever Ctrl-C comes."""
    calls = []

    def interrupt(*arguments):
        calls.append(is_patched(experiment.model))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return evaluate(*arguments)

    evaluate = runner_module.evaluate
    monkeypatch.setattr(runner_module, "evaluate", interrupt)
    before = snapshot(experiment.model)
    with pytest.raises(KeyboardInterrupt):
        sweep(experiment, tmp_path, FACTS)
    assert calls == [True] * 3
    assert_unchanged(experiment.model, before)
    files = SweepFiles(tmp_path)
    assert pandas.read_csv(files.csv)["config"].tolist() == ["topk_2_baseline", "bh_k4_a001"]
    assert len(json.loads(files.json.read_text())["results"]) == 2
    assert says(files.report.read_text(), "Interrupted", "2 of 9")
    assert files.figure.exists()
    assert says(capsys.readouterr().out, "Interrupted", "2 of 9")
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch, broken):
    path = tmp_path / "file.json"
    files.write_whole(path, b"old")

    def refuse(*_):
        raise OSError("no space left")

    monkeypatch.setattr(files.os, broken, refuse)
    with pytest.raises(OSError, match="no space left"):
        files.write_whole(path, b"new and long")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_json_has_no_nan(run, tmp_path):
    result, _ = run
    files = SweepFiles(tmp_path)
    broken = result["results"][0] | {"tokens_per_s": math.nan, "generated_tokens": [[math.inf]]}
    files.save_results(result | {"results": [broken]})
    loaded = json.loads(files.json.read_text(), parse_constant=pytest.fail)
    assert loaded["results"][0]["tokens_per_s"] is None
    assert loaded["results"][0]["generated_tokens"] == [[None]]
