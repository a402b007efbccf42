"""A layer's experts in 8 and 4 bits: moeprof, torch, onnxruntime and llama.cpp, beside the same
layer in its dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..backends.tables import LayerMatrices
from ..measure.timing import interleave, ratio, steps
from ..quantizing.convert import FORMATS, quantized
from ..show.tables import milliseconds, table
from . import plots
from .contenders import contenders, late, usable
from .layer import ERROR_TOKENS, errors
from .llama import Q4_0, Q8_0, llama
from .qmoe import qmoe
from .weights import Calls, layer_weights

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..show.console import Bar
    from .contenders import Contender
    from .settings import Settings
    from .weights import LayerWeights

    Peers = Mapping[str, tuple[int, Callable[[LayerWeights], Contender]]]  # {name: (bits, maker)}

GROUP = 32  # columns that share a scale, in torch's 4 bits as in moeprof's
LARGEST_ERROR = {8: 0.05, 4: 0.3}  # of the outputs, relative; more is a wrong computation


def rounds(settings: Settings) -> int:
    return steps(map(settings.rounds, settings.tokens))


def measure(settings: Settings, bar: Bar) -> dict[str, Any]:
    shape, dtype = settings.shape, getattr(torch, settings.one_dtype)
    bar.note("quantized: random weights")
    weights = layer_weights(shape, dtype)
    with torch.inference_mode():
        calls, sizes = _ours(settings, weights)
        peers = _peers(shape.top_k)
        others = {name: late(make, weights) for name, (_, make) in peers.items()}
        calls, missing = usable(calls | others, Calls(shape, dtype, 1).next())
        wrong = _wrong(errors(weights, calls, Calls(shape, dtype, 4).next()), peers)
        calls = {name: call for name, call in calls.items() if name not in wrong}
        rows = [_row(settings, weights, calls, sizes, tokens, bar) for tokens in settings.tokens]
    return {"contenders": [*calls], "bytes": sizes, "missing": missing | wrong, "rows": rows}


def _ours(
    settings: Settings, weights: LayerWeights
) -> tuple[dict[str, Contender], dict[str, float]]:
    """({name: function}, {name: bytes of an expert}); the first is the layer in its dtype."""
    shape = settings.shape
    calls = {"moeprof": contenders(shape, weights, False)["moeprof"]}
    sizes = {"moeprof": float(shape.size * weights.down.element_size())}
    for format in FORMATS.values():
        experts = quantized(LayerMatrices([weights.gate_up, weights.down]), format)
        calls[format] = _call_of(experts)
        sizes[format] = sum(b.nbytes for b in experts.buffers()) / shape.experts
    return calls, sizes


def _call_of(experts: nn.Module) -> Contender:
    return lambda x, logits, idx, w: experts(x, idx, w)


def _peers(top_k: int) -> Peers:
    return {
        "torch int8": (8, partial(_loop, _int8)),
        "torch int4": (4, partial(_loop, _int4)),
        "QMoE int8": (8, partial(qmoe, top_k=top_k, bits=8)),
        "QMoE int4": (4, partial(qmoe, top_k=top_k, bits=4)),
        "QMoE int4 level 4": (4, partial(qmoe, top_k=top_k, bits=4, accuracy_level=4)),
        "llama.cpp Q8_0": (8, partial(llama, top_k=top_k, kind=Q8_0)),
        "llama.cpp Q4_0": (4, partial(llama, top_k=top_k, kind=Q4_0)),
    }


def _wrong(found: Mapping[str, float], peers: Peers) -> dict[str, str]:
    """{name: why} of peers whose error is more than rounding explains."""
    return {
        name: f"its outputs are wrong: their relative error is {found[name]:.2g}"
        for name, (bits, _) in peers.items()
        if name in found and not found[name] < LARGEST_ERROR[bits]
    }


def _row(
    settings: Settings,
    weights: LayerWeights,
    calls: dict[str, Contender],
    sizes: dict[str, float],
    tokens: int,
    bar: Bar,
) -> dict[str, Any]:
    bar.note(f"quantized: {tokens} tokens")
    dtype = weights.down.dtype
    draws = Calls(settings.shape, dtype, tokens)
    wrong = errors(weights, calls, draws.next()) if tokens <= ERROR_TOKENS else {}
    limited = {"read": lambda *_: weights.words.max(), **calls}
    times = interleave(limited, settings.rounds(tokens), lambda name: draws.next(), bar)
    hit, gbs = draws.experts_hit, weights.words.nbytes / times["read"]["best_ms"] / 1e6
    read = {name: hit * size / times[name]["median_ms"] / 1e6 / gbs for name, size in sizes.items()}
    return {
        "tokens": tokens,
        "experts_hit": hit,
        "read_gbs": gbs,
        "read_share": read,
        "errors": wrong,
        "times": times,
    }


# ---- torch ----


Product = Callable[[Tensor], Tensor]  # x (M, K) times the transpose of a matrix (N, K)


def _loop(make: Callable[[Tensor], Product], weights: LayerWeights) -> Contender:
    """Expert by expert, with the products that `make` gives."""
    pairs = zip(weights.gate_up, weights.down, strict=True)
    products = [(make(into), make(down)) for into, down in pairs]

    def call(x: Tensor, logits: Tensor, idx: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert in idx.unique().tolist():
            token, slot = torch.where(idx == expert)
            into, down = products[expert]
            gate, up = into(x[token]).chunk(2, -1)
            out.index_add_(0, token, down(F.silu(gate) * up) * w[token, slot, None])
        return out

    return call


def _int8(matrix: Tensor) -> Product:
    """8 bits, one scale a row."""
    wide = matrix.float()
    scales = wide.abs().amax(-1) / 127
    q = (wide / scales[:, None]).round().to(torch.int8)
    narrow = scales.to(matrix.dtype)
    return lambda x: torch.ops.aten._weight_int8pack_mm(x, q, narrow)


def _int4(matrix: Tensor) -> Product:
    """4 bits in groups, each with a scale and a zero point."""
    wide = matrix.float().unflatten(-1, (-1, GROUP))
    low, high = wide.amin(-1), wide.amax(-1)
    scales = (high - low) / 15
    q = ((wide - low[..., None]) / scales[..., None]).round().clamp(0, 15)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.to(torch.int32).flatten(-2), 1)
    both = torch.stack([scales, low + 8 * scales], -1).transpose(0, 1).contiguous()
    both = both.to(matrix.dtype)
    return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, GROUP, both)


# ---- what is shown ----


def tables(result: dict[str, Any]) -> Iterator[Any]:
    names, rows = result["contenders"], result["rows"]
    columns = {"T": "{:d}", "hit": "{:d}"}
    columns |= {f"{_header(name)}\nms": "{:.2f}" for name in names}
    yield table(columns, [_times(row, names) for row in rows])
    columns = {"T": "{:d}"}
    ours = [name for name in FORMATS.values() if name in names]
    for name in ours:
        columns |= {f"x {name}": "{:.2f}", f"{name}\nread": "{:.0%}", f"{name}\nerror": "{:.1e}"}
    yield table(columns, [_of_ours(row, ours) for row in rows])
    best = max(row["read_gbs"] for row in rows)
    yield (
        f"moeprof: in {result['settings']['dtype']}; x: its time over that of the format, which "
        "is the larger the faster that is. read: bytes of the experts that were hit, over time "
        f"and over the speed of reading (the layer's weights read once by all threads, best of the "
        f"rounds: {best:.1f} GB/s). error: relative, to float64 of the weights before they were "
        "quantised. torch: its products, expert by expert. QMoE: onnxruntime's operator; level 4: "
        "its accuracy level, hidden states in 8 bits."
    )
    for reason in dict.fromkeys(result["missing"].values()):
        named = ", ".join(name for name, why in result["missing"].items() if why == reason)
        yield f"left out: {named}: {reason}"


def _header(name: str) -> str:
    """In narrow lines."""
    return name.replace(" ", "\n").replace("llama.cpp", "llama\n.cpp")


def _times(row: Mapping[str, Any], names: list[str]) -> list[Any]:
    times = [milliseconds(row["times"], name) for name in names]
    return [row["tokens"], row["experts_hit"], *times]


def _of_ours(row: Mapping[str, Any], ours: list[str]) -> list[Any]:
    cells: list[Any] = [row["tokens"]]
    for name in ours:
        times = ratio(row["times"], "moeprof", name).median
        cells += [times, row["read_share"][name], row["errors"].get(name)]
    return cells


def figure(result: dict[str, Any]) -> Figure:
    ours = {"moeprof": result["settings"]["dtype"]} | {name: name for name in FORMATS.values()}
    labels = {n: f"moeprof, {ours[n]}" if n in ours else n for n in result["contenders"]}
    return plots.against_tokens(result, labels, "time of a layer's experts")
