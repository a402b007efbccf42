"""Per-token records of a routing, streamed to files in chunks: Parquet, or NumPy's .npz."""

import importlib.util
import io
import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..files import check_folder, write_whole
from ..files.npz import Header, read_npz
from ..models.phases import PHASES

if TYPE_CHECKING:
    import pandas

CHUNK = 1 << 16  # rows (a token in a layer) that are held before they are written
COLUMNS = (
    "layer",
    "step",
    "phase",
    "token",
    "real",
    "input_id",
    "experts",
    "weights",
    "entropy",
    "slots",
)
_NO_ID = -1
_PLAIN: dict[str, type[np.generic]] = {
    "layer": np.int32,
    "step": np.int64,
    "phase": np.uint8,
    "token": np.int32,
    "real": np.bool_,
    "input_id": np.int64,
    "entropy": np.float32,
    "slots": np.int32,
}
_DTYPES: dict[str, type[np.generic]] = {**_PLAIN, "experts": np.int32, "weights": np.float32}
_MOST_SLOTS = 1024  # of a token: experts of a layer

OTHER_FILES = (".csv", ".json", ".jsonl", ".npz")  # what nobody calls a folder
_Chunk = dict[str, NDArray[Any]]  # by the names of COLUMNS


class RecordWriter:
    """Writes which experts each token was given, with weights and entropy.

    Parameters
    ----------
    path : str or path
        "records.parquet": one file, its row groups are the chunks (needs pyarrow). Anything
        else is a folder of part-00000.npz, part-00001.npz, … .

    What is not written yet is at most `CHUNK` rows, a row being a token in a layer. A part of a
    folder appears whole or not at all, so whatever ends the process leaves those before it
    readable. A Parquet file can be read once it is closed, which also happens when the writer is
    forgotten or Python ends, but not when the process is killed.

    Raises
    ------
    FileExistsError
        If there is such a file, or a folder with something in it.
    ValueError
        For the name of another file: .csv, .json, .jsonl or .npz.
    OSError
        If it can't be written.
    ImportError
        For Parquet without pyarrow.

    Example
    -------
    >>> with RecordWriter("records.parquet") as writer:          # doctest: +SKIP
    ...     writer.add(layer=0, step=0, phase="prefill", experts=experts)
    >>> read_records("records.parquet")                          # doctest: +SKIP
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        check_records(path)
        sink: _Sink = _Parquet(self.path) if _is_parquet(self.path) else _Parts(self.path)
        self._rows = _Rows(sink)
        self._lock = threading.Lock()  # models run in several threads
        self._close = weakref.finalize(self, self._rows.close)

    def add(
        self,
        *,
        layer: int,
        step: int,
        phase: str | Sequence[str],
        experts: ArrayLike,
        weights: ArrayLike | None = None,
        entropy: ArrayLike | None = None,
        real: ArrayLike | None = None,
        input_ids: ArrayLike | None = None,
    ) -> None:
        """Append T tokens of one layer in one step; the arrays are copied.

        Parameters
        ----------
        layer, step : int
            The layer's own number in the model, the number of the forward pass.
        phase : one of "prefill", "decode", "verify" and "unknown", or (T,) of them
        experts : (T, k) integers
            -1 for an empty slot. k may be another one in every call.
        weights : (T, k) floats, optional
            Kept as float32.
        entropy : (T,) floats, optional
            Of the router's softmax, in nats.
        real : (T,) bool, optional
            False for padding. All are real unless given.
        input_ids : (T,) integers, optional

        Raises
        ------
        ValueError
            Shapes that don't fit, another phase, a writer that is closed.
        """
        if self.closed:
            raise ValueError(f"records: {self.path} is closed")
        experts = np.asarray(experts)
        if experts.ndim != 2 or not np.issubdtype(experts.dtype, np.integer):
            raise ValueError(
                f"experts: expected integers (T, k), got {experts.dtype} {experts.shape}"
            )
        if experts.shape[1] > _MOST_SLOTS:
            raise ValueError(f"experts: expected k <= {_MOST_SLOTS}, got {experts.shape[1]}")
        rows = {
            "phase": _phases(phase, experts),
            "real": _column("real", real, True, experts),
            "input_id": _column("input_ids", input_ids, _NO_ID, experts),
            "entropy": _column("entropy", entropy, np.nan, experts),
        }
        weights = _column("weights", weights, np.nan, experts)
        with self._lock:
            self._rows.append((layer, step), experts, weights, rows)

    @property
    def closed(self) -> bool:
        return not self._close.alive

    def close(self) -> None:
        """Write what is held and end the file; without effect the second time."""
        self._close()

    def __enter__(self) -> "RecordWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def check_records(path: str | os.PathLike[str]) -> None:
    """Raise what a RecordWriter of `path` would raise; makes nothing."""
    path = Path(path)
    if path.suffix.lower() in OTHER_FILES:
        raise ValueError(f"records: {path}: expected a .parquet file, or a folder of .npz files")
    parquet = _is_parquet(path)
    empty = not parquet and path.is_dir() and not any(path.iterdir())
    if path.exists() and not empty:
        raise FileExistsError(f"records: {path} exists already; give a new path")
    if parquet and importlib.util.find_spec("pyarrow") is None:
        raise ImportError(
            "records: Parquet needs pyarrow: pip install 'moeprof[records]'; a path without "
            ".parquet is a folder of .npz files, which needs nothing"
        )
    check_folder(path.parent if parquet else path)


def _is_parquet(path: Path) -> bool:
    return path.suffix.lower() == ".parquet"


def _phases(phase: str | Sequence[str], experts: NDArray[Any]) -> NDArray[np.uint8]:
    """(T,) numbers in PHASES for the tokens of experts (T, k)."""
    names = [phase] if isinstance(phase, str) else list(phase)
    if wrong := [name for name in dict.fromkeys(names) if name not in PHASES]:
        raise ValueError(f"phase: expected one of {PHASES}, got {wrong[0]!r}")
    numbers = np.array([PHASES.index(name) for name in names], np.uint8)
    if isinstance(phase, str):
        return np.full(len(experts), numbers[0])
    return _column("phase", numbers, None, experts)


def _column(
    name: str, values: ArrayLike | None, default: Any, experts: NDArray[Any]
) -> NDArray[Any]:
    """Values of the tokens of experts (T, k), weights of their slots; `default` where None."""
    shape = experts.shape if name == "weights" else experts.shape[:1]
    if values is None:
        return np.full(shape, default)
    values = np.asarray(values)
    if values.shape != shape:
        raise ValueError(f"{name}: expected shape {shape} as the experts', got {values.shape}")
    return values


class _Rows:
    """The rows that are not written yet; apart from the writer, so as to outlive it."""

    def __init__(self, sink: "_Sink"):
        self._sink, self.held = sink, 0
        self._pieces: list[_Chunk] = []

    def append(
        self,
        place: tuple[int, int],
        experts: NDArray[Any],
        weights: NDArray[Any],
        columns: dict[str, NDArray[Any]],
    ) -> None:
        start = 0
        while start < len(experts):
            part = slice(start, start + CHUNK - self.held)
            piece: dict[str, Any] = {name: values[part] for name, values in columns.items()}
            count = len(piece["real"])
            piece |= dict(zip(("layer", "step"), place, strict=True))
            piece |= {"token": np.arange(start, start + count), "slots": experts.shape[1]}
            # In these dtypes they are copies: the caller may use its arrays again.
            kept: _Chunk = {n: np.full(count, piece[n], dtype) for n, dtype in _PLAIN.items()}
            kept["experts"] = experts[part].astype(np.int32).ravel()
            kept["weights"] = weights[part].astype(np.float32).ravel()
            self._pieces.append(kept)
            self.held += count
            start += count
            if self.held == CHUNK:
                self._flush()

    def _flush(self) -> None:
        chunk = {n: np.concatenate([piece[n] for piece in self._pieces]) for n in COLUMNS}
        self._pieces, self.held = [], 0
        self._sink.write(chunk)

    def close(self) -> None:
        try:
            if self.held:
                self._flush()
        finally:
            self._sink.close()


# ---- the two kinds of files; a chunk has a flat array of each of COLUMNS ----


class _Sink(Protocol):
    def write(self, chunk: _Chunk) -> None: ...

    def close(self) -> None: ...


class _Parts:
    def __init__(self, folder: Path):
        self._folder, self._number = folder, 0
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, chunk: _Chunk) -> None:
        data = io.BytesIO()
        np.savez(data, **chunk)  # type: ignore[arg-type]  # none of COLUMNS is an option of it
        write_whole(self._folder / f"part-{self._number:05d}.npz", data.getvalue())
        self._number += 1

    def close(self) -> None:
        pass


class _Parquet:
    def __init__(self, path: Path):
        import pyarrow
        from pyarrow import parquet

        # pyarrow looks for it when it first makes an array: too late where Python ends.
        if importlib.util.find_spec("pandas") is not None:
            importlib.import_module("pandas")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._arrow = pyarrow
        plain = {n: pyarrow.from_numpy_dtype(dtype) for n, dtype in _PLAIN.items()}
        plain["phase"] = pyarrow.string()
        lists = {"experts": pyarrow.int32(), "weights": pyarrow.float32()}
        plain |= {name: pyarrow.list_(kind) for name, kind in lists.items()}
        self._schema = pyarrow.schema([(name, plain[name]) for name in COLUMNS])
        self._path, self._lost = path, ""
        with self._whole_or_none():
            self._file = parquet.ParquetWriter(path, self._schema)

    def write(self, chunk: _Chunk) -> None:
        offsets = np.concatenate([[0], np.cumsum(chunk["slots"], dtype=np.int32)])
        arrays = []
        for field in self._schema:
            values = chunk[field.name]
            if field.name == "phase":
                values = np.array(PHASES)[values]
            if field.name in _PLAIN:
                missing = np.isnan(values) if field.name == "entropy" else None
                if field.name == "input_id":
                    missing = values == _NO_ID
                arrays.append(self._arrow.array(values, field.type, mask=missing))
            else:
                arrays.append(self._lists(offsets, values, field))
        with self._whole_or_none():
            self._file.write_table(self._arrow.Table.from_arrays(arrays, schema=self._schema))

    def _lists(self, offsets: NDArray[Any], values: NDArray[Any], field: Any) -> Any:
        return self._arrow.ListArray.from_arrays(offsets, self._arrow.array(values), field.type)

    def close(self) -> None:
        if not self._lost:
            with self._whole_or_none():
                self._file.close()

    @contextmanager
    def _whole_or_none(self) -> Iterator[None]:
        """A file that couldn't be written to its end can't be read: it goes."""
        if self._lost:
            raise OSError(self._lost)
        try:
            yield
        except (OSError, self._arrow.ArrowException) as error:
            number = getattr(error, "errno", None)
            reason = error if number is None else os.strerror(number)
            self._lost = f"records: {self._path} can't be written: {reason}"
            self._path.unlink(missing_ok=True)
            raise OSError(self._lost) from error


# ---- reading ----


def read_records(path: str | os.PathLike[str]) -> "pandas.DataFrame":
    """What `MoEProfiler(model, records=...)` wrote, as a pandas frame: all of it in memory.

    Parameters
    ----------
    path : str or path
        The .parquet file or the folder of .npz files.

    Returns
    -------
    pandas.DataFrame
        A row per token and layer, in the order of writing. layer, step: int; phase; token: its
        index in the step; real: False for padding; input_id: <NA> where not given; experts:
        the list of those that ran; weights: theirs, None where not given; entropy: nats, nan
        where not given; slots: the number of the router's slots, empty ones too.

    Raises
    ------
    FileNotFoundError, ValueError
        No such path; a file that is damaged or was never closed, or that is no record.
    """
    import pandas

    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"records: {path} does not exist")
    chunks = list(_read_parquet(path) if path.is_file() else _read_parts(path))
    frames = [_chunk_frame(chunk) for chunk in chunks] or [_chunk_frame(_empty())]
    return pandas.concat(frames, ignore_index=True)


def _empty() -> _Chunk:
    return {n: np.zeros(0, _PLAIN.get(n, np.int32)) for n in COLUMNS}


def _read_parts(folder: Path) -> Iterator[_Chunk]:
    for path in sorted(folder.glob("part-*.npz")):
        try:
            chunk = read_npz(path.read_bytes(), _check_members)
            _check_values(chunk)
        except (OSError, ValueError) as error:
            raise ValueError(f"records: {path} can't be read: {error}") from error
        yield chunk


def _check_members(headers: dict[str, Header]) -> None:
    """ValueError unless the arrays are those of a chunk, as many rows each as one can have."""
    if headers.keys() != set(COLUMNS):
        raise ValueError(f"expected the arrays {', '.join(COLUMNS)}, got {', '.join(headers)}")
    for name, (shape, dtype) in headers.items():
        per_slot = name not in _PLAIN
        rows = headers["weights" if per_slot else "layer"].shape
        most = CHUNK * (_MOST_SLOTS if per_slot else 1)
        if shape != rows or len(shape) != 1 or shape[0] > most or dtype != _DTYPES[name]:
            raise ValueError(f"{name}: {dtype} {shape} is no column of a chunk")


def _check_values(chunk: _Chunk) -> None:
    """ValueError for what no chunk says: a phase that is none, slots that aren't there."""
    slots, phase = chunk["slots"], chunk["phase"]
    if (slots < 0).any() or slots.sum(dtype=np.int64) != len(chunk["experts"]):
        raise ValueError(f"slots: expected {len(chunk['experts'])} in all rows together")
    if (phase >= len(PHASES)).any():
        raise ValueError(f"phase: expected 0 to {len(PHASES) - 1}, got {phase.max()}")


def _read_parquet(path: Path) -> Iterator[_Chunk]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                yield _from_arrow(file.read_row_group(group, columns=list(COLUMNS)))
    except (OSError, KeyError, pyarrow.ArrowException) as error:
        raise ValueError(f"records: {path} can't be read (was it closed?): {error}") from error


def _from_arrow(table: Any) -> _Chunk:
    chunk = {}
    for name in COLUMNS:
        column = table[name].combine_chunks()
        if name in ("experts", "weights"):
            chunk[name] = column.flatten().to_numpy(zero_copy_only=False)
        elif name == "phase":
            index = {phase: number for number, phase in enumerate(PHASES)}
            chunk[name] = np.array([index[p] for p in column.to_pylist()], np.uint8)
        else:
            missing: float | None = {"input_id": _NO_ID, "entropy": np.nan}.get(name)
            column = column if missing is None else column.fill_null(missing)
            chunk[name] = column.to_numpy(zero_copy_only=False)
    return chunk


def _chunk_frame(chunk: _Chunk) -> "pandas.DataFrame":
    import pandas

    ran = chunk["experts"] >= 0
    slots = np.concatenate([[0], np.cumsum(chunk["slots"], dtype=np.int64)])
    edges = np.concatenate([[0], np.cumsum(ran)])[slots]  # of the rows, without empty slots
    unknown = np.concatenate([[0], np.cumsum(np.isnan(chunk["weights"][ran]))])[edges]
    cut: list[Any] = [*_cut(chunk["weights"][ran], edges), None]
    weights: NDArray[Any] = np.array(cut, np.dtype(object))[:-1]
    weights[np.diff(unknown) > 0] = None
    return pandas.DataFrame(
        {
            "layer": chunk["layer"],
            "step": chunk["step"],
            "phase": np.array(PHASES, object)[chunk["phase"]],
            "token": chunk["token"],
            "real": chunk["real"],
            "input_id": pandas.arrays.IntegerArray(chunk["input_id"], chunk["input_id"] == _NO_ID),
            "experts": _cut(chunk["experts"][ran], edges),
            "weights": weights,
            "entropy": chunk["entropy"],
            "slots": chunk["slots"],
        }
    )


def _cut(flat: NDArray[Any], edges: NDArray[Any]) -> list[list[Any]]:
    """A list for each row; row i ends where row i + 1 begins, at edges[i + 1]."""
    values, ends = flat.tolist(), edges.tolist()
    return [values[a:b] for a, b in zip(ends, ends[1:], strict=False)]
