"""The command `moeprof cpu`: the CPU's features and the chosen kernels."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from ..backends.cpu import cpu_info
from ..show.console import fill

_THREADS = (
    "{} without torch; a model runs on as many as torch.get_num_threads() says (this command "
    "doesn't import torch)"
)
_PAGES = {
    "always": "always: all weights that are not read from a file in place lie on them",
    "madvise": "madvise: experts that moeprof quantised, of 32 MB and more, lie on them; torch's "
    "other tensors do where THP_MEM_ALLOC_ENABLE=1 is set (`moeprof inspect` says how much of a "
    "model does)",
    "never": "never: the system gives none",
    "": "not known on this system",
}
_POOL = "{} without torch; a model runs on torch's OpenMP where it can be used"


def declare(parser: argparse.ArgumentParser) -> None:
    """The options of `moeprof cpu`."""
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    for line in _lines(cpu_info()):
        print(line)


def _lines(info: dict[str, Any]) -> Iterator[str]:
    """Three columns: what is told, a kernel's name, and the value, in lines that fit the screen."""
    info = info | {"threads": _THREADS.format(info["threads"]), "pool": _POOL.format(info["pool"])}
    info["huge_pages"] = _PAGES.get(info["huge_pages"], info["huge_pages"])
    rows = []
    for name, value in info.items():
        items = value.items() if isinstance(value, dict) else [("", value)]
        for number, (key, item) in enumerate(items):
            text = ", ".join(item) if isinstance(item, list | tuple) else str(item)
            rows.append(("" if number else name, key, text))
    first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
    for name, key, text in rows:
        indent = f"{name:{first}}  {key:{second}}  " if key else f"{name:{first}}  "
        yield fill(text, indent, " " * len(indent)) or indent.rstrip()
