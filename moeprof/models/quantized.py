"""Weights in 8 or 4 bits: modules that stand where a model's own experts and linears stood."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.ops import run_experts, run_linear
from ..backends.tables import (
    BY_NAME,
    DTYPES,
    NOTHING_READ,
    Activation,
    LayerMatrices,
    Storage,
    backend_of,
    routing_obstacle,
    table_of,
    tensor_obstacle,
)
from .guards import hooked

GROUP, PANEL = 32, 16  # columns that share a scale, rows that lie together; csrc/quantized.h
_BITS = {"q8": 8, "q4": 4}


def encoded_bytes(rows: int, columns: int, format: str) -> int:
    """Of a matrix (rows, columns): whole panels of whole groups, each with a scale of 2 bytes."""
    groups = -(-rows // PANEL) * PANEL * -(-columns // GROUP)
    return groups * (GROUP * _BITS[format] // 8 + 2)


def expected_shapes(
    num_experts: int, activation: Activation, storage: Storage
) -> dict[str, tuple[int, ...]]:
    """{name: shape} of the tensors of `QuantizedExperts`, biases last, in the order that
    `WeightTable` takes. C reads them by their addresses, so that these sizes have to be."""
    H, I = storage.hidden_size, storage.intermediate_size  # noqa: E741
    first, beside = ("gate_up_proj", 2) if activation.gated else ("up_proj", 1)
    format = storage.format
    return {
        first: (num_experts, beside, encoded_bytes(I, H, format)),
        "down_proj": (num_experts, 1, encoded_bytes(H, I, format)),
        f"{first}_bias": (num_experts, beside * I),
        "down_proj_bias": (num_experts, H),
    }


def described_dtype(model: Any) -> str:
    """ "bfloat16", or "bfloat16, experts in q8"."""
    dtype = str(model.dtype).removeprefix("torch.")
    formats = {m.format for m in model.modules() if isinstance(m, QuantizedExperts)}
    return f"{dtype}, experts in {' and '.join(sorted(formats))}" if formats else dtype


class QuantizedExperts(nn.Module):
    """The experts of one layer, each matrix as `_C.encode` makes it, run in C.

    Called as the experts of transformers 5 are, with a routing. As a list of experts, which
    transformers 4 has, it gives one of them by its number.

    Parameters
    ----------
    matrices
        The tensors of a quantised layer, as `WeightTable` takes them: ``[gate_up, down]``, uint8,
        and their biases behind them. They become buffers, which no optimiser trains.
    activation
        What the experts compute between them.
    storage
        Format, dtype of hidden states and sizes.
    config : object, optional
        The configuration that the experts had been made with.
    """

    def __init__(
        self,
        matrices: Sequence[Tensor],
        activation: Activation,
        storage: Storage,
        config: Any = None,
    ):
        super().__init__()
        self.activation, self.config = activation, config
        self.format, self.exact = storage.format, False
        self.hidden_size, self.intermediate_size = storage.hidden_size, storage.intermediate_size
        self._shapes = expected_shapes(len(matrices[0]), activation, storage)
        if reason := self._sizes_obstacle(matrices):
            raise ValueError(reason)
        for name, tensor in zip(self._shapes, matrices, strict=False):
            self.register_buffer(name, tensor)
        # Biases and hidden states are of the model's dtype: this follows `model.to(dtype)`.
        dtype = torch.empty(0, dtype=BY_NAME[storage.dtype])
        self.register_buffer("dtype_of_hidden", dtype, persistent=False)

    def _sizes_obstacle(self, tensors: Sequence[Tensor]) -> str | None:
        """Why the tensors are not of the expected sizes, or None."""
        shapes = self._shapes.items()
        for tensor, (name, wanted) in zip(tensors, shapes, strict=False):
            is_bytes = not name.endswith("_bias")
            if tensor.shape != wanted or (tensor.dtype == torch.uint8) != is_bytes:
                kind = "uint8" if is_bytes else "a bias"
                got = f"{tensor.dtype} {tuple(tensor.shape)}"
                return f"quantised matrices: expected {kind} {wanted}, got {got}"
            if not tensor.is_contiguous():
                return "quantised matrices that are not contiguous"
        return None

    @property
    def dtype(self) -> torch.dtype:
        """Of hidden states and biases."""
        return self.get_buffer("dtype_of_hidden").dtype

    @property
    def format_in_c(self) -> str:
        """The format as it is multiplied: with activations of 8 bits, or as they are."""
        return f"{self.format}_exact" if self.exact else self.format

    def read(self) -> tuple[LayerMatrices, str | None]:
        """(the matrices, None), or (none, why a patched block, which does not call this module,
        can't run them in C)."""
        if reason := hooked(self):
            return NOTHING_READ, reason
        return self._read()

    def _read(self) -> tuple[LayerMatrices, str | None]:
        own: dict[str, Any] = vars(self)["_buffers"]
        tensors = [own[name] for name in self._shapes if own.get(name) is not None]
        if (dtype := DTYPES.get(self.dtype)) is None:
            return NOTHING_READ, f"hidden states of {self.dtype}"
        if reason := self._sizes_obstacle(tensors):
            return NOTHING_READ, reason
        sizes = self.hidden_size, self.intermediate_size
        storage = Storage("rows", self.format_in_c, dtype, *sizes)
        return LayerMatrices(tensors, self.activation, storage), None

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(T, H): run the experts that a routing (T, k) names."""
        name = type(self).__name__
        read, reason = self._read()
        if reason:
            raise RuntimeError(f"{name}: {reason}")
        tensors = [*read.matrices, hidden_states]
        reason = tensor_obstacle(tensors, read.storage, backend_of(tensors))
        if reason := reason or routing_obstacle(top_k_index, top_k_weights, read):
            raise RuntimeError(f"{name}: {reason}")
        return run_experts(hidden_states, top_k_index, top_k_weights, table_of(read), name)

    def __len__(self) -> int:
        return len(self.get_buffer("down_proj"))

    def __getitem__(self, number: int) -> Callable[[Tensor], Tensor]:
        def expert(x: Tensor) -> Tensor:
            rows = x.reshape(-1, self.hidden_size)
            ids = torch.full((len(rows), 1), int(number), dtype=torch.int64)
            return self.forward(rows, ids, torch.ones(len(rows), 1)).view(x.shape)

        return expert

    def __iter__(self) -> Iterator[Callable[[Tensor], Tensor]]:
        return (self[number] for number in range(len(self)))

    def extra_repr(self) -> str:
        return (
            f"{len(self)} experts, hidden_size={self.hidden_size}, "
            f"intermediate_size={self.intermediate_size}, format={self.format_in_c}"
        )


class QuantizedLinear(nn.Module):
    """A linear layer whose weight is as `_C.encode` makes it, multiplied in C.

    Parameters
    ----------
    weight : (bytes,) uint8
        Becomes a buffer, as the bias does.
    bias : (out_features,) or None
        Of the dtype of the inputs.
    in_features, out_features
        The sizes that the bytes don't tell.
    format
        "q8" or "q4".
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, in_features: int, out_features: int, format: str
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.format, self.exact = format, False
        if reason := self._sizes_obstacle(weight, bias):
            raise ValueError(reason)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def _sizes_obstacle(self, weight: Tensor, bias: Tensor | None) -> str | None:
        """As that of `QuantizedExperts`."""
        wanted = encoded_bytes(self.out_features, self.in_features, self.format)
        if weight.dtype != torch.uint8 or weight.shape != (wanted,) or not weight.is_contiguous():
            got = f"{weight.dtype} {tuple(weight.shape)}"
            return f"quantised weight: expected contiguous uint8 ({wanted},), got {got}"
        if bias is not None and (bias.shape != (self.out_features,) or not bias.is_contiguous()):
            return f"bias: expected ({self.out_features},), got {tuple(bias.shape)}"
        return None

    @property
    def format_in_c(self) -> str:
        """As that of `QuantizedExperts`."""
        return f"{self.format}_exact" if self.exact else self.format

    def forward(self, input: Tensor) -> Tensor:
        """(..., out_features) of an input (..., in_features)."""
        name = type(self).__name__
        weight, bias = self.get_buffer("weight"), vars(self)["_buffers"]["bias"]
        tensors = [weight, input] if bias is None else [weight, input, bias]
        dtype = DTYPES.get(input.dtype, str(input.dtype))
        storage = Storage("rows", self.format_in_c, dtype, self.in_features, self.out_features)
        if input.dtype not in DTYPES:
            raise RuntimeError(f"{name}: an input of {dtype} (float32, bfloat16, float16)")
        reason = self._sizes_obstacle(weight, bias) or tensor_obstacle(tensors, storage)
        if reason:
            raise RuntimeError(f"{name}: {reason}")
        if input.shape[-1:] != (self.in_features,):
            raise RuntimeError(
                f"{name}: expected an input of {self.in_features} columns, got {tuple(input.shape)}"
            )
        rows = input.reshape(-1, self.in_features)
        out = run_linear(rows, weight, bias, self.out_features, self.format_in_c, name)
        return out.view(*input.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        bias = vars(self)["_buffers"]["bias"] is not None
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, "
            f"format={self.format_in_c}"
        )
