"""The experts of a layer as a whole: float64, every level, chunks, threads, what is read."""

import sys
from functools import cache, partial

import numpy as np
import pytest
import util
from util import narrow, widen

from moeprof import _C

pytestmark = pytest.mark.once

posix = pytest.mark.skipif(sys.platform != "linux", reason="mprotect and /proc are Linux's")


@pytest.fixture(autouse=True)
def every_kernel_again():
    yield
    util.restore_cpu()


ROUTINGS = {
    # name: (E, H, I, T, slots), routing -> routing
    "some slots": ((4, 24, 17, 5, 2), None),
    "tiles in n and k": ((3, 130, 70, 9, 2), None),
    "one of everything": ((1, 1, 1, 1, 1), None),
    "more pairs than one block": ((3, 20, 33, 300, 2), None),
    "one expert takes all": ((5, 16, 24, 300, 1), lambda ids: np.full_like(ids, 2)),
    "more rows than are packed at once": ((2, 9, 13, 900, 1), lambda ids: np.full_like(ids, 1)),
    "few and many rows": (
        (6, 40, 70, 90, 2),
        lambda ids: np.where(ids >= 0, np.minimum(ids, np.arange(90)[:, None] % 40), -1),
    ),
    # of expert e
    "e rows": (
        (41, 72, 71, 40, 41),
        lambda ids: np.where(np.arange(41) > np.arange(40)[:, None], np.arange(41), -1),
    ),
    "tokens with no expert": (
        (4, 24, 17, 6, 2),
        lambda ids: np.where(np.arange(6)[:, None] % 2, -1, ids),
    ),
    "nobody has an expert": ((4, 24, 17, 6, 2), lambda ids: np.full_like(ids, -1)),
    "one expert twice in a token": ((4, 24, 17, 6, 3), lambda ids: np.repeat(ids[:, :1], 3, 1)),
    "no slot": ((4, 24, 17, 6, 2), lambda ids: ids[:, :0].copy()),
    "no token": ((4, 24, 17, 0, 2), None),
}


def routing_of(name, dtype, **place):
    (E, H, I, T, slots), change = ROUTINGS[name]  # noqa: E741
    ids, weights = util.random_slots(T, slots, E, skipped=0.0 if E == 1 else 0.25)
    if change:
        ids = np.ascontiguousarray(change(ids), np.int32)
        weights = np.ascontiguousarray(weights[:, : ids.shape[1]])
    layer = util.Layer(E, H, I, dtype, **place)
    return layer, layer.hidden(T), ids, weights


def hold_experts(layer, hidden, ids, weights, what="", reference=None):
    """reference: what Layer.reference gives of these, where that was asked before."""
    out = layer(hidden, ids, weights)
    ref, tol = reference or layer.reference(hidden, ids, weights)
    assert out.dtype == hidden.dtype and out.shape == hidden.shape
    util.assert_close(widen(out, layer.dtype), ref, tol, f"{layer.dtype} {what}")
    return ref, tol


@cache
def with_reference(name, dtype):
    """(what `routing_of` gives, the reference): once for all levels."""
    layer, *arrays = routing_of(name, dtype)
    return (layer, *arrays), layer.reference(*arrays)


def hold_each(level, dtype, cases):
    """cases: {name: what a function `with_…` gives of it}. An error names the case."""
    util.force_level(level)
    for name, (arguments, reference) in cases.items():
        ref, tol = hold_experts(*arguments, name, reference)
        if (ref != 0).any():
            with pytest.raises(AssertionError):
                util.assert_close(np.zeros_like(ref), ref, tol)


@pytest.mark.parametrize("level", util.level_names())
@pytest.mark.parametrize("dtype", util.DTYPES)
def test_experts(level, dtype):
    hold_each(level, dtype, {name: with_reference(name, dtype) for name in ROUTINGS})


@cache
def with_activation(name, dtype):
    """Few and many rows of experts of this kind, in odd sizes; as `with_reference`."""
    activation, gated = util.ACTIVATIONS[name]
    layer = util.Layer(6, 41, 71, dtype, activation=activation, gated=gated)
    ids, weights = util.random_slots(90, 2, 6)
    ids = np.where(ids >= 0, np.minimum(ids, np.arange(90)[:, None] % 40), -1).astype(np.int32)
    arrays = layer.hidden(90), ids, weights
    return (layer, *arrays), layer.reference(*arrays)


@pytest.mark.parametrize("level", util.level_names())
@pytest.mark.parametrize("dtype", util.DTYPES)
def test_activations(level, dtype):
    hold_each(level, dtype, {name: with_activation(name, dtype) for name in util.ACTIVATIONS})


@pytest.mark.parametrize("dtype", util.DTYPES)
@pytest.mark.parametrize("name", ("SwiGLU", "gelu with limits and a shift", "relu2 without gate"))
def test_many_experts_and_many_of_a_token(dtype, name):
    activation, gated = util.ACTIVATIONS[name]
    layer = util.Layer(512, 7, 5, dtype, activation=activation, gated=gated)
    hold_experts(layer, layer.hidden(3), *util.random_slots(3, 32, 512), name)


@pytest.mark.parametrize("name", util.ACTIVATIONS)
@pytest.mark.parametrize("variant", util.variants_of("glu_f32"))
def test_nan_reaches_the_output_through_limits(variant, name):
    util.force("glu_f32", variant)
    activation, gated = util.ACTIVATIONS[name]
    layer = util.Layer(2, 8, 3, activation=activation, gated=gated)
    ids, ones = np.array([[0], [1]], np.int32), np.ones((2, 1), np.float32)
    for kind in layer.matrices[:-1]:  # of the gate alone, of up alone
        kept = kind[1][0, 0]
        kind[1][0, 0] = np.nan
        out = layer(layer.hidden(2), ids, ones)
        assert np.isfinite(out[0]).all() and np.isnan(out[1]).all()
        kind[1][0, 0] = kept


STORED = {
    # name: (storage, are there biases, have they a gate, activation)
    "as Aria": ("transposed", False, True, util.SWIGLU),
    "as GPT-OSS": ("interleaved", True, True, ("silu", 1.702, 0.75, 1.0)),
    "as its privacy filter": ("transposed", True, True, ("silu", 1.702, 0.75, 1.0)),
    "interleaved, no bias": ("interleaved", False, True, util.SWIGLU),
    "transposed, without gate": ("transposed", True, False, ("relu2", 1.0, np.inf, 0.0)),
    "rows with biases": ("rows", True, True, util.SWIGLU),
    "rows with biases, without gate": ("rows", True, False, ("gelu", 1.0, np.inf, 0.0)),
}
SIZES = {
    # name: (E, H, I, T, most rows of the first expert)
    "one of everything": (1, 1, 1, 1, 1),
    "few rows, odd sizes": (6, 41, 71, 5, 5),
    "few and many rows": (6, 41, 71, 90, 40),
    "more than one task and pass": (3, 290, 300, 130, 130),
    "few rows of wide matrices": (4, 64, 640, 3, 3),
}


def stored(name, size, dtype, **place):
    storage, biased, gated, activation = STORED[name]
    E, H, I, T, most = SIZES[size]  # noqa: E741
    layer = util.Layer(
        *(E, H, I, dtype),
        activation=activation,
        gated=gated,
        storage=storage,
        biased=biased,
        **place,
    )
    ids, weights = util.random_slots(T, min(2, E), E, skipped=0.0 if E == 1 else 0.25)
    ids = np.where(ids >= 0, np.minimum(ids, np.arange(T)[:, None] % most), -1).astype(np.int32)
    return layer, layer.hidden(T), ids, weights


@cache
def stored_with_reference(name, size, dtype):
    layer, *arrays = stored(name, size, dtype)
    return (layer, *arrays), layer.reference(*arrays)


each_stored = pytest.mark.parametrize("name", STORED)


@pytest.mark.parametrize("level", util.level_names())
@pytest.mark.parametrize("dtype", util.DTYPES)
@each_stored
def test_matrices_stored_otherwise_and_biases(level, dtype, name):
    cases = {f"{name}, {size}": stored_with_reference(name, size, dtype) for size in SIZES}
    assert all((ref != 0).any() for _, (ref, _) in cases.values())
    hold_each(level, dtype, cases)


@pytest.mark.parametrize("dtype", util.DTYPES)
@pytest.mark.parametrize("size", SIZES)
@each_stored
def test_stored_otherwise_the_bits_do_not_depend_on_the_threads(dtype, size, name):
    layer, *arrays = stored(name, size, dtype)
    first = layer(*arrays)
    for threads in (2, 4, 300):
        np.testing.assert_array_equal(layer(*arrays, threads), first)


@pytest.mark.parametrize("level", util.level_names())
@each_stored
def test_stored_otherwise_a_token_alone_is_a_token_in_a_batch(level, name):
    """Bit for bit, however many rows an expert has: where no other kernel is chosen then."""
    util.force_level(level)
    if level == "openblas" or STORED[name][0] == "rows":
        pytest.skip("its kernels are chosen by the number of rows")
    layer, hidden, ids, weights = stored(name, "more than one task and pass", "bfloat16")
    out = layer(hidden, ids, weights)
    for t in (0, 5, 96, 129):
        alone = layer(hidden[t : t + 1], ids[t : t + 1], weights[t : t + 1])
        np.testing.assert_array_equal(alone[0], out[t])


@posix
@pytest.mark.parametrize("dtype", util.DTYPES)
@pytest.mark.parametrize("side", ("start", "end"))
@pytest.mark.parametrize("size", ("one of everything", "few rows, odd sizes", "few and many rows"))
@each_stored
def test_stored_otherwise_no_byte_too_many_is_read(dtype, side, size, name):
    place = partial(util.guarded, side=side)
    layer, *arrays = stored(name, size, dtype, place=place)
    reference = stored_with_reference(name, size, dtype)[1]  # of the same numbers elsewhere
    hold_experts(layer, *map(place, arrays), reference=reference)


@pytest.mark.parametrize("dtype", util.DTYPES)
@pytest.mark.parametrize("offset", (1, 2, 3))
@each_stored
def test_stored_otherwise_they_lie_anywhere(dtype, offset, name):
    place = partial(util.shifted, offset=offset)
    reference = stored_with_reference(name, "few and many rows", dtype)[1]
    hold_experts(*stored(name, "few and many rows", dtype, place=place), reference=reference)


@each_stored
def test_stored_otherwise_nan_reaches_the_output_of_its_expert_alone(name):
    storage, biased, gated, activation = STORED[name]
    layer = util.Layer(3, 9, 5, activation=activation, gated=gated, storage=storage, biased=biased)
    ids, ones = np.array([[0], [1], [-1], [2]], np.int32), np.ones((4, 1), np.float32)
    for kind in (*layer.matrices, *layer.biases):
        place = (1,) * kind[1].ndim
        kept = kind[1][place]
        kind[1][place] = np.nan
        out = layer(layer.hidden(4), ids, ones)
        assert np.isnan(out[1]).any() and np.isfinite(out[[0, 2, 3]]).all()
        assert (out[2] == 0).all()
        kind[1][place] = kept


@posix
@pytest.mark.parametrize("dtype", util.DTYPES)
@pytest.mark.parametrize("side", ("start", "end"))
@pytest.mark.parametrize("name", ("some slots", "one of everything", "tiles in n and k"))
def test_experts_read_no_byte_too_many(dtype, side, name):
    place = partial(util.guarded, side=side)
    layer, *arrays = routing_of(name, dtype, place=place)
    hold_experts(layer, *map(place, arrays), reference=with_reference(name, dtype)[1])


@pytest.mark.parametrize("dtype", util.DTYPES)
@pytest.mark.parametrize("offset", (1, 2, 3))
def test_experts_lie_anywhere(dtype, offset):
    moved = routing_of("tiles in n and k", dtype, place=partial(util.shifted, offset=offset))
    hold_experts(*moved, reference=with_reference("tiles in n and k", dtype)[1])


@pytest.mark.parametrize("level", ("scalar", None))
@pytest.mark.parametrize("dtype", util.DTYPES)
def test_long_prompts_go_in_chunks(dtype, level):
    """1 token takes 64 slots of 6000 numbers: the 64 MiB of scratch hold some 20 or 40."""
    layer, tokens, slots = util.Layer(3, 2, 6000, dtype), 140, 64
    ids = np.full((tokens, slots), -1, np.int32)
    ids[:, ::40] = util.random_slots(tokens, 2, 3)[0]
    _C.limit_cpu(level)
    hold_experts(layer, layer.hidden(tokens), ids, np.ones(ids.shape, np.float32))


@pytest.mark.parametrize("dtype", util.DTYPES)
def test_experts_give_the_same_bits_whatever_the_threads(dtype):
    layer = util.Layer(6, 200, 150, dtype)
    hidden, (ids, weights) = layer.hidden(150), util.random_slots(150, 3, 6)
    first = layer(hidden, ids, weights)
    for threads in (1, 2, 4, 300):
        for _ in range(3):
            np.testing.assert_array_equal(layer(hidden, ids, weights, threads), first)


@cache
def wide_layer(dtype):
    return util.Layer(12, 96, 5000, dtype)


@pytest.mark.parametrize("level", ("openblas", None))
@pytest.mark.parametrize("dtype", util.DTYPES)
def test_chunks_and_blocks_do_not_depend_on_the_threads(level, dtype):
    """More than one chunk of tokens; few and many rows of an expert in each."""
    _C.limit_cpu(level)
    layer = wide_layer(dtype)
    rng, tokens = np.random.default_rng(0), 1500
    ids = np.where(rng.random((tokens, 2)) < 0.01, rng.integers(0, 12, (tokens, 2)), -1)
    ids[:, 0] = np.where(np.arange(tokens) % 50 == 0, 3, ids[:, 0])
    ids = np.concatenate([ids, np.full((tokens, 8), -1)], axis=1).astype(np.int32)
    hidden, weights = layer.hidden(tokens), rng.random(ids.shape).astype(np.float32)
    first = layer(hidden, ids, weights, 1)
    for threads in (2, 64):
        np.testing.assert_array_equal(layer(hidden, ids, weights, threads), first)


@pytest.mark.parametrize("dtype", util.DTYPES)
def test_where_a_skipped_slot_stands_does_not_matter(dtype):
    layer, hidden, ids, weights = routing_of("more pairs than one block", dtype)
    first, none = layer(hidden, ids, weights), np.full((len(ids), 1), -1, np.int32)
    for columns in ([2, 0, 1], [0, 2, 1], [0, 1, 2]):
        wider = np.ascontiguousarray(np.hstack([ids, none])[:, columns])
        nan = np.full((len(ids), 1), np.nan, np.float32)
        values = np.ascontiguousarray(np.hstack([weights, nan])[:, columns])
        np.testing.assert_array_equal(layer(hidden, wider, values), first)


@pytest.mark.parametrize("dtype", util.DTYPES)
def test_a_token_alone_is_a_token_in_a_batch(dtype):
    """Bit for bit where no kernel is chosen by the number of rows: scalar."""
    _C.limit_cpu("scalar")
    layer, hidden, ids, weights = routing_of("more pairs than one block", dtype)
    out = layer(hidden, ids, weights)
    for t in (0, 127, 128, 299):
        alone = layer(hidden[t : t + 1], ids[t : t + 1], weights[t : t + 1])
        np.testing.assert_array_equal(alone[0], out[t])


def test_what_is_not_selected_is_not_read():
    layer = util.Layer(3, 8, 8)
    hidden, ones = layer.hidden(4), np.ones((4, 1), np.float32)
    for kind in layer.matrices:
        kind[1][:] = np.nan
    ids = np.array([[0], [2], [-1], [0]], np.int32)
    hold_experts(layer, hidden, ids, ones)
    hidden[1] = np.nan
    out = layer(hidden, ids, ones)
    assert np.isnan(out[1]).all() and np.isfinite(out[[0, 2, 3]]).all()


@pytest.mark.parametrize("bad", (-2, 5, np.iinfo(np.int32).min, np.iinfo(np.int32).max))
def test_an_expert_that_is_not_there(bad):
    layer, hidden, ids, weights = routing_of("some slots", "float32")
    ids[3, 1] = bad
    with pytest.raises(ValueError, match=r"experts: an index is outside \[-1, num_experts\]"):
        layer(hidden, ids, weights)


@pytest.mark.parametrize("threads", (0, -1))
def test_threads_below_one_are_an_error(threads):
    """In a process of its own: it once wrote outside its memory."""
    code = f"""if True:
        import numpy as np, util
        layer, (ids, weights) = util.Layer(4, 64, 64), util.random_slots(3, 2, 4)
        layer(layer.hidden(3), ids, weights, {threads})"""
    done = util.run_python(code, check=False)
    assert done.returncode == 1 and "ValueError: threads" in done.stderr, done.stderr[-500:]


@pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
def test_the_output_is_rounded_to_nearest_even(dtype):
    """weight * expert with expert = 1, so that every float32 reaches the rounding."""
    _C.limit_cpu("scalar")
    layer = util.Layer(1, 1, 1, dtype)
    for kind, value in zip(layer.matrices, (128, 1 / 128, 1), strict=True):
        kind[0][:] = narrow([value], dtype)
    every = np.arange(65536, dtype=np.uint16)
    low = widen(every, dtype)
    with np.errstate(invalid="ignore"):
        middle = ((low.astype(np.float64) + np.roll(low, -1)) / 2).astype(np.float32)
    random = np.random.default_rng(0).integers(0, 2**32, 50_000, np.uint32).view(np.float32)
    limits = np.array([65519.996, 65520, 3.4e38, -3.4e38, 2**-25, 1.5e-45], np.float32)
    steps = [np.nextafter(middle, np.float32(side)) for side in (-np.inf, np.inf)]
    weights = np.concatenate([low, middle, *steps, random, limits])[:, None]
    hidden = np.repeat(narrow([[1.0]], dtype), len(weights), axis=0)
    out = layer(hidden, np.zeros(weights.shape, np.int32), weights)
    got, expected = (widen(bits, dtype) for bits in (out, narrow(weights, dtype)))
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("logits_dtype", ("float32", None))
@pytest.mark.parametrize("dtype", util.DTYPES)
def test_moe_is_route_and_experts(dtype, logits_dtype):
    layer = util.Layer(8, 24, 16, dtype)
    hidden, logits = layer.hidden(40), np.random.default_rng(2).standard_normal((40, 8))
    logits_dtype = logits_dtype or dtype
    z = narrow(logits, logits_dtype)
    spec = ("bh", (0.4,), 1, 5, 1.0, "sum", 8, ("normal", "logit", None), None)
    out, weights, ids, counts, rejections = layer.moe(hidden, z, spec, 2)
    routed = util.route(z, logits_dtype, spec, 1, False)
    rounded = widen(narrow(routed[0], dtype), dtype)
    np.testing.assert_array_equal(weights, rounded)
    for got, expected in zip((ids, counts, rejections), routed[1:4], strict=True):
        np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(out, layer(hidden, ids, weights))
    z[17] = narrow([np.nan], logits_dtype)
    with pytest.raises(ValueError, match="router_logits: row 17 has a NaN"):
        layer.moe(hidden, z, spec)


@pytest.mark.parametrize("dtype", util.DTYPES)
def test_ids_and_weights_as_torch_has_them(dtype):
    """int64 ids, weights in the layer's own dtype."""
    layer, hidden, ids, weights = routing_of("some slots", dtype)
    rounded = narrow(weights, dtype)
    expected = layer(hidden, ids, np.ascontiguousarray(widen(rounded, dtype)))
    np.testing.assert_array_equal(layer(hidden, ids.astype(np.int64), rounded), expected)
    for bad in (5, -2, 2**32, 2**31, -(2**63)):
        wide = ids.astype(np.int64)
        wide[3, 1] = bad
        with pytest.raises(ValueError, match="experts: an index is outside"):
            layer(hidden, wide, weights)
