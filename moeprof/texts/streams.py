"""Texts of any size: files, read in pieces, and what holds documents."""

from __future__ import annotations

import codecs
import io
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from .documents import holds_documents, read_documents

if TYPE_CHECKING:
    from types import TracebackType


BLOCK = 1 << 16  # bytes
PIECE = 1 << 16  # characters at most; some 30 windows of 512 tokens


class TextFiles:
    """The text of UTF-8 files in pieces of up to 65,536 characters, never a file whole.

    A piece ends after a blank line where the second half of it has one, else at a line's end,
    else at a space. Iterating again reads again. What `holds_documents` is read at the start and
    kept: each document is a piece.

    Regular files are read through once at the start, so that one that isn't text is told before
    hours of work; a pipe can't be. OSError for a file that can't be read, ValueError for one that
    isn't UTF-8 or has nothing in it; both name it.
    """

    def __init__(self, paths: Iterable[str | os.PathLike[str]]) -> None:
        self._parts = [
            [document.text for document in read_documents([path])]
            if holds_documents(path)
            else Path(path)
            for path in paths
        ]
        sizes = [_size(part) for part in self._parts]
        known = [size for size in sizes if size is not None]
        self.total_bytes = sum(known) if len(known) == len(sizes) else None
        for part, size in zip(self._parts, sizes, strict=True):
            if isinstance(part, Path) and size is not None:
                for _ in _pieces(part):
                    pass

    def __iter__(self) -> Iterator[str]:
        for part in self._parts:
            yield from _pieces(part) if isinstance(part, Path) else part


def _size(part: Path | list[str]) -> int | None:
    """Bytes of a regular file or of texts, None of a pipe."""
    if not isinstance(part, Path):
        return sum(len(text.encode("utf-8", "surrogatepass")) for text in part)
    with _opened(part):
        status = part.stat()
    return status.st_size if stat.S_ISREG(status.st_mode) else None


class _opened:
    """Errors of the file system, in the words of the command line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> _opened:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if isinstance(error, OSError):
            raise OSError(f"text {self.path} can't be read: {error.strerror}") from error


def _pieces(path: Path) -> Iterator[str]:
    rest, empty = "", True
    for text in _decoded(path):
        rest += text
        while len(rest) > PIECE:
            end = _end(rest)
            piece, rest = rest[:end], rest[end:]
            if piece.strip():
                empty = False
                yield piece
    if rest.strip():
        yield rest
    elif empty:
        raise ValueError(f"text {path} is empty")


def _end(text: str) -> int:
    """Where the first piece of `text` ends."""
    for mark in ("\n\n", "\n", " "):
        found = text.rfind(mark, PIECE // 2, PIECE)
        if found >= 0:
            return found + len(mark)
    return PIECE


def _decoded(path: Path) -> Iterator[str]:
    """The file's text block by block: every end of line a line feed, no byte order mark."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    lines = io.IncrementalNewlineDecoder(None, translate=True)
    done = 0
    with _opened(path), open(path, "rb") as file:
        while True:
            block = file.read(BLOCK)
            pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                byte = done - pending + error.start
                raise ValueError(f"text {path} isn't UTF-8 text (byte {byte})") from error
            yield lines.decode(text, final=not block)
            if not block:
                return
            done += len(block)
