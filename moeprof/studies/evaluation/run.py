"""evaluate: a text, the model as it is and under other routers, in order."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from ... import demo
from ...checks import check_model, check_tokenizer, check_type
from ...measure import machine
from ...measure.bootstrap import DRAWS
from ...models.identity import model_name
from ...models.quantized import described_dtype
from ...null import resolve_null
from ...routers import Router
from ...routers.table import describe
from ...routers.written import written_router
from ...show.console import make_console
from ...show.console import progress as progress_bar
from ...texts.documents import Document, read_texts
from ...texts.windows import BUDGET_TOKENS, HELDOUT_TOKENS
from ..budget.stock import budget_text
from ..configuration import Configuration, null_for, with_own
from ..engine.engine import Listener, announce
from ..engine.serial import Serial
from ..store.store import Store
from .measure import Protocol, evaluation_text, protocol_for
from .result import Evaluated
from .work import EvaluationWork

if TYPE_CHECKING:
    from torch import nn

    from ...checks import Tokenizer
    from ...null.resolve import AnyNull
    from ..engine.engine import Engine


def evaluate(
    model: nn.Module,
    tokenizer: Tokenizer,
    routers: Iterable[str | Router] | Mapping[str, Router | Callable[..., Any]] = (),
    *,
    texts: Iterable[Any] | None = None,
    null: AnyNull | str | os.PathLike[str] | None = None,
    context: int | None = None,
    stride: int | None = None,
    tokens: int = HELDOUT_TOKENS,
    norm: str = "model",
    budget_tokens: int = BUDGET_TOKENS,
    seed: int = 0,
    draws: int = DRAWS,
    store: Store | str | os.PathLike[str] | None = None,
    engine: Engine | None = None,
    progress: bool = True,
) -> Evaluated:
    """How well a model predicts a text, as it is and under each of the routers.

    Parameters
    ----------
    model : torch.nn.Module
        Of Hugging Face transformers, of a family that `moeprof.patch` runs. It is afterwards as
        it was.
    tokenizer : callable
        The model's.
    routers : list of str or Router, or dict of name and Router or callable
        "topk:k=4", "bh:alpha=0.3,max_k=16"; "bh@6" is a router set to 6 experts per token, on
        the calibration text that ships with moeprof. A callable is a router of your own, as for
        `moeprof.patch`; it can't be kept in a store. The model's own routing always comes first.
    texts : list of str, or of objects with .text, .domain and .complexity
        Each is a document. Default: the held-out text that ships with moeprof.
    null : Null, str, path or None
        For routers on p-values, as for `moeprof.patch`. Default: what each router needs, the demo
        model's own or fitted to the shipped calibration text first.
    context, stride : int, optional
        Tokens of a window, and from the start of one to that of the next. Default: 2048, or as
        many positions as the model has; windows one after the other.
    tokens : int
        About so many tokens of the texts are scored at most, spread over domains and documents.
    norm : {"model", "none", "sum", "mass"}
        As for `moeprof.patch`.
    budget_tokens : int
        Tokens of the calibration text that budgets are set on; it is read a few times a router.
    seed : int
        Chooses the windows, the bootstrap draws and the sign flips.
    draws : int
        Bootstrap draws over documents.
    store : Store or path, optional
        An SQLite file of finished cells: what is in it isn't measured again.
    engine : Engine, optional
        What runs the configurations, this process when not given; it needs a store.
    progress : bool
        Whether to show a bar if it takes more than 2 seconds.

    Returns
    -------
    Evaluated
        Its `to_frame()` has perplexity, bits per byte, KL and top-1 agreement with the model's
        own routing, and experts per token, with 95 % intervals, over all documents, by domain and
        by complexity; `pairs` the paired tests; `save(folder)` writes it all.

    Raises
    ------
    ValueError, TypeError
        For a router that doesn't fit the model, texts without two tokens, a context that the
        model can't read; no model, no tokenizer, or one of another model.

    Example
    -------
    >>> model, tokenizer = moeprof.demo.load()                             # doctest: +SKIP
    >>> found = moeprof.evaluate(model, tokenizer, ["topk:k=4", "bh@4"])   # doctest: +SKIP
    >>> print(found.summary())                                             # doctest: +SKIP
    """
    if isinstance(routers, Mapping) and store is not None:
        for name, router in routers.items():
            if not isinstance(router, (str, Router)):
                raise ValueError(
                    f"evaluate: store: what the router {name!r} is can't be told from its code, so "
                    "its results can't be kept: evaluate it without a store"
                )
    if engine is not None and store is None:
        raise ValueError("evaluate: engine: it needs a store, where its workers meet")
    work, protocol = evaluation_work(
        model,
        tokenizer,
        routers,
        texts=texts,
        null=null,
        context=context,
        stride=stride,
        tokens=tokens,
        norm=norm,
        budget_tokens=budget_tokens,
        seed=seed,
        progress=progress,
    )
    measured = _run(work, store, engine, progress)
    facts = {
        "model": model_name(model),
        "dtype": described_dtype(model),
        "protocol": protocol._asdict() | {"words": protocol.words()},
        "tokens_asked": tokens,
        "norm": norm,
        "nulls": {one.name: one.null.describe() for one in work.configurations if one.null},
        "seed": seed,
        "draws": draws,
        "machine": machine.describe(),
    }
    return Evaluated(work.text.documents, measured, facts)


def evaluation_work(
    model: nn.Module,
    tokenizer: Tokenizer,
    routers: Iterable[str | Router] | Mapping[str, Router | Callable[..., Any]],
    *,
    texts: Iterable[Any] | None,
    null: AnyNull | str | os.PathLike[str] | None,
    context: int | None,
    stride: int | None,
    tokens: int,
    norm: str,
    budget_tokens: int,
    seed: int,
    progress: bool,
) -> tuple[EvaluationWork, Protocol]:
    """What `evaluate`, where the defaults are, runs of its arguments; and how the text is read."""
    check_model("evaluate", model)
    check_tokenizer("evaluate", tokenizer)
    asked = _named(routers)
    given: Any = None if null is None else resolve_null(null)
    if given is not None:
        given.check(model)
    protocol = protocol_for(model, context, stride)
    documents = demo.heldout_texts() if texts is None else _documents(texts)
    text = evaluation_text(tokenizer, documents, protocol, tokens, seed)
    calibration = budget_text(tokenizer, seed, budget_tokens)
    without = [Configuration(name, *one) for name, one in asked.items()]
    with_own(model, without)  # raises where one doesn't fit: before a null is fitted
    configurations = [
        one._replace(null=null_for(router, model, tokenizer, given, seed=seed, progress=progress))
        for one, (router, _) in zip(without, asked.values(), strict=True)
    ]
    return EvaluationWork(model, text, calibration, configurations, norm), protocol


def _named(
    routers: Iterable[str | Router] | Mapping[str, Router | Callable[..., Any]],
) -> dict[str, tuple[Router | Callable[..., Any], float | None]]:
    """{name: (router, budget)}; ValueError for two of one name."""
    check_type("evaluate: routers", routers, Iterable, "a list of routers")
    if isinstance(routers, str | Router):
        raise TypeError(f"evaluate: routers: expected a list, got {routers!r}: put it in brackets")
    found: dict[str, tuple[Router | Callable[..., Any], float | None]] = {}
    items: Iterable[Any] = (
        routers.items() if isinstance(routers, Mapping) else [(None, one) for one in routers]
    )
    for given, router in items:
        if given is None or not callable(router):
            named = ", or a dict {name: function} for one of your own" if callable(router) else ""
            check_type("evaluate: routers", router, (str, Router), f"a router or its text{named}")
        one = written_router(router) if isinstance(router, str) else (router, None)
        name = given or (router.strip() if isinstance(router, str) else describe([router]))
        if name in found:
            raise ValueError(f"router {name!r}: it is there twice")
        found[name] = one
    return found


def _documents(texts: Iterable[Any]) -> list[Document]:
    """With names and complexities, where the objects have them."""
    texts = texts if isinstance(texts, str) or not isinstance(texts, Iterable) else list(texts)
    read = read_texts(texts, "texts")
    return [
        document._replace(
            domain=document.domain or "text",
            name=getattr(given, "name", document.name),
            complexity=getattr(given, "complexity", None),
        )
        for given, document in zip(texts, read, strict=True)
    ]


def _run(
    work: EvaluationWork,
    store: Store | str | os.PathLike[str] | None,
    engine: Engine | None,
    progress: bool,
) -> dict[str, dict[str, Any]]:
    """{configuration: what was measured}, in order."""
    console = make_console()
    found: dict[str, dict[str, Any]] = {}
    shown = progress_bar(
        console, sum(map(work.steps, work.cells)), "evaluate", "windows", shown=progress
    )
    if store is None:
        with shown as bar:
            for cell in work.cells:
                bar.note(cell.name)
                found[cell.name] = work.run(cell, bar.step)
        return found
    opened = nullcontext(store) if isinstance(store, Store) else Store(store)
    with opened as kept, shown as bar:
        announce(console, kept, work)

        def done(cell: Any, result: dict[str, Any], ran: bool) -> None:
            found[cell.name] = result

        listener = Listener(lambda cell: bar.note(cell.name), done, bar.step, console.print)
        (engine or Serial()).run(work, work.cells, kept, listener)
    return {cell.name: found[cell.name] for cell in work.cells}
