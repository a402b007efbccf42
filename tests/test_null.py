"""Nulls: the scores, the counted tables against brute force, `normal`, the C kernels."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from nulls import null_of, random_logits, stored

from moeprof.null import NORMAL, SCORES, SOFTMAX, normal_reference, softmax_reference
from moeprof.null.scores import BINS, EDGES, TINY, scores_of, stored_scores
from moeprof.null.tables import table_p

pytestmark = pytest.mark.once

# ---------------------------------------------------------------- the table


@pytest.mark.parametrize("score", SCORES)
def test_the_table_is_a_brute_force_count(score):
    logits = random_logits(500, 7)
    null = null_of(logits, score=score)
    table = null.layer(0).table
    values = np.sort(stored(logits, score).ravel())
    assert table.shape == (3 + 8193,) and table.dtype == np.float64
    expected = (values.size - np.searchsorted(values, EDGES)) / values.size
    np.testing.assert_array_equal(table[3:], expected)
    assert table[0] == values[-1] and table[1] == 1 / values.size
    top = values[-35:]  # 1 % of 3,500
    assert table[2] == pytest.approx(top.mean() - values[-36], rel=1e-12)


def test_the_tail_is_right_where_the_top_1_percent_is_not_stored_whole():
    logits = np.random.default_rng(1).exponential(1.5, (40_000, 4)).astype(np.float32)
    null = null_of(logits, score="logit")
    values = np.sort(logits.astype(float).ravel())
    excess = values[-1600:].mean() - values[-1601]
    beta = null.layer(0).table[2]
    assert abs(beta - excess) < 2**-8  # at most half a bin, for scores beyond the stored 1,024
    assert abs(beta - 1.5) < 4 * 1.5 / math.sqrt(1600)


def test_scores_outside_the_range_count_in_the_outer_bins():
    logits = np.array([[-1000, -32, 31, 32, 40, 50]], np.float32)
    null = null_of(logits, score="logit")
    table = null.layer(0).table
    assert table[3] == 1 and table[4] == 4 / 6 and table[-1] == 3 / 6
    p = null.layer(0).reference(np.array([[-1e30, -32, 31.5, 41, 50, 51]], np.float32))[0]
    assert (p[:2] == 1).all() and p[4] == 1 / 6
    assert (np.diff(p[1:]) < 0).all()


def test_a_score_just_below_an_edge_counts_below_it():
    logits = np.array([[-1e-20, 5.0]], np.float32)  # -1e-20 + 32 rounds to 32
    table = null_of(logits, score="logit").layer(0).table
    assert table[3 + 4096] == 1 / 2 and table[3 + 4095] == 1


def nasty_layers():
    """Smooth, tied, on the edges, one value, steep, heavy."""
    rng = np.random.default_rng(3)
    return {
        "smooth": random_logits(300, 8),
        "ties": rng.integers(-3, 4, (200, 6)).astype(np.float32),
        "edges": (rng.integers(-500, 500, (200, 6)) / 128).astype(np.float32),
        "one value": np.full((1500, 2), 1.25, np.float32),
        "single expert": random_logits(50, 1),
        "below an edge": np.array([[-1e-20, -1.0], [-2.0, -3.0]], np.float32),
        "steep": np.array([[0.0] * 499 + [0.03125]] * 2000, np.float32) - np.float32(1e-3),
        "heavy": (rng.standard_cauchy((400, 8)) * 3).astype(np.float32),
        "few": np.array([[1.0, 2.0]], np.float32),
    }


def around(table):
    """Scores at, and one step beside, every edge in use, and beyond the ends."""
    x_max = table[0]
    points = np.concatenate(
        [EDGES, [x_max], x_max + np.linspace(0, 50, 400) * table[2], np.linspace(-40, 60, 5000)]
    )
    points = np.concatenate([points, np.nextafter(points, -np.inf), np.nextafter(points, np.inf)])
    return np.unique(points)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("name", nasty_layers())
def test_p_falls_with_the_score_and_is_never_0(name, score):
    table = null_of(nasty_layers()[name], score=score).layer(0).table
    points = around(table)
    p = table_p(points, table)
    assert (p > 0).all() and (p <= 1).all()
    assert (np.diff(p) <= 0).all()
    beyond = table[0] + np.linspace(0, 500, 2000) * table[2]
    assert (np.diff(table_p(beyond, table)) < 0).all()
    assert table_p(np.array([np.inf, -np.inf]), table).tolist() == [TINY, 1.0]


@pytest.mark.parametrize("name", nasty_layers())
def test_p_is_continuous_and_meets_the_counts_at_the_edges(name):
    table = null_of(nasty_layers()[name], score="logit").layer(0).table
    x_max, p_max, sf = table[0], table[1], table[3:]
    inner = (EDGES > -32) & (EDGES < 32) & (EDGES <= x_max)  # at 32 is the last bin's inside
    np.testing.assert_array_equal(table_p(EDGES[inner], table), sf[inner])
    assert table_p(np.array([x_max]), table)[0] == p_max
    points = np.append(EDGES[inner], x_max)
    step = 1e-9
    left, right = (table_p(points + d, table) for d in (-step, step))
    # No bin is narrower than x_max's; a straight line through it moves p by this at most.
    narrow = min(1 / 128, x_max - EDGES[EDGES < x_max][-1])
    assert (left - right <= 3 * step / narrow).all()


@settings(max_examples=60, deadline=None)
@given(
    logits=hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 20), st.integers(1, 5)),
        elements=st.floats(-31, 40, width=32),
    ),
    score=st.floats(-31.9, 45),
)
def test_interpolation_is_the_rule_written_out(logits, score):
    table = null_of(logits, score="logit").layer(0).table
    values = logits.astype(float).ravel()
    x_max, beta, at_least = values.max(), table[2], lambda x: np.mean(values >= x)
    i = min(math.floor((score + 32) * 128), 8191)
    left, right = -32 + i / 128, -32 + (i + 1) / 128
    if score > x_max:
        expected = max(at_least(x_max) * math.exp(-(score - x_max) / beta), TINY)
    else:
        if i == 8191 or right > x_max:
            right = x_max
        share = (score - left) / (right - left) if right > left else 1
        expected = at_least(left) + share * (at_least(right) - at_least(left))
    assert table_p(np.array([score]), table)[0] == pytest.approx(expected, rel=1e-9)


def test_p_of_fresh_draws_is_uniform():
    from scipy.stats import kstest

    def draw(seed):  # the experts of one token depend on each other: one score a token
        return random_logits(40_000, 1, seed)

    null = null_of(draw(1), score="logit")
    p = null.layer(0).reference(draw(2)).ravel()
    # Two samples of 40,000: the distance has the null's own error too.
    assert kstest(p, "uniform").statistic < 1.95 * math.sqrt(2 / 40_000)


# ---------------------------------------------------------------- scores


def test_logprob_is_the_log_softmax():
    logits = random_logits(50, 9, scale=10)
    from scipy.special import log_softmax

    expected = log_softmax(logits.astype(np.float64), axis=1)
    np.testing.assert_allclose(scores_of(logits, "logprob"), expected, rtol=1e-13, atol=1e-15)
    assert np.array_equal(scores_of(logits, "logit"), logits.astype(np.float64))


def test_centred_is_about_the_mean_of_the_finite():
    inf = np.inf
    assert scores_of(np.array([[1, 2, 6.0]], np.float32), "centred").tolist() == [[-2, -1, 3]]
    rows = np.array([[inf, 1, 3, -inf], [inf, -inf, inf, inf]], np.float32)
    expected = [[inf, -1, 1, -inf], [inf, -inf, inf, inf]]
    assert scores_of(rows, "centred").tolist() == expected


@pytest.mark.parametrize("score", SCORES)
def test_stored_scores_are_never_below_the_exact_ones(score):
    logits = random_logits(2000, 5, scale=4)
    exact, kept = scores_of(logits, score), stored_scores(logits, score)
    assert kept.dtype == np.float32 and (kept >= exact).all()
    assert (np.nextafter(kept, np.float32(-np.inf)) < exact).all()
    if score == "logit":
        assert np.array_equal(kept, logits)


def test_infinite_logits_share():
    inf = np.inf
    rows = np.array([[inf, 0, inf, -inf], [-inf, 1, -inf, -inf]], np.float32)
    half = -math.log(2)
    expected = [[half, -inf, half, -inf], [-inf, 0, -inf, -inf]]
    assert scores_of(rows, "logprob").tolist() == expected


@pytest.mark.parametrize("score", SCORES)
def test_a_shift_of_a_token_matters_to_logits_only(score):
    layer = null_of(random_logits(400, 8), score=score).layer(0)
    fresh = np.round(random_logits(20, 8, seed=5) * 64) / 64  # so that a shift is exact
    same = np.allclose(layer.reference(fresh), layer.reference(fresh + np.float32(2)), rtol=1e-9)
    assert same == (score != "logit")


def test_trimming_leaves_out_each_tokens_highest_and_lowest():
    logits = random_logits(300, 8)
    logits[:50] = np.round(logits[:50])  # ties: the lower id ranks higher
    null = null_of(logits, kind="trimmed", r_high=3, r_low=2)
    expected = np.zeros((8, BINS), np.uint64)
    kept_scores = [[] for _ in range(8)]
    for z, s in zip(logits, stored(logits, "logprob"), strict=True):
        for e in sorted(range(8), key=lambda e: (-z[e], e))[3:6]:
            expected[e, math.floor((s[e] + 32) * 128)] += np.uint64(1)
            kept_scores[e].append(s[e])
    assert np.array_equal(null.counts[0], expected)
    for largest, scores in zip(null.largest[0], kept_scores, strict=True):
        assert np.array_equal(largest[: len(scores)], sorted(scores, reverse=True))
        assert (largest[len(scores) :] == -np.inf).all()


@pytest.mark.parametrize("bad", [np.full((2, 3), -np.inf), np.array([[0.0, 1, 2], [1, np.nan, 0]])])
def test_unusable_rows_are_named(bad):
    layer = null_of(random_logits(10, 3)).layer(0)
    for function in (layer.reference, normal_reference):
        with pytest.raises(ValueError, match=f"row {0 if np.isinf(bad[0, 0]) else 1} "):
            function(bad)


def test_logits_must_be_a_matrix():
    layer = null_of(random_logits(10, 3)).layer(0)
    with pytest.raises(ValueError, match="2 dimensions"):
        layer.reference(np.zeros(3))
    with pytest.raises(TypeError, match="got list"):
        layer.reference([[0.0]])
    with pytest.raises(ValueError, match="E >= 1, got shape"):
        normal_reference(np.zeros((3, 0)))
    assert layer.reference(np.zeros((0, 3))).shape == normal_reference(np.zeros((0, 3))).shape


def test_every_kind_of_matrix_is_read_alike():
    torch = pytest.importorskip("torch")
    layer = null_of(random_logits(100, 4)).layer(0)
    logits = torch.from_numpy(random_logits(12, 4, seed=9)).bfloat16().requires_grad_()
    values = logits.detach().float().numpy()
    expected = layer.reference(values)
    for other in (logits, values.astype(np.float64), np.asfortranarray(values)):
        assert np.array_equal(layer.reference(other), expected)


# ---------------------------------------------------------------- normal


@pytest.mark.parametrize("experts", [2, 5, 8, 63])
def test_normal_is_scipys(experts):
    from scipy.stats import median_abs_deviation, norm

    logits = random_logits(40, experts)
    z = logits.astype(np.float64)
    mad = median_abs_deviation(z, axis=1)[:, None]
    expected = norm.sf((z - np.median(z, axis=1)[:, None]) / (1.4826022 * mad))
    np.testing.assert_allclose(normal_reference(logits), expected, rtol=1e-12, atol=1e-300)


def test_normal_without_spread():
    inf = np.inf
    cases = {
        (3.0,): (0.5,),
        (1, 1, 1, 2): (0.5, 0.5, 0.5, 0),
        (1, 1, 0): (0.5, 0.5, 1),
        (inf, inf, inf, 0): (0.5, 0.5, 0.5, 1),
        (-inf, -inf, -inf, 0): (0.5, 0.5, 0.5, 0),
        (inf, inf, 0, 0): (0.5, 0.5, 1, 1),
        (inf, -inf): (0, 1),  # median 0, and MAD infinite
    }
    for row, expected in cases.items():
        assert tuple(normal_reference(np.array([row]))[0]) == expected, row
    one_infinite = normal_reference(np.array([[inf, 0, 1, 2, -inf]]))[0]
    assert one_infinite[0] == 0 and one_infinite[4] == 1 and one_infinite[2] == 0.5


def test_the_size_that_the_docstring_states():
    for experts, size in ((64, 0.109), (8, 0.19)):
        tokens = 20_000
        z = np.random.default_rng(experts).standard_normal((tokens, experts)).astype(np.float32)
        p = np.sort(normal_reference(z), axis=1)
        rejects = (p * experts <= 0.05 * np.arange(1, experts + 1)).any(axis=1).mean()
        assert abs(rejects - size) < 4 * math.sqrt(size * (1 - size) / tokens) + 0.005
        assert f"{size:.3g}".lstrip("0") in normal_reference.__doc__


# ---------------------------------------------------------------- the C path


def c_extension():
    return pytest.importorskip("moeprof._C")


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("name", nasty_layers())
def test_c_agrees_with_the_reference(name, score):
    c_extension()
    logits = nasty_layers()[name]
    layer = null_of(logits, score=score).layer(0)
    p, expected = layer.p_values(logits), layer.reference(logits)
    assert p.dtype == np.float64 and p.shape == logits.shape
    # Elsewhere an ulp of the score is a step of p.
    if score == "logit" or name == "smooth" and score == "logprob":
        np.testing.assert_allclose(p, expected, rtol=1e-12, atol=0)
    assert (p > 0).all() and (p <= 1).all()


@pytest.mark.parametrize("name", nasty_layers())
def test_c_agrees_around_every_edge(name):
    c_extension()
    layer = null_of(nasty_layers()[name], score="logit").layer(0)
    points = np.unique(around(layer.table).astype(np.float32))[None]
    points = points[:, np.abs(points[0]) < 100]
    for start in range(0, points.shape[1], 1000):
        part = points[:, start : start + 1000]
        p = layer.p_values(part)
        np.testing.assert_allclose(p, layer.reference(part), rtol=1e-12, atol=0)
        assert (np.diff(p[0]) <= 0).all()


def test_c_normal_agrees_with_the_reference():
    extension = c_extension()
    inf = np.inf
    odd = [[inf, -inf, 0, 0], [inf, inf, 0, 0], [1, 1, 1, 2], [inf, inf, -inf, -inf]]
    for logits in (random_logits(50, 8), random_logits(50, 7), np.array(odd, np.float32)):
        p = extension.p_values(logits, ("normal", "logit", None))
        np.testing.assert_allclose(p, normal_reference(logits), rtol=1e-12, atol=1e-300)
        assert np.array_equal(NORMAL.p_values(logits), p)
        assert np.array_equal(NORMAL.reference(logits), normal_reference(logits))


def test_softmax_is_scipys_and_c_agrees():
    c_extension()
    from scipy.special import softmax

    logits = random_logits(50, 7)
    expected = 1 - softmax(logits.astype(np.float64), axis=1)
    np.testing.assert_allclose(softmax_reference(logits), expected, rtol=0, atol=1e-15)
    inf = np.inf
    odd = np.array([[inf, -inf, inf, 0], [-inf, -inf, 0, -inf], [2, 2, 2, 2]], np.float32)
    assert softmax_reference(odd).tolist() == [[0.5, 1, 0.5, 1], [1, 1, 0, 1], [0.75] * 4]
    for z in (logits, odd):
        np.testing.assert_allclose(SOFTMAX.p_values(z), SOFTMAX.reference(z), rtol=0, atol=1e-15)


def test_nulls_of_a_token_fit_every_layer_and_model():
    for null in (NORMAL, SOFTMAX):
        assert null.layer(3) is null and null.check(None) is None
