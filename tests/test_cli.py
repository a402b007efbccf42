"""The command line: what it prints, what it writes, and one clear line for what is wrong."""

import argparse
import json
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
import transformers
from commands import MAIN, fails
from matplotlib.figure import Figure
from models import llama, olmoe

import moeprof
from moeprof import demo
from moeprof.cli import main, options

# The nulls of these tests are fitted to few tokens; that this is said is a test of its own.
pytestmark = pytest.mark.filterwarnings("ignore:the null was fitted to")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The folder of a tiny OLMoE with 8 experts, top-2, and its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo.PATH, local_files_only=True)
    model = olmoe(vocab_size=len(tokenizer), max_position_embeddings=1024, initializer_range=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("simple\tThe list is\n\nA prompt without a label\n")
    return path


@pytest.fixture
def undrawn(monkeypatch):
    """Figures are empty files: drawing one takes longer than a sweep of a tiny model."""
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)


FEW = ("--tokens", "300", "--budget-tokens", "256")
ONE = ("--alphas", "0.1", "--max-k", "4,64", "--static", "1")  # beside the model's own top-k


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


RESULTS = [
    "bh_routing_full_results.json",
    "bh_routing_quality.csv",
    "bh_routing_report.md",
    "bh_routing_summary.csv",
    "moeprof.sqlite",
    "moeprof.sqlite.lock",
    "visualizations/bh_routing_analysis.png",
]


# ---------------------------------------------------------------- what works


@pytest.mark.slow  # shorter ones run on both versions, below and in sweep/
def test_sweep_of_the_demo_model(forked, tmp_path):
    """All 21, as a user runs it: four files, the promised lines and nothing on stderr."""
    out, prompt = tmp_path / "new" / "folder", tmp_path / "prompt.txt"
    prompt.write_text("simple\tThe list is\n")
    options = ["--prompts", prompt, "--tokens", 256, "--budget-tokens", 256]
    options += ["--threads", 1, "--out", out]
    ended = forked.run(MAIN, "sweep", *options)
    assert (ended.returncode, ended.stderr) == (0, "")
    lines = ended.stdout.splitlines()
    assert lines[0] == "Total configurations: 21"
    assert "[1/21] Running: topk_8_baseline" in lines
    assert "[21/21] Running: bh_k64_a020" in lines
    assert "Avg experts: 8.00" in lines
    assert "ALL EXPERIMENTS COMPLETE!" in lines
    assert "\x1b" not in ended.stdout
    assert files(out) == RESULTS
    table = pandas.read_csv(out / RESULTS[3])
    assert len(table) == 21 and table["avg_experts"][0] == 8
    assert (table["avg_experts"][1:] < 8).all() and table["avg_experts_simple"].notna().all()
    run = json.loads((out / RESULTS[0]).read_text())
    assert run["threads"] == 1 and run["dtype"] == "float32"
    assert [len(tokens) for tokens in run["results"][0]["generated_tokens"]] == [20]
    assert "trimmed null" in run["null"] and "logprob" in run["null"]
    assert run["null"] in (out / RESULTS[2]).read_text()


@pytest.mark.slow
def test_ctrl_c(forked, tmp_path, tiny, prompts):
    """Exit code 130, what is finished is on disk, no traceback."""
    options = ["--null", "normal", "--tokens", 12000, "--budget-tokens", 256]
    options += ["--prompts", prompts, "--out", tmp_path / "r"]
    ended = forked.run(MAIN, "sweep", "--model", tiny, *options, until="[3/9]")
    assert ended.returncode == 130
    assert "Interrupted: 2 of 9 are finished" in ended.stdout
    assert "the same command goes on there" in ended.stderr and "Traceback" not in ended.stderr
    assert files(tmp_path / "r") == RESULTS
    assert len(pandas.read_csv(tmp_path / "r" / RESULTS[3])) == 2


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_calibrate_then_sweep_with_that_null(tmp_path, tiny, prompts, capsys):
    text, null, out = tmp_path / "text.txt", tmp_path / "null.npz", tmp_path / "out"
    text.write_text(demo.calibration_texts()[0].text)
    arguments = ["--model", str(tiny), "--text", str(text), "--out", str(null), "--score", "logit"]
    assert main(["calibrate", *arguments]) == 0
    described = moeprof.Null.load(null).describe()
    assert "logit" in described and described in capsys.readouterr().out
    options = ["--null", str(null), "--prompts", str(prompts), *FEW, *ONE]
    assert main(["sweep", "--model", str(tiny), *options, "--out", str(out)]) == 0
    run = json.loads((out / RESULTS[0]).read_text())
    assert run["null"] == described
    assert "Left out: max_k 64, the model has 8 experts" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_a_grid_and_text_of_the_users_own(tmp_path, tiny, prompts, capsys):
    """--alphas, --max-k, --static and --text are what runs, and the files say so."""
    text, out = tmp_path / "mine.jsonl", tmp_path / "out"
    documents = [document.text[:1500] for document in demo.heldout_texts()[:3]]
    text.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    options = ["--null", "normal", "--prompts", prompts, "--text", text, "--out", out]
    options += ["--budget-tokens", 256]
    grid = ["--alphas", "0.025,0.3", "--max-k", "2,4", "--static", "1,3"]
    assert main([*map(str, ["sweep", "--model", tiny, *options]), *grid]) == 0
    assert capsys.readouterr().out.startswith("Total configurations: 5\n")
    names = ["bh_k2_a0025", "bh_k2_a030", "bh_k4_a0025", "bh_k4_a030"]
    assert pandas.read_csv(out / RESULTS[3])["config"].tolist()[1:] == names
    run = json.loads((out / RESULTS[0]).read_text())
    assert [row["k"] for row in run["static"]] == [1, 3]
    assert [d["name"] for d in run["heldout_documents"]] == [f"mine.jsonl:{i}" for i in (1, 2, 3)]
    assert "mine.jsonl" in (out / RESULTS[2]).read_text()
    for wrong in (["--max-k", "9"], ["--static", "9"]):
        line = fails(capsys, "sweep", "--model", tiny, *options, *wrong)
        assert f"{wrong[0]}: expected" in line and "at most 8, the model's experts" in line


@pytest.mark.slow  # adding nulls up knows of no model
def test_calibrate_in_parts_and_merge(tmp_path, tiny, capsys):
    """The merged null is the one fitted to all files, to the bit, in whichever order."""
    texts = [tmp_path / f"{i}.txt" for i in range(3)]
    for path, document in zip(texts, demo.calibration_texts()[::40], strict=False):
        path.write_text(document.text[:2000])

    def calibrate(*arguments):
        assert main(["calibrate", *map(str, arguments)]) == 0
        return moeprof.Null.load(arguments[-1])

    nulls = [tmp_path / f"{i}.npz" for i in range(3)]
    for text, null in zip(texts, nulls, strict=True):
        calibrate("--model", tiny, "--text", text, "--out", null)
    whole = calibrate("--model", tiny, "--text", *texts, "--out", tmp_path / "w.safetensors")
    assert whole.kind == "trimmed"
    for order in ((0, 1, 2), (2, 0, 1)):
        inputs = [nulls[i] for i in order]
        merged = calibrate("--merge", *inputs, "--out", tmp_path / "m.safetensors")
        for name in ("counts", "largest", "router_sample"):
            assert np.array_equal(getattr(merged, name), getattr(whole, name))
        assert merged.describe() == whole.describe()
    assert (tmp_path / "m.safetensors").read_bytes() == (tmp_path / "w.safetensors").read_bytes()
    capsys.readouterr()
    line = fails(
        capsys, "calibrate", "--merge", nulls[0], nulls[1], nulls[0], "--out", tmp_path / "m.npz"
    )
    assert "fitted to the same text" in line and not (tmp_path / "m.npz").exists()
    options = ["--score", "logit", "--out", tmp_path / "logit.npz"]
    calibrate("--model", tiny, "--text", texts[0], *options)
    line = fails(
        capsys,
        "calibrate",
        "--merge",
        nulls[1],
        tmp_path / "logit.npz",
        "--out",
        tmp_path / "m.npz",
    )
    assert "logit.npz: merge: score differs: 'logprob', 'logit'" in line


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_null_text(tmp_path, tiny, prompts):
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text(demo.calibration_texts()[0].text)
    options = ["--null-text", str(text), "--prompts", str(prompts), *FEW, *ONE]
    assert main(["sweep", "--model", str(tiny), *options, "--out", str(out)]) == 0
    run = json.loads((out / RESULTS[0]).read_text())
    assert "--null-text" in run["null_source"]


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtypes(tmp_path, tiny, prompts, dtype):
    options = ["--dtype", dtype, "--null", "normal", *FEW, *ONE]
    options += ["--prompts", str(prompts), "--out", str(tmp_path / "out")]
    assert main(["sweep", "--model", str(tiny), *options]) == 0
    run = json.loads((tmp_path / "out" / RESULTS[0]).read_text())
    assert run["dtype"] == dtype and run["results"][1]["perplexity"] > 1


@pytest.mark.slow
def test_a_warning_is_a_line_without_a_path(forked, tmp_path, tiny):
    text = tmp_path / "short.txt"
    text.write_text("In the beginning God created the heaven and the earth. " * 8)
    options = ["--text", text, "--out", tmp_path / "null.npz"]
    ran = forked.run(MAIN, "calibrate", "--model", tiny, *options)
    assert ran.returncode == 0
    (line,) = [line for line in ran.stderr.splitlines() if "fitted to" in line]
    assert line.startswith("moeprof: warning: the null was fitted to ") and ".py" not in ran.stderr


def test_version_and_cpu(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"moeprof {moeprof.__version__}\n"
    assert main(["cpu"]) == 0
    shown = capsys.readouterr().out
    for kernel, variant in moeprof.cpu_info()["kernels"].items():
        assert re.search(rf"\b{kernel}\b +{variant}\b", shown)


# ---------------------------------------------------------------- what doesn't


@pytest.fixture
def folders(tmp_path, tiny):
    """Folders that are no models."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "no_weights").mkdir()
    (tmp_path / "no_weights" / "config.json").write_text((tiny / "config.json").read_text())
    (tmp_path / "file").write_text("text")
    return tmp_path


@pytest.mark.parametrize(
    "model, message",
    [
        ("nowhere", "no such folder"),
        ("./some/where", "no such folder"),
        ("/no/such/model", "no such folder"),
        ("mod/u\u0308n\u00ef", "no such folder"),
        ("mod/-n", "no such folder"),
        ("../a", "no such folder"),
        ("empty", "the folder has no config.json"),
        ("no_weights", "the folder has no weights"),
        ("file", "expected a folder or a hub id, got a file"),
        ("owner/name", "neither a folder here nor in the Hugging Face cache"),
    ],
)
@pytest.mark.parametrize("command", ["sweep", "calibrate"])
def test_no_such_model(capsys, folders, monkeypatch, model, message, command):
    monkeypatch.chdir(folders)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    out = {"sweep": ["--out", "out"], "calibrate": ["--text", "file", "--out", "out.npz"]}
    start = time.perf_counter()
    line = fails(capsys, command, "--model", model, *out[command])
    assert time.perf_counter() - start < 5  # no retries
    assert model.removeprefix("./") in line and message in line
    assert not (folders / "out").exists() and not (folders / "out.npz").exists()


@pytest.fixture
def copy_of_tiny(tmp_path, tiny):
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


def sweep_fails(capsys, model, prompts, *options):
    out = prompts.parent / "out"
    line = fails(capsys, "sweep", "--model", model, "--prompts", prompts, "--out", out, *options)
    assert not out.exists()
    return line


def test_a_checkpoint_without_some_of_its_weights(capsys, copy_of_tiny, prompts):
    from safetensors.torch import load_file, save_file

    path = copy_of_tiny / "model.safetensors"
    kept = {name: t for name, t in load_file(path).items() if ".experts." not in name}
    save_file(kept, path, metadata={"format": "pt"})
    line = sweep_fails(capsys, copy_of_tiny, prompts)
    assert "the checkpoint lacks" in line and "experts" in line


def test_damaged_weights(capsys, copy_of_tiny, prompts):
    path = copy_of_tiny / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    assert "can't be loaded" in sweep_fails(capsys, copy_of_tiny, prompts)


def test_a_folder_without_a_tokenizer(capsys, copy_of_tiny, prompts):
    for path in copy_of_tiny.glob("*token*"):
        path.unlink()
    assert "the folder has no tokenizer" in sweep_fails(capsys, copy_of_tiny, prompts)


def test_empty_values_are_no_defaults(capsys, tiny, tmp_path, prompts):
    assert "got an empty name" in sweep_fails(capsys, "", prompts)
    assert "can't be read" in sweep_fails(capsys, tiny, prompts, "--prompts", "")
    (tmp_path / "empty.txt").write_text(" \n")
    options = ("--null-text", tmp_path / "empty.txt")
    assert f"{tmp_path / 'empty.txt'} is empty" in sweep_fails(capsys, tiny, prompts, *options)


def test_a_null_is_not_written_over_a_folder(capsys, tiny, tmp_path, prompts):
    (tmp_path / "d.npz").mkdir()
    options = ("--model", tiny, "--text", prompts, "--out", tmp_path / "d.npz")
    assert "expected a file" in fails(capsys, "calibrate", *options)


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_the_seed_chooses_the_passages(tmp_path, tiny, prompts):
    chosen = []
    for seed in (1, 1, 2):
        out = tmp_path / str(len(chosen))
        options = ["--prompts", str(prompts), *FEW, *ONE, "--null", "normal"]
        given = [*options, "--seed", str(seed), "--out", str(out)]
        main(["sweep", "--model", str(tiny), *given])
        chosen.append(json.loads((out / RESULTS[0]).read_text())["heldout_documents"])
    assert chosen[0] == chosen[1] != chosen[2]


def test_a_hub_id_without_a_network_is_tried_once(capsys, tmp_path, monkeypatch):
    asked = []

    def model_info(self, name, **_):
        asked.append(name)
        raise ConnectionError("Name or service not known\nand more lines")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
    line = fails(capsys, "sweep", "--model", "owner/name", "--out", tmp_path / "out")
    assert "the hub doesn't give it (ConnectionError: Name or service not known" in line
    assert asked == ["owner/name"]


@pytest.mark.parametrize("null", [(), ("--null", "normal")])
def test_a_model_without_a_moe_block(capsys, tmp_path, tiny, prompts, null):
    llama(vocab_size=4096, pad_token_id=1).save_pretrained(tmp_path / "llama")
    transformers.AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "llama")
    line = fails(
        capsys,
        "sweep",
        "--model",
        tmp_path / "llama",
        "--out",
        tmp_path / "out",
        "--prompts",
        prompts,
        *null,
    )
    assert line.startswith("No routers found")
    assert files(tmp_path / "out") == []


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "can't be read: No such file or directory"),
        (b"", "has no prompt in it"),
        (b"\n  \n\t\n", "has no prompt in it"),
        (b"easy\tWhat is it?\n", "line 1: unknown label 'easy' before the TAB"),
        (b"One\nsimple\t \n", "line 2: a label without a prompt"),
        (b"\xff\xfe\x00", "isn't UTF-8 text (byte 0)"),
    ],
)
def test_prompt_files(capsys, tmp_path, content, message):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    line = fails(capsys, "sweep", "--prompts", path, "--out", tmp_path / "out")
    assert str(path) in line and message in line
    assert not (tmp_path / "out").exists()


def test_prompts_that_are_a_folder(capsys, tmp_path):
    line = fails(capsys, "sweep", "--prompts", tmp_path, "--out", tmp_path / "out")
    assert "can't be read: Is a directory" in line


def test_an_output_folder_under_a_file(capsys, tmp_path, monkeypatch):
    """Told before the model is loaded."""
    monkeypatch.setattr(demo, "load", lambda *_: pytest.fail("the model was loaded"))
    (tmp_path / "file").write_text("text")
    line = fails(capsys, "sweep", "--out", tmp_path / "file" / "results")
    assert "file/results can't be written: Not a directory" in line
    line = fails(capsys, "sweep", "--out", tmp_path / "file")
    assert "file can't be written: Not a directory" in line
    assert files(tmp_path) == ["file"]


def test_a_null_of_another_model(capsys, tmp_path, tiny, prompts):
    text, null = tmp_path / "text.txt", tmp_path / "null.safetensors"
    text.write_text(demo.calibration_texts()[0].text)
    fitted = ["--model", str(tiny), "--text", str(text), "--out", str(null)]
    assert main(["calibrate", *fitted]) == 0
    line = fails(capsys, "sweep", "--null", null, "--out", tmp_path / "out")
    assert "this null was fitted to" in line and "tiny" in line
    assert files(tmp_path / "out") == []


@pytest.mark.parametrize(
    "command",
    [
        "sweep",
        "profile",
        "compare",
        "diagnose",
        "calibrate",
        "bench layer",
        "bench router",
        "bench model",
    ],
)
def test_more_threads_than_any_machine_has(capsys, command):
    line = fails(capsys, *command.split(), "--threads", "1000000")
    assert "--threads: expected a number from 1 to 1024, got 1000000" in line


@pytest.mark.slow  # moeprof's own checks, the same on both versions
@pytest.mark.parametrize(
    "arguments, message",
    [
        (["sweep", "--null", "missing.npz"], "missing.npz"),
        (["sweep", "--null", "null.txt"], "ends in .safetensors or .npz"),
        (["sweep", "--null", "normal", "--null-text", "text.txt"], "--null brings one already"),
        (["sweep", "--null-text", "missing.txt"], "text missing.txt can't be read"),
        (["sweep", "--threads", "0"], "--threads: expected a number from 1 to 1024, got 0"),
        (["sweep", "--threads", "two"], "--threads: expected a number from 1 to 1024, got two"),
        (["sweep", "--tokens", "0"], "expected a number from 1 to 1000000, got 0"),
        (["sweep", "--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
        (["sweep", "--seed", "x"], "--seed: expected a number from 0 to 4294967295, got x"),
        (["sweep", "--alphas", "0.1,1"], "--alphas: expected numbers in (0, 1), got '1'"),
        (["sweep", "--alphas", "0.1,"], "--alphas: expected numbers in (0, 1), got ''"),
        (["sweep", "--max-k", "0,4"], "--max-k: expected a number from 1 to 1000000, got 0"),
        (["sweep", "--static", "two"], "--static: expected a number from 1 to 1000000, got two"),
        (["sweep", "--text", "missing.txt"], "text missing.txt can't be read"),
        (["diagnose", "--text", "missing.txt"], "text missing.txt can't be read"),
        (["sweeep"], "invalid choice: 'sweeep'"),
        ([], "the following arguments are required: COMMAND"),
        (["calibrate", "--out", "n.npz"], "one of the arguments --text --merge is required"),
        (["calibrate", "--text", "t", "--out", "n.txt"], "ends in .safetensors or .npz"),
        (["calibrate", "--text", "t", "--out", "no/n.npz"], "no such folder no"),
        (["calibrate", "--text", "missing", "--out", "n.npz"], "text missing can't be read"),
        (["calibrate", "--text", "t", "--out", "n.npz", "--kind", "x"], "--kind: invalid choice"),
        (["calibrate", "--text", "t", "--merge", "a", "--out", "n.npz"], "not allowed with"),
        (["calibrate", "--merge", "a.npz", "--out", "n.npz"], "expected at least two nulls"),
        (["calibrate", "--merge", "a.npz", "b.npz", "--out", "n.npz"], "no such null file: a.npz"),
        (["calibrate", "--merge", "a", "b", "--out", "n.npz", "--score", "logit"], "no --score"),
        (["calibrate", "--merge", "a", "b", "--out", "n.npz", "--bits", "4"], "no --bits"),
        (["calibrate", "--merge", "a", "b", "--out", "n.npz", "--dtype", "float16"], "no --dtype"),
        (["diagnose", "--alpha", "2"], "expected a number in (0, 1)"),
        (["diagnose", "--positions", "-1"], "expected a number from 0"),
        (["diagnose", "--null", "nowhere.safetensors"], "no such null file"),
        (["diagnose", "--min-k", "9", "--max-k", "3"], "min_k: expected at most max_k=3"),
        (["diagnose", "--max-k", "65"], "max_k: expected 1 to 64"),
        (["diagnose", "--positions", "5000", "--tokens", "600"], "positions: 5000 asked for"),
        (
            ["compare", "--routers", "nonsense"],
            "there is no 'nonsense'; expected one of bh, ",
        ),
        (["compare", "--routers", "hc"], "there is no 'hc'; the nearest is 'hc ("),
        (["compare", "--tables", "c"], "--tables: expected some of reduction, wide, got 'c'"),
        (["compare", "--tables", ""], "--tables: expected some of reduction, wide, got ''"),
        (["compare", "--routers", ""], "routers: expected some of"),
        (["compare", "--quantized", "3"], "expected 8, 4, both or none, got '3'"),
        (
            ["compare", "--quantized", "4", "--bits", "8"],
            "the model's experts are quantised already",
        ),
        (["compare", "--budgets", "0"], "expected a number from 1"),
        (["compare", "--budgets", "40"], "expected some of 2, 3, 4, 5, 6, 7 (table reduction)"),
        (["compare", "--text", "missing.txt"], "can't be read"),
        (["compare", "--null", "missing.npz"], "missing.npz"),
        (["compare", "--model", "missing"], "no such folder"),
        (["evaluate", "--router", "bhh"], "there is no 'bhh'; the nearest is 'bh'"),
        (["evaluate", "--router", "bh:alpah=0.3"], "takes no 'alpah'; the nearest is 'alpha'"),
        (["evaluate", "--text", "none.txt"], "none.txt can't be read"),
        (["evaluate", "--text", "empty.txt"], "empty.txt is empty"),
        (["evaluate", "--text", "latin.txt"], "latin.txt isn't UTF-8 text (byte 1)"),
        (["evaluate", "--text", "short.txt"], "no document has two tokens"),
        (["evaluate", "--text", "bad.jsonl"], "bad.jsonl, line 2: no such document"),
        (["evaluate", "--context", "4096"], "expected 2 to 1,024, the positions of this model"),
        (["evaluate", "--context", "64", "--stride", "65"], "stride: expected 1 to 64"),
        (["evaluate", "--router", "topk:k=65"], "k: expected at most 64"),
        (["evaluate", "--router", "bh@65"], "router 'bh@65': expected a budget of at most 64"),
        (["evaluate", "--out", ""], "--out: expected a folder, got an empty name"),
        (["diagnose", "--out", " "], "--out: expected a folder, got an empty name"),
        (["evaluate", "--null", "nonull.npz"], "nonull.npz"),
        (["evaluate", "--out", "short.txt"], "can't be written"),
        (["study", "--parts", "swep"], "parts: expected some of calibrate, profile, sweep"),
        (["study", "--tables", "long"], "tables: expected some of reduction, wide"),
        (["compare", "--routers", "bh,by"], "routers: BY is not run: it is BH at alpha/c(E)"),
        (["study", "--routers", "bhh"], "routers: there is no 'bhh'; the nearest is 'bh'"),
        (["study", "--tokens", "1"], "from 2 to"),
        (["study", "--text", "nowhere.txt"], "nowhere.txt"),
        (["study", "--workers", "2"], "--workers belongs to --engine"),
        (["study", "--model", "no/such/folder/at/all"], "no/such/folder/at/all"),
    ],
)
def test_arguments(capsys, tmp_path, monkeypatch, arguments, message):
    """One line of what is wrong, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("  \n")
    (tmp_path / "latin.txt").write_bytes("né".encode("latin-1"))
    (tmp_path / "short.txt").write_text("a")
    (tmp_path / "bad.jsonl").write_text('{"text": "one two"}\n{"text": 3}\n')
    if "study" in arguments:
        monkeypatch.setattr(demo, "load", lambda *_: pytest.fail("the model was loaded"))
    there = sorted(tmp_path.rglob("*"))
    assert message in fails(capsys, *arguments)
    assert sorted(tmp_path.rglob("*")) == there


def test_threads_are_torchs(monkeypatch):
    """A number that the tests don't run on."""
    asked, before = [], torch.get_num_threads()
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    for given in (before + 2, None):
        options.set_threads(argparse.Namespace(threads=given))
    assert asked == [before + 2]
