"""Writing files so that they appear whole or not at all."""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas


# Control characters but for the line feed, lone surrogates, the marks that turn the direction.
_OBEYED = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]"
)


def check_folder(folder: str | os.PathLike[str]) -> None:
    """OSError unless files can be written to ``folder``, or it can be made; makes nothing."""
    existing = Path(folder).absolute()
    while not existing.exists():
        existing = existing.parent
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise OSError(f"output folder {folder} can't be written: {error.strerror}") from error


@contextmanager
def alone(folder: Path) -> Iterator[bool]:
    """No other process, or thread, is in here for this folder meanwhile; waits. Yields whether
    that is so: where the system or the file system has no locks, nothing keeps them out."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield False
        return
    with ExitStack() as opened:
        while True:
            number = os.open(folder, os.O_RDONLY)
            opened.callback(os.close, number)
            try:
                fcntl.flock(number, fcntl.LOCK_EX)
            except OSError:
                yield False
                return
            folder.mkdir(parents=True, exist_ok=True)
            if os.path.samestat(os.fstat(number), folder.stat()):
                break  # else whoever was in here removed the folder
        yield True


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Write ``data`` to ``path``; the old file is there until the new one is on the disk.

    An old file's mode is kept. Where ``path`` is a symbolic link it stays one: what it points
    to is written.

    Raises
    ------
    OSError
        Naming ``path``, in words; nothing is left behind.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # a device, a pipe: replaced, it would be gone
        raise OSError(f"{path}: expected a file, this is none that can be replaced")
    target = Path(os.path.realpath(path))
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        with open(part, "xb") as file:
            if target.exists():
                os.chmod(part, stat.S_IMODE(target.stat().st_mode))
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)  # same folder, so atomic
        _sync_folder(target.parent)
    except OSError as error:  # says `path`, not the temporary name
        raise OSError(f"{path} can't be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            part.unlink()


@contextmanager
def as_opened(path: Path) -> Iterator[None]:
    """A new file that is written here by others has afterwards the mode that open() gives it."""
    path.open("xb").close()
    mode = stat.S_IMODE(path.stat().st_mode)
    yield
    os.chmod(path, mode)


def _sync_folder(folder: Path) -> None:
    """The new name is on the disk as well; not every system can be asked for that."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows
        return
    with suppress(OSError):
        number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def printable(text: str) -> str:
    """The text with "\ufffd" for what a terminal would obey instead of show.

    That is control characters but for the line feed, lone surrogates, and the marks that turn
    the direction of writing: a name in somebody's file may hold them.
    """
    return _OBEYED.sub("\ufffd", text)


def as_csv(frame: pandas.DataFrame) -> bytes:
    """A pandas table without its index, its texts as a terminal shows them, see `printable`."""
    return printable(frame.to_csv(index=False, lineterminator="\n")).encode()


def finite(value: Any) -> Any:
    """`value` with None for every NaN and infinity, as JSON has no word for them."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def as_json(value: Any) -> Any:
    """`value` as it comes back from a JSON file; what JSON doesn't know in words."""
    return json.loads(json.dumps(finite(_plain(value))))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic | np.ndarray):
        return _plain(value.tolist())
    return value if isinstance(value, str | int | float | bool | None) else str(value)
