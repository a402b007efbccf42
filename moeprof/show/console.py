"""What the commands show: plain lines, and a bar for a person who waits."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import IO, TYPE_CHECKING

from ..files import printable

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.progress import Progress
    from rich.segment import Segment


WIDTH = 100  # columns of the tables, and of a file or a pipe


@cache
def _console_class() -> type[Console]:
    """rich's Console, but of what is shown a terminal obeys nothing: names may be anybody's."""
    from rich.console import Console

    class Shown(Console):
        def render(
            self, renderable: RenderableType, options: ConsoleOptions | None = None
        ) -> Iterator[Segment]:
            for segment in super().render(renderable, options):
                clean = segment.control or segment.text.isprintable()
                yield segment if clean else segment._replace(text=printable(segment.text))

    return Shown


def make_console() -> Console:
    """Lines on stdout as they are: not wrapped, no markup, no colours for numbers."""
    console = _console_class()(markup=False, emoji=False, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = WIDTH  # a file or a pipe has no width of its own
    return console


def text_console(file: IO[str], width: int = WIDTH) -> Console:
    """A console whose lines go to `file`, also in a notebook, where rich would display them."""
    return _console_class()(
        file=file, width=width, markup=False, emoji=False, highlight=False, force_jupyter=False
    )


class Bar:
    """A progress bar of `total` steps; `note` says what it is at."""

    def __init__(self, progress: Progress, name: str, total: int) -> None:
        self._progress = progress
        self._task = progress.add_task(name, total=total)
        self._refresh = not progress.live.auto_refresh

    def step(self) -> None:
        self._progress.update(self._task, advance=1, refresh=self._refresh)

    def note(self, text: str) -> None:
        self._progress.update(self._task, description=text, refresh=self._refresh)


@contextmanager
def progress(console: Console, total: int, name: str, *, still: bool = False) -> Iterator[Bar]:
    """A Bar for a person: on the console, or on stderr when only that is a terminal.

    still: it is drawn at its steps only, so that no thread of it runs beside a measurement.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    screen = console if console.is_terminal else _console_class()(stderr=True)
    shown = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=screen,
        transient=True,
        auto_refresh=not still,
        disable=not (screen.is_terminal or _has_widgets(screen)),
        redirect_stdout=screen is console,
    )
    with shown:
        yield Bar(shown, name, total)


def _has_widgets(console: Console) -> bool:
    """A notebook in which rich can draw."""
    return console.is_jupyter and importlib.util.find_spec("ipywidgets") is not None
