"""Per-token records: what is written is what is read, in bounded memory, whatever happens."""

import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from disk import full_disk

from moeprof.profiler import records
from moeprof.profiler.records import RecordWriter, read_records

pytestmark = pytest.mark.once

KINDS = ("records.parquet", "folder")


@pytest.fixture(params=KINDS)
def path(request, tmp_path):
    return tmp_path / "new" / request.param


def routing(rng, tokens, k, skipped=True):
    """(experts (T, k), weights): distinct ones of 64, about a fifth of the slots empty."""
    experts = np.array([rng.permutation(64)[:k] for _ in range(tokens)], int)
    experts = experts.reshape(tokens, k)
    if skipped:
        experts[rng.random(experts.shape) < 0.2] = -1
    return experts, rng.random(experts.shape).astype(np.float32)


def test_what_is_written_is_read(path):
    rng = np.random.default_rng(0)
    expected = []
    with RecordWriter(path) as writer:
        for step, (tokens, k) in enumerate([(5, 3), (1, 8), (0, 2), (4, 1)]):
            for layer in range(2):
                experts, weights = routing(rng, tokens, k)
                entropy = rng.random(tokens).astype(np.float32)
                real, ids = rng.random(tokens) < 0.7, rng.integers(0, 99, tokens)
                phase = "decode" if tokens == 1 else "prefill"
                writer.add(
                    layer=layer,
                    step=step,
                    phase=phase,
                    experts=experts,
                    weights=weights,
                    entropy=entropy,
                    real=real,
                    input_ids=ids,
                )
                for t in range(tokens):
                    kept = experts[t] >= 0
                    expected.append(
                        (
                            layer,
                            step,
                            phase,
                            t,
                            real[t],
                            ids[t],
                            experts[t][kept].tolist(),
                            weights[t][kept].tolist(),
                            entropy[t],
                            k,
                        )
                    )
                experts[:], weights[:], ids[:] = 7, 7, 7  # the caller's arrays are its own
    frame = read_records(path)
    assert list(frame.columns) == list(records.COLUMNS)
    assert list(frame.itertuples(index=False, name=None)) == expected
    assert frame["experts"].map(len).min() == 0  # a token without experts is a row too


def test_what_was_not_given_is_not_made_up(path):
    with RecordWriter(path) as writer:
        writer.add(layer=0, step=0, phase="decode", experts=np.array([[1, -1]]))
        writer.add(
            layer=1, step=0, phase="decode", experts=np.array([[2]]), input_ids=[5], weights=[[0.5]]
        )
    frame = read_records(path)
    assert frame["weights"].tolist() == [None, [0.5]]
    assert frame["input_id"].isna().tolist() == [True, False] and frame["input_id"][1] == 5
    assert frame["entropy"].isna().all() and frame["real"].all()
    assert frame["experts"].tolist() == [[1], [2]]


def test_chunks_bound_the_memory(path, monkeypatch):
    monkeypatch.setattr(records, "CHUNK", 100)
    rng = np.random.default_rng(1)
    writer, most, total = RecordWriter(path), 0, 0
    for step in range(40):
        experts, weights = routing(rng, int(rng.integers(1, 350)), 2, skipped=False)
        writer.add(layer=0, step=step, phase="prefill", experts=experts, weights=weights)
        held = sum(len(piece["real"]) for piece in writer._rows._pieces)
        assert held == writer._rows.held
        most, total = max(most, held), total + len(experts)
    writer.close()
    assert most < 100 < total
    frame = read_records(path)
    assert len(frame) == total
    tokens = frame.groupby("step")["token"]
    assert all(rows.tolist() == list(range(len(rows))) for _, rows in tokens)
    if path.suffix == ".parquet":
        from pyarrow import parquet

        groups = parquet.ParquetFile(path).metadata
        sizes = [groups.row_group(i).num_rows for i in range(groups.num_row_groups)]
    else:
        sizes = [len(np.load(part)["real"]) for part in sorted(path.iterdir())]
    assert sizes == [100] * (total // 100) + [total % 100]


def test_parquet_is_read_by_others(tmp_path):
    import pandas

    with RecordWriter(tmp_path / "x.parquet") as writer:
        writer.add(
            layer=3,
            step=1,
            phase="decode",
            experts=np.array([[4, -1, 2]]),
            weights=np.array([[0.5, 0, 0.25]]),
        )
    row = pandas.read_parquet(tmp_path / "x.parquet").iloc[0]
    assert row["experts"].tolist() == [4, -1, 2] and row["weights"].tolist() == [0.5, 0, 0.25]
    assert (row["layer"], row["phase"], row["slots"]) == (3, "decode", 3)
    assert pandas.isna(row["input_id"]) and pandas.isna(row["entropy"])
    table = pytest.importorskip("pyarrow.parquet").read_table(tmp_path / "x.parquet")
    assert [table[name].null_count for name in ("input_id", "entropy")] == [1, 1]  # not nan


def test_close_twice_and_no_more_rows(path):
    writer = RecordWriter(path)
    writer.close()
    writer.close()
    assert len(read_records(path)) == 0 and list(read_records(path)) == list(records.COLUMNS)
    with pytest.raises(ValueError, match=f"{path.name} is closed"):
        writer.add(layer=0, step=0, phase="decode", experts=np.array([[1]]))


def test_an_error_in_the_block_loses_nothing(path):
    with pytest.raises(KeyboardInterrupt), RecordWriter(path) as writer:
        writer.add(layer=0, step=0, phase="decode", experts=np.array([[1]]))
        raise KeyboardInterrupt
    assert read_records(path)["experts"].tolist() == [[1]]


def test_a_forgotten_writer_is_closed_at_the_end(path):
    code = f"""if 1:
        import numpy as np
        from moeprof.profiler.records import RecordWriter
        writer = RecordWriter({str(path)!r})
        writer.add(layer=0, step=0, phase="decode", experts=np.array([[6]]))
        raise SystemExit(3)
    """
    assert subprocess.run([sys.executable, "-c", code]).returncode == 3
    assert read_records(path)["experts"].tolist() == [[6]]


def test_parts_before_an_interruption_are_readable(tmp_path):
    code = f"""if 1:
        import os, numpy as np
        from moeprof.profiler import records
        records.CHUNK = 10
        writer = records.RecordWriter({str(tmp_path / "r")!r})
        writer.add(layer=0, step=0, phase="decode", experts=np.arange(25)[:, None])
        os._exit(9)
    """
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    assert read_records(tmp_path / "r")["experts"].tolist() == [[e] for e in range(20)]


def test_paths_are_checked_before_anything_runs(tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    for path in (taken, taken / "notes.txt"):
        with pytest.raises(FileExistsError, match=f"{path.name} exists already"):
            RecordWriter(path)
    (tmp_path / "x.parquet").mkdir()
    with pytest.raises(FileExistsError, match="x.parquet"):
        RecordWriter(tmp_path / "x.parquet")
    for path in (taken / "notes.txt" / "sub", taken / "notes.txt" / "x.parquet"):
        with pytest.raises(OSError, match="notes.txt"):
            RecordWriter(path)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["notes.txt", "taken", "x.parquet"]


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pip install 'moeprof\[records\]'"):
        RecordWriter(tmp_path / "x.parquet")
    assert not (tmp_path / "x.parquet").exists()
    with RecordWriter(tmp_path / "folder") as writer:
        writer.add(layer=0, step=0, phase="decode", experts=np.array([[1]]))
    assert len(read_records(tmp_path / "folder")) == 1


@pytest.mark.parametrize(
    "change, words",
    [
        ({"phase": "training"}, "phase: expected one of"),
        ({"experts": np.array([1, 2])}, r"experts: expected integers \(T, k\)"),
        ({"experts": np.array([[0.5]])}, "experts: expected integers"),
        ({"weights": np.zeros((2, 2))}, r"weights: expected shape \(2, 1\)"),
        ({"entropy": np.zeros(3)}, r"entropy: expected shape \(2,\)"),
        ({"real": np.ones((2, 1), bool)}, r"real: expected shape \(2,\)"),
        ({"input_ids": np.zeros(1, int)}, r"input_ids: expected shape \(2,\)"),
    ],
)
def test_rows_that_do_not_fit(path, change, words):
    with RecordWriter(path) as writer:
        with pytest.raises(ValueError, match=words):
            writer.add(
                **(
                    {"layer": 0, "step": 0, "phase": "decode", "experts": np.array([[1], [2]])}
                    | change
                )
            )
    assert len(read_records(path)) == 0


def test_damaged_and_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_records(tmp_path / "nowhere")
    for name in KINDS:
        with RecordWriter(tmp_path / name) as writer:
            writer.add(layer=0, step=0, phase="decode", experts=np.array([[1]]))
        file = tmp_path / name if name.endswith("parquet") else tmp_path / name / "part-00000.npz"
        file.write_bytes(file.read_bytes()[:-9])
        with pytest.raises(ValueError, match=f"{file.name} can't be read"):
            read_records(tmp_path / name)


@pytest.mark.parametrize("chunk", [100, 10_000])  # it is full at a write, or at the end
def test_a_full_disk_is_told_and_leaves_no_file_that_is_cut_off(tmp_path, monkeypatch, chunk):
    pytest.importorskip("pyarrow")
    monkeypatch.setattr(records, "CHUNK", chunk)
    experts, weights = routing(np.random.default_rng(0), 1000, 8)
    path = tmp_path / "r.parquet"
    with pytest.raises(OSError, match=f"^records: {path} can't be written: [A-Z]"):
        with full_disk(10_000), RecordWriter(path) as writer:
            writer.add(layer=0, step=0, phase="decode", experts=experts, weights=weights)
    assert not list(tmp_path.iterdir()) and writer.closed


def parts(tmp_path):
    """A folder of one part, and the path of it."""
    with RecordWriter(tmp_path / "records") as writer:
        writer.add(layer=0, step=0, phase="decode", experts=np.arange(12).reshape(4, 3))
    return tmp_path / "records", tmp_path / "records" / "part-00000.npz"


def test_flipped_bits_of_a_part_are_one_kind_of_error(tmp_path):
    folder, file = parts(tmp_path)
    whole, read = file.read_bytes(), read_records(folder)
    for at in range(3, 8 * len(whole), 1 + 8 * len(whole) // 900):
        damaged = bytearray(whole)
        damaged[at // 8] ^= 1 << at % 8
        file.write_bytes(damaged)
        try:
            found = read_records(folder)
        except ValueError as error:
            assert f"{file} can't be read" in str(error)
        else:
            assert found.equals(read)


@pytest.mark.parametrize(
    "name, array",
    [
        ("huge", np.zeros(10**7)),
        ("experts", np.zeros(10**8, np.int8)),
        ("layer", np.zeros(10**7, np.int32)),
        ("experts", np.zeros((4, 3), np.int32)),
        ("entropy", np.zeros(4)),
        ("slots", np.full(4, 4, np.int32)),
        ("slots", np.array([-3, 9, 3, 3], np.int32)),
        ("phase", np.full(4, 77, np.uint8)),
    ],
)
def test_arrays_that_are_no_records_are_refused(tmp_path, name, array):
    folder, file = parts(tmp_path)
    arrays = dict(np.load(file))
    np.savez_compressed(file, **{**arrays, name: array})
    tracemalloc.start()
    with pytest.raises(ValueError, match="part-00000.npz can't be read"):
        read_records(folder)
    assert tracemalloc.get_traced_memory()[1] < 10**7
    tracemalloc.stop()
