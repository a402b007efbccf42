"""Writing files so that they appear whole or not at all."""

import os
import secrets
import tempfile
from contextlib import suppress
from pathlib import Path


def check_folder(folder: str | os.PathLike) -> None:
    """OSError unless files can be written to ``folder``, or it can be made; makes nothing."""
    existing = Path(folder).absolute()
    while not existing.exists():
        existing = existing.parent
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise OSError(f"output folder {folder} can't be written: {error.strerror}") from error


def write_whole(path: str | os.PathLike, data: bytes) -> None:
    """Write ``data`` to ``path``; the old file is there until the new one is complete.

    Raises
    ------
    OSError
        Naming ``path``; nothing is left behind.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # a device, a pipe: replaced, it would be gone
        raise OSError(f"{path}: expected a file, this is none that can be replaced")
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        part.write_bytes(data)
        os.replace(part, path)  # same folder, so atomic
    except OSError as error:  # says `path`, not the temporary name
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        with suppress(OSError):
            part.unlink()
