"""The store of finished cells: found again, never mixed, never lost, run by one process alone."""

import errno
import hashlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading

import pytest

from moeprof.cli import main
from moeprof.studies.store.cells import Cell, Subject, key_of
from moeprof.studies.store.store import Store

pytestmark = pytest.mark.once

SUBJECT = Subject("m" * 64, "t" * 64, "n" * 64, "moeprof 1")
CELL = Cell("sweep", "bh 0.3", {"router": {"name": "bh", "alpha": 0.3}, "new_tokens": 20})


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cells.sqlite"


def execute(path, statement):
    """By SQLite itself, as another program may."""
    with sqlite3.connect(path) as connection:
        connection.execute(statement)
    connection.close()


def test_a_cell_is_run_once_and_found_by_another_store(path):
    result = {"perplexity": 0.1 + 0.2, "by_layer": [1, None], "nan": float("inf")}
    with Store(path) as store:
        assert store.find(CELL, SUBJECT) is None
        assert store.run(CELL, SUBJECT, lambda: result) == result
        assert store.run(CELL, SUBJECT, lambda: 1 / 0) == result
    with Store(path) as store:
        assert store.find(CELL, SUBJECT) == result
        (row,) = store.rows()
    assert row["name"] == CELL.name and row["parameters"] == CELL.parameters
    assert row["worker"].endswith(f":{os.getpid()}") and row["seconds"] >= 0


def test_the_name_is_a_label_and_all_else_is_the_key():
    assert key_of(CELL._replace(name="another"), SUBJECT) == key_of(CELL, SUBJECT)
    others = [
        key_of(CELL._replace(kind="compare"), SUBJECT),
        key_of(CELL._replace(parameters={**CELL.parameters, "new_tokens": 21}), SUBJECT),
        *(key_of(CELL, SUBJECT._replace(**{field: "x"})) for field in Subject._fields),
    ]
    assert len({key_of(CELL, SUBJECT), *others}) == 1 + len(others)


@pytest.mark.parametrize("field", Subject._fields)
def test_another_subject_is_noticed_and_not_used(path, field):
    other = SUBJECT._replace(**{field: "another"})
    with Store(path) as store:
        store.run(CELL, SUBJECT, lambda: {"x": 1})
        assert store.others("sweep", SUBJECT) == {}
        assert store.others("sweep", other) == {field: 1}
        assert store.others("compare", other) == {}
        assert store.find(CELL, other) is None
        store.run(CELL, other, lambda: {"x": 2})
        assert [row["result"]["x"] for row in store.rows()] == [1, 2]


def test_what_raises_leaves_no_row_and_can_be_run_again(path):
    with Store(path) as store:
        with pytest.raises(ZeroDivisionError):
            store.run(CELL, SUBJECT, lambda: 1 / 0)
        assert store.rows() == []
        assert store.run(CELL, SUBJECT, lambda: {"x": 1}) == {"x": 1}


HOLD = """
import sys, time
from moeprof.studies.store.cells import Cell, Subject
from moeprof.studies.store.store import Store
store = Store(sys.argv[1])
def compute():
    print("claimed", flush=True)
    time.sleep(600)
for number in range(3):
    cell = Cell("sweep", str(number), {"number": number})
    store.run(cell, Subject("m", "t", "n", "c"), compute if number == 2 else lambda: {"n": 0})
"""


def test_kill_9_loses_the_running_cell_alone(path):
    """Until then no other process runs it; after, it can be run at once."""
    holder = subprocess.Popen([sys.executable, "-c", HOLD, path], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "claimed\n"
        running = Cell("sweep", "2", {"number": 2})
        with Store(path) as store:
            assert store.run(running, Subject("m", "t", "n", "c"), lambda: 1 / 0) is None
            holder.send_signal(signal.SIGKILL)
            holder.wait()
            assert [row["name"] for row in store.rows()] == ["0", "1"]
            assert store.run(running, Subject("m", "t", "n", "c"), lambda: {"n": 1}) == {"n": 1}
    finally:
        holder.kill()
        holder.stdout.close()


SHARE = """
import sys
from moeprof.studies.store.cells import Cell, Subject
from moeprof.studies.store.store import Store
store, ran = Store(sys.argv[1]), 0
def compute():
    global ran
    ran += 1
    return {"n": 1}
left = list(range(200))
while left:
    left = [n for n in left
            if not store.run(Cell("k", "", {"n": n}), Subject("m", "t", "n", "c"), compute)]
print(ran)
"""


def test_processes_share_the_cells_out(path):
    command = [sys.executable, "-c", SHARE, path]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    ran = [int(process.communicate(timeout=120)[0]) for process in both]
    assert sum(ran) == 200
    with Store(path) as store:
        assert len(store.rows()) == 200


def test_threads_share_them_out_as_well(path):
    ran = []

    def work():
        with Store(path) as store:
            left = list(range(50))
            while left:
                cells = [Cell("k", "", {"n": n}) for n in left]
                found = [
                    store.run(c, SUBJECT, lambda n=n: ran.append(n) or {"n": 1})
                    for n, c in zip(left, cells, strict=True)
                ]
                left = [n for n, result in zip(left, found, strict=True) if result is None]

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(ran) == list(range(50))


def overwritten(path, start, size):
    with open(path, "r+b") as file:
        file.seek(start)
        file.write(b"\xa5" * size)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b"this is no database" * 100),
        lambda path: overwritten(path, 0, 100),
        lambda path: overwritten(path, 4096, 4096),
        lambda path: os.truncate(path, os.path.getsize(path) // 2),
    ],
    ids=["text", "head", "a page", "cut"],
)
def test_a_damaged_store_is_set_aside_and_kept(path, damage):
    with Store(path) as store:
        for number in range(50):
            cell = Cell("sweep", "", {"n": number})
            store.run(cell, SUBJECT, lambda: {"x": list(range(500))})
    damage(path)
    content = path.read_bytes()
    with Store(path) as store:
        assert store.set_aside is not None and store.set_aside.read_bytes() == content
        assert store.rows() == []
        store.run(CELL, SUBJECT, lambda: {"x": 1})
    with Store(path) as store:
        assert store.set_aside is None and len(store.rows()) == 1


def test_a_changed_letter_of_a_result_is_noticed(path):
    """SQLite itself has no checksum over what it keeps."""
    with Store(path) as store:
        store.run(CELL, SUBJECT, lambda: {"perplexity": 12.5})
    execute(path, "UPDATE cells SET result = replace(result, '12.5', '12.6')")
    with Store(path) as store:
        assert store.find(CELL, SUBJECT) is None
        assert store.rows()[0]["damaged"]
        assert store.run(CELL, SUBJECT, lambda: {"perplexity": 12.5}) == {"perplexity": 12.5}
        (row,) = store.rows()
        assert not row["damaged"] and row["result"] == {"perplexity": 12.5}


def test_the_result_of_another_cell_is_noticed(path):
    other = CELL._replace(parameters={"n": 2})
    with Store(path) as store:
        store.run(CELL, SUBJECT, lambda: {"x": 1})
        store.run(other, SUBJECT, lambda: {"x": 2})
    execute(
        path,
        "UPDATE cells SET (result, checksum) = "
        "(SELECT result, checksum FROM cells WHERE rowid = 2)",
    )
    with Store(path) as store:
        assert [row["damaged"] for row in store.rows()] == [True, False]
        assert store.run(CELL, SUBJECT, lambda: {"x": 1}) == {"x": 1}
        assert store.find(other, SUBJECT) == {"x": 2}


def test_a_row_whose_checksum_leaves_out_the_key_is_still_shown(path):
    """As rows were kept before December 2026."""
    with Store(path) as store:
        store.run(CELL, SUBJECT, lambda: {"x": 1})
    old = hashlib.sha256(b'{"x": 1}').hexdigest()
    execute(path, f"UPDATE cells SET checksum = '{old}'")
    with Store(path) as store:
        (row,) = store.rows()
        assert not row["damaged"] and row["result"] == {"x": 1}
        assert store.find(CELL, SUBJECT) is None


@pytest.mark.parametrize(
    "change", ["result = x'ff00'", "parameters = '{'", "seconds = 'abc'", "name = x'ff'"]
)
def test_a_row_edited_by_hand_is_a_damaged_one(path, change, capsys):
    with Store(path) as store:
        store.run(CELL, SUBJECT, lambda: {"x": 1})
    execute(path, f"UPDATE cells SET {change}")
    assert main(["store", str(path)]) == 0 and "1 of them damaged" in capsys.readouterr().out
    with Store(path) as store:
        assert store.run(CELL, SUBJECT, lambda: {"x": 1}) == {"x": 1}


def test_what_stops_a_store_while_it_is_made_leaves_none(path, monkeypatch):
    class Stopped(sqlite3.Connection):
        def execute(self, query, *values):
            if query.startswith("PRAGMA application_id ="):
                raise KeyboardInterrupt
            return super().execute(query, *values)

    connect = sqlite3.connect
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sqlite3, "connect", lambda *a, **k: connect(*a, factory=Stopped, **k))
        Store(path)
    with Store(path) as store:
        assert store.set_aside is None and store.rows() == []


@pytest.mark.parametrize("change", ["ADD COLUMN more TEXT", "RENAME COLUMN result TO found"])
def test_a_table_edited_by_hand_is_refused_and_named(path, change):
    with Store(path) as store:
        store.run(CELL, SUBJECT, lambda: {"x": 1})
    execute(path, f"ALTER TABLE cells {change}")
    with pytest.raises(ValueError, match=f"^store {path}: its table of cells isn't as moeprof"):
        Store(path)


def test_a_store_of_another_version_or_program_is_refused_and_untouched(path):
    Store(path).close()
    execute(path, "PRAGMA user_version = 7")
    content = path.read_bytes()
    with pytest.raises(ValueError, match="version 7.*reads 1"):
        Store(path)
    assert path.read_bytes() == content

    other = path.with_name("firefox.sqlite")
    execute(other, "CREATE TABLE places (url)")
    content = other.read_bytes()
    with pytest.raises(ValueError, match="another's"):
        Store(other)
    assert other.read_bytes() == content


def test_what_the_file_system_refuses_is_one_error_with_the_path(path, tmp_path):
    with pytest.raises(ValueError, match="this is a folder"):
        Store(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe: expected a file"):
        Store(tmp_path / "pipe")
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file/x\.sqlite"):
        Store(tmp_path / "file" / "x.sqlite")


def test_a_full_disk_loses_nothing_that_was_finished(path):
    with Store(path) as store:
        store.run(CELL, SUBJECT, lambda: {"x": 1})
        (pages,) = store._connection.execute("PRAGMA page_count").fetchone()
        store._connection.execute(f"PRAGMA max_page_count = {pages}")
        big = CELL._replace(parameters={"n": 2})
        with pytest.raises(OSError, match="full; what was finished is kept"):
            store.run(big, SUBJECT, lambda: {"x": "y" * 100_000})
        assert [row["result"] for row in store.rows()] == [{"x": 1}]
        store._connection.execute("PRAGMA max_page_count = 1000000")
        store.run(big, SUBJECT, lambda: {"x": "y"})
    with Store(path) as store:
        assert len(store.rows()) == 2


def test_a_store_that_cannot_be_made_kept_nothing(path, monkeypatch):
    def refuse(*_, **__):
        raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr(sqlite3, "connect", refuse)
    with pytest.raises(OSError, match="disk I/O error$"):
        Store(path)


def test_a_file_system_without_locks_is_said(path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with pytest.warns(UserWarning, match="without locks"):
        with Store(path) as store:
            assert store.run(CELL, SUBJECT, lambda: {"x": 1}) == {"x": 1}


def test_what_json_has_no_word_for_is_refused(path):
    with Store(path) as store:
        with pytest.raises(TypeError):
            store.run(CELL, SUBJECT, lambda: {"x": object()})
        assert store.rows() == []


@pytest.mark.parametrize("suffix", ["csv", "json", "parquet"])
def test_export(path, tmp_path, suffix, capsys):
    pandas = pytest.importorskip("pandas")
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    with Store(path) as store:
        result = {"perplexity": 12.5, "name": "inside", "mixed": 1, "by_layer": [1.5, 2.5]}
        store.run(CELL, SUBJECT, lambda: result)
        other = Cell("compare", "static", {"k": 2})
        store.run(other, SUBJECT, lambda: {"mixed": "word", "nan": float("nan")})
    table = tmp_path / f"table.{suffix}"
    assert main(["store", str(path), "--export", str(table)]) == 0
    said = capsys.readouterr().out
    assert "Finished cells: 2" in said and "sweep: 1" in said and str(table) in said
    if suffix == "json":
        rows = json.loads(table.read_text())
        assert [row["result"] for row in rows] == [result, {"mixed": "word", "nan": None}]
        assert rows[0]["parameters"] == CELL.parameters
        return
    read = pandas.read_csv if suffix == "csv" else pandas.read_parquet
    rows = read(table)
    assert rows["kind"].tolist() == ["sweep", "compare"] and rows["perplexity"][0] == 12.5
    assert rows["name"].tolist() == [CELL.name, "static"] and rows["result_name"][0] == "inside"
    assert rows["mixed"].tolist() == ["1", "word"]
    assert json.loads(rows["parameters"][0]) == CELL.parameters


def test_an_export_that_can_t_be_is_refused_before_anything(path, tmp_path, capsys):
    assert main(["store", str(path)]) == 2
    assert "no such file" in capsys.readouterr().err and not path.exists()
    Store(path).close()
    assert main(["store", str(path), "--export", str(tmp_path / "table.xlsx")]) == 2
    assert ".csv, .json, .parquet" in capsys.readouterr().err
    content = b"garbage" * 1000
    path.write_bytes(content)  # its lock is still there
    assert main(["store", str(path)]) == 2
    assert "damaged" in capsys.readouterr().err
    (aside,) = tmp_path.glob("*.damaged-*")
    assert aside.read_bytes() == content


@pytest.mark.parametrize("content", [b"x", b"my notes\n" * 600, b"{}"])
def test_a_file_that_never_was_a_store_is_left_as_it_is(path, content, capsys):
    path.write_bytes(content)
    with pytest.raises(ValueError, match="expected a store, this is another file"):
        Store(path)
    assert main(["store", str(path)]) == 2
    assert "this is another file" in capsys.readouterr().err
    assert path.read_bytes() == content and list(path.parent.iterdir()) == [path]


def test_an_empty_file_is_not_made_a_store_by_showing_it(path, capsys):
    path.touch()
    assert main(["store", str(path)]) == 2
    assert "this file is empty" in capsys.readouterr().err
    assert path.stat().st_size == 0 and list(path.parent.iterdir()) == [path]
