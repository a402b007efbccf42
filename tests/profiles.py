"""Profiles of random routing, counted in plain NumPy: what the profiler's counts must equal.

T tokens, k slots each (-1: none), E experts.
"""

from typing import NamedTuple

import numpy as np

from moeprof.measure.roofline import Roofline
from moeprof.models.find import Layer
from moeprof.models.phases import PHASES
from moeprof.profile.result import Profile
from moeprof.profiler.tally import Counts, latency_edges


class Step(NamedTuple):
    """One call of one layer: experts (T, k); logits (T, E) or None; real (T,) bool."""

    experts: np.ndarray
    logits: np.ndarray | None
    real: np.ndarray
    nanoseconds: int
    skips: bool = False


def one_hot(experts, num_experts):
    """(T, E) of 0 and 1."""
    return (experts[:, :, None] == np.arange(num_experts)).any(1).astype(np.int64)


def softmax(logits):
    z = np.exp(logits - logits.max(1, keepdims=True))
    return z / z.sum(1, keepdims=True)


def add_step(counts, step, recent, previous=None):
    """Count a step in `counts`. recent: the LRU list, changed; previous: (T, E) one-hot."""
    size = counts.num_experts
    chosen = one_hot(step.experts, size)
    counts.steps += 1
    counts.nanoseconds += step.nanoseconds
    bin_ = np.searchsorted(latency_edges(), step.nanoseconds, side="right") - 1
    counts.latency[bin_] += 1
    for row, rows in enumerate((step.real, ~step.real)):
        counts.k[row] += np.bincount(chosen[rows].sum(1), minlength=size + 1)
        counts.load[row] += chosen[rows].sum(0)
        if step.skips:
            counts.skipped[row] += (step.experts[rows] < 0).sum()
    used = np.flatnonzero(chosen.any(0)).tolist()
    counts.unique[len(used)] += 1
    batch = min(len(chosen), 256)
    counts.batch_steps[batch] += 1
    counts.batch_unique[batch] += len(used)
    for expert in used:
        counts.reuse[recent.index(expert) if expert in recent else size] += 1
        recent[:] = [expert, *(e for e in recent if e != expert)]
    real = chosen[step.real]
    if counts.has_pairs:
        counts.pairs += real.T @ real
        if previous is not None:
            counts.moves += previous[step.real].T @ real
    if step.logits is not None and step.real.any():
        add_logits(counts, step.logits[step.real].astype(float))
    return chosen


def add_logits(counts, z):
    p = softmax(z)
    confidence = 1 + (p * np.log(np.maximum(p, 1e-300))).sum(1) / np.log(z.shape[1])
    second, first = np.sort(p, 1)[:, -2:].T
    shift = z.max(1)
    lse = shift + np.log(np.exp(z - shift[:, None]).sum(1))
    for histogram, values in ((counts.confidence, confidence), (counts.gap, first - second)):
        bins = np.clip((100 * values).astype(int), 0, 99)
        np.add.at(histogram, bins, 1)
    counts.sums[:3] += confidence.sum(), (first - second).sum(), (lse**2).sum()
    counts.probability += p.sum(0)


def layer(index, num_experts=8, top_k=2, hidden=64, intermediate=32, shared=0, size=4) -> Layer:
    """A SwiGLU layer whose weights take `size` bytes a number."""
    expert = 3 * hidden * intermediate
    return Layer(
        name=f"model.layers.{index}.mlp.gate",
        block=f"model.layers.{index}.mlp",
        num_experts=num_experts,
        top_k=top_k,
        hidden_size=hidden,
        router_flops=2 * hidden * num_experts,
        expert_flops=2 * expert,
        shared_flops=2 * shared,
        router_bytes=size * hidden * num_experts,
        expert_bytes=size * expert,
        shared_bytes=size * shared,
    )


FACTS = {
    "model": "moeprof/demo",
    "model_class": "OlmoeForCausalLM",
    "config": {"hidden_size": 64},
    "machine": {
        "started": "2026-01-01T00:00:00+00:00",
        "cpu": "Some CPU @ 2.00GHz",
        "features": ["avx2", "avx512"],
        "threads": 2,
        "versions": {"moeprof": "0.1.0", "torch": "2.13.0", "transformers": "5.24.0"},
    },
    "router": "the model's own top-k",
    "steps": 12,
    "steps_left_out": 0,
    "warmup_steps": 0,
    "sampling_rate": 1,
    "memory_peak_mb": 512.5,
    "devices": [
        {"device": "cuda:0", "name": "Some GPU", "memory_peak_mb": 1024.0},
        {"device": "cuda:1", "name": "Some GPU", "memory_peak_mb": 2048.0},
    ],
    "notes": [],
}
ROOF = Roofline(read_gbs=20.0, gemm_gflops=900.0, dtype="float32", weight_bytes=10**8, seconds=1.0)


class World:
    """Tokens of domains, and routers that favour some experts and know the domains.

    Each layer's logits: popularity of the experts (Zipf) + a linear map of the token's topic,
    which is the domain's + noise.
    """

    def __init__(self, num_layers, num_experts, top_k, *, domains=("code", "law"), seed=0):
        self.rng = np.random.default_rng(seed)
        self.shape = num_layers, num_experts, top_k
        self.domains = domains
        self.topics = self.rng.normal(size=(len(domains), 6))
        self.maps = self.rng.normal(size=(num_layers, 6, num_experts))
        rank = np.stack([self.rng.permutation(num_experts) for _ in range(num_layers)])
        self.popularity = -0.7 * np.log(1 + rank)

    def tokens(self, domain, number):
        """(T, 6) topics."""
        return self.topics[domain] + self.rng.normal(size=(number, 6))

    def logits(self, index, topics):
        noise = self.rng.normal(size=(len(topics), self.shape[1]))
        return (self.popularity[index] + topics @ self.maps[index] * 0.5 + 0.5 * noise) * 1.2

    def choose(self, logits, skip=0.0):
        experts = np.argsort(-logits, 1)[:, : self.shape[2]]
        return np.where(self.rng.random(experts.shape) < skip, -1, experts)


def plausible_time(layer, experts):
    """ns at 60 % of ROOF's bandwidth and 40 % of its product rate."""
    read = len(np.unique(experts)) * layer.expert_bytes + layer.router_bytes
    done = experts.size * layer.expert_flops
    return read / (0.6 * ROOF.read_gbs) + done / (0.4 * ROOF.gemm_gflops) + 2e4


def make_profile(
    num_layers=2,
    num_experts=8,
    top_k=2,
    *,
    prefill=(20, 33),
    decode=(1,) * 10,
    padding=0.0,
    skip=0.0,
    pairs=True,
    facts=None,
    roofline=ROOF,
    seed=0,
    layers=None,
    domains=("code", "law"),
) -> Profile:
    """A Profile of random routing: steps of so many tokens in each phase, domains in turn."""
    world = World(num_layers, num_experts, top_k, seed=seed, domains=domains)
    layers = layers or [layer(i, num_experts, top_k) for i in range(num_layers)]
    counts = {phase: [Counts(num_experts, pairs) for _ in layers] for phase in PHASES}
    recent, events, now = [[] for _ in layers], [], 10**9
    table = {name: np.zeros((num_layers, num_experts + 1), np.int64) for name in domains}
    sizes = [("prefill", n) for n in prefill] + [("decode", n) for n in decode]
    for number, (phase, tokens) in enumerate(sizes):
        domain = number % len(domains)
        topics, real = world.tokens(domain, tokens), world.rng.random(tokens) >= padding
        previous = None
        for index, own in enumerate(counts[phase]):
            logits = world.logits(index, topics)
            experts = world.choose(logits, skip)
            time = int(plausible_time(layers[index], experts) * world.rng.lognormal(sigma=0.2))
            step = Step(experts, logits, real, time, skip > 0)
            before = int(own.batch_unique.sum())
            previous = add_step(own, step, recent[index], previous)
            table[domains[domain]][index] += [*previous[real].sum(0), real.sum()]
            unique = int(own.batch_unique.sum()) - before
            events.append((index, phase, now, time, tokens, unique))
            now += time
    facts = {**FACTS, "steps": len(sizes), **(facts or {})}
    return Profile(layers, counts, facts, domains=table, roofline=roofline, events=events)


def with_vocabulary(profile):
    """Three tokens that occurred 10, 20 and 3 times, in the last layer."""
    counts = np.zeros((1, 3, 12), np.int64)
    counts[0, 0, 4], counts[0, 0, 5] = 10, 10
    counts[0, 1, 4], counts[0, 1, 7], counts[0, 2, 7] = 5, 35, 6
    words = {
        "tokens": [11, 22, 33],
        "layers": [2],
        "counts": counts,
        "seen": np.array([10, 20, 3]),
        "text": ["if", " the", "<b>"],
    }
    return Profile(profile.layers, profile.counts, profile.facts, vocabulary=words)
