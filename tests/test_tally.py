"""The counts in C against plain Python."""

from collections import OrderedDict

import numpy as np
import pytest
import util
from scipy.special import log_softmax

from moeprof import _C
from moeprof.profiler.tally import LATENCY_BINS, Counts, latency_edges

pytestmark = pytest.mark.once

E, K = 11, 4


def random_step(draw, tokens, *, experts=E, slots=K):
    """experts (T, k) without repetition, some -1; logits (T, E); real (T,); previous (T, 3)."""
    chosen = np.stack([draw.permutation(experts)[:slots] for _ in range(tokens)])
    chosen[draw.random(chosen.shape) < 0.2] = -1
    previous = draw.integers(-1, experts, (tokens, 3))
    logits = draw.normal(0, 3, (tokens, experts)).astype(np.float32)
    return chosen.astype(np.int32), logits, draw.random(tokens) < 0.7, previous.astype(np.int32)


def add(
    counts,
    recency,
    experts,
    logits=None,
    real=None,
    previous=None,
    *,
    dtype="float32",
    nanoseconds=1000,
    skips=False,
):
    step = recency, experts, logits, dtype, real, previous, nanoseconds, skips
    return _C.tally(counts.ints, counts.floats, *step)


def empty(experts=E):
    return np.full(experts, -1, np.int32)


class Plain:
    """The same counts, token by token in Python."""

    def __init__(self):
        self.counts, self.cache = Counts(E), OrderedDict()

    def add(self, experts, logits, real, previous, nanoseconds, skips):
        c = self.counts
        c.steps += 1
        c.nanoseconds += nanoseconds
        c.latency[np.searchsorted(latency_edges(), nanoseconds, "right") - 1] += 1
        unique = sorted({e for e in experts.ravel().tolist() if e >= 0})
        c.unique[len(unique)] += 1
        c.batch_steps[min(len(experts), 256)] += 1
        c.batch_unique[min(len(experts), 256)] += len(unique)
        for e in unique:
            recent = list(reversed(self.cache))
            c.reuse[recent.index(e) if e in recent else E] += 1
            self.cache[e] = None
            self.cache.move_to_end(e)
        for row, z, is_real, before in zip(experts, logits, real, previous, strict=True):
            self._token([e for e in row if e >= 0], len(row), z, is_real, before, skips)

    def _token(self, chosen, slots, z, is_real, before, skips):
        c, row = self.counts, 0 if is_real else 1
        c.k[row, len(chosen)] += 1
        np.add.at(c.load[row], chosen, 1)
        c.skipped[row] += skips * (slots - len(chosen))
        if not is_real:
            return
        for i in chosen:
            np.add.at(c.pairs[i], chosen, 1)
        for i in before[before >= 0]:
            np.add.at(c.moves[i], chosen, 1)
        z = z.astype(float)
        p = np.exp(log_softmax(z))
        confidence = 1 + (p * np.log(p)).sum() / np.log(E)
        gap = np.diff(np.sort(p)[-2:])[0]
        c.confidence[int(confidence * 100)] += 1
        c.gap[int(gap * 100)] += 1
        c.sums[:] += confidence, gap, np.logaddexp.reduce(z) ** 2
        c.probability += p


@pytest.mark.parametrize("skips", (False, True))
def test_steps_of_many_sizes_count_as_in_plain_python(skips):
    draw, plain, counts, recency = np.random.default_rng(0), Plain(), Counts(E), empty()
    for tokens in (1, 1, 5, 1, 40, 256, 300, 1, 0):
        step = random_step(draw, tokens) if tokens else random_step(draw, 1)
        experts, logits, real, previous = (part[:tokens] for part in step)
        nanoseconds = int(draw.integers(1, 10**9))
        plain.add(experts, logits, real, previous, nanoseconds, skips)
        unique = add(
            counts, recency, experts, logits, real, previous, nanoseconds=nanoseconds, skips=skips
        )
        assert unique == len(set(experts.ravel().tolist()) - {-1})
    fields = [name for name in vars(counts) if name not in ("num_experts", "has_pairs")]
    for name in fields:
        np.testing.assert_allclose(
            getattr(counts, name), getattr(plain.counts, name), rtol=1e-6, err_msg=name
        )
    assert counts.steps == 9 and (counts.skipped.sum() > 0) == skips
    assert np.array_equal(counts.pairs, counts.pairs.T)
    assert np.array_equal(np.diag(counts.pairs), counts.load[0])


def test_what_is_not_given_is_not_counted():
    counts, recency = Counts(E), empty()
    add(counts, recency, np.array([[3, 1], [1, -1]], np.int64))
    assert counts.load[0].tolist() == [0, 2, 0, 1] + [0] * 7 and not counts.load[1].any()
    assert counts.k[0, 1] == counts.k[0, 2] == 1 and counts.tokens == 2
    for name in ("confidence", "gap", "moves", "sums", "probability", "skipped"):
        assert not getattr(counts, name).any()
    assert recency[:3].tolist() == [3, 1, -1]


def test_without_pairs_there_are_no_tables_of_pairs():
    full, lean = Counts(E), Counts(E, pairs=False)
    experts, logits, real, previous = random_step(np.random.default_rng(1), 50)
    for counts in (full, lean):
        add(counts, empty(), experts, logits, real, previous)
    assert lean.pairs.shape == lean.moves.shape == (0, 0)
    assert np.array_equal(lean.load, full.load) and np.array_equal(lean.gap, full.gap)


@pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
def test_logits_of_16_bits_are_read(dtype):
    draw, wide, narrow = np.random.default_rng(2), Counts(E), Counts(E)
    experts, logits, real, _ = random_step(draw, 30)
    bits = util.narrow(logits, dtype)
    add(narrow, empty(), experts, bits, real, dtype=dtype)
    add(wide, empty(), experts, util.widen(bits, dtype), real)
    assert wide == narrow


def test_rows_without_a_softmax_are_left_out_and_infinite_ones_are_certain():
    z = np.zeros((4, E), np.float32)
    z[0, 2], z[1], z[2, 5] = np.nan, -np.inf, np.inf
    counts = Counts(E)
    add(counts, empty(), np.zeros((4, 1), np.int32), z)
    assert counts.confidence.sum() == 2 and counts.confidence[[0, 99]].tolist() == [1, 1]
    np.testing.assert_allclose(counts.probability[5], 1 + 1 / E, rtol=1e-6)
    assert counts.tokens == 4


def test_one_expert_leaves_nothing_to_be_uncertain_of():
    counts = Counts(1)
    add(counts, empty(1), np.zeros((3, 1), np.int32), np.ones((3, 1), np.float32))
    assert counts.sums[0] == 3 and counts.confidence[99] == 3 and counts.probability.shape == (1,)
    assert counts.pairs.tolist() == [[3]] and counts.load.shape == (2, 1)


def test_durations_fall_into_their_bins():
    edges = latency_edges()
    assert len(edges) == LATENCY_BINS + 1 and (np.diff(edges) > 0).all()
    assert (np.diff(edges)[64:] / edges[64:-1] <= 1 / 64).all()
    counts, recency = Counts(E), empty()
    inside = edges[:-1].astype(np.int64)
    for nanoseconds in inside.tolist():
        add(counts, recency, np.zeros((1, 1), np.int32), nanoseconds=nanoseconds)
    assert (counts.latency == 1).all()
    for nanoseconds in (-5, 2**62):  # a clock set back, a machine suspended
        add(counts, recency, np.zeros((1, 1), np.int32), nanoseconds=nanoseconds)
    assert counts.latency[[0, -1]].tolist() == [2, 2]


@pytest.mark.parametrize("bad", (-2, E, 2**40))
def test_a_wrong_id_is_refused_and_nothing_is_counted(bad):
    counts, recency = Counts(E), empty()
    with pytest.raises(ValueError, match=r"outside \[-1, num_experts\)"):
        add(counts, recency, np.array([[1], [bad]]))
    assert not counts.ints.any() and (recency == -1).all()


def test_counts_add_up_and_are_stored_and_read():
    draw, counts = np.random.default_rng(3), Counts(E)
    add(counts, empty(), *random_step(draw, 20))
    read = Counts.from_arrays(E, counts.ints, counts.floats)
    assert read == counts and read.ints is not counts.ints
    both = counts + counts
    assert np.array_equal(both.ints, 2 * counts.ints) and both.tokens == 2 * counts.tokens
    assert counts == read and both != counts
    with pytest.raises(ValueError, match="those of 12 experts"):
        Counts.from_arrays(12, counts.ints, counts.floats)
