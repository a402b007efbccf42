"""Random weights, all of one module in one block of memory, and routings to run them with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from ..measure.machine import check_memory

if TYPE_CHECKING:
    from .settings import Shape


_ALIGN = 64  # elements
_NUMBERS = 2**20 - 3  # odd, so that no two experts are alike


def random_tensors(
    shapes: Mapping[str, Sequence[int]], dtype: torch.dtype
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(words, {name: tensor}) for {name: shape}: normal, std 0.02, vectors 1.

    The tensors share one block of memory; `words`, int32, is all of it, for reading. A long
    run of random numbers is repeated, since to draw billions of them takes a minute.
    """
    places, total = {}, 0
    for name, shape in shapes.items():
        places[name] = total
        total += -(-math.prod(shape) // _ALIGN) * _ALIGN
    check_memory(total * dtype.itemsize)
    block = torch.empty(total, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(min(total, _NUMBERS), generator=generator).mul_(0.02).to(dtype)
    for part in block.split(len(numbers)):
        part.copy_(numbers[: len(part)])
    tensors = {
        name: block[places[name] :][: math.prod(shape)].view(shape)
        for name, shape in shapes.items()
    }
    for tensor in tensors.values():
        if tensor.dim() == 1:
            tensor.fill_(1)
    return block.view(torch.int32), tensors


class LayerWeights(NamedTuple):
    """The experts of a layer: words of both, gate_up (E, 2I, H), down (E, H, I)."""

    words: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor

    def matrices(self, expert: int) -> tuple[torch.Tensor, ...]:
        """(gate, up, down) of one expert."""
        return *self.gate_up[expert].chunk(2), self.down[expert]


def layer_weights(shape: Shape, dtype: torch.dtype) -> LayerWeights:
    E, H, I = shape.experts, shape.hidden, shape.intermediate  # noqa: E741, as in the docs
    words, tensors = random_tensors({"gate_up": (E, 2 * I, H), "down": (E, H, I)}, dtype)
    return LayerWeights(words, tensors["gate_up"], tensors["down"])


class Call(NamedTuple):
    """The arguments of a layer: x (T, H), logits (T, E), idx and weights (T, K)."""

    x: torch.Tensor
    logits: torch.Tensor
    idx: torch.Tensor
    weights: torch.Tensor


class Calls:
    """Random tokens, routed to other experts in every call but to as many.

    Where caches are large, a contender would else find the experts of the one before it there.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype, tokens: int) -> None:
        generator = torch.Generator().manual_seed(tokens)
        self._x = torch.randn(tokens, shape.hidden, generator=generator).to(dtype)
        self._logits = torch.randn(tokens, shape.experts, generator=generator).to(dtype)
        self._top_k, self._shift = shape.top_k, 0

    def next(self) -> Call:
        """The next Call; top-k by softmax, as OLMoE routes."""
        self._shift += self._top_k
        logits = self._logits.roll(self._shift, 1)
        weights, idx = torch.topk(logits.float().softmax(-1), self._top_k)
        return Call(self._x, logits, idx, weights.to(logits.dtype))

    @property
    def experts_hit(self) -> int:
        return self.next().idx.unique().numel()
