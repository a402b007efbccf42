"""What patch() says: of itself, of patches upon patches, of caps, and of what it can't run."""

import tempfile
import types
import warnings

import numpy as np
import pytest
import torch
from models import V5, assert_unchanged, blocks, fit_null, llama, olmoe, snapshot, token_ids
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from zoo import build

import moeprof
from moeprof.models import families

needs_5 = pytest.mark.skipif(not V5, reason="transformers 4 has no experts implementations")


@pytest.fixture
def model():
    return olmoe()


@pytest.fixture
def wide():
    """32 experts, so that a cap of 16 can bind."""
    return olmoe(num_experts=32)


def logits(model):
    with torch.no_grad():
        return model(token_ids()).logits


def warned(recorded) -> list[str]:
    return [str(w.message) for w in recorded]


# ---- patches upon patches ----


def test_a_cell_that_runs_twice_says_how_to_undo_all(model):
    expected = logits(model)
    moeprof.patch(model, "topk", k=1)
    with pytest.warns(UserWarning, match="patched already") as recorded:
        handle = moeprof.patch(model, "topk", k=3)
    (message,) = warned(recorded)
    assert "topk k=1 on 2 layers" in message and "moeprof.unpatch(model) removes all" in message
    assert recorded[0].filename == __file__
    handle.unpatch()
    assert "still patched by an earlier patch" in repr(handle)
    assert "moeprof.unpatch(model)" in repr(handle)
    assert not torch.equal(logits(model), expected)
    moeprof.unpatch(model)
    assert torch.equal(logits(model), expected)
    assert repr(handle) == "<moeprof.Handle: topk k=3 on 2 layers, not patched>"


def test_the_handle_below_says_so(model):
    first = moeprof.patch(model, "topk", k=1)
    with pytest.warns(UserWarning, match="patched already"):
        second = moeprof.patch(model)
    assert "patched, but a later patch is the one that runs" in repr(first)
    assert repr(second).endswith(", patched>")
    second.unpatch()
    assert repr(first).endswith(", patched>")
    first.unpatch()
    later = moeprof.patch(model)
    assert "by a later patch" in repr(first) and "by a later patch" in repr(second)
    later.unpatch()
    assert repr(first).endswith(", not patched>")


def test_with_blocks_and_the_patcher_nest_in_silence(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with moeprof.patch(model), moeprof.patch(model, "topk", k=1) as inner:
            pass
        assert repr(inner).endswith(", not patched>")
        patcher = moeprof.OLMoERouterPatcher(model)
        patcher.patch("topk", k=1)
        patcher.patch("topk", k=3)  # its unpatch removes both
        patcher.unpatch()
        with moeprof.patch(model), moeprof.patch(model):
            moeprof.patch(model).unpatch()


def test_moeprofs_own_patches_are_silent_on_a_patched_model(model):
    moeprof.patch(model)
    caller = types.ModuleType("moeprof.somewhere")
    caller.patch = moeprof.patch
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec("def use(model):\n    with patch(model): pass", vars(caller))
        caller.use(model)
    moeprof.unpatch(model)


BH = moeprof.BH(0.05, max_k=8)


def my_router(z):
    return z.softmax(-1)


@pytest.mark.parametrize(
    "router, expected",
    [
        (None, "the model's own top-k"),
        (BH, "bh alpha=0.05 max_k=8"),
        ("top_p", "top_p P=0.5"),
        ("topk", "topk k=8"),
        (moeprof.Kneedle("log", min_k=2), "kneedle on=log c=0 min_k=2"),
        ([BH, moeprof.BH(0.1, max_k=8)], "bh alpha per layer max_k=8"),
        (moeprof.BH(alpha=(0.1, 0.2)), "bh alpha per layer"),
        ([BH, None], "bh, the model's own top-k: one per layer"),
        ({1: "topk"}, "the model's own top-k, topk: one per layer"),
        (my_router, "my_router (in Python)"),
    ],
)
def test_the_handle_names_its_routers(model, router, expected):
    null = "normal" if "bh" in expected else None
    with moeprof.patch(model, router, null=null) as handle:
        assert repr(handle) == f"<moeprof.Handle: {expected} on 2 layers, patched>"


def test_routers_by_the_names_of_the_profiler(model):
    with moeprof.patch(model, {"model.layers.1.mlp.gate": "topk"}) as handle:
        by_gate = [layer.router for layer in handle.layers]
    with moeprof.patch(model, {"model.layers.1.mlp": "topk"}) as handle:
        assert [type(layer.router) for layer in handle.layers] == [type(r) for r in by_gate]
    assert by_gate[0] is None


# ---- caps that nobody asked for ----


def test_a_cap_that_binds_is_said_once_a_patch(wide):
    null = fit_null(wide)
    with pytest.warns(UserWarning, match="max_k=None caps .* at 16 of 32 experts") as recorded:
        with moeprof.patch(wide, "bh", alpha=0.99, null=null):
            for _ in range(3):
                logits(wide)
    (message,) = warned(recorded)
    assert " of 22 tokens of all layers so far would have more" in message
    assert "max_k=32 for no cap, or max_k=16" in message


@pytest.mark.parametrize(
    "options",
    [{"alpha": 0.99, "max_k": 16}, {"alpha": 0.99, "max_k": 32}, {"alpha": 1e-6}],
)
def test_a_cap_that_was_asked_for_or_does_not_bind_is_silent(wide, options):
    null = fit_null(wide)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with moeprof.patch(wide, "bh", null=null, **options):
            logits(wide)


def test_no_cap_where_the_model_has_no_more_experts(model):
    null = fit_null(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with moeprof.patch(model, "bh", alpha=0.99, null=null):
            logits(model)


def test_top_p_reaches_beyond_sixteen_in_a_model(wide):
    seen = []
    with moeprof.patch(wide, "top_p", P=0.999999) as handle:
        handle.on_routing(lambda index, routing: seen.append(int(routing.counts.max())))
        logits(wide)
    assert max(seen) > 16


# ---- what it can't run, and what to do ----


@pytest.mark.parametrize("offload", ["disk", "cpu"])
def test_accelerate_is_named(model, offload):
    accelerate = pytest.importorskip("accelerate")
    if offload == "disk":
        accelerate.disk_offload(model, tempfile.mkdtemp(), execution_device="cpu")
    else:
        accelerate.cpu_offload(model, "cpu")
    before = snapshot(model)
    with pytest.raises(ValueError, match="layers.0.mlp: .*accelerate .*without offload"):
        moeprof.patch(model)
    assert_unchanged(model, before)
    with pytest.warns(UserWarning, match="runs the model's own forward: .*accelerate"):
        moeprof.patch(model, strict=False)
    moeprof.unpatch(model)


def test_peft_is_named(model):
    peft = pytest.importorskip("peft")
    names = ["mlp.experts.gate_up_proj"] if V5 else None
    modules = [] if V5 else ["gate_proj"]
    config = peft.LoraConfig(r=2, target_modules=modules, target_parameters=names)
    adapted = peft.get_peft_model(model, config)
    with pytest.raises(ValueError, match="PEFT .*LoRA.*merge_and_unload"):
        moeprof.patch(adapted)


@pytest.mark.skipif(V5, reason="transformers 5 keeps its experts in tensors, not in Linears")
def test_dynamic_quantization_is_named(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    with pytest.raises(ValueError, match=r"quantize_dynamic\) has quantised .*float32"):
        moeprof.patch(quantised)


def pretend(module: nn.Module, library: str) -> None:
    """Give a module a class as if it were from a library that isn't installed here."""
    kind = type(module)
    module.__class__ = type(f"Other{kind.__name__}", (kind,), {"__module__": f"{library}.nn"})


@pytest.mark.parametrize(
    "library, named",
    [
        ("bitsandbytes", "bitsandbytes has quantised"),
        ("torchao", "torchao has quantised"),
        ("optimum.quanto", "quanto has quantised"),
        ("peft.tuners.lora", "PEFT has put an adapter"),
    ],
)
def test_libraries_are_known_by_their_classes(model, library, named):
    expert = blocks(model)[1].experts if V5 else blocks(model)[1].experts[0].up_proj
    pretend(expert, library)
    with pytest.raises(ValueError, match=f"layers.1.mlp: .*{named}"):
        moeprof.patch(model)


def test_nnsights_hooks_are_known(model):
    def forward(*args, **kwargs):
        raise AssertionError("never called")

    forward.__module__ = "nnsight.intervention.interleaver"
    blocks(model)[0].gate.register_forward_hook(forward)
    with pytest.raises(ValueError, match="layers.0.mlp: .*a hook on the gate.*nnsight"):
        moeprof.patch(model)


class Envoy:
    """Not a module, but it holds one."""

    def __init__(self, model):
        self._model = model


@pytest.mark.parametrize(
    "function",
    [moeprof.patch, moeprof.unpatch, moeprof.OLMoERouterPatcher],
    ids=lambda function: function.__name__,
)
def test_what_is_no_model(model, function):
    for wrong, message in (
        (None, "expected a torch.nn.Module, got NoneType"),
        ("allenai/OLMoE-1B-7B-0924", "got str"),
        ((model, None), "got tuple, which holds one: pass that alone"),
        (Envoy(model), "Envoy, which holds one: pass its attribute _model"),
    ):
        with pytest.raises(TypeError, match=message):
            function(wrong)


@pytest.mark.parametrize(
    "options",
    [
        {"router": 5},
        {"router": [5, 5]},
        {"router": moeprof.BH},
        {"router": "bh", "null": 5},
        {"router": "bh", "null": [0.1]},
        {"router": "bh", "null": 0.1j},
    ],
    ids=str,
)
def test_routers_and_nulls_of_the_wrong_kind(model, options):
    before = snapshot(model)
    with pytest.raises(TypeError, match="router: expected|null: expected"):
        moeprof.patch(model, **options)
    assert_unchanged(model, before)


@needs_5
def test_another_family_is_told_what_works(model, monkeypatch):
    left = tuple(record for record in families.FAMILIES if record.name != "mixtral")
    monkeypatch.setattr(families, "FAMILIES", left)
    mixtral = build("mixtral")
    with pytest.raises(ValueError, match="No routers found") as caught:
        moeprof.patch(mixtral)
    message = str(caught.value)
    assert "MixtralSparseMoeBlock" in message and "MoEProfiler(model) reads this model" in message
    assert 'set_experts_implementation("moeprof")' in message
    with torch.no_grad():  # both are true
        expected = mixtral(token_ids()).logits
        with moeprof.MoEProfiler(mixtral) as profiler:
            mixtral(token_ids())
        assert all(m.tokens == 22 for m in profiler.get_metrics().values())
        mixtral.set_experts_implementation("moeprof")
        torch.testing.assert_close(mixtral(token_ids()).logits, expected, atol=1e-4, rtol=1e-4)


def test_a_dense_model_is_promised_nothing():
    with pytest.raises(ValueError, match="No routers found") as caught:
        moeprof.patch(llama())
    assert "Profiler" not in str(caught.value) and "moeprof.patch knows" in str(caught.value)
    assert "set_experts" not in str(caught.value)


def test_gradients_are_refused_in_words_that_fit(model):
    with moeprof.patch(model), pytest.raises(RuntimeError, match="unpatch the model for that"):
        model(token_ids()).logits.sum().backward()


@needs_5
def test_gradients_where_nothing_is_patched(model):
    model.set_experts_implementation("moeprof")
    with pytest.raises(RuntimeError, match="no backward") as caught:
        model(token_ids()).logits.sum().backward()
    assert "unpatch" not in str(caught.value)
    assert 'set_experts_implementation("grouped_mm")' in str(caught.value)


@pytest.mark.skipif(V5, reason="transformers 5 keeps its experts in tensors, not in Linears")
def test_a_projection_with_a_bias(model):
    up = blocks(model)[0].experts[0].up_proj
    up.bias = nn.Parameter(torch.zeros(up.out_features))
    with pytest.raises(ValueError, match="up_proj with a bias"):
        moeprof.patch(model)


# ---- empty slots ----


class Skipping(nn.Module):
    """The gate of transformers 5 with one slot of every second token empty."""

    def __init__(self, gate, empty):
        super().__init__()
        self.gate, self.empty = gate, empty

    def forward(self, hidden_states):
        logits, weights, experts = self.gate(hidden_states)
        experts, weights = experts.clone(), weights.clone()
        experts[::2, 1] = self.empty
        weights[::2, 1] = 0
        return logits, weights, experts


@needs_5
@pytest.mark.parametrize("empty", [-1, 8])
@pytest.mark.parametrize("how", ["eager", "grouped_mm", "moeprof", "patched"])
def test_empty_slots_run_and_are_profiled(model, how, empty):
    if how == "grouped_mm" or (how == "eager" and empty == -1):
        pytest.skip("these experts of transformers can't run such a slot; refused, see below")
    for block in blocks(model):
        block.gate = Skipping(block.gate, 8)
    model.set_experts_implementation("eager")
    expected = logits(model)
    for block in blocks(model):
        block.gate.empty = empty
    if how == "patched":
        moeprof.patch(model)
    else:
        model.set_experts_implementation(how)
    with moeprof.MoEProfiler(model) as profiler:
        torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    for metrics in profiler.get_metrics().values():
        assert metrics.tokens == 22 and metrics.skipped_slots == 11
        assert metrics.k_mean == pytest.approx(1.5)
        assert sum(np.asarray(metrics.expert_load)) == pytest.approx(1)


@needs_5
@pytest.mark.parametrize(
    ("how", "empty"), [("eager", -1), ("grouped_mm", -1), ("grouped_mm", 8), ("batched_mm", 8)]
)
def test_empty_slots_that_the_experts_would_run_are_refused(model, how, empty):
    """Outside of expert parallelism transformers' grouped experts compute garbage for them."""
    for block in blocks(model):
        block.gate = Skipping(block.gate, empty)
    model.set_experts_implementation(how)
    with (
        moeprof.MoEProfiler(model),
        pytest.raises(ValueError, match=rf"model.layers.0.mlp.gate: .*a slot \({empty}.*moeprof"),
    ):
        logits(model)


@needs_5
@pytest.mark.parametrize("outside", [-2, 9])
def test_ids_outside_are_an_error_as_before(model, outside):
    for block in blocks(model):
        block.gate = Skipping(block.gate, outside)
    model.set_experts_implementation("moeprof")
    with pytest.raises(ValueError, match="outside"):
        logits(model)


@needs_5
def test_empty_slots_cost_no_flops(model):
    block = blocks(model)[0]
    hidden, weights = torch.randn(3, 32), torch.ones(3, 2)
    ids = torch.tensor([[0, 8], [1, -1], [8, 8]])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        moeprof.experts_forward(block.experts, hidden, ids, weights)
    assert counter.get_total_flops() == 2 * 6 * 32 * 16
