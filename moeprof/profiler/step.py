"""One call of the model while a profiler counts."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from torch import Tensor

from ..models.phases import PHASES, UNKNOWN
from ..models.routing import Routing
from ..patching.span import Span


class Step:
    """One call of the model: what its layers have in common, and what passes between hooks."""

    # Of all its tokens, or (T,) numbers in PHASES where they are of several
    phases: str | np.ndarray = UNKNOWN
    real: np.ndarray | None = None
    input_ids: Tensor | None = None
    previous: tuple[int, np.ndarray] | None = None  # the layer that ran last, its experts
    # of one layer, between its hooks:
    span: Span | None = None
    tokens = 0
    hidden: Any = None  # what the block was given
    output: Any = None  # of its router
    call: tuple[tuple[Any, ...], dict[str, Any]] | None = None  # of its experts
    hooked: object = None  # the LayerWatch's hooks that were in when the layer began
    rows: list[int] | None = None  # that the experts of a list got
    filled: list[int] | None = None  # those of them that are not all zero, in the first call

    def __init__(self, number: int, counted: bool, entered: bool, run: object):
        self.number, self.counted, self.entered, self.run = number, counted, entered, run
        self.calls: dict[int, int] = {}  # {layer: how often it was called}
        self._waiting: list[Callable[[], None]] = []

    def end_layer(self) -> None:
        """Forget what passed between the hooks of one layer."""
        self.span, self.hidden, self.output, self.call = None, None, None, None
        self.rows, self.filled = None, None

    def count(self, routing: Routing, how: Callable[[], None]) -> None:
        """Call `how`, which counts a routing: now, or at the end of the step where its tensors
        are on another device, since the host waits for that. Layers are counted in order."""
        if routing.chosen.is_cpu and not self._waiting:
            how()
        else:
            self._waiting.append(how)

    def end(self) -> None:
        """Count what was left for the end."""
        waiting, self._waiting = self._waiting, []
        for how in waiting:
            how()

    @property
    def phase(self) -> str:
        """Of most of its tokens."""
        if isinstance(self.phases, str):
            return self.phases
        return PHASES[np.bincount(self.phases).argmax()]

    def parts(self) -> Iterator[tuple[str, np.ndarray]]:
        """(phase, numbers of its tokens), of a step of several phases."""
        for number in np.unique(self.phases):
            yield PHASES[number], np.flatnonzero(self.phases == number)
