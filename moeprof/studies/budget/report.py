"""Router.with_budget, and what it reports."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ...checks import check_model, check_token_ids, check_tokenizer
from ...measure.bootstrap import intervals
from ...measure.passes import collect, evaluating
from ...models.blocks import fewest_experts, find_blocks, model_norm
from ...routers import Router, TopK
from ...show.console import fill, make_console, printed
from ...show.console import progress as progress_bar
from ...show.tables import notebook_table, text_table
from ...texts.documents import Document, read_texts
from ...texts.windows import HELDOUT_TOKENS, HeldOut, heldout_windows
from .layers import sensitivity, shortened, split
from .setting import (
    MAX_PASSES,
    Trial,
    check,
    check_reach,
    check_target,
    check_whole,
    find,
    main_of,
    reach,
    resolve,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from rich.console import Console
    from torch import nn

    from ...checks import Tokenizer
    from ...measure.passes import Pass
    from ...null.resolve import AnyNull
    from .setting import Values


FIFTH = 5  # one document of so many is set aside to check the setting on
SENSITIVITY_TOKENS = 8192  # of the text: they are run L * max_k times
SEED = 0  # of which documents those are


class Measured(NamedTuple):
    """Experts per token that the patched model takes on a text.

    average_k : over all tokens and layers
    error : its standard error by a bootstrap over documents; NaN for a single document
    by_layer : (L,) the same of each layer
    tokens, documents : of the text
    """

    average_k: float
    error: float
    by_layer: NDArray[np.float64]
    tokens: int
    documents: int

    def __str__(self) -> str:
        error = "" if math.isnan(self.error) else f" ± {self.error:.2g}"
        of = f"{self.documents} document{'s' * (self.documents != 1)}"
        return f"{self.average_k:.4g}{error} ({self.tokens:,} tokens of {of})"


@dataclass(eq=False, repr=False)
class BudgetReport:
    """How a router's main parameter was set; `router.budget` of what `with_budget` returns.

    router : the router in words
    name : of its main parameter
    parameter : what that is now, one value for all layers or a tuple
    average_k : experts per token, as asked for
    targets : (L,) where they were split over the layers, or None
    reach : (L, 2) smallest and largest averages on the unpatched model's logits
    passes : a Trial for each pass of the calibration text
    calibration, heldout : experts per token in the patched model, on each of the texts
    sensitivity : (L, len(ks)) KL in nats per token with one layer at top-k, or None
    ks : those that were tried for `sensitivity`
    norm : of the weights
    seconds : that all of it took
    note : what it falls short by, "" if nothing
    """

    router: str
    name: str
    parameter: Values
    average_k: float
    targets: NDArray[np.float64] | None
    reach: NDArray[np.float64]
    passes: list[Trial]
    calibration: Measured
    heldout: Measured
    sensitivity: NDArray[np.float64] | None
    ks: tuple[int, ...]
    norm: str
    seconds: float
    note: str

    def __repr__(self) -> str:
        return printed(self._parts())

    def _repr_html_(self) -> str:
        lines = "".join(f"<p>{escape(line)}</p>" for line in self._lines())
        tables = (notebook_table(head, rows, title) for title, head, rows in self._tables())
        return lines + "".join(tables)

    def print(self, console: Console | None = None) -> None:
        """The report as tables on a rich console; stdout unless given."""
        console = make_console() if console is None else console
        for part in self._parts():
            console.print(part)

    def _parts(self) -> Iterator[Any]:
        yield from map(fill, self._lines())
        for title, head, rows in self._tables():
            yield f"\n{title}"
            yield text_table(head, rows, words=())

    def _lines(self) -> list[str]:
        low, high = self.reach.mean(axis=0)
        return [
            f"{self.router}: {self.average_k:g} experts per token asked for, within a reach of "
            f"{low:.4g} to {high:.4g}",
            f"calibration text: {self.calibration}",
            f"held-out text: {self.heldout}",
            f"weights: norm={self.norm!r}; {self.seconds:.1f} s",
            *([self.note] if self.note else []),
        ]

    def _tables(self) -> Iterator[tuple[str, list[str], list[list[str]]]]:
        """(title, header, rows of strings) of the passes and of the layers."""
        count = len(self.reach)
        passes = []
        for number, trial in enumerate(self.passes, 1):
            predicted, found = trial.predicted.mean(), trial.found.mean()
            # One parameter a layer is in the table of the layers.
            value = "by layer" if isinstance(trial.parameter, tuple) else f"{trial.parameter:.6g}"
            off = f"{found / self.average_k - 1:+.2%}"
            passes.append([str(number), value, f"{predicted:.4g}", f"{found:.4g}", off])
        yield (
            "Passes of the calibration text",
            ["pass", self.name, "predicted", "found", "off"],
            passes,
        )
        parameters = self.parameter
        if not isinstance(parameters, tuple):
            parameters = (parameters,) * count
        targets = ["" if self.targets is None else f"{t:.4g}" for t in self._targets()]
        layers = [
            [
                str(i),
                f"{low:.4g} to {high:.4g}",
                targets[i],
                f"{parameters[i]:.6g}",
                f"{self.calibration.by_layer[i]:.4g}",
                f"{self.heldout.by_layer[i]:.4g}",
            ]
            for i, (low, high) in enumerate(self.reach)
        ]
        header = ["layer", "reach", "target", self.name, "calibration", "held-out"]
        yield "Experts per token by layer", header, layers

    def _targets(self) -> Sequence[float] | NDArray[np.float64]:
        return [0.0] * len(self.reach) if self.targets is None else self.targets


def with_budget(
    router: Router,
    model: nn.Module,
    tokenizer: Tokenizer,
    texts: Iterable[Any],
    average_k: float = 6.0,
    per_layer: bool = False,
    *,
    null: AnyNull | str | os.PathLike[str] | None = None,
    heldout: Iterable[Any] | None = None,
    norm: str = "model",
    tokens: int = HELDOUT_TOKENS,
    progress: bool = True,
) -> Router:
    """What `Router.with_budget` does; its docstring is there."""
    begun = time.perf_counter()
    main_of(router)
    check_model("with_budget", model)
    check_tokenizer("with_budget", tokenizer)
    asked: Any = check_target(average_k)
    if np.ndim(asked):
        raise TypeError("average_k: expected a number; the split over layers is per_layer=True")
    average_k = asked
    if null is not None and not router.wants_null:
        raise ValueError("null: given, but the router does not work on p-values")
    texts, heldout = _texts(texts, heldout)
    null = resolve(router, null, stacklevel=5)
    check(router, model, null, norm)
    if isinstance(router, TopK):
        check_whole(average_k, len(find_blocks(model)), per_layer=per_layer)
    text = _windows(tokenizer, texts, tokens, "texts")
    held = _windows(tokenizer, heldout, tokens, "heldout")
    check_token_ids(model, (window.ids for part in (text, held) for window in part.windows))
    ks = _candidates(router, model, average_k) if per_layer else ()
    steps = _steps(text, held, ks, model)
    shown = progress_bar(make_console(), steps, "own routing", "windows", shown=progress)
    with shown as bar, evaluating(model):
        passed = collect(model, text, step=bar.step)
        reached = reach(router, passed, null)
        check_reach(router, average_k, reached, passed.logits.shape[2])
        target: float | NDArray[np.float64] = average_k
        cost = None
        if per_layer:
            bar.note("sensitivity")
            few = shortened(text, SENSITIVITY_TOKENS)
            cost = sensitivity(model, few, ks, norm=norm, step=bar.step)
            target = split(cost, ks, reached, average_k, whole=isinstance(router, TopK))
        bar.note(f"setting {router.name}")
        setting, short = find(
            router, model, text, target, null, passed=passed, norm=norm, step=bar.step
        )
        bar.note("held-out text")
        checked = collect(model, held, setting.router, null=null, norm=norm, step=bar.step)
    if short:
        warnings.warn(short, stacklevel=3)
    result = setting.router
    report = BudgetReport(
        repr(result),
        main_of(router)[0],
        setting.parameter,
        average_k,
        np.asarray(setting.target) if per_layer else None,
        reached,
        setting.passes,
        _measured(setting.passed, text),
        _measured(checked, held),
        cost,
        tuple(ks),
        norm,
        time.perf_counter() - begun,
        short,
    )
    return replace(result, budget=report)


def _texts(
    texts: Iterable[Any], heldout: Iterable[Any] | None
) -> tuple[list[Document], list[Document]]:
    """The texts to calibrate and to check on; a fifth of the former is set aside if need be."""
    texts = read_texts(texts, "texts")
    if heldout is not None:
        return texts, read_texts(heldout, "heldout")
    if len(texts) < 2:
        raise ValueError(
            "texts: expected two texts or more, one to check the setting on; or give heldout="
        )
    drawn = np.random.default_rng(SEED).permutation(len(texts))
    order = sorted(drawn, key=lambda i: texts[i].domain)  # each domain gives its share
    aside = set(order[FIFTH - 1 :: FIFTH] or order[-1:])
    kept = [text for i, text in enumerate(texts) if i not in aside]
    return kept, [text for i, text in enumerate(texts) if i in aside]


def _windows(tokenizer: Tokenizer, texts: list[Document], tokens: int, argument: str) -> HeldOut:
    try:
        return heldout_windows(tokenizer, texts, tokens)
    except ValueError as error:
        raise ValueError(f"{argument}: no text of two tokens or more") from error


def _candidates(router: Router, model: nn.Module, average_k: float) -> range:
    """1 to the largest number of experts that the split may give to a layer."""
    num_experts = fewest_experts(model)
    most = router.at(0, len(find_blocks(model))).limits(num_experts)[1]
    if isinstance(router, TopK):
        most = max(most, model_norm(model)[1], math.ceil(average_k))
    return range(1, min(most, num_experts) + 1)


def _steps(text: HeldOut, held: HeldOut, ks: Sequence[int], model: nn.Module) -> int:
    """Windows to run if every pass is needed."""
    own = model_norm(model)[1]
    runs = 1 + len(find_blocks(model)) * sum(k != own for k in ks) if ks else 0
    windows = len(text.windows) * (1 + MAX_PASSES) + len(held.windows)
    return windows + runs * len(shortened(text, SENSITIVITY_TOKENS).windows)


def _measured(passed: Pass, text: HeldOut) -> Measured:
    count = len(text.documents)
    experts = np.bincount(passed.documents, passed.counts.mean(axis=0), count)
    sizes = np.bincount(passed.documents, minlength=count)
    domains = [document["domain"] for document in text.documents]
    groups = np.unique(domains, return_inverse=True)[1]
    found = intervals(lambda w: (w @ experts / (w @ sizes))[:, None], count, groups=groups)
    average = float(passed.counts.mean())
    return Measured(
        average, float(found.error[0]), passed.counts.mean(axis=1), int(sizes.sum()), count
    )
