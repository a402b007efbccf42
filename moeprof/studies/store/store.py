"""The store: a row for each finished cell, found again by a digest of all it depends on."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ...files import as_json
from .cells import Cell, Subject, key_of
from .claims import Claims

VERSION = 1  # of the table below
APPLICATION = 0x6D6F6570  # "moep": SQLite keeps it in the file's head
MAGIC = b"SQLite format 3\0"
WAIT = 60  # seconds for another process's writing
COLUMNS = {
    "key": "TEXT PRIMARY KEY",
    "kind": "TEXT NOT NULL",
    "name": "TEXT NOT NULL",
    "parameters": "TEXT NOT NULL",
    "model": "TEXT NOT NULL",
    "text": "TEXT NOT NULL",
    "null_": "TEXT NOT NULL",
    "code": "TEXT NOT NULL",
    "result": "TEXT NOT NULL",
    "checksum": "TEXT NOT NULL",
    "seconds": "REAL NOT NULL",
    "finished": "TEXT NOT NULL",
    "worker": "TEXT NOT NULL",
}
FULL = ("disk is full", "disk I/O error")


class Store:
    """Finished cells in one SQLite file, which several processes may use at once.

    path: the file, made with the first of them; beside it lie "<path>-wal" and "<path>-shm" while
    it is open, and "<path>.lock".

    A file that is damaged is set aside under another name, `set_aside`, and a new one begun.

    Raises
    ------
    OSError
        Where it can't be made or written.
    ValueError
        For a file that is no store, or of another version of moeprof.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.set_aside: Path | None = None
        if self.path.exists() and not self.path.is_file():
            what = "a folder" if self.path.is_dir() else "a device or a pipe"
            raise ValueError(f"store {self.path}: expected a file, this is {what}")
        lock = self.path.with_name(self.path.name + ".lock")
        if not lock.exists() and _is_no_database(self.path):
            raise ValueError(f"store {self.path}: expected a store, this is another file")
        with _in_words(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._claims = Claims.of(lock)
            with self._claims.alone():
                self._connection = self._open()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Finished cells are in the one file then."""
        self._connection.close()

    # ---- cells ----

    def find(self, cell: Cell, subject: Subject) -> dict[str, Any] | None:
        """The result of a finished cell, or None."""
        wanted = "SELECT result, checksum FROM cells WHERE key = ?"
        key = key_of(cell, subject)
        with _in_words(self.path):
            row = self._connection.execute(wanted, (key,)).fetchone()
        if row is None or _checksum(row[0], key) != row[1]:
            return None
        found: dict[str, Any] = json.loads(row[0])
        return found

    def run(
        self, cell: Cell, subject: Subject, compute: Callable[[], dict[str, Any]]
    ) -> dict[str, Any] | None:
        """The result of a cell: as stored, else what `compute` gives, which is then stored.

        None where another process is computing it just now.
        """
        found = self.find(cell, subject)
        if found is not None:
            return found
        with self.claim(cell, subject) as mine:
            if not mine:
                return None
            found = self.find(cell, subject)  # another may have finished it before we claimed it
            return self.keep(cell, subject, *_timed(compute)) if found is None else found

    @contextmanager
    def claim(self, cell: Cell, subject: Subject) -> Iterator[bool]:
        """Whether it is ours to run, as long as the context lasts and no process dies."""
        with self._claims.claim(key_of(cell, subject)) as mine:
            yield mine

    def keep(
        self,
        cell: Cell,
        subject: Subject,
        result: dict[str, Any],
        seconds: float,
        worker: str | None = None,
    ) -> dict[str, Any]:
        """Store a result; returns it as it will be read again. worker: who ran it."""
        text = json.dumps(result, ensure_ascii=False)
        key = key_of(cell, subject)
        row = (
            key,
            cell.kind,
            cell.name,
            json.dumps(as_json(cell.parameters), ensure_ascii=False, sort_keys=True),
            *subject,
            text,
            _checksum(text, key),
            seconds,
            datetime.now(timezone.utc).isoformat(timespec="seconds"),
            worker or f"{socket.gethostname()}:{os.getpid()}",
        )
        places = ", ".join("?" * len(COLUMNS))
        with _in_words(self.path, "; what was finished is kept"), self._connection:
            self._connection.execute(f"INSERT OR REPLACE INTO cells VALUES ({places})", row)
        stored: dict[str, Any] = json.loads(text)
        return stored

    def forget(self, cell: Cell, subject: Subject) -> None:
        """Drop a finished cell, so that it is run again."""
        with _in_words(self.path), self._connection:
            self._connection.execute("DELETE FROM cells WHERE key = ?", (key_of(cell, subject),))

    # ---- what there is ----

    def rows(self) -> list[dict[str, Any]]:
        """Every finished cell as a dict, in the order in which they were finished."""
        with _in_words(self.path):
            found = self._connection.execute("SELECT * FROM cells ORDER BY rowid").fetchall()
        rows = [dict(zip(COLUMNS, row, strict=True)) for row in found]
        for row in rows:
            row["null"] = row.pop("null_")
            row["damaged"] = not _is_sound(row)
            del row["checksum"]
            for name in ("parameters", "result"):
                row[name] = {} if row["damaged"] else json.loads(row[name])
        return rows

    def others(self, kind: str, subject: Subject) -> dict[str, int]:
        """{what differs: cells} of this kind that were measured on something else.

        Such cells stay, and are not used. A cell is counted under the first of model, text, null
        and code in which it differs.
        """
        names = ("model", "text", "null_", "code")
        query = f"SELECT {', '.join(names)} FROM cells WHERE kind = ?"
        found: dict[str, int] = {}
        with _in_words(self.path):
            rows = self._connection.execute(query, (kind,)).fetchall()
        for row in rows:
            differs = [n for n, a, b in zip(Subject._fields, row, subject, strict=True) if a != b]
            if differs:
                found[differs[0]] = found.get(differs[0], 0) + 1
        return found

    # ---- the file ----

    def _open(self) -> sqlite3.Connection:
        try:
            connection = self._checked()
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):  # of the file system, not of the file
                raise
            self.set_aside = _set_aside(self.path)
            connection = self._checked()
        return connection

    def _checked(self) -> sqlite3.Connection:
        """A connection to a sound file with the table in it."""
        connection = sqlite3.connect(self.path, timeout=WAIT)
        try:
            self._check(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _check(self, connection: sqlite3.Connection) -> None:
        def value(of: str) -> Any:
            return connection.execute(f"PRAGMA {of}").fetchone()[0]

        tables = connection.execute("SELECT name FROM sqlite_master").fetchall()
        if tables and value("application_id") != APPLICATION:
            raise ValueError(f"store {self.path}: expected a store of moeprof, this is another's")
        if tables and value("user_version") != VERSION:
            raise ValueError(
                f"store {self.path}: it is of version {value('user_version')} and this moeprof "
                f"reads {VERSION}: give another file, or use the moeprof that made it"
            )
        if (found := value("quick_check")) != "ok":
            raise sqlite3.DatabaseError(found)
        found_columns = [name for _, name, *_ in connection.execute("PRAGMA table_info(cells)")]
        if tables and found_columns != [*COLUMNS]:
            raise ValueError(
                f"store {self.path}: its table of cells isn't as moeprof made it: expected the "
                f"columns {', '.join(COLUMNS)}; give another file"
            )
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")  # what is finished is on the disk
        if not tables:
            with connection:
                connection.execute("BEGIN")  # Python begins none before these
                columns = ", ".join(f"{name} {kind}" for name, kind in COLUMNS.items())
                connection.execute(f"CREATE TABLE cells ({columns})")
                connection.execute(f"PRAGMA application_id = {APPLICATION}")
                connection.execute(f"PRAGMA user_version = {VERSION}")


def store_path(folder: str | os.PathLike[str], path: str | os.PathLike[str] | None = None) -> Path:
    """Where a command that writes to `folder` keeps its cells: `path`, where that is given."""
    return Path(folder) / "moeprof.sqlite" if path is None else Path(path)


def _is_no_database(path: Path) -> bool:
    """Does it hold something that doesn't begin as files of SQLite do? A store that is damaged may,
    but has its lock beside it."""
    try:
        with open(path, "rb") as file:
            head = file.read(len(MAGIC))
    except FileNotFoundError:
        return False
    return bool(head) and head != MAGIC


def _timed(compute: Callable[[], dict[str, Any]]) -> tuple[dict[str, Any], float]:
    begun = time.perf_counter()
    result = compute()
    return result, time.perf_counter() - begun


def _checksum(text: object, key: str) -> str:
    """Of a result and whose it is: SQLite notices a damaged page, but not a changed letter in a
    text, bytes in its place, nor the result of another cell."""
    return hashlib.sha256(f"{key}{text}".encode("utf-8", "surrogatepass")).hexdigest()


def _is_sound(row: dict[str, Any]) -> bool:
    """Is it as it was stored, as far as that can be told?"""
    seconds, *texts = row["seconds"], *(row[n] for n in row if n != "seconds")
    try:
        json.loads(row["parameters"])
    except (ValueError, TypeError):
        return False
    kinds = isinstance(seconds, float) and all(isinstance(text, str) for text in texts)
    # Rows of before December 2026 have a checksum without the key: of other code, so never found.
    return kinds and row["checksum"] in {_checksum(row["result"], key) for key in (row["key"], "")}


def _set_aside(path: Path) -> Path:
    """Rename a damaged store, and what SQLite keeps beside it; returns the new path."""
    stamp = datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S")
    number, aside = 1, path.with_name(f"{path.name}.damaged-{stamp}")
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.damaged-{stamp}-{number}")
    for suffix in ("-wal", "-shm"):
        with suppress(FileNotFoundError):
            os.rename(f"{path}{suffix}", f"{aside}{suffix}")
    os.rename(path, aside)
    return aside


@contextmanager
def _in_words(path: Path, kept: str = "") -> Iterator[None]:
    """What SQLite and the file system say, as an OSError that names the store; kept: what to add
    where the disk is full."""
    try:
        yield
    except sqlite3.OperationalError as error:
        added = kept if any(word in str(error) for word in FULL) else ""
        raise OSError(f"store {path}: {error}{added}") from error
    except sqlite3.DatabaseError as error:
        raise OSError(
            f"store {path}: {error}; run the command again, and the file will be set aside"
        ) from error
    except OSError as error:
        raise OSError(f"store {path}: {error.strerror or error}") from error
