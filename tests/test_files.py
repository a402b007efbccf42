"""Files: written whole, and read with care."""

import io
import os
import re
import stat
import sys
import threading
import tracemalloc
import zipfile
from collections import Counter

import numpy as np
import pytest
from disk import full_disk
from nulls import null_of
from routing import random_logits

from moeprof import files
from moeprof.files.npz import read_npz
from moeprof.null import Null

pytestmark = pytest.mark.once

posix = pytest.mark.skipif(sys.platform == "win32", reason="modes and links are POSIX's")


# ---------------------------------------------------------------- writing


@posix
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444])
def test_the_mode_of_an_older_file_is_kept(tmp_path, mode):
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(mode)
    files.write_whole(path, b"new")
    assert path.read_bytes() == b"new" and stat.S_IMODE(path.stat().st_mode) == mode


@posix
def test_a_new_file_has_the_usual_mode(tmp_path):
    (tmp_path / "usual").write_text("x")
    files.write_whole(tmp_path / "file", b"new")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "usual").stat().st_mode


@posix
@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_a_link(tmp_path, there):
    (tmp_path / "else").mkdir()
    target, link = tmp_path / "else" / "target", tmp_path / "link"
    if there:
        target.write_text("old")
    link.symlink_to(target)
    files.write_whole(link, b"new")
    assert link.is_symlink() and target.read_bytes() == b"new" and not target.is_symlink()
    assert [p.name for p in target.parent.iterdir()] == ["target"]


def test_the_data_is_on_the_disk_before_it_has_the_name(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)

        def noted(*arguments, name=name, original=original):
            calls.append(name)
            return original(*arguments)

        monkeypatch.setattr(files.os, name, noted)
    files.write_whole(tmp_path / "file", b"data")
    assert calls[:2] == ["fsync", "replace"] and calls[2:] in (["fsync"], [])


# ---------------------------------------------------------------- reading an .npz


def packed(**arrays):
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def test_a_full_disk_is_said_in_words_and_leaves_the_older_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with full_disk(1000), pytest.raises(OSError, match=f"^{path} can't be written: [A-Z]"):
        files.write_whole(path, bytes(2000))
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


@posix
def test_a_folder_removed_while_it_is_waited_for_is_locked_as_it_is_then(tmp_path, monkeypatch):
    import fcntl

    folder, flock, waits, found = tmp_path / "folder", fcntl.flock, threading.Event(), []
    folder.mkdir()

    def locked(number, operation):
        if threading.current_thread() is second:
            waits.set()
        flock(number, operation)

    def wait():
        with files.alone(folder):
            number = os.open(folder, os.O_RDONLY)
            with pytest.raises(BlockingIOError):
                flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.close(number)
            found.append(folder)

    second = threading.Thread(target=wait)
    monkeypatch.setattr(fcntl, "flock", locked)
    with files.alone(folder):
        second.start()
        assert waits.wait(60)
        folder.rmdir()
    second.join(60)
    assert found == [folder]


def test_an_npz_is_what_numpy_reads():
    arrays = {
        "a": np.arange(12.0).reshape(3, 4),
        "b": np.array("text"),
        "c": np.zeros((0, 3), np.uint64),
        "d": np.asfortranarray(np.arange(6).reshape(2, 3)),
    }
    data, seen = packed(**arrays), {}
    read = read_npz(data, seen.update)
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        assert np.array_equal(read[name], array) and read[name].dtype == array.dtype
        assert seen[name] == (array.shape, array.dtype)


def test_nothing_is_unpacked_before_the_check():
    data = packed(small=np.arange(3), huge=np.zeros(3 * 10**7))
    assert len(data) < 10**6

    def check(headers):
        raise ValueError(f"not wanted: {headers['huge'].shape}")

    tracemalloc.start()
    with pytest.raises(ValueError, match=r"not wanted: \(30000000,\)"):
        read_npz(data, check)
    assert tracemalloc.get_traced_memory()[1] < 10**7
    tracemalloc.stop()


def zipped(*names, content):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, content)
    return buffer.getvalue()


def npy(array):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, allow_pickle=True)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PK",
        b"x" * 100,
        packed(a=np.arange(5))[:-30],
        zipped("a.npy", "a", content=npy(np.arange(5))),  # two arrays of one name
        zipped("a.npy", content=npy(np.array([{}, []], object))),
        zipped("a.npy", content=npy(np.arange(5))[:-8]),  # one number less than its header says
        zipped("a.npy", content=npy(np.arange(5)) + b"more"),
        zipped("a.npy", content=b"not an array"),
        zipped("a.npy", content=npy(np.arange(5)).replace(b"(5,)", b"(-5,)")),
        zipped("a.npy", content=npy(np.arange(5)).replace(b"(5,)", b"(5,(")),  # TokenError
    ],
)
def test_whatever_is_wrong_with_an_npz_is_a_value_error(data):
    with pytest.raises(ValueError, match="."):
        read_npz(data, lambda headers: None)


# ---------------------------------------------------------------- nulls in files


@pytest.fixture(scope="module")
def null():
    return null_of(random_logits(60, 2))


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_flipped_bits_of_a_null_are_one_kind_of_error(null, tmp_path, suffix):
    path = tmp_path / f"null{suffix}"
    null.save(path)
    whole = path.read_bytes()
    for at in range(3, 8 * len(whole), 1 + 8 * len(whole) // 900):
        damaged = bytearray(whole)
        damaged[at // 8] ^= 1 << at % 8
        path.write_bytes(damaged)
        try:
            Null.load(path)
        except ValueError as error:
            assert f"{path}: expected a whole moeprof null" in str(error)


@pytest.mark.parametrize("name", ["extra", "largest", "router_sample", "counts"])
def test_arrays_that_are_no_nulls_are_not_unpacked(null, tmp_path, name):
    """A small file may say that it unpacks to many gigabytes."""
    null.save(tmp_path / "null.npz")
    arrays = dict(np.load(tmp_path / "null.npz"))
    (tmp_path / "null.npz").write_bytes(packed(**{**arrays, name: np.zeros((1, 1, 10**7))}))
    tracemalloc.start()
    with pytest.raises(ValueError, match="no null has|do not belong together"):
        Null.load(tmp_path / "null.npz")
    assert tracemalloc.get_traced_memory()[1] < 10**7
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("counts", "x"),
        ("counts", None),
        ("largest", [1.0]),
        ("router_sample", 3),
        ("kind", 3),
        ("score", None),
        ("model_name", b"name"),
        ("text_digest", 0),
        ("tail_rule", None),
        ("tokens", "many"),
        ("tokens", 1.5),
        ("tokens", True),
        ("r_high", "1"),
        ("r_low", None),
    ],
)
def test_a_null_of_wrong_kinds_is_a_type_error(null, name, value):
    parts = {f: getattr(null, f) for f in (*null._facts(), "counts", "largest", "router_sample")}
    assert Null(**parts).tokens == null.tokens
    with pytest.raises(TypeError, match=f"{name}: expected"):
        Null(**{**parts, name: value})


@pytest.mark.parametrize(
    ("name", "value"), [("tokens", 10**400), ("tokens", 0), ("alpha_min", "x"), ("r_high", -1)]
)
def test_a_null_out_of_range_is_a_value_error(null, name, value):
    parts = {f: getattr(null, f) for f in (*null._facts(), "counts", "largest", "router_sample")}
    with pytest.raises(ValueError, match="expected|belong"):
        Null(**{**parts, name: value})


# ---------------------------------------------------------------- what a terminal shows


def test_what_a_terminal_would_obey_is_not_shown(tmp_path):
    hostile = "a\x1b[2J\x07\rb\u202ec\x9bd\ud800"
    clean = files.printable(hostile)
    assert clean == "a\ufffd[2J\ufffd\ufffdb\ufffdc\ufffdd\ufffd"
    assert files.printable("Müller \u4e2d\u6587 \U0001f600\nline") == (
        "Müller \u4e2d\u6587 \U0001f600\nline"
    )
    null = null_of(random_logits(60, 2))
    object.__setattr__(null, "model_name", hostile)
    null.save(tmp_path / "null.npz")
    loaded = Null.load(tmp_path / "null.npz")
    assert loaded.model_name == hostile  # as it was; only shown otherwise
    assert "\x1b" not in loaded.describe() + repr(loaded)


def test_no_console_passes_on_what_a_terminal_would_obey(capsys):
    """Neither as a line nor in a table; the console's own colours and new lines stay."""
    from rich.table import Table

    from moeprof.show.console import make_console, text_console

    hostile = "a\x1b]0;title\x07b\u202ec\x9bd"
    table = Table("name")
    table.add_row(hostile)
    out = io.StringIO()
    for console in (make_console(), text_console(out, 60)):
        console.print(hostile)
        console.print(table)
    for text in (capsys.readouterr().out, out.getvalue()):
        assert not any(c in text for c in "\x1b\x07\u202e\x9b") and text.count("]0;title") == 2
        assert len(text.splitlines()) == 6


def test_a_table_on_a_narrow_screen_loses_nothing(monkeypatch):
    from moeprof.show.console import printed
    from moeprof.show.tables import table

    monkeypatch.setenv("COLUMNS", "30")
    columns = {"router": "{}", "tokens": "{:,d}", "bits": "{}", "ms": "{:.4f}"}
    rows = [("bh:alpha=0.3,max_k=16", 65_536, "0.61 [0.58, 0.64]", 1.2345)]
    text = printed([table(columns, rows)])
    assert max(map(len, text.splitlines())) <= 30
    cells = [*columns, "bh:alpha=0.3,max_k=16", "65,536", "0.61[0.58,0.64]", "1.2345"]
    assert Counter(re.sub(r"[\s─]", "", text)) == Counter("".join(cells))
