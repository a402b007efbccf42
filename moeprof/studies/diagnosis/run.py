"""diagnose: all the measurements of a diagnosis, in order."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ... import demo
from ...checks import check_model, check_token_ids, check_tokenizer
from ...measure.bootstrap import DRAWS
from ...measure.passes import collect, evaluating
from ...models.blocks import fewest_experts
from ...null import Null, resolve_null
from ...routers import BH, FixedP, Router, TopK
from ...show.console import Bar, make_console
from ...show.console import progress as progress_bar
from ...texts.windows import HELDOUT_TOKENS, heldout_windows
from ..budget import BudgetError, set_budget
from .ablation import ablate, sample_positions
from .discoveries import discovery_rows
from .facts import describe
from .pvalues import p_value_rows, selection_rows
from .result import Diagnosis
from .rows import PATCHED, STOCK
from .seen import see, select
from .transfer import POOLED, domain_nulls, transfer_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn

    from ...checks import Tokenizer
    from ...null.layers import TokenNull
    from ...null.resolve import AnyNull
    from ...texts.documents import Text
    from ...texts.windows import HeldOut
    from .seen import Seen


POSITIONS = 1000
ALPHA = 0.3
BUDGET_TOKENS = 16384  # for FixedP's t: five passes at most


def diagnose(
    null: AnyNull | str | os.PathLike[str],
    model: nn.Module,
    tokenizer: Tokenizer,
    *,
    texts: Iterable[Text] | None = None,
    calibration: Iterable[Text] | None = None,
    router: Router | None = None,
    positions: int = POSITIONS,
    tokens: int = HELDOUT_TOKENS,
    norm: str = "model",
    seed: int = 0,
    draws: int = DRAWS,
    progress: bool = True,
) -> Diagnosis:
    """What a null and a router on it do to a model on held-out text; `Null.diagnose` calls it.

    Parameters
    ----------
    null : Null, path, "normal" or "softmax"
        What p-values are measured against.
    model : torch.nn.Module
        Not patched; it is afterwards as it was.
    tokenizer : callable
        The model's, as transformers has them.
    texts : objects with .domain, .name and .text
        Held-out text, not what the null was fitted to. Default: what ships with the demo model.
    calibration : the same, or an empty list
        Every other document of a domain (the first, third, ...) is for the nulls by domain, the
        others are for FixedP's budget. Default: as shipped. Empty: neither is done.
    router : Router
        Default BH(0.3).
    positions : int
        Positions at which experts are ablated, 0 for none.
    tokens : int
        Of the held-out text.
    norm : {"model", "none", "sum", "mass"}
        As for `moeprof.patch`.
    seed : int
        Chooses the windows, the positions and the experts that are added.
    draws : int
        Bootstrap draws over documents.

    Raises
    ------
    ValueError, TypeError
        For a null of another model, a router that is none, documents without a domain, more
        positions than the text has; no model, no tokenizer, or one of another model.
    """
    begun = time.perf_counter()
    check_model("diagnose", model)
    check_tokenizer("diagnose", tokenizer)
    resolved: Any = resolve_null(null)
    resolved.check(model)
    router = BH(ALPHA) if router is None else router
    if not isinstance(router, Router):
        raise TypeError(f"router: expected a moeprof.routers.Router, got {router!r}")
    documents = _checked("texts", demo.heldout_texts() if texts is None else texts)
    if not documents:
        raise ValueError("texts: expected at least one, got none")
    if calibration is None:
        calibration = demo.calibration_texts()
    for_nulls, for_budget = _halves(_checked("calibration", calibration))
    text = heldout_windows(tokenizer, documents, tokens, seed)
    check_token_ids(model, (window.ids for window in text.windows))
    places = sample_positions(text, positions, seed)
    work = _Work(resolved, model, tokenizer, router, norm, seed, draws, text)
    shown = progress_bar(make_console(), _steps(text, positions), "diagnose")
    with evaluating(model), shown as drawn:
        bar: Shown = drawn if progress else _Still()
        rows = list(work.passes(bar))
        if for_nulls and isinstance(resolved, Null):
            rows += work.transfer(for_nulls, bar)
        compared = {}
        if positions:
            compared = work.compared(for_budget, bar)
            rows += work.ablations(compared, places, bar)
    facts = describe(model, resolved, router, text) | {
        "norm": norm,
        "seed": seed,
        "draws": draws,
        "positions": positions,
        "ablated_documents": len(
            {w.document for w, at in zip(text.windows, places, strict=True) if len(at)}
        ),
        "compared": {name: repr(one) for name, one in compared.items()},
        "seconds": round(time.perf_counter() - begun, 1),
    }
    return Diagnosis(rows, facts)


class _Still:
    """A progress bar that nobody sees."""

    def step(self) -> None:
        pass

    def note(self, text: str) -> None:
        pass


def _steps(text: HeldOut, positions: int) -> int:
    """About how many windows will be run; what a budget takes is not known before."""
    passes = 3 + (3 + 3 if positions else 0)
    return passes * len(text.windows)


def _checked(name: str, documents: Iterable[Any]) -> list[Text]:
    documents = list(documents)
    for document in documents:
        if not all(hasattr(document, field) for field in ("domain", "name", "text")):
            kind = type(document).__name__
            raise TypeError(f"{name}: expected objects with domain, name and text, got a {kind}")
    return documents


def _halves(documents: Iterable[Text]) -> tuple[list[Text], list[Text]]:
    """Every other document of each domain, from the first and from the second on."""
    seen: dict[str, int] = {}
    halves: tuple[list[Text], list[Text]] = ([], [])
    for document in documents:
        number = seen[document.domain] = seen.get(document.domain, -1) + 1
        halves[number % 2].append(document)
    return halves


Shown = Bar | _Still


class _Work:
    """The measurements, in the order of their cost."""

    def __init__(
        self,
        null: Null | TokenNull,
        model: nn.Module,
        tokenizer: Tokenizer,
        router: Router,
        norm: str,
        seed: int,
        draws: int,
        text: HeldOut,
    ) -> None:
        self.null, self.model, self.tokenizer, self.router = null, model, tokenizer, router
        self.norm, self.seed, self.draws, self.text = norm, seed, draws, text
        self.domains = np.array([d["domain"] for d in text.documents])
        self.groups = np.unique(self.domains, return_inverse=True)[1]
        self.num_experts = fewest_experts(model)
        self.limits = router.limits(self.num_experts)
        self.stock: Seen | None = None

    def _null_for(self, router: Router) -> Null | TokenNull | None:
        return self.null if router.wants_null else None

    def passes(self, bar: Shown) -> Iterator[dict[str, Any]]:
        """p-values and selections, on the stock model's logits and on the patched model's."""
        for routing, router in ((STOCK, None), (PATCHED, self.router)):
            bar.note(f"{routing} model")
            null = None if router is None else self._null_for(router)
            seen = see(self.model, self.text, router, null=null, norm=self.norm, step=bar.step)
            if router is None:
                self.stock = seen
            selected = select(self.router, seen, self.null)
            bar.note("p-values")
            yield from p_value_rows(seen, self.null, routing, self.groups, self.draws)
            yield from selection_rows(seen, selected, self.limits, routing, self.groups, self.draws)

    def transfer(self, documents: list[Text], bar: Shown) -> Iterator[dict[str, Any]]:
        """Nulls fitted to one domain each, checked on all."""
        bar.note("nulls by domain")
        used = heldout_windows(self.tokenizer, documents, self.text.tokens, self.seed)
        null = cast("Null", self.null)  # others are of no domain
        nulls = domain_nulls(self.model, self.tokenizer, null, documents)
        calibration = see(self.model, used, step=bar.step)
        domains = np.array([d["domain"] for d in used.documents])
        return transfer_rows(
            {POOLED: null} | nulls,
            (calibration, domains),
            cast("Seen", self.stock),
            self.domains,
            self.router,
            self.draws,
        )

    def compared(self, for_budget: list[Text], bar: Shown) -> dict[str, Router]:
        """{label: Router}: the router, FixedP and top-k near its average number of experts."""
        found = {label(self.router): self.router}
        if isinstance(self.router, TopK):
            return found
        documents = for_budget or None
        text = (
            self.text
            if documents is None
            else heldout_windows(self.tokenizer, documents, BUDGET_TOKENS, self.seed)
        )
        bar.note("equal budgets")
        null = self._null_for(self.router)
        passed = collect(self.model, text, self.router, null=null, norm=self.norm, step=bar.step)
        average = float(passed.counts.mean())
        fixed = self._fixed_p(text, average, bar)
        k = min(max(round(average), 1), self.num_experts)
        for router in (fixed, TopK(k)):
            if router is not None:
                found.setdefault(label(router), router)
        return found

    def _fixed_p(self, text: HeldOut, average: float, bar: Shown) -> Router | None:
        """FixedP with the same limits and average; None if the router is one, or it can't."""
        if isinstance(self.router, FixedP) or not self.router.wants_null:
            return None
        fixed = FixedP(min_k=self.router.min_k, max_k=self.router.max_k)
        try:
            return set_budget(
                fixed,
                self.model,
                text,
                null=self.null,
                target=average,
                norm=self.norm,
                step=bar.step,
            ).router
        except BudgetError:
            return None

    def ablations(
        self, compared: dict[str, Router], places: list[NDArray[np.int64]], bar: Shown
    ) -> Iterator[dict[str, Any]]:
        """The same positions under each router."""
        for name, router in compared.items():
            bar.note(f"ablation, {name}")
            found = ablate(
                self.model,
                self.text,
                router,
                positions=places,
                null=self._null_for(router),
                norm=self.norm,
                seed=self.seed,
                step=bar.step,
            )
            yield from discovery_rows(found, name, self.groups, self.draws)


def label(router: Any) -> str:
    """Such as "bh 0.3": the router's name and main parameter, or "by layer" for several."""
    value = getattr(router, router.main)
    return f"{router.name} {'by layer' if isinstance(value, tuple) else format(value, '.3g')}"
