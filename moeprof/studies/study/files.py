"""The folder of a study, and cells whose results are files in it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ...files import check_folder
from ..engine.engine import Listener
from ..engine.load import Loaded
from ..engine.serial import Serial
from ..store.store import store_path

if TYPE_CHECKING:
    from ..store.store import Store


class StudyFiles:
    """The folder that a study writes to: a folder for each part, the report, the store.

    store: where finished cells are kept; "moeprof.sqlite" in the folder when not given.
    OSError, before anything is run, when it can't be made or written to.
    """

    def __init__(
        self, folder: str | os.PathLike[str], store: str | os.PathLike[str] | None = None
    ) -> None:
        self.folder = Path(folder)
        self.store = store_path(folder, store)
        check_folder(self.folder)

    def of(self, part: str) -> Path:
        """The folder of a part."""
        return self.folder / part


class FilesWork(Loaded, Protocol):
    """Work of one cell, whose result names what it wrote to `folder`: {"files": `digests`, …}."""

    folder: Path


def digests(folder: Path, paths: Iterable[Path]) -> dict[str, str]:
    """{path within the folder: SHA-256}."""
    return {path.relative_to(folder).as_posix(): _digest(path) for path in paths}


def run_files(
    work: FilesWork, store: Store, step: Callable[[], object] = lambda: None
) -> dict[str, Any]:
    """The result of its cell, run again where its files aren't there as they were written."""
    (cell,) = work.cells
    found = store.find(cell, work.subject)
    if found is not None and not _intact(work.folder, found["files"]):
        store.forget(cell, work.subject)
    results: list[dict[str, Any]] = []
    listener = Listener(done=lambda cell, result, ran: results.append(result), step=step)
    Serial().run(work, [cell], store, listener)
    return results[0]


def _intact(folder: Path, files: dict[str, str]) -> bool:
    paths = {folder / name: digest for name, digest in files.items()}
    return all(path.is_file() and _digest(path) == digest for path, digest in paths.items())


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
