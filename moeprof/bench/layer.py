"""A layer's experts: moeprof beside the other implementations, and the roof over them all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from ..measure.limits import WORDS, limit_calls, rates, roof, roof_share
from ..measure.timing import interleave, ratio, steps
from ..show.tables import milliseconds, table
from . import plots
from .contenders import contenders, usable
from .weights import Calls, layer_weights

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from ..measure.timing import Ratio
    from ..show.console import Bar
    from .contenders import Contender
    from .settings import Settings
    from .weights import Call, LayerWeights


ERROR_TOKENS = 32  # float64 takes long beyond
HEADERS = {"grouped_mm": "grouped\nmm", "zentorch": "zen-\ntorch"}  # as the table has room
TARGET = 0.055  # above the limit: what a decode step with fewer experts may take more


def rounds(settings: Settings) -> int:
    return steps([*map(settings.rounds, settings.tokens), settings.rounds(1)])


def measure(settings: Settings, bar: Bar) -> dict[str, Any]:
    shape, dtype = settings.shape, getattr(torch, settings.one_dtype)
    bar.note("layer: random weights")
    weights = layer_weights(shape, dtype)
    calls = contenders(shape, weights, settings.peers)
    with torch.inference_mode():
        calls, missing = usable(calls, Calls(shape, dtype, 1).next())
        rows = [_row(settings, weights, calls, tokens, bar) for tokens in settings.tokens]
        skipping = _skipping(settings, calls["moeprof"], bar)
    return {"contenders": [*calls], "missing": missing, "rows": rows, "skipping": skipping}


def _row(
    settings: Settings, weights: LayerWeights, calls: dict[str, Contender], tokens: int, bar: Bar
) -> dict[str, Any]:
    bar.note(f"layer: {tokens} tokens")
    shape, dtype = settings.shape, weights.down.dtype
    draws = Calls(shape, dtype, tokens)
    wrong = errors(weights, calls, draws.next()) if tokens <= ERROR_TOKENS else {}
    limited = limit_calls(weights.words, dtype) | calls
    times = interleave(limited, settings.rounds(tokens), lambda name: draws.next(), bar)
    hit, flop = draws.experts_hit, shape.flop * tokens * shape.top_k
    nbytes, measured = hit * shape.size * dtype.itemsize, rates(times, weights.words)
    return {
        "tokens": tokens,
        "experts_hit": hit,
        "bytes": nbytes,
        "flop": flop,
        "rates": measured,
        "roof": roof(nbytes, flop, measured),
        "roof_share": roof_share(times, weights.words, nbytes, flop, "moeprof"),
        "ratios": {name: ratio(times, name, "moeprof") for name in calls},
        "errors": wrong,
        "times": times,
    }


# ---- error ----


def errors(weights: LayerWeights, calls: dict[str, Contender], call: Call) -> dict[str, float]:
    """{name: the error of a contender, relative to float64}."""
    reference = _reference(weights, call)
    size = reference.norm()
    return {
        name: float((function(*call).double() - reference).norm() / size)
        for name, function in calls.items()
    }


def _reference(weights: LayerWeights, call: Call) -> Tensor:
    """sum_e w_e down_e(silu(gate_e x) * up_e x) in float64."""
    x, out = call.x.double(), torch.zeros(call.x.shape, dtype=torch.float64)
    for expert in call.idx.unique().tolist():
        token, slot = (call.idx == expert).nonzero(as_tuple=True)
        gate, up, down = (matrix.double().T for matrix in weights.matrices(expert))
        y = (F.silu(x[token] @ gate) * (x[token] @ up)) @ down
        out.index_add_(0, token, y * call.weights[token, slot, None].double())
    return out


# ---- fewer experts ----


def _skipping(settings: Settings, ours: Contender, bar: Bar) -> dict[str, Any]:
    """A decode step at 5/8 of the experts, the others -1, against one at all of them."""
    bar.note("layer: skipping experts")
    shape = settings.shape
    kept = max(1, shape.top_k * 5 // 8)
    draws = Calls(shape, getattr(torch, settings.one_dtype), 1)

    def prepare(name: str) -> Call:
        call = draws.next()
        if name == "kept":
            call.idx[:, kept:] = -1
        return call

    times = interleave({"kept": ours, "all": ours}, settings.rounds(1), prepare, bar)
    limit = kept / shape.top_k
    return {
        "kept": kept,
        "all": shape.top_k,
        "ratio": ratio(times, "kept", "all"),
        "limit": limit,
        "target": min(1.0, limit + TARGET),
        "times": times,
    }


# ---- what is shown ----


def tables(result: dict[str, Any]) -> Iterator[Any]:
    names, rows = result["contenders"], result["rows"]
    columns = {"T": "{:d}", "hit": "{:d}"}
    columns |= {f"{HEADERS.get(name, name)}\nms": "{:.2f}" for name in names}
    columns |= {"other/\nours": "{:.2f}", "quartiles": "{}", "error": "{:.1e}"}
    yield table(columns, [_beside_others(row, names) for row in rows])
    columns = {"T": "{:d}", "GB/s": "{:.1f}", "GFLOP/s": "{:.0f}"}
    columns |= {"roof\nms": "{:.2f}", "roof/\nours": "{:.2f}", "quartiles": "{}"}
    yield table(columns, [_beside_roof(row) for row in rows])
    best = [max(row["rates"][rate] for row in rows) for rate in ("read_gbs", "gemm_gflops")]
    yield (
        "hit: experts; ours: moeprof's time, of which are GB/s, GFLOP/s and the error, relative, "
        "to float64; other: the fastest of the others. Ratios are of times of the same round: the "
        f"median over the rounds and the quartiles. The roof is of {WORDS}; the best were "
        f"{best[0]:.1f} GB/s and {best[1]:.0f} GFLOP/s. No share of a roof stands where a kernel "
        "was faster than that."
    )
    skip = result["skipping"]
    yield (
        f"decode at an average of {skip['kept']} experts / decode at {skip['all']}: "
        f"{skip['ratio'].median:.3f}, quartiles {skip['ratio'].quartiles} "
        f"(limit {skip['limit']:.3f}, target {skip['target']:.2f})"
    )
    for name, reason in result["missing"].items():
        yield f"left out: {name}: {reason}"


def _beside_others(row: Mapping[str, Any], names: list[str]) -> list[Any]:
    others = [row["ratios"][name] for name in names if name != "moeprof"]
    return [
        row["tokens"],
        row["experts_hit"],
        *(milliseconds(row["times"], name) for name in names),
        *_shown(min(others) if others else None),
        row["errors"].get("moeprof"),
    ]


def _beside_roof(row: Mapping[str, Any]) -> list[Any]:
    ours = row["times"]["moeprof"]["median_ms"]
    return [
        row["tokens"],
        row["bytes"] / ours / 1e6,
        row["flop"] / ours / 1e6,
        row["roof"]["roof_ms"],
        *_shown(row["roof_share"]),
    ]


def _shown(found: Ratio | None) -> tuple[float | None, str | None]:
    """A ratio in two cells."""
    return (None, None) if found is None else (found.median, found.quartiles)


def figure(result: dict[str, Any]) -> Figure:
    labels = {name: name for name in result["contenders"]}
    return plots.against_tokens(result, labels, "time of a layer's experts")
