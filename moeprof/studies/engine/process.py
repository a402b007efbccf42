"""The cells of a study in several processes on this machine, this one among them."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from ..store.store import Store
from .engine import Listener, apart, check_same
from .serial import Serial

if TYPE_CHECKING:
    from multiprocessing.context import SpawnProcess

    from ..source import Source
    from ..store.cells import Cell, Subject
    from .engine import Listener
    from .work import Make, Work


class Processes:
    """`workers` processes, which share the threads of torch out; each has the model in memory.

    source: the model, which the others load again. A process that dies leaves its cell to the
    others; this one goes on alone if it must. Cells whose times are compared come last, here.
    """

    def __init__(self, source: Source, workers: int) -> None:
        if workers < 1:
            raise ValueError(f"workers: expected at least 1, got {workers}")
        self.source, self.workers = source, workers

    def run(self, work: Work, cells: Sequence[Cell], store: Store, listener: Listener) -> None:
        found, shared, alone = apart(work, cells, store)
        Serial().run(work, found, store, listener)
        told = replace(listener, done=lambda cell, result, _: listener.done(cell, result, True))
        if shared:
            order = _Order(self.source, work.make, work.subject, store.path, shared)
            workers = min(self.workers, len(shared))
            with _fewer_threads(workers) as threads, _others(order, workers - 1, threads, listener):
                Serial().run(work, shared, store, told)
        Serial().run(work, alone, store, listener)


class _Order(NamedTuple):
    """What another process is told; it is pickled."""

    source: Source
    make: Make
    subject: Subject
    store: Path
    cells: list[Cell]


@contextmanager
def _fewer_threads(workers: int) -> Iterator[int]:
    """This process with its share of torch's threads: how many they are."""
    all_threads = torch.get_num_threads()
    share = max(all_threads // workers, 1)
    torch.set_num_threads(share)
    try:
        yield share
    finally:
        torch.set_num_threads(all_threads)


@contextmanager
def _others(order: _Order, count: int, threads: int, listener: Listener) -> Iterator[None]:
    """`count` processes at work as long as the context lasts; of one that dies it is said."""
    context = multiprocessing.get_context("spawn")
    started: list[tuple[SpawnProcess, Connection]] = []
    ending = threading.Event()
    watch = threading.Thread(target=_watch, args=(started, ending, listener), daemon=True)
    with tempfile.TemporaryDirectory() as folder:
        # A file, for `start` waits for ever where it can't get its arguments off to a process
        # that is dead already.
        path = Path(folder) / "order"
        path.write_bytes(pickle.dumps(order))
        try:
            for _ in range(count):
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(path, threads, theirs), daemon=True)
                process.start()
                theirs.close()
                started.append((process, ours))
            watch.start()
            yield
        finally:
            ending.set()
            for process, _ in started:
                process.terminate()
            for process, _ in started:
                process.join()
            if watch.ident is not None:
                watch.join()
            for process, pipe in started:
                process.close()
                pipe.close()


def _watch(
    started: Sequence[tuple[SpawnProcess, Connection]], ending: threading.Event, listener: Listener
) -> None:
    """Say of each process that ends before the work does why, and which cell it had."""
    left = {process.sentinel: (process, pipe) for process, pipe in started}
    while left and not ending.is_set():
        for sentinel in wait(list(left), timeout=0.2):
            process, pipe = left.pop(sentinel)  # type: ignore[arg-type]
            process.join()
            said, cell = None, None
            while pipe.poll():
                try:
                    said, cell = pipe.recv()
                except EOFError:
                    break
            if process.exitcode and not ending.is_set():
                why = said or f"exit code {process.exitcode}"
                if process.exitcode < 0:
                    why = f"killed by signal {-process.exitcode}"
                having = f" while it ran {cell}" if cell else ""
                listener.lost(
                    f"Worker {process.pid} ended{having} ({why}); its cell is run by another"
                )


def _work(path: Path, threads: int, pipe: Connection) -> None:
    """A process of its own: build the study, and run what nobody else runs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends this one
    _end_with_the_first()
    torch.set_num_threads(threads)
    running: list[str | None] = [None]

    def begin(cell: Cell) -> None:
        running[0] = cell.name
        pipe.send((None, cell.name))

    try:
        order: _Order = pickle.loads(path.read_bytes())
        work = order.make(*order.source.load())
        check_same(work.subject, order.subject)
        with Store(order.store) as store:
            Serial().run(work, order.cells, store, Listener(begin=begin))
    except Exception as error:  # whatever it is: the first process meets it too, and raises it
        pipe.send((f"{type(error).__name__}: {error}", running[0]))
        os._exit(1)


def _end_with_the_first() -> None:
    """Not to go on for hours when the process that began this was killed."""
    parent = multiprocessing.parent_process()

    def end() -> None:
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()
