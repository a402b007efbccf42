"""The study as cells: one task with one router each."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import cached_property, partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ... import demo
from ...files import as_json
from ...measure.passes import evaluating, patched
from ...routers.table import describe
from ...texts.windows import BUDGET_TOKENS
from ..configuration import with_own
from ..store.cells import Cell, Subject, described
from ..store.subject import null_digest, subject
from .samples import metrics_of
from .tasks import quiet

if TYPE_CHECKING:
    from torch import nn

    from ...checks import Tokenizer
    from ...routers.base import Router
    from ..configuration import Configuration
    from ..engine.work import Make
    from .tasks import Tasks

KIND = "eval-harness"
BATCH = 8  # requests


class HarnessWork:
    """Tasks as `Work`: for each task a cell with the model's own routing, then one each router.

    model, tokenizer : of Hugging Face transformers
    tasks : Tasks
    configurations : [Configuration], without the model's own routing
    limit : documents of each task; None is all
    batch_size : requests in one call of the model; it doesn't change the results

    Raises
    ------
    ValueError
        A router that doesn't fit the model; two of one name; a tokenizer without a token for the
        end of a text; a task that makes no requests.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        tasks: Tasks,
        configurations: Sequence[Configuration] = (),
        *,
        limit: int | None = None,
        batch_size: int = BATCH,
    ) -> None:
        _check_end(tokenizer)
        self.model, self.tokenizer = model, tokenizer
        self.tasks, self.limit, self.batch_size = tasks, limit, batch_size
        self.configurations = with_own(model, configurations)
        self.cells: list[Cell] = []
        self._steps: dict[str, int] = {}
        self._at_budget: dict[str, Router] = {}
        for name in tasks.loaded:
            self._add(name)

    def _add(self, name: str) -> None:
        """The cells of a task."""
        number, digest = self.tasks.requests(name, self.limit)
        for called, router, budget, null in self.configurations.values():
            parameters = {
                "task": name,
                "called": called,
                "router": described(router),
                "budget": budget,
                "null": null_digest(null),
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
        """Each cell names its own requests and null; what makes tokens of them is here."""
        return subject(self.model, _tokenizer_digest(self.tokenizer), None)

    @property
    def make(self) -> Make:
        return partial(
            HarnessWork,
            tasks=self.tasks,
            configurations=list(self.configurations.values())[1:],
            limit=self.limit,
            batch_size=self.batch_size,
        )

    def steps(self, cell: Cell) -> int:
        return self._steps[cell.name]

    def run(self, cell: Cell, step: Callable[[], object]) -> dict[str, Any]:
        """What the harness measures of a task, and what the router chose.

        ran : the router with its parameters
        documents, requests : how many; truncated : requests whose beginning was cut off
        tokens : that the model read, of all requests, without padding
        experts : of a token, the mean over these tokens and the layers; by_layer (L,)
        metrics : see `metrics_of`
        """
        from lm_eval.evaluator import evaluate

        from .language_model import CountingLM

        name, one = cell.parameters["task"], self.configurations[cell.parameters["called"]]
        router = one.router if one.budget is None else self._set(one)
        with (
            quiet(),
            evaluating(self.model),
            patched(self.model, router, null=one.null) as handle,
        ):
            tokenizer = deepcopy(self.tokenizer)  # HFLM gives it a token for padding
            lm = CountingLM(self.model, tokenizer, handle, self.batch_size, step)
            task = self.tasks.begin(name)
            _seed(self.tasks.seed)
            found = evaluate(
                lm,
                {"tasks": {name: task}, "groups": {}, "group_map": {}},
                limit=self.limit,
                bootstrap_iters=0,  # it would start processes; `metrics_of` does it without
            )
        samples, by_layer = found["samples"][name], lm.experts / max(lm.tokens, 1)
        measured: dict[str, Any] = as_json(
            {
                "ran": describe([router]),
                "documents": len({sample["doc_id"] for sample in samples}),
                "requests": self._steps[cell.name],
                "truncated": lm.truncated,
                "tokens": lm.tokens,
                "experts": by_layer.mean(),
                "by_layer": by_layer,
                "metrics": metrics_of(task, found["results"][name], samples),
            }
        )
        return measured

    def _set(self, one: Configuration) -> Router:
        """The router at its budget, set once for all tasks, on text that no null was fitted to."""
        if one.name not in self._at_budget:
            router: Any = one.router
            self._at_budget[one.name] = router.with_budget(
                self.model,
                self.tokenizer,
                demo.calibration_halves()[1],
                average_k=one.budget,
                null=one.null,
                tokens=BUDGET_TOKENS,
                progress=False,
            )
        return self._at_budget[one.name]


def _seed(seed: int) -> None:
    """Whatever is drawn at random, as by a task that samples its answers, is the same each time."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


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
