"""As many calls of `step` as were promised, for work whose amount is known only once it is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def steps_of(total: int, step: Callable[[], object]) -> Iterator[Callable[[], None]]:
    """A `step` for work of `total` steps at most; what it didn't need is made up for at its end."""
    calls = 0

    def counted() -> None:
        nonlocal calls
        calls += 1
        step()

    yield counted
    for _ in range(calls, total):
        step()
