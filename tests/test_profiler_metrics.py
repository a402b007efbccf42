"""What a layer's counts say, against the raw routing, NumPy, SciPy and transformers."""

import math
from collections import OrderedDict

import numpy as np
import pytest
import scipy.stats
import torch
from profiles import ROOF, Step, World, add_step, layer, make_profile, one_hot, softmax
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from moeprof import _C
from moeprof.models.find import Layer
from moeprof.profile.histograms import percentile
from moeprof.profile.metrics import (
    SCALARS,
    LayerMetrics,
    entropy,
    gini,
    load_balance_loss,
    load_balance_loss_by_layer,
    z_loss,
)
from moeprof.profiler.tally import Counts, latency_edges

E, K = 16, 3
SIZES = (40, 1, 1, 7, 1, 300, 2, 1, 1, 16)  # tokens of the steps


def random_steps(seed=0, skip=0.0, padding=0.25):
    """Steps of a first and a second layer, the same tokens in both."""
    world = World(2, E, K, seed=seed)
    made = ([], [])
    for number, tokens in enumerate(SIZES):
        topics = world.tokens(number % 2, tokens)
        real = world.rng.random(tokens) >= padding
        for index, steps in enumerate(made):
            logits = world.logits(index, topics)
            time = int(world.rng.lognormal(14, 1))
            steps.append(Step(world.choose(logits, skip), logits, real, time, skip > 0))
    return made


def counted(steps, before=None, num_experts=E):
    """Counts of a layer's steps; before: those of the same tokens in the layer before."""
    counts, recent = Counts(num_experts), []
    for number, step in enumerate(steps):
        previous = None if before is None else one_hot(before[number].experts, num_experts)
        add_step(counts, step, recent, previous)
    return counts


def measured(steps, **options):
    return LayerMetrics(layer(0, E, K, shared=100), counted(steps), **options)


def real(steps, name):
    return np.concatenate([getattr(s, name)[s.real] for s in steps])


@pytest.mark.parametrize("skip", [0.0, 0.3])
def test_the_counts_in_c_are_those_of_plain_numpy(skip):
    first, second = random_steps(seed=3, skip=skip)
    expected = counted(second, first)
    counts, recency = Counts(E), np.full(E, -1, np.int32)
    for before, step in zip(first, second, strict=True):
        _C.tally(
            counts.ints,
            counts.floats,
            recency,
            step.experts.astype(np.int32),
            step.logits.astype(np.float32),
            "float32",
            step.real,
            before.experts.astype(np.int32),
            step.nanoseconds,
            step.skips,
        )
    for name in (
        "latency",
        "k",
        "load",
        "skipped",
        "unique",
        "batch_unique",
        "reuse",
        "pairs",
        "moves",
    ):
        np.testing.assert_array_equal(getattr(counts, name), getattr(expected, name), name)
    np.testing.assert_allclose(counts.floats, expected.floats, rtol=1e-5)


# ---------------------------------------------------------------- balance


@pytest.mark.parametrize("size", [2, 3, 64, 128])
def test_balance_against_independent_formulas(size):
    load = np.random.default_rng(size).integers(0, 50, size)
    x = load.astype(float)
    apart = np.abs(x[:, None] - x[None, :]).mean()
    assert gini(load) == pytest.approx(apart / (2 * x.mean()), rel=1e-12)
    share = x / x.sum()
    assert entropy(share) == pytest.approx(scipy.stats.entropy(share) / math.log(size), rel=1e-12)
    counts = Counts(size)
    counts.load[0], counts.k[0, 1] = load, load.sum()
    m = LayerMetrics(layer(0, size, 1), counts)
    assert m.expert_load == pytest.approx(share.tolist())
    assert m.expert_load_std == pytest.approx(np.std(share), rel=1e-12)
    assert m.expert_load_cv == pytest.approx(scipy.stats.variation(x), rel=1e-12)
    assert m.expert_load_max_imbalance == pytest.approx(x.max() / x.mean(), rel=1e-12)


def test_balance_at_its_ends():
    assert gini([5, 5, 5, 5]) == pytest.approx(0)
    assert gini([0, 0, 0, 9]) == pytest.approx(3 / 4)
    assert entropy([0.25] * 4) == pytest.approx(1)
    assert str(entropy([0.0, 1.0])) == "0.0"
    assert math.isnan(gini([0, 0])) and math.isnan(entropy([1.0]))


def test_padding_changes_what_says_with_padding_only():
    steps, _ = random_steps()
    m = measured(steps)
    chosen = real(steps, "experts")
    everything = np.concatenate([s.experts for s in steps])
    assert m.tokens == len(chosen) and m.tokens_padding == len(everything) - len(chosen) > 0
    assert m.expert_selections == np.bincount(chosen.ravel(), minlength=E).tolist()
    shares = np.bincount(everything.ravel(), minlength=E) / everything.size
    assert m.expert_load_with_padding == pytest.approx(shares.tolist())
    assert m.expert_load_with_padding != m.expert_load
    assert m.active_experts == len(np.unique(chosen))


# ---------------------------------------------------------------- experts per token, FLOPs


def test_flops_are_those_of_the_selections_that_ran():
    steps, _ = random_steps(skip=0.4)
    m, known = measured(steps), layer(0, E, K, shared=100)
    per_expert = 2 * 3 * 64 * 32  # SwiGLU: three matrices of H x I
    per_token = 2 * 64 * E + 200
    by_hand = with_padding = 0
    for step in steps:
        for chosen, is_real in zip(step.experts, step.real, strict=True):
            cost = per_token + per_expert * sum(chosen >= 0)
            with_padding += cost
            by_hand += cost * is_real
    assert m.flops_total == by_hand < with_padding == m.flops_total_with_padding
    assert m.flops_total == m.flops_router + m.flops_expert + m.flops_shared
    assert m.flops_router == m.tokens * known.router_flops
    assert m.flops_expert == per_expert * int((real(steps, "experts") >= 0).sum())


def test_a_skipped_token_counts_as_zero_experts():
    rng = np.random.default_rng(0)
    experts = np.array([[0, 1], [2, -1], [-1, -1], [3, 1]])
    step = Step(experts, rng.normal(size=(4, E)), np.ones(4, bool), 1000, True)
    m = measured([step])
    assert m.k_mean == pytest.approx(5 / 4)
    assert m.k_distribution == [1, 1, 2] + [0] * (E - 2)
    assert m.skipped_slots == 3 and m.skipped_slots_padding == 0


# ---------------------------------------------------------------- the router's softmax


def test_confidence_and_gap_are_those_of_the_logits():
    steps, _ = random_steps()
    m = measured(steps)
    p = softmax(real(steps, "logits"))
    confidence = 1 - scipy.stats.entropy(p, axis=1) / math.log(E)
    gap = np.diff(np.sort(p, 1)[:, -2:], axis=1).ravel()
    assert m.router_confidence == pytest.approx(confidence.mean(), rel=1e-9)
    assert m.router_gap == pytest.approx(gap.mean(), rel=1e-9)
    for name, values in (("confidence", confidence), ("gap", gap)):
        ours = getattr(m, f"router_{name}_quartiles")
        np.testing.assert_allclose(ours, np.percentile(values, (25, 50, 75)), atol=0.00501)
    assert m.router_probability == pytest.approx(p.mean(0).tolist())


@pytest.mark.parametrize("masked", [False, True])
def test_the_losses_are_those_of_transformers(masked):
    layers = random_steps(seed=5, padding=0.3 if masked else 0.0)
    counts = [counted(steps) for steps in layers]
    logits = tuple(torch.tensor(np.concatenate([s.logits for s in steps])) for steps in layers)
    mask = np.concatenate([s.real for s in layers[0]])[None, :]
    expected = load_balancing_loss_func(
        logits, E, K, torch.tensor(mask.astype(np.int64)) if masked else None
    )
    assert load_balance_loss(counts) == pytest.approx(float(expected), rel=1e-5)
    assert load_balance_loss(counts) > 1.05 * K  # not that of an even load
    squares = torch.cat(logits).logsumexp(-1).square()[torch.tensor(np.tile(mask[0], 2))]
    assert z_loss(counts) == pytest.approx(float(squares.mean()), rel=1e-9)


# ---------------------------------------------------------------- time


@pytest.mark.parametrize("size", [1, 2, 3, 10, 1000])
def test_percentiles_of_the_latency_are_numpys_to_one_percent(size):
    times = np.random.default_rng(size).lognormal(13, 1.5, size).astype(np.int64)
    steps = [Step(np.array([[0]]), None, np.ones(1, bool), int(t)) for t in times]
    m = LayerMetrics(layer(0, 4, 1), counted(steps, num_experts=4))
    for q, name in ((50, "p50"), (90, "p90"), (99, "p99")):
        expected = np.percentile(times, q) / 1e6
        assert getattr(m, f"latency_ms_{name}") == pytest.approx(expected, rel=0.01)
    assert m.latency_ms_mean == pytest.approx(times.mean() / 1e6, rel=1e-12)
    assert m.latency_ms(100) == pytest.approx(times.max() / 1e6, rel=0.01)


def test_a_percentile_of_nothing_is_nan():
    assert math.isnan(percentile(np.zeros(len(latency_edges()) - 1, int), latency_edges(), 50))


# ---------------------------------------------------------------- what a step reads


def test_bytes_bandwidth_and_rate_by_hand():
    steps, _ = random_steps()
    m = measured(steps, roofline=ROOF)
    known = m.layer
    unique = [len(np.unique(s.experts)) for s in steps]
    read = sum(u * known.expert_bytes + known.router_bytes + known.shared_bytes for u in unique)
    nanoseconds = sum(s.nanoseconds for s in steps)
    assert m.unique_experts_mean == pytest.approx(np.mean(unique))
    assert sum(n * c for n, c in enumerate(m.unique_experts)) == sum(unique)
    assert m.expert_bytes_per_step == pytest.approx(np.mean(unique) * known.expert_bytes)
    assert m.bytes_per_step == pytest.approx(read / len(steps))
    assert m.mbu == pytest.approx(read / nanoseconds / 20.0)
    assert m.mfu == pytest.approx(m.flops_total_with_padding / nanoseconds / 900.0)
    assert m.arithmetic_intensity == pytest.approx(m.flops_total_with_padding / read)
    assert math.isnan(measured(steps).mbu) and math.isnan(measured(steps).mfu)


def test_distinct_experts_by_the_number_of_tokens():
    steps, _ = random_steps()
    expected = {}
    for step in steps:
        size = min(len(step.experts), 256)
        expected.setdefault(size, []).append(len(np.unique(step.experts)))
    found = measured(steps).unique_experts_by_tokens
    assert found == pytest.approx({n: np.mean(u) for n, u in expected.items()})
    assert set(found) == {1, 2, 7, 16, 40, 256}


def test_hit_rates_are_those_of_a_cache():
    steps, _ = random_steps()
    m = measured(steps)
    for size in range(E + 1):
        cache, hits, accesses = OrderedDict(), 0, 0
        for step in steps:
            for expert in np.unique(step.experts):
                accesses += 1
                hits += expert in cache
                cache[expert] = True
                cache.move_to_end(expert)
                if len(cache) > size:
                    cache.popitem(last=False)
        assert m.lru_hit_rate(size) == pytest.approx(hits / accesses)
    assert 0 < m.lru_hit_rate(E // 2) < m.lru_hit_rate(E) < 1
    for wrong in (-1, E + 1):
        with pytest.raises(ValueError, match=f"experts: expected 0 to {E}, got {wrong}"):
            m.lru_hit_rate(wrong)


# ---------------------------------------------------------------- pairs


def test_coactivation_and_moves_by_hand():
    first, second = random_steps()
    before, counts = counted(first), counted(second, first)
    m = LayerMetrics(layer(1, E, K), counts, before=before)
    together, onward = np.zeros((E, E)), np.zeros((E, E))
    for a, b in zip(real(first, "experts"), real(second, "experts"), strict=True):
        for j in b:
            for i in b:
                together[i, j] += 1
            for i in a:
                onward[i, j] += 1
    assert (counts.pairs == counts.pairs.T).all() and (counts.pairs == together).all()
    np.testing.assert_allclose(m.coactivation, together / together.diagonal())
    np.testing.assert_allclose(m.coactivation.diagonal(), 1)
    seen = before.load[0] > 0
    np.testing.assert_allclose(m.moves[seen], (onward / before.load[0][:, None])[seen])
    np.testing.assert_allclose(m.moves[seen].sum(1), K)  # every token goes to K experts
    assert not np.allclose(m.moves, m.moves.T)


def test_an_expert_without_tokens_has_no_shares():
    step = Step(np.array([[0, 1]]), None, np.ones(1, bool), 1000)
    m = LayerMetrics(layer(0, 3, 2), counted([step], num_experts=3))
    assert np.isnan(m.coactivation[:, 2]).all() and m.coactivation[2, 0] == 0
    assert m.moves is None  # there is no layer before
    assert LayerMetrics(layer(0, 3, 2), Counts(3, pairs=False)).coactivation is None


# ---------------------------------------------------------------- what was not measured


SUMS = ("tokens", "steps", "skipped", "dropped", "flops")


def test_nothing_measured_is_never_zero():
    summary = LayerMetrics(layer(0, E, K), Counts(E), roofline=ROOF).get_summary()
    sums = [name for name in SCALARS if name.startswith(SUMS)]
    assert all(summary[name] == 0 for name in sums)
    assert all(math.isnan(summary[name]) for name in SCALARS if name not in sums)
    assert all(map(math.isnan, summary["expert_load"]))


def test_one_expert_has_no_entropy_nor_confidence():
    step = Step(np.array([[0]]), np.zeros((1, 1)), np.ones(1, bool), 1000)
    counts = Counts(1)
    _C.tally(
        counts.ints,
        counts.floats,
        np.full(1, -1, np.int32),
        step.experts.astype(np.int32),
        step.logits.astype(np.float32),
        "float32",
        None,
        None,
        1000,
        False,
    )
    m = LayerMetrics(layer(0, 1, 1), counts)
    assert m.expert_load == [1.0] and m.expert_load_gini == 0
    for name in ("expert_load_entropy", "router_confidence", "router_gap"):
        assert math.isnan(getattr(m, name))
    assert m.coactivation.shape == (1, 1)


def test_unknown_sizes_are_nan():
    unknown = Layer("gate", "", E, None, None, 0, None, 0, 0, None, 0)
    steps, _ = random_steps()
    m = LayerMetrics(unknown, counted(steps), roofline=ROOF)
    for name in ("flops_total", "flops_expert", "expert_bytes_per_step", "mbu", "mfu"):
        assert math.isnan(getattr(m, name))
    assert m.tokens > 0 and m.expert_load_gini > 0


def test_without_logits_only_the_router_is_unknown():
    steps = [s._replace(logits=None) for s in random_steps()[0]]
    m = measured(steps)
    for name in ("router_confidence", "router_gap", "z_loss", "load_balance_loss"):
        assert math.isnan(getattr(m, name))
    assert m.k_mean == K


def test_a_summary_is_of_pythons_own_numbers():
    for metrics in make_profile(roofline=ROOF, padding=0.2, skip=0.1).each("decode"):
        summary = metrics.get_summary()
        assert set(SCALARS) < set(summary)
        for name, value in summary.items():
            values = value if name in ("expert_load", "k_distribution") else [value]
            assert {type(v) for v in values} <= {int, float}, name
        assert sum(summary["expert_load"]) == pytest.approx(1)
        assert sum(summary["k_distribution"]) == summary["tokens"]


def test_a_layer_without_tokens_has_no_say_in_the_mean_of_losses(profile):
    counted = profile.counts["prefill"][0]
    alone = load_balance_loss([counted])
    assert load_balance_loss_by_layer([counted, Counts(12)]) == alone > 0


def test_flops_of_real_tokens_are_unknown_where_padding_was_dropped_too():
    made = make_profile(1, 12, 2, prefill=(20,), decode=())
    own = made.metrics("prefill")["model.layers.0.mlp.gate"]
    assert own.flops_expert > 0
    own.counts.left_out[1, 3] = 1
    assert math.isnan(own.flops_expert) and math.isnan(own.flops_total)
    assert own.flops_total_with_padding > 0
