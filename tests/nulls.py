"""Nulls made without a model."""

import numpy as np

from moeprof.models.identity import text_digest
from moeprof.null import Null
from moeprof.null.histograms import Histograms
from moeprof.null.model import _ARRAYS


def random_logits(tokens, experts, seed=0, scale=2.0):
    rng = np.random.default_rng(seed)
    shift = rng.normal(size=(tokens, 1))
    return (shift + scale * rng.standard_normal((tokens, experts))).astype(np.float32)


def stored(logits, score):
    """Scores (T,E) as nulls count them: float64, rounded up to float32; `logprob` by SciPy."""
    from scipy.special import log_softmax

    z = logits.astype(np.float64)
    if score == "logprob":
        z = log_softmax(z, axis=1)
    elif score == "centred":
        z = z - z.mean(axis=1, keepdims=True)
    rounded = z.astype(np.float32)
    up = np.nextafter(rounded, np.float32(np.inf))
    return np.where(rounded < z, up, rounded).astype(np.float64)


def null_of(*logits, kind="all", score="logprob", r_high=0, r_low=0, text="a"):
    """A Null of one (T,E) array of logits a layer, without a model."""
    tokens, experts = logits[0].shape
    counter = Histograms(len(logits), experts, score, r_high, r_low)
    for layer, values in enumerate(logits):
        counter.add(layer, values)
    return Null(
        kind=kind,
        score=score,
        r_high=r_high,
        r_low=r_low,
        counts=counter.counts,
        largest=counter.largest,
        tokens=tokens,
        model_name="toy",
        router_sample=np.full((len(logits), 4), 0.5, np.float32),
        text_digest=text_digest([text]),
    )


def assert_same(a, b):
    """Equal in every field, bit for bit, and in every table."""
    for name in _ARRAYS:
        x, y = getattr(a, name), getattr(b, name)
        assert x.dtype == y.dtype and np.array_equal(x, y), name
    assert a._facts() == b._facts()
    for index in range(len(a)):
        assert np.array_equal(a.layer(index).table, b.layer(index).table)
