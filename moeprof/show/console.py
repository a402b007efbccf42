"""What the commands show: plain lines, and a bar for a person who waits."""

from __future__ import annotations

import importlib.util
import shutil
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from io import StringIO
from time import monotonic
from typing import IO, TYPE_CHECKING, Any

from ..files import printable

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.progress import Progress, ProgressColumn, Task
    from rich.segment import Segment


MOST_COLUMNS = 100  # of a line of text or a table; a file, a pipe or a notebook has as many


def width(console: Console | None = None) -> int:
    """Columns of what is shown: the terminal's, MOST_COLUMNS at most, and no more than the
    console has."""
    columns = min(MOST_COLUMNS, shutil.get_terminal_size((MOST_COLUMNS, 0)).columns)
    return columns if console is None else min(columns, console.width)


def fill(text: str, first: str = "", rest: str = "") -> str:
    """The text in lines of `width()` columns; first, rest: what the first and the others begin
    with."""
    return textwrap.fill(text, width(), initial_indent=first, subsequent_indent=rest)


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
        console.width = MOST_COLUMNS
    return console


def text_console(file: IO[str], columns: int | None = None) -> Console:
    """A console whose lines go to `file`, also in a notebook, where rich would display them."""
    return _console_class()(
        file=file,
        width=columns or width(),
        markup=False,
        emoji=False,
        highlight=False,
        force_jupyter=False,
    )


def printed(parts: Iterable[Any], columns: int | None = None) -> str:
    """Sentences and rich tables as a console shows them, without blanks at the ends of lines."""
    out = StringIO()
    console = text_console(out, columns)
    for part in parts:
        console.print(part)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


class Bar:
    """A progress bar of `total` steps of a unit; `note` says what it is at. Without `progress`,
    nothing."""

    def __init__(
        self, progress: Progress | None, name: str, total: float | None, unit: str
    ) -> None:
        self._progress = progress
        if progress is not None:
            self._task = progress.add_task(name, total=total, unit=unit)

    def step(self, steps: float = 1) -> None:
        self._update(advance=steps)

    def note(self, text: str) -> None:
        self._update(description=text)

    def end(self) -> None:
        if self._progress is not None:
            self._progress.remove_task(self._task)

    def _update(self, **changes: Any) -> None:
        if self._progress is not None:
            still = not self._progress.live.auto_refresh
            self._progress.update(self._task, refresh=still, **changes)


_drawn: list[Progress] = []  # what holds the bars on the screen, if any are there


@contextmanager
def progress(
    console: Console,
    total: float | None,
    name: str,
    unit: str = "",
    *,
    still: bool = False,
    shown: bool = True,
) -> Iterator[Bar]:
    """A Bar for a person: on the console, or on stderr when only that is a terminal.

    total: None where only the end will tell; unit: what is counted, "windows". still: it is drawn
    at its steps only, so that no thread of it runs beside a measurement. shown: False for none.
    Inside another it is a line below that one, whatever `shown` says.
    """
    if _drawn or not shown:
        bar = Bar(_drawn[-1] if _drawn else None, name, total, unit)
        try:
            yield bar
        finally:
            bar.end()
        return
    with _bars(console, still) as bars:
        _drawn.append(bars)
        try:
            yield Bar(bars, name, total, unit)
        finally:
            _drawn.remove(bars)


def _bars(console: Console, still: bool) -> Progress:
    from rich.progress import (
        BarColumn,
        Progress,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.table import Column

    screen = console if console.is_terminal else _console_class()(stderr=True)
    in_cell = screen.is_jupyter and importlib.util.find_spec("ipywidgets") is None
    return (_class_in_cell() if in_cell else Progress)(
        _notes(),
        BarColumn(),
        *(
            column(table_column=Column(no_wrap=True))  # the others are cut on a narrow screen
            for column in (_steps_class(), TimeElapsedColumn, TimeRemainingColumn)
        ),
        console=screen,
        transient=True,
        auto_refresh=not (still or in_cell),
        disable=not (screen.is_terminal or screen.is_jupyter),
        redirect_stdout=screen is console,
    )


def _notes() -> ProgressColumn:
    from rich.progress import ProgressColumn
    from rich.text import Text

    class Notes(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(task.description, no_wrap=True, overflow="ellipsis")

    return Notes()


@cache
def _steps_class() -> type[ProgressColumn]:
    from rich.progress import MofNCompleteColumn
    from rich.text import Text

    class Steps(MofNCompleteColumn):
        """ "3/12 windows"; nothing of one step, or as long as it isn't known of how many."""

        def render(self, task: Task) -> Text:
            if task.total in (None, 1):
                return Text()
            return super().render(task).append(f" {task.fields['unit']}".rstrip())

    return Steps


@cache
def _class_in_cell() -> type[Progress]:
    """rich's Progress for a notebook without ipywidgets, where rich itself draws nothing."""
    from IPython import display
    from rich.progress import Progress

    show: Any = display.display  # without annotations

    class InCell(Progress):
        """Text in the cell's output, drawn anew at a step when a second has passed."""

        def start(self) -> None:
            self._last, self._handle = monotonic(), None

        def refresh(self) -> None:
            if monotonic() - self._last < 1:
                return
            self._last, text = monotonic(), StringIO()
            text_console(text).print(self.get_renderable())
            self._show(text.getvalue().rstrip())

        def stop(self) -> None:
            if self._handle is not None:
                self._show("")

        def _show(self, text: str) -> None:
            if self._handle is None:
                self._handle = show({"text/plain": text}, raw=True, display_id=True)
            else:
                self._handle.update({"text/plain": text}, raw=True)

    return InCell
