"""The folder that a study's files are written to, and where its cells are kept."""

from __future__ import annotations

import os
from pathlib import Path

from ...files import check_folder
from .store import store_path


class Folder:
    """The folder that files are written to; made with the first of them.

    store: where finished cells are kept; "moeprof.sqlite" in the folder when not given.
    OSError, before anything is run, when it can't be made or written to.
    """

    def __init__(
        self, folder: str | os.PathLike[str], store: str | os.PathLike[str] | None = None
    ) -> None:
        self.folder = Path(folder)
        self.store = store_path(folder, store)
        check_folder(self.folder)
