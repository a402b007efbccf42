"""The safetensors files of a checkpoint, read one tensor or a part of one at a time."""

import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

CHECKSUMS = "moeprof_checksums"  # in the metadata of each file: {tensor of any of them: its CRC-32}


class Checkpoint:
    """The tensors of a checkpoint by their names.

    Files are read where safetensors can do that (0.8): a file that is mapped into memory counts
    as memory of the process, and these are larger than what is made of them.

    Parameters
    ----------
    folder
        Holds ``<stem>.safetensors``, or several files and ``<stem>.safetensors.index.json``.
    stem
        How the files begin.

    Raises
    ------
    FileNotFoundError
        Where neither is there.
    ValueError
        For a file that is no safetensors file, or that is cut off; one that the index names and
        that is not there.
    """

    def __init__(self, folder: Path, stem: str = "model"):
        self.folder = folder
        files = _files(folder, stem)
        self._open = {file.name: _opened(file) for file in files}
        self._at = {name: file for file in self._open for name in self._open[file].keys()}
        with _damage(files[0]):
            self._sums: dict[str, int] = json.loads(self.metadata.get(CHECKSUMS, "{}"))

    @property
    def names(self) -> list[str]:
        """Of all tensors."""
        return [*self._at]

    @property
    def metadata(self) -> dict[str, str]:
        """What the first file says beside its tensors."""
        return next(iter(self._open.values())).metadata() or {}

    def __contains__(self, name: str) -> bool:
        return name in self._at

    def tensor(self, name: str) -> Tensor:
        """A whole tensor, at an address that is good for computing: as read it may lie anywhere.

        ValueError where it isn't the one that was saved.
        """
        file = self.folder / self._at[name]
        with _damage(file):
            read: Tensor = self._open[self._at[name]].get_tensor(name)
        if self._sums and self._sums.get(name) != checksum(read):
            raise ValueError(
                f"{file}: {name} is not what was saved with {next(iter(self._open))}: the file "
                "is damaged, or of another model; copy the whole folder again"
            )
        return read.clone()

    def part(self, name: str, number: int) -> Tensor:
        """Of a tensor of all experts (E, ...), that of one, (1, ...)."""
        with _damage(self.folder / self._at[name]):
            read: Tensor = self._open[self._at[name]].get_slice(name)[number : number + 1]
        return read


def checksum(tensor: Tensor) -> int:
    """CRC-32 of a tensor's bytes: safetensors has none, and other weights would go unseen."""
    return zlib.crc32(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def has_weights(folder: Path, stem: str = "model") -> bool:
    """Are there such files in the folder?"""
    return any((folder / f"{stem}.safetensors{end}").is_file() for end in ("", ".index.json"))


def _files(folder: Path, stem: str) -> list[Path]:
    index = folder / f"{stem}.safetensors.index.json"
    if not index.is_file():
        return [folder / f"{stem}.safetensors"]
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        files = [folder / Path(name).name for name in names]
        if not files:
            raise ValueError("it names no file")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{index}: no index of safetensors files") from error
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing, which {index.name} names")
    return files


def _opened(file: Path) -> Any:
    with _damage(file):
        try:
            return safe_open(file, framework="pt", backend="pread")
        except TypeError:  # of a version that can only map
            return safe_open(file, framework="pt")


@contextmanager
def _damage(file: Path) -> Iterator[None]:
    """What safetensors raises is said with the file's name."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f"{file}: no such file") from None
    except Exception as error:  # its own class, or of the system
        raise ValueError(
            f"{file}: no whole safetensors file ({error}): it is damaged, cut off, or something "
            "else"
        ) from error
