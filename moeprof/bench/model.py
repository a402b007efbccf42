"""A whole model: decode steps and prefills, as it is and patched, and what a callback costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache, OlmoeConfig, OlmoeForCausalLM
from transformers.utils import logging

from .. import demo
from ..measure.limits import WORDS, limit_calls, rates, roof
from ..measure.timing import interleave, ratio, steps
from ..models.decoding import decode
from ..patching.patch import patch
from ..profile.profiler import MoEProfiler
from ..show.tables import table
from . import plots
from .contenders import PACKED
from .weights import random_tensors

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..measure.timing import Times
    from ..show.console import Bar
    from .settings import Settings, Shape


LAYERS, VOCABULARY, HEAD = 4, 50304, 128
CACHED = 64  # tokens before a decode step
OVERHEAD, OF_BANDWIDTH = 1.5, 0.95  # ms; the target of a decode step
IMPLEMENTATIONS = ("eager", "grouped_mm") if PACKED else ("eager",)
STOCK = IMPLEMENTATIONS[-1]  # what transformers takes by itself
PATCHED, LINEARS, CALLBACK = "moeprof", "moeprof + linears", "moeprof + on_routing(callback)"
PROFILER = " + profiler"
PROFILED = {name + PROFILER: name for name in (STOCK, PATCHED)}
CONTENDERS = [*IMPLEMENTATIONS, PATCHED, LINEARS, CALLBACK, *PROFILED]


def rounds(settings: Settings) -> int:
    return steps([*map(settings.rounds, settings.tokens), settings.rounds(1)])


def measure(settings: Settings, bar: Bar) -> dict[str, Any]:
    bar.note("model: random weights")
    words, model = random_model(settings.shape, getattr(torch, settings.one_dtype))
    with torch.inference_mode():
        rows = [_row(settings, words, model, tokens, bar) for tokens in settings.tokens]
        del words, model
        bar.note("model: demo")
        logging.disable_progress_bar()  # of the loading
        demo_times, _ = _times(demo.load()[0], 1, settings.rounds(1), {}, bar)
    return {
        "contenders": CONTENDERS,
        "layers": LAYERS,
        "vocabulary": VOCABULARY,
        "rows": rows,
        "demo": {"tokens": 1, "dtype": "float32", "times": demo_times},
    }


def random_model(shape: Shape, dtype: torch.dtype) -> tuple[torch.Tensor, Any]:
    """(words of all its weights, an OLMoE of four layers of that shape)."""
    heads = shape.hidden // HEAD if shape.hidden % HEAD == 0 else 1
    if shape.hidden % 2:
        raise ValueError(f"H {shape.hidden}: a model with rotary positions needs an even one")
    config = OlmoeConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        num_hidden_layers=LAYERS,
        vocab_size=VOCABULARY,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=2**20,
    )
    with torch.device("meta"):
        model = OlmoeForCausalLM(config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    words, tensors = random_tensors(shapes, dtype)
    model.load_state_dict(tensors, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # has buffers, not weights
    return words, model.eval().requires_grad_(False)


def random_ids(count: int, vocabulary: int) -> torch.Tensor:
    """Token ids (count,), the same in every run."""
    draw = torch.Generator().manual_seed(count)
    return torch.randint(2, vocabulary, (count,), generator=draw)


# ---- one measurement ----


class _Contenders:
    """The model in the state that each contender is measured in, and the calls for it.

    A decode step (tokens 1) follows `CACHED` tokens, and an uncounted one of the same contender:
    the first after a change of the model is slower. More tokens are a prefill.
    """

    def __init__(self, model: Any, tokens: int) -> None:
        self.model = model
        self.seen: list[Any] = []
        self._profiler = MoEProfiler(model)
        self._ids = random_ids(tokens, model.config.vocab_size)[None]
        self._handle: Any = None
        self._cache: Any = None
        if tokens == 1:
            self._cache = DynamicCache()
            self.call(random_ids(CACHED, model.config.vocab_size)[None], self._cache)

    def call(self, ids: torch.Tensor, cache: Any) -> Any:
        if cache is None:
            return self.model(input_ids=ids, use_cache=False)
        return decode(self.model, ids, cache)

    def prepare(self, name: str) -> tuple[torch.Tensor, Any]:
        """(ids, cache) for the next call, of `name`."""
        self.restore()
        if name in PROFILED:
            self._profiler.start()
        name = PROFILED.get(name, name)
        if name in IMPLEMENTATIONS:
            self.model.config._experts_implementation = name
        elif name.startswith(PATCHED):
            self._handle = patch(self.model, linears=name == LINEARS)
        if name == CALLBACK:
            self._handle.on_routing(lambda layer, routing: self.seen.append(routing))
        if self._cache is not None:
            self.call(self._ids, self._cache)
            self._cache.crop(CACHED - self._cache.get_seq_length())
        self.seen.clear()
        return self._ids, self._cache

    def restore(self) -> None:
        self._profiler.stop()
        if self._handle is not None:
            self._handle.unpatch()
            self._handle = None


def _times(
    model: Any, tokens: int, count: int, limits: Mapping[str, Callable[..., object]], bar: Bar
) -> tuple[dict[str, dict[str, float]], list[int]]:
    """(times of all contenders and limits, experts that a call hits in each layer)."""
    contenders = _Contenders(model, tokens)
    calls = {**limits} | dict.fromkeys(CONTENDERS, contenders.call)
    try:
        times = interleave(calls, count, contenders.prepare, bar)
        contenders.call(*contenders.prepare(CALLBACK))
        hit = [int(r.expert_ids[r.expert_ids >= 0].unique().numel()) for r in contenders.seen]
    finally:
        contenders.restore()
    return times, hit


def _row(
    settings: Settings, words: torch.Tensor, model: Any, tokens: int, bar: Bar
) -> dict[str, Any]:
    bar.note(f"model: {'a decode step' if tokens == 1 else f'{tokens} tokens'}")
    limits = limit_calls(words, model.dtype)
    times, hit = _times(model, tokens, settings.rounds(tokens), limits, bar)
    measured, read = rates(times, words), _bytes_read(model, settings.shape, sum(hit))
    row: dict[str, Any] = {
        "tokens": tokens,
        "experts_hit": hit,
        "bytes": read,
        "rates": measured,
        "times": times,
    }
    row["roof"] = roof(sum(read.values()), _flop(model, settings.shape, tokens), measured)
    if tokens == 1:
        row["target_ms"] = row["roof"]["read_ms"] / OF_BANDWIDTH + OVERHEAD
    return row


def _bytes_read(model: Any, shape: Shape, experts: int) -> dict[str, int]:
    """{part: bytes} that a call reads of the weights, `experts` of them; not the embedding."""
    read = {"experts": experts * shape.size * model.dtype.itemsize}
    read |= {"attention": 0, "lm_head": 0, "gates and norms": 0}
    for name, parameter in dense(model):
        attention = "attn" in name and parameter.dim() > 1
        head = "lm_head" if name.startswith("lm_head") else "gates and norms"
        read["attention" if attention else head] += parameter.nbytes
    return read


def dense(model: Any) -> list[tuple[str, torch.Tensor]]:
    """Names and parameters that every token goes through."""
    left_out = (".experts.", "embed_tokens")
    parameters = model.named_parameters()
    return [(n, p) for n, p in parameters if not any(part in n for part in left_out)]


def _flop(model: Any, shape: Shape, tokens: int) -> int:
    """Of the products with the weights, and of attention between the tokens of the call."""
    others = 2 * tokens * sum(p.numel() for _, p in dense(model) if p.dim() > 1)
    experts = tokens * LAYERS * shape.top_k * shape.flop
    return others + experts + 2 * LAYERS * shape.hidden * tokens**2


# ---- what is shown ----


def tables(result: dict[str, Any]) -> Iterator[Any]:
    names = result["contenders"]
    columns = {
        "model": "{}",
        "T": "{:d}",
        "contender": "{}",
        "ms": "{:.2f}",
        "best\nms": "{:.2f}",
        "x trans-\nformers": "{:.2f}",
        "roof\nms": "{:.2f}",
        "experts\nof a layer": "{}",
    }
    cells: list[list[Any]] = []
    for row in result["rows"]:
        hit, limit = row["experts_hit"], row["roof"]["roof_ms"]
        few = f"{min(hit)}-{max(hit)}" if min(hit) < max(hit) else f"{hit[0]}"
        cells += _cells(f"{result['layers']} layers", row, names, limit, few)
    cells += _cells("demo, float32", result["demo"], names, None, None)
    yield table(columns, cells)
    yield (
        "T 1 is a decode step after 64 tokens, others are prefills. x transformers: the faster "
        f"implementation of transformers over this one. Of the roof: {WORDS}."
    )
    for row in result["rows"]:
        if "target_ms" in row:
            yield _decode_words(row)
    for row in [*result["rows"], result["demo"]]:
        call = "decode step" if row["tokens"] == 1 else f"prefill of {row['tokens']}"
        whose = ", demo model" if row is result["demo"] else ""
        yield ", ".join(_costs(row["times"])) + f" of a {call}{whose}"


def _costs(times: Times) -> Iterator[str]:
    """What looking on costs, of each kind that was measured."""
    for name, plain in {CALLBACK: PATCHED, **PROFILED}.items():
        if name in times:
            yield f"{name}: {ratio(times, name, plain).median - 1:+.2%}"


def _cells(
    model: str, row: Mapping[str, Any], names: list[str], limit: float | None, hit: str | None
) -> Iterator[list[Any]]:
    """The rows of one measurement; what they share is said once."""
    times = row["times"]
    best = min(times[name]["median_ms"] for name in IMPLEMENTATIONS if name in times)
    shared: tuple[Any, Any] = model, row["tokens"]
    for name in names:
        own = times[name]
        speed = best / own["median_ms"]
        yield [*shared, name, own["median_ms"], own["best_ms"], speed, limit, hit]
        shared, limit, hit = (None, None), None, None


def _decode_words(row: Mapping[str, Any]) -> str:
    read, bandwidth = row["bytes"], row["rates"]["read_gbs"]
    parts = ", ".join(f"{part} {nbytes / 1e6:.1f}" for part, nbytes in read.items())
    return (
        f"A decode step reads {sum(read.values()) / 1e6:.1f} MB ({parts}); read bandwidth "
        f"{bandwidth:.1f} GB/s; target {row['target_ms']:.2f} ms (bytes / ({OF_BANDWIDTH} x "
        f"bandwidth) + {OVERHEAD} ms)"
    )


def figure(result: dict[str, Any]) -> Figure:
    what = f"time of a model of {result['layers']} layers"
    return plots.against_tokens(result, {name: name for name in result["contenders"]}, what)
