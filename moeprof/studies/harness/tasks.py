"""Tasks of lm-evaluation-harness: those it ships, and those of YAML files and folders."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...checks import near
from ...models.load import reason_of

YAML = (".yaml", ".yml")


class Tasks:
    """Tasks with their data, {name: Task of lm_eval} in `loaded`; pickled without them.

    Parameters
    ----------
    specs : sequence of str
        Names that the harness knows (a task, a group or a tag), YAML files of tasks, or folders
        of these, all of whose tasks are taken. A group gives each of its tasks.
    num_fewshot : int, optional
        Examples before each question, in place of the task's own number; a task that says 0
        keeps it, as in the harness.
    seed : int
        Chooses the examples.

    Raises
    ------
    ValueError
        An unknown name, with the nearest ones; a file that is no task; data that can't be had.
    OSError
        A path that isn't there; data that would have to come over the network.
    """

    def __init__(self, specs: Sequence[str], num_fewshot: int | None = None, seed: int = 0) -> None:
        self._specs, self._num_fewshot, self.seed = tuple(specs), num_fewshot, seed
        with quiet():
            self.loaded = _load_all(self._specs)
        for task in self.loaded.values():
            _set_examples(task, num_fewshot)

    def __reduce__(self) -> tuple[Any, ...]:
        return Tasks, (self._specs, self._num_fewshot, self.seed)

    def begin(self, name: str) -> Any:
        """A task, whose examples are drawn anew from the seed."""
        task = self.loaded[name]
        task.set_fewshot_seed(seed=self.seed)
        return task

    def requests(self, name: str, limit: int | None) -> tuple[int, str]:
        """(requests, SHA-256 of them): what the model would be asked about the first `limit`
        documents. Other data, another template or other examples give another digest."""
        task = self.begin(name)
        try:
            with quiet():
                task.build_all_requests(limit=limit, rank=0, world_size=1)
        except Exception as error:  # templates of a user
            raise ValueError(f"task {name}: no requests to make ({reason_of(error)})") from error
        digest = hashlib.sha256()
        for one in task.instances:
            said = json.dumps([one.doc_id, one.request_type, one.args], default=str)
            digest.update(said.encode("utf-8", "surrogatepass"))
        return sum(one.repeats for one in task.instances), digest.hexdigest()

    def aggregation(self, name: str, metric: str) -> Callable[[Sequence[Any]], float] | None:
        """How a metric's values of single documents become one; None where the task doesn't say."""
        found: Callable[[Sequence[Any]], float] | None
        found = self.loaded[name].aggregation().get(metric)
        return found


@contextmanager
def quiet() -> Iterator[None]:
    """Without the harness's log and bars: what it would say is counted, or shown by moeprof. Data
    that is fetched has a bar where a person may see it."""
    import datasets
    from lm_eval.api import task

    log, bar, bars = logging.getLogger("lm_eval"), task.tqdm, datasets.is_progress_bar_enabled()
    level = log.level
    log.setLevel(logging.ERROR)
    task.tqdm = lambda items, **_: items
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        log.setLevel(level)
        task.tqdm = bar
        if bars:
            datasets.enable_progress_bars()


def _load_all(specs: Sequence[str]) -> dict[str, Any]:
    folders = [spec for spec in specs if Path(spec).is_dir()]
    files = [spec for spec in specs if _is_file(spec)]
    names = [spec for spec in specs if spec not in folders and spec not in files]
    own = _manager([], defaults=True) if names else _manager([], defaults=False)
    for name in names:
        if name not in own.all_tasks:
            raise ValueError(_unknown(name, own.all_tasks))
    tasks: dict[str, Any] = {}
    for spec in specs:
        if spec in folders:
            inside = _manager([spec], defaults=False)
            for name in _inside(spec, inside):
                tasks |= _load(inside, name)
        else:
            tasks |= _load(own, spec)
    return tasks


def _is_file(spec: str) -> bool:
    """Is this the path of a file? OSError where it isn't there."""
    path = Path(spec)
    if path.is_file():
        return True
    if not path.is_dir() and (path.suffix in YAML or len(path.parts) > 1):
        raise FileNotFoundError(f"--tasks: {spec}: no such file or folder")
    return False


def _manager(folders: Sequence[str], defaults: bool) -> Any:
    """The harness's index of tasks; with its own ones, `defaults`, it takes some 15 seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=list(folders), include_defaults=defaults)


def _inside(folder: str, manager: Any) -> list[str]:
    """The names of a folder's tasks."""
    names: list[str] = manager.all_subtasks
    if not names:
        raise ValueError(
            f"--tasks: {folder}: no task in this folder: expected .yaml files with a line "
            '"task: NAME"'
        )
    return names


def _unknown(name: str, names: Sequence[str]) -> str:
    found = near(name, names, 3)
    hint = f"the nearest: {', '.join(found)}" if found else "`lm_eval ls tasks` lists them"
    return f"--tasks: {name!r} is no task of lm-evaluation-harness; {hint}"


def _load(manager: Any, name: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = manager.load([name])["tasks"]
    except ConnectionError as error:
        raise ConnectionError(
            f"task {name} needs the network, or its data in the Hugging Face cache "
            f"({reason_of(error)})"
        ) from error
    except Exception as error:  # a file of a user, read by YAML, jinja and datasets
        raise ValueError(f"task {name} can't be loaded ({reason_of(error)})") from error
    return found


def _set_examples(task: Any, num_fewshot: int | None) -> None:
    """As `lm_eval.simple_evaluate` does it."""
    own = task.get_config("num_fewshot")
    if own is None:
        task.set_config(key="num_fewshot", value=num_fewshot or 0)
    elif num_fewshot is not None and own != 0:
        task.set_config(key="num_fewshot", value=num_fewshot)
