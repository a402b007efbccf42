"""Folders that are no model: one line on stderr, exit code 2, nothing written, no code run."""

import json
import pathlib
import pickle
import re
import shutil

import pytest
import transformers
from models import olmoe
from safetensors.torch import load_file, save_file
from wording import says

import moeprof
from moeprof import demo
from moeprof.cli import main


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The folder of a small model with its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "good"
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo.PATH, local_files_only=True)
    olmoe(vocab_size=len(tokenizer), max_position_embeddings=1024).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(good, tmp_path):
    """A copy of it, to be damaged."""
    return shutil.copytree(good, tmp_path / "model")


COMMANDS = {
    "sweep": ["--tokens", "300", "--null", "normal", "--out", "out"],
    "profile": ["--tokens", "300", "--continuations", "0", "--out", "out"],
    "compare": ["--out", "out"],
    "diagnose": ["--null", "normal", "--positions", "0", "--out", "out"],
    "calibrate": ["--text", "text.txt", "--out", "out.npz"],
}


@pytest.fixture
def fails(tmp_path, monkeypatch, capsys):
    """A function: the one line that a command says of a folder."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    (work / "text.txt").write_text(demo.heldout_texts()[0].text[:3000])

    def failed(folder, command="profile", *options):
        capsys.readouterr()
        assert main([command, "--model", str(folder), *COMMANDS[command], *options]) == 2
        said = capsys.readouterr()
        assert said.out == "" and re.fullmatch(r"moeprof: error: [^\n]+\n", said.err)
        assert [path.name for path in work.iterdir()] == ["text.txt"]
        return said.err

    return failed


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def change_weights(folder, change):
    """change: {name: tensor} -> {name: tensor}"""
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def shortened(weights):
    return {n: w[:3].contiguous() if "q_proj" in n else w for n, w in weights.items()}


def pickled(folder):
    """Weights whose loading would run code."""

    class Code:
        def __reduce__(self):
            return pathlib.Path.touch, (folder / "ran",)

    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Code()))


def without_vocabulary(folder):
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"] |= {"vocab": {}, "merges": []}
    tokenizer |= {"added_tokens": [], "post_processor": None}
    path.write_text(json.dumps(tokenizer))


DAMAGE = {
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "can't be loaded"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "can't be loaded"),
    "null": (lambda f: (f / "config.json").write_text("null"), "can't be loaded"),
    "bytes": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\0"), "can't be loaded"),
    "deep": (lambda f: (f / "config.json").write_text("[" * 10**5), "RecursionError"),
    "unknown": (lambda f: change_config(f, model_type="unknown"), "can't be loaded"),
    "no number": (lambda f: change_config(f, num_experts="x"), "can't be loaded"),
    "width 0": (lambda f: change_config(f, hidden_size=0), "model"),
    "activation": (lambda f: change_config(f, hidden_act="unknown"), "can't be loaded"),
    "k over E": (lambda f: change_config(f, num_experts_per_tok=9), "loaded, but can't run"),
    "more layers": (lambda f: change_config(f, num_hidden_layers=3), "the checkpoint lacks"),
    "no layers": (lambda f: change_config(f, num_hidden_layers=0), "No routers found"),
    "other shapes": (lambda f: change_weights(f, shortened), "q_proj.weight is another one"),
    "header": (lambda f: (f / "model.safetensors").write_bytes(bytes(9)), "can't be loaded"),
    "no weights": (lambda f: (f / "model.safetensors").write_bytes(b""), "can't be loaded"),
    "pickle": (pickled, "can't be loaded"),
    "no language model": (lambda f: transformers.ViTConfig().save_pretrained(f), "can't be loaded"),
    "tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "can't be loaded"),
    "no vocabulary": (without_vocabulary, "tokenizer"),
}


@pytest.mark.slow  # moeprof reads the files before transformers does
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_folders(fails, folder, damage):
    change, words = DAMAGE[damage]
    change(folder)
    said = fails(folder)
    assert words in said and (str(folder) in said or damage == "no layers")
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_tries_the_model(fails, folder, command):
    change_config(folder, num_experts_per_tok=9)
    assert "was loaded, but can't run" in fails(folder, command)


def test_a_text_that_the_tokenizer_refuses():
    class Refuses(Exception):
        pass

    def tokenizer(text, **options):
        raise Refuses("no token for it")

    with pytest.raises(ValueError, match="can't read the text 'One two' .*Refuses: no token for"):
        moeprof.fit_null(olmoe(), tokenizer, ["One two"])


@pytest.fixture
def remote(folder):
    """A model that needs code of its own, which leaves a file where it is run."""
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "of_its_own",
        "auto_map": {"AutoConfig": "its_code.ItsConfig", "AutoModelForCausalLM": "its_code.Its"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "its_code.py").write_text(
        "import pathlib\n"
        f"pathlib.Path({str(folder / 'ran')!r}).touch()\n"
        "from transformers import OlmoeConfig, OlmoeForCausalLM\n"
        "class ItsConfig(OlmoeConfig):\n    model_type = 'of_its_own'\n"
        "class Its(OlmoeForCausalLM):\n    config_class = ItsConfig\n"
    )
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_code_that_comes_with_a_model_is_not_run(fails, remote, command):
    assert "--trust-remote-code" in fails(remote, command)
    assert not (remote / "ran").exists()


@pytest.mark.filterwarnings("ignore:the null was fitted to")
def test_code_that_comes_with_a_model_is_run_when_asked(remote, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    (tmp_path / "text.txt").write_text(demo.heldout_texts()[0].text[:3000])
    options = ["--text", "text.txt", "--out", "out.npz", "--trust-remote-code"]
    main(["calibrate", "--model", str(remote), *options])
    assert (remote / "ran").exists() and "trust" not in capsys.readouterr().err


# ---- experts in 8 and 4 bits ----


@pytest.mark.slow
def test_bits(good, tmp_path, monkeypatch, capsys):
    """Quantised as it is read, and read back from where it was saved."""
    monkeypatch.chdir(tmp_path)
    model = moeprof.load(good, 4, progress=False)
    moeprof.save_quantized(model, "saved")
    for file in good.glob("tokenizer*"):
        shutil.copy(file, "saved")
    said = []
    for options in (["--model", str(good), "--bits", "4"], ["--model", "saved"]):
        assert main(["inspect", *options]) == 0
        # Which memory lies on huge pages is the system's choice, another one in each run.
        lines = capsys.readouterr().out.splitlines()
        said.append([line for line in lines if not line.startswith("On huge pages: ")])
    assert said[0] == said[1] and any(" q4 " in line for line in said[0])
    assert main(["inspect", "--bits", "8"]) == 0 and " q8 " in capsys.readouterr().out
    assert main(["inspect", "--model", "saved", "--bits", "8"]) == 2
    assert says(capsys.readouterr().err, "bits=8", "q4")
    (tmp_path / "prompt.txt").write_text("The list is\n")
    few = ["--tokens", "300", "--budget-tokens", "256", "--static", "1", "--prompts", "prompt.txt"]
    sweep = ["--alphas", "0.3", "--max-k", "4", *few, "--null", "normal", "--out", "out"]
    assert main(["sweep", "--model", "saved", *sweep]) == 0
    assert "experts in q4" in (tmp_path / "out" / "bh_routing_report.md").read_text()


def test_sweep_of_a_model_of_two_experts(good, tmp_path, monkeypatch, capsys):
    """The default --max-k is then the number of experts; one that is given has to fit."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(good)
    sizes = {"num_experts": 2, "num_experts_per_tok": 1, "max_position_embeddings": 1024}
    olmoe(vocab_size=len(tokenizer), **sizes).save_pretrained(tmp_path / "two")
    tokenizer.save_pretrained(tmp_path / "two")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompt.txt").write_text("The list is\n")
    few = ["--tokens", "300", "--budget-tokens", "256", "--static", "1", "--prompts", "prompt.txt"]
    sweep = ["sweep", "--model", "two", "--alphas", "0.3", *few, "--null", "normal", "--out", "out"]
    assert main([*sweep, "--max-k", "4"]) == 2
    assert says(capsys.readouterr().err, "--max-k", "at most 2", "got 4")
    assert main(sweep) == 0
    run = json.loads((tmp_path / "out" / "bh_routing_full_results.json").read_text())
    assert [row["config"] for row in run["results"]] == ["topk_1_baseline", "bh_k2_a030"]


def test_prompts_that_a_model_has_no_positions_for(folder, tmp_path, monkeypatch, capsys):
    """Said before a null is fitted, with the option that takes others."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", "--model", str(folder), "--tokens", "64", "--out", "out"]) == 2
    assert says(capsys.readouterr().err, "64 positions", "--prompts FILE")
    assert not (tmp_path / "out").exists()
