"""The cells of a study on a Ray cluster: machines that take tasks, see docs.ray.io."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...checks import missing
from .engine import apart, check_same
from .serial import PAUSE, Serial

if TYPE_CHECKING:
    from ..source import Source
    from ..store.cells import Cell, Subject
    from ..store.store import Store
    from .engine import Listener
    from .work import Make, Work


MOST_LOST = 3  # workers that one cell may take with it before it is given up


@dataclass(eq=False)
class _Task:
    """A cell that a worker of the cluster runs, and our claim on it in the store."""

    cell: Cell
    worker: Any
    claim: ExitStack
    begun: float


class OnRay:
    """Each cell is a task of a Ray cluster; the results go into the store of this process.

    source: the model, which each worker loads once; a folder has to be on every machine. address:
    of the cluster, "auto" for the one of this machine, None to start one here. workers: how many,
    as many as the cluster has room for when not given. threads: CPUs of each.

    A worker that dies leaves its cell to another. Cells whose times are compared come last, in
    this process.
    """

    def __init__(
        self,
        source: Source,
        workers: int | None = None,
        address: str | None = None,
        threads: int | None = None,
    ) -> None:
        self.source, self.workers, self.address, self.threads = source, workers, address, threads

    def run(self, work: Work, cells: Sequence[Cell], store: Store, listener: Listener) -> None:
        found, shared, alone = apart(work, cells, store)
        Serial().run(work, found, store, listener)
        if shared:
            ray, ours = connected(self.address)
            try:
                _Cluster(ray, self, work, store, listener).run(shared)
            finally:
                if ours:
                    ray.shutdown()
        Serial().run(work, alone, store, listener)


def connected(address: str | None) -> tuple[Any, bool]:
    """(ray, whether it was connected here); ImportError or OSError in one line."""
    try:
        import ray
    except ImportError:
        raise ImportError(missing("--engine ray", "ray")) from None
    if ray.is_initialized():
        return ray, False
    try:
        ray.init(address, log_to_driver=False, include_dashboard=False if not address else None)
    except Exception as error:  # the client's classes differ by what went wrong
        where = "on this machine" if address is None else f"at {address}"
        raise OSError(f"--ray-address: no Ray cluster {where}: {error}") from error
    return ray, True


class _Cluster:
    """The workers of one run."""

    def __init__(
        self, ray: Any, engine: OnRay, work: Work, store: Store, listener: Listener
    ) -> None:
        import torch

        self.ray, self.work, self.store, self.listener = ray, work, store, listener
        self.threads = engine.threads or torch.get_num_threads()
        room = int(ray.cluster_resources().get("CPU", 1) // self.threads)
        if room < 1:
            raise ValueError(
                f"--threads: the cluster has no machine with {self.threads} free CPUs, which a "
                "worker takes: give fewer"
            )
        self.count = min(engine.workers or room, room)
        self.maker = ray.remote(num_cpus=self.threads, max_restarts=0)(Worker)
        self.arguments = ray.put((engine.source, work.make, work.subject))
        self.running: dict[Any, _Task] = {}
        self.starting: dict[Any, Any] = {}  # workers by what comes when they are there
        self.lost: dict[str, int] = {}

    def run(self, cells: Sequence[Cell]) -> None:
        waiting = deque(cells)
        idle: list[Any] = []  # there, and without a cell: one that never starts gets none
        for _ in range(min(self.count, len(cells))):
            self._start()
        try:
            while waiting or self.running:
                passed = 0
                while idle and waiting and passed < len(waiting):
                    cell = waiting.popleft()
                    if self._started(cell, idle[-1]):
                        idle.pop()
                    elif self.store.find(cell, self.work.subject) is None:
                        waiting.append(cell)  # another process runs it
                        passed += 1
                    else:
                        Serial().run(self.work, [cell], self.store, self.listener)
                if not (idle or self.running or self.starting):
                    self._start()  # the last one was lost: for a machine that comes back
                if self.running or self.starting:
                    self._wait(waiting, idle)
                elif waiting:
                    time.sleep(PAUSE)
        finally:
            for task in self.running.values():
                task.claim.close()
            busy = [task.worker for task in self.running.values()]
            for worker in [*idle, *busy, *self.starting.values()]:
                self.ray.kill(worker)

    def _start(self) -> None:
        worker = self.maker.remote(self.arguments, self.threads)
        self.starting[worker.there.remote()] = worker

    def _started(self, cell: Cell, worker: Any) -> bool:
        """Whether the worker has the cell now: not if it is finished, or another's."""
        with ExitStack() as stack:
            mine = stack.enter_context(self.store.claim(cell, self.work.subject))
            if not mine or self.store.find(cell, self.work.subject) is not None:
                return False
            task = _Task(cell, worker, stack.pop_all(), time.perf_counter())
            self.running[worker.run.remote(cell)] = task
        self.listener.begin(cell)
        return True

    def _wait(self, waiting: deque[Cell], idle: list[Any]) -> None:
        """For the next result, which goes into the store, or worker: both then to `idle`."""
        ready, _ = self.ray.wait([*self.running, *self.starting], timeout=1)
        for reference in ready:
            if reference in self.starting:
                worker = self.starting.pop(reference)
                try:
                    self.ray.get(reference)
                    idle.append(worker)
                except self.ray.exceptions.RayActorError:
                    self.listener.lost("A worker was lost before it was there")
                continue
            task = self.running.pop(reference)
            with task.claim:
                try:
                    result, seconds, where = self.ray.get(reference)
                except self.ray.exceptions.RayActorError:
                    self._lost(task.cell)
                    waiting.appendleft(task.cell)
                    continue
                except self.ray.exceptions.RayTaskError as error:
                    raise error.cause from error
                stored = self.store.keep(task.cell, self.work.subject, result, seconds, where)
            for _ in range(self.work.steps(task.cell)):
                self.listener.step()
            self.listener.done(task.cell, stored, True)
            idle.append(task.worker)

    def _lost(self, cell: Cell) -> None:
        times = self.lost[cell.name] = self.lost.get(cell.name, 0) + 1
        if times == MOST_LOST:
            raise OSError(
                f"{cell.name}: {times} workers died while they ran it, the last just now; is there "
                "memory for the model on every machine of the cluster?"
            )
        self.listener.lost(f"A worker was lost while it ran {cell.name}; another runs it")


class Worker:
    """An actor of Ray: it has the study on its machine, and runs one cell after the other."""

    def __init__(self, arguments: tuple[Source, Make, Subject], threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.arguments = arguments
        self.work: Work | None = None

    def there(self) -> None:
        """Returns once this runs on a machine of the cluster."""

    def run(self, cell: Cell) -> tuple[dict[str, Any], float, str]:
        """(result, seconds, which worker) of a cell."""
        import ray

        if self.work is None:
            # Not when the actor is made: what goes wrong there looks like a machine that was lost.
            source, make, subject = self.arguments
            self.work = make(*source.load())
            check_same(self.work.subject, subject)
        begun = time.perf_counter()
        result = self.work.run(cell, lambda: None)
        where = f"{ray.get_runtime_context().get_node_id()[:8]}:{os.getpid()}"
        return result, time.perf_counter() - begun, where
