"""diagnose: all the measurements of a diagnosis, in order."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ... import demo
from ...checks import check_model, check_token_ids, check_tokenizer
from ...measure.bootstrap import DRAWS
from ...null import Null, resolve_null
from ...routers import BH, Router
from ...show.console import make_console
from ...show.console import progress as progress_bar
from ...texts.windows import HELDOUT_TOKENS, HeldOut, heldout_windows
from ..engine.engine import Listener, announce
from ..engine.staged import recall, run_stages
from .facts import describe
from .result import Diagnosis
from .work import DiagnosisWork

if TYPE_CHECKING:
    from torch import nn

    from ...checks import Tokenizer
    from ...null.resolve import AnyNull
    from ...texts.documents import Text
    from ..engine.engine import Engine
    from ..store.store import Store


POSITIONS = 1000
ALPHA = 0.3
BUDGET_TOKENS = 16384  # for FixedP's t: five passes at most
NO_TEXT = HeldOut([], [])


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
    budget_tokens: int = BUDGET_TOKENS,
    norm: str = "model",
    seed: int = 0,
    draws: int = DRAWS,
    progress: bool = True,
    store: Store | None = None,
    engine: Engine | None = None,
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
    budget_tokens : int
        Of the text that sets the other routers to as many experts.
    norm : {"model", "none", "sum", "mass"}
        As for `moeprof.patch`.
    seed : int
        Chooses the windows, the positions and the experts that are added.
    draws : int
        Bootstrap draws over documents.
    store : Store
        Where finished parts are kept, and found by the same call after it was interrupted.
        Without it nothing is kept.
    engine : Engine
        What runs the parts, with a store; this process when not given.

    Raises
    ------
    ValueError, TypeError
        For a null of another model, a router that is none, documents without a domain, more
        positions than the text has; no model, no tokenizer, or one of another model.
    """
    work = diagnosis_work(
        null,
        model,
        tokenizer,
        texts=texts,
        calibration=calibration,
        router=router,
        positions=positions,
        tokens=tokens,
        budget_tokens=budget_tokens,
        norm=norm,
        seed=seed,
        draws=draws,
    )
    console = make_console()
    if store is not None:
        recall(work, store)
        announce(console, store, work)
    listener = Listener(done=lambda cell, result, ran: work.found.update({cell.name: result}))
    with progress_bar(console, work.all_steps, "diagnose", "windows", shown=progress) as bar:
        listener.begin, listener.step = lambda cell: bar.note(cell.name), bar.step
        run_stages(work, store, listener, engine)
    results = [work.found[cell.name] for cell in work.cells]
    facts = describe(model, work.null, work.router, work.text) | {
        "norm": norm,
        "seed": seed,
        "draws": draws,
        "positions": positions,
        "ablated_documents": len(
            {w.document for w, at in zip(work.text.windows, work.places, strict=True) if len(at)}
        ),
        "compared": {name: repr(one) for name, one in work.compared.items()},
        "seconds": round(sum(result["seconds"] for result in results), 1),
    }
    return Diagnosis((row for result in results for row in result.get("rows", ())), facts)


def diagnosis_work(
    null: AnyNull | str | os.PathLike[str],
    model: nn.Module,
    tokenizer: Tokenizer,
    *,
    texts: Iterable[Text] | None,
    calibration: Iterable[Text] | None,
    router: Router | None,
    positions: int,
    tokens: int,
    budget_tokens: int,
    norm: str,
    seed: int,
    draws: int,
) -> DiagnosisWork:
    """What `diagnose`, where the defaults are, runs of its arguments."""
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
    for_nulls = for_nulls if isinstance(resolved, Null) else []
    windows = heldout_windows(tokenizer, for_nulls, text.tokens, seed) if for_nulls else NO_TEXT
    budget = heldout_windows(tokenizer, for_budget, budget_tokens, seed) if for_budget else text
    return DiagnosisWork(
        model,
        tokenizer,
        resolved,
        router,
        norm,
        seed,
        draws,
        positions,
        text,
        for_nulls,
        windows,
        budget,
    )


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
