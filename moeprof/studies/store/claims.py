"""Which process runs a cell: a lock on one byte of a file, which ends with its process.

A lock of the operating system can't be left behind: after `kill -9` it is free. So a store has
no rows "running", which nobody could tell from those of a process that is dead.
"""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

DIGITS = 15  # of a key, as hex: an offset below 2^60; two keys at one byte only wait for each other
OPENING = "0"  # the byte that is locked while a store is opened
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


class Claims:
    """The claims that this process has on the cells of one store.

    One object a file and process, kept until the process ends: a process gives up all its locks on
    a file when it closes any descriptor of it.
    """

    _of: dict[tuple[int, int], Claims] = {}
    _making = Lock()

    def __init__(self, number: int) -> None:
        self._number = number  # the descriptor
        self._held: set[str] = set()  # a lock doesn't keep out threads of its own process
        self._lock = Lock()
        self._opening = Lock()

    @classmethod
    def of(cls, path: Path) -> Claims:
        """The claims on a file, which is made where it isn't there."""
        with cls._making:
            if path.exists():
                status = path.stat()
                known = cls._of.get((status.st_dev, status.st_ino))
                if known is not None:
                    return known
            number = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            status = os.fstat(number)
            return cls._of.setdefault((status.st_dev, status.st_ino), cls(number))

    @contextmanager
    def claim(self, key: str) -> Iterator[bool]:
        """Whether the cell of this key is ours as long as the context lasts; doesn't wait."""
        mine = self._take(key)
        try:
            yield mine
        finally:
            if mine:
                self._give(key)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody else is in here at the same time; waits."""
        with self._opening:
            if fcntl is not None:
                self._locked(OPENING, wait=True)
            try:
                yield
            finally:
                self._give(OPENING)

    def _take(self, key: str) -> bool:
        with self._lock:
            if key in self._held:
                return False
            if fcntl is not None and not self._locked(key, wait=False):
                return False
            self._held.add(key)
            return True

    def _locked(self, key: str, wait: bool) -> bool:
        how = fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB)
        try:
            fcntl.lockf(self._number, how, 1, _offset(key))
        except OSError as error:
            if error.errno in NO_LOCKS:
                warnings.warn(
                    "the store lies on a file system without locks: two commands at once may both "
                    "run the same cell",
                    UserWarning,
                    stacklevel=4,
                )
                return True
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            raise
        return True

    def _give(self, key: str) -> None:
        with self._lock:
            self._held.discard(key)
            if fcntl is not None:
                with suppress(OSError):  # where there are no locks
                    fcntl.lockf(self._number, fcntl.LOCK_UN, 1, _offset(key))


def _offset(key: str) -> int:
    return int(key[:DIGITS], 16)
