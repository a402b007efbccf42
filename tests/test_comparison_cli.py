"""`moeprof compare`: its files, an interruption, and bad input."""

import json
from collections import Counter

import pandas
import pytest
from matplotlib.figure import Figure

import moeprof
from moeprof import demo
from moeprof.cli import main
from moeprof.studies.comparison import runner
from moeprof.studies.comparison.files import ComparisonFiles
from moeprof.studies.comparison.report import report
from moeprof.studies.comparison.speed import decode_speeds

pytestmark = pytest.mark.slow  # test_comparison and test_every_study compare on both versions

# ---------------------------------------------------------------- the command


FILES = [
    "comparison.csv",
    "comparison.json",
    "comparison.png",
    "comparison_report.md",
    "moeprof.sqlite",
    "moeprof.sqlite.lock",
]
SMALL = ("--tokens", "512", "--budget-tokens", "512", "--tables", "reduction")
SMALLER = ("--tokens", "256", "--budget-tokens", "256", "--tables", "reduction")


@pytest.fixture(autouse=True)
def few_tokens_are_timed(monkeypatch):
    """That they are is looked at here, not how fast they are."""
    monkeypatch.setitem(decode_speeds.__kwdefaults__, "new_tokens", 2)


def test_compare_writes_all_files_and_the_json_can_make_them_again(tmp_path, capsys):
    code = main(
        [
            "compare",
            "--routers",
            "fixed_p,top_p,ebh (lr),weighted_bh",
            "--budgets",
            "4",
            *SMALL,
            "--out",
            str(tmp_path),
        ]
    )
    out = capsys.readouterr().out
    assert out.count("\n- ") == 5 and "more: comparison_report.md" in out
    # The path of a file may be long.
    assert code == 0
    assert max(len(line.replace(str(tmp_path), "")) for line in out.splitlines()) <= 100
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    run = json.loads((tmp_path / "comparison.json").read_text())
    assert len(run["static"]) == 8 and run["static"][7]["kl"] == 0
    assert len(run["static"]) + 16 + len(run["cells"]) == run["planned_cells"]
    shrunk = [(cell["bits"], cell["budget"]) for cell in run["quantized"]]
    assert shrunk == [(bits, k) for bits in (4, 8) for k in range(1, 9)]
    assert "Interrupted" not in (tmp_path / "comparison_report.md").read_text()
    for cell in [*run["static"], *run["quantized"]]:
        low, middle, high = (cell[f"tokens_per_s{end}"] for end in ("_low", "", "_high"))
        assert 0 < low <= middle <= high
    roles = Counter(cell["role"] for cell in run["cells"])
    assert roles == {"router": 12, "shuffled": 6, "random": 2, "oracle": 2, "static": 1}
    for cell in run["cells"]:
        if cell["role"] == "router" and cell["contender"] == "ebh (lr)":
            assert "reaches from 1" in cell["reason"]
            continue
        assert cell["average_k"] == pytest.approx(4, rel=0.12)  # 512 tokens of other documents
        assert sum(cell["by_document"]["kl"]) > 0 and len(cell["by_document"]["kl"]) == 4
        assert {"kl", "nats", "agree"} == set(cell["effect"])
        if cell["role"] == "router":
            assert cell["tokens_per_s"] > 0 and cell["set_k"] == pytest.approx(4, rel=0.02)
    assert run["command"].endswith("--tables reduction --tokens 512 --budget-tokens 512")
    for name in ("machine", "nulls", "model_config", "seed", "splits", "sensitivity"):
        assert run[name] is not None
    page = (tmp_path / "comparison_report.md").read_text()
    assert page == report(run) and "## What the results say" in page
    assert "## Skip experts or shrink them" in page and "Skip experts or shrink them:" in out
    assert len(pandas.read_csv(tmp_path / "comparison.csv")) == 8 + 16 + len(run["cells"])


def test_an_interrupted_comparison_keeps_what_was_finished(tmp_path, monkeypatch, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "shuffled", interrupt)
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)  # as empty files
    options = ["--routers", "top_p", "--budgets", "4", "--quantized", "none", *SMALLER]
    code = main(["compare", *options, "--out", str(tmp_path)])
    assert code == 130 and "cells are finished" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    run = json.loads((tmp_path / "comparison.json").read_text())
    assert run["quantized"] == [] and run["command"].count("--quantized none") == 1
    roles = [cell["role"] for cell in run["cells"]]  # the running cell, of top_p, is lost
    assert roles == ["random", "oracle"] and "effect" in run["cells"][-1]
    assert "Interrupted" in (tmp_path / "comparison_report.md").read_text()


@pytest.mark.parametrize(
    "changes", [{"kind": "trimmed"}, {"score": "logit"}, {"alpha_min": 0.5}], ids=str
)
def test_a_null_that_is_not_what_the_tables_call_it_is_refused_first(
    changes, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    null = demo.null("efron")
    for name, value in changes.items():
        object.__setattr__(null, name, value)
    monkeypatch.setattr(moeprof.Null, "load", lambda path: null)
    assert main(["compare", "--null", "some.npz"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--null: expected an efron null on logprob" in error
    assert not list(tmp_path.iterdir())


def test_text_of_ones_own_says_what_is_expected(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"txt": "two"}\n')
    assert main(["compare", "--text", "a.jsonl"]) == 2
    error = capsys.readouterr().err
    assert "a.jsonl, line 2" in error and error.count("\n") == 1
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert main(["compare", "--text", "a.jsonl"]) == 2
    assert "has 2 different document(s), expected at least 4" in capsys.readouterr().err


def test_a_store_that_cannot_be_written_is_refused_first(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="can't be written"):
        ComparisonFiles(tmp_path / "file")
