"""A study as cells, which any process that has the model can run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import nn

    from ...checks import Tokenizer
    from ..store.cells import Cell, Subject


class Work(Protocol):
    """A study on a model that is loaded, whose cells know nothing of each other.

    subject : what all cells are measured on
    cells : in the order in which one process runs them
    """

    @property
    def subject(self) -> Subject: ...

    @property
    def cells(self) -> Sequence[Cell]: ...

    @property
    def make(self) -> Make:
        """A function that makes the same study of the same model, loaded in another process."""
        ...

    def steps(self, cell: Cell) -> int:
        """How often `run` calls its `step`, for the progress bar."""
        ...

    def run(self, cell: Cell, step: Callable[[], object]) -> dict[str, Any]:
        """Measure a cell: plain values, as JSON has them. The model is afterwards as it was."""
        ...


# Of a model and its tokenizer; it is pickled, so it is a function of a module, or a
# `functools.partial` of one.
Make = Callable[["nn.Module", "Tokenizer"], Work]
