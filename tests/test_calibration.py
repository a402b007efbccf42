"""Fitting a null through both layouts of OLMoE."""

import copy
import math

import numpy as np
import pytest
from nulls import assert_same, null_of

from moeprof import calibration
from moeprof import null as nulls
from moeprof.null import LayerNull, Null

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
    model = transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**{
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 16, "num_experts": 8,
        "num_hidden_layers": layers, "num_attention_heads": 2, "num_key_value_heads": 2,
        "num_experts_per_tok": 2, "initializer_range": 0.3, "pad_token_id": 0,
        "eos_token_id": 1, **config,
    }))
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return olmoe()


def fit(model, texts=TEXTS, **options):
    return calibration.fit_null(model, Tokenizer([5, 6]), texts, **{"progress": False, **options})


def gate_logits(model, ids):
    """Each gate's logits (T,E) for one sequence, computed from the gate's input."""
    import torch

    inputs, handles = {}, []
    for i, layer in enumerate(model.model.layers):
        handles.append(layer.mlp.gate.register_forward_pre_hook(
            lambda module, args, i=i: inputs.__setitem__(i, args[0].reshape(-1, 32))
        ))
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
    counter = calibration._Histograms(2, 8, score, *trim)
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
    np.testing.assert_allclose(null.largest, np.stack(counter.largest), rtol=1e-6)


def test_a_fit_takes_no_special_tokens_and_windows_of_any_text(model):
    # Windows of 8 of "abcdefghij": 7 + 1 tokens counted; 1 left over is none.
    assert fit(model, ["abcdefghij"], window=8).tokens == 8
    assert fit(model, ["abcdefghi"], window=8).tokens == 7
    assert fit(model, ["abcdefghij"]).tokens == 9


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
        (name, key, dict(value)) for name, module in model.named_modules()
        for key, value in vars(module).items() if "hooks" in key and isinstance(value, dict)
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


@pytest.mark.parametrize("options, message", [
    ({"kind": "efron"}, "kind: expected one of trimmed, all, got 'efron'"),
    ({"score": "z"}, "score: expected one of logprob, logit, got 'z'"),
    ({"r_high": 4, "r_low": 4}, "sum below the 8 experts, got 4 and 4"),
    ({"r_high": -1}, "got -1 and 1"),
    ({"kind": "all", "r_high": 1}, "belong to kind='trimmed'"),
    ({"window": 1}, "window: expected at least 2"),
    ({"texts": []}, "at least 2 tokens, got 0"),
    ({"texts": ["a", ""]}, "at least 2 tokens, got 2"),
])
def test_bad_options(model, options, message):
    with pytest.raises(ValueError, match=message):
        fit(model, **options)


def test_bad_arguments(model):
    torch = pytest.importorskip("torch")
    for texts in ("one string", [b"bytes"]):
        with pytest.raises(TypeError, match="list of strings"):
            fit(model, texts)
    with pytest.raises(ValueError, match="No routers found"):
        fit(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="lies below -32"):
        null_of(np.full((3, 2), -40, np.float32), score="logit")


def test_an_unreadable_gate_is_named():
    with pytest.raises(ValueError, match="Router output format unexpected at g: .* got NoneType"):
        calibration._window_logits("g", None, 3, 8)
    with pytest.raises(ValueError, match=r"expected logits \(3,8\), got \(8, 3\)"):
        calibration._window_logits("g", np.zeros((8, 3)), 3, 8)
    with pytest.raises(ValueError, match="got tuple"):  # scores and indices
        calibration._window_logits("g", (np.zeros((3, 8)), np.zeros((3, 2))), 3, 8)


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
        str(tmp_path): tmp_path.name, "/home/me/olmoe-tuned": "olmoe-tuned",
        "allenai/OLMoE-1B-7B-0924": "allenai/OLMoE-1B-7B-0924", "": "OlmoeForCausalLM",
    }
    for path, name in names.items():
        own.config._name_or_path = path
        assert nulls.model_name(own) == name


def test_the_bar_is_for_long_fits_only(model, capfd):
    fit(model, progress=True)
    assert capfd.readouterr() == ("", "")


def test_layer_null_shows_no_table():
    assert "table" not in repr(LayerNull("logit", np.zeros(3)))
