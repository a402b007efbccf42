"""What runs the cells: several processes and a Ray cluster give what one process gives, each cell
once, also where a worker is killed."""

import functools
import multiprocessing
import os
import signal
import sys
import threading
import time

import pytest
import torch

from moeprof.studies.engine.engine import Listener
from moeprof.studies.engine.process import Processes
from moeprof.studies.engine.serial import Serial
from moeprof.studies.source import Source
from moeprof.studies.store.cells import Cell, Subject
from moeprof.studies.store.store import Store

CELLS = 12


class Slow:
    """A study of the demo model: each cell is the loss of a few tokens, and waits a moment.

    alone: how many of its last cells are to be run alone. bad: the number of a cell that fails.
    pause: seconds of a cell.
    """

    def __init__(self, model, alone=0, bad=None, digest="m", pause=0.3):
        self.model, self.bad, self.pause = model, bad, pause
        self.make = functools.partial(make, alone=alone, bad=bad, digest="m", pause=pause)
        self.subject = Subject(digest, "t", "n", "c")
        self.cells = [Cell("slow", f"cell {n}", {"n": n}, n >= CELLS - alone) for n in range(CELLS)]

    def steps(self, cell):
        return 2

    def run(self, cell, step):
        number = cell.parameters["n"]
        if number == self.bad:
            raise ValueError("a cell that fails")
        step()
        ids = torch.arange(1, 9)[None] + number
        with torch.no_grad():
            loss = self.model(input_ids=ids, labels=ids).loss.item()
        time.sleep(self.pause)
        step()
        return {"loss": loss, "threads": torch.get_num_threads()}


def make(model, tokenizer, **settings):
    return Slow(model, **settings)


@pytest.fixture(scope="module")
def model():
    return Source().load()[0]


@pytest.fixture(scope="module")
def expected(model):
    work = Slow(model, pause=0)
    return [work.run(cell, lambda: None)["loss"] for cell in work.cells]


class Heard:
    """A Listener that remembers, and does something after each cell."""

    def __init__(self, after=lambda done: None):
        self.done, self.lost, self.steps, self.after = [], [], 0, after

    def listener(self):
        return Listener(done=self._done, step=self._step, lost=self.lost.append)

    def _step(self):
        self.steps += 1

    def _done(self, cell, result, ran):
        self.done.append((cell.name, ran))
        self.after(len(self.done))


def check(path, work, heard, expected):
    """Every cell once, in the store and in what was heard; the same numbers as serial."""
    assert sorted(heard.done) == sorted((cell.name, True) for cell in work.cells)
    assert heard.steps == 2 * CELLS
    with Store(path) as store:
        rows = store.rows()
        assert sorted(row["name"] for row in rows) == sorted(cell.name for cell in work.cells)
        losses = [store.find(cell, work.subject)["loss"] for cell in work.cells]
    assert losses == pytest.approx(expected, rel=1e-6)
    return rows


@pytest.mark.slow
def test_serial_leaves_a_cell_to_who_runs_it(model, expected, tmp_path):
    """Another runs the first cell and finishes it a little later; it isn't run again."""
    path, work, heard = tmp_path / "x.sqlite", Slow(model, pause=0), Heard()
    ready = threading.Event()

    def other():
        with Store(path) as store, store.claim(work.cells[0], work.subject):
            ready.set()
            time.sleep(1)
            store.keep(work.cells[0], work.subject, {"loss": expected[0]}, 1.0, "another")

    thread = threading.Thread(target=other)
    thread.start()
    ready.wait()
    with Store(path) as store:
        Serial().run(work, work.cells, store, heard.listener())
        assert [row["worker"] for row in store.rows()].count("another") == 1
    thread.join()
    assert heard.done.count(("cell 0", False)) == 1 and len(heard.done) == CELLS
    assert heard.steps == 2 * CELLS


@pytest.mark.slow
def test_processes_share_the_cells_and_the_threads(model, expected, tmp_path):
    threads = torch.get_num_threads()
    path, heard = tmp_path / "x.sqlite", Heard()
    work = Slow(model, alone=2, pause=0.05)

    def run(cell, step, run=work.run):
        """Not before the other process, which has to load its model, has finished a cell."""
        end = time.monotonic() + 300
        while len(heard.done) == 1 and time.monotonic() < end:
            with Store(path) as store:
                if len(store.rows()) > 1:
                    break
            time.sleep(0.2)
        return run(cell, step)

    work.run = run
    with Store(path) as store:
        Processes(Source(), 2).run(work, work.cells, store, heard.listener())
    rows = check(path, work, heard, expected)
    assert len({row["worker"] for row in rows}) == 2
    ours = f":{os.getpid()}"
    for row in rows:
        alone = row["name"] in ("cell 10", "cell 11")
        assert row["result"]["threads"] == (threads if alone else max(threads // 2, 1))
        assert not alone or row["worker"].endswith(ours)
    assert torch.get_num_threads() == threads


@pytest.mark.slow
def test_a_killed_process_leaves_its_cell_to_the_others(model, expected, tmp_path):
    def kill(done):
        if done == 2:
            (child,) = [p for p in multiprocessing.active_children() if p.is_alive()]
            os.kill(child.pid, signal.SIGKILL)

    path, work, heard = tmp_path / "x.sqlite", Slow(model), Heard(kill)
    with Store(path) as store:
        Processes(Source(), 2).run(work, work.cells, store, heard.listener())
    check(path, work, heard, expected)
    (sentence,) = heard.lost
    assert "killed by signal 9" in sentence


@pytest.mark.slow
def test_what_fails_in_a_cell_is_raised_and_the_rest_is_kept(model, tmp_path):
    path, work = tmp_path / "x.sqlite", Slow(model, bad=4)
    with Store(path) as store:
        with pytest.raises(ValueError, match="a cell that fails"):
            Processes(Source(), 1).run(work, work.cells, store, Listener())
        assert [row["name"] for row in store.rows()] == [f"cell {n}" for n in range(4)]


def test_no_workers_are_refused():
    with pytest.raises(ValueError, match="workers"):
        Processes(Source(), 0)


def added(cluster):
    """A second node; Ray gives up after 30 s, which a busy machine may take to start it."""
    for tried in range(3):
        try:
            return cluster.add_node(num_cpus=1)
        except Exception:  # Ray's own has no class
            if tried == 2:
                raise


@pytest.mark.cluster
def test_a_ray_cluster_of_two_nodes_one_killed_in_the_middle(model, expected, tmp_path):
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    # The workers can't import a file of tests.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

    from moeprof.studies.engine.ray import OnRay

    noticed_soon = {
        "health_check_initial_delay_ms": 0,
        "health_check_period_ms": 500,
        "health_check_failure_threshold": 3,
    }
    head = {"num_cpus": 1, "include_dashboard": False, "_system_config": noticed_soon}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        second = added(cluster)
        ray.init(cluster.address, log_to_driver=False)

        path, killed = tmp_path / "x.sqlite", []

        def kill(done):
            """Once both have finished a cell: they load the model first."""
            with Store(path) as store:
                workers = {row["worker"] for row in store.rows()}
            if len(workers) == 2 and not killed:
                killed.append(done)
                cluster.remove_node(second, allow_graceful=False)

        work, heard = Slow(model, alone=1, pause=2), Heard(kill)
        with Store(path) as store:
            OnRay(Source(), threads=1).run(work, work.cells, store, heard.listener())
        rows = check(path, work, heard, expected)
        assert killed and heard.lost and "was lost while it ran" in heard.lost[0]
        assert len({row["worker"] for row in rows}) == 3  # two of the cluster, and ours for one

        other = Slow(model, digest="another model")
        with Store(tmp_path / "y.sqlite") as store:
            with pytest.raises(ValueError, match="a worker has another model"):
                OnRay(Source(), threads=1).run(other, other.cells, store, Listener())
            assert store.rows() == []
            with pytest.raises(ValueError, match="--threads"):
                OnRay(Source(), threads=64).run(work, work.cells, store, Listener())
    finally:
        ray.shutdown()
        cluster.shutdown()
