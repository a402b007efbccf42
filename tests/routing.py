"""Shared by the tests of the routers: nulls without a fit, nasty logits, C against reference()."""

from collections import namedtuple
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache

import numpy as np
import util
from nulls import random_logits
from util import narrow, widen

from moeprof.null import normal_reference
from moeprof.routers import REGISTRY, make_router

NAMES = sorted(REGISTRY)
WIDTHS = (1, 2, 8, 60, 64, 128, 256)
EDGES = -32 + np.arange(8193) / 128
NASTY_ROWS = len(util.nasty_rows(1))
Routed = namedtuple("Routed", "weights experts counts rejections p")
# further settings of a router than its defaults, each tested as a router of its own
VARIANTS = {
    "higher_criticism": [
        {"denominator": "p"},
        {"beta": "auto"},
        {"beta": 0.3, "c": 0.05},
        {"c": -0.1},
    ],
    "kneedle": [{"on": "log"}, {"c": 0.02}, {"on": "log", "c": -0.02}],
    "gap_ratio": [{"c": 0.05}, {"c": -1.0}],
    "storey_bh": [{"pi0": 0.7}, {"alpha": 0.4, "lam": 0.3}],
    "ebh": [{"alpha": 0.5, "e": "calibrator"}],
    "entropy": [{"c": 0.1}, {"c": 1.0}, {"c": 3.0}],
    "weighted_bh": [{"alpha": 0.3, "v": 1.5}],
}
CASES = [(name, own) for name in NAMES for own in ({}, *VARIANTS.get(name, ()))]


def case_id(case):
    return f"{case[0]}-{case[1]}" if isinstance(case, tuple) else None


def make(name, experts, **given):
    """A router with its own defaults, as far as they fit so many experts."""
    own = {f.name for f in fields(REGISTRY[name])}
    if "k" in own:
        given = {"k": min(8, experts)} | given
    if "u" in own and given.get("min_k", 1) < experts:  # some weights are 0
        given = {"u": weights_of(experts)} | given
    return make_router(name, **given)


def weights_of(experts):
    """Weights of experts, 0 for one of them, mean 1."""
    u = np.random.default_rng(experts).exponential(1, experts) + 0.05
    u[experts // 2] = 0 if experts > 2 else 1
    return tuple((u / u.mean()).tolist())


# ---- nulls ----


def scores(z, score):
    """The scores of docs/statistics.md, float64."""
    z = np.asarray(z, np.float64)
    if score == "logprob":
        return util.logprob(z)
    if score == "logit":
        return z
    mean = np.array([row[np.isfinite(row)].sum() / max(np.isfinite(row).sum(), 1) for row in z])
    return z - mean[:, None]


def conformal_table(calibration):
    """The table of the form "conformal" of these scores; of rows of scores a row each."""
    ordered = np.sort(np.atleast_2d(calibration))
    n = ordered.shape[1]
    # As many are at or above an edge as lie in the bins from there on; the ends are open.
    bins = np.clip(np.floor(ordered * 128) + 4096, 0, 8192).astype(int)
    tables = np.full((len(ordered), 1 + 8193 + 1024), -np.inf)
    tables[:, 0] = n
    for table, row in zip(tables, bins, strict=True):
        width = np.diff(row, prepend=-1, append=8192)  # of the edges between two of the scores
        table[1 : 1 + 8193] = np.repeat(np.arange(n, -1, -1), width)
    tables[:, 1 + 8193 :][:, :n] = ordered[:, ::-1][:, :1024]
    return tables.reshape(*np.shape(calibration)[:-1], -1)


def conformal_p(s, table):
    """The definition, score by score; counts of what is below the stored ones by whole bins."""
    n, at_least, largest = table[0], table[1 : 1 + 8193], table[1 + 8193 :]
    kept = np.sort(largest[: int(min(n, 1024))])
    exact = kept.size - np.searchsorted(kept, s, side="left")  # those >= s
    bins = np.clip(np.floor(s * 128) + 4096, 0, 8191).astype(int)
    return (1 + np.where((s > largest[-1]) | (n <= 1024), exact, at_least[bins])) / (n + 1)


@dataclass(frozen=True, eq=False)
class ToyNull:
    """A null by its table; `local_fdr` and `pi0` as if it were efron's."""

    form: str
    score: str
    table: np.ndarray = field(repr=False)
    local_fdr: np.ndarray | None = field(default=None, repr=False)
    pi0: float = 0.9

    @property
    def spec(self):
        return self.form, self.score, self.table

    def reference(self, z):
        z = np.asarray(z, np.float64)
        return _p_of(self, z.tobytes(), z.shape)


@lru_cache(maxsize=64)
def _p_of(null, logits, shape):
    """The p-values of a ToyNull, once for the same logits: every router asks for them."""
    z = np.frombuffer(logits).reshape(shape)
    if null.form == "softmax":
        p = 1 - util.softmax(z)
    else:
        s, rule = scores(z, null.score), util.table_p if null.form == "table" else conformal_p
        if null.table.ndim == 1:
            p = rule(s, null.table)
        else:
            p = np.stack([rule(s[:, e], table) for e, table in enumerate(null.table)], axis=1)
    p.flags.writeable = False
    return p


def counted_table(calibration):
    """The table of the form "table" of these scores, with a tail that is a guess."""
    n, x_max = calibration.size, calibration.max()
    sf = (n - np.searchsorted(np.sort(calibration), EDGES, side="left")) / n
    sf[0] = 1
    return np.concatenate([[x_max, 1 / n, 0.4], sf])


@lru_cache
def layer_null(kind, experts):
    """None (`normal`), or a null; "each": one table for each expert."""
    if kind == "normal":
        return None
    if kind == "softmax":
        return ToyNull("softmax", "logit", None)
    form = "conformal" if "conformal" in kind else "table"
    score = {"logit": "logit", "centred": "centred"}.get(kind, "logprob")
    seen = scores(random_logits(4000 // experts + 40, experts), score)
    if "each" in kind:
        seen = seen + np.linspace(-1, 1, experts)
    rule = conformal_table if form == "conformal" else counted_table
    table = np.stack([rule(s) for s in seen.T]) if "each" in kind else rule(seen.ravel())
    lfdr = np.minimum(1, 1.2 / (1 + np.exp(EDGES + 2.5)))
    return ToyNull(form, score, table, np.maximum(lfdr, 1e-12))


def nulls_of(name, own=()):
    """The kinds of null that a router works with."""
    if not REGISTRY[name].wants_null:
        return ("normal",)
    if name == "local_fdr" or (name == "ebh" and "e" not in own):
        return ("logprob", "logit", "centred")
    return (
        "normal",
        "softmax",
        "logprob",
        "logit",
        "centred",
        "conformal",
        "each",
        "conformal each",
    )


def some_nulls(case, widths, experts):
    """Three of the kinds of null that a case works with, others at each width: at some width each
    of them, and at each width, over the cases, every kind."""
    kinds, first = nulls_of(*case), CASES.index(case) + 3 * widths.index(experts)
    return list(dict.fromkeys(kinds[(first + i) % len(kinds)] for i in range(3)))


def any_null(name, experts):
    """One that the router works with."""
    return layer_null(nulls_of(name)[0], experts)


def p_reference(z, null):
    return normal_reference(z) if null is None else null.reference(z)


# ---- the C path and the reference ----


def logits_of(tokens, experts, seed=5):
    """Nasty rows first, then as `layer_null` has seen them, with a few that stand out."""
    rng = np.random.default_rng(seed)
    z = random_logits(tokens, experts, seed)
    z[:, rng.integers(0, experts, 3)] += rng.exponential(3, (tokens, 3)).astype(np.float32)
    nasty = util.nasty_rows(experts, seed)
    return np.concatenate([nasty, z])[:tokens]


def route(router, z, dtype="float32", *, null=None, norm="sum", norm_k=1, threads=1):
    """_C.route of float32 logits, rounded to the dtype."""
    spec = router.spec(z.shape[1], norm=norm, norm_k=norm_k, null=null)
    return Routed(*util.route(narrow(z, dtype), dtype, spec.arguments, threads, True))


def evidence(router, z, null):
    """The experts of each token, best first, by the rule of docs/statistics.md."""
    p = np.zeros(z.shape)
    if router.wants_null:
        p = p_reference(z, null)
        weights = router.table(z.shape[1], null) if router.name == "weighted_bh" else None
        if weights is not None:
            p = np.divide(p, weights, out=np.full_like(p, np.inf), where=weights > 0)
    return np.lexsort((np.broadcast_to(np.arange(z.shape[1]), z.shape), -z, p), axis=1)


def off_boundaries(router, z, null):
    """The tokens whose R does not hang on the last bits of what the router sees."""
    if null is not None and null.form == "conformal":  # ratios of whole numbers: exact
        return np.ones(len(z), bool)
    with np.errstate(invalid="ignore"):
        tokens = router.look(z, null)[1]
        counts = [
            router.count(
                replace(
                    tokens,
                    **{
                        name: getattr(tokens, name) * (1 + off)
                        for name in ("z", "p", "lfdr")
                        if getattr(tokens, name) is not None
                    },
                )
            )
            for off in (-1e-9, 1e-9)
        ]
    return counts[0] == counts[1]


def hold(router, z, dtype, null):
    """The C path equals reference(): R and the selection exactly, the weights nearly."""
    z = widen(narrow(z, dtype), dtype)
    steady = off_boundaries(router, z, null)
    ordinary = steady[NASTY_ROWS:]  # the nasty rows are full of ties
    assert ordinary.sum() >= 0.9 * ordinary.size, f"{router}: {(~steady).nonzero()[0]}"
    z = z[steady]
    got = route(router, z, dtype, null=null)
    with np.errstate(invalid="ignore"):
        ref, rejections = router.reference(z, null=null)
    np.testing.assert_array_equal(got.rejections, rejections, err_msg=str(router))
    counts = np.clip(rejections, *router.limits(z.shape[1]))
    np.testing.assert_array_equal(got.counts, counts)
    chosen = np.arange(got.experts.shape[1]) < counts[:, None]
    expected = np.where(chosen, evidence(router, z, null)[:, : chosen.shape[1]], -1)
    np.testing.assert_array_equal(got.experts, expected, err_msg=str(router))
    ref = np.where(chosen, np.take_along_axis(ref, np.maximum(expected, 0), axis=1), 0)
    tol = 1e-6 + (0 if dtype == "float32" else util.HALF_ULP[dtype] * ref)
    util.assert_close(got.weights, ref, tol, f"{router} {dtype}")
    np.testing.assert_allclose(got.p, p_reference(z, null), rtol=1e-9, atol=1e-15)
