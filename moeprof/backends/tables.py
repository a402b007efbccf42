"""Torch's memory as the kernels see it: arrays, and where a layer's matrices lie."""

from collections.abc import Sequence
from functools import lru_cache
from math import inf
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import _C

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def as_array(tensor: Tensor) -> np.ndarray[Any, Any]:
    """A NumPy view of a CPU tensor, 16-bit floats as uint16; a copy only of one that is not
    contiguous, or whose sign is still to be turned (torch's negative bit)."""
    if tensor.requires_grad or tensor.is_neg() or not tensor.is_contiguous():
        tensor = tensor.detach().resolve_neg().contiguous()
    array: np.ndarray[Any, Any]
    array = (tensor.view(torch.uint16) if tensor.element_size() == 2 else tensor).numpy()
    return array


def as_tensor(array: np.ndarray[Any, Any], dtype: torch.dtype) -> Tensor:
    """What the kernels wrote, uint16 for 16-bit floats, as a tensor on the same memory."""
    return torch.from_numpy(array).view(dtype)


class Activation(NamedTuple):
    """What an expert computes between its matrices; csrc/kernels.h has the functions.

    Of what gate and up give: ``f(min(gate, limit)) * (clamp(up, -limit, limit) + shift)``.
    Without gate: ``f(up)``.
    """

    name: str = "silu"  # "silu", "gelu", "gelu_tanh", "relu" or "relu2"
    alpha: float = 1.0  # of silu alone: x * sigmoid(alpha * x)
    limit: float = inf
    shift: float = 0.0
    gated: bool = True

    @property
    def matrices(self) -> int:
        """Of one expert."""
        return 3 if self.gated else 2

    def as_text(self) -> str:
        """As an operator of torch takes it."""
        return f"{self.name} {self.alpha} {self.limit} {self.shift} {self.gated}"

    @classmethod
    def from_text(cls, text: str) -> "Activation":
        name, alpha, limit, shift, gated = text.split()
        return cls(name, float(alpha), float(limit), float(shift), gated == "True")


SWIGLU = Activation()

ROWS, TRANSPOSED, INTERLEAVED = "rows", "transposed", "interleaved"


class LayerMatrices(NamedTuple):
    """The experts of a layer, as `WeightTable` takes them; while a compiler traces, instead of
    one: its tensors lie nowhere."""

    matrices: Sequence[Tensor]
    activation: Activation = SWIGLU
    storage: str = ROWS

    @property
    def hidden_size(self) -> int:
        return sizes_of(self.matrices, self.storage)[0]


NOTHING_READ = LayerMatrices([])


def sizes_of(matrices: Sequence[Tensor], storage: str) -> tuple[int, int]:
    """(H, I) of matrices as `WeightTable` takes them."""
    down = matrices[1 if is_packed(matrices) else -1]
    hidden_size, intermediate_size = down.shape[-2:]
    if storage != ROWS:
        hidden_size, intermediate_size = intermediate_size, hidden_size
    return hidden_size, intermediate_size


def is_packed(matrices: Sequence[Tensor]) -> bool:
    """Are these tensors of all experts, not a list by expert?"""
    return matrices[0].dim() == 3


class WeightTable:
    """Where the matrices of a layer's experts lie, for the kernels.

    It owns the tensors, so that they are not freed while it is there; they are read where they
    lie, so that what is written into them counts from the next call on. After `param.data = ...`
    they lie elsewhere, see `is_current`.

    Parameters
    ----------
    matrices
        Either the packed pair ``[gate_up (E, 2I, H), down (E, H, I)]`` of transformers 5, or
        the list ``[gate_0, up_0, down_0, gate_1, ...]`` of transformers 4; of experts without
        gate, ``[up (E, I, H), down (E, H, I)]`` or ``[up_0, down_0, up_1, ...]``. Behind a pair
        may come its biases, ``[gate_up (E, 2I), down (E, H)]`` or ``[up (E, I), down (E, H)]``.
        Contiguous, of one dtype, on the CPU; see `tensor_obstacle`.
    activation
        What the experts compute between them.
    storage
        "rows", as above; of a pair also "transposed", with (E, H, 2I) or (E, H, I), and
        (E, I, H), or "interleaved": the same, with gate and up by turns in the columns, and in
        their bias.
    """

    def __init__(
        self, matrices: Sequence[Tensor], activation: Activation = SWIGLU, storage: str = ROWS
    ):
        self.matrices, self.activation, self.storage = tuple(matrices), activation, storage
        self.dtype = matrices[0].dtype
        self._addresses = tuple(map(Tensor.data_ptr, self.matrices))
        self.hidden_size, intermediate_size = sizes_of(matrices, storage)
        packed = is_packed(matrices)
        own = activation.matrices
        self.num_experts: int = len(matrices[0]) if packed else len(matrices) // own
        self.layer = _layer(
            self._addresses,
            self.num_experts,
            matrices[0].element_size() if packed else 0,
            DTYPES[self.dtype],
            self.hidden_size,
            intermediate_size,
            activation,
            storage,
        )  # what the functions of _C take

    def is_current(self) -> bool:
        """Are the tensors where they were?"""
        return tuple(map(Tensor.data_ptr, self.matrices)) == self._addresses


@lru_cache(maxsize=1024)  # of the layers in use; a pure function of the addresses
def _layer(
    addresses: tuple[int, ...],
    num_experts: int,
    size: int,
    dtype: str,
    hidden_size: int,
    intermediate_size: int,
    activation: Activation,
    storage: str,
) -> Any:
    """The `_C.Layer` of these addresses; size: bytes of a number in packed tensors, or 0."""
    if size:
        sizes = num_experts, hidden_size, intermediate_size
        pointers = _in_packed(addresses, size, sizes, activation.gated, storage)
    else:
        at = np.array(addresses, dtype=np.uint64)
        pointers = np.ascontiguousarray(at.reshape(-1, activation.matrices).T)
    pointers.setflags(write=False)
    return _C.Layer(pointers, dtype, hidden_size, intermediate_size, activation[:4], storage)


def _in_packed(
    addresses: tuple[int, ...], size: int, sizes: tuple[int, int, int], gated: bool, storage: str
) -> Any:
    """The pointers that `_C.Layer` takes: into the tensors of all experts at these addresses."""
    E, H, I = sizes  # noqa: E741
    beside = 2 if gated else 1  # gate and up, or up alone, in the first of a pair
    to_up = {ROWS: I * H, TRANSPOSED: I, INTERLEAVED: 1}  # numbers from gate to up
    of_matrices = beside * I * H, I * H, to_up[storage]
    of_biases = beside * I, H, 1 if storage == INTERLEAVED else I
    experts = np.arange(E, dtype=np.uint64)
    pairs = zip(addresses[::2], addresses[1::2], (of_matrices, of_biases), strict=False)
    rows = []
    for into, down, (of_into, of_down, step) in pairs:
        rows += [into + size * (of_into * experts + n * step) for n in range(beside)]
        rows.append(down + size * (of_down * experts))
    return np.stack(rows)


def tensor_obstacle(tensors: Sequence[Tensor]) -> str | None:
    """Why the kernels can't read these tensors as one layer's, or None."""
    dtype = tensors[0].dtype
    if dtype not in DTYPES:
        return f"weights of dtype {dtype} (float32, bfloat16, float16 are supported)"
    # A tracer's tensors have a class of their own and no memory: what it makes of the operator
    # is asked again when that runs.
    traced = torch.compiler.is_compiling()
    for tensor in tensors:
        if not traced and type(tensor) not in (Tensor, torch.nn.Parameter, torch.nn.Buffer):
            return f"a tensor of class {type(tensor).__name__}"
        if tensor.device.type != "cpu":
            return f"a tensor on device {tensor.device} (only cpu is supported)"
        if tensor.layout is not torch.strided or (not traced and tensor.is_neg()):
            return "a tensor that is not plain memory (its layout, or a lazy sign)"
        if tensor.dtype != dtype:
            return f"dtypes {dtype} and {tensor.dtype} in one layer"
    return None


def routing_obstacle(expert_ids: Tensor, routing_weights: Tensor) -> str | None:
    """Why a routing that is given can't be read, or None."""
    for tensor in (expert_ids, routing_weights):
        if tensor.device.type != "cpu":
            return f"a routing on device {tensor.device} (only cpu is supported)"
    return None
