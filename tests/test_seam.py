"""Blocks that run their own forward while they are patched: what may change under a patch."""

import types

import pytest
import torch
import zoo
from models import assert_unchanged, snapshot

import moeprof
from moeprof.models.blocks import find_blocks

pytestmark = pytest.mark.skipif(not zoo.V5, reason="transformers 4 has no seam")


def logits(model, name="deepseek_v3"):
    with torch.no_grad():
        return model(**zoo.inputs(name)).logits


def last_block(model):
    return find_blocks(model)[-1].module


@pytest.mark.parametrize("way", ["in place", ".data", "another tensor", "NumPy"])
def test_a_bias_that_is_written_counts_from_the_next_call_on(way):
    model = zoo.build("deepseek_v3")
    gate = last_block(model).gate
    more = torch.linspace(-1, 1, zoo.E)
    with moeprof.patch(model):
        before = logits(model)
        with torch.no_grad():
            bias = gate.e_score_correction_bias
            if way == "in place":
                bias.add_(more)
            elif way == ".data":
                bias.data.add_(more)
            elif way == "NumPy":
                bias.numpy()[:] += more.numpy()
            else:
                gate.e_score_correction_bias = bias + more
        patched = logits(model)
    stock = logits(model)
    assert (stock - before).abs().max() > 1e-2 and (patched - stock).abs().max() < 1e-4


@pytest.mark.parametrize("part", ["gate", "experts"])
def test_a_part_put_in_after_patch_is_told_of(part):
    model = zoo.build("qwen2_moe")
    block = last_block(model)
    with moeprof.patch(model, "topk", k=1):
        old = getattr(block, part)
        new = type(old)(model.config)
        new.load_state_dict(old.state_dict())
        setattr(block, part, new)
        with pytest.raises(RuntimeError, match="layers.1.mlp.*put in after patch.*patch again"):
            logits(model, "qwen2_moe")


class Wrapped(torch.nn.Module):
    """A user's gate around the model's own."""

    def __init__(self, gate):
        super().__init__()
        self.inner = gate

    def forward(self, hidden_states):
        return self.inner(hidden_states)


@pytest.mark.parametrize("name", ["deepseek_v3", "qwen2_moe", "ernie4_5_moe", "deepseek_v2"])
def test_a_users_gate_keeps_its_choice(name):
    model = zoo.build(name)
    stock = logits(model, name)
    block = last_block(model)
    block.gate = Wrapped(block.gate)
    with moeprof.patch(model) as handle:
        assert not handle.fallbacks
        assert (logits(model, name) - stock).abs().max() < 1e-4 * stock.abs().max()


def test_a_forward_of_a_users_gate_is_called():
    model = zoo.build("qwen2_moe")
    block = last_block(model)
    block.gate = Wrapped(block.gate)

    def forward(self, hidden_states):
        said, weights, ids = self.inner(hidden_states)
        return said, weights * 0.1, ids

    block.gate.forward = types.MethodType(forward, block.gate)
    stock = logits(model, "qwen2_moe")
    with moeprof.patch(model):
        patched = logits(model, "qwen2_moe")
    assert (patched - stock).abs().max() < 1e-4 * stock.abs().max()
    assert torch.equal(logits(model, "qwen2_moe"), stock)


def test_an_error_inside_a_block_leaves_no_call_behind():
    model = zoo.build("qwen2_moe")
    stock = logits(model, "qwen2_moe")
    with moeprof.patch(model):
        shared = last_block(model).shared_expert
        shared.forward = lambda x: 1 / 0
        with pytest.raises(ZeroDivisionError):
            logits(model, "qwen2_moe")
        del shared.forward
        assert (logits(model, "qwen2_moe") - stock).abs().max() < 1e-4
    assert torch.equal(logits(model, "qwen2_moe"), stock)


@pytest.mark.parametrize("name", ["qwen2_moe", "qwen3_moe"])
@pytest.mark.parametrize("undo", ["handle", "unpatch"])
def test_a_gate_that_two_blocks_share_is_left_as_it_was(name, undo):
    model = zoo.build(name, num_hidden_layers=2, mlp_only_layers=[])
    first, second = (block.module for block in find_blocks(model))
    second.gate = first.gate
    stock, before = logits(model, name), snapshot(model)
    handle = moeprof.patch(model, "topk", k=1)
    above = handle.__enter__() and moeprof.patch(model)
    assert (logits(model, name) - stock).abs().max() < 1e-4
    if undo == "handle":
        above.unpatch()
        handle.unpatch()
    else:
        moeprof.unpatch(model)
    assert_unchanged(model, before)
    assert torch.equal(logits(model, name), stock)
