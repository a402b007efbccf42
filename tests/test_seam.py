"""Blocks that run their own forward while they are patched: what may change under a patch."""

import copy
import inspect
import types
from contextlib import nullcontext
from functools import reduce

import numpy as np
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


# ---- settings that change under a patch ----


@pytest.mark.parametrize("name", ["mixtral", "minimax"])
def test_jitter_that_comes_after_patch_is_told_of(name):
    """A block that was one call to C does more from then on, in training mode."""
    model = zoo.build(name)
    block = last_block(model)
    with moeprof.patch(model):
        block.jitter_noise = 0.5
        logits(model, name)  # in eval mode it changes nothing
        block.train()
        with pytest.raises(RuntimeError, match="layers.1.mlp.*jitter_noise.*patch again"):
            logits(model, name)


@pytest.mark.parametrize("name", ["mixtral", "minimax"])
def test_jitter_that_was_there_is_the_models_own(name):
    model, x = zoo.build(name), torch.randn(1, 3, zoo.H)
    block = last_block(model)
    block.jitter_noise = 0.5
    block.train()
    given, outputs = [], []
    with torch.no_grad():
        for patched in (False, True):
            with moeprof.patch(model) if patched else nullcontext():
                torch.manual_seed(0)
                given.append(x.clone())
                outputs.append(block(given[-1]))
    assert torch.equal(*given) and not torch.equal(given[0], x)
    assert (outputs[0] - outputs[1]).abs().max() < 1e-5 * outputs[0].abs().max()


def test_a_bias_that_is_switched_off_counts_no_longer():
    model = zoo.build("lfm2_moe")
    block = last_block(model)
    block.expert_bias += torch.linspace(-1, 1, zoo.E)
    with moeprof.patch(model):
        before = logits(model, "lfm2_moe")
        block.gate.use_expert_bias = False
        patched = logits(model, "lfm2_moe")
    stock = logits(model, "lfm2_moe")
    assert (stock - before).abs().max() > 1e-2 and (patched - stock).abs().max() < 1e-4


def test_settings_may_be_numbers_of_numpy():
    model = zoo.build("deepseek_v3")
    gate = last_block(model).gate
    for name in ("top_k", "num_group", "topk_group"):
        setattr(gate, name, np.int64(getattr(gate, name)))
    gate.top_k, gate.routed_scaling_factor = np.int64(1), np.float32(1.5)
    stock = logits(model)
    with moeprof.patch(model):
        assert (logits(model) - stock).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("name", "setting", "value", "words"),
    [
        ("deepseek_v3", "top_k", 5, "k: expected at most 4 .of 8 experts, those in the groups"),
        ("deepseek_v3", "top_k", "all", "k: expected an integer"),
        ("qwen2_moe", "top_k", 99, "k: expected at most 8 .experts"),
        ("qwen2_moe", "top_k", None, "k: expected an integer"),
        ("deepseek_v3", "routed_scaling_factor", "x", "could not convert"),
        ("deepseek_v3", "routed_scaling_factor", None, "float"),
        ("deepseek_v3", "e_score_correction_bias", torch.full((8,), torch.nan), "bias: expected"),
        ("olmoe", "top_k", 99, "k: expected at most 8"),
    ],
)
def test_a_setting_that_can_not_be_names_layer_and_family(name, setting, value, words):
    model = zoo.build(name)
    with moeprof.patch(model):
        setattr(last_block(model).gate, setting, value)
        with pytest.raises((ValueError, TypeError), match=rf"layers.1.mlp \({name}\): .*{words}"):
            logits(model, name)


# ---- how a block is called ----


@pytest.mark.parametrize("name", ["qwen2_moe", "gemma4"])
def test_hidden_states_by_keyword_wherever_they_stand(name):
    model = zoo.build(name)
    block, calls = last_block(model), []
    hook = block.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    logits(model, name)
    hook.remove()
    (hidden_states, *rest), kwargs = calls[0]
    names = [n for n in inspect.signature(type(block).forward).parameters if n != "self"]
    called = {**kwargs, **dict(zip(names[1:], rest, strict=False)), "hidden_states": hidden_states}
    with torch.no_grad():
        stock = block(**called)
        with moeprof.patch(model) as handle:
            patched = block(**called)
            assert not handle.fallbacks
    assert (patched - stock).abs().max() < 1e-4


# ---- routers on a user's gate ----


def subclass(gate):
    """A gate of a user's own class that does what the model's does."""
    gate.__class__ = type("Mine", (type(gate),), {"__module__": __name__})
    return gate


TENSORS = {
    "gemma4": "per_expert_scale",
    "deepseek_v3": "e_score_correction_bias",
    "ernie4_5_moe": "moe_statics.e_score_correction_bias",
}


def change(tensor):
    with torch.no_grad():
        tensor.copy_(torch.linspace(0.5, 1.5, zoo.E).view_as(tensor))


@pytest.mark.parametrize("name", TENSORS)
def test_a_router_on_a_subclass_of_the_gate_keeps_the_rules_tensors(name):
    path, options = TENSORS[name], dict(router="bh", alpha=0.3, max_k=4, null="normal")
    outputs = []
    for users in (False, True):
        model = zoo.build(name)
        block, gate_at = last_block(model), find_blocks(model)[-1].family.family.gate_at
        gate = getattr(block, gate_at)
        if users:
            subclass(gate)
        with moeprof.patch(model, **options):
            before = logits(model, name)
            change(reduce(getattr, path.split("."), gate))
            outputs.append(logits(model, name))
        assert (outputs[-1] - before).abs().max() > 1e-3
    assert (outputs[0] - outputs[1]).abs().max() < 1e-4


@pytest.mark.parametrize("name", [*TENSORS, "lfm2_moe"])
def test_a_gate_that_lacks_the_rules_tensors_takes_no_other_router(name):
    model = zoo.build(name)
    block, gate_at = last_block(model), find_blocks(model)[-1].family.family.gate_at

    class Around(Wrapped):
        def forward(self, hidden_states, *given):
            return self.inner(hidden_states, *given)

    setattr(block, gate_at, Around(getattr(block, gate_at)))
    with pytest.raises(ValueError, match="layers.1.*router Around lacks what the family"):
        moeprof.patch(model, "topk", k=2)
    stock = logits(model, name)
    with moeprof.patch(model):
        assert (logits(model, name) - stock).abs().max() < 1e-4


# ---- blocks of a user's own class ----


def test_a_changed_block_among_stock_ones_is_told_of():
    model = zoo.build("qwen3_moe")
    block = last_block(model)
    kind = type(block)
    twice = {"forward": lambda self, x: 2 * kind.forward(self, x), "__module__": __name__}
    block.__class__ = type("Twice", (kind,), twice)
    stock, before = logits(model, "qwen3_moe"), snapshot(model)
    words = "Twice .* is made from Qwen3MoeSparseMoeBlock"
    found = moeprof.inspect(model)
    assert [layer.path for layer in found] == ["fused", "the model's own"]
    with pytest.raises(ValueError, match=f"layers.1.mlp: can't run .*{words}"):
        moeprof.patch(model)
    assert_unchanged(model, before)
    with pytest.warns(UserWarning, match=f"layers.1.mlp runs the model's own forward: .*{words}"):
        handle = moeprof.patch(model, strict=False)
    with handle:
        assert list(handle.fallbacks) == ["model.layers.1.mlp"]
        assert handle.fallbacks["model.layers.1.mlp"] in found[1].reason
        assert (logits(model, "qwen3_moe") - stock).abs().max() < 1e-4


# ---- a gate is run once ----


def test_a_gate_is_not_run_again_until_it_changes(monkeypatch):
    """What `patch` has seen a gate do is kept: a loop of configurations patches often."""
    model, ran = zoo.build("deepseek_v3"), []
    gate = last_block(model).gate
    stock = type(gate).forward
    monkeypatch.setattr(type(gate), "forward", lambda *given: ran.append(1) or stock(*given))

    def runs():
        before = len(ran)
        moeprof.patch(model).unpatch()
        return len(ran) - before

    assert (runs(), runs(), len(moeprof.inspect(model)), runs()) == (1, 0, 1, 0)
    with torch.no_grad():
        gate.weight.mul_(2)
    assert (runs(), runs()) == (1, 0)
    gate.e_score_correction_bias.data += 1
    assert (runs(), runs()) == (1, 0)
    gate.top_k = 2
    assert (runs(), runs()) == (1, 0)
    gate.of_a_user = True
    assert (runs(), runs()) == (1, 0)
    subclass(gate).__class__.__module__ = stock.__module__
    assert (runs(), runs()) == (1, 0)


def test_a_forward_of_a_users_gate_is_called_outside_of_its_block_too():
    """Also under two patches, in a copy, and after them."""
    model = zoo.build("qwen2_moe")
    gate = last_block(model).gate = Wrapped(last_block(model).gate)

    def forward(self, hidden_states):
        said, weights, ids = self.inner(hidden_states)
        return said, weights * 0.1, ids

    gate.forward = types.MethodType(forward, gate)
    x = torch.randn(5, zoo.H)
    expected = gate(x)
    with moeprof.patch(model), moeprof.patch(model):
        assert all(map(torch.equal, gate(x), expected))
        copied = copy.deepcopy(model)
        assert all(map(torch.equal, last_block(copied).gate(x), expected))
    assert all(map(torch.equal, gate(x), expected))


@pytest.mark.parametrize("form", ["logits alone", "experts first", "never called"])
def test_a_router_in_the_form_of_an_earlier_transformers_is_left_to_its_block(form, monkeypatch):
    """Which 5.6 to 5.20 have for some families: the experts run in C, another router does not."""
    model = zoo.build("qwen2_moe")
    block = last_block(model)
    gate, kind, x = block.gate, type(block.gate), torch.randn(2, 5, zoo.H)
    own = kind.forward
    if form == "never called":  # by its block; the record knows the router all the same
        monkeypatch.setattr(type(block), "forward", lambda self, x: _chosen(self, own, x))
    elif form == "logits alone":
        monkeypatch.setattr(kind, "forward", lambda self, x: own(self, x)[0])
        monkeypatch.setattr(type(block), "forward", lambda self, x: _chosen(self, own, x, gate))
    else:
        monkeypatch.setattr(
            kind, "forward", lambda self, x: tuple(own(self, x)[i] for i in (0, 2, 1))
        )
        monkeypatch.setattr(
            type(block), "forward", lambda self, x: self.experts(x[0], *self.gate(x[0])[1:])
        )
    x = x[:1]
    with torch.no_grad():
        stock = block(x)
        with moeprof.patch(model) as handle:
            assert not handle.fallbacks
            assert (block(x) - stock).abs().max() < 1e-5
            assert (block(x[:, :1]) - block(x)[..., :1, :]).abs().max() < 1e-5
        with moeprof.patch(model, lambda z: moeprof.topk_routing(z, k=1)):
            with pytest.raises(ValueError, match="layers.1.mlp.*no other router can take"):
                block(x)


def _chosen(block, own, x, asked=None):
    if asked is not None:
        asked(x[0])
    _, weights, ids = own(block.gate, x[0])
    return block.experts(x[0], ids, weights)


# ---- gradient checkpointing ----


def gradients(model, backward=True):
    """Of each parameter, of a call of Gemma 4: there the block is what is checkpointed."""
    model.zero_grad()
    loss = model(**zoo.inputs("gemma4"), use_cache=False).logits.square().sum()
    if not backward:
        return loss
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [True, False])
def test_backward_computes_again_what_a_checkpointed_block_ran(reentrant):
    model = zoo.build("gemma4").train()
    with moeprof.patch(model, "topk", k=1, backend="torch"):
        expected = gradients(model)
        model.gradient_checkpointing_enable(dict(use_reentrant=reentrant))
        with moeprof.MoEProfiler(model) as profiler:
            found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5, msg=name)
    stock = gradients(model)
    norm = "model.layers.0.post_feedforward_layernorm_2.weight"
    assert (found[norm] - stock[norm]).norm() > 0.5 * stock[norm].norm()
    assert [m.k_mean for m in profiler.get_metrics().values()] == [1, 1]


def test_a_checkpointed_block_is_to_be_patched_until_backward():
    model = zoo.build("gemma4").train()
    model.gradient_checkpointing_enable(dict(use_reentrant=True))
    with moeprof.patch(model, "topk", k=1, backend="torch"):
        loss = gradients(model, backward=False)
    with pytest.raises(RuntimeError, match=r"layers\.1.*keep the patch until after backward"):
        loss.backward()


def test_a_checkpoint_that_leaves_out_ours_is_refused():
    """A forward over the class's own, as accelerate's hooks are, calls that with its block."""
    model = zoo.build("gemma4").train()
    model.gradient_checkpointing_enable(dict(use_reentrant=True))
    block = last_block(model)
    block.forward = types.MethodType(type(block).forward, block)
    with moeprof.patch(model, "topk", k=1, backend="torch"):
        with pytest.raises(RuntimeError, match=r"layers\.1.*gradient checkpointing of a block"):
            gradients(model)
