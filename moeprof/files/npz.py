"""Reading .npz files that may be damaged or anybody's: what is in them is checked before it is
read."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Header(NamedTuple):
    """What a member of an .npz says of its array before any of it is read."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


def read_npz(data: bytes, check: Callable[[dict[str, Header]], None]) -> dict[str, NDArray[Any]]:
    """The arrays of an .npz by name.

    Parameters
    ----------
    data : bytes
        Of the file.
    check : function of {name: Header}
        Raises ValueError where an array isn't one that is looked for. It is asked before the
        data of any array is unpacked: a small file can unpack to a very large one.

    Raises
    ------
    ValueError
        What `check` says, or that the file is damaged.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {m.filename.removesuffix(".npy"): m for m in archive.infolist()}
            if len(members) < len(archive.infolist()):
                raise ValueError("two arrays have one name")
            headers = {name: _header(archive, member) for name, member in members.items()}
            check(headers)
            return {name: _array(archive, member) for name, member in members.items()}
    # zipfile, its decompressors and NumPy's reader of headers (which parses Python literals)
    # raise more kinds than they list, TokenError and LZMAError among them. All of it is a
    # function of these bytes: whatever is raised, the bytes are wrong.
    except Exception as error:
        raise ValueError(str(error) or type(error).__name__) from error


def _header(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Header:
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"{member.filename}: .npy version {version}")
        name = f"read_array_header_{version[0]}_{version[1]}"
        shape, _, dtype = getattr(np.lib.format, name)(file)
        size = file.tell() + math.prod(shape) * dtype.itemsize
    if dtype.hasobject or min(shape, default=0) < 0 or size != member.file_size:
        raise ValueError(
            f"{member.filename}: {dtype} {shape} does not fit its {member.file_size} bytes"
        )
    return Header(shape, dtype)


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> NDArray[Any]:
    with archive.open(member) as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
        file.read()  # to the end, where the CRC is compared
    return array
