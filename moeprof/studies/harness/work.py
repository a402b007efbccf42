"""The study as cells: one task with one router each."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from copy import deepcopy
from functools import cached_property, partial
from importlib.metadata import version
from io import StringIO
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...files import as_json
from ...measure.passes import evaluating
from ...patching.patch import patch
from ..store.cells import Cell, Subject
from ..store.subject import subject
from .tasks import quiet

if TYPE_CHECKING:
    from torch import nn

    from ...checks import Tokenizer
    from ...null.resolve import AnyNull
    from ...routers.base import Router
    from ..engine.work import Make
    from .tasks import Tasks

KIND = "eval-harness"
OWN = "own top-k"  # the model as it is, which each router is compared with
DRAWS = 1000  # of the harness's own bootstrap, where it has no formula for a standard error
BATCH = 8  # requests


class HarnessWork:
    """Tasks as `Work`: for each task a cell with the model's own router, then one for each other.

    model, tokenizer : of Hugging Face transformers
    tasks : Tasks
    routers : {name: Router}
    null : where p-values come from; None where no router needs them
    limit : documents of each task; None is all
    batch_size : requests in one call of the model; it doesn't change the results

    Raises
    ------
    ValueError
        A tokenizer without a token for the end of a text; a task that makes no requests.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        tasks: Tasks,
        routers: Mapping[str, Router],
        *,
        null: AnyNull | str | None = None,
        limit: int | None = None,
        batch_size: int = BATCH,
    ) -> None:
        _check_end(tokenizer)
        self.model, self.tokenizer, self.null = model, tokenizer, null
        self.tasks, self.limit, self.batch_size = tasks, limit, batch_size
        self.routers: dict[str, Router | None] = {OWN: None, **routers}
        self.cells: list[Cell] = []
        self._steps: dict[str, int] = {}
        for name in tasks.loaded:
            self._add(name)

    def _add(self, name: str) -> None:
        """The cells of a task."""
        number, digest = self.tasks.requests(name, self.limit)
        for called, router in self.routers.items():
            parameters = {
                "task": name,
                "router": None if router is None else repr(router),
                "called": called,
                "limit": self.limit,
                "num_fewshot": self.tasks.loaded[name].get_config("num_fewshot"),
                "seed": self.tasks.seed,
                "requests": digest,
                "lm_eval": version("lm_eval"),
            }
            cell = Cell(KIND, f"{name}, {called}", parameters)
            self.cells.append(cell)
            self._steps[cell.name] = number

    @cached_property
    def subject(self) -> Subject:
        # The requests themselves are in each cell's key, so that a task more is no other text.
        return subject(self.model, _tokenizer_digest(self.tokenizer), self.null)

    @property
    def make(self) -> Make:
        return partial(
            HarnessWork,
            tasks=self.tasks,
            routers={name: router for name, router in self.routers.items() if router is not None},
            null=self.null,
            limit=self.limit,
            batch_size=self.batch_size,
        )

    def steps(self, cell: Cell) -> int:
        return self._steps[cell.name]

    def run(self, cell: Cell, step: Callable[[], object]) -> dict[str, Any]:
        """What the harness measures, see `_result`, and what the routers chose.

        experts : experts of a token, the mean over tokens and layers; by_layer (L,)
        tokens : of all requests, those that the model was given to read, without padding
        documents, requests : how many; truncated : requests whose beginning was cut off
        """
        from lm_eval.evaluator import evaluate

        from .language_model import CountingLM

        name, router = cell.parameters["task"], self.routers[cell.parameters["called"]]
        null = self.null if router is not None and router.wants_null else None
        with quiet(), evaluating(self.model), patch(self.model, router, null=null) as handle:
            tokenizer = deepcopy(self.tokenizer)  # HFLM gives it a token for padding
            lm = CountingLM(self.model, tokenizer, handle, self.batch_size, step)
            task = self.tasks.begin(name)
            _seed(self.tasks.seed)
            found = evaluate(
                lm,
                {"tasks": {name: task}, "groups": {}, "group_map": {}},
                limit=self.limit,
                bootstrap_iters=0,  # it would start processes; `_error` does it without
            )
        by_layer = (lm.experts / max(lm.tokens, 1)).tolist()
        samples = found["samples"][name]
        counts = {
            "documents": len({sample["doc_id"] for sample in samples}),
            "requests": self._steps[cell.name],
            "truncated": lm.truncated,
            "tokens": lm.tokens,
            "experts": float(np.mean(by_layer)),
            "by_layer": by_layer,
        }
        measured: dict[str, Any] = as_json(
            counts | {"metrics": _metrics(task, found["results"][name], samples)}
        )
        return measured


def _seed(seed: int) -> None:
    """Whatever is drawn at random, as by a task that samples its answers, is the same each time."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _metrics(
    task: Any, results: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Of each metric a dict: name, filter (of the answers, "none" mostly), value and stderr as the
    harness computes them (stderr None where it has no way), higher_is_better; documents [id] and
    the values of each, in their order."""
    made = []
    keys = dict.fromkeys((m, s["filter"]) for s in samples for m in s["metrics"])
    for metric, kind in keys:
        own = [s for s in samples if s["filter"] == kind and metric in s]
        values = [s[metric] for s in own]
        made.append(
            {
                "name": metric,
                "filter": kind,
                "value": results[f"{metric},{kind}"],
                "stderr": _error(task.aggregation().get(metric), values),
                "higher_is_better": task.higher_is_better().get(metric),
                "documents": [s["doc_id"] for s in own],
                "values": values,
            }
        )
    return made


def _error(aggregate: Any, values: Sequence[Any]) -> float | None:
    """The standard error, by the harness's own formula or its bootstrap, in this process."""
    from lm_eval.api import metrics

    found = metrics.stderr_for_metric(aggregate, DRAWS)
    if found is None or len(values) < 2:
        return None
    with _one_process(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        return float(found(values))


@contextmanager
def _one_process() -> Iterator[None]:
    """The harness's bootstrap without a process for each core, by the switch that it has."""
    name = "DISABLE_MULTIPROC"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _check_end(tokenizer: Any) -> None:
    """ValueError for a tokenizer without an end of text: the harness begins texts with it, stops
    at it, and pads with it where there is no token for padding."""
    if getattr(tokenizer, "eos_token_id", None) is None:
        raise ValueError(
            "the tokenizer has no token for the end of a text, which lm-evaluation-harness begins "
            "and ends texts with: set tokenizer.eos_token, or eos_token in its "
            "tokenizer_config.json"
        )


def _tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 of all that a tokenizer does with a text; of one in Python its vocabulary."""
    inner = getattr(tokenizer, "backend_tokenizer", None)
    said = inner.to_str() if inner is not None else sorted(tokenizer.get_vocab().items())
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    whole = json.dumps([said, special], default=str, sort_keys=True)
    return hashlib.sha256(whole.encode("utf-8", "surrogatepass")).hexdigest()
