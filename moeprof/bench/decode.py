"""A decode step of a whole model in 8 and 4 bits, moeprof's beside llama.cpp's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

from ..measure.timing import interleave, ratio, steps
from ..models.decoding import decode
from ..patching.patch import patch
from ..quantizing.quantize import quantize
from ..show.tables import table
from . import plots
from .llama import Q4_0, Q8_0
from .llama_model import Kinds, LlamaModel, save_gguf
from .model import LAYERS, VOCABULARY, dense, random_ids, random_model

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..measure.timing import Times
    from ..show.console import Bar
    from .settings import Settings


class Bits(NamedTuple):
    """Of a weight of the experts, and of the other matrices; with scales."""

    experts: float
    others: float


OURS = {"q8": Bits(8.5, 8.5), "q4": Bits(4.5, 8.5)}
BOTH = "llama.cpp Q4_0, Q8_0"  # experts and others, as in moeprof's q4
PEERS = {
    "llama.cpp Q8_0": (Kinds(Q8_0, Q8_0), Bits(8.5, 8.5)),
    "llama.cpp Q4_0": (Kinds(Q4_0, Q4_0), Bits(4.5, 4.5)),
    BOTH: (Kinds(Q4_0, Q8_0), Bits(4.5, 8.5)),
}
PLAIN = "moeprof"
LARGEST_DISTANCE = 0.7  # of logits, relative; others than the model's are at 1.4


class Decoder(Protocol):
    """A model that decodes."""

    def fill(self, ids: Tensor) -> None:
        """Cache these tokens, and no others; ids: (n,)."""

    def step(self, token: int) -> Tensor:
        """The logits (V,) after one token more than is cached; that stays as it was."""


class _Model:
    """One of transformers, with what moeprof made of it."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def fill(self, ids: Tensor) -> None:
        self._cache, self._cached = DynamicCache(), len(ids)
        decode(self.model, ids[None], self._cache)

    def step(self, token: int) -> Tensor:
        output = decode(self.model, torch.tensor([[token]]), self._cache)
        self._cache.crop(self._cached - self._cache.get_seq_length())
        logits: Tensor = output.logits[0, -1].float()
        return logits


def rounds(settings: Settings) -> int:
    return steps([settings.rounds(1)] * len(settings.tokens))


def measure(settings: Settings, bar: Bar) -> dict[str, Any]:
    shape, dtype = settings.shape, getattr(torch, settings.one_dtype)
    bar.note("decode: random weights")
    words, model = random_model(shape, dtype)
    weights = LAYERS * shape.top_k * shape.size
    others = sum(parameter.numel() for _, parameter in dense(model) if parameter.dim() > 1)
    bits = {PLAIN: Bits(8 * dtype.itemsize, 8 * dtype.itemsize), **OURS}
    with TemporaryDirectory() as folder, torch.inference_mode():
        decoders: dict[str, Decoder] = {PLAIN: _Model(model)}
        for name in OURS:
            bar.note(f"decode: {name}")
            decoders[name] = _quantized(settings, int(name[1:]))
        missing = {}
        for name, (kinds, own) in PEERS.items():
            bar.note(f"decode: {name}")
            try:
                save_gguf(model, path := Path(folder) / f"{len(decoders)}.gguf", kinds)
                decoders[name] = LlamaModel(path, max(settings.tokens))
            except ImportError as error:
                missing[name] = f"{type(error).__name__}: {error}"
            else:
                bits[name] = own
        expected = _logits(_Model(model))
        patch(model, linears=True)
        distances = {name: _distance(each, expected) for name, each in decoders.items()}
        for name, found in distances.items():
            if not found < LARGEST_DISTANCE:
                missing[name] = f"its logits are wrong: their relative distance is {found:.2g}"
                del decoders[name]
        rows = [_row(settings, decoders, words, cached, bar) for cached in settings.tokens]
    sizes = {
        name: (weights * bits[name].experts + others * bits[name].others) / 8 for name in decoders
    }
    return {
        "contenders": [*decoders],
        "layers": LAYERS,
        "bytes": sizes,
        "distances": distances,
        "missing": missing,
        "rows": rows,
    }


def _quantized(settings: Settings, bits: int) -> _Model:
    _, model = random_model(settings.shape, getattr(torch, settings.one_dtype))
    quantize(model, bits, linears=True, progress=False)
    return _Model(model)


def _logits(decoder: Decoder) -> Tensor:
    decoder.fill(random_ids(16, VOCABULARY))
    return decoder.step(7)


def _distance(decoder: Decoder, expected: Tensor) -> float:
    """Of its logits from those of the model in its dtype, relative."""
    return float((_logits(decoder) - expected).norm() / expected.norm())


def _row(
    settings: Settings, decoders: dict[str, Decoder], words: Tensor, cached: int, bar: Bar
) -> dict[str, Any]:
    bar.note(f"decode: after {cached} tokens")
    for decoder in decoders.values():
        decoder.fill(random_ids(cached, VOCABULARY))

    def prepare(name: str) -> tuple[int, ...]:
        """An uncounted step before: threads of the contender before may still be busy."""
        if name not in decoders:
            return ()
        decoders[name].step(5)
        return (7,)

    calls = {"read": lambda: words.max()} | {n: each.step for n, each in decoders.items()}
    times = interleave(calls, settings.rounds(1), prepare, bar)
    return {
        "tokens": cached,
        "read_gbs": words.nbytes / times["read"]["best_ms"] / 1e6,
        "times": times,
    }


# ---- what is shown ----


def tables(result: dict[str, Any]) -> Iterator[Any]:
    columns = {"cached": "{:d}", "contender": "{}", "ms": "{:.2f}", "best\nms": "{:.2f}"}
    columns |= {"read\nMB": "{:.0f}", "of the\nbandwidth": "{:.0%}", "distance": "{:.1e}"}
    yield table(columns, [cells for row in result["rows"] for cells in _cells(result, row)])
    yield (
        f"A decode step of {result['layers']} layers of this shape, after the cached tokens. "
        f"moeprof: in {result['settings']['dtype']}, with linears; q8: experts and linear layers "
        "in 8 bits; q4: experts in 4, linear layers in 8. llama.cpp: all in one format, or experts "
        "and the other matrices in the two that are named. read: the weights of a step, and that "
        "over time and over the speed of reading (best of the rounds). distance: of the logits "
        "from those of the model in its dtype, relative."
    )
    for row in result["rows"]:
        for line in _compared(row["times"]):
            yield f"After {row['tokens']} tokens {line}"
    for name, reason in result["missing"].items():
        yield f"left out: {name}: {reason}"


def _cells(result: Mapping[str, Any], row: Mapping[str, Any]) -> Iterator[list[Any]]:
    cached: int | None = row["tokens"]
    for name in result["contenders"]:
        own, size = row["times"][name], result["bytes"][name]
        share = size / own["median_ms"] / 1e6 / row["read_gbs"]
        distance = result["distances"][name]
        yield [cached, name, own["median_ms"], own["best_ms"], size / 1e6, share, distance]
        cached = None


def _compared(times: Times) -> Iterator[str]:
    for ours, bits in OURS.items():
        for peer, (_, others) in PEERS.items():
            if peer in times and others.experts == bits.experts:
                found = ratio(times, ours, peer)
                yield f"{ours} takes {found.median:.2f} of {peer}'s time ({found.quartiles})"


def figure(result: dict[str, Any]) -> Figure:
    what = f"time of a decode step of {result['layers']} layers"
    made = plots.against_tokens(result, {name: name for name in result["contenders"]}, what)
    made.axes[0].set_xlabel("tokens cached before the step", size=12)
    return made
