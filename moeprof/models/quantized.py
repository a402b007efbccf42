"""Experts in 8 or 4 bits: a module that stands where a model's own experts stood."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.ops import BY_ITSELF, run_experts, table_of
from ..backends.tables import BY_NAME, DTYPES, NOTHING_READ, Activation, LayerMatrices, Storage
from .guards import hooked


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
        for name, tensor in zip(self._names(), matrices, strict=False):
            self.register_buffer(name, tensor)
        # Biases and hidden states are of the model's dtype: this follows `model.to(dtype)`.
        dtype = torch.empty(0, dtype=BY_NAME[storage.dtype])
        self.register_buffer("dtype_of_hidden", dtype, persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """Of hidden states and biases."""
        return self.get_buffer("dtype_of_hidden").dtype

    def _names(self) -> tuple[str, ...]:
        first = "gate_up_proj" if self.activation.gated else "up_proj"
        return first, "down_proj", f"{first}_bias", "down_proj_bias"

    def read(self) -> tuple[LayerMatrices, str | None]:
        """(the matrices, None), or (none, why they can't run in C)."""
        if reason := hooked(self):
            return NOTHING_READ, reason
        own: dict[str, Any] = vars(self)["_buffers"]
        tensors = [own[name] for name in self._names() if own.get(name) is not None]
        if (dtype := DTYPES.get(self.dtype)) is None:
            return NOTHING_READ, f"hidden states of {self.dtype}"
        format = f"{self.format}_exact" if self.exact else self.format
        storage = Storage("rows", format, dtype, self.hidden_size, self.intermediate_size)
        return LayerMatrices(tensors, self.activation, storage), None

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(T, H): run the experts that a routing (T, k) names."""
        name = BY_ITSELF + type(self).__name__
        read, reason = self.read()
        if reason:
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
            f"intermediate_size={self.intermediate_size}, format={self.format}"
        )
