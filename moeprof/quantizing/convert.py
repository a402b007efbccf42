"""A layer's experts to 8 or 4 bits."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import _C
from ..backends.cpu import get_num_threads
from ..backends.pages import advised
from ..backends.tables import DTYPES, LayerMatrices, Storage, is_packed, sizes_of
from ..models.quantized import PANEL, QuantizedExperts

FORMATS = {8: "q8", 4: "q4"}  # by bits


def encoded(matrix: Tensor, format: str) -> Tensor:
    """A matrix (N, K), in any order of memory, as the bytes of a quantised one, (bytes,) uint8.

    ValueError names the row that has a weight which is not finite.
    """
    matrix = matrix.detach()
    bits = matrix.view(torch.uint16) if matrix.element_size() == 2 else matrix
    array = _C.encode(bits.numpy(), DTYPES[matrix.dtype], format, get_num_threads())
    return torch.from_numpy(array).flatten()


def decoded(data: Tensor, rows: int, columns: int, format: str) -> Tensor:
    """What `encoded` kept of a matrix, (rows, columns) float32."""
    panels = -(-rows // PANEL) * PANEL
    array = _C.decode(data.view(panels, -1).numpy(), rows, columns, format)
    return torch.from_numpy(array)


def matrices_of(read: LayerMatrices) -> Iterator[tuple[Tensor, ...]]:
    """Of each expert (gate (I, H), up (I, H), down (H, I)), or (up, down); views, no copies."""
    matrices, order, own = read.matrices, read.storage.order, read.activation.matrices
    if not is_packed(matrices):
        for first in range(0, len(matrices), own):
            yield tuple(matrices[first : first + own])
        return
    for into, down in zip(*matrices[:2], strict=True):
        if order != "rows":
            into, down = into.T, down.T
        if own == 2:
            yield into, down
        elif order == "interleaved":
            yield into[::2], into[1::2], down
        else:
            yield *into.chunk(2), down


def biases_of(read: LayerMatrices) -> list[Tensor]:
    """[of gate and up (E, 2I), of down (E, H)], or [] where there are none."""
    if not is_packed(read.matrices) or len(read.matrices) == 2:
        return []
    into, down = read.matrices[2:]
    if read.storage.order == "interleaved":
        into = torch.cat([into[:, ::2], into[:, 1::2]], dim=1)
    return [into.detach().clone(), down.detach().clone()]


def quantized(read: LayerMatrices, format: str, config: Any = None) -> QuantizedExperts:
    """The experts of a layer in a format of 8 or 4 bits; what was read is left as it is.

    ValueError names the expert and the matrix with a weight that is not finite.
    """
    hidden_size, intermediate_size = sizes_of(read.matrices, read.storage)
    own = read.activation.matrices
    experts = [*matrices_of(read)]
    # All of one kind into one tensor, which is all that this takes beside what was read.
    kinds = (range(own - 1), (own - 1,))
    made = [_encoded_kind(experts, kind, format) for kind in kinds]
    storage = Storage("rows", format, DTYPES[read.dtype], hidden_size, intermediate_size)
    return QuantizedExperts([*made, *biases_of(read)], read.activation, storage, config)


def _encoded_kind(
    experts: list[tuple[Tensor, ...]], kind: range | tuple[int, ...], format: str
) -> Tensor:
    """(E, matrices of this kind, bytes)."""
    names = ("gate", "up", "down")[-len(experts[0]) :]
    out: Tensor | None = None
    for number, matrices in enumerate(experts):
        for place, index in enumerate(kind):
            try:
                data = encoded(matrices[index], format)
            except ValueError as error:
                raise ValueError(f"expert {number}, {names[index]}: {error}") from None
            if out is None:
                out = advised((len(experts), len(kind), len(data)))
            out[number, place] = data
    assert out is not None
    return out
