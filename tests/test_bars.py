"""Progress bars: one display for all that runs at a time, on terminals and in notebooks."""

import io
import re

import pytest

from moeprof.show import console

pytestmark = pytest.mark.once


@pytest.fixture
def terminal():
    from rich.console import Console

    return Console(file=io.StringIO(), force_terminal=True, width=80)


def lines(terminal):
    """What was drawn, without colours and movements, line by line."""
    text = re.sub(r"\x1b\[[\d;?]*\w", "", terminal.file.getvalue())
    return [line.rstrip() for line in re.split(r"[\r\n]+", text) if line.strip()]


def test_a_bar_inside_another_is_a_line_below_it_while_it_lasts(terminal):
    with console.progress(terminal, 4, "outer", "texts", still=True) as outer:
        outer.step()
        with console.progress(terminal, 2.5, "inner", shown=False) as inner:
            inner.step(0.5)
            inner.step(2)
        outer.step()
    drawn = lines(terminal)
    last = max(i for i, line in enumerate(drawn) if line.startswith("inner"))
    assert re.match("outer .* 1/4 texts ", drawn[last - 1]) and re.match(
        "inner .* 2/2 ", drawn[last]
    )
    assert drawn[last + 1 :] and all(re.match("outer .* 2/4 ", line) for line in drawn[last + 1 :])
    assert max(map(len, drawn)) <= 80


@pytest.mark.parametrize("name", ["reduction: a router with a long name, equal, budget 3", "short"])
def test_a_narrow_screen_has_all_numbers(terminal, name):
    terminal.width = 60
    with console.progress(terminal, 5684, name, "windows", still=True) as bar:
        bar.step(1964)
    assert all(
        re.search(r" (0|1964)/5684 windows \d:\d\d:\d\d [-\d]:", line) for line in lines(terminal)
    )


def test_after_an_error_the_next_bar_is_one_of_its_own(terminal):
    with pytest.raises(ZeroDivisionError), console.progress(terminal, 1, "broken", still=True):
        raise ZeroDivisionError
    before = len(lines(terminal))
    with console.progress(terminal, 1, "next", still=True) as bar:
        bar.step()
    drawn = lines(terminal)[before:]
    assert drawn and all(line.startswith("next") for line in drawn)


def test_a_bar_for_nobody_draws_nothing(terminal):
    with console.progress(terminal, 3, "outer", still=True, shown=False) as bar:
        bar.note("somewhere")
        bar.step()
    assert not terminal.file.getvalue()


@pytest.mark.parametrize("seconds, drawn", [(0.4, False), (1.5, True)])
def test_a_notebook_without_widgets_shows_text(monkeypatch, seconds, drawn):
    """Where rich itself draws nothing; what is done within a second leaves no output."""
    now, shown = [0.0], []

    class Handle:
        def update(self, data, raw):
            assert raw
            shown.append(data["text/plain"])

    def display(data, raw, display_id):
        assert display_id
        Handle().update(data, raw)
        return Handle()

    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setattr(console.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("IPython.display.display", display)
    monkeypatch.setattr(console, "monotonic", lambda: now[0])
    console._class_in_cell.cache_clear()
    with console.progress(console.make_console(), 3, "sweep") as bar:
        for _ in range(2):
            now[0] += seconds
            bar.step()
    console._class_in_cell.cache_clear()
    if drawn:
        *bars, end = shown
        assert [bool(re.match(rf"sweep .* {i}/3 ", bars[i - 1])) for i in (1, 2)] == [True, True]
        assert end == ""
    else:
        assert shown == []
