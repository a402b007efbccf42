"""What the parts of a profile know of it: `Profile` itself imports them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    import pandas
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from ..measure.roofline import Roofline
    from ..models.layer import Layer
    from ..profiler.tally import Counts
    from .metrics import LayerMetrics

Label = int | str  # what a layer is called, see models.names
Event = tuple[int, str, int, int, int, int]


class Profiled(Protocol):
    """The attributes and methods of `Profile`, where they are described."""

    layers: list[Layer]
    counts: dict[str, list[Counts]]
    facts: Any
    joint: list[Counts] | None
    domains: dict[str, NDArray[np.int64]] | None
    vocabulary: dict[str, Any] | None
    roofline: Roofline | None
    events: list[Event] | None

    @property
    def labels(self) -> list[Label]: ...

    @property
    def phases(self) -> list[str]: ...

    @property
    def decode_by_batch(self) -> list[dict[str, Any]]: ...

    @property
    def figures(self) -> list[str]: ...

    def place_of(self, layer: Label) -> int: ...

    def counts_of(self, phase: str | None = None) -> list[Counts]: ...

    def metrics(self, phase: str | None = None) -> dict[str, LayerMetrics]: ...

    def each(self, phase: str | None = None) -> list[LayerMetrics]: ...

    def load_balance_loss(self, phase: str | None = None) -> float: ...

    def load_balance_loss_by_layer(self, phase: str | None = None) -> float: ...

    def z_loss(self, phase: str | None = None) -> float: ...

    def domain_specialisation(self) -> pandas.DataFrame: ...

    def vocabulary_specialisation(self, minimum: int = 8, top: int = 10) -> pandas.DataFrame: ...

    def to_frame(self) -> pandas.DataFrame: ...

    def plot(self, name: str = "load", **options: Any) -> Figure: ...
