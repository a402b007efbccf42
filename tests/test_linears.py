"""patch(linears=True): the linear layers around the experts, in C for few rows."""

import numpy as np
import pytest
import torch
import util
from models import assert_unchanged, blocks, olmoe, relative, snapshot, token_ids
from torch import nn

import moeprof
from moeprof import _C, demo
from moeprof.backends.tables import DTYPES, as_array, as_tensor
from moeprof.measure import passes
from moeprof.measure.passes import Reference, collect
from moeprof.patching import linears
from moeprof.patching.install import install
from moeprof.routers import TopK
from moeprof.studies.ablation import layer_ablation
from moeprof.studies.diagnosis.ablation import ablate
from moeprof.studies.diagnosis.seen import see
from moeprof.studies.diagnosis.transfer import domain_nulls
from moeprof.studies.sweep.runner import Experiment
from moeprof.texts.windows import HeldOut, Window

DTYPE = {name: dtype for dtype, name in DTYPES.items()}


# ---- the kernel behind it ----


def dense(x, weight, bias=None, threads=2):
    address = 0 if bias is None else bias.data_ptr()
    out = _C.dense(
        as_array(x), weight.data_ptr(), len(weight), address, *[DTYPES[x.dtype]] * 2, threads
    )
    return as_tensor(out, x.dtype)


def random_dense(dtype, m, n, k, with_bias, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator).to(dtype)  # noqa: E731
    return draw(m, k), draw(n, k), draw(n) if with_bias else None


@pytest.mark.parametrize("level", util.level_names())
@pytest.mark.parametrize("dtype", util.DTYPES)
def test_dense(level, dtype):
    util.force_level(level)
    for m in (1, 2, 6, 7, 9, 16, 33, 70, 769):  # 384 at a time
        for n, k, with_bias in ((1, 1, False), (63, 17, True), (130, 96, False), (64, 33, True)):
            x, weight, bias = random_dense(DTYPE[dtype], m, n, k, with_bias)
            ref, tol = util.matmul(x.double().numpy(), weight.double().numpy())
            if with_bias:
                ref = ref + bias.double().numpy()
                tol = tol + util.EPS32 * np.abs(ref)
            tol = tol + util.HALF_ULP[dtype] * (np.abs(ref) + tol) + 2.0**-25
            util.assert_close(dense(x, weight, bias).double().numpy(), ref, tol, f"{m, n, k}")
    _C.limit_cpu(None)


@pytest.mark.parametrize("dtype", util.DTYPES)
def test_dense_gives_the_same_bits_whatever_the_threads(dtype):
    for m in (1, 20, 400):
        arguments = random_dense(DTYPE[dtype], m, 300, 200, True)
        first = dense(*arguments, threads=1)
        for threads in (2, 4, 300):
            assert torch.equal(dense(*arguments, threads=threads), first)


@pytest.mark.parametrize("side", ("start", "end"))
@pytest.mark.parametrize("dtype", util.DTYPES)
def test_dense_reads_no_byte_too_many(dtype, side):
    for m, n, k in ((1, 5, 7), (3, 66, 33), (12, 70, 17)):
        x, weight, bias = random_dense(DTYPE[dtype], m, n, k, True)
        guarded = [util.guarded(as_array(t), side) for t in (x, weight, bias)]
        out = _C.dense(
            guarded[0], guarded[1].ctypes.data, n, guarded[2].ctypes.data, dtype, dtype, 1
        )
        np.testing.assert_array_equal(out, as_array(dense(x, weight, bias)))


def test_dense_of_nothing():
    x, weight, _ = random_dense(torch.float32, 3, 4, 5, False)
    assert dense(x[:0], weight).shape == (0, 4)
    assert dense(x, weight[:0]).shape == (3, 0)
    with pytest.raises(ValueError, match="weight, features: expected an address"):
        _C.dense(x.numpy(), 0, 4, 0, "float32", "float32", 1)


# ---- in a model ----


@pytest.fixture(autouse=True)
def small_layers_too(monkeypatch):
    monkeypatch.setattr(linears, "MIN_WEIGHTS", dict.fromkeys(linears.MIN_WEIGHTS, 0))


@pytest.fixture
def model():
    return olmoe().requires_grad_(False)


@pytest.fixture
def calls(monkeypatch):
    """How many rows each call in C had."""
    rows, run = [], linears.C.linear

    def counting(x, weight, bias):
        rows.append(len(x))
        return run(x, weight, bias)

    monkeypatch.setattr(linears.C, "linear", counting)
    return rows


AROUND = ("q_proj", "k_proj", "v_proj", "o_proj")


def test_the_layers_around_the_experts_are_patched(model, calls):
    before = snapshot(model)
    handle = moeprof.patch(model, linears=True)
    names = [f"model.layers.{i}.self_attn.{name}" for i in range(2) for name in AROUND]
    assert handle.linears == [*names, "lm_head"]
    model(token_ids(1, 5))
    assert calls == [5] * 9
    handle.unpatch()
    assert_unchanged(model, before)
    calls.clear()
    model(token_ids(1, 5))
    assert not calls
    assert moeprof.patch(model).linears == []


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_logits_are_those_of_the_model(dtype, calls):
    model = olmoe().to(dtype).requires_grad_(False)
    ids = token_ids(1, 7)
    with moeprof.patch(model):
        expected = model(ids).logits
    with moeprof.patch(model, linears=True):
        got = model(ids).logits
    assert calls and not torch.equal(expected, torch.zeros_like(expected))
    if dtype == torch.float32:
        assert relative(got, expected) < 1e-5
    else:  # bf16 logits of the router may turn around, so only most tokens are compared
        error = (got.double() - expected.double()).norm(dim=-1) / expected.double().norm(dim=-1)
        assert error.median() < 0.05


def test_many_rows_are_left_to_torch(model, calls):
    rows = linears.MAX_ROWS  # in float32
    with moeprof.patch(model, linears=True):
        model(token_ids(1, rows + 1))
        assert not calls
        model(token_ids(1, rows))
        assert set(calls) == {rows}


@pytest.mark.skipif("avx2" not in _C.cpu_features(), reason="this CPU lacks AVX2")
@pytest.mark.parametrize("has_instructions", (True, False))
@pytest.mark.parametrize("dtype, name", ((torch.bfloat16, "bf16"), (torch.float16, "fp16")))
def test_many_rows_run_in_c_where_torch_has_no_instructions(
    dtype, name, has_instructions, calls, monkeypatch
):
    monkeypatch.setattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", lambda: has_instructions)
    linears.torch_is_slow.cache_clear()
    model = olmoe().to(dtype).requires_grad_(False)
    ids = token_ids(1, 2 * linears.MAX_ROWS)
    expected = model(ids).logits.double()
    with moeprof.patch(model, linears=True):
        got = model(ids).logits.double()
    assert set(calls) == (set() if has_instructions else {ids.numel()})
    assert ((got - expected).norm(dim=-1) / expected.norm(dim=-1)).median() < 0.05
    linears.torch_is_slow.cache_clear()


def test_a_torch_that_cannot_be_asked_keeps_its_many_rows(monkeypatch):
    monkeypatch.setattr(linears, "SUPPORT", {torch.bfloat16: "no_such_operator"})
    linears.torch_is_slow.cache_clear()
    assert not linears.torch_is_slow(torch.bfloat16)
    linears.torch_is_slow.cache_clear()


def test_gradients_are_left_to_torch(calls):
    model = olmoe()
    with moeprof.patch(model, linears=True):
        model(token_ids(1, 3))
        assert not calls  # the parameters want gradients
        model.lm_head(torch.ones(1, 32)).sum().backward()
        assert model.lm_head.weight.grad is not None
        with torch.no_grad():
            model(token_ids(1, 3))
        assert len(calls) == 9


def test_flops_are_counted(model):
    from torch.utils.flop_counter import FlopCounterMode

    totals = []
    for options in ({}, {"linears": True}):
        with moeprof.patch(model, **options), FlopCounterMode(display=False) as counter:
            model(token_ids(1, 3))
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] > 0


def test_autocast_is_left_to_torch(calls):
    layer = nn.Linear(8, 4).requires_grad_(False)
    install(layer, linears.PatchedLinear("layer"), [(layer, linears.linear_forward)])
    assert linears.linear_forward(layer, torch.ones(1, 8)).dtype == torch.float32 and calls
    calls.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = linears.linear_forward(layer, torch.ones(1, 8))
    assert out.dtype == torch.bfloat16 and not calls


def test_other_layers_are_not_patched(model):
    class Mine(nn.Linear):
        pass

    attention = model.model.layers[0].self_attn
    attention.q_proj = Mine(32, 32, bias=False)
    own = attention.k_proj.forward
    attention.k_proj.forward = lambda x: own(x)
    handle = moeprof.patch(model, linears=True)
    names = [name for name in handle.linears if name.startswith("model.layers.0")]
    assert names == [f"model.layers.0.self_attn.{name}" for name in ("v_proj", "o_proj")]


@pytest.mark.parametrize(
    "x",
    (torch.ones(3, 7), torch.ones(()), torch.ones(3, 8, dtype=torch.float64)),
    ids=("features", "scalar", "dtype"),
)
def test_bad_input_gets_torchs_error(x):
    layer = nn.Linear(8, 4).requires_grad_(False)
    with pytest.raises(RuntimeError) as of_torch:
        layer(x)
    with pytest.raises(RuntimeError) as ours:
        linears.linear_forward(layer, x)
    assert str(ours.value) == str(of_torch.value)


@pytest.mark.parametrize(
    "weight",
    (
        torch._neg_view(torch.ones(4, 8)),
        torch.ones(4, 8).to_sparse(),
        torch.ones(4, 8).T.contiguous().T,
    ),
    ids=("lazy sign", "sparse", "strided"),
)
def test_weights_that_are_not_plain_memory_are_left_to_torch(weight, calls):
    layer = nn.Linear(8, 4, bias=False).requires_grad_(False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    x = torch.ones(2, 8)
    torch.testing.assert_close(linears.linear_forward(layer, x), layer(x))
    assert not calls


def test_weights_without_memory_are_refused(model):
    for parameter in model.model.layers[0].mlp.experts.parameters():
        parameter.untyped_storage().resize_(0)
    with moeprof.patch(model), pytest.raises(ValueError, match="weights without memory"):
        model(token_ids(1, 3))


def test_forward_derivatives(model):
    from torch.autograd import forward_ad

    x, layer = torch.ones(1, 32), model.lm_head
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        tangent = forward_ad.unpack_dual(linears.linear_forward(layer, dual)).tangent
        torch.testing.assert_close(tangent, layer(x))
        with moeprof.patch(model), pytest.raises(RuntimeError, match="layers.0.mlp: the C path"):
            model.model.layers[0].mlp(dual[None])


def test_small_layers_are_left_to_torch(model, monkeypatch):
    monkeypatch.setattr(linears, "MIN_WEIGHTS", dict.fromkeys(linears.MIN_WEIGHTS, 64 * 32))
    assert moeprof.patch(model, linears=True).linears == ["lm_head"]  # of 64 by 32


@pytest.mark.parametrize("part", (lambda m: m.lm_head, lambda m: m.model.layers[0].self_attn))
def test_a_patched_layer_can_not_be_pickled(model, part):
    import pickle

    with moeprof.patch(model, linears=True):
        with pytest.raises(RuntimeError, match="can't be pickled"):
            pickle.dumps(part(model))
    pickle.loads(pickle.dumps(part(model)))


def test_a_handle_of_linears_alone_is_active(model):
    for block in blocks(model):
        block.experts.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="runs the model's own forward"):
        handle = moeprof.patch(model, strict=False, linears=True)
    assert handle.active and repr(handle) == "<moeprof.Handle: 0 layers, 9 linears, patched>"
    del model.lm_head.forward  # somebody else's hand
    moeprof.unpatch(model)
    assert not handle.active


def test_shapes_and_strides():
    layer = nn.Linear(8, 4).requires_grad_(False)
    x = torch.randn(8, 3, 2).transpose(0, 2)  # (2, 3, 8), no row contiguous
    torch.testing.assert_close(linears.linear_forward(layer, x), layer(x))
    torch.testing.assert_close(linears.linear_forward(layer, x[0, 0]), layer(x[0, 0]))
    assert linears.linear_forward(layer, x[:, :0]).shape == (2, 0, 4)


def test_new_weights_are_used(model):
    with moeprof.patch(model, linears=True):
        x = torch.randn(1, 32)
        model.lm_head.weight = nn.Parameter(torch.randn(5, 32), requires_grad=False)
        torch.testing.assert_close(model.lm_head(x), x @ model.lm_head.weight.T)
        model.lm_head.to(torch.bfloat16)
        assert model.lm_head(x.bfloat16()).dtype == torch.bfloat16


def test_a_copy_uses_its_own_weights(model):
    import copy

    handle = moeprof.patch(model, linears=True)
    copied = copy.deepcopy(model)
    copied.lm_head.weight.data.mul_(2)
    x = torch.randn(1, 32)
    torch.testing.assert_close(copied.lm_head(x), 2 * model.lm_head(x))
    moeprof.unpatch(copied)
    assert "forward" not in vars(copied.lm_head) and "forward" in vars(model.lm_head)
    handle.unpatch()


def test_patches_nest(model):
    before = snapshot(model)
    outer = moeprof.patch(model, linears=True)
    with pytest.warns(UserWarning, match="patched already"):
        inner = moeprof.patch(model, linears=True)
    assert inner.linears == []  # they run in C already
    with pytest.raises(RuntimeError, match="unpatch that one first"):
        outer.unpatch()
    inner.unpatch()
    outer.unpatch()
    assert_unchanged(model, before)


def test_compiled(model):
    x, expected = torch.randn(1, 32), None
    with moeprof.patch(model, linears=True):
        expected = model.lm_head(x)
        compiled = torch.compile(model.lm_head, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected)


def test_generation(model, calls):
    ids = token_ids(1, 4)
    with moeprof.patch(model):
        expected = model.generate(ids, max_new_tokens=6, do_sample=False)
    with moeprof.patch(model, linears=True):
        got = model.generate(ids, max_new_tokens=6, do_sample=False)
    steps = got.shape[1] - ids.shape[1] - 1  # the first token comes of the prompt
    assert calls.count(1) >= 9 * steps > 0 and torch.equal(got, expected)


# ---- in the passes of studies, whose times are not reported ----


def by_the_sweep(model, text, tokenizer):
    experiment = Experiment(model, tokenizer, ("A prompt",), (None,), text, None, new_tokens=3)
    return experiment.run(TopK(1))


def by_the_diagnosis(model, text, tokenizer):
    see(model, text, TopK(1))
    ablate(model, text, TopK(1), positions=[np.array([100, 101])])


def by_the_fit(model, text, tokenizer):
    documents = [demo.Document("apples", "made up", "An apple a day. " * 800)]
    domain_nulls(model, tokenizer, demo.null("efron"), documents)


PASSES = {
    "null": by_the_fit,
    "logits": lambda model, text, tokenizer: collect(model, text, TopK(1)),
    "quality": lambda model, text, tokenizer: Reference(model, text).measure(TopK(1)),
    "layers": lambda model, text, tokenizer: layer_ablation(
        model, tokenizer, ["An apple a day. " * 40], tokens=100, ks=[1], progress=False
    ),
    "sweep": by_the_sweep,
    "diagnosis": by_the_diagnosis,
}


@pytest.mark.slow  # test_every_study runs them on both versions
@pytest.mark.parametrize("slow", (True, False))
@pytest.mark.parametrize("run", PASSES.values(), ids=PASSES)
def test_studies_run_the_layers_in_c_where_torch_is_slow(run, slow, calls, monkeypatch, loaded):
    tokenizer = loaded[1]
    for module in (linears, passes):
        monkeypatch.setattr(module, "torch_is_slow", lambda dtype: slow and dtype != torch.float32)
    ids = token_ids(1, 2 * linears.MAX_ROWS)
    document = {"domain": "a", "name": "a", "tokens": ids.numel(), "bytes": ids.numel()}
    text = HeldOut([Window(0, ids, ids.numel())], [document])
    model = olmoe(vocab_size=len(tokenizer)).requires_grad_(False)
    run(model, text, tokenizer)
    assert not calls
    model = model.to(torch.bfloat16)
    before = snapshot(model)
    run(model, text, tokenizer)
    assert bool(calls) is slow
    if run is by_the_sweep:  # whose generation is timed, as `moeprof.patch` runs it
        assert set(calls) <= {ids.numel()}
    assert_unchanged(model, before)


def test_a_null_is_fitted_to_the_model_as_it_is_patched(calls, monkeypatch, loaded):
    tokenizer = loaded[1]
    monkeypatch.setattr(passes, "torch_is_slow", lambda dtype: True)
    model = olmoe(vocab_size=len(tokenizer)).requires_grad_(False).to(torch.bfloat16)
    with moeprof.patch(model, "topk", k=1) as handle:
        seen = []
        handle.on_routing(lambda layer, routing: seen.append(routing.counts.max()))
        by_the_fit(model, None, tokenizer)
    assert max(seen) == 1 and not calls
