"""A grid on one model and text as cells: one a configuration, then one for all of their times."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch

from ... import demo
from ...demo.defaults import default_null
from ...models.blocks import experts_of
from ...models.tokens import prompt_ids
from ...null import Null
from ...null.resolve import resolve_null
from ...patching.patch import plan_patch
from ...texts.documents import read_documents
from ...texts.prompts import read_prompts
from ...texts.windows import heldout_windows, passages, spread
from ..budget.setting import with_main
from ..budget.stock import budget_text
from ..comparison.bytes_read import expert_bytes
from ..comparison.speed import Timed, decode_speeds
from ..engine.measured import Measured
from ..store.cells import described
from ..store.subject import null_digest, subject, text_digest
from ..sweep.beside import Budgets
from ..sweep.runner import Experiment
from .settings import FITTED, NULLS, TEXT

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ...checks import Tokenizer
    from ...null.resolve import AnyNull
    from ...routers.base import Router
    from ...texts.documents import Text
    from ...texts.windows import HeldOut
    from ..engine.work import Make
    from ..store.cells import Cell, Subject
    from .planned import Configuration
    from .settings import Grid


PROMPT = 200  # characters of a prompt that is cut from a text


class GridWork(Measured):
    """The configurations of a grid on one model, text and seed, as `Work`: a cell each.

    configurations: as `Grid.configurations` gives them; nulls: {name in the grid: a null, or a
    word that stands for one}; prompts, complexities, heldout, new_tokens: as Experiment has them;
    calibration: HeldOut, the text that budgets are set on. ValueError, naming the configuration,
    for a router that can't be patched with its null.
    """

    kind = "grid"

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        *,
        configurations: Sequence[Configuration],
        nulls: Mapping[str, AnyNull | str],
        prompts: tuple[str, ...],
        complexities: tuple[str | None, ...],
        heldout: HeldOut,
        calibration: HeldOut,
        new_tokens: int,
    ) -> None:
        super().__init__()
        self.configurations, self.nulls, self.calibration = configurations, nulls, calibration
        self.experiment = Experiment(
            model, tokenizer, prompts, complexities, heldout, None, new_tokens
        )
        self._bytes = expert_bytes(model)
        setters = {
            name: Budgets(replace(self.experiment, null=nulls.get(name)), calibration)
            for name in {one.null or "" for one in configurations}
        }
        self.cells = [self._cell(one, setters[one.null or ""]) for one in configurations]

    @classmethod
    def of(
        cls, grid: Grid, model: nn.Module, tokenizer: Tokenizer, text: str, seed: int
    ) -> GridWork:
        """GridWork of one text and seed of a grid; it reads the text and fits nulls."""
        planned = grid.configurations(*experts_of(model)).configurations
        documents = demo.heldout_texts() if text == TEXT else read_documents([text])
        prompts = _prompts(grid, documents, seed)
        names = dict.fromkeys(one.null for one in planned if one.null is not None)
        return cls(
            model,
            tokenizer,
            configurations=planned,
            nulls={name: _null(grid, name, model, tokenizer, seed) for name in names},
            prompts=tuple(prompt for _, prompt in prompts),
            complexities=tuple(label for label, _ in prompts),
            heldout=heldout_windows(tokenizer, documents, grid.tokens, seed),
            calibration=budget_text(tokenizer, seed),
            new_tokens=grid.new_tokens,
        )

    @cached_property
    def subject(self) -> Subject:
        """Of no null: that is among the parameters of the cells that have one."""
        experiment = self.experiment
        text = text_digest(experiment.heldout, self.calibration, prompts=experiment.prompt_ids())
        return subject(experiment.model, text, None)

    @property
    def make(self) -> Make:
        shared = self.experiment.shared
        del shared["null"]  # each configuration has its own
        return partial(
            GridWork,
            configurations=self.configurations,
            nulls=self.nulls,
            calibration=self.calibration,
            **shared,
        )

    def times(self, found: Mapping[str, dict[str, Any]], rounds: int, seed: int) -> TimesWork:
        """The times of what was run. found: {configuration: result}; rounds: how often each."""
        routers = {
            one.name: (_that_ran(one, found[one.name]), self.nulls.get(one.null or ""))
            for one in self.configurations
            if not found[one.name].get("error")
        }
        experiment = self.experiment
        return TimesWork(
            experiment.model,
            experiment.tokenizer,
            routers=routers,
            prompts=experiment.prompts,
            new_tokens=experiment.new_tokens,
            rounds=rounds,
            seed=seed,
        )

    def _cell(self, one: Configuration, setter: Budgets) -> Cell:
        experiment, null = setter.experiment, self.nulls.get(one.null or "")
        try:
            plan_patch(experiment.model, one.router, null=null)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{one.name}: {error}") from None
        measure: Callable[..., dict[str, Any]]
        if one.budget is None or one.router is None:
            measure, steps = partial(experiment.run, one.router), experiment.steps
            load = experiment.load(one.router)
        else:
            measure, steps = partial(setter.run, one.router, one.budget), setter.steps
            load = setter.load(one.budget)
        return self.cell(
            one.name,
            partial(self._measure, measure),
            steps,
            load,
            router=described(one.router),
            budget=one.budget,
            null=null_digest(null),
            new_tokens=experiment.new_tokens,
        )

    def _measure(
        self, measure: Callable[..., dict[str, Any]], step: Callable[[], object]
    ) -> dict[str, Any]:
        result = measure(step=step)
        if not result.get("error"):
            read = self._bytes @ result["experts_by_layer_heldout"]
            result["bytes_per_token"] = float(read)
        return result


class TimesWork(Measured):
    """The decode speed of routers as `Work` of one cell, in which they are timed in turn.

    routers: {name: (Router or None, its null)}; prompts: texts, one a round; rounds: how often
    each is timed; seed: draws their order, anew each round. Its result: {"tokens_per_s": {name:
    one of each round}, "threads": of torch}.
    """

    kind = "grid times"

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        *,
        routers: Mapping[str, tuple[Router | None, AnyNull | str | None]],
        prompts: tuple[str, ...],
        new_tokens: int,
        rounds: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.model, self.routers, self.prompts = model, routers, prompts
        self._settings: dict[str, Any] = {"new_tokens": new_tokens, "rounds": rounds, "seed": seed}
        self._ids: list[Tensor] = [prompt_ids(tokenizer, text) for text in prompts]
        self.cells = [
            self.cell(
                "times",
                self._measure,
                rounds * len(routers),
                alone=True,
                routers=[
                    [name, described(router), null_digest(null)]
                    for name, (router, null) in routers.items()
                ],
                threads=torch.get_num_threads(),
                **self._settings,
            )
        ]

    @cached_property
    def subject(self) -> Subject:
        return subject(self.model, text_digest(prompts=self._ids), None)

    @property
    def make(self) -> Make:
        settings = {"routers": self.routers, "prompts": self.prompts, **self._settings}
        return partial(TimesWork, **settings)

    def _measure(self, step: Callable[[], object]) -> dict[str, Any]:
        timed = [
            Timed(router, None if null is None else resolve_null(null))
            for router, null in self.routers.values()
        ]
        settings = self._settings
        prompts = [self._ids[i % len(self._ids)] for i in range(settings["rounds"])]
        speeds = decode_speeds(
            self.model,
            prompts,
            timed,
            seed=settings["seed"],
            new_tokens=settings["new_tokens"],
            step=step,
        )
        each = dict(zip(self.routers, speeds, strict=True))
        return {"tokens_per_s": each, "threads": torch.get_num_threads()}


def _that_ran(one: Configuration, result: Mapping[str, Any]) -> Router | None:
    """The router with what a budget set."""
    if one.budget is None or one.router is None:
        return one.router
    return with_main(one.router, result["value"])


def _null(
    grid: Grid, name: str, model: nn.Module, tokenizer: Tokenizer, seed: int
) -> AnyNull | str:
    """What a grid's name for a null stands for; ValueError with its place for another model's."""
    if name in FITTED:
        return default_null(model, tokenizer, seed=seed, kind=name)
    if name in NULLS:
        return name
    null = Null.load(name)
    try:
        null.check(model)
    except ValueError as error:
        keys = next(keys for keys, named in grid.named_nulls() if named == name)
        raise grid.error(keys, f"{name}: {error}") from None
    return null


def _prompts(grid: Grid, documents: Iterable[Text], seed: int) -> Sequence[tuple[str | None, str]]:
    """[(complexity or None, prompt)]: given ones, or `samples` passages of the text."""
    if grid.samples is None:
        return demo.prompts() if grid.prompts == TEXT else read_prompts(grid.prompts)
    pieces = {
        domain: [[piece for piece in document if piece.strip()] for document in cut]
        for domain, cut in passages(documents, PROMPT).items()
    }
    found = spread(pieces, lambda piece: 1, grid.samples, seed)
    if len(found) < grid.samples:
        raise grid.error(
            ["samples"],
            f"samples: the text has {len(found)} passages of {PROMPT} characters, expected "
            f"{grid.samples}",
        )
    return [(None, piece) for piece in found]
