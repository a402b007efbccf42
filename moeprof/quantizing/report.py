"""What `quantize` did."""

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from ..files import printable

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class QuantizedPart:
    """A layer of experts, or a linear layer.

    layer : its qualified name
    format : of its weights afterwards, "q8", "q4" or a dtype
    bytes_before, bytes_after : of its weights
    error : the distance of its outputs from those before, by the norm of those; None: not measured
    note : why it was left as it is, or what else there is to say
    """

    layer: str
    format: str
    bytes_before: int
    bytes_after: int
    error: float | None = None
    note: str = ""


@dataclass(frozen=True, repr=False)
class QuantizeReport:
    """A row for each layer that was quantised or left; a table where it is shown or printed.

    To undo it, load the model again: the weights that it had are gone.
    """

    layers: list[QuantizedPart] = field(default_factory=list)

    @property
    def bytes_before(self) -> int:
        return sum(row.bytes_before for row in self.layers)

    @property
    def bytes_after(self) -> int:
        return sum(row.bytes_after for row in self.layers)

    def to_frame(self) -> "pandas.DataFrame":
        """A pandas table with a row a layer and the fields of `QuantizedPart` as columns."""
        import pandas

        names = list(QuantizedPart.__dataclass_fields__)
        return pandas.DataFrame([asdict(row) for row in self.layers], columns=names)

    def __str__(self) -> str:
        rows = [
            (
                row.layer,
                row.format,
                *_megabytes(row.bytes_before, row.bytes_after),
                "not measured" if row.error is None else f"{row.error:.2e}",
                row.note,
            )
            for row in self.layers
        ]
        rows.append(("all", "", *_megabytes(self.bytes_before, self.bytes_after), "", ""))
        lines = [("layer", "format", "MB before", "MB after", "error", ""), *rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        left = (True, True, False, False, False, True)
        return printable(
            "\n".join(
                "  ".join(
                    cell.ljust(width) if by_left else cell.rjust(width)
                    for cell, width, by_left in zip(line, widths, left, strict=True)
                ).rstrip()
                for line in lines
            )
        )

    __repr__ = __str__


def _megabytes(*sizes: int) -> list[str]:
    return [f"{size / 1e6:,.3f}" if size < 1e7 else f"{size / 1e6:,.1f}" for size in sizes]
