"""A whole MoE block of a model family: as transformers runs it, and patched.

Unlike `layer`, this is all of the block: its gate, its shared experts, its scaling.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from ..measure.timing import interleave, ratio, steps
from ..models.blocks import find_blocks
from ..patching.patch import plan_patch, put_in
from ..show.tables import milliseconds, table
from . import plots
from .contenders import PACKED
from .settings import FAMILIES
from .weights import random_tensors

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..show.console import Bar
    from .settings import Settings


Blocks = dict[str, nn.Module]  # {contender: its block}, all on the same weights
PATCHED, SEAM, BATCHED = "moeprof", "moeprof, seam", "batched_mm"
BATCHED_BYTES = 2 << 30  # that "batched_mm" copies at most: the weights of each token's experts


def rounds(settings: Settings) -> int:
    return steps(map(settings.rounds, settings.tokens))


def measure(settings: Settings, bar: Bar) -> dict[str, Any]:
    bar.note("block: random weights")
    with torch.inference_mode():
        blocks, path, missing = _contenders(_random_block(settings))
        rows = [_row(settings, blocks, tokens, bar) for tokens in settings.tokens]
    return {"contenders": [*blocks], "path": path, "missing": missing, "rows": rows}


def _random_block(settings: Settings) -> nn.Module:
    """The MoE block of a model of the family, with random weights of the shape."""
    shape, family = settings.shape, FAMILIES[settings.one_family]
    sizes = dict(
        zip(
            family.sizes,
            (shape.experts, shape.hidden, shape.intermediate, shape.top_k),
            strict=True,
        )
    )
    # Around the block, which alone is measured, there is one of all.
    config = AutoConfig.for_model(
        settings.one_family,
        **family.others,
        **sizes,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        vocab_size=2**18,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    block = find_blocks(model)[0].module
    shapes = {name: tensor.shape for name, tensor in block.state_dict().items()}
    _, tensors = random_tensors(shapes, getattr(torch, settings.one_dtype))
    block.load_state_dict(tensors, assign=True)
    return block.eval().requires_grad_(False)


def _contenders(block: nn.Module) -> tuple[Blocks, str, dict[str, str]]:
    """(the blocks, the path that moeprof takes, {what doesn't run: why})."""
    implementations = ("eager", "grouped_mm", BATCHED) if PACKED else ("eager",)
    blocks = {name: _stock(block, name) for name in implementations}
    ours = _twin(block)
    planned = plan_patch(ours, strict=False)
    if planned.skipped:
        return blocks, "the model's own", {PATCHED: next(iter(planned.skipped.values()))}
    put_in(planned)
    blocks[PATCHED] = ours
    if not planned.layers[0][1].fused:
        return blocks, "seam", {}
    if PACKED:  # what the seam adds: the same block, not as one call
        other = _twin(block)
        planned = plan_patch(other)
        planned.layers[0][1].fused = False
        put_in(planned)
        blocks[SEAM] = other
    return blocks, "fused", {}


def _twin(block: nn.Module) -> nn.Module:
    """The block again, on the same weights."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in block.parameters()}
    return copy.deepcopy(block, shared)


def _stock(block: nn.Module, implementation: str) -> nn.Module:
    """The block with an implementation of transformers for its experts."""
    twin = _twin(block)
    if PACKED:
        experts: Any = find_blocks(twin)[0].family.experts_of(twin)
        experts.config._experts_implementation = implementation
    return twin


def _row(settings: Settings, blocks: Blocks, tokens: int, bar: Bar) -> dict[str, Any]:
    bar.note(f"block: {tokens} tokens")
    shape, dtype = settings.shape, getattr(torch, settings.one_dtype)
    draws = _HiddenStates(tokens, shape.hidden, dtype)
    gathered = tokens * shape.top_k * shape.size * dtype.itemsize
    calls = {
        name: _call(block)
        for name, block in blocks.items()
        if name != BATCHED or gathered <= BATCHED_BYTES
    }
    differs = _differences(calls, draws.next(""))
    times = interleave(calls, settings.rounds(tokens), draws.next, bar)
    return {"tokens": tokens, "differences": differs, "times": times}


class _HiddenStates:
    """Random hidden states, in every call others, which are routed otherwise."""

    def __init__(self, tokens: int, hidden_size: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(tokens)
        self._x = torch.randn(1, tokens, hidden_size, generator=generator).to(dtype)

    def next(self, name: str) -> tuple[Tensor]:
        self._x = self._x.roll(1, -1)
        return (self._x,)


def _call(block: nn.Module) -> Callable[[Tensor], Tensor]:
    def call(x: Tensor) -> Tensor:
        output = block(x)
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        return hidden

    return call


def _differences(
    calls: Mapping[str, Callable[[Tensor], Tensor]], x: tuple[Tensor]
) -> dict[str, float]:
    """{contender: relative difference to "eager"}: whether all compute the same."""
    outputs = {name: call(*x).double() for name, call in calls.items()}
    size = outputs["eager"].norm()
    return {
        name: float((output - outputs["eager"]).norm() / size)
        for name, output in outputs.items()
        if name != "eager"
    }


# ---- what is shown ----


def tables(result: dict[str, Any]) -> Iterator[Any]:
    names = result["contenders"]
    columns = {"T": "{:d}"}
    columns |= {f"{name.replace(', ', ' ')}\nms": "{:.2f}" for name in names}
    columns |= {"other/\nours": "{:.2f}", "difference": "{:.1e}"}
    yield table(columns, [_cells(row, names) for row in result["rows"]])
    yield (
        f"Path of moeprof: {result['path']}. other: the fastest of transformers, within each "
        "round, the median over the rounds; difference: of moeprof's output, relative to eager's; "
        "where logits tie, other experts may run."
    )
    if SEAM in names:
        costs = ", ".join(
            f"{_seam_cost(row['times']):+.0f} us at T {row['tokens']}" for row in result["rows"]
        )
        yield f"What the seam adds to the one call, per layer: {costs}"
    for name, reason in result["missing"].items():
        yield f"left out: {name}: {reason}"


def _seam_cost(times: Mapping[str, Mapping[str, float]]) -> float:
    return 1e3 * (times[SEAM]["median_ms"] - times[PATCHED]["median_ms"])


def _cells(row: Mapping[str, Any], names: list[str]) -> list[Any]:
    times = row["times"]
    others = [name for name in times if name not in (PATCHED, SEAM)]
    best = min(others, key=lambda name: times[name]["median_ms"])
    return [
        row["tokens"],
        *(milliseconds(times, name) for name in names),
        ratio(times, best, PATCHED).median if PATCHED in times else None,
        row["differences"].get(PATCHED),
    ]


def figure(result: dict[str, Any]) -> Figure:
    labels = {name: name for name in result["contenders"]}
    return plots.against_tokens(result, labels, "time of an MoE block")
