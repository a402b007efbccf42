"""The report in Markdown, and the tables on the console; `findings` writes the sentences."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ...measure.machine import in_one_line
from ...routers import REGISTRY
from ...show.tables import fine, markdown, text_table
from ..sweep.compared import interval as with_ends
from .bytes_read import quantized_name
from .contenders import CONTENDERS, FORMS, LEFT_OUT, Contender
from .effects import (
    BETTER,
    ORACLE,
    RANDOM,
    ROUTER,
    STATIC,
    UNDECIDED,
    WORSE,
    adaptive,
    level_ends,
    verdict,
)
from .findings import (
    INTERVALS,
    NO_ADAPTIVITY,
    PRIMARY_BUDGETS,
    View,
    band,
    findings,
    in_digits,
    megabytes,
    with_band,
)
from .speed import NEW_TOKENS, ROUNDS, speed_in_words

if TYPE_CHECKING:
    from .findings import View


FIGURE = "comparison.png"
ALLOCATION = {
    "equal": "the budget in every layer",
    "free": "the budget split over the layers by sensitivity",
    "shared": "one parameter for all layers",
}
MARKS = {BETTER: "▼", WORSE: "▲"}
LEGEND = (
    "In thousandths of a nat of KL to the full model per token, against static top-k with the "
    f"same number of experts in every layer: below 0 is better than static. {MARKS[BETTER]} the "
    "whole band (95 %, over all cells of the table together) is below 0: better; "
    f"{MARKS[WORSE]} it is above: worse; ~ {NO_ADAPTIVITY} (the band against shuffled-k contains "
    "0) or, !, worse than shuffled-k; - out of reach."
)


BYTES = (
    "MB: the matrices of the experts that a token selects, as they are kept, summed over the "
    "layers; the mean over the test text. So much is read if each token's experts are read for it "
    "alone, as in decoding one token at a time; the weights around the experts are not in it. KL "
    "in nats per token, with a 95 % interval where the text has several documents. The last "
    "column: less unquantised static top-k at as many bytes, with the band; *: less static top-1, "
    "which reads more. Of the routers the one closest to the full model at its budget."
)


def report(run: dict[str, Any]) -> str:
    """Markdown of a run (a dict as in the JSON) whose cells have their effects."""
    view = View(run)
    parts = ["# Routers at an equal budget of experts", *_status(run)]
    if run["cells"]:
        parts += ["## What the results say", _bullets(findings(run)), f"![Effects]({FIGURE})"]
        parts += ["## Use it", *_use(view)]
    parts += ["## What was measured", _bullets(protocol(run))]
    if rows := bytes_rows(view):
        parts += ["## Skip experts or shrink them", BYTES, markdown(*rows)]
    for table, plan in view.tables.items():
        parts.append(f"## Table {table}: at most {plan['max_k']} experts a token")
        for allocation in plan["allocations"]:
            if rows := effect_rows(view, table, allocation):
                parts += [f"### {ALLOCATION[allocation].capitalize()}", markdown(*rows)]
        parts.append(LEGEND)
        for budget in view.budgets(table):
            if rows := detail_rows(view, table, budget):
                parts += [f"### All measures at {budget} experts in every layer", markdown(*rows)]
    parts += _outside(view)
    return "\n\n".join(part for part in parts if part) + "\n"


def _use(view: View) -> Iterator[str]:
    """Code for the first table's budgets: the router closest to the full model, or static top-k
    where no router is shown to be closer than that."""
    table = next(iter(view.tables))
    for budget in view.budgets(table):
        ranked = view.ranked(table, budget)
        better = [cell for cell in ranked if verdict(cell["effect"]["kl"]) == BETTER]
        of = next((c for c in CONTENDERS if better and c.name == better[0]["contender"]), None)
        if of is not None and of.router != "weighted_bh":  # which has weights of this model
            yield f"At {budget} experts per token, {of.name}:"
            yield f"```python\n{_code(of, view.tables[table]['max_k'], budget)}\n```"
        elif ranked and not better:
            yield f"At {budget} experts per token, static top-k; no router is shown to be closer:"
            yield f'```python\nmoeprof.patch(model, "topk", k={budget})\n```'


def _code(of: Contender, max_k: int, budget: int) -> str:
    """With the user's own texts: `texts` for the null, `other_texts` for the budget."""
    lines, null = [], ""
    if of.null:
        kind, score = FORMS[of.null]
        lines.append(
            f'null = moeprof.fit_null(model, tokenizer, texts, kind="{kind}", score="{score}")'
        )
        null = ", null=null"
    parameters = {"max_k": max_k, **of.parameters}
    given = ", ".join(f"{name}={value!r}" for name, value in parameters.items())
    lines += [
        f"router = moeprof.{REGISTRY[of.router].__name__}({given}).with_budget(",
        f"    model, tokenizer, other_texts, average_k={budget}, per_layer=True{null}",
        ")",
        f"moeprof.patch(model, router{null})",
    ]
    return "\n".join(lines)


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _status(run: dict[str, Any]) -> Iterator[str]:
    cells = [*run["static"], *run.get("quantized", ()), *run["cells"]]
    done, planned = len(cells), run["planned_cells"]
    yield f"`{run['command']}`"
    if done < planned:
        yield f"**Interrupted: {done} of {planned} rows of the tables were measured.**"


def protocol(run: dict[str, Any]) -> Iterator[str]:
    """What was measured and how, in sentences."""
    size, splits = run["model_config"], run["splits"]
    fixed = [budget for budget in PRIMARY_BUDGETS if budget in run["tables"][0]["budgets"]]
    test = splits["test"]
    domains = sorted({document["domain"] for document in test})
    tokens = {part: sum(d["tokens"] for d in splits[part]) for part in ("budget", "test")}
    versions = ", ".join(f"{name} {number}" for name, number in run["machine"]["versions"].items())
    yield (
        f"Model: {run['model']}, {run['dtype']}; {size['num_hidden_layers']} layers, "
        f"{size['num_experts']} experts a layer, its own router takes "
        f"{size['num_experts_per_tok']}; weights of the selected experts as the model has them "
        f"(norm_topk_prob {str(size['norm_topk_prob']).lower()})."
    )
    yield (
        f"Three texts without a common document, of the domains {', '.join(domains)}: nulls on "
        f"{len(splits['null'])} documents, parameters and the split over the layers on "
        f"{tokens['budget']:,} tokens of {len(splits['budget'])}, the test on {tokens['test']:,} "
        f"tokens of {len(test)}, read once for each cell."
    )
    if bits := sorted({cell["bits"] for cell in run.get("quantized", ())}, reverse=True):
        yield (
            f"Quantised: static top-k on the same test text with the experts in "
            f"{' and in '.join(map(str, bits))} bits (moeprof.quantize), hidden states too in 8; "
            "routers and the layers around the experts as the model has them. Compared with the "
            f"full model in {run['dtype']}. Their bands hold together, apart from the tables'."
        )
    if any("tokens_per_s" in cell for cell in run["static"]):
        yield (
            f"Decode speed: {NEW_TOKENS} tokens after a prompt, one at a time. In each round all "
            "are timed on one prompt, in an order drawn anew, those with experts in the same bits "
            f"one after the other; {ROUNDS} rounds where there are so many prompts. The median of "
            "the rounds, in brackets their quartiles. Of this machine, and what else it was doing."
        )
    for name, text in run["nulls"].items():
        yield f"Null {name}: {text}."
    yield (
        "Effect: mean KL(full model || router) less that of static top-k, k = 1, 2, ... joined by "
        "straight lines, at the router's own average on the test text. Primary, "
        "fixed before any run: BH on logprob under the efron null, the budget in every "
        f"layer, against static at {' and '.join(map(str, PRIMARY_BUDGETS))}; of these "
        f"{' and '.join(map(str, fixed)) or 'none'} was run."
    )
    yield (
        "Controls: shuffled-k deals a router's own numbers of experts to other tokens of the "
        "layer; random R draws 1 + Binomial; the oracle keeps those of the model's own top-k "
        "whose output is large, which no router can know."
    )
    yield (
        f"{INTERVALS} By 2,000 draws of documents within their domains, those that have a single "
        "document drawn together; bands by max-|t| over every effect and comparison of a table."
    )
    yield LEFT_OUT
    yield (
        f"Machine: {in_one_line(run['machine'])}; seed {run['seed']}; {versions}; started "
        f"{run['machine']['started']}; {run['seconds'] / 60:.0f} min."
    )


# ---- rows of tables ----


def effect_rows(
    view: View, table: str, allocation: str
) -> tuple[list[str], list[list[str]]] | None:
    """(head, rows): a row a router, a column a budget; None without a measured cell."""
    plan = view.tables[table]
    names = [("top-k", STATIC)] if allocation == "free" else []
    names += [(name, ROUTER) for name in view.contenders]
    if allocation != "shared":
        names += [("random R", RANDOM), ("oracle", ORACLE)]
    rows = []
    for name, role in names:
        cells = [
            view.cell(table=table, allocation=allocation, contender=name, role=role, budget=budget)
            for budget in plan["budgets"]
        ]
        if any(cells) or role == ROUTER and _was_tried(view, table, allocation, name):
            rows.append((name, cells))
    if not rows:
        return None
    there = [cell for _, cells in rows for cell in cells if cell is not None]
    form = fine(*(1e3 * cell["effect"]["kl"]["estimate"] for cell in there), form="+.1f")
    head = ["router", *(f"{budget}" for budget in plan["budgets"])]
    return head, [[name, *(_effect(cell, form) for cell in cells)] for name, cells in rows]


def _was_tried(view: View, table: str, allocation: str, name: str) -> bool:
    wanted = table, allocation, name
    return any((c["table"], c["allocation"], c["contender"]) == wanted for c in view.outside)


def _effect(cell: dict[str, Any] | None, form: str) -> str:
    if cell is None:
        return "-"
    effect = cell["effect"]["kl"]
    mark = MARKS.get(verdict(effect), "")
    if adaptive(cell) is False:
        mark += "!" if verdict(cell["against"]["shuffled"]) == WORSE else "~"
    return f"{1e3 * effect['estimate']:{form}}{mark}"


def detail_rows(view: View, table: str, budget: int) -> tuple[list[str], list[list[str]]] | None:
    """(head, rows) of all measures at one budget in every layer, the best effect first."""
    cells = [
        cell
        for role in (ROUTER, RANDOM, ORACLE)
        for cell in view.cells(table=table, allocation="equal", role=role, budget=budget)
    ]
    if not cells:
        return None
    head = [
        "router",
        "experts",
        "MB",
        "KL",
        "effect",
        "band",
        "against shuffled-k",
        "Δ nats",
        "perplexity",
        "agreement",
        "tokens/s",
    ]
    static = view.static(budget)
    assert static is not None  # cells are compared with it
    rows = [
        [
            f"static top-{budget}",
            f"{budget:.2f}",
            megabytes(static),
            in_digits(static["kl"], ".4f"),
            "0",
            "",
            "",
            "0",
            f"{static['perplexity']:.2f}",
            f"{static['agreement']:.3f}",
            speed_in_words(static),
        ]
    ]
    for cell in sorted(cells, key=lambda cell: cell["effect"]["kl"]["estimate"]):
        effect, nats = cell["effect"]["kl"], cell["effect"]["nats"]
        against = cell.get("against", {}).get("shuffled")
        rows.append(
            [
                cell["contender"],
                f"{cell['average_k']:.2f}",
                megabytes(cell),
                in_digits(cell["kl"], ".4f"),
                in_digits(effect["estimate"]),
                band(effect),
                _against(against),
                in_digits(nats["estimate"]),
                f"{cell['perplexity']:.2f}",
                f"{cell['agreement']:.3f}",
                speed_in_words(cell),
            ]
        )
    return head, rows


def bytes_rows(view: View) -> tuple[list[str], list[list[str]]] | None:
    """(head, rows) of quantised static top-k and what reads as few bytes by leaving out experts,
    fewest bytes first; None for a run without it."""
    if not view.quantized():
        return None
    top_k = view.top_k
    cells = [(cell, f"top-{cell['budget']}") for cell in view.run["static"][:top_k]]
    cells += [(c, quantized_name(c["budget"], c["bits"])) for c in view.quantized()]
    cells += [(c, f"{c['contender']} at {c['budget']}") for c in view.best_routers()]
    cells.sort(key=lambda pair: pair[0]["bytes_per_token"])
    rows = []
    for cell, name in cells:
        effect = cell.get("effect", {}).get("kl")
        low, high = level_ends(cell) or (None, None)
        rows.append(
            [
                name,
                megabytes(cell),
                f"{cell['average_k']:.2f}",
                with_ends({"kl": cell["kl"], "kl_low": low, "kl_high": high}, "kl", ".4f"),
                f"{cell['perplexity']:.2f}",
                f"{cell['agreement']:.3f}",
                speed_in_words(cell),
                with_band(effect, "") + "*" * view.below_one(cell) if effect else "",
            ]
        )
    head = ["", "MB", "experts", "KL", "perplexity", "agreement", "tokens/s", "at as many bytes"]
    return head, rows


def _against(against: Mapping[str, Any] | None) -> str:
    if against is None:
        return ""
    text = with_band(against)
    return f"{text}: {NO_ADAPTIVITY}" if verdict(against) == UNDECIDED else text


def _outside(view: View) -> Iterator[str]:
    quantized = [c for c in view.run.get("quantized", ()) if c["status"] == "outside"]
    if not view.outside and not quantized:
        return
    lines = [f"{cell['contender']}: {cell['reason']}" for cell in quantized]
    lines += [
        f"{cell['contender']} ({cell['table']}, {cell['allocation']}, budget {cell['budget']}): "
        f"{cell['reason']}"
        for cell in view.outside
    ]
    yield "## Out of reach"
    yield _bullets(lines)


# ---- on the console ----


def console_tables(run: dict[str, Any]) -> Iterator[Any]:
    """Titles and rich tables of `width()` columns: the effects, then what reads as few bytes."""
    view = View(run)
    for table, plan in view.tables.items():
        for allocation in plan["allocations"]:
            found = effect_rows(view, table, allocation)
            if found is None:
                continue
            yield f"{table}, at most {plan['max_k']} experts a token; {ALLOCATION[allocation]}"
            yield text_table(*found)
    yield LEGEND
    if found := bytes_rows(view):
        yield "Skip experts or shrink them: MB of experts' weights that a token reads"
        head, *rows = ([*row[:4], row[-1]] for row in (found[0], *found[1]))
        yield text_table(head, rows)
