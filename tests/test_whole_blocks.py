"""Blocks of transformers 4.57: one call to C, or not patched."""

import functools

import pytest
import torch
import zoo
from models import assert_unchanged, relative, snapshot
from torch import nn

import moeprof
from moeprof.models.blocks import find_blocks
from moeprof.models.families.transposed import GptOss

pytestmark = pytest.mark.skipif(zoo.V5, reason="transformers 5 has other blocks")

GRANITE = ("granitemoe", "granitemoeshared")
PACKED = (*GRANITE, "gpt_oss", "aria")


def logits(model, name):
    with torch.no_grad():
        return model(**zoo.inputs(name)).logits


def last_block(model):
    return find_blocks(model)[-1].module


class Wrapped(nn.Module):
    """A user's gate around the model's own."""

    def __init__(self, gate):
        super().__init__()
        self.inner = gate

    def forward(self, hidden_states):
        return self.inner(hidden_states)


def outputs(model, x):
    """What the last block returns: hidden states, and what some families give beside them."""
    with torch.no_grad():
        said = last_block(model)(x)
    return said if isinstance(said, tuple) else (said,)


@pytest.mark.parametrize("name", ["deepseek_v3", *GRANITE])
def test_a_gate_that_chooses_otherwise_leaves_the_block_alone(name):
    """It has no seam in which the experts alone could be moeprof's."""
    model = zoo.build(name)
    block = last_block(model)
    gate_at = find_blocks(model)[-1].family.family.gate_at
    setattr(block, gate_at, Wrapped(getattr(block, gate_at)))
    stock, before = logits(model, name), snapshot(model)
    found = moeprof.inspect(model)[-1]
    assert found.path == "the model's own" and "router Wrapped" in found.reason
    with pytest.raises(ValueError, match="layers.1.*router Wrapped.*only as a whole"):
        moeprof.patch(model)
    assert_unchanged(model, before)
    with pytest.warns(UserWarning, match="router Wrapped"):
        handle = moeprof.patch(model, strict=False)
    with handle:
        assert list(handle.fallbacks) == [found.name]
        assert relative(logits(model, name), stock) < 1e-5


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_block_returns_what_stock_does(name, dtype):
    model, x = zoo.build(name).to(dtype), torch.randn(2, 5, zoo.H).to(dtype)
    stock, *said = outputs(model, x)
    with moeprof.patch(model):
        ours, *our_said = outputs(model, x)
    assert ours.dtype == stock.dtype and ours.shape == stock.shape
    assert relative(ours.float(), stock.float()) < (1e-2 if dtype == torch.bfloat16 else 1e-5)
    assert len(our_said) == len(said) == (0 if name == "aria" else 1)
    for our_own, own in zip(our_said, said, strict=True):
        assert our_own.dtype == own.dtype and torch.equal(our_own, own)


@pytest.mark.parametrize("name", PACKED)
def test_a_block_is_profiled_the_same_patched_or_not(name):
    model = zoo.build(name)
    found = []
    for patched in (False, True):
        if patched:
            moeprof.patch(model)
        with moeprof.MoEProfiler(model) as profiler:
            logits(model, name)
        found.append(
            {layer: (m.tokens, m.k_mean, m.flops_total, list(m.expert_load))
             for layer, m in profiler.get_metrics().items()}
        )  # fmt: skip
    assert found[0] == found[1] and len(found[0]) == 2


def hooked(block):
    block.output_linear.register_forward_hook(lambda *_: None)


def subclassed(block):
    kind = type(block.input_linear)
    block.input_linear.__class__ = type("Mine", (kind,), {})


def transposed(block):
    weight = block.output_linear.weight
    block.output_linear.weight = nn.Parameter(weight.detach().mT.contiguous().mT)


def of_another_size(block):
    block.output_linear.weight = nn.Parameter(torch.randn(zoo.E, zoo.H, 7))


def tanh(block):
    block.activation = nn.Tanh()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (hooked, "a hook .* on GraniteMoeParallelExperts"),
        (subclassed, "input_linear of class Mine"),
        (transposed, "not contiguous"),
        (of_another_size, r"output_linear \(8, 32, 7\)"),
        (tanh, "activation Tanh"),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
@pytest.mark.parametrize("late", [False, True])
def test_granite_that_cannot_run_in_c_says_why(change, words, late):
    model = zoo.build("granitemoe")
    if late:
        with moeprof.patch(model):
            logits(model, "granitemoe")
            change(last_block(model))
            with pytest.raises(RuntimeError, match=f"layers.1.block_sparse_moe.*{words}"):
                logits(model, "granitemoe")
    else:
        change(last_block(model))
        with pytest.raises(ValueError, match=f"layers.1.block_sparse_moe.*{words}"):
            moeprof.patch(model)


@pytest.mark.parametrize("name", ["granitemoe", "gpt_oss", "aria"])
def test_a_block_compiles_as_one_graph(name):
    model, x = zoo.build(name), torch.randn(1, 5, zoo.H)
    block = last_block(model)
    with moeprof.patch(model), torch.no_grad():
        expected = outputs(model, x)[0]
        compiled = torch.compile(block, fullgraph=True, backend="eager")(x)
        assert torch.equal(compiled if name == "aria" else compiled[0], expected)


# ---- experts stored transposed ----


def hooked_experts(block):
    block.experts.register_forward_hook(lambda *_: None)


def hooked_part(block):
    block.experts.fc2.register_forward_hook(lambda *_: None)


def subclassed_experts(block):
    block.experts.__class__ = type("Mine", (type(block.experts),), {})


def without_limit(block):
    block.experts.limit = None


def another_tensor(block):
    block.experts.scale = nn.Parameter(torch.ones(zoo.E))


def down_of_another_size(block):
    block.experts.down_proj = nn.Parameter(torch.randn(zoo.E, 7, zoo.H))


def part_of_another_size(block):
    block.experts.fc2.weight = nn.Parameter(torch.randn(zoo.E, 7, zoo.H))


def another_router(block):
    block.router = Wrapped(block.router)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("gpt_oss", hooked_experts, "a hook .* on GptOssExperts"),
        ("gpt_oss", subclassed_experts, "experts of class Mine"),
        ("gpt_oss", without_limit, "alpha 1.702 and limit None where positive"),
        ("gpt_oss", another_tensor, "tensors .*scale, where gate_up_proj and"),
        ("gpt_oss", down_of_another_size, r"gate_up_proj .* beside down_proj \(8, 7, 32\)"),
        ("gpt_oss", another_router, "a router of class Wrapped"),
        ("aria", hooked_part, "a hook .* on AriaGroupedExpertsGemm"),
        ("aria", part_of_another_size, r"fc1.weight .* beside fc2.weight \(8, 7, 32\)"),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
@pytest.mark.parametrize("late", [False, True])
def test_experts_stored_transposed_that_cannot_run_in_c_say_why(name, change, words, late):
    model = zoo.build(name)
    if late:
        with moeprof.patch(model):
            logits(model, name)
            change(last_block(model))
            with pytest.raises(RuntimeError, match=f"layers.1.mlp.*{words}"):
                logits(model, name)
    else:
        change(last_block(model))
        assert moeprof.inspect(model)[-1].path == "the model's own"
        with pytest.raises(ValueError, match=f"layers.1.mlp.*{words}"):
            moeprof.patch(model)


def test_alpha_and_limit_of_gpt_oss_are_read_in_each_call():
    model, x = zoo.build("gpt_oss"), 10 * torch.randn(1, 5, zoo.H)
    for alpha, limit in ((1.702, 7.0), (0.5, 0.3), (3, 1)):
        block = last_block(model)
        block.experts.alpha, block.experts.limit = 1.702, 7.0
        with moeprof.patch(model):
            before = outputs(model, x)[0]
            block.experts.alpha, block.experts.limit = alpha, limit
            ours = outputs(model, x)[0]
        assert relative(ours, outputs(model, x)[0]) < 1e-5
        assert (alpha == 1.702) == torch.equal(ours, before)


# ---- the router of GPT-OSS: it returns scores, zero where an expert is not chosen ----


def recorded(model):
    with torch.no_grad():
        return model(**zoo.inputs("gpt_oss"), output_router_logits=True).router_logits


def test_the_scores_of_gpt_oss_are_recorded_as_stock_whenever_it_is_patched():
    model = zoo.build("gpt_oss")
    with moeprof.patch(model):
        first = recorded(model)
    stock = recorded(model)  # it leaves a forward on each router
    with moeprof.patch(model) as handle:
        last = recorded(model)
        assert not handle.fallbacks
    for ours in (first, last):
        assert len(ours) == len(stock) == 2
        for scores, own in zip(ours, stock, strict=True):
            assert scores.shape == own.shape and relative(scores, own) < 1e-5
            assert ((scores > 0).sum(1) == zoo.K).all()


def test_another_router_does_not_change_the_scores_that_gpt_oss_records():
    """As the logits of other families: what its own router says."""
    model = zoo.build("gpt_oss")
    stock = recorded(model)
    with moeprof.patch(model, "topk", k=1):
        first, _ = recorded(model)
    assert torch.equal(first, stock[0])  # what the second layer is given differs


def test_a_forward_of_the_users_on_the_router_is_not_passed_by():
    """Though by name and module it is the stock one; also while the recorder is around it."""
    model = zoo.build("gpt_oss")
    router = last_block(model).router

    def doubled(x):
        scores, ids = type(router).forward(router, x)
        return 2 * scores, ids

    with moeprof.patch(model):
        router.forward = functools.wraps(router.forward)(doubled)
        for run in (recorded, lambda model: logits(model, "gpt_oss")):
            with pytest.raises(RuntimeError, match="layers.1.mlp.*gate has a forward of its own"):
                run(model)
    with pytest.raises(ValueError, match="layers.1.mlp.*gate has a forward of its own"):
        moeprof.patch(model)


def test_a_null_of_gpt_oss_is_fitted_to_the_logits_of_its_matrix():
    """Its router returns the scores of its choice, which are no logits."""
    model, x = zoo.build("gpt_oss"), torch.randn(1, 5, zoo.H)
    block = find_blocks(model)[-1]
    router = block.module.router
    with torch.no_grad():
        found = block.gate_logits(router(x), x)
        assert torch.equal(found, nn.functional.linear(x[0], router.weight, router.bias))


def test_a_router_of_gpt_oss_that_does_otherwise_is_seen():
    model = zoo.build("gpt_oss")
    router = last_block(model).router
    assert isinstance(find_blocks(model)[-1].family, GptOss)

    class Doubled(type(router)):
        def forward(self, hidden_states):
            scores, ids = super().forward(hidden_states)
            return 2 * scores, ids

    Doubled.__module__ = type(router).__module__
    router.__class__ = Doubled
    with pytest.raises(
        ValueError, match="layers.1.mlp.*weighed experts otherwise.*only as a whole"
    ):
        moeprof.patch(model)
