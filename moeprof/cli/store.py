"""The arguments of `moeprof store`, and the command itself."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path


def declare(parser: argparse.ArgumentParser) -> None:
    """The options of `moeprof store`."""
    parser.add_argument("file", metavar="FILE", help="as a study's --store, or moeprof.sqlite")
    parser.add_argument(
        "--export",
        metavar="TABLE",
        help="write all cells to this .csv, .json or .parquet file; only the .json has what is "
        "inside of results, such as sums by document",
    )
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    from ..show.console import make_console
    from ..studies.store.export import check_suffix, export
    from ..studies.store.store import Store

    path = Path(arguments.file)
    if not path.exists():
        raise FileNotFoundError(f"store {path}: no such file")
    if path.is_file() and not path.stat().st_size:
        raise ValueError(f"store {path}: expected a store of moeprof, this file is empty")
    if arguments.export is not None:
        check_suffix(Path(arguments.export))
    console = make_console()
    with Store(path) as store:
        if store.set_aside is not None:
            raise ValueError(f"store {path}: it is damaged, and kept as {store.set_aside}")
        rows = store.rows()
        console.print(f"Finished cells: {len(rows)}")
        for kind, count in Counter(row["kind"] for row in rows).items():
            of_kind = [row for row in rows if row["kind"] == kind and not row["damaged"]]
            seconds = sum(row["seconds"] for row in of_kind)
            console.print(f"  {kind}: {count}, measured in {seconds:.0f} s")
        for what in ("model", "text", "null", "code"):
            if (different := len({row[what] for row in rows})) > 1:
                console.print(f"  of {different} different values of {what}")
        if damaged := sum(row["damaged"] for row in rows):
            console.print(f"  {damaged} of them damaged: they are run again when they are needed")
        if arguments.export is not None:
            console.print(f"Written: {export(store, arguments.export)}")
