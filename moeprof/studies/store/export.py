"""What a store holds as a table: a row for each finished cell."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...files import as_csv, finite, write_whole

if TYPE_CHECKING:
    import pandas

    from .store import Store


COLUMNS = ("kind", "name", "seconds", "finished", "worker", "model", "text", "null", "code")
SUFFIXES = (".csv", ".json", ".parquet")


def frame(store: Store) -> pandas.DataFrame:
    """A pandas table: COLUMNS, then `parameters` as JSON, then a column for each value.

    Values are those of the results that are one number, one word or none; lists and what is
    inside of results stand in the JSON export only. Damaged rows are left out.
    """
    import pandas

    rows = []
    for row in _sound(store):
        values = {k: v for k, v in row["result"].items() if not isinstance(v, dict | list)}
        about = {name: row[name] for name in COLUMNS}
        about["parameters"] = json.dumps(row["parameters"], ensure_ascii=False)
        rows.append(about | {f"result_{k}" if k in about else k: v for k, v in values.items()})
    return pandas.DataFrame(rows, columns=None if rows else [*COLUMNS, "parameters"])


def export(store: Store, path: str | os.PathLike[str]) -> Path:
    """Write the cells to `path`, a .csv, .json or .parquet file; the JSON has the whole results.

    ValueError for another suffix, ImportError without pyarrow for .parquet, OSError where it
    can't be written.
    """
    path = Path(path)
    write_whole(path, _content(store, check_suffix(path)))
    return path


def check_suffix(path: Path) -> str:
    """The suffix of a file that `export` can write, else ValueError."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"export {path}: expected a file that ends in {', '.join(SUFFIXES)}")
    return path.suffix


def _content(store: Store, suffix: str) -> bytes:
    if suffix == ".json":
        text = json.dumps(finite(_sound(store)), indent=1, ensure_ascii=False, allow_nan=False)
        return text.encode("utf-8", "surrogatepass") + b"\n"
    if suffix == ".csv":
        return as_csv(frame(store))
    try:
        import pyarrow  # noqa: F401 - pandas would name another package as well
    except ImportError:
        raise ImportError(
            "a .parquet file needs pyarrow, which isn't installed: pip install 'moeprof[records]'"
        ) from None
    buffer = io.BytesIO()
    table = frame(store)
    # A column may have a number in one kind of study and a word in another.
    mixed = [n for n in table.columns if len({type(v) for v in table[n].dropna()}) > 1]
    table.astype(dict.fromkeys(mixed, "string")).to_parquet(buffer, index=False)
    return buffer.getvalue()


def _sound(store: Store) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in row.items() if k != "damaged"}
        for row in store.rows()
        if not row["damaged"]
    ]
