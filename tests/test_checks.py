"""Arguments of the wrong kind, and a tokenizer of another model: named, and before any work."""

import re

import pytest
import torch
import transformers
from models import olmoe

import moeprof
from moeprof import demo
from moeprof.cli import main
from moeprof.studies.comparison.compare import compare
from moeprof.studies.diagnosis import diagnose
from moeprof.studies.sweep import sweep

TEXTS = ["In the beginning God created the heaven and the earth."] * 3


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(demo.PATH, local_files_only=True)


@pytest.fixture(scope="module")
def model(tokenizer):
    return olmoe(vocab_size=len(tokenizer), max_position_embeddings=1024)


def swapped(tokenizer, model):
    """Calls with model and tokenizer, or others, in the wrong place: [(call, argument)]."""
    null, bh = demo.null(), moeprof.BH(0.3)
    return {
        "fit_null": lambda: moeprof.fit_null(tokenizer, model, TEXTS),
        "fit_null of a folder": lambda: moeprof.fit_null("folder", tokenizer, TEXTS),
        "MoEProfiler": lambda: moeprof.MoEProfiler(tokenizer),
        "MoEProfiler of a class": lambda: moeprof.MoEProfiler(type(model)),
        "patch": lambda: moeprof.patch(tokenizer),
        "unpatch": lambda: moeprof.unpatch(tokenizer),
        "OLMoERouterPatcher": lambda: moeprof.OLMoERouterPatcher(tokenizer),
        "SimpleBenchmark": lambda: moeprof.SimpleBenchmark(tokenizer, model),
        "roofline": lambda: moeprof.roofline("folder"),
        "diagnose": lambda: diagnose(null, tokenizer, model),
        "Null.diagnose": lambda: null.diagnose(tokenizer, model),
        "Null.check": lambda: null.check(tokenizer),
        "with_budget": lambda: bh.with_budget(tokenizer, model, TEXTS, 2, null="normal"),
        "layer_ablation": lambda: moeprof.layer_ablation(tokenizer, model, TEXTS),
        "run_configuration": lambda: moeprof.run_configuration(
            "topk_2_baseline", TEXTS, [None] * 3, model=tokenizer, tokenizer=model
        ),
    }


@pytest.mark.parametrize("name", swapped(None, None))
def test_no_model(tokenizer, model, name):
    kind = r"(str 'folder'|the class OlmoeForCausalLM|\w*Tokenizer\w*|TokenizersBackend)"
    with pytest.raises(TypeError, match=f"model: expected a torch.nn.Module, got {kind}") as said:
        swapped(tokenizer, model)[name]()
    assert ("swapped" in str(said.value)) == (type(tokenizer).__name__ in str(said.value))


def without_tokenizer(model):
    return {
        "fit_null": lambda wrong: moeprof.fit_null(model, wrong, TEXTS),
        "SimpleBenchmark": lambda wrong: moeprof.SimpleBenchmark(model, wrong),
        "diagnose": lambda wrong: diagnose("normal", model, wrong),
        "with_budget": lambda wrong: moeprof.BH(0.3).with_budget(
            model, wrong, TEXTS, 2, null="normal"
        ),
        "layer_ablation": lambda wrong: moeprof.layer_ablation(model, wrong, TEXTS),
        "run_configuration": lambda wrong: moeprof.run_configuration(
            "topk_2_baseline", TEXTS, [None] * 3, model=model, tokenizer=wrong
        ),
    }


@pytest.mark.parametrize("name", without_tokenizer(None))
def test_no_tokenizer(model, name):
    function = without_tokenizer(model)[name]
    for wrong, words in ((model, "OlmoeForCausalLM"), ("folder", "str 'folder'")):
        with pytest.raises(TypeError, match=f"{name}: tokenizer: expected a callable.* {words}"):
            function(wrong)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda model: moeprof.Null.load(model), "null: path: expected .*, got OlmoeForCausalLM"),
        (lambda model: demo.null().merge("null.npz"), "merge: other: expected a Null, got str"),
        (lambda model: moeprof.Profile.load(3), "Profile.load: folder: expected .* got int"),
        (lambda model: compare("folder", None, {}, None), "compare: comparison: .* got str"),
        (lambda model: sweep(model, "folder", {}), "sweep: experiment: expected an Experiment"),
        (lambda model: moeprof.fit_null(model, len, 5), "texts: expected a list .* got int"),
        (lambda model: moeprof.layer_ablation(model, len, 5), "texts: expected a list .* got int"),
        (
            lambda model: moeprof.run_configuration("topk_2_baseline", None, []),
            "run_configuration: prompts: expected a list of texts, got NoneType",
        ),
    ],
)
def test_other_arguments(model, call, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TypeError, match=words):
        call(model)
    assert not list(tmp_path.iterdir())


def test_a_profile_is_compared_with_a_profile():
    from profiles import make_profile

    with pytest.raises(TypeError, match="compare: other: expected a Profile .*, got str 'folder'"):
        make_profile().compare("folder")


# ---- a tokenizer with more ids than the embedding has rows ----


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """(a model's folder with a tokenizer of one id too many, a text that uses it)"""
    folder = tmp_path_factory.mktemp("too_large")
    olmoe(vocab_size=len(tokenizer), max_position_embeddings=1024).save_pretrained(folder / "m")
    larger = transformers.AutoTokenizer.from_pretrained(demo.PATH, local_files_only=True)
    larger.add_tokens(["<new>"])
    larger.save_pretrained(folder / "m")
    (folder / "text.txt").write_text("In the beginning <new> God created the heaven. " * 100)
    (folder / "prompts.txt").write_text("In the <new> beginning\n")
    lines = [f'{{"text": "{" ".join(["The <new> word", str(i)] * 99)}"}}' for i in range(8)]
    (folder / "texts.jsonl").write_text("\n".join(lines))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "calibrate --text text.txt --out out.npz",
        "profile --text text.txt --out out",
        "profile --text text.txt --out out --patched --ablation",
        "sweep --prompts prompts.txt --null normal --tokens 600 --out out",
        "sweep --null-text text.txt --tokens 600 --out out",
        "compare --text texts.jsonl --out out",
    ],
)
def test_the_command_line(folder, command, tmp_path, monkeypatch, capsys, tokenizer):
    monkeypatch.chdir(tmp_path)
    words = [
        str(folder / word) if "." in word and "out" not in word else word
        for word in command.split()
    ]
    assert main([*words, "--model", str(folder / "m")]) == 2
    said = capsys.readouterr()
    assert re.fullmatch(r"moeprof: error: [^\n]+\n", said.err)
    rows = len(tokenizer)
    assert f"at least {rows + 1} rows, and the model's has {rows}" in said.err
    assert not list(tmp_path.iterdir())


def larger(tokenizer):
    """A tokenizer with an id that the model of `tokenizer` has no row for."""

    def tokenise(text, **options):
        found = tokenizer(text, **options)
        found["input_ids"][0] = len(tokenizer) + 6  # the first token; of a tensor, the first row
        return found

    tokenise.decode = tokenizer.decode
    return tokenise


@pytest.mark.slow
@pytest.mark.parametrize("name", without_tokenizer(None))
def test_in_python(model, tokenizer, name):
    rows, before = len(tokenizer), {**model.state_dict()}
    with pytest.raises(ValueError, match=f"id {rows + 6}, .* {rows + 7} rows, .* has {rows}: "):
        found = without_tokenizer(model)[name](larger(tokenizer))
        found.run_config("a", TEXTS)  # of a SimpleBenchmark
    assert not model.training and all(
        torch.equal(before[n], t) for n, t in model.state_dict().items()
    )
