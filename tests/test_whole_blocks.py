"""Blocks of transformers 4.57: one call to C, or not patched."""

import pytest
import torch
import zoo
from models import assert_unchanged, relative, snapshot
from torch import nn

import moeprof
from moeprof.models.blocks import find_blocks

pytestmark = pytest.mark.skipif(zoo.V5, reason="transformers 5 has other blocks")

GRANITE = ("granitemoe", "granitemoeshared")


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


@pytest.mark.parametrize("name", GRANITE)
def test_granite_in_bfloat16_returns_what_stock_does(name):
    model = zoo.build(name).bfloat16()
    block, x = last_block(model), torch.randn(2, 5, zoo.H).bfloat16()
    with torch.no_grad():
        stock, said = block(x)
        with moeprof.patch(model):
            ours, our_said = block(x)
    assert ours.dtype == stock.dtype and our_said.dtype == said.dtype
    assert torch.equal(our_said, said) and relative(ours.float(), stock.float()) < 1e-2


@pytest.mark.parametrize("name", GRANITE)
def test_granite_is_profiled_the_same_patched_or_not(name):
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


def test_granite_compiles_as_one_graph():
    """One block: the stock model's own graph breaks at its router."""
    model, x = zoo.build("granitemoe"), torch.randn(1, 5, zoo.H)
    block = last_block(model)
    with moeprof.patch(model), torch.no_grad():
        expected, _ = block(x)
        compiled = torch.compile(block, fullgraph=True, backend="eager")
        assert torch.equal(compiled(x)[0], expected)
