"""Folders that are no model: one line on stderr, exit code 2, nothing written, no code run."""

import json
import re
import shutil

import pytest
import transformers
from models import olmoe

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
    "sweep": ["--heldout-tokens", "300", "--null", "normal", "--out", "out"],
    "profile": ["--tokens", "300", "--prompts", "0", "--out", "out"],
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
    (work / "text.txt").write_text(demo.heldout_documents()[0].text[:3000])

    def failed(folder, command="profile", *options):
        capsys.readouterr()
        assert main([command, "--model", str(folder), *COMMANDS[command], *options]) == 2
        said = capsys.readouterr()
        assert said.out == "" and re.fullmatch(r"moeprof: error: [^\n]+\n", said.err)
        assert [path.name for path in work.iterdir()] == ["text.txt"]
        return said.err

    return failed


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


def test_code_that_comes_with_a_model_is_run_when_asked(remote, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    (tmp_path / "text.txt").write_text(demo.heldout_documents()[0].text[:3000])
    options = ["--text", "text.txt", "--out", "out.npz", "--trust-remote-code"]
    main(["calibrate", "--model", str(remote), *options])
    assert (remote / "ran").exists() and "trust" not in capsys.readouterr().err
