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
BY_NAME = {name: dtype for dtype, name in DTYPES.items()}


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


class Storage(NamedTuple):
    """How the matrices of experts are stored.

    Numbers as models have them lie in ``order``: "rows", "transposed" or "interleaved", see
    `WeightTable`. A quantised copy lies as csrc/quantized.h says: then ``format`` is one of
    csrc/formats.def ("q8", "q4", "q8_exact", "q4_exact"), and what its bytes don't tell stands
    beside it: the dtype of hidden states, and the sizes.
    """

    order: str = "rows"
    format: str = ""  # "" for numbers of a dtype
    dtype: str = ""
    hidden_size: int = 0
    intermediate_size: int = 0

    def as_text(self) -> str:
        """As an operator of torch takes it."""
        return "/".join(map(str, self))

    @classmethod
    def from_text(cls, text: str) -> "Storage":
        order, format, dtype, hidden_size, intermediate_size = text.split("/")
        return cls(order, format, dtype, int(hidden_size), int(intermediate_size))


ROWS, TRANSPOSED, INTERLEAVED = Storage("rows"), Storage("transposed"), Storage("interleaved")


class LayerMatrices(NamedTuple):
    """The experts of a layer, as `WeightTable` takes them, and the backend that runs them."""

    matrices: Sequence[Tensor]
    activation: Activation = SWIGLU
    storage: Storage = ROWS
    backend: str = "c"

    @property
    def num_experts(self) -> int:
        return num_experts_of(self.matrices, self.activation)

    @property
    def hidden_size(self) -> int:
        return sizes_of(self.matrices, self.storage)[0]

    @property
    def dtype(self) -> torch.dtype:
        """Of the hidden states."""
        return dtype_of(self.matrices, self.storage)


NOTHING_READ = LayerMatrices([])


def num_experts_of(matrices: Sequence[Tensor], activation: Activation) -> int:
    return len(matrices[0]) if is_packed(matrices) else len(matrices) // activation.matrices


def dtype_of(matrices: Sequence[Tensor], storage: Storage) -> torch.dtype:
    """The dtype of the hidden states that go with these matrices."""
    return BY_NAME[storage.dtype] if storage.format else matrices[0].dtype


def sizes_of(matrices: Sequence[Tensor], storage: Storage) -> tuple[int, int]:
    """(H, I) of matrices as `WeightTable` takes them."""
    if storage.format:
        return storage.hidden_size, storage.intermediate_size
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
        their bias. Quantised, a pair is ``[gate_up (E, 2, bytes), down (E, 1, bytes)]``, or
        ``[up (E, 1, bytes), ...]``, uint8, what `_C.encode` makes of each matrix.
    """

    backend = "c"

    def __init__(
        self, matrices: Sequence[Tensor], activation: Activation = SWIGLU, storage: Storage = ROWS
    ):
        self.matrices, self.activation, self.storage = tuple(matrices), activation, storage
        self.dtype = dtype_of(matrices, storage)
        self._addresses = tuple(map(Tensor.data_ptr, self.matrices))
        self._kinds = _shapes_and_dtypes(matrices) if is_packed(matrices) else None
        self.hidden_size, self.intermediate_size = sizes_of(matrices, storage)
        self.num_experts = num_experts_of(matrices, activation)
        self.layer = _layer(
            self._addresses,
            self.num_experts,
            self._steps() if is_packed(matrices) else None,
            storage.format or DTYPES[self.dtype],
            DTYPES[self.dtype],
            self.hidden_size,
            self.intermediate_size,
            activation,
            storage.order,
        )  # what the functions of _C take

    def _steps(self) -> tuple[tuple[int, int], ...]:
        """Of each packed tensor, bytes from one expert to the next, and from gate to up."""
        size, I = self.dtype.itemsize, self.intermediate_size  # noqa: E741
        to_up = {"rows": I * self.hidden_size, "transposed": I, "interleaved": 1}
        order = self.storage.order
        steps = [t.stride(0) * t.element_size() for t in self.matrices]
        between = [to_up[order] * size, 0, (1 if order == "interleaved" else I) * size, 0]
        if self.storage.format:
            between[0] = steps[0] // 2
        return tuple(zip(steps, between, strict=False))

    def is_current(self) -> bool:
        """Are the tensors where they were, and as they were read: contiguous, of these sizes?

        Of a list by expert, sizes and dtypes are not asked for: that takes longer than all else.
        """
        if tuple(map(Tensor.data_ptr, self.matrices)) != self._addresses:
            return False
        if not all(map(Tensor.is_contiguous, self.matrices)):
            return False
        return self._kinds is None or _shapes_and_dtypes(self.matrices) == self._kinds


def _shapes_and_dtypes(matrices: Sequence[Tensor]) -> list[tuple[torch.Size, torch.dtype]]:
    return [(t.shape, t.dtype) for t in matrices]


# What a backend runs: one in C by the addresses, torch by the tensors; while torch's compiler
# traces, C by these too, since its tensors lie nowhere.
Matrices = WeightTable | LayerMatrices


def table_of(read: LayerMatrices) -> Matrices:
    """What the backend of these matrices runs."""
    if read.backend == "c" and not torch.compiler.is_compiling():
        return WeightTable(read.matrices, read.activation, read.storage)
    return read


@lru_cache(maxsize=1024)  # of the layers in use; a pure function of the addresses
def _layer(
    addresses: tuple[int, ...],
    num_experts: int,
    steps: tuple[tuple[int, int], ...] | None,
    format: str,
    dtype: str,
    hidden_size: int,
    intermediate_size: int,
    activation: Activation,
    order: str,
) -> Any:
    """The `_C.Layer` of these addresses; steps: of packed tensors, see `WeightTable`."""
    if steps:
        pointers = _in_packed(addresses, num_experts, steps, activation.gated)
    else:
        at = np.array(addresses, dtype=np.uint64)
        pointers = np.ascontiguousarray(at.reshape(-1, activation.matrices).T)
    pointers.setflags(write=False)
    sizes = hidden_size, intermediate_size
    return _C.Layer(pointers, format, dtype, *sizes, activation[:4], order)


def _in_packed(
    addresses: tuple[int, ...], num_experts: int, steps: tuple[tuple[int, int], ...], gated: bool
) -> Any:
    """The pointers that `_C.Layer` takes: into the tensors of all experts at these addresses."""
    experts = np.arange(num_experts, dtype=np.uint64)
    rows = []
    for number, (address, (step, between)) in enumerate(zip(addresses, steps, strict=True)):
        beside = 2 if gated and number % 2 == 0 else 1  # gate and up, or one alone
        rows += [address + step * experts + n * between for n in range(beside)]
    return np.stack(rows)


# ---- what a backend can't read ----


def backend_of(tensors: Sequence[Tensor]) -> str:
    """The backend that runs experts with these tensors where nobody asks for another."""
    return "c" if tensors[0].device.type == "cpu" else "torch"


def tensor_obstacle(
    tensors: Sequence[Tensor], storage: Storage = ROWS, backend: str = "c"
) -> str | None:
    """Why a backend can't read these tensors as one layer's, or None."""
    if backend == "torch" and tensors[0].is_meta:
        return "a tensor on device meta, which has no values"
    dtype = dtype_of(tensors, storage)
    if reason := _dtype_obstacle(dtype, storage, backend):
        return reason
    expected = (torch.uint8, dtype) if storage.format else (dtype,)
    # A tracer's tensors have a class of their own and no memory: what it makes of the operator
    # is asked again when that runs.
    traced = torch.compiler.is_compiling()
    for tensor in tensors:
        if not traced and type(tensor) not in (Tensor, torch.nn.Parameter, torch.nn.Buffer):
            return f"a tensor of class {type(tensor).__name__}"
        if not traced and backend == "c":
            if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
                return 'a tensor of torch.func, which only backend="torch" can read'
        if reason := _device_obstacle(tensor, tensors[0], backend):
            return reason
        if tensor.layout is not torch.strided or (not traced and tensor.is_neg()):
            return "a tensor that is not plain memory (its layout, or a lazy sign)"
        if tensor.dtype not in expected:
            return f"dtypes {dtype} and {tensor.dtype} in one layer"
    return None


def _dtype_obstacle(dtype: torch.dtype, storage: Storage, backend: str) -> str | None:
    if backend == "c":
        if dtype in DTYPES:
            return None
        more = ', float64 by backend="torch"' if dtype == torch.float64 else ""
        return f"weights of dtype {dtype} (float32, bfloat16, float16 are supported{more})"
    if storage.format:
        return (
            f"experts in {storage.format[1]} bits, which only the backend in C computes with, on a "
            'CPU: move the model there, model.to("cpu"), or load it without bits='
        )
    if dtype in DTYPES or dtype == torch.float64:
        return None
    return f"weights of dtype {dtype} (float64, float32, bfloat16, float16 are supported)"


def _device_obstacle(tensor: Tensor, first: Tensor, backend: str) -> str | None:
    device = tensor.device
    if backend == "c":
        if device.type == "cpu":
            return None
        return f'a tensor on device {device} (only cpu is supported by backend="c")'
    if device != first.device:
        return f"tensors on devices {first.device} and {device} in one layer"
    return None


def routing_obstacle(expert_ids: Tensor, routing_weights: Tensor, table: Matrices) -> str | None:
    """Why a routing that is given can't be read for the experts of this table, or None."""
    device = table.matrices[0].device
    for tensor in (expert_ids, routing_weights):
        if tensor.device != device:
            return f"a routing on device {tensor.device}, and the experts are on {device}"
    return None


def ids_obstacle(expert_ids: Tensor, table: Matrices) -> str | None:
    """What of ids that a user has made is no expert, or None. C looks at them itself, and for
    those on another device the host waits; what is compiled fails when it runs."""
    if table.backend == "c" or not expert_ids.numel():
        return None
    if torch.compiler.is_compiling():
        good = (expert_ids >= -1) & (expert_ids <= table.num_experts)
        torch._assert_async(good.all(), f"expert_ids: expected -1 to {table.num_experts}")
        return None
    low, high = torch.stack(expert_ids.aminmax()).tolist()
    if low < -1 or high > table.num_experts:
        named = low if low < -1 else high
        return f"expert_ids: expected -1 to {table.num_experts}, got {named}"
    return None
