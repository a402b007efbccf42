"""patch() and unpatch(): what they leave behind, and what a patched model still can do."""

import copy
import threading
import types
import warnings
from functools import partial

import pytest
import torch
from models import (
    ONE,
    V5,
    assert_unchanged,
    blocks,
    expert_weights,
    fit_null,
    olmoe,
    random_hidden,
    relative,
    snapshot,
    token_ids,
    wrap_gates,
)
from torch import nn

import moeprof
import moeprof.patching.install as install_module
import moeprof.patching.patch as patch_module


@pytest.fixture
def model():
    return recorded(olmoe())


def recorded(model):
    """transformers 5 installs its recorder of router logits once, at the first recording."""
    with torch.no_grad():
        model(token_ids(), output_router_logits=True)
    return model


def logits(model, **inputs):
    with torch.no_grad():
        return model(**(inputs or {"input_ids": token_ids()})).logits


def typical_error(ours, reference):
    """The median over tokens, so that one router near a tie in 16 bits doesn't decide."""
    difference = (ours.double() - reference.double()).norm(dim=-1)
    return float((difference / reference.double().norm(dim=-1)).median())


class Stop(Exception):
    pass


def stop(index, routing):
    raise Stop


# ---- the model is as before ----


def leave_by_unpatch(model):
    handle = moeprof.patch(model, ONE)
    logits(model)
    handle.unpatch()


def leave_by_with(model):
    with moeprof.patch(model, ONE):
        logits(model)


def leave_by_module_unpatch(model):
    moeprof.patch(model, ONE)
    with pytest.warns(UserWarning, match="patched already"):
        moeprof.patch(model)
    logits(model)
    moeprof.unpatch(model)


def leave_by_patcher(model):
    patcher = moeprof.OLMoERouterPatcher(model)
    patcher.patch(ONE)
    logits(model)
    patcher.unpatch()


def leave_nested(model):
    with moeprof.patch(model, ONE), moeprof.patch(model), moeprof.patch(model, "topk", k=3):
        logits(model)


def leave_by_wrong_input(model):
    with pytest.raises(RuntimeError), moeprof.patch(model, ONE):
        blocks(model)[1](torch.zeros(1, 3, 33))


def leave_by_nan(model):
    with pytest.raises(ValueError, match="NaN"), moeprof.patch(model, ONE):
        logits(model, inputs_embeds=torch.full((1, 3, 32), torch.nan))


def leave_by_callback(model):
    with pytest.raises(Stop), moeprof.patch(model, ONE) as handle:
        handle.on_routing(stop)
        logits(model)


def leave_after_exception(model):
    """The exception passes by, the patch stays in place and works, then it goes."""
    handle = moeprof.patch(model, ONE)
    patched = logits(model)
    stopping = handle.on_routing(stop)
    with pytest.raises(Stop):
        logits(model)
    stopping.remove()
    assert torch.equal(logits(model), patched)
    handle.unpatch()


def leave_after_save_and_toggles(model):
    with moeprof.patch(model, ONE):
        model.train().eval()
        model.state_dict()
        logits(model)


LEAVE = [value for name, value in list(globals().items()) if name.startswith("leave_")]


@pytest.mark.parametrize("leave", LEAVE)
def test_model_is_as_before(model, leave):
    before, stock = snapshot(model), logits(model)
    with moeprof.patch(model, ONE):
        assert relative(logits(model), stock) > 0.01  # a patch is a change that can be seen
    leave(model)
    assert_unchanged(model, before)
    assert torch.equal(logits(model), stock)


@pytest.mark.parametrize("where", ["install", "rehook", "vars"])
def test_an_interrupted_patch_leaves_the_model_as_it_was(model, monkeypatch, where):
    """Ctrl-C at each call of these, between its layers and inside of one; over another patch."""
    left = [0]

    def interrupted(*args, function):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return function(*args)

    module = patch_module if where == "install" else install_module
    function = vars if where == "vars" else getattr(module, where)
    with moeprof.patch(model, ONE):
        before = snapshot(model)
        monkeypatch.setattr(module, where, partial(interrupted, function=function), raising=False)
        for calls in range(1, 1000):
            left[0] = calls
            try:
                inner = moeprof.patch(model, "topk", k=3, linears=True)
            except KeyboardInterrupt:
                assert_unchanged(model, before)
            else:
                break
        monkeypatch.undo()
        inner.unpatch()
    assert calls > 2


def test_snapshot_sees_a_patch(model):
    """The proof that assert_unchanged can fail."""
    before = snapshot(model)
    with moeprof.patch(model), pytest.raises(AssertionError, match="mlp.forward"):
        assert_unchanged(model, before)
    hook = blocks(model)[0].gate.register_forward_hook(lambda *args: None)
    with pytest.raises(AssertionError, match="_forward_hooks"):
        assert_unchanged(model, before)
    hook.remove()
    assert_unchanged(model, before)


def test_only_instances_are_patched(model):
    other = olmoe(seed=1)
    block, gate = blocks(model)[0], blocks(model)[0].gate
    classes = {cls: dict(vars(cls)) for cls in (type(block), type(gate), type(block.experts))}
    expected = logits(other)
    with moeprof.patch(model, ONE):
        assert all(dict(vars(cls)) == was for cls, was in classes.items())
        assert torch.equal(logits(other), expected)


def test_nested_patches_go_last_in_first_out(model):
    stock = logits(model)
    outer = moeprof.patch(model, ONE)
    with_one = logits(model)
    with pytest.warns(UserWarning, match="patched already"):
        inner = moeprof.patch(model, "topk", k=3)
    both, with_three = snapshot(model), logits(model)
    with pytest.raises(RuntimeError, match="patched again after this patch"):
        outer.unpatch()
    assert_unchanged(model, both)
    assert torch.equal(logits(model), with_three)
    assert outer.active and inner.active
    inner.unpatch()
    assert outer.active and not inner.active
    assert torch.equal(logits(model), with_one)
    outer.unpatch()
    assert torch.equal(logits(model), stock)


def test_unpatch_is_idempotent(model):
    before = snapshot(model)
    first = moeprof.patch(model, ONE)
    first.unpatch()
    first.unpatch()
    assert_unchanged(model, before)
    with moeprof.patch(model, ONE) as second:
        first.unpatch()  # not its patch
        assert second.active and not first.active
    moeprof.unpatch(model)
    assert_unchanged(model, before)


def test_unpatch_of_a_model_without_patches():
    linear = nn.Linear(2, 2)
    before = snapshot(linear)
    moeprof.unpatch(linear)
    assert_unchanged(linear, before)


def counting_forward(block):
    """An instance forward as accelerate installs it; the list grows with its calls."""
    calls = []

    def forward(self, *args, **kwargs):
        calls.append(1)
        return type(self).forward(self, *args, **kwargs)

    block.forward = types.MethodType(forward, block)
    return calls


def test_forward_that_was_there_is_put_back(model):
    calls = counting_forward(blocks(model)[1])
    before, forward = snapshot(model), blocks(model)[1].forward
    stock = logits(model)
    assert len(calls) == 1
    with moeprof.patch(model):
        assert relative(logits(model), stock) <= 1e-5
        assert len(calls) == 1  # swapped, not wrapped
    assert_unchanged(model, before)
    assert vars(blocks(model)[1])["forward"] is forward
    assert torch.equal(logits(model), stock)
    assert len(calls) == 2


# ---- copies ----


def test_copy_uses_its_own_weights(model):
    twin = recorded(olmoe())
    with moeprof.patch(model):
        stock = logits(model)
        clone = copy.deepcopy(model)
        for changed in (clone, twin):
            for weight in expert_weights(blocks(changed)[0], 3):
                weight.mul_(-2)
        assert relative(logits(clone), logits(twin)) <= 1e-5
        assert relative(logits(clone), stock) > 0.01
        assert torch.equal(logits(model), stock)


@pytest.mark.parametrize("patches", [1, 2])
def test_unpatching_a_copy_leaves_the_original_patched(model, patches):
    calls = counting_forward(blocks(model)[0])
    expected, before = logits(model), {n: v.keys() for n, v in snapshot(model).items()}
    handles = [moeprof.patch(model, ONE)]
    if patches == 2:
        with pytest.warns(UserWarning, match="patched already"):
            handles.append(moeprof.patch(model, ONE))
    patched = logits(model)
    clone = copy.deepcopy(model)
    assert torch.equal(logits(clone), patched)
    moeprof.unpatch(clone)
    assert torch.equal(logits(clone), expected)
    assert {n: v.keys() for n, v in snapshot(clone).items()} == before
    assert blocks(clone)[0].forward.__self__ is blocks(clone)[0]
    assert all(h.active for h in handles) and torch.equal(logits(model), patched)
    assert len(calls) == 2


def test_unpatching_the_original_leaves_the_copy_patched(model):
    with moeprof.patch(model, ONE):
        patched = logits(model)
        clone = copy.deepcopy(model)
    assert torch.equal(logits(clone), patched)
    assert relative(logits(model), patched) > 0.01


# ---- weights that change after patching ----


def load_other(model, **options):
    model.load_state_dict(olmoe(seed=7).state_dict(), **options)


def replace_parameters(model):
    for block in blocks(model):
        for name, parameter in list(block.experts.named_parameters()):
            module, _, last = f"experts.{name}".rpartition(".")
            setattr(block.get_submodule(module), last, nn.Parameter(parameter.detach().flip(-1)))


def edit_in_place(model):
    for block in blocks(model):
        for parameter in block.parameters():
            parameter.data.mul_(-1.5)


def swap_data(model):
    for block in blocks(model):
        for parameter in block.parameters():
            parameter.data = parameter.data.flip(-1).clone()


MOVES = {
    "to bfloat16": (lambda m: m.to(torch.bfloat16), 2e-2),
    "half": (lambda m: m.half(), 3e-3),
    "bfloat16 and back": (lambda m: m.to(torch.bfloat16).float(), 1e-5),
    "load_state_dict": (load_other, 1e-5),
    "load_state_dict assign": (lambda m: load_other(m, assign=True), 1e-5),
    "replaced parameters": (replace_parameters, 1e-5),
    "in place": (edit_in_place, 1e-5),
    "data": (swap_data, 1e-5),
}


@pytest.mark.parametrize("move", MOVES)
def test_new_weights_are_used(model, move):
    change, tolerance = MOVES[move]
    twin = recorded(olmoe())
    with moeprof.patch(model):
        old = logits(model)
        change(model), change(twin)
        expected, got = logits(twin), logits(model)
        assert got.dtype == expected.dtype and not torch.equal(got, old)
        assert typical_error(got, expected) <= tolerance
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("view", ["expanded", "transposed"])
def test_a_view_of_the_weights_at_the_same_place_is_seen(view):
    """Its address is the old one; stock computes with what the view says."""
    model = olmoe(hidden_size=16, intermediate_size=16)
    experts = blocks(model)[1].experts
    weights = [experts.down_proj] if V5 else [e.down_proj.weight for e in experts]
    with moeprof.patch(model):
        old = logits(model)
        for weight in weights:
            first = weight.data[:1].expand_as(weight)
            weight.data = first if view == "expanded" else weight.data.transpose(-1, -2)
        with pytest.raises(RuntimeError, match="expert weights that are not contiguous"):
            logits(model)
    assert not torch.equal(logits(model), old)


def test_weights_of_another_dtype_are_an_error(model):
    with moeprof.patch(model):
        blocks(model)[1].experts.to(torch.bfloat16)
        with pytest.raises(RuntimeError, match=r"model\.layers\.1\.mlp.*bfloat16 and .*float32"):
            logits(model)


@pytest.mark.parametrize(
    "size", [dict(hidden_size=64), dict(hidden_size=16), dict(num_experts=6)], ids=str
)
def test_experts_of_another_size_are_an_error(model, size):
    """The gate still fits the hidden states: stock raises, and no kernel may read beyond."""
    with moeprof.patch(model):
        blocks(model)[1].experts = blocks(olmoe(**size))[1].experts
        with pytest.raises((RuntimeError, ValueError), match=r"model\.layers\.1\.mlp"):
            logits(model)


# ---- gradients: refused, never dropped ----


def train_gate(model):
    blocks(model)[1].gate.requires_grad_()


def train_one_expert(model):
    experts = blocks(model)[0].experts
    (experts if V5 else experts[3].down_proj).requires_grad_()


def train_norm(model):
    model.model.layers[0].post_attention_layernorm.requires_grad_()


TRAIN = {
    "everything": lambda model: model.requires_grad_(),
    "gate": train_gate,
    "expert": train_one_expert,
    "norm before": train_norm,
    "embeddings": lambda model: model.model.embed_tokens.requires_grad_(),
}


def assert_refuses_backward(output):
    assert output.requires_grad and output.grad_fn is not None
    with pytest.raises(RuntimeError, match=r"model\.layers\.\d\.mlp.*no backward.*unpatch"):
        output.sum().backward()


@pytest.mark.parametrize("what", TRAIN)
def test_backward_is_refused(model, what):
    TRAIN[what](model.requires_grad_(False))
    with moeprof.patch(model):
        assert_refuses_backward(model(token_ids()).logits)


def test_backward_to_input_embeddings_is_refused(model):
    model.requires_grad_(False)
    embeddings = torch.randn(1, 5, 32, requires_grad=True)
    with moeprof.patch(model):
        assert_refuses_backward(model(inputs_embeds=embeddings).logits)
    assert embeddings.grad is None


def test_backward_through_a_users_gate_is_refused(model):
    wrap_gates(model, lambda logits: logits.softmax(-1).topk(2))
    train_gate(model.requires_grad_(False))
    with moeprof.patch(model):
        assert_refuses_backward(model(token_ids()).logits)


def test_what_comes_after_the_experts_can_be_trained(model):
    gradients = []
    model.requires_grad_(False).lm_head.requires_grad_()
    for patch in (False, True):
        handle = moeprof.patch(model) if patch else None
        model(token_ids(), labels=token_ids()).loss.backward()
        gradients.append(model.lm_head.weight.grad.clone())
        model.zero_grad()
    handle.unpatch()
    assert relative(*gradients) <= 1e-5


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_without_gradients(model, mode):
    with mode(), moeprof.patch(model):
        output = model(token_ids()).logits
    assert not output.requires_grad
    assert relative(output, logits(model)) <= 1e-5


# ---- what the rest of transformers sees ----


def record(model):
    with torch.no_grad():
        mask = torch.ones_like(token_ids())
        mask[0, :3] = 0
        return model(token_ids(), attention_mask=mask, output_router_logits=True)


@pytest.mark.parametrize("first", ["unpatched", "patched"])
def test_router_logits_and_aux_loss(first):
    """The recorder of transformers 5 may be installed before the patch or while it is there."""
    model, twin = olmoe(), olmoe()
    expected = record(twin)
    if first == "unpatched":
        record(model)
    with moeprof.patch(model):
        patched = record(model)
    after = record(model)
    assert len(patched.router_logits) == len(expected.router_logits) == 2
    assert torch.equal(patched.router_logits[0], expected.router_logits[0])
    assert relative(patched.router_logits[1], expected.router_logits[1]) <= 1e-5
    assert relative(patched.aux_loss, expected.aux_loss) <= 1e-5
    assert torch.equal(after.aux_loss, expected.aux_loss)
    assert all(map(torch.equal, after.router_logits, expected.router_logits))


@pytest.mark.skipif(not V5, reason="the gate of transformers 4.57 is a Linear, and not patched")
def test_patched_gate_serves_others_as_before(model):
    """Callers of the gate other than the block get the stock router's three values."""
    gate, x = blocks(model)[0].gate, random_hidden(1, 5, 32)
    expected = gate(x)
    with moeprof.patch(model, ONE):
        assert all(map(torch.equal, gate(x), expected))


def test_save_while_patched(model, tmp_path):
    with moeprof.patch(model, ONE):
        model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, local_files_only=True).eval()
    states = loaded.state_dict(), model.state_dict()
    assert list(states[0]) == list(states[1])
    assert all(map(torch.equal, states[0].values(), states[1].values()))
    assert relative(logits(loaded), logits(model)) <= 1e-6  # from memory aligned otherwise


def test_state_dict_and_mode_of_a_patched_model(model):
    state = model.state_dict()
    with moeprof.patch(model) as handle:
        patched = model.state_dict()
        assert list(patched) == list(state)
        assert all(patched[key].data_ptr() == state[key].data_ptr() for key in state)
        expected = logits(model)
        assert all(m.training for m in model.train().modules())
        assert torch.equal(logits(model), expected)
        assert not any(m.training for m in model.eval().modules())
        assert repr(handle) == "<moeprof.Handle: the model's own top-k on 2 layers, patched>"
    assert repr(handle) == "<moeprof.Handle: the model's own top-k on 2 layers, not patched>"


def test_generation_with_a_cache(model):
    options = dict(max_new_tokens=10, do_sample=False, pad_token_id=1)
    expected = model.generate(token_ids(), **options)
    with moeprof.patch(model):
        assert torch.equal(model.generate(token_ids(), **options), expected)
        uncached = model.generate(token_ids(), use_cache=False, **options)
    assert torch.equal(uncached, expected)


@pytest.mark.parametrize("router", [None, ONE, moeprof.BH(0.3, max_k=5)], ids=repr)
def test_on_routing(model, router):
    seen = []
    null = "normal" if router and router.wants_null else None
    k_max = 2 if router is None else router.limits(8)[1]
    with moeprof.patch(model, router, null=null) as handle:
        seeing = handle.on_routing(lambda *call: seen.append(call))
        logits(model)
        assert [index for index, _ in seen] == [0, 1]
        for _, routing in seen:
            assert routing.weights.shape == routing.expert_ids.shape == (22, k_max)
            assert routing.counts.shape == routing.rejections.shape == (22,)
            assert routing.weights.dtype == torch.float32
            assert {t.dtype for t in routing[1:4]} == {torch.int32}
            slots = torch.arange(k_max) < routing.counts[:, None]  # -1 and 0 behind the last
            assert torch.equal(routing.expert_ids >= 0, slots)
            assert torch.equal(routing.weights > 0, slots)
            assert torch.equal(routing.counts, routing.rejections.clamp(1, k_max))
            assert all(
                len(set(row[row >= 0].tolist())) == n
                for row, n in zip(routing.expert_ids, routing.counts.tolist(), strict=True)
            )
        seeing.remove()
        logits(model)
    assert len(seen) == 2


@pytest.mark.parametrize("backend", ["c", "torch"])
def test_what_a_callback_writes_changes_neither_model_nor_profile(model, backend):
    def spoil(index, routing):
        routing.expert_ids[routing.expert_ids < 0] = 0
        for part in routing:
            part.zero_()

    with moeprof.patch(model, moeprof.TopP(0.3), backend=backend) as handle, torch.no_grad():
        with moeprof.MoEProfiler(model) as profiler:
            expected = model(token_ids(), output_router_logits=True)
            with handle.on_routing(spoil):
                alone = profiler.result()
                found = model(token_ids(), output_router_logits=True)
            both = profiler.result()
        with handle.on_routing(spoil):  # and without a profiler
            again = model(token_ids(), output_router_logits=True)
    for outputs in (found, again):
        assert torch.equal(outputs.logits, expected.logits)
        assert all(map(torch.equal, outputs.router_logits, expected.router_logits))
    for name, metrics in both.metrics().items():
        assert 1 < metrics.k_mean < 8 and metrics.k_mean == alone.metrics()[name].k_mean
        assert metrics.expert_load == alone.metrics()[name].expert_load


def test_several_callbacks_at_once(model):
    """Each is called, in the order that they came, until its own handle takes it away."""
    seen = []

    def note(index, routing):
        seen.append(("first", index))

    with moeprof.patch(model) as handle:
        first, again = handle.on_routing(note), handle.on_routing(note)
        with handle.on_routing(lambda index, routing: seen.append(("second", index))):
            logits(model)
            assert seen == [(n, i) for i in (0, 1) for n in ("first", "first", "second")]
        first.remove()
        first.remove()  # does no harm
        seen.clear()
        logits(model)
        assert seen == [("first", 0), ("first", 1)]
        again.remove()
        logits(model)
        assert len(seen) == 2


def test_two_threads_at_once(model):
    inputs = [token_ids(3, 20, seed) for seed in range(2)]
    failures = []

    def work(ids, expected):
        for _ in range(25):
            error = relative(logits(model, input_ids=ids), expected)
            if not error <= 1e-6:
                failures.append(error)

    with moeprof.patch(model):
        jobs = [(ids, logits(model, input_ids=ids)) for ids in inputs]
        threads = [threading.Thread(target=work, args=job) for job in jobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures
    for ids, expected in jobs:
        assert relative(expected, logits(model, input_ids=ids)) <= 1e-5


# ---- nulls ----


def test_null_of_this_model(model, tmp_path):
    null = fit_null(model)
    null.save(tmp_path / "null.npz")
    by_name = dict(router="bh", alpha=0.4, max_k=3, null=null)
    by_object = dict(router=moeprof.BH(0.4, max_k=3), null=tmp_path / "null.npz")
    found = []
    for options in (by_name, by_object):
        with warnings.catch_warnings(action="error"), moeprof.patch(model, **options):
            found.append(logits(model))
    assert torch.equal(*found) and relative(found[0], logits(model)) > 0.01


def test_bh_without_a_null_warns(model):
    with pytest.warns(UserWarning, match="no null given") as caught:
        handle = moeprof.patch(model, "bh")
    handle.unpatch()
    assert len(caught) == 1 and caught[0].filename == __file__


# ---- the original notebook's names ----


def test_patcher(model):
    stock, forwards = logits(model), [block.forward for block in blocks(model)]
    patcher = moeprof.OLMoERouterPatcher(model)
    names = ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert patcher.moe_blocks == list(zip(names, blocks(model), strict=True))
    assert patcher.original_forwards == dict(zip(names, forwards, strict=True))
    assert patcher.patched is False
    patcher.patch("bh", alpha=0.5, max_k=4, null="normal")
    assert patcher.patched is True
    first = logits(model)
    patcher.patch(ONE)  # in place of the first
    assert patcher.patched is True and relative(logits(model), first) > 0.01
    patcher.unpatch()
    patcher.unpatch()
    assert patcher.patched is False and torch.equal(logits(model), stock)
