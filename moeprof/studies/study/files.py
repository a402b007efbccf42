"""The folder of a study, and cells whose results are files in it."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..engine.load import Loaded
from ..engine.serial import PAUSE
from ..store.folder import Folder

if TYPE_CHECKING:
    from ..store.cells import Cell
    from ..store.store import Store


class StudyFiles(Folder):
    """The folder that a study writes to: a folder for each part, the report, the store."""

    def of(self, part: str) -> Path:
        """The folder of a part."""
        return self.folder / part


class FilesWork(Loaded, Protocol):
    """One cell, whose result names what it wrote to `folder`: {"files": `digests`, …}.

    It is run in the command's own process. The folder is among its parameters: of two studies with
    one store each has its own files.
    """

    folder: Path

    def run(self, cell: Cell, step: Callable[[], object]) -> dict[str, Any]: ...


def digests(folder: Path, paths: Iterable[Path]) -> dict[str, str]:
    """{path within the folder: SHA-256}."""
    return {path.relative_to(folder).as_posix(): _digest(path) for path in paths}


def finished(work: FilesWork, store: Store) -> dict[str, Any] | None:
    """The result of its cell, or None where that, or one of the files as written, isn't there."""
    (cell,) = work.cells
    found = store.find(cell, work.subject)
    return found if found is not None and _intact(work.folder, found["files"]) else None


def run_files(work: FilesWork, store: Store) -> dict[str, Any]:
    """The result of its cell; it is run unless it is finished."""
    (cell,) = work.cells
    if finished(work, store) is None:
        store.forget(cell, work.subject)
    while True:
        result = store.run(cell, work.subject, lambda: work.run(cell, lambda: None))
        if result is not None:
            return result
        time.sleep(PAUSE)  # another process writes them


def _intact(folder: Path, files: dict[str, str]) -> bool:
    paths = {folder / name: digest for name, digest in files.items()}
    return all(path.is_file() and _digest(path) == digest for path, digest in paths.items())


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
