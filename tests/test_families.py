"""A family of MoE blocks is a record: without it `patch` doesn't know its blocks, with it does.

All families run in test_every_family.py; here is what holds for the records.
"""

import inspect

import numpy as np
import pytest
import torch
import zoo
from models import V5, olmoe

import moeprof
from moeprof.measure.fitting import _trimming
from moeprof.models import families
from moeprof.models.blocks import experts_of, find_blocks, model_sizes
from moeprof.models.families.base import Family
from moeprof.models.families.rules import GateRule
from moeprof.studies.sweep import configurations, dropped_max_ks

# A rule or layout each.
SAMPLE = ("olmoe", "qwen3_moe", "mixtral", "deepseek_v3", "granitemoe", "gpt_oss", "aria")


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(params=SAMPLE)
def family(request):
    return request.param


def test_a_record_is_all_that_a_family_of_these_layouts_takes(family):
    model, inputs = zoo.build(family), zoo.inputs(family)
    layers = len(zoo.ZOO[family].layers)
    with torch.no_grad():
        stock = model(**inputs).logits
        with moeprof.patch(model) as handle:
            assert len(handle.layers) == layers and not handle.fallbacks
            assert (model(**inputs).logits - stock).abs().max() < 1e-4
        with moeprof.patch(model, "topk", k=1) as handle:
            seen = []
            handle.on_routing(lambda layer, routing: seen.append(routing.counts))
            assert (model(**inputs).logits - stock).abs().max() > 1e-2
            assert all((counts == 1).all() for counts in seen) and len(seen) == layers
        assert torch.equal(model(**inputs).logits, stock)


@pytest.mark.filterwarnings("ignore:the null was fitted to")
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_null_is_fitted_to_a_patched_model_as_to_its_own(family, dtype):
    """Also where a patched block does without its gate, as some on transformers 4."""
    model = zoo.build(family).to(dtype)

    def tokenizer(text, **_):
        return {"input_ids": torch.randint(2, 60, (64,), generator=seeded(0)).tolist()}

    own = moeprof.fit_null(model, tokenizer, ["a text"], progress=False)
    with moeprof.patch(model, linears=True):
        patched = moeprof.fit_null(model, tokenizer, ["a text"], progress=False)
    # The first layer's gate sees the same but for linear layers before it, in 16 bits.
    moved = np.abs(patched.counts[0].astype(int) - own.counts[0].astype(int)).sum()
    assert moved <= (0.02 if dtype == torch.float32 else 0.5) * own.counts[0].sum()
    assert patched.counts.sum() == own.counts.sum() > 0


def test_inspect_knows_it(family):
    found = {(layer.family, layer.path) for layer in moeprof.inspect(zoo.build(family))}
    # transformers 4 has no seam: the block is one call to C, or it isn't run.
    path = "seam" if zoo.V5 and family in ("deepseek_v3", "gpt_oss", "aria") else "fused"
    assert found == {(family, path)}


def test_without_the_record_it_is_named_as_unknown(family, monkeypatch):
    left = tuple(record for record in families.FAMILIES if record.name != family)
    monkeypatch.setattr(families, "FAMILIES", left)
    with pytest.raises(ValueError, match="No routers found in .*families that moeprof.patch knows"):
        moeprof.patch(zoo.build(family))


def only(monkeypatch, record):
    monkeypatch.setattr(families, "FAMILIES", (record,))


@pytest.mark.parametrize("name", ["olmoe", "mixtral", "deepseek_v3", "granitemoe"])
def test_a_gate_of_zeros_has_its_rule_though_all_its_logits_tie(name):
    model = zoo.build(name)
    with torch.no_grad():
        for block in find_blocks(model):
            for parameter in block.family.gate_of(block.module).parameters():
                parameter.zero_()
    with moeprof.patch(model, "topk", k=1) as handle:
        assert handle.layers and not handle.fallbacks


@pytest.mark.skipif(not zoo.V5, reason="on transformers 4 the block chooses, and shows nothing")
@pytest.mark.parametrize(
    "wrong",
    [GateRule(renormalises=False), GateRule(affinity="sigmoid"), GateRule(scale=2.0)],
    ids=["unscaled", "sigmoid", "twice"],
)
def test_a_gate_that_does_not_do_what_its_record_says_keeps_its_own_choice(wrong, monkeypatch):
    only(monkeypatch, Family("mixtral", wrong))
    model, inputs = zoo.build("mixtral"), zoo.inputs("mixtral")
    with torch.no_grad():
        stock = model(**inputs).logits
        with moeprof.patch(model) as handle:
            seen = []
            handle.on_routing(lambda layer, routing: seen.append(routing.weights.sum(1)))
            assert (model(**inputs).logits - stock).abs().max() < 1e-4
        assert all(torch.allclose(total, torch.ones_like(total)) for total in seen) and seen
        for router, options in (("topk", {"k": 1}), ("bh", {"null": "normal"})):
            with pytest.raises(ValueError, match="layers.0.*rule.*mixtral.*moeprof.inspect"):
                moeprof.patch(model, router, **options)
        assert torch.equal(model(**inputs).logits, stock)


# ---- what studies ask of the layers, not of a configuration ----


def test_experts_and_k_are_the_layers_own_whatever_the_configuration_calls_them():
    model = zoo.build("qwen3_moe")
    experts, k = (getattr(find_blocks(model)[0], name) for name in ("num_experts", "top_k"))
    model.config.num_experts = model.config.num_experts_per_tok = 99
    assert experts_of(model) == (experts, k)
    sizes = model_sizes(model)
    assert (sizes["num_experts"], sizes["num_experts_per_tok"]) == (experts, k)
    assert _trimming("trimmed", None, None, model, experts)[0] == (k + 1) // 2
    names = [c.name for c in configurations(*experts_of(model))]
    assert names[0] == f"topk_{k}_baseline" and len(names) == 1 + 4 * (
        5 - len(dropped_max_ks(experts))
    )
    assert configurations(*experts_of(model))[0].router(k) is None  # its own top-k


def test_layers_that_take_different_numbers_of_experts():
    model = olmoe()
    block = find_blocks(model)[1].module
    (block.gate if V5 else block).top_k = 4
    assert [block.top_k for block in find_blocks(model)] == [2, 4]
    with pytest.raises(ValueError, match=r"layers\.0\.mlp takes 2, .*layers\.1\.mlp takes 4"):
        experts_of(model)
    assert _trimming("trimmed", None, None, model, 8) == (2, 2)  # no layer's own choice counts
    moeprof.patch(model).unpatch()


# ---- how a block of one call to C is called, and what its layer says of itself ----


@pytest.mark.parametrize("name", ["granitemoe", "olmoe", "mixtral"])
def test_the_only_argument_of_a_block_by_the_name_that_its_class_has(name):
    model = zoo.build(name)
    block, x = find_blocks(model)[0].module, torch.randn(2, 5, zoo.H)
    parameter = list(inspect.signature(type(block).forward).parameters)[1]
    with torch.no_grad(), moeprof.patch(model) as handle:
        assert handle.layers[0].fused
        named, placed = block(**{parameter: x}), block(x)
        pairs = zip(named, placed, strict=True) if isinstance(named, tuple) else [(named, placed)]
        assert all(torch.equal(*pair) for pair in pairs)
        for args, kwargs in (((), {}), ((x, x), {}), ((x,), {parameter: x}), ((), {"other": x})):
            with pytest.raises(TypeError, match="argument"):
                block(*args, **kwargs)


def test_a_layer_says_what_it_is_and_not_what_it_has_read():
    model = zoo.build("deepseek_v3")  # its bias is read in bytes
    with moeprof.patch(model, "topk", k=1) as handle:
        model(**zoo.inputs("deepseek_v3"))
        said = repr(handle.layers[0])
    assert "model.layers.1.mlp" in said and "deepseek_v3" in said and "TopK" in said
    assert "\\x00" not in said and " at 0x" not in said and len(said) < 400
