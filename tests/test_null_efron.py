"""Efron's null and the local fdr against statsmodels; conformal p-values; pure noise."""

import math
import warnings

import numpy as np
import pytest
from nulls import null_of, random_logits

from moeprof.null import COMPLETE_KINDS, SCORES
from moeprof.null.efron import LFDR_BINS, EfronNull, fit_efron, local_fdr_table
from moeprof.null.scores import BINS, EDGES, TINY, bins_of, scores_of
from moeprof.null.tables import conformal_p, conformal_table

pytestmark = pytest.mark.once

multitest = pytest.importorskip("statsmodels.stats.multitest")


def histogram(scores):
    return np.bincount(bins_of(scores), minlength=BINS).astype(np.uint64)


def with_signals(tokens=3000, experts=16, needed=2, seed=0):
    """Logits of which a token's first few stand out."""
    logits = random_logits(tokens, experts, seed, scale=1.0)
    logits[:, :needed] += 4
    return logits


LOGITS = {
    "noise": random_logits(3000, 16),
    "signals": with_signals(),
    "few tokens": with_signals(40, 64, 8),
    "skewed": np.random.default_rng(5).gumbel(size=(2000, 32)).astype(np.float32),
    "narrow": (0.2 * np.random.default_rng(6).standard_normal((2000, 16))).astype(np.float32),
}


def standardised(scores):
    """(z, median, scale) of the raw scores."""
    lower, median, upper = np.percentile(scores, [25, 50, 75])
    scale = (upper - lower) / 1.349
    return (scores - median) / scale, median, scale


# ---------------------------------------------------------------- efron


def negative_log_likelihood(z, mean, sd, pi0):
    """What statsmodels' NullDistribution minimises (Efron 2008, section 4)."""
    from scipy.stats import norm

    central = z[np.abs(z) <= 1]
    mass = norm.cdf(1, mean, sd) - norm.cdf(-1, mean, sd)
    inside = norm.logpdf(central, mean, sd).sum() + central.size * math.log(pi0)
    return -(inside + (z.size - central.size) * math.log1p(-pi0 * mass))


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("name", LOGITS)
def test_efron_is_statsmodels_on_the_raw_scores(name, score):
    from scipy.stats import norm

    layer = null_of(LOGITS[name], kind="efron", score=score).layer(0)
    z, median, scale = standardised(scores_of(LOGITS[name], score).ravel())
    ref = multitest.NullDistribution(z, -1, 1, estimate_null_proportion=True)
    fit = layer.efron
    mine = negative_log_likelihood(z, fit.mean, fit.sd, fit.pi0)
    library = negative_log_likelihood(z, ref.mean, ref.sd, ref.null_proportion)
    assert mine < library + 0.2  # never less likely, but for what half a bin makes of it
    assert 0 < layer.pi0 <= 1
    # statsmodels' search may end at pi0 = 1, less likely than the maximum (by 1 to 43 nats here):
    # in noise, which has its maximum there, it doesn't.
    if mine < library - 0.2 and name != "noise":
        return
    p = norm.sf(((EDGES - median) / scale - ref.mean) / ref.sd)
    # Half a bin beside the spread of the scores is what the histogram can be off by.
    tolerance = 1e-3 if name in ("noise", "signals", "skewed") else 5e-3
    np.testing.assert_allclose(layer.table[3:], p, rtol=0, atol=tolerance)
    assert layer.pi0 == pytest.approx(ref.null_proportion, abs=2 * tolerance)


def test_any_amount_of_text_costs_the_same():
    few = histogram(scores_of(LOGITS["signals"], "logprob").ravel())
    one, many = fit_efron(few), fit_efron(few * np.uint64(10**9))
    for name in ("median", "scale", "mean", "sd", "pi0"):
        assert getattr(many, name) == pytest.approx(getattr(one, name), abs=1e-6)
    # Lindsey's regression starts from log(1 + count), and then forgets it.
    a, b = local_fdr_table(few, one), local_fdr_table(few * np.uint64(10**9), one)
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_the_table_is_the_normal_over_the_whole_range():
    layer = null_of(LOGITS["signals"], kind="efron").layer(0)
    table, fit = layer.table, layer.efron
    sf = table[3:]
    assert table[0] == 32 and table[1] == sf[-1]
    assert (sf > 0).all() and (sf <= 1).all() and (np.diff(sf) <= 0).all()
    assert np.interp(fit.centre, EDGES, sf) == pytest.approx(0.5, abs=1e-5)
    deep = fit.centre + 8 * fit.scale * fit.sd  # beyond every score that was seen
    expected = 0.5 * math.erfc(8 / math.sqrt(2))
    z = np.full((1, 1), deep, np.float32)
    assert null_of(LOGITS["signals"], kind="efron", score="logit").layer(0).table[0] == 32
    assert np.interp(float(z[0, 0]), EDGES, sf) == pytest.approx(expected, rel=1e-2)


def test_a_narrow_null_keeps_p_above_0():
    layer = null_of(LOGITS["narrow"], kind="efron", score="logit").layer(0)
    p = layer.reference(np.array([[31.0, 40.0, np.inf, 5.0]], np.float32))[0]
    assert (p[:3] == TINY).all() and 0 < p[3] < 1e-30
    logits = np.linspace(-40, 40, 250, dtype=np.float32)[None]
    np.testing.assert_allclose(layer.p_values(logits), layer.reference(logits), rtol=1e-12)


def test_a_null_as_narrow_as_a_bin_is_told():
    with pytest.warns(UserWarning, match="the middle half of the scores lies within 1/128"):
        null_of(np.zeros((50, 8), np.float32), kind="efron").layer(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        null_of(LOGITS["narrow"], kind="efron", score="logit").layer(0)


def test_scores_in_lumps_give_a_table_too():
    for lumps in ([-10, -10, 10, 10], [-10, -10, 10], [-20, -1, 1, 20], [-3, -3, -3, 5]):
        logits = np.array([lumps] * 50, np.float32)
        table = null_of(logits, kind="efron", score="logit").layer(0).table
        assert np.isfinite(table).all() and (table[3:] > 0).all()


@pytest.mark.parametrize(("score", "side"), [("logprob", 1), ("logit", 1), ("logit", -1)])
def test_scores_outside_the_histogram_are_an_error(score, side):
    """The middle would be the outer bin, and what lies inside would all be rejected."""
    logits = side * (random_logits(300, 16, scale=60.0) - (0 if score == "logprob" else 60))
    null = null_of(logits, kind="efron", score=score)
    with pytest.raises(ValueError, match=r"no efron null .* outside \[-32, 32\]"):
        null.layer(0)
    assert null.as_kind("all").layer(0).table.shape == (3 + 8193,)
    few = np.where(np.arange(16) < 2, side * np.float32(-50), random_logits(300, 16))
    assert np.isfinite(null_of(few, kind="efron", score=score).layer(0).table).all()


@pytest.mark.filterwarnings("ignore:efron. the middle half")
def test_a_density_that_cannot_be_fitted_is_told():
    logits = np.zeros((2000, 64), np.float32)
    logits[:, :10] = np.random.default_rng(0).standard_normal((2000, 10))
    layer = null_of(logits, kind="efron", score="logit").layer(0)
    with pytest.raises(ValueError, match="no local fdr can be fitted: the scores leave"):
        _ = layer.local_fdr


@pytest.mark.parametrize("tokens", [1, 2, 5])
@pytest.mark.filterwarnings("ignore:Perfect separation", "ignore:efron. the middle half")
def test_one_value_and_few_tokens_give_a_table_or_an_error(tokens):
    for logits in (np.zeros((tokens, 4), np.float32), random_logits(tokens, 4)):
        layer = null_of(logits, kind="efron").layer(0)
        assert np.isfinite(layer.table).all() and (layer.table[3:] > 0).all()
        assert ((layer.local_fdr > 0) & (layer.local_fdr <= 1)).all()


# ---------------------------------------------------------------- local fdr


def on_the_grid(seed=0, signals=0.1):
    """Raw scores whose range is 29 * 40 bins: statsmodels' bins then hold what ours do."""
    rng = np.random.default_rng(seed)
    scores = np.concatenate(
        [
            rng.normal(-6, 1, 20_000),
            rng.normal(-2, 0.7, int(20_000 * signals)),
        ]
    )
    low, bins = -9.5, (LFDR_BINS - 1) * 40
    scores = np.floor(scores * 128) / 128
    high = low + bins / 128
    scores = scores[(scores >= low) & (scores < high)]
    # Beside the nodes, so that rounding takes none of them over a coarse edge.
    return np.concatenate([scores + 1e-10, [low, np.nextafter(high, -np.inf)]])


@pytest.mark.parametrize("signals", [0, 0.1, 0.5])
def test_local_fdr_is_statsmodels_at_the_nodes(signals):
    scores = on_the_grid(signals=signals)
    per_bin = histogram(scores)
    fit = fit_efron(per_bin)
    library = multitest.local_fdr(
        fit.z(scores), null_proportion=fit.pi0, null_pdf=fit.pdf, deg=7, nbins=30
    )
    nodes, first = np.unique(np.floor(scores[:-2] * 128) / 128, return_index=True)
    expected = np.where(nodes < fit.centre, 1.0, library[first])
    # Between the nodes that were seen it is not known how low the library would go.
    table = local_fdr_table(per_bin, fit)
    at = np.searchsorted(EDGES, nodes)
    assert np.array_equal(EDGES[at], nodes)
    falling = np.minimum.accumulate(expected)
    np.testing.assert_allclose(table[at], falling, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["noise", "signals", "skewed"])
def test_local_fdr_is_near_statsmodels_on_any_scores(name):
    scores = scores_of(LOGITS[name], "logprob").ravel()
    layer = null_of(LOGITS[name], kind="efron").layer(0)
    fit = layer.efron
    library = multitest.local_fdr(
        fit.z(scores), null_proportion=fit.pi0, null_pdf=fit.pdf, deg=7, nbins=30
    )
    order = np.argsort(scores)
    expected = np.where(scores < fit.centre, 1.0, library)[order]
    mine = np.interp(scores[order], EDGES, layer.local_fdr)
    np.testing.assert_allclose(mine, np.minimum.accumulate(expected), rtol=0, atol=0.03)


def test_local_fdr_is_1_below_the_centre_falls_above_and_stays_outside():
    layer = null_of(LOGITS["signals"], kind="efron").layer(0)
    table = layer.local_fdr
    assert table.shape == (8193,) and table.dtype == np.float64 and layer.local_fdr is table
    assert (table[EDGES < layer.efron.centre] == 1).all()
    assert (np.diff(table) <= 0).all() and (table > 0).all()
    top = np.flatnonzero(histogram(scores_of(LOGITS["signals"], "logprob").ravel()))[-1] + 1
    assert (table[top:] == table[top]).all() and table[top] < 0.05 and table[top - 40] > table[top]


def test_local_fdr_and_pi0_belong_to_efron_by_layer():
    logits = random_logits(2000, 4)
    others = [null_of(logits, kind=kind) for kind in COMPLETE_KINDS if kind != "efron"]
    others += [null_of(logits, kind="trimmed", r_high=1)]
    others += [null_of(logits, kind="efron").per_expert(0.1)]
    for null in others:
        for what in ("local_fdr", "pi0"):
            told = f"{what}: needs .* kind 'efron', one per .*--kind efron"
            with pytest.raises(ValueError, match=told):
                getattr(null.layer(0), what)


def test_the_density_is_the_normals():
    from scipy.stats import norm

    fit = EfronNull(median=-5.0, scale=2.0, mean=0.1, sd=0.9, pi0=0.8)
    z = np.linspace(-5, 5, 11)
    np.testing.assert_allclose(fit.pdf(z), norm.pdf(z, 0.1, 0.9), rtol=1e-12)
    np.testing.assert_allclose(fit.sf(-5 + 2 * z), norm.sf(z, 0.1, 0.9), rtol=1e-12)
    assert fit.centre == pytest.approx(-4.8)


# ---------------------------------------------------------------- pure noise, from end to end


@pytest.mark.parametrize("shape", ["normal", "shifted"])
@pytest.mark.parametrize("score", SCORES)
def test_pure_noise_is_rejected_hardly_more_often_than_alpha(score, shape):
    """P(R >= 1) of BH on fresh noise, E = 64, against an efron null fitted to noise."""

    def noise(tokens, seed):
        rng = np.random.default_rng(seed)
        z = 2 * rng.standard_normal((tokens, 64))
        # A shift of a token is no part of what `logit` can tell from a signal.
        shift = rng.normal(size=(tokens, 1)) if shape == "shifted" and score != "logit" else 0
        return (z + shift).astype(np.float32)

    layer = null_of(noise(5000, 1), kind="efron", score=score).layer(0)
    tokens = 20_000
    p = np.sort(layer.p_values(noise(tokens, 2)), axis=1)
    for alpha in (0.05, 0.2, 0.5):
        rejects = (p * 64 <= alpha * np.arange(1, 65)).any(axis=1).mean()
        assert rejects <= 1.3 * alpha
        if score != "logprob":  # which is bounded by 0: no noise stands out that far
            assert rejects >= 0.5 * alpha


@pytest.mark.parametrize(
    ("noise", "share"),
    [
        (lambda rng, size: rng.standard_normal(size), 0.05),
        (lambda rng, size: np.clip(rng.standard_t(3, size), -31, 31), 0.86),
        (lambda rng, size: rng.laplace(size=size), 0.97),
        (lambda rng, size: rng.exponential(size=size), 1.0),
    ],
    ids=["normal", "t3", "laplace", "exponential"],
)
def test_noise_that_is_not_normal_is_rejected_far_more_often(noise, share):
    """The shares that docs/statistics.md quotes: BH at 0.05, E = 64, raw scores."""
    fitted, fresh = (
        noise(np.random.default_rng(seed), (tokens, 64)).astype(np.float32)
        for seed, tokens in ((1, 5000), (2, 20_000))
    )
    layer = null_of(fitted, kind="efron", score="logit").layer(0)
    p = np.sort(layer.p_values(fresh), axis=1)
    rejects = (p * 64 <= 0.05 * np.arange(1, 65)).any(axis=1).mean()
    assert rejects == pytest.approx(share, abs=0.01)


# ---------------------------------------------------------------- conformal


def brute(scores, queries, n):
    return np.array([(1 + (scores >= s).sum()) / (n + 1) for s in queries])


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("tokens, experts", [(1, 1), (10, 4), (256, 4), (1500, 6)])
def test_conformal_counts_the_scores_at_or_above(tokens, experts, score):
    logits = random_logits(tokens, experts)
    layer = null_of(logits, kind="conformal", score=score).layer(0)
    n = tokens * experts
    form, name, table = layer.spec
    assert (form, name, table.shape) == ("conformal", score, (1 + 8193 + 1024,))
    assert table[0] == n
    fresh = np.concatenate([random_logits(40, experts, seed=3), logits[:20]])
    if experts > 1:
        fresh[0, 0], fresh[1, 0] = np.inf, -np.inf
    p = layer.reference(fresh)
    calibration, queries = scores_of(logits, score).ravel(), scores_of(fresh, score).ravel()
    expected = brute(calibration, queries, n).reshape(p.shape)
    stored = min(n, 1024)
    exact = expected <= stored / (n + 1)  # at most 1,023 at or above, or all are stored
    exact |= n <= 1024
    np.testing.assert_array_equal(p[exact], expected[exact])
    whole_bin = brute(calibration, EDGES[bins_of(queries)], n).reshape(p.shape)
    assert (p >= expected).all() and (p[~exact] <= whole_bin[~exact]).all()
    np.testing.assert_allclose(layer.p_values(fresh), p, rtol=1e-15)
    assert np.array_equal(layer.p_values(fresh), p) or score == "logprob"


def test_conformal_at_the_ends():
    table = null_of(np.array([[-40, 0, 33, 50]], np.float32), kind="conformal", score="logit")
    p = table.layer(0).reference(np.array([[-np.inf, -40, -39, 32.5], [33, 49, 50, 51]]))
    assert (5 * p).round().astype(int).tolist() == [[5, 5, 4, 3], [3, 2, 2, 1]]


def p_of_redrawn(values, replicates, n, rule):
    """One p-value a replicate, whose n calibration scores and query are all drawn anew."""
    rng = np.random.default_rng(0)
    p = np.empty(replicates)
    for i in range(replicates):
        scores = values(rng, n + 1).astype(np.float32).astype(float)
        p[i] = rule(scores[:-1], scores[-1:])[0]
    return p


def by_table(scores, query):
    return conformal_p(query, conformal_table(histogram(scores), np.sort(scores)[::-1]))


def strictly_above(scores, query):
    return (1 + (scores > query).sum(keepdims=True)) / (scores.size + 1)


def test_conformal_p_is_valid_over_redrawn_calibrations():
    n, replicates = 19, 6_000

    def normal(rng, size):
        return rng.standard_normal(size)

    def tied(rng, size):
        return rng.integers(0, 3, size)

    plain, ties, wrong = (
        p_of_redrawn(values, replicates, n, rule)
        for values, rule in ((normal, by_table), (tied, by_table), (tied, strictly_above))
    )
    failed = False
    for u in (0.05, 0.1, 0.3, 0.5, 0.77):
        level = math.floor(u * (n + 1) + 1e-9) / (n + 1)
        tolerance = 4 * math.sqrt(level * (1 - level) / replicates)
        at = u + 1e-12
        assert abs((plain <= at).mean() - level) <= tolerance
        assert (ties <= at).mean() <= level + tolerance
        failed |= (wrong <= at).mean() > level + tolerance
    assert failed  # so the test can tell
