"""What the commands show: plain lines, and a bar for a person who waits."""

import importlib.util
from contextlib import contextmanager
from functools import cache

from ..files import printable

WIDTH = 100  # columns of the tables, and of a file or a pipe


@cache
def _console_class():
    """rich's Console, but of what is shown a terminal obeys nothing: names may be anybody's."""
    from rich.console import Console

    class Shown(Console):
        def render(self, renderable, options=None):
            for segment in super().render(renderable, options):
                clean = segment.control or segment.text.isprintable()
                yield segment if clean else segment._replace(text=printable(segment.text))

    return Shown


def make_console():
    """Lines on stdout as they are: not wrapped, no markup, no colours for numbers."""
    console = _console_class()(markup=False, emoji=False, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = WIDTH  # a file or a pipe has no width of its own
    return console


def text_console(file, width=WIDTH):
    """A console whose lines go to `file`, also in a notebook, where rich would display them."""
    return _console_class()(
        file=file, width=width, markup=False, emoji=False, highlight=False, force_jupyter=False
    )


class Bar:
    """A progress bar of `total` steps; `note` says what it is at."""

    def __init__(self, progress, name, total):
        self._progress = progress
        self._task = progress.add_task(name, total=total)
        self._refresh = not progress.live.auto_refresh

    def step(self):
        self._progress.update(self._task, advance=1, refresh=self._refresh)

    def note(self, text):
        self._progress.update(self._task, description=text, refresh=self._refresh)


@contextmanager
def progress(console, total, name, *, still=False):
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


def _has_widgets(console):
    """A notebook in which rich can draw."""
    return console.is_jupyter and importlib.util.find_spec("ipywidgets") is not None
