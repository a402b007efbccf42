"""What does not run in C, and what strict= makes of it."""

import types
import warnings

import pytest
import torch
from models import (
    LAYER_1,
    ONE,
    V5,
    assert_unchanged,
    blocks,
    eager_olmoe,
    logits,
    olmoe,
    random_hidden,
    relative,
    run,
    snapshot,
)
from torch import nn
from torch.nn.utils import parametrize
from transformers.activations import ACT2FN

import moeprof
from moeprof.models.families.base import Layout

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture
def model():
    return eager_olmoe()


# ---- obstacles: each changes what the layer computes, or how its weights lie ----


def inside(block):
    """(module, weight's name): what runs an expert, with its first weight."""
    return (block.experts, "gate_up_proj") if V5 else (block.experts[3].up_proj, "weight")


def activations(block):
    return [block.experts] if V5 else list(block.experts)


def scale(output):
    """Twice the hidden states of an expert, or another choice of a gate."""
    return (output[0], output[1] * 2, output[2]) if isinstance(output, tuple) else output * 2


def scaling_forward(self, *args, **kwargs):
    return scale(type(self).forward(self, *args, **kwargs))


def scale_class(module):
    """A subclass of the module's class, as PEFT and quantisers put in its place."""
    cls = type(module)
    forward = {"forward": lambda self, *args: scale(cls.forward(self, *args))}
    module.__class__ = type(f"Lora{cls.__name__}", (cls,), forward if cls.forward else {})


class Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


class Quantised(torch.Tensor):
    """A stand-in for torchao's tensors: float32 to whoever asks, int8 inside."""

    @staticmethod
    def __new__(cls, data):
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=torch.float32)

    def __init__(self, data):
        self.scale = data.abs().max() / 127
        self.data_int8 = (data / self.scale).round().to(torch.int8)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return args[0]
        tree_map = torch.utils._pytree.tree_map
        args, kwargs = tree_map(
            lambda t: t.data_int8 * t.scale if isinstance(t, cls) else t, (args, kwargs or {})
        )
        return function(*args, **kwargs)


def set_weight(block, change):
    module, name = inside(block)
    weight = change(getattr(module, name).detach())
    setattr(module, name, nn.Parameter(weight, requires_grad=False))


def use_tanh(block):
    for module in activations(block):
        module.act_fn = ACT2FN["tanh"]


def hook_experts(block):
    inside(block)[0].register_forward_hook(lambda module, args, output: scale(output))


def pre_hook_experts(block):
    inside(block)[0].register_forward_pre_hook(lambda module, args: (args[0] * 2, *args[1:]))


def backward_hook_experts(block):
    inside(block)[0].register_full_backward_hook(lambda *_: None)


def hook_activation(block):
    activations(block)[-1].act_fn.register_forward_hook(lambda module, args, output: output * 2)


def hook_gate(block):
    block.gate.register_forward_hook(lambda module, args, output: scale(output))


def pre_hook_gate(block):
    block.gate.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def own_forward_experts(block):
    module = inside(block)[0]
    module.forward = types.MethodType(scaling_forward, module)


def own_forward_gate(block):
    block.gate.forward = types.MethodType(scaling_forward, block.gate)


def parametrise(block):
    parametrize.register_parametrization(*inside(block), Double())


def double_weight(gate):
    parametrize.register_parametrization(gate, "weight", Double())


def add_bias(block):
    block.experts[3].up_proj.bias = nn.Parameter(torch.ones(16))


def no_longer_contiguous(block):
    set_weight(block, lambda w: w.mT.contiguous().mT)


OBSTACLES = {
    "activation": (use_tanh, "activation .*Tanh"),
    "hook": (hook_experts, "a hook or a forward of its own on .* in the experts"),
    "pre-hook": (pre_hook_experts, "a hook or a forward of its own on .* in the experts"),
    "backward hook": (backward_hook_experts, "a hook or a forward of its own .* in the experts"),
    "hook on the activation": (hook_activation, "a hook .* on SiLU.* in the experts"),
    "forward": (own_forward_experts, "a hook or a forward of its own on .* in the experts"),
    "gate hook": (hook_gate, "a hook on the gate: .*hook_gate"),
    "gate pre-hook": (pre_hook_gate, "a hook on the gate: .*pre_hook_gate"),
    "gate forward": (own_forward_gate, "the gate has a forward of its own"),
    "parametrised": (parametrise, "class Parametrized"),
    "not contiguous": (no_longer_contiguous, "not contiguous"),
    "experts class": (lambda block: scale_class(block.experts), "experts of class Lora"),
}
if V5:
    OBSTACLES["quantised tensor"] = (lambda block: set_weight(block, Quantised), "Quantised")
else:
    OBSTACLES |= {
        "expert class": (lambda block: scale_class(block.experts[3]), "class LoraOlmoeMLP"),
        "linear class": (lambda block: scale_class(inside(block)[0]), "class LoraLinear"),
        "bias": (add_bias, "with a bias"),
        "quantised tensor": (lambda block: set_weight(block, Quantised), "Quantised"),
    }
obstacles = pytest.mark.parametrize("obstacle", OBSTACLES)


def watch(handle):
    """The indices of the layers that run in C, as they run."""
    seen = []
    handle.on_routing(lambda index, routing: seen.append(index))
    return seen


def assert_one_warning(caught, words):
    (warning,) = caught
    assert issubclass(warning.category, UserWarning)
    with pytest.raises(Exception, match=f"{LAYER_1} runs the model's own forward: .*{words}"):
        raise warning.message


def assert_falls_back(handle, words):
    assert list(handle.fallbacks) == ["model.layers.1.mlp"]
    with pytest.raises(LookupError, match=words):
        raise LookupError(*handle.fallbacks.values())


@obstacles
def test_obstacle_is_refused(model, obstacle):
    install, words = OBSTACLES[obstacle]
    install(blocks(model)[1])
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"{LAYER_1}: can't run .*{words}"):
        moeprof.patch(model)
    assert_unchanged(model, before)


@obstacles
def test_obstacle_is_left_to_the_model(model, obstacle):
    install, words = OBSTACLES[obstacle]
    block, x = blocks(model)[1], random_hidden(2, 5, 32)
    install(block)
    before, expected, stock = snapshot(model), run(block, x), logits(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        handle = moeprof.patch(model, strict=False)
        assert_falls_back(handle, words)
        seen = watch(handle)
        for _ in range(2):
            assert torch.equal(run(block, x), expected)
            assert relative(logits(model), stock) <= 1e-5
    assert_one_warning(caught, words)
    assert set(seen) == {0}  # the other layer runs in C
    handle.unpatch()
    assert_unchanged(model, before)


# These change the way to the result, not the result.
UNSEEN = {"not contiguous", "backward hook"} | (set() if V5 else {"experts class"})
LATER = [name for name in OBSTACLES if name != "quantised tensor"]  # has no memory to look at


@pytest.mark.parametrize("obstacle", LATER)
def test_obstacle_that_comes_later_is_refused(model, obstacle):
    install, words = OBSTACLES[obstacle]
    with moeprof.patch(model):
        logits(model)
        install(blocks(model)[1])
        with pytest.raises(RuntimeError, match=f"{LAYER_1}: can't run .*{words}"):
            logits(model)


@pytest.mark.parametrize("obstacle", LATER)
def test_obstacle_that_comes_later_is_left_to_the_model(model, obstacle):
    install, words = OBSTACLES[obstacle]
    twin, x = eager_olmoe(), random_hidden(2, 5, 32)
    clean = run(blocks(twin)[1], x)
    install(blocks(twin)[1])
    expected, stock = run(blocks(twin)[1], x), logits(twin)
    assert obstacle in UNSEEN or relative(expected, clean) > 0.01
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        handle = moeprof.patch(model, strict=False)
        assert handle.fallbacks == {}
        install(blocks(model)[1])
        seen = watch(handle)
        for _ in range(2):
            assert torch.equal(run(blocks(model)[1], x), expected)
            assert relative(logits(model), stock) <= 1e-5
    assert_one_warning(caught, words)
    assert_falls_back(handle, words)
    assert set(seen) == {0}


def test_layer_returns_to_our_path_when_the_hook_is_gone(model):
    with moeprof.patch(model, strict=False) as handle:
        hook = blocks(model)[1].gate.register_forward_hook(lambda *args: None)
        with pytest.warns(UserWarning, match=LAYER_1):
            logits(model)
        hook.remove()
        seen = watch(handle)
        logits(model)
    assert seen == [0, 1]


def test_a_hook_that_comes_while_a_layer_is_read_is_seen(model, monkeypatch):
    """Another thread may put it on after the block was read, before it is watched."""
    watch = Layout.watch

    def late(self, block):
        block.gate.register_forward_hook(lambda *args: None)
        return watch(self, block)

    monkeypatch.setattr(Layout, "watch", late)
    with moeprof.patch(model), pytest.raises(RuntimeError, match="a hook on the gate"):
        logits(model)


def test_forward_from_before_the_patch_is_the_models_own(model):
    """accelerate's forward of the block is what a fallback calls, also under nested patches."""
    block = blocks(model)[1]
    plain = run(block, random_hidden(1, 5, 32))

    def forward(self, hidden_states):
        output = type(self).forward(self, hidden_states)
        return 3 * output if V5 else (3 * output[0], output[1])

    block.forward = types.MethodType(forward, block)
    with moeprof.patch(model, strict=False), moeprof.patch(model, ONE, strict=False):
        hook_on_experts = inside(block)[0].register_forward_hook(lambda *args: None)
        with pytest.warns(UserWarning, match=LAYER_1):
            assert torch.equal(run(block, random_hidden(1, 5, 32)), 3 * plain)
        hook_on_experts.remove()


def test_model_with_another_activation():
    model = olmoe(hidden_act="tanh")
    expected = logits(model)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp: .*activation"):
        moeprof.patch(model)
    with pytest.warns(UserWarning, match="activation") as caught:
        handle = moeprof.patch(model, strict=False)
    assert len(caught) == 2 and list(handle.fallbacks) == [
        "model.layers.0.mlp",
        "model.layers.1.mlp",
    ]
    assert torch.equal(logits(model), expected)


def test_recorder_of_transformers_is_no_obstacle(model):
    """Its hooks are on the gates by now; a hook on the block itself runs around our forward."""
    calls = []
    hook = blocks(model)[1].register_forward_hook(lambda *args: calls.append(1))
    with moeprof.patch(model) as handle:
        seen = watch(handle)
        logits(model)
    hook.remove()
    assert seen == [0, 1] and calls == [1]


@pytest.mark.parametrize("change", [scale_class, double_weight])
def test_gate_of_another_class_is_a_users_router(model, change):
    """PEFT on the gate, say: its output is what counts, so it is called and honoured."""
    block, x = blocks(model)[1], random_hidden(2, 5, 32)
    plain = run(block, x)
    change(block.gate)
    expected = run(block, x)
    assert relative(expected, plain) > 0.01
    with moeprof.patch(model) as handle:
        seen = watch(handle)
        assert relative(run(block, x), expected) <= 1e-5
    assert seen == [1]


# ---- autocast ----


def test_autocast_is_refused(model):
    before = snapshot(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp: .*autocast"):
            moeprof.patch(model)
        assert_unchanged(model, before)
    with moeprof.patch(model):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with pytest.raises(RuntimeError, match=r"model\.layers\.0\.mlp: .*autocast"):
                logits(model)
        assert relative(logits(model), logits(eager_olmoe())) <= 1e-5


def test_autocast_is_left_to_the_model(model):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = logits(model)
    with moeprof.patch(model, strict=False) as handle:
        seen = watch(handle)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with pytest.warns(UserWarning, match="autocast") as caught:
                assert torch.equal(logits(model), expected)
                assert torch.equal(logits(model), expected)
        assert len(caught) == 2 and len(handle.fallbacks) == 2  # one a layer
        assert seen == []
        with torch.autocast("cpu", enabled=False):
            logits(model)
        assert seen == [0, 1]


# ---- weights that nothing here can run ----


def to_int8(block):
    set_weight(block, lambda w: (w * 50).to(torch.int8))


def to_float8(block):
    set_weight(block, lambda w: w.to(torch.float8_e4m3fn))


def to_float64(block):
    block.experts.double()


def half_of_them(block):
    set_weight(block, lambda w: w.to(torch.bfloat16))


UNRUNNABLE = {
    "int8": (to_int8, "torch.int8"),
    "float8": (to_float8, "torch.float8_e4m3fn"),
    "float64": (to_float64, "torch.float64"),
    "mixed": (half_of_them, r"bfloat16.* in one layer|float32 and torch.bfloat16"),
}


def failure(model):
    with pytest.raises(Exception) as caught:  # noqa: B017 - whatever torch says of it
        logits(model)
    return type(caught.value), str(caught.value)


@pytest.mark.parametrize("case", UNRUNNABLE)
def test_weights_that_nothing_can_run(model, case):
    """An error of ours where strict; else the same error as without a patch."""
    change, words = UNRUNNABLE[case]
    change(blocks(model)[1])
    expected, before = failure(model), snapshot(model)
    with pytest.raises(ValueError, match=f"{LAYER_1}: .*({words})"):
        moeprof.patch(model)
    assert_unchanged(model, before)
    with pytest.warns(UserWarning, match=f"{LAYER_1} .*({words})"):
        handle = moeprof.patch(model, strict=False)
    assert_falls_back(handle, words)
    assert failure(model) == expected


@pytest.mark.parametrize("case", UNRUNNABLE)
def test_weights_that_nothing_can_run_any_more(model, case):
    change, words = UNRUNNABLE[case]
    with moeprof.patch(model):
        change(blocks(model)[1])
        with pytest.raises(RuntimeError, match=f"{LAYER_1}: .*({words})"):
            logits(model)


def test_weights_on_meta(model):
    """Not a matter of strict=False: what torch makes of them has no numbers."""
    blocks(model)[1].experts.to("meta")
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"{LAYER_1}: .*device meta"):
        moeprof.patch(model)
    assert_unchanged(model, before)


@pytest.mark.parametrize("what", ["experts", "hidden states", "both"])
def test_patched_model_that_moves_to_meta(model, what):
    block, x = blocks(model)[1], random_hidden(1, 3, 32)
    with moeprof.patch(model):
        if what != "hidden states":
            model.to("meta")
        with pytest.raises(RuntimeError, match=f"{LAYER_1}: .*device meta"):
            block(x if what == "experts" else x.to("meta"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_hidden_states_of_another_dtype(model, dtype):
    with moeprof.patch(model):
        with pytest.raises(RuntimeError, match=f"{LAYER_1}: .*the hidden states: .*{dtype}"):
            blocks(model)[1](random_hidden(1, 3, 32, dtype))
