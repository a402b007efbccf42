"""Every model type of transformers that has an experts class, as a tiny random model.

What transformers computes is the truth, in float64. Stock experts run eagerly. On transformers 5
each family runs patched; in the other tests those of SAMPLE do, the rest with `pytest -m families`.
"""

import copy
from functools import cache
from typing import NamedTuple

import every
import pytest
import torch
from models import V5, assert_unchanged, relative, snapshot
from safetensors.torch import load_file

import moeprof
from moeprof.backends.ops import BACKENDS

BUILT = [family for family in every.families() if family not in every.NOT_BUILT]
# What `patch` refuses: {family: what the reason contains}
_NO_RECORD = "looked for blocks with a gate and experts"
# What experts in C can't be: {family: what the reason contains}
NOT_IN_C = {
    "inkling2": "activation Inkling2Softcapped",
    "inkling2_loop": "activation Inkling2LoopSoftcapped",
    "muse_spark": "a norm after each expert",
}
FALLBACKS = (
    NOT_IN_C
    if V5
    else dict.fromkeys(
        (
            "hunyuan_v1_moe",
            "jetmoe/JetMoeMoA",
            "jetmoe/JetMoeMoE",
            "llama4",
            "qwen3_omni_moe/Qwen3OmniMoeTalkerTextSparseMoeBlock",
            "qwen3_omni_moe/Qwen3OmniMoeThinkerTextSparseMoeBlock",
            "qwen3_vl_moe",
        ),
        _NO_RECORD,
    )
)
# Whose own router chooses by a rule that moeprof has no name for: {family: why}
OWN_RULE = {
    "deepseek_v4": "the first layer looks its experts up by token id",
    "inkling": "shared experts take part of the weights",
    "zaya": "a token may choose no expert",
}
PATCHED = [family for family in BUILT if family not in FALLBACKS]
ROUTED = [family for family in PATCHED if family not in OWN_RULE]
# One at least of each rule, path, activation and order of the experts' tensors
SAMPLE = """
aria cohere2_moe deepseek_v2 deepseek_v3 deepseek_v4 dots1 ernie4_5_moe flint gemma4 glm5_next
gpt_oss inkling inkling2 inkling2_loop kolibri1 lfm2_moe minimax_m2 minimax_m3_vl mistral4 mixtral
muse_spark nemotron_h olmoe openai_privacy_filter phimoe qwen2_moe qwen3_next zaya
""".split()


def sampled(names):
    """One after the other; those that others stand for have the mark `families`."""
    stood_for = {name for name in names if V5} - {*SAMPLE}
    marked = [
        pytest.param(name, marks=[pytest.mark.families] * (name in stood_for)) for name in names
    ]
    return pytest.mark.parametrize("family", marked)


each = pytest.mark.parametrize("family", BUILT)
each_patched = pytest.mark.parametrize("family", PATCHED)
some, some_patched, some_routed = sampled(BUILT), sampled(PATCHED), sampled(ROUTED)
only_5 = pytest.mark.skipif(not V5, reason="transformers 4.57 has no experts interface")


class Stock(NamedTuple):
    """What the model of a family computes by itself; shared, so not to be changed."""

    model: every.PreTrainedModel
    inputs: dict[str, torch.Tensor]
    output: torch.Tensor
    truth: torch.Tensor

    @property
    def error(self) -> float:
        return every.error(self.output, self.truth)

    @property
    def bound(self) -> float:
        """Another order of fp32 sums, in two layers: a few times what stock's own order costs."""
        return max(4 * self.error, 1e-6)

    def check(self, output: torch.Tensor) -> None:
        assert output.shape == self.output.shape and output.dtype == torch.float32
        assert every.error(output, self.truth) <= self.bound
        assert relative(output, self.output) <= 2 * self.bound  # where float64 has nothing too


@cache
def stock(family: str) -> Stock:
    model = every.build(family)
    inputs = every.inputs(model)
    output = every.run(model, inputs)
    return Stock(model, inputs, output, every.truth(model, inputs))


def generate(model, inputs):
    """(8 new tokens of each row (2, 8), their logits (2, 8, V)), greedily."""
    output = model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=8,
        min_new_tokens=8,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return output.sequences[:, -8:], torch.stack(output.logits, 1)


def own_k(family):
    """Options of `patch`: BH that takes as many experts as the model's own router."""
    k = every.top_k(family)
    return dict(router="bh", null="normal", min_k=k, max_k=k)


def routers(family):
    """Options of `patch` that leave the output as it is."""
    return ({}, own_k(family)) if family in ROUTED else ({},)


# ---- which there are ----


def test_what_cannot_be_built_is_known():
    """All else is built below: a new family in transformers fails there, and says what to do."""
    assert len(every.NOT_BUILT) == (0 if V5 else 6) and all(every.NOT_BUILT.values())
    assert set(every.NOT_BUILT) <= set(every.families())
    assert set(FALLBACKS) | set(NOT_IN_C if V5 else ()) <= set(BUILT)
    assert {"mixtral", "deepseek_v3", "gpt_oss", "granitemoe", "jamba", "olmoe"} <= set(BUILT)


@only_5
def test_the_sample_has_each_rule_and_layout():
    """A family that is in no way like those of SAMPLE is to be added to it."""
    of = {family: every.kinds(stock(family).model) for family in BUILT}
    covered = set().union(*(of[family] for family in SAMPLE))
    missing = {family: kinds - covered for family, kinds in of.items() if kinds - covered}
    assert all(of.values()) and not missing


def test_the_page_has_a_row_for_each():
    assert list(every.rows()) == BUILT, "python tests/every.py writes the table"


@each
def test_the_page_says_how_it_runs(family):
    found = every.paths(stock(family).model)
    assert every.rows()[family] == found, "python tests/every.py writes the table"


@some
def test_stock_computes(family):
    """Weights that make a test of it: finite, not all alike, no tie that float64 breaks."""
    found = stock(family)
    assert found.output.isfinite().all()
    assert found.output.std(0).mean() > 0.1 * found.output.std()
    assert 0 < found.error < 2e-6
    assert relative(torch.zeros_like(found.output), found.truth.nan_to_num()) > found.bound


@some
def test_experts_matter(family):
    """A test whose model does not show its experts would pass whatever they computed."""
    model = every.build(family)
    every.scale_experts(model, family, 0.9)
    assert relative(every.run(model, stock(family).inputs), stock(family).output) > 1e-3


# ---- the experts alone, behind transformers' interface ----


@only_5
@some
def test_experts_implementation(family):
    found = stock(family)
    model = every.build(family)
    model.set_experts_implementation("moeprof")
    if reason := NOT_IN_C.get(family):
        with pytest.raises(ValueError, match=reason):
            every.run(model, found.inputs)
    else:
        found.check(every.run(model, found.inputs))


# ---- patched ----


@pytest.mark.parametrize("family", sorted(FALLBACKS))
def test_what_cannot_be_patched_says_why_and_stays_as_it_is(family):
    found = stock(family)
    before = snapshot(found.model)
    with pytest.raises(ValueError, match=FALLBACKS[family]):
        moeprof.patch(found.model)
    assert_unchanged(found.model, before)
    assert torch.equal(every.run(found.model, found.inputs), found.output)


@each_patched
@pytest.mark.parametrize("backend", BACKENDS)
def test_own_router(family, backend):
    found = stock(family)
    with moeprof.patch(found.model, backend=backend) as handle:
        assert handle.layers and not handle.fallbacks
        found.check(every.run(found.model, found.inputs))


@some_patched
def test_generate(family):
    model, inputs, *_ = stock(family)
    if not model.can_generate():
        pytest.skip(f"{type(model).__name__} has no generate")
    inputs = {name: tensor[:, :7] for name, tensor in inputs.items()}  # padded on the left only
    tokens, logits = generate(model, inputs)
    for options in routers(family):
        with moeprof.patch(model, **options):
            our_tokens, our_logits = generate(model, inputs)
        assert torch.equal(our_tokens, tokens)
        assert relative(our_logits, logits) <= 5e-6


@some_routed
def test_another_router_that_takes_as_many(family):
    found = stock(family)
    for backend in BACKENDS:
        with moeprof.patch(found.model, backend=backend, **own_k(family)):
            found.check(every.run(found.model, found.inputs))


@some_routed
def test_another_router_that_takes_fewer(family):
    """So that what a patch does is not the model's own by chance."""
    found = stock(family)
    counts = []
    with moeprof.patch(found.model, "topk", k=1) as handle:
        handle.on_routing(lambda layer, routing: counts.append(routing.counts))
        output = every.run(found.model, found.inputs)
    assert counts and all((each_token == 1).all() for each_token in counts)
    assert output.isfinite().all()
    if every.top_k(family) > 1:
        assert relative(output, found.output) > 1e-2


@pytest.mark.parametrize("family", sorted(set(PATCHED) & set(OWN_RULE)))
def test_a_rule_without_a_name_is_left_to_the_model(family):
    """Its experts run in C; another router is refused, or leaves the layer as it is."""
    found = stock(family)
    before = snapshot(found.model)
    unnamed = [layer for layer in moeprof.inspect(found.model) if layer.path == "experts only"]
    assert unnamed and all("its router" in layer.reason for layer in unnamed)
    with pytest.raises(ValueError, match=f"{unnamed[0].name}.*rule.*moeprof.inspect"):
        moeprof.patch(found.model, "topk", k=1)
    assert_unchanged(found.model, before)
    with pytest.warns(UserWarning, match="the model's own forward.*rule"):
        handle = moeprof.patch(found.model, "topk", k=1, strict=False)
    with handle:
        assert set(handle.fallbacks) == {layer.name for layer in unnamed}


@some_patched
def test_unpatch_leaves_nothing(family):
    found = stock(family)
    before = snapshot(found.model)
    for options in routers(family):
        with moeprof.patch(found.model, **options):
            every.run(found.model, found.inputs)
        assert_unchanged(found.model, before)
        assert torch.equal(every.run(found.model, found.inputs), found.output)


@some_patched
def test_a_copy_of_a_patched_model_has_weights_of_its_own(family):
    found = stock(family)
    with moeprof.patch(found.model):
        patched = every.run(found.model, found.inputs)
        copied = copy.deepcopy(found.model)
    assert torch.equal(every.run(copied, found.inputs), patched)
    every.scale_experts(copied, family, 0)
    assert relative(every.run(copied, found.inputs), patched) > 1e-3
    assert torch.equal(every.run(found.model, found.inputs), found.output)


@some_patched
def test_saved_while_patched(family, tmp_path):
    model = stock(family).model
    model.save_pretrained(tmp_path / "stock")
    with moeprof.patch(model):
        model.save_pretrained(tmp_path / "patched")
    expected, saved = (
        load_file(tmp_path / name / "model.safetensors") for name in ("stock", "patched")
    )
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in expected.items())


@some_patched
def test_recorded_router_logits(family):
    """Those of the stock model, where a model of the family records any."""
    model, inputs = every.build(family), stock(family).inputs  # it keeps the recorder's hooks
    with torch.no_grad():
        expected = getattr(model(**inputs, output_router_logits=True), "router_logits", None)
        if expected is None:
            pytest.skip(f"{type(model).__name__} records no router logits")
        with moeprof.patch(model):
            recorded = model(**inputs, output_router_logits=True).router_logits
    assert len(recorded) == len(expected) > 0
    for ours, theirs in zip(recorded, expected, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        real = theirs.isfinite().all(-1)
        assert relative(ours[real], theirs[real]) <= stock(family).bound
