"""Null distributions of router scores: save, load, p-values (fitted in `calibration`).

A null is the distribution of the router's score of an expert that a token does not need.
`Null` holds one for each MoE layer of a model, as integer histograms, so that two nulls merge by
adding. Letters: L MoE layers, E experts, T tokens. `normal`, the fallback that needs no
calibration, has its float64 reference here (`normal_reference`).

The p-value of a score s under a layer's null (`LayerNull.table`, read by the C kernel too):
1 at or below -32; linear between the histogram's edges up to the largest score seen, x_max;
beyond it the exponential tail p_max * exp(-(s - x_max) / beta), never 0.
"""

import hashlib
import html
import io
import json
import math
import os
import warnings
import zipfile
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from .files import write_whole

__all__ = [
    "KINDS",
    "SCORES",
    "LayerNull",
    "Null",
    "normal_reference",
    "resolve_layer_null",
    "resolve_null",
    "text_digest",
]

KINDS = ("trimmed", "all")
SCORES = ("logprob", "logit")
TAIL_RULE = "exponential, top 1 %"
LOW, HIGH, BINS_PER_UNIT = -32, 32, 128
BINS = (HIGH - LOW) * BINS_PER_UNIT
LARGEST = 1024
NO_NULL = (
    "no null given: p-values come from each token's own logits (`normal`), a fallback whose "
    "error rates hold nowhere; `moeprof calibrate` fits a null to the model"
)
_FORMAT, _VERSION = "moeprof-null", 1
_ARRAYS = ("counts", "largest", "router_sample")
_FACTS = ("kind", "score", "r_high", "r_low", "tokens", "model_name", "text_digest", "tail_rule")
# bf16 keeps 8 bits, fp16 loses what lies under 2^-24: the same weights stay within this.
_SAMPLE, _SAMPLE_RTOL, _SAMPLE_ATOL = 16, 2.0**-7, 1e-6


def _logits(router_logits):
    """(T,E) router logits, a tensor or an array, as a float32 array; errors as contract §2."""
    if hasattr(router_logits, "detach"):
        router_logits = router_logits.detach().float().cpu().numpy()
    if not isinstance(router_logits, np.ndarray):
        kind = type(router_logits).__name__
        raise TypeError(f"router_logits: expected a tensor or an array, got {kind}")
    if router_logits.ndim != 2 or router_logits.shape[1] == 0:
        raise ValueError(
            f"router_logits: expected 2 dimensions (T,E), E >= 1, got shape {router_logits.shape}"
        )
    with np.errstate(over="ignore"):  # beyond float32 is inf, as it is for the C path
        logits = np.ascontiguousarray(router_logits, dtype=np.float32)
    bad = np.isnan(logits).any(axis=1) | (logits == -np.inf).all(axis=1)
    if bad.any():
        raise ValueError(f"router_logits: row {bad.argmax()} has a NaN or is -inf throughout")
    return logits


def scores_of(logits, score):
    """Scores (T,E) float64 of float32 logits (statistics.md, "Scores and nulls").

    `logprob`: z - logsumexp(z); where some are +inf these share, -log(count), the others -inf.
    `logit`: z itself.
    """
    z = logits.astype(np.float64)
    if score == "logit":
        return z
    top = z.max(axis=1, keepdims=True)
    below = np.zeros_like(z)  # stays 0 where z is the maximum: inf - inf would be NaN
    np.subtract(z, top, out=below, where=z != top)
    return below - np.log(np.exp(below).sum(axis=1, keepdims=True))


def _median(values):
    """Row medians (T,1), the mean of the two middle values for even E; of -inf and +inf: 0."""
    ordered, size = np.sort(values, axis=1), values.shape[1]
    lower, upper = ordered[:, (size - 1) // 2, None], ordered[:, size // 2, None]
    middle = np.where(lower == upper, upper, 0.0)
    np.add(lower / 2, upper / 2, out=middle, where=np.abs(lower) != np.abs(upper))
    return middle


def normal_reference(router_logits):
    """p-values (T,E) of the `normal` null in float64: each token against itself.

    p = 1 - Phi((z - m) / (1.4826022 MAD)), m the token's median and MAD the median of |z - m|,
    both the mean of the two middle values for even E. Where MAD is 0 or infinite p is 0, 1/2, 1
    for z >, =, < m; so one expert alone gets 1/2. A z equal to m lies at distance 0, infinite
    or not.

    A fallback without calibration: on pure noise (independent normal logits) BH at alpha .05
    rejects something in .109 of the tokens at E = 64 and in .19 at E = 8. Nothing called a
    false discovery rate holds under it; `moeprof calibrate` fits a null that knows the model.

    Raises ValueError for a row with a NaN or of -inf only, and for logits that are not (T,E).
    """
    z = _logits(router_logits).astype(np.float64)
    m = _median(z)
    away = np.zeros_like(z)
    np.subtract(z, m, out=away, where=z != m)
    sigma = 1.4826022 * _median(np.abs(away))
    flat = (sigma == 0) | np.isinf(sigma)
    x = away / np.where(flat, 1.0, sigma) * math.sqrt(0.5)
    x = np.where(flat & (away != 0), np.copysign(np.inf, away), x)
    return 0.5 * np.vectorize(math.erfc, otypes=[float])(x)


def bins_of(scores):
    """Histogram bin of each score, what lies outside the range in the outer bins.

    floor(128 s) is exact; floor(128 (s + 32)) would round a score just below an edge over it.
    """
    position = np.floor(scores * BINS_PER_UNIT) - LOW * BINS_PER_UNIT
    return np.clip(position, 0, BINS - 1).astype(np.int64)


def _table_p(scores, table):
    """p-values of float64 scores by a table; the rule is in the module's docstring.

    Written so that rounding can break neither the order nor p > 0: exact at the right end of a
    bin and never above its left end.
    """
    (x_max, p_max, beta), sf = table[:3], table[3:]
    i = bins_of(scores)
    left, right = LOW + i / BINS_PER_UNIT, LOW + (i + 1) / BINS_PER_UNIT
    last = (i == BINS - 1) | (right >= x_max)  # the bin of the largest score ends there
    right, p_right = np.where(last, x_max, right), np.where(last, p_max, sf[i + 1])
    share = np.zeros_like(scores)
    inside = (scores > LOW) & (scores < right)
    np.divide(right - scores, right - left, out=share, where=inside)
    p = np.minimum(sf[i], p_right + (sf[i] - p_right) * share)
    beyond = scores > x_max
    excess = np.where(beyond, scores - x_max, 0)
    tail = np.maximum(p_max * np.exp(-excess / beta), np.finfo(np.float64).tiny)
    return np.where(scores <= LOW, 1.0, np.where(beyond, tail, p))


def _mean_excess(per_bin, largest):
    """Mean excess of the top 1 % (m = ceil(n/100) scores) over the score ranked m + 1.

    For an exponential tail that is an unbiased estimate of its mean. Scores beyond the stored
    largest count as the middle of their bin (2^-8 off at most). At least one bin width, so that
    tied scores leave a tail that still falls.
    """
    n = int(per_bin.sum())
    m = min(-(-n // 100), n - 1)
    if m == 0:
        return 1 / BINS_PER_UNIT
    stored = largest[: m + 1]
    rest = per_bin - np.bincount(bins_of(stored), minlength=BINS).astype(np.uint64)
    seen = np.minimum(np.cumsum(rest[::-1]), m + 1 - stored.size).astype(np.int64)
    take = np.diff(seen, prepend=0)
    middle = (HIGH - (np.arange(BINS) + 0.5) / BINS_PER_UNIT)  # descending, as `take`
    threshold = middle[take > 0][-1] if m + 1 > stored.size else stored[-1]
    total = stored.sum() + take @ middle - threshold  # the threshold is not part of the top
    return max(total / m - threshold, 1 / BINS_PER_UNIT)


def _table(counts, largest):
    """The C kernel's table, float64 (3 + 8193,): x_max, p_max, beta, sf at the 8193 edges.

    counts: (E,8192) of the layer; largest: its largest scores, descending. sf(edge) is the share
    of scores >= edge; those at or below -32 count as -32, so sf(-32) = 1.
    """
    per_bin = counts.sum(axis=0, dtype=np.uint64)
    at_least = np.cumsum(per_bin[::-1])[::-1]
    n, x_max = float(at_least[0]), largest[0]
    ties = np.count_nonzero(largest == x_max)
    if ties == LARGEST:  # more may have been dropped: take the whole of their bin
        ties = at_least[bins_of(x_max)]
    top = np.count_nonzero(largest >= HIGH)  # never read: above 32 the last bin ends at x_max
    sf = np.append(at_least, np.uint64(top)) / n
    return np.concatenate([[x_max, ties / n, _mean_excess(per_bin, largest)], sf])


@dataclass(frozen=True, eq=False)
class LayerNull:
    """The null of one layer: its score and the table of module `moeprof.null`."""

    score: str
    table: np.ndarray = field(repr=False)

    @property
    def spec(self):
        """The argument `null` of the C functions."""
        return ("table", self.score, self.table)

    def reference(self, router_logits):
        """p-values (T,E) in NumPy float64, by the definition; 0 < p <= 1.

        Raises ValueError for a row with a NaN or of -inf only.
        """
        return _table_p(scores_of(_logits(router_logits), self.score), self.table)

    def p_values(self, router_logits):
        """p-values (T,E) float64 as `reference`, computed in C."""
        from . import _C

        return _C.p_values(_logits(router_logits), self.spec)


@dataclass(frozen=True, eq=False, repr=False)
class Null:
    """A calibrated null for each MoE layer of one model.

    Fields: kind ("trimmed", "all"), score ("logprob", "logit"); r_high and r_low, the highest
    and lowest scores of each token that were left out; counts (L,E,8192) uint64, histograms over
    [-32, 32]; largest (L, at most 1024) float64, each layer's largest scores, descending; tokens,
    how many were counted; model_name; router_sample (L, at most 16) float32, the first weights of
    each router; text_digest; tail_rule.
    """

    kind: str
    score: str
    r_high: int
    r_low: int
    counts: np.ndarray
    largest: np.ndarray
    tokens: int
    model_name: str
    router_sample: np.ndarray
    text_digest: str
    tail_rule: str = TAIL_RULE
    _layers: dict = field(default_factory=dict, init=False)

    def __post_init__(self):
        """ValueError unless the parts fit together: a file may be anybody's."""
        check_choice("kind", self.kind, KINDS)
        check_choice("score", self.score, SCORES)
        counts, largest, sample = self.counts, self.largest, self.router_sample
        if counts.ndim != 3 or counts.shape[2] != BINS or counts.dtype != np.uint64:
            raise ValueError(f"expected counts (L,E,{BINS}) uint64, got {counts.shape}")
        scores = self.tokens * (counts.shape[1] - self.r_high - self.r_low)
        if scores <= 0 or (counts.sum(axis=(1, 2)) != scores).any():
            raise ValueError(f"expected {scores} scores in each layer's histogram")
        if largest.shape != (len(counts), min(scores, LARGEST)) or largest.dtype != np.float64:
            raise ValueError(f"expected the {min(scores, LARGEST)} largest scores of each layer")
        if not np.isfinite(largest).all() or (np.diff(largest) > 0).any():
            raise ValueError("expected finite largest scores, descending")
        if (largest[:, 0] <= LOW).any():
            raise ValueError(f"every score of a layer lies below {LOW}, the histogram's range")
        if sample.ndim != 2 or len(sample) != len(counts) or sample.dtype != np.float32:
            raise ValueError("expected a float32 sample of each layer's router weights")

    def __len__(self):
        return len(self.counts)

    def __repr__(self):
        return f"<moeprof.Null: {self.describe()}>"

    def _repr_html_(self):
        facts = self._facts() | {"layers": len(self), "experts": self.counts.shape[1]}
        row = "<tr><th>{}</th><td>{}</td></tr>".format
        rows = "".join(row(name, html.escape(str(value))) for name, value in facts.items())
        return f"<table>{rows}</table>"

    def _facts(self):
        return {name: getattr(self, name) for name in _FACTS}

    def describe(self):
        """One line: kind, score, tokens, model, text."""
        trim = f" (without each token's {self.r_high} highest and {self.r_low} lowest)"
        return (
            f"{self.kind} null{trim if self.kind == 'trimmed' else ''} on {self.score}, "
            f"{self.tokens:,} tokens, {len(self)} layers x {self.counts.shape[1]} experts of "
            f"{self.model_name}, text {self.text_digest[:12]}"
        )

    def layer(self, index):
        """The LayerNull of layer `index` (0..L-1); its table is made once. IndexError outside."""
        if not 0 <= index < len(self):
            raise IndexError(f"layer {index} of a null with {len(self)} layers")
        if index not in self._layers:
            table = _table(self.counts[index], self.largest[index])
            self._layers[index] = LayerNull(self.score, table)
        return self._layers[index]

    def check(self, model):
        """ValueError, naming both models and the difference, if this is not `model`'s null.

        The router's weights decide, not the name: a model has one name on the hub and another
        in a folder. The comparison survives loading in fp32, bf16 or fp16.
        """
        gates = gates_of(model)
        experts = {gate_weight(name, gate).shape[0] for name, gate in gates}
        if len(gates) != len(self):
            differs = f"it has {len(self)} MoE layers, the model {len(gates)}"
        elif experts != {self.counts.shape[1]}:
            differs = f"it has {self.counts.shape[1]} experts a layer, the model {sorted(experts)}"
        elif not _same_sample(self.router_sample, router_sample(gates)):
            differs = "the weights of the routers differ"
        else:
            return
        raise ValueError(
            f"this null was fitted to {self.model_name!r}, not to {model_name(model)!r}: {differs}"
        )

    def merge(self, other):
        """The null fitted to both texts: exact, and the same in any order.

        Raises ValueError unless both have the same kind, score, trimming and model.
        """
        for name in ("kind", "score", "r_high", "r_low", "tail_rule"):
            mine, its = getattr(self, name), getattr(other, name)
            if mine != its:
                raise ValueError(f"merge: {name} differs: {mine!r}, {its!r}")
        same_shape = self.counts.shape == other.counts.shape
        if not same_shape or not _same_sample(self.router_sample, other.router_sample):
            names = f"{self.model_name!r}, {other.model_name!r}"
            raise ValueError(f"merge: fitted to different models: {names}")
        return replace(
            self,
            counts=self.counts + other.counts,
            largest=keep_largest(np.concatenate([self.largest, other.largest], axis=1)),
            tokens=self.tokens + other.tokens,
            text_digest=_add_digests(self.text_digest, other.text_digest),
        )

    def save(self, path):
        """Write to `path` (.safetensors or .npz), as a whole or not at all.

        Raises ValueError for another suffix, OSError where the folder can't be written.
        """
        path = Path(path)
        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in _ARRAYS}
        facts = json.dumps({"version": _VERSION, **self._facts()})
        write_whole(path, _pack(arrays, facts, _suffix(path)))

    @classmethod
    def load(cls, path):
        """Read what `save` wrote.

        Raises FileNotFoundError, or ValueError naming the file when it is not a null, is
        truncated or has another format version.
        """
        path = Path(path)
        suffix = _suffix(path)
        if not path.exists():
            raise FileNotFoundError(f"no such null file: {path}")
        data = path.read_bytes()
        try:
            arrays, facts = _unpack(data, suffix)
            if facts["version"] != _VERSION:
                raise ValueError(f"format version {facts['version']}")
            return cls(**{n: arrays[n] for n in _ARRAYS}, **{n: facts[n] for n in _FACTS})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: expected a whole moeprof null of format version {_VERSION}: {error}"
            ) from error


def resolve_null(null, stacklevel=3):
    """What a user's `null=` means: a Null, a LayerNull, or None for `normal`.

    null: those, the path of a saved null, "normal", or None: `normal` with a warning, since it
    is a fallback. TypeError for anything else.
    """
    if null is None:
        warnings.warn(NO_NULL, stacklevel=stacklevel)
    if null is None or (isinstance(null, str) and null == "normal"):
        return None
    if isinstance(null, (str, os.PathLike)):
        return Null.load(null)
    if not isinstance(null, (Null, LayerNull)):
        raise TypeError(
            f'null: expected a Null, a LayerNull, a path or "normal", got {type(null).__name__}'
        )
    return null


def resolve_layer_null(null):
    """The same for one matrix of logits: a LayerNull or None. ValueError for several layers."""
    null = resolve_null(null, stacklevel=6)  # the caller of benjamini_hochberg_routing
    if isinstance(null, Null):
        if len(null) > 1:
            raise ValueError(f"null: has {len(null)} layers; pass one of them, null.layer(i)")
        null = null.layer(0)
    return null


def _suffix(path):
    if path.suffix not in (".safetensors", ".npz"):
        raise ValueError(f"{path}: a null file ends in .safetensors or .npz")
    return path.suffix


def _pack(arrays, facts, suffix):
    """The bytes of a file: the arrays, and the facts as JSON under the name of the format."""
    if suffix == ".safetensors":
        from safetensors.numpy import save

        return save(arrays, {_FORMAT: facts})
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays, **{_FORMAT: np.array(facts)})
    return buffer.getvalue()


def _load_safetensors(data):
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        return load(data)
    except SafetensorError as error:
        raise ValueError(str(error)) from error


def _unpack(data, suffix):
    """(arrays, facts) of a file's bytes; ValueError whatever is wrong with them."""
    try:
        if suffix == ".safetensors":
            arrays = _load_safetensors(data)  # first: it checks the header
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            return arrays, json.loads(header["__metadata__"][_FORMAT])
        with zipfile.ZipFile(io.BytesIO(data)):  # np.load would take other kinds of file too
            arrays = dict(np.load(io.BytesIO(data), allow_pickle=False))
        return arrays, json.loads(str(arrays[_FORMAT]))
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise ValueError(str(error)) from error
    except KeyError as error:
        raise ValueError(f"it has no {error}") from error


def check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def keep_largest(values):
    """The 1,024 largest of each row (L,n), descending."""
    return -np.sort(-values, axis=1)[:, :LARGEST]


def gates_of(model):
    """[(qualified name, router)] in layer order; ValueError if the model has none."""
    from .adapters import find_moe_blocks

    return [(f"{name}.gate", block.gate) for name, block in find_moe_blocks(model)]


def gate_weight(name, gate):
    """A router's weight (E,H); of a user's router around another, the first matrix inside."""
    weight = getattr(gate, "weight", None)
    if weight is None:
        weight = next((w for w in gate.parameters() if w.ndim == 2), None)
    if weight is None:
        raise ValueError(f"{name}: a router without a weight, so no null can be tied to it")
    return weight


def router_sample(gates):
    weights = [gate_weight(name, gate)[0, :_SAMPLE] for name, gate in gates]
    return np.stack([w.detach().float().cpu().numpy() for w in weights])


def _same_sample(a, b):
    return a.shape == b.shape and np.allclose(a, b, rtol=_SAMPLE_RTOL, atol=_SAMPLE_ATOL)


def model_name(model):
    """The model's name on the hub; of a local path the last component only."""
    name = getattr(model.config, "_name_or_path", "") or type(model).__name__
    if os.path.isdir(name) or os.path.isabs(name) or name.startswith((".", "~")):
        name = Path(name).resolve().name
    return name


def text_digest(texts):
    """SHA-256 of each text, added modulo 2^256, as hex: the order of the texts doesn't matter.

    So the digest of a merged null is that of the joined lists; of one text it is its SHA-256.
    """
    total = f"{0:064x}"
    for text in texts:
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        total = _add_digests(total, digest)
    return total


def _add_digests(a, b):
    return f"{(int(a, 16) + int(b, 16)) % 2**256:064x}"
