"""What routing costs: beside the experts of the layer that it chooses for, beside torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .. import _C
from ..backends.cpu import get_num_threads
from ..backends.tables import as_array
from ..measure.timing import interleave, steps
from ..null import LayerNull
from ..null.efron import efron_table, fit_efron
from ..null.histograms import Histograms
from ..null.tables import counted_table, pooled
from ..routers import BH, REGISTRY, TopK, make_router
from ..show.tables import milliseconds, table
from . import plots, twins
from .contenders import contenders
from .weights import Calls, layer_weights

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from ..show.console import Bar
    from .settings import Settings, Shape
    from .weights import Call


ALPHA = 0.3
FITTED = 4096  # tokens
TARGETS = {"topk_share": 0.02, "bh_share": 0.02, "bh_over_topk_share": 0.01}


def random_logits(tokens: int, experts: int) -> NDArray[np.float32]:
    """(T, E) float32, normal, with the spread that OLMoE's have."""
    return (2 * np.random.default_rng(0).standard_normal((tokens, experts))).astype(np.float32)


def fitted_null(shape: Shape) -> LayerNull:
    """A trimmed null on logprob, fitted to random logits as `fit_null` would."""
    high = min(shape.top_k, shape.experts - 1)
    histograms = Histograms(1, shape.experts, "logprob", high, 0)
    histograms.add(0, random_logits(FITTED, shape.experts))
    return LayerNull("logprob", counted_table(*pooled(histograms.counts[0], histograms.largest[0])))


def nulls_of_all(shape: Shape) -> dict[str, LayerNull | None]:
    """{router: null}: of each expert for ExpertThreshold, efron's for all others on a null."""
    z = random_logits(FITTED, shape.experts)
    z[np.random.default_rng(1).random(z.shape) < 0.1] += 4  # what stands out
    histograms = Histograms(1, shape.experts, "logprob", 0, 0)
    histograms.add(0, z)
    counts, largest = histograms.counts[0], histograms.largest[0]
    per_bin, _ = pooled(counts, largest)
    fit = fit_efron(per_bin)
    efron = LayerNull("logprob", efron_table(fit), "table", fit, per_bin)
    own = [
        counted_table(*pooled(counts[e : e + 1], largest[e : e + 1])) for e in range(shape.experts)
    ]
    nulls = {name: efron if REGISTRY[name].wants_null else None for name in twins.COUNTS}
    return nulls | {"expert_threshold": LayerNull("logprob", np.stack(own))}


def rounds(settings: Settings) -> int:
    return steps(map(settings.rounds, (*settings.tokens, max(settings.tokens))))


def measure(settings: Settings, bar: Bar) -> dict[str, Any]:
    bar.note("router: random weights")
    shape, dtype = settings.shape, getattr(torch, settings.one_dtype)
    layer = contenders(shape, layer_weights(shape, dtype), False)["moeprof"]
    specs = {
        "topk": TopK(shape.top_k).spec(shape.experts, norm="none", norm_k=shape.top_k),
        "bh": BH(ALPHA, max_k=shape.top_k).spec(
            shape.experts, norm="none", norm_k=shape.top_k, null=fitted_null(shape)
        ),
    }
    calls: dict[str, Callable[..., object]] = {
        name: _route(spec.in_c(settings.one_dtype)) for name, spec in specs.items()
    }
    calls["layer"] = layer
    with torch.inference_mode():
        rows = [_row(settings, calls, tokens, bar) for tokens in settings.tokens]
        all_routers = _all_routers(settings, rows, bar)
    return {"contenders": [*calls], "targets": TARGETS, "rows": rows, "routers": all_routers}


def _all_routers(settings: Settings, rows: list[dict[str, Any]], bar: Bar) -> dict[str, Any]:
    """Every router that has a torch twin at the most tokens: C, twin, share of the layer."""
    tokens, shape = max(settings.tokens), settings.shape
    bar.note(f"router: all of them, {tokens} tokens")
    z = random_logits(tokens, shape.experts)
    tensor = torch.from_numpy(z)
    calls: dict[Any, Callable[..., object]] = {}
    for name, null in nulls_of_all(shape).items():
        own = {"k": shape.top_k} if name == "topk" else {}
        router = make_router(name, max_k=shape.top_k, **own)
        spec = router.spec(shape.experts, norm="sum", null=null)
        calls[name, "C"] = partial(_C.route, z, spec.in_c("float32"), get_num_threads(), False)
        calls[name, "torch"] = partial(twins.route, router, tensor, null)
    times = interleave(calls, settings.rounds(tokens), lambda name: (), bar)
    layer = next(row["times"]["layer"]["median_ms"] for row in rows if row["tokens"] == tokens)
    return {"tokens": tokens, "rows": [_of_router(name, times, layer) for name in twins.COUNTS]}


def _of_router(name: str, times: Mapping[Any, Mapping[str, float]], layer: float) -> dict[str, Any]:
    ours, twin = times[name, "C"], times[name, "torch"]
    return {
        "router": name,
        "c": ours,
        "torch": twin,
        "torch_over_c": twin["median_ms"] / ours["median_ms"],
        "layer_share": ours["median_ms"] / layer,
    }


def _route(spec: _C.RouteSpec) -> Callable[..., object]:
    def call(x: torch.Tensor, logits: torch.Tensor, idx: torch.Tensor, w: torch.Tensor) -> object:
        return _C.route(as_array(logits), spec, get_num_threads(), False)

    return call


def _row(
    settings: Settings, calls: Mapping[str, Callable[..., object]], tokens: int, bar: Bar
) -> dict[str, Any]:
    bar.note(f"router: {tokens} tokens")
    draws = Calls(settings.shape, getattr(torch, settings.one_dtype), tokens)

    def prepare(name: str) -> Call:
        calls["layer"](*draws.next())  # the caches as a layer leaves them
        return draws.next()

    times = interleave(calls, settings.rounds(tokens), prepare, bar)
    topk, bh, layer = (times[name]["median_ms"] for name in ("topk", "bh", "layer"))
    return {
        "tokens": tokens,
        "topk_share": topk / layer,
        "bh_share": bh / layer,
        "bh_over_topk_share": (bh - topk) / layer,
        "times": times,
    }


# ---- what is shown ----


def tables(result: dict[str, Any]) -> Iterator[Any]:
    columns = {
        "T": "{:d}",
        "top-k ms": "{:.4f}",
        "BH ms": "{:.4f}",
        "layer ms": "{:.2f}",
        "top-k / layer": "{:.2%}",
        "BH / layer": "{:.2%}",
        "(BH - top-k) / layer": "{:.2%}",
    }
    yield table(columns, [_cells(row) for row in result["rows"]])
    yield (
        f"Routing share: top-k / layer and BH / layer (alpha {ALPHA}, a table null on logprob); "
        f"the target is {TARGETS['bh_share']:.0%}, and {TARGETS['bh_over_topk_share']:.0%} for "
        "BH beyond top-k. Normal logits; a call of the layer's experts goes before each call; "
        "the layer's time is theirs alone."
    )
    every = result["routers"]
    columns = {
        "router": "{}",
        "C ms": "{:.3f}",
        "torch ms": "{:.2f}",
        "torch / C": "{:.0f}",
        "C / layer": "{:.2%}",
    }
    yield table(
        columns,
        [
            [
                row["router"],
                row["c"]["median_ms"],
                row["torch"]["median_ms"],
                row["torch_over_c"],
                row["layer_share"],
            ]
            for row in every["rows"]
        ],
    )
    yield (
        f"Every router at {every['tokens']} tokens of float32 logits, against the same in torch, "
        "vectorised over tokens; weights included."
    )


def _cells(row: Mapping[str, Any]) -> list[Any]:
    times = [milliseconds(row["times"], name) for name in ("topk", "bh", "layer")]
    return [row["tokens"], *times, *(row[share] for share in TARGETS)]


def figure(result: dict[str, Any]) -> Figure:
    labels = {"topk": "top-k", "bh": f"BH, alpha {ALPHA}", "layer": "the layer's experts"}
    return plots.against_tokens(result, labels, "time of routing beside the experts")
