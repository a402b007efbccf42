"""What a layer's counts say: costs, balance, confidence, times. Nothing here needs torch.

E experts; N_i: real tokens that select expert i; a step is one call of the layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, SupportsFloat

import numpy as np

from ..files import printable
from ..profiler.tally import latency_edges
from .histograms import UNIT_EDGES, percentile

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from ..measure.roofline import Roofline
    from ..models.layer import Layer
    from ..profiler.tally import Counts


NAN = float("nan")
REAL, BOTH = slice(0, 1), slice(0, 2)  # rows of the counts: real tokens; those and padding

# One number each, in the order of `get_summary`.
COUNTED = (
    "tokens",
    "tokens_padding",
    "steps",
    "skipped_slots",
    "skipped_slots_padding",
    "dropped_selections",
    "flops_total",
    "flops_router",
    "flops_expert",
    "flops_shared",
    "flops_adapter",
    "flops_total_with_padding",
)
ROUTING = (
    "k_mean",
    "k_mean_with_padding",
    "active_experts",
    "expert_load_std",
    "expert_load_gini",
    "expert_load_entropy",
    "expert_load_cv",
    "expert_load_max_imbalance",
    "expert_load_gini_with_padding",
    "router_confidence",
    "router_gap",
    "load_balance_loss",
    "z_loss",
)
COSTS = (
    "latency_ms_mean",
    "latency_ms_p50",
    "latency_ms_p90",
    "latency_ms_p99",
    "unique_experts_mean",
    "expert_bytes_per_step",
    "bytes_per_step",
    "read_gbs",
    "gflops",
    "arithmetic_intensity",
    "mbu",
    "mfu",
)
SCALARS = COUNTED + ROUTING + COSTS
BY_EXPERT = ("expert_selections", "expert_load", "expert_load_with_padding", "router_probability")


def ratio(part: SupportsFloat, whole: SupportsFloat) -> float:
    """part / whole as a Python float; nan where there is no whole."""
    return float(part) / float(whole) if whole else NAN


def _times(number: int, each: int | None) -> float | int:
    """number * each; nan where `each` is unknown."""
    return NAN if each is None else number * each


def gini(values: ArrayLike) -> float:
    """Half the mean absolute difference of two values, over their mean; 0: all equal.

    By sorted values (E,): 2 Σ r x_(r) / (E Σ x) − (E + 1) / E, r from 1. nan if they sum to 0.
    """
    x = np.sort(np.asarray(values, dtype=float))
    size, total = len(x), x.sum()
    return ratio(2 * (np.arange(1, size + 1) * x).sum() - (size + 1) * total, size * total)


def entropy(shares: ArrayLike) -> float:
    """−Σ s ln s / ln E of shares (E,) that sum to 1, in [0, 1]; nan for E = 1 or without shares."""
    s = np.asarray(shares, dtype=float)
    if len(s) < 2 or not np.isfinite(s).all():
        return NAN
    used = s[s > 0]
    # + 0.0: all on one expert is 0, not −0.
    return float(-(used * np.log(used)).sum() / math.log(len(s))) + 0.0


def load_balance_loss(counts: Sequence[Counts]) -> float:
    """E Σ_e f_e P_e over the layers of `counts`, as transformers' load_balancing_loss_func.

    f_e: selections of expert e per token, P_e: its mean probability, both over the tokens of
    all layers together (pooled): experts of the same number in different layers are taken for
    one, so layers that are each unbalanced in another way pass for balanced. The mean of the
    layers' own losses shows that. k for a perfect balance. Of the routing that ran: a router that
    doesn't take the top k of these logits makes it another number than training would see.
    nan without logits, or where layers differ in E.
    """
    if len({c.num_experts for c in counts}) != 1:
        return NAN
    selected = ratio_each(sum(c.load[0] for c in counts), sum(c.tokens for c in counts))
    known = sum(int(c.confidence.sum()) for c in counts)
    probability = ratio_each(sum(c.probability for c in counts), known)
    return float(counts[0].num_experts * (selected * probability).sum())


def load_balance_loss_by_layer(counts: Sequence[Counts]) -> float:
    """The mean over layers of each layer's own load-balance loss; nan without logits.

    Layers without tokens are left out; they may differ in E.
    """
    losses = [load_balance_loss([c]) for c in counts if c.tokens]
    return float(np.mean(losses)) if losses else NAN


def z_loss(counts: Sequence[Counts]) -> float:
    """Mean of logsumexp(z)² over the tokens of all layers of `counts` (ST-MoE); nan without."""
    return ratio(sum(c.sums[2] for c in counts), sum(int(c.confidence.sum()) for c in counts))


def ratio_each(parts: ArrayLike, whole: float) -> NDArray[np.float64]:
    """parts / whole for an array, all nan where there is no whole."""
    parts = np.asarray(parts, dtype=float)
    return parts / whole if whole else np.full(parts.shape, NAN)


class LayerMetrics:
    """Numbers of one layer in one phase, computed from its counts when asked for.

    Each number is an attribute, `metrics.k_mean`; the glossary has all of them. Python ints,
    floats and lists of them, the tables by pairs of experts as arrays. Sums over nothing are 0;
    whatever else was not measured is nan, never 0. Real tokens only, unless the name says
    `with_padding`; what the machine did (steps, times, experts read, bytes) includes padding.

    layer : what the layer is: names, sizes, modules
    counts : what was counted in it
    roofline : what `moeprof.roofline` gave, for mbu and mfu, or None
    before : the counts of the MoE layer before, for `moves`
    """

    def __init__(
        self,
        layer: Layer,
        counts: Counts,
        *,
        roofline: Roofline | None = None,
        before: Counts | None = None,
    ) -> None:
        self.layer, self.counts, self.roofline, self._before = layer, counts, roofline, before

    def __repr__(self) -> str:
        name = printable(self.layer.name)
        return f"<LayerMetrics of {name}: {self.tokens:,} tokens, {self.steps:,} steps>"

    def get_summary(self) -> dict[str, Any]:
        """{name: number} of everything that is one number, then two lists.

        k_distribution: tokens by number of experts, 0 to E; expert_load: share of selections.
        """
        lists = ("k_distribution", "expert_load")
        return {name: getattr(self, name) for name in SCALARS + lists}

    # ---- tokens ----

    @property
    def tokens(self) -> int:
        """Real tokens counted."""
        return self.counts.tokens

    @property
    def tokens_padding(self) -> int:
        return self.counts.tokens_padding

    @property
    def steps(self) -> int:
        """Calls of the layer."""
        return int(self.counts.steps)

    @property
    def skipped_slots(self) -> int:
        """Slots of real tokens that a user's router set to -1."""
        return int(self.counts.skipped[0])

    @property
    def skipped_slots_padding(self) -> int:
        return int(self.counts.skipped[1])

    # ---- FLOPs: two for each multiplication and addition of a matrix product ----

    def _flops(self, rows: slice) -> float | int:
        """Of tokens in `rows` of the counts; nan where a part's size, or what ran, is unknown."""
        tokens = int(self.counts.k[rows].sum())
        each = self.layer.router_flops, self.layer.shared_flops
        parts = [_times(tokens, flops) for flops in each]
        return sum(parts) + self._expert_flops(rows) + self.flops_adapter

    def _expert_flops(self, rows: slice) -> float | int:
        """Of the rows that experts ran; a slice of one row is that of the real tokens."""
        layer, left_out = self.layer, self.counts.left_out
        if left_out[1].any() and rows == REAL:
            return NAN  # tokens and padding ran together, and some of them did not
        if layer.dense:
            return _times(int(self.counts.k[rows].sum()) * layer.num_experts, layer.expert_flops)
        ran = self.counts.load[rows].sum(0) - left_out[rows].sum(0)[:-1]
        if layer.slot_flops is not None:
            return int((ran * np.array(layer.slot_flops)).sum())
        return _times(int(ran.sum() - left_out[rows, -1].sum()), layer.expert_flops)

    @property
    def dropped_selections(self) -> float | int:
        """Selections that no expert ran: those above an expert's capacity, or of experts that
        are not on this machine; less the rows that experts ran without being selected, as one
        that takes what others drop, or is filled up to its capacity. Negative: these are more.
        nan where padding was among them: of which is not known."""
        left_out = self.counts.left_out
        return NAN if left_out[1].any() else int(left_out[0].sum())

    @property
    def dropped_selections_with_padding(self) -> int:
        return int(self.counts.left_out.sum())

    @property
    def flops_total(self) -> float | int:
        """Router, the rows that experts ran, shared experts, adapters: of the real tokens."""
        return self._flops(REAL)

    @property
    def flops_router(self) -> float | int:
        return _times(self.tokens, self.layer.router_flops)

    @property
    def flops_expert(self) -> float | int:
        """Of what ran: selections that an expert dropped cost nothing."""
        return self._expert_flops(REAL)

    @property
    def flops_shared(self) -> float | int:
        return _times(self.tokens, self.layer.shared_flops)

    @property
    def flops_adapter(self) -> int:
        """Of adapters that are multiplied out and added to all experts in every step, whatever
        runs (peft's target_parameters). Other adapters count with what they adapt."""
        return self.steps * self.layer.call_flops

    @property
    def flops_total_with_padding(self) -> float | int:
        """What was really computed."""
        return self._flops(BOTH)

    # ---- experts per token ----

    def _k_mean(self, k: NDArray[np.int64]) -> float:
        return ratio((np.arange(len(k)) * k).sum(), k.sum())

    @property
    def k_mean(self) -> float:
        """Experts per token; a token whose slots were all skipped counts as 0."""
        return self._k_mean(self.counts.k[0])

    @property
    def k_mean_with_padding(self) -> float:
        return self._k_mean(self.counts.k.sum(0))

    @property
    def k_distribution(self) -> list[int]:
        """Tokens that use 0, 1, … E experts."""
        return self.counts.k[0].tolist()

    # ---- balance ----

    @property
    def expert_selections(self) -> list[int]:
        """N_i."""
        return self.counts.load[0].tolist()

    @property
    def expert_load(self) -> list[float]:
        """N_i / Σ N: each expert's share of the selections; 1/E for a perfect balance."""
        return self._load().tolist()

    @property
    def expert_load_with_padding(self) -> list[float]:
        return self._load(with_padding=True).tolist()

    def _load(self, with_padding: bool = False) -> NDArray[np.float64]:
        load = self.counts.load.sum(0) if with_padding else self.counts.load[0]
        return ratio_each(load, int(load.sum()))

    @property
    def active_experts(self) -> float | int:
        """Experts that were selected at least once; nan where no token was counted."""
        return int((self.counts.load[0] > 0).sum()) if self.tokens else NAN

    @property
    def expert_load_std(self) -> float:
        """Standard deviation of expert_load, ddof 0."""
        return float(self._load().std())

    @property
    def expert_load_cv(self) -> float:
        """Standard deviation over mean."""
        return self.expert_load_std * self.layer.num_experts

    @property
    def expert_load_gini(self) -> float:
        """0: all experts alike; (E − 1) / E: all on one."""
        return gini(self.counts.load[0])

    @property
    def expert_load_gini_with_padding(self) -> float:
        return gini(self.counts.load.sum(0))

    @property
    def expert_load_entropy(self) -> float:
        """−Σ load ln load / ln E. 1: all experts alike; 0: all on one; nan for E = 1."""
        return entropy(self._load())

    @property
    def expert_load_max_imbalance(self) -> float:
        """Largest load over the mean load."""
        return float(self._load().max()) * self.layer.num_experts

    # ---- the router's softmax ----

    @property
    def _known(self) -> int:
        """Real tokens whose logits are known."""
        return int(self.counts.confidence.sum())

    @property
    def router_confidence(self) -> float:
        """Mean of 1 − H(p) / ln E; 1: certain. nan for E = 1 and without logits."""
        return ratio(self.counts.sums[0], self._known) if self.layer.num_experts > 1 else NAN

    @property
    def router_confidence_quartiles(self) -> list[float]:
        """The 25th, 50th and 75th percentile over tokens, to within 0.005."""
        return self._quartiles(self.counts.confidence)

    @property
    def router_gap(self) -> float:
        """Mean of p_(1) − p_(2)."""
        return ratio(self.counts.sums[1], self._known) if self.layer.num_experts > 1 else NAN

    @property
    def router_gap_quartiles(self) -> list[float]:
        return self._quartiles(self.counts.gap)

    def _quartiles(self, histogram: NDArray[np.int64]) -> list[float]:
        if self.layer.num_experts < 2:
            return [NAN] * 3
        return [percentile(histogram, UNIT_EDGES, q) for q in (25, 50, 75)]

    @property
    def router_probability(self) -> list[float]:
        """Each expert's mean probability."""
        return ratio_each(self.counts.probability, self._known).tolist()

    @property
    def load_balance_loss(self) -> float:
        """Of this layer alone; see `load_balance_loss` above."""
        return load_balance_loss([self.counts])

    @property
    def z_loss(self) -> float:
        return z_loss([self.counts])

    # ---- time ----

    @property
    def latency_ms_mean(self) -> float:
        return ratio(self.counts.nanoseconds, self.steps) / 1e6

    @property
    def latency_ms_p50(self) -> float:
        return self.latency_ms(50)

    @property
    def latency_ms_p90(self) -> float:
        return self.latency_ms(90)

    @property
    def latency_ms_p99(self) -> float:
        return self.latency_ms(99)

    def latency_ms(self, q: float) -> float:
        """The q-th percentile over steps, from bins: off by at most 0.8 %."""
        return percentile(self.counts.latency, latency_edges(), q) / 1e6

    # ---- what a step reads ----

    @property
    def unique_experts(self) -> list[int]:
        """Steps in which 0, 1, … E distinct experts ran."""
        return self.counts.unique.tolist()

    @property
    def unique_experts_mean(self) -> float:
        """Distinct experts in a step, those of padding too: what had to be read."""
        return self._k_mean(self.counts.unique)

    @property
    def unique_experts_by_tokens(self) -> dict[int, float]:
        """{tokens in the step: mean number of distinct experts}; 256 is 256 or more."""
        seen = np.flatnonzero(self.counts.batch_steps)
        means = self.counts.batch_unique[seen] / self.counts.batch_steps[seen]
        return dict(zip(seen.tolist(), means.tolist(), strict=True))

    @property
    def expert_bytes_per_step(self) -> float:
        """Of the distinct experts selected; of all, where all run or adapters are added to all."""
        layer, each = self.layer, self.layer.expert_bytes
        if each is None or not self.steps:
            return NAN
        whole = layer.dense or layer.call_flops
        return (layer.num_experts if whole else self.unique_experts_mean) * each

    @property
    def bytes_per_step(self) -> float:
        """Weights read: the distinct experts', the router's, the shared experts'."""
        return self.expert_bytes_per_step + self.layer.router_bytes + self.layer.shared_bytes

    @property
    def read_gbs(self) -> float:
        """Weights over time, 10⁹ bytes a second."""
        return ratio(self.bytes_per_step * self.steps, self.counts.nanoseconds)

    @property
    def gflops(self) -> float:
        """10⁹ FLOPs a second, padding included."""
        return ratio(self.flops_total_with_padding, self.counts.nanoseconds)

    @property
    def arithmetic_intensity(self) -> float:
        """FLOPs for each byte of weights."""
        return ratio(self.flops_total_with_padding, self.bytes_per_step * self.steps)

    @property
    def mbu(self) -> float:
        """Share of the measured read bandwidth; above 1 where weights were in a cache."""
        return self.read_gbs / self.roofline.read_gbs if self.roofline else NAN

    @property
    def mfu(self) -> float:
        """Share of the measured rate of matrix products; above 1 if that was measured too low."""
        return self.gflops / self.roofline.gemm_gflops if self.roofline else NAN

    @property
    def lru_hit_rates(self) -> list[float]:
        """Share of the accesses to experts that a cache of 0, 1, … E experts would have served."""
        reuse = self.counts.reuse
        hits = np.concatenate([[0], np.cumsum(reuse[:-1])])
        return ratio_each(hits, int(reuse.sum())).tolist()

    def lru_hit_rate(self, experts: int) -> float:
        """Of a cache of that many of this layer's experts, the least recently used one evicted.

        ValueError unless 0 <= experts <= E.
        """
        if not 0 <= experts <= self.layer.num_experts:
            raise ValueError(f"experts: expected 0 to {self.layer.num_experts}, got {experts!r}")
        return self.lru_hit_rates[experts]

    # ---- pairs of experts ----

    @property
    def coactivation(self) -> NDArray[np.float64] | None:
        """(E, E) array of N_ij / N_j: of the tokens that select j, the share that selects i too.

        nan where N_j = 0; None if pairs were not counted.
        """
        return self._shares(self.counts.pairs, self.counts.load[0])

    @property
    def moves(self) -> NDArray[np.float64] | None:
        """(E, E) array: of expert i's tokens in the MoE layer before, the share that goes to j.

        A row sums to these tokens' number of experts here. nan where no token was followed;
        None if pairs were not counted or there is no layer before.
        """
        if self._before is None:
            return None
        shares = self._shares(self.counts.moves.T, self._before.load[0])
        return None if shares is None else shares.T

    def _shares(
        self, table: NDArray[np.int64], selections: NDArray[np.int64]
    ) -> NDArray[np.float64] | None:
        """(E, E) table with each column over its expert's selections."""
        if not self.counts.has_pairs:
            return None
        whole = np.where(selections > 0, selections, NAN)
        return table / whole
