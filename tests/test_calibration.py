"""Fitting a null through both layouts of OLMoE."""

import copy
import io
import json
import math
import re
import warnings

import numpy as np
import pytest
from nulls import assert_same, null_of

from moeprof import demo
from moeprof import null as nulls
from moeprof.measure import fitting
from moeprof.models.identity import model_name
from moeprof.null import LayerNull, Null, histograms
from moeprof.texts.streams import PIECE, TextFiles

# The nulls of these tests are fitted to few tokens; that this is said is a test of its own.
pytestmark = pytest.mark.filterwarnings("ignore:the null was fitted to")

# ---------------------------------------------------------------- fitting through a model


class Tokenizer:
    """One token a character; its calls are recorded."""

    model_max_length = 8

    def __init__(self, special=()):
        self.special = list(special)

    def __call__(self, text, add_special_tokens=True, **options):
        ids = [ord(c) % 64 for c in text]
        return {"input_ids": (self.special if add_special_tokens else []) + ids}


TEXTS = ["the quick brown fox", "jumps", "x", "", "over the lazy dog again and again"]


def olmoe(seed=0, layers=2, **config):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    model = transformers.OlmoeForCausalLM(
        transformers.OlmoeConfig(
            **{
                "vocab_size": 64,
                "hidden_size": 32,
                "intermediate_size": 16,
                "num_experts": 8,
                "num_hidden_layers": layers,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "num_experts_per_tok": 2,
                "initializer_range": 0.3,
                "pad_token_id": 0,
                "eos_token_id": 1,
                **config,
            }
        )
    )
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return olmoe()


def fit(model, texts=TEXTS, **options):
    return fitting.fit_null(model, Tokenizer([5, 6]), texts, **{"progress": False, **options})


def gate_logits(model, ids):
    """Each gate's logits (T,E) for one sequence, computed from the gate's input."""
    import torch

    inputs, handles = {}, []
    for i, layer in enumerate(model.model.layers):
        handles.append(
            layer.mlp.gate.register_forward_pre_hook(
                lambda module, args, i=i: inputs.__setitem__(i, args[0].reshape(-1, 32))
            )
        )
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return [
        torch.nn.functional.linear(inputs[i], layer.mlp.gate.weight).detach().float().numpy()
        for i, layer in enumerate(model.model.layers)
    ]


@pytest.mark.parametrize("score", nulls.SCORES)
@pytest.mark.parametrize("kind", nulls.KINDS)
def test_fitting_counts_what_the_gates_give(model, kind, score):
    null = fit(model, kind=kind, score=score, window=8)
    trim = (1, 1) if kind == "trimmed" else (0, 0)
    counter = histograms.Histograms(2, 8, score, *trim)
    tokens = 0
    for text in TEXTS:
        ids = Tokenizer()(text)["input_ids"]
        for start in range(0, len(ids), 8):
            part = ids[start : start + 8]
            if len(part) < 2:
                continue
            tokens += len(part) - 1
            for layer, logits in enumerate(gate_logits(model, part)):
                counter.add(layer, logits[1:])
    assert (null.kind, null.score, null.r_high, null.r_low) == (kind, score, *trim)
    assert null.tokens == tokens and len(null) == 2
    assert null.counts.sum() == 2 * tokens * (8 - sum(trim))
    assert np.array_equal(null.counts, counter.counts)
    np.testing.assert_allclose(null.largest, counter.largest, rtol=1e-6)


@pytest.mark.parametrize(("k", "half"), [(1, 1), (2, 1), (3, 2), (6, 3)])
def test_half_of_the_top_k_is_trimmed_rounded_up(k, half):
    """A router's own choice is left out where it is one expert, too."""
    null = fit(olmoe(layers=1, num_experts_per_tok=k), kind="trimmed")
    assert (null.r_high, null.r_low) == (half, half)


@pytest.mark.parametrize(("experts", "most"), [(1, 0), (2, 0), (3, 1)])
def test_of_few_experts_a_score_is_left(experts, most):
    null = fit(olmoe(layers=1, num_experts=experts, num_experts_per_tok=1), kind="trimmed")
    assert (null.r_high, null.r_low) == (most, most)


def test_a_fit_takes_no_special_tokens_and_windows_of_any_text(model):
    # Windows of 8 of "abcdefghij": 7 + 1 tokens counted; 1 left over is none.
    assert fit(model, ["abcdefghij"] * 3, window=8).tokens == 3 * 8
    assert fit(model, ["abcdefghi"] * 3, window=8).tokens == 3 * 7
    assert fit(model, ["abcdefghij"] * 3).tokens == 3 * 9


def test_fits_merge_as_texts_do(model):
    whole = fit(model)
    a, b = fit(model, TEXTS[:2]), fit(model, TEXTS[2:])
    assert_same(a.merge(b), whole)
    assert_same(b.merge(a), whole)


def test_a_fit_survives_a_file(model, tmp_path):
    null = fit(model)
    null.save(tmp_path / "a.safetensors")
    loaded = Null.load(tmp_path / "a.safetensors")
    assert_same(loaded, null)
    loaded.check(model)


def snapshot(model):
    hooks = [
        (name, key, dict(value))
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if "hooks" in key and isinstance(value, dict)
    ]
    return hooks, [(name, module.training) for name, module in model.named_modules()]


def test_fitting_leaves_the_model_as_it_was(model):
    own = copy.deepcopy(model).train()
    own.model.layers[0].eval()
    before = snapshot(own)
    fit(own)
    assert snapshot(own) == before

    def fail(*args, **kwargs):
        raise RuntimeError("no forward today")

    own.model.layers[1].forward = fail
    with pytest.raises(RuntimeError, match="no forward today"):
        fit(own)
    assert snapshot(own) == before


def test_dropout_is_off_while_fitting(model):
    assert_same(fit(olmoe(attention_dropout=0.5).train()), fit(model))


def test_logits_that_are_not_finite_name_the_layer(model):
    import torch

    for value, what in ((math.nan, "NaN"), (math.inf, "infinite values")):
        own = copy.deepcopy(model)
        with torch.no_grad():
            own.model.layers[1].mlp.gate.weight[3] = value
        message = rf"model\.layers\.1\.mlp\.gate contain (NaN|{what})"
        with pytest.raises(ValueError, match=message):
            fit(own)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kind": "best"}, "kind: expected one of efron, trimmed, all, conformal, got 'best'"),
        ({"score": "z"}, "score: expected one of logprob, logit, centred, got 'z'"),
        ({"kind": "trimmed", "r_high": 4, "r_low": 4}, "sum below the 8 experts, got 4 and 4"),
        ({"kind": "trimmed", "r_high": -1}, "got -1 and 1"),
        ({"kind": "efron", "r_low": 1}, "belong to kind='trimmed'"),
        ({"kind": "all", "r_high": 1}, "belong to kind='trimmed'"),
        ({"window": 1}, "window: expected at least 2"),
        ({"texts": []}, r"at least 20 tokens \(better 2,000\), got 0 from 0 text"),
        ({"texts": ["a", ""]}, r"at least 20 tokens \(better 2,000\), got 0 from 2 text"),
        ({"texts": ["a" * 20]}, r"at least 20 tokens \(better 2,000\), got 19 from 1 text"),
    ],
)
def test_bad_options(model, options, message):
    with pytest.raises(ValueError, match=message):
        fit(model, **options)


@pytest.mark.slow  # tokens are counted, whatever model it is
@pytest.mark.parametrize("tokens, warned", [(20, True), (1999, True), (2000, False)])
def test_a_null_of_few_tokens_is_warned_of(model, tokens, warned):
    """20 are one score beyond BH's first threshold at alpha 0.05, 2,000 are a hundred."""
    texts = ["a" * 21] * (tokens // 20)
    texts += ["a" * (tokens % 20 + 1)] if tokens % 20 else []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert fit(model, texts).tokens == tokens
    messages = [str(w.message) for w in caught]
    assert len(messages) == warned
    assert all(f"fitted to {tokens:,} tokens" in m and "2,000" in m for m in messages)


def test_bad_arguments(model):
    torch = pytest.importorskip("torch")
    for texts in ("one string", [b"bytes"]):
        with pytest.raises(TypeError, match="list of strings"):
            fit(model, texts)
    with pytest.raises(ValueError, match="No routers found"):
        fit(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="lies below -32"):
        null_of(np.full((3, 2), -40, np.float32), score="logit")


def test_an_unreadable_gate_is_named(model):
    torch = pytest.importorskip("torch")
    from moeprof.models.blocks import find_blocks

    block = find_blocks(copy.deepcopy(model))[0]
    block.module.gate = torch.nn.Identity()  # a user's
    E, hidden = block.num_experts, torch.zeros(3, 4)
    scores, indices = torch.zeros(3, E), torch.zeros(3, 2, dtype=torch.long)

    def read(output):
        fitting._window_logits(block, (hidden, output), 3, E)

    with pytest.raises(
        ValueError, match="Router output format unexpected: .*gate: .* got NoneType"
    ):
        read(None)
    with pytest.raises(ValueError, match=rf"logits \(3, {E}\).* got .*\({E}, 3\)"):
        read(torch.zeros(E, 3))
    with pytest.raises(ValueError, match="fitted to logits .*got tuple"):
        read((scores, indices))


def test_a_users_router_around_the_gate_counts_alike(model):
    torch = pytest.importorskip("torch")

    class Wrapper(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *args, **kwargs):
            return self.inner(*args, **kwargs)

    own, null = copy.deepcopy(model), fit(model)
    for layer in own.model.layers:
        layer.mlp.gate = Wrapper(layer.mlp.gate)
    null.check(own)
    assert_same(fit(own), null)
    own.model.layers[1].mlp.gate = torch.nn.Identity()
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.gate: a router without a weight"):
        null.check(own)


def test_a_patched_model_gives_the_same_null(model):
    pytest.importorskip("moeprof._C")
    import moeprof

    own, null = copy.deepcopy(model), fit(model)
    with moeprof.patch(own):
        before = snapshot(own)
        patched = fit(own)
        assert snapshot(own) == before
        patched.check(model)
    # The experts' sums round otherwise, which moves a score over an edge of its bin at times.
    assert np.array_equal(patched.counts[0], null.counts[0])
    moved = np.abs(patched.counts[1].astype(int) - null.counts[1].astype(int)).sum()
    assert moved <= 0.01 * null.counts[1].sum()


def test_check_knows_the_model_in_every_dtype(model):
    import torch

    null = fit(model)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        own = copy.deepcopy(model).to(dtype)
        null.check(own)
        fit(own).check(model)


def test_check_refuses_another_model(model):
    null = fit(model)
    others = {
        "the weights of the routers differ": olmoe(seed=1),
        "it has 2 MoE layers, the model 3": olmoe(layers=3),
        "it has 8 experts a layer, the model [6]": olmoe(num_experts=6),
    }
    for message, other in others.items():
        other.config._name_or_path = "somebody/else"
        with pytest.raises(ValueError) as caught:
            null.check(other)
        text = str(caught.value)
        assert message in text and "'somebody/else'" in text and repr(null.model_name) in text


def test_the_recorded_name_tells_no_path(model, tmp_path):
    own = copy.deepcopy(model)
    names = {
        str(tmp_path): tmp_path.name,
        "/home/me/olmoe-tuned": "olmoe-tuned",
        "allenai/OLMoE-1B-7B-0924": "allenai/OLMoE-1B-7B-0924",
        "": "OlmoeForCausalLM",
    }
    for path, name in names.items():
        own.config._name_or_path = path
        assert model_name(own) == name


def test_a_model_within_a_module_has_its_nulls(model):
    """A user's, around it, which has no config."""
    from torch import nn

    class Wrapper(nn.Module):
        def forward(self, *args, **kwargs):
            return self.model(*args, **kwargs)

    own, wrapper = copy.deepcopy(model), Wrapper()
    own.config._name_or_path, wrapper.model = "somebody/else", own
    null = fit(wrapper)
    assert null.model_name == "somebody/else" and (null.counts == fit(own).counts).all()
    null.check(wrapper)
    with pytest.raises(ValueError, match="'somebody/else'.*it has 2 MoE layers, the model 1"):
        null.check(own.model.layers[0])


@pytest.mark.parametrize("part", ["layers.0", "layers.0.mlp"])
def test_a_part_of_a_model_is_not_fitted(model, part):
    with pytest.raises(TypeError, match="fit_null: model: expected .*input_ids.* got Olmoe"):
        fit(model.model.get_submodule(part))


def test_no_bar_where_there_is_no_terminal(model, capfd):
    fit(model, progress=True)
    assert capfd.readouterr() == ("", "")


def test_the_bar_of_files_shows_what_is_left(model, tmp_path, monkeypatch):
    """The share of the files' bytes, and the time that the rest will take."""
    from rich.console import Console

    path, screen = tmp_path / "text.txt", io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=80)
    path.write_text("the quick brown fox\n" * 400)
    monkeypatch.setattr("moeprof.measure.fitting.make_console", lambda: terminal)
    fit(model, TextFiles([path]), progress=True)
    shown = re.sub(r"\x1b\[[\d;?]*\w", "", screen.getvalue())
    assert re.search(r"calibrating .* [\d.]*8/8 kB of text 0:\d\d:\d\d 0:00:00", shown)
    screen.truncate(0)
    fit(model, TextFiles([path]), progress=False)
    assert not screen.getvalue().strip("\0")


# ---------------------------------------------------------------- any amount of text


def test_an_iterator_is_read_as_the_model_needs_it(model):
    """One text at a time: the next is asked for when the last has been counted."""
    asked, forwards = [], []

    def texts():
        for text in TEXTS:
            asked.append(text)
            yield text

    hook = model.model.register_forward_pre_hook(lambda *_: forwards.append(len(asked)))
    try:
        null = fit(model, texts())
    finally:
        hook.remove()
    assert forwards == [1, 2, 5]  # "x" and "" have no window
    assert_same(null, fit(model))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_text(model):
    """What is garbage is collected after each text: when Python does it depends on other tests."""
    import gc
    import tracemalloc

    def texts(count):
        for i in range(count):
            gc.collect()
            yield f"text {i} " * 60

    fit(model, texts(1))

    def peak(count):
        tracemalloc.start()
        fit(model, texts(count))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    gc.freeze()  # what there is already isn't looked through
    try:
        few, many = peak(20), peak(200)
    finally:
        gc.unfreeze()
    assert many < few + 200_000  # the texts alone are 100,000 characters


def test_what_is_no_text_in_an_iterator_is_an_error(model):
    with pytest.raises(TypeError, match="got bytes among them"):
        fit(model, iter(["text", b"bytes"]))
    with pytest.raises(TypeError):
        fit(model, 3)


def test_counting_in_lumps_is_counting_one_by_one():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((2 * histograms._PENDING + 77, 3)).astype(np.float32)
    whole, pieces = (histograms.Histograms(1, 3, "centred") for _ in range(2))
    whole.add(0, logits)
    reused = np.empty((100, 3), np.float32)
    for start in range(0, len(logits), 100):
        part = reused[: len(logits[start : start + 100])]
        part[:] = logits[start : start + 100]  # as a gate may: into the memory it gave before
        pieces.add(0, part)
    assert np.array_equal(whole.counts, pieces.counts)
    assert np.array_equal(whole.largest, pieces.largest)
    assert whole.counts.sum() == logits.size


# ---------------------------------------------------------------- text files


def test_a_file_comes_in_pieces_that_end_where_text_ends(tmp_path):
    paragraphs = [f"{i}: " + "word " * (i % 300) + "\n\n" for i in range(1500)]
    text = "".join(paragraphs)
    path = tmp_path / "a.txt"
    path.write_text(text)
    files = TextFiles([path, path])
    pieces = list(files)
    assert "".join(pieces) == text * 2 and files.total_bytes == 2 * len(text)
    assert len(pieces) > 10 and max(map(len, pieces)) <= PIECE
    assert all(piece.endswith("\n\n") for piece in pieces)
    assert list(files) == pieces  # again


@pytest.mark.parametrize("unit, end", [("line\n", "\n"), ("word ", " "), ("é", "é")])
def test_pieces_without_blank_lines(tmp_path, unit, end):
    path = tmp_path / "a.txt"
    text = unit * (3 * PIECE // len(unit) + 5)
    path.write_text(text, encoding="utf-8")
    pieces = list(TextFiles([path]))
    assert "".join(pieces) == text and all(p.endswith(end) and len(p) <= PIECE for p in pieces)


def test_line_ends_and_a_byte_order_mark_are_read_over(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree")
    assert list(TextFiles([path])) == ["one\ntwo\nthree"]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is empty"),
        (b" \n\n " * PIECE, "is empty"),
        (b"ok \xff", "UTF-8 text \\(byte 3\\)"),
        (b"a" * 70_000 + b"\xc3", "byte 70000"),
        (b"a" * 65_535 + b"\xe2\x82(", "byte 65535"),
        (None, "can't be read: No such file"),
    ],
)
def test_what_is_no_text_is_told_at_once(tmp_path, content, message):
    path = tmp_path / "a.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises((ValueError, OSError), match=message) as caught:
        TextFiles([path])
    assert str(path) in str(caught.value)


def test_what_holds_documents_gives_each_of_them(tmp_path):
    """Not the file's source: no key, brace or escape of a .jsonl."""
    rows = [{"text": "Grüße\naus Köln", "domain": "de"}, {"text": "x y z"}]
    (tmp_path / "A.JSONL").write_text("\n".join(map(json.dumps, rows)))
    texts = [row["text"] for row in rows]
    files = TextFiles([tmp_path / "A.JSONL"])
    assert list(files) == texts and files.total_bytes == len("Grüße\naus Köln".encode()) + 5
    (tmp_path / "b.txt").write_text("plain")
    assert list(TextFiles([tmp_path])) == [*texts, "plain"]
    (tmp_path / "a.jsonl").write_text('{"messages": []}')
    with pytest.raises(ValueError, match="line 1: no such document"):
        TextFiles([tmp_path / "a.jsonl"])


def test_a_pipe_is_read_once(tmp_path):
    import os
    import threading

    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=lambda: path.write_text("from a pipe"))
    writer.start()
    files = TextFiles([path])
    assert list(files) == ["from a pipe"] and files.total_bytes is None
    writer.join()


# ---------------------------------------------------------------- the shipped null


def test_the_halves_share_no_document_and_have_each_domain():
    halves = demo.calibration_halves()
    names = [{(d.domain, d.name) for d in half} for half in halves]
    assert len(names[0]) == len(names[1]) == 64 and not names[0] & names[1]
    everything = {(d.domain, d.name) for d in demo.calibration_texts()}
    assert names[0] | names[1] == everything
    for half in halves:
        domains = [d.domain for d in half]
        assert {domains.count(domain) for domain in set(domains)} == {16}
    assert demo.calibration_halves() == halves


@pytest.mark.slow
def test_the_shipped_nulls_are_the_demo_models_and_those_of_a_refit(loaded):
    pytest.importorskip("statsmodels")
    from moeprof.demo.make import fit as command

    made = command.fitted()
    assert list(made) == ["trimmed", "efron"]
    for kind, again in made.items():
        shipped = demo.null(kind)
        shipped.check(loaded[0])
        facts = shipped.kind, shipped.score, shipped.model_name
        assert facts == (kind, "logprob", "moeprof/demo")
        assert (shipped.r_high, shipped.r_low) == ((4, 4) if kind == "trimmed" else (0, 0))
        assert demo.NULL_PATHS[kind].stat().st_size < 1_500_000
        assert (again.tokens, again.text_digest) == (shipped.tokens, shipped.text_digest)
        # Other versions and CPUs sum in another order, which takes a score over an edge at times.
        moved = np.abs(again.counts.astype(int) - shipped.counts.astype(int)).sum()
        assert moved <= 2e-3 * shipped.counts.sum()
        np.testing.assert_allclose(
            np.sort(again.largest, axis=2), np.sort(shipped.largest, axis=2), atol=1e-2
        )
        for index in range(len(shipped)):
            mine, its = shipped.layer(index), again.layer(index)
            np.testing.assert_allclose(mine.table[3:], its.table[3:], atol=1e-4)
            if kind == "efron":
                np.testing.assert_allclose(mine.local_fdr, its.local_fdr, atol=1e-2)


def test_routing_takes_the_trimmed_null_unless_told_otherwise():
    assert demo.null().kind == "trimmed"
    with pytest.raises(ValueError, match="kind: expected one of trimmed, efron, got 'all'"):
        demo.null("all")


def test_layer_null_shows_no_table():
    assert "array" not in repr(LayerNull("logit", np.zeros(3)))
