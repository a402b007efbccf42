"""The cells of a study in this process; several processes with one store share them out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..store.cells import Cell
    from ..store.store import Store
    from .engine import Listener
    from .work import Work


PAUSE = 0.2  # seconds between two looks at a cell that another process runs


class Serial:
    """Cells one after the other, here. One that another process runs is left to it."""

    def run(self, work: Work, cells: Sequence[Cell], store: Store, listener: Listener) -> None:
        """Until each of `cells` is in `store`; what others are running is waited for at the end."""
        waiting = list(cells)
        while waiting:
            left = [cell for cell in waiting if not self._run(work, cell, store, listener)]
            if len(left) == len(waiting):
                time.sleep(PAUSE)
            waiting = left

    def _run(self, work: Work, cell: Cell, store: Store, listener: Listener) -> bool:
        """Whether the cell is finished now."""
        ran = False

        def compute() -> dict[str, Any]:
            nonlocal ran
            ran = True
            listener.begin(cell)
            return work.run(cell, listener.step)

        result = store.run(cell, work.subject, compute)
        if result is None:
            return False
        if not ran:
            for _ in range(work.steps(cell)):
                listener.step()
        listener.done(cell, result, ran)
        return True
