"""Null files: arrays, and the facts about them as JSON, in .safetensors or .npz."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ..backends.spec import BINS, LARGEST
from ..checks import check_type
from ..files import write_whole
from ..files.npz import read_npz

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..files.npz import Header


FORMAT, VERSION = "moeprof-null", 2
SUFFIXES = (".safetensors", ".npz")
MOST = 4096  # layers or experts of a model: far above any there is
FACTS_BYTES = 1 << 20
Made = TypeVar("Made")


def _suffix(path: Path) -> str:
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: a null file ends in .safetensors or .npz")
    return path.suffix


def _checksum(arrays: Mapping[str, NDArray[Any]]) -> str:
    """SHA-256 over the arrays: safetensors has no checksum, and a changed count would go unseen."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


def _sealed(facts: str) -> str:
    """The facts after their SHA-256, in .safetensors: .npz has a CRC over every member.

    In one string, for safetensors writes several entries of its metadata in any order.
    """
    return f"{hashlib.sha256(facts.encode('utf-8', 'surrogatepass')).hexdigest()} {facts}"


def _unsealed(sealed: str) -> str:
    if sealed.startswith("{"):
        return sealed  # of version 1, which is then refused
    facts = sealed.partition(" ")[2]
    if sealed != _sealed(facts):
        raise ValueError("the checksum of its facts differs")
    return facts


def write_null(
    path: str | os.PathLike[str], arrays: Mapping[str, NDArray[Any]], facts: Mapping[str, Any]
) -> None:
    """Write {name: array} and {name: value} to `path`, as a whole or not at all.

    Raises ValueError for another suffix, OSError where the folder can't be written.
    """
    path = Path(path)
    suffix = _suffix(path)
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    said = json.dumps({"version": VERSION, "checksum": _checksum(arrays), **facts})
    write_whole(path, _pack(arrays, said, suffix))


def read_null(
    path: str | os.PathLike[str], make: Callable[[dict[str, NDArray[Any]], dict[str, Any]], Made]
) -> Made:
    """make(arrays, facts) of a file of `write_null`.

    Raises FileNotFoundError, or ValueError naming the file when it is not a null, is damaged,
    truncated or of another format version, or when `make` finds that its parts don't fit.
    """
    check_type("null: path", path, (str, os.PathLike), "the path of a saved null")
    path = Path(path)
    suffix = _suffix(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such null file: {path}")
    data = path.read_bytes()
    try:
        arrays, facts = _unpack(data, suffix)
        if facts["version"] != VERSION:
            raise ValueError(
                f"format version {facts['version']}; fit it again with `moeprof calibrate`"
            )
        if facts["checksum"] != _checksum(arrays):
            raise ValueError("its checksum differs")
        return make(arrays, facts)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: expected a whole moeprof null of format version {VERSION}: {error}"
        ) from error


def _pack(arrays: dict[str, NDArray[Any]], facts: str, suffix: str) -> bytes:
    """The bytes of a file: the arrays, and the facts as JSON under the name of the format."""
    if suffix == ".safetensors":
        from safetensors.numpy import save

        return save(arrays, {FORMAT: _sealed(facts)})
    buffer = io.BytesIO()
    members: dict[str, Any] = {**arrays, FORMAT: np.array(facts)}
    np.savez_compressed(buffer, **members)
    return buffer.getvalue()


def _load_safetensors(data: bytes) -> dict[str, NDArray[Any]]:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        return load(data)
    except SafetensorError as error:
        raise ValueError(str(error)) from error


def _unpack(data: bytes, suffix: str) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """(arrays, facts) of a file's bytes; ValueError whatever is wrong with them."""
    try:
        if suffix == ".safetensors":
            arrays = _load_safetensors(data)  # first: it checks the header
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            return arrays, json.loads(_unsealed(header["__metadata__"][FORMAT]))
        arrays = read_npz(data, _check_members)
        return arrays, json.loads(str(arrays.pop(FORMAT)))
    except KeyError as error:
        raise ValueError(f"it has no {error}") from error
    except (MemoryError, RecursionError) as error:  # of JSON nested without end
        raise ValueError(str(error)) from error


def _check_members(headers: dict[str, Header]) -> None:
    """ValueError unless the arrays are a null's, of sizes that fit each other."""
    known = {"counts", "largest", "router_sample", FORMAT}
    if missing := sorted(known - set(headers)):
        raise ValueError(f"it has no {missing[0]!r}")
    if foreign := sorted(set(headers) - known):
        raise ValueError(f"it has an array {foreign[0]!r}, which no null has")
    counts, largest, sample = (headers[n].shape for n in ("counts", "largest", "router_sample"))
    fits = (
        len(counts) == len(largest) == 3
        and len(sample) == 2
        and counts[2] == BINS
        and largest[:2] == counts[:2]
        and largest[2] <= LARGEST
        and sample[0] == counts[0]
        and max(*counts[:2], sample[1]) <= MOST
        and headers[FORMAT].shape == ()
        and headers[FORMAT].dtype.itemsize <= 4 * FACTS_BYTES
    )
    if not fits:
        raise ValueError(f"arrays of {counts}, {largest} and {sample} do not belong together")
