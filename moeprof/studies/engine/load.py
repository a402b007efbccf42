"""What a cell is to run, so that its time can be told before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import os

    from ...null.resolve import AnyNull
    from ...routers.base import Router
    from ..store.cells import Cell, Subject


# Kinds of passes: for the loss; with the KL from the unchanged model; of the layers alone, whose
# logits are kept; that a null is fitted to; of the model as transformers has it; decode steps.
LOSS, KL, COLLECT, FIT, STOCK = "loss", "kl", "collect", "fit", "stock"
DECODE, STOCK_DECODE = "decode", "stock decode"
USUAL_PASSES = 2  # that set a budget; how many it takes is known afterwards


class Load(NamedTuple):
    """So many tokens of one kind of pass.

    experts : per token, the model's own k for None; a router takes what it takes
    null : what the router's p-values are measured against
    each : tokens for each expert of a token, beside the others
    """

    kind: str
    tokens: float
    experts: float | Router | None = None
    null: AnyNull | os.PathLike[str] | str | None = None
    each: float = 0


class Loaded(Protocol):
    """Cells that can tell what they take.

    subject, cells : as of Work
    kept_bytes : of memory beside the model, for as long as the cells are run
    """

    @property
    def subject(self) -> Subject: ...

    @property
    def cells(self) -> Sequence[Cell]: ...

    @property
    def kept_bytes(self) -> int: ...

    def planned(self) -> Sequence[Cell]:
        """All cells, also those that are named when others are finished."""
        ...

    def load(self, cell: Cell) -> Sequence[Load]:
        """What running it takes, as far as that can be told before."""
        ...
