"""One benchmark: measured, printed, and written where that is asked for."""

from __future__ import annotations

import importlib
import io
import json
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import check_folder, write_whole
from ..measure import machine
from ..show.console import make_console, progress, width

if TYPE_CHECKING:
    from .settings import Settings


def run(settings: Settings, json_file: str | None = None, plot_file: str | None = None) -> None:
    """Run the benchmark that the settings name.

    Raises
    ------
    ValueError, OSError
        For a file that can't be written, before anything is measured; for a shape that does
        not fit the memory.
    """
    _check_file(json_file)
    _check_file(plot_file, ".png")
    module = importlib.import_module(f".{settings.benchmark}", __package__)
    console = make_console()
    with machine.threads(settings.threads):
        result: dict[str, Any] = {
            "benchmark": settings.benchmark,
            "machine": machine.describe(),
            "settings": settings._asdict() | {"shape": settings.shape._asdict()},
        }
        for line in _header(settings, result["machine"]):
            console.print(line)
        with progress(
            console, module.rounds(settings), settings.benchmark, "rounds", still=True
        ) as bar:
            result |= module.measure(settings, bar)
    for part in module.tables(result):
        console.print(part, width=width(console), soft_wrap=False)
    if json_file is not None:
        write_whole(json_file, json.dumps(result, indent=1).encode())
        console.print(f"Written: {json_file}")
    if plot_file is not None:
        image = io.BytesIO()
        module.figure(result).savefig(image, format="png")
        write_whole(plot_file, image.getvalue())
        console.print(f"Written: {plot_file}")


def _check_file(name: str | None, suffix: str = "") -> None:
    if name is None:
        return
    path = Path(name)
    if not path.name.endswith(suffix):
        raise ValueError(f"{path}: a plot ends in {suffix}")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{path}: no such folder {path.parent}")
    if path.exists() and not path.is_file():
        raise OSError(f"{path}: expected a file, this is a folder or a device")
    check_folder(path.parent)


def _header(settings: Settings, facts: dict[str, Any]) -> Iterator[str]:
    versions = facts["versions"]
    software = ("moeprof", "torch", "transformers")
    yield f"{settings.benchmark}: {machine.in_one_line(facts)}"
    pages = f"pages of {mmap.PAGESIZE >> 10} KB"
    yield f"{pages}, huge pages: {facts['huge_pages']}" if facts["huge_pages"] else pages
    yield ", ".join(f"{name} {versions[name]}" for name in software if name in versions)
    long = settings.rounds(129)
    rounds = f"{settings.repeats} round{'s' * (settings.repeats > 1)}"
    rounds += f", {long} above 128 tokens" if long > 1 else ""
    yield f"{settings.shape}, {settings.dtype or 'all dtypes'}; {rounds}"
