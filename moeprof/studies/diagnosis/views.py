"""A diagnosis in tables of at most 100 columns and in sentences, all from its numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from ...measure.bootstrap import FEW_DOCUMENTS, MORE_DOCUMENTS, said_of_few
from ...show.console import fill, printed
from ...show.tables import text_table, with_interval
from .rows import ALL, CHANGE, PATCHED, POOLED, SHOWN, STOCK
from .transfer import LEAST

if TYPE_CHECKING:
    import pandas
    from rich.table import Table

    from .rows import Diagnosed


RANKS = (0, 1, 2, 4)
SHOWN_DELTAS = (1e-2,)
IN_USE = "the null in use"  # what people read for POOLED


class View(NamedTuple):
    """A table of texts: a pandas frame, what it shows and how to read it."""

    title: str
    note: str
    frame: pandas.DataFrame


def _value(row: Mapping[str, Any], form: str) -> str:
    return with_interval(row["estimate"], row["low"], row["high"], form)


def _layer(layer: int) -> str:
    return "all" if layer == ALL else str(layer)


def _cells(
    frame: pandas.DataFrame,
    keys: Mapping[str, str],
    columns: str,
    cell: Callable[[dict[str, Any]], str],
    rename: Mapping[Any, str],
) -> pandas.DataFrame:
    """A frame of texts: a row for each of `keys`, a column for each value of `columns`."""
    import pandas

    made = []
    for labels, group in frame.groupby(list(keys), sort=False):
        row = dict(zip(keys.values(), labels, strict=True))
        values = {one[columns]: cell(one) for one in group.to_dict("records")}
        row |= {title: values.get(name, "") for name, title in rename.items()}
        made.append(row)
    frame = pandas.DataFrame(made)
    if "layer" in frame:
        frame["layer"] = frame["layer"].map(_layer)
    if "routing" in frame:
        frame["routing"] = frame["routing"].map(SHOWN)
    return frame


_BY_LAYER = {"routing": "routing", "layer": "layer"}
_BY_ROUTER = {"routing": "router", "layer": "layer"}


def views(diagnosis: Diagnosed) -> list[View]:
    """All tables, in the order in which they are printed."""
    made = [*_of_p_values(diagnosis), *_of_selection(diagnosis)]
    if "transfer" in diagnosis.tables:
        made += _of_transfer(diagnosis)
    if "fdp" in diagnosis.tables:
        made += _of_ablation(diagnosis)
    return made


def _of_p_values(diagnosis: Diagnosed) -> Iterator[View]:
    def short(row: Mapping[str, Any]) -> str:
        return format(row["estimate"], ".2f")

    frame = diagnosis.to_frame("pi0")
    frame = frame.assign(at=frame["at"].astype(float))
    widest = ((frame["high"] - frame["low"]) / 2).max()
    ends = "No intervals" if math.isnan(widest) else f"95 % intervals: at most ± {widest:.2f}"
    table = _cells(frame, _BY_LAYER, "at", short, {x: f"λ {x:g}" for x in sorted(set(frame["at"]))})
    departing = departures(diagnosis.to_frame("flatness"))
    words = {True: "shown", False: "not shown", None: "–"}
    table["departure"] = [
        words[departing[x]] for x, _ in frame.groupby(list(_BY_LAYER), sort=False)
    ]
    yield View(
        "Storey's π̂0 by λ",
        "#{p > λ} / ((1 − λ) n) of a layer's held-out p-values: the share of experts that look not "
        "needed. Where the p-values of these are uniform it is the same at every λ that is above "
        "all other p-values, and at most 1. Departure: by a 95 % band over documents it changes "
        f"between λ 0.5 and 0.9, or is above 1. {ends}.",
        table,
    )
    frame = diagnosis.to_frame("quantiles")
    shown = (1e-4, 1e-3, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.95)
    yield View(
        "Quantiles of the p-values",
        "Each column's heading is what the quantile would be if they were uniform. Intervals, "
        "and the whole curve: in the CSV and in the figure.",
        _cells(
            frame,
            _BY_LAYER,
            "at",
            lambda row: format(row["estimate"], ".2g"),
            {x: f"{x:g}" for x in shown},
        ),
    )


def _of_selection(diagnosis: Diagnosed) -> Iterator[View]:
    facts = diagnosis.facts
    frame = diagnosis.to_frame("selection")
    yield View(
        f"R of {facts['router']}",
        "R: the router's count before clamping. Own routing: the model without the router, and "
        "R what the router would select on its logits. Floor: R < min_k = "
        f"{facts['min_k']}; ceiling: R > "
        f"max_k = {facts['max_k']}; both in % of tokens. [95 % intervals]",
        _cells(
            frame,
            _BY_LAYER,
            "quantity",
            _of_quantity,
            {
                "experts": "experts",
                "rejections": "R",
                "P(R >= 1)": "R ≥ 1 %",
                "P(R < min_k)": "floor %",
                "P(R > max_k)": "ceiling %",
            },
        ),
    )
    yield View(
        "R against the router's entropy and the token's loss",
        "Spearman's correlation over tokens; loss: of the next token. [95 % intervals]",
        _cells(
            frame,
            _BY_LAYER,
            "quantity",
            lambda row: _value(row, "+.2f"),
            {
                "Spearman(R, entropy)": "R and entropy",
                "Spearman(R, loss)": "R and loss",
            },
        ),
    )


def _of_quantity(row: dict[str, Any]) -> str:
    if row["quantity"] == "experts":
        return format(row["estimate"], ".2f")
    if row["quantity"].startswith("P("):
        row = row | {name: 100 * row[name] for name in ("estimate", "low", "high")}
        return _value(row, ".1f")
    return _value(row, ".2f")


def _of_transfer(diagnosis: Diagnosed) -> Iterator[View]:
    frame = diagnosis.to_frame("transfer")
    frame = frame[frame["layer"] == ALL]
    domains = {name: f"on {name}" for name in dict.fromkeys(frame["at"])}
    notes = {
        "P(R >= 1)": "Share of tokens in which anything is rejected",
        "experts": "Experts per token at the same alpha",
        "KS distance": "Largest distance between the p-values' distribution on the text that the "
        "null was fitted to and on held-out text of the domain",
    }
    without = (
        "No intervals: a largest distance is above 0 by chance alone. What two texts of one "
        "domain differ by stands where row and column are the same domain."
    )
    for quantity, note in notes.items():
        distance = quantity == "KS distance"
        form = ".3f" if distance else ".2f"
        ends = without if distance else f"[95 % intervals; none over fewer than {LEAST} documents]"
        yield View(
            f"Null fitted on one domain, checked on another: {quantity}",
            f"{note}; mean over layers. Rows: what the null was fitted on. {ends}",
            _cells(
                frame[frame["quantity"] == quantity].replace({"routing": {POOLED: IN_USE}}),
                {"routing": "fitted on"},
                "at",
                partial(_value, form=form),
                domains,
            ),
        )


def _of_ablation(diagnosis: Diagnosed) -> Iterator[View]:
    alpha = diagnosis.facts["alpha"]
    frame = diagnosis.to_frame("fdp")
    table = _cells(
        frame,
        _BY_ROUTER,
        "quantity",
        lambda row: _value(row, ".2f"),
        {
            "false of all": "ΣV/ΣR",
            "FDP(delta0)": "FDP(δ0)",
            "FDP(0)": "FDP(0)",
        },
    )
    short = _cells(
        frame,
        _BY_ROUTER,
        "quantity",
        lambda row: format(row["estimate"], ".2f"),
        {
            "experts": "experts",
            "delta0": "δ0",
        },
    )
    curve = diagnosis.to_frame("fdp curve")
    curve = curve[curve["quantity"] == "FDP"]
    table.insert(2, "experts", short["experts"])
    table.insert(3, "alpha", [_alpha(alpha, layer) for layer in table["layer"]])
    table.loc[table["router"] != frame["routing"].iloc[0], "alpha"] = ""
    table.insert(4, "δ0", short["δ0"])
    for delta in SHOWN_DELTAS:
        near = curve.assign(off=(curve["at"].astype(float) / delta).map(_distance))
        best = near.loc[near.groupby(["routing", "layer"], sort=False)["off"].idxmin()]
        table[f"FDP({best['at'].iloc[0]:.2g})"] = [format(x, ".2f") for x in best["estimate"]]
    yield View(
        "False discoveries by ablation, beside alpha",
        "An expert is false at δ if the next token's loss rises by less than δ nats without it "
        "(also if it falls). ΣV/ΣR: the false at δ0 of all that are selected; by it routers can be "
        "compared. FDP(δ): mean over positions of V / max(R, 1), 0 where R = 0, as in the false "
        "discovery rate, so that who selects seldom has a small one; beside it stands alpha. δ0: "
        "95 % of random unselected experts, added with their own weight, change the loss by less. "
        "An operational definition; alpha makes no promise about it. [95 % intervals]",
        table,
    )
    yield from _joint(diagnosis)


def _alpha(alpha: Any, layer: str) -> str:
    """The alpha of a row, where a router has one for each layer that layer's."""
    if not isinstance(alpha, tuple | list):
        return "" if alpha is None else f"{alpha:g}"
    return "" if layer == "all" else f"{alpha[int(layer)]:.3g}"


def _distance(ratio: float) -> float:
    return max(ratio, 1 / ratio)


def _joint(diagnosis: Diagnosed) -> Iterator[View]:
    joint = diagnosis.to_frame("joint") if "joint" in diagnosis.tables else None
    if joint is None:
        return
    by: dict[str, dict[tuple[Any, ...], float]] = {
        "joint change": {},
        "sum of single changes": {},
        "share below delta0": {},
    }
    for _, row in joint.iterrows():
        by[row["quantity"]][row["routing"], row["layer"], row["at"]] = row["estimate"]

    def cell(row: Mapping[str, Any]) -> str:
        key = row["routing"], row["layer"], row["at"]
        alone, share = by["sum of single changes"][key], by["share below delta0"][key]
        return f"{row['estimate']:+.2f} {alone:+.2f} {100 * share:.0f}%"

    frame = joint[joint["quantity"] == "joint change"]
    ranks = [r for r in RANKS if r in set(frame["at"])]
    yield View(
        "The r best experts kept, the others taken out at once",
        "Mean change of the next token's loss in nats at positions with more than r experts; the "
        "sum of what taking out each alone does there; the share of these positions at which the "
        "joint change is below δ0. Where the first exceeds the second the experts stand in for "
        "each other. Intervals: in the CSV.",
        _cells(frame, _BY_ROUTER, "at", cell, {r: f"r = {r}" for r in ranks}),
    )


def findings(diagnosis: Diagnosed) -> list[str]:
    """The answer, what was measured, against what, and what came out, in sentences."""
    facts = diagnosis.facts
    documents = facts["heldout_documents"]
    domains = len({d["domain"] for d in documents})
    found = [
        *said_of_few("The held-out text", [document["domain"] for document in documents]),
        *_answer(diagnosis),
        f"{facts['router']} on {facts['model']} ({facts['dtype']}).",
        f"Null: {facts['null']}.",
        f"Held-out text: {facts['heldout_tokens']:,} tokens of {len(documents)} "
        f"document{'s' * (len(documents) != 1)} in {domains} domain{'s' * (domains != 1)}; all "
        "intervals are 95 % ones by bootstrap over documents.",
        "A false discovery rate is a statement against that null, for p-values that are valid "
        "under it and independent or positively dependent; that was not shown for this model.",
        *_floors(diagnosis),
    ]
    if "fdp" in diagnosis.tables:
        found += _ablation_findings(diagnosis)
    return found


def _answer(diagnosis: Diagnosed) -> Iterator[str]:
    """Does alpha bound what is false, and are the p-values what they have to be for that?"""
    if len(diagnosis.facts["heldout_documents"]) < 2:
        yield (
            "The held-out text is one document, and intervals are over documents: there are none, "
            f"and nothing is decided. {MORE_DOCUMENTS}"
        )
        return
    if has_one_alpha(diagnosis):
        false, of_all, side = beside_alpha(diagnosis)
        said, ending = {
            -1: ("Yes", ""),
            0: ("Undecided", ", which the interval holds"),
            1: ("No", ""),
            None: ("Undecided", "; too few documents have positions to give an interval"),
        }[side]
        yield (
            f"Does alpha bound the share of false selections? {said}: on average over positions, "
            f"with 0 where nothing is selected (so the false discovery rate is defined), {false} "
            "of the selected experts are not missed when taken out alone; alpha is "
            f"{diagnosis.facts['alpha']:g}{ending}. Of all selected experts, which alpha says "
            f"nothing about, {of_all} are not missed."
        )
    large = diagnosis.to_frame("flatness")
    yield (
        "Are large p-values uniform, as those of experts that aren't needed should be? In "
        f"{in_layers(departing_layers(large), ' and ')} they are shown not to be: by a band over "
        f"documents Storey's π̂0 changes between λ 0.5 and 0.9, or is above 1. {_changes(large)}"
    )


def in_layers(layers: Mapping[str, tuple[int, int]], between: str) -> str:
    """ "3 of 4 layers (own routing), 2 of 4 (patched)"; layers: as `departing_layers` has them."""
    parts = [f"{n} of {of} ({SHOWN[routing]})" for routing, (n, of) in layers.items()]
    return between.join(parts).replace(" (", " layers (", 1)


def departures(flatness: pandas.DataFrame) -> dict[tuple[str, int], bool | None]:
    """{(routing, layer): whether its band shows that π̂0 changes from λ 0.5 on, or is above 1}.

    None where there is no band; from the table "flatness".
    """
    off = flatness["band_low"] > 0
    off |= (flatness["band_high"] < 0) & (flatness["quantity"] == CHANGE)
    made = flatness.assign(off=off).groupby(list(_BY_LAYER), sort=False)
    return {
        layer: None if rows["band_low"].isna().all() else bool(rows["off"].any())
        for layer, rows in made
    }


def departing_layers(flatness: pandas.DataFrame) -> dict[str, tuple[int, int]]:
    """{routing: (layers with one of the `departures`, layers)}."""
    shown = departures(flatness)
    counts = {}
    for routing in (STOCK, PATCHED):
        layers = [departs for (of, _), departs in shown.items() if of == routing]
        counts[routing] = layers.count(True), len(layers)
    return counts


def _changes(flatness: pandas.DataFrame) -> str:
    """By how much π̂0 changes in the layer where it changes least, and most: a test alone would
    call every layer departing, given enough text."""
    of = flatness[flatness["quantity"] == CHANGE]
    changes = of["estimate"].abs().groupby([of["routing"], of["layer"]], sort=False).max()
    ends = [
        f"{changes[place]:.2f} (layer {place[1]}, {SHOWN[place[0]]})"
        for place in (changes.idxmin(), changes.idxmax())
    ]
    return f"It changes by {ends[0]} to {ends[1]}; much text shows small departures, too."


ON = {
    STOCK: "On the logits of the model's own routing",
    PATCHED: "On the logits of the patched model",
}


def _floors(diagnosis: Diagnosed) -> Iterator[str]:
    frame = diagnosis.to_frame("selection")
    frame = frame[frame["layer"] == ALL].set_index(["routing", "quantity"])["estimate"]
    for routing in (STOCK, PATCHED):
        yield (
            f"{ON[routing]} min_k decides for "
            f"{100 * frame[routing, 'P(R < min_k)']:.1f} % of the tokens in a layer (R < "
            f"{diagnosis.facts['min_k']}), max_k for "
            f"{100 * frame[routing, 'P(R > max_k)']:.1f} % (R > {diagnosis.facts['max_k']})."
        )


def _ablation_findings(diagnosis: Diagnosed) -> Iterator[str]:
    facts, alpha = diagnosis.facts, diagnosis.facts["alpha"]
    frame = diagnosis.to_frame("fdp").set_index(["routing", "layer", "quantity"])
    used = facts["ablated_documents"]
    yield (
        f"Ablation: {facts['positions']:,} positions in {used} document{'s' * (used != 1)}, the "
        "same for all."
    )
    if facts["positions"] < 1000 or used < 40:
        few = 1 < used < FEW_DOCUMENTS <= len(facts["heldout_documents"])
        yield (
            "That is fewer than the 1,000 positions and 40 documents that the report asks for"
            f"{'; intervals over so few documents are too narrow' * few}."
        )
    for name in facts["compared"]:
        row = frame.loc[(name, ALL, "FDP(delta0)")]
        hurt = frame.loc[(name, ALL, "FDP(0)")]
        pooled = frame.loc[(name, ALL, "false of all")]
        experts = frame.loc[(name, ALL, "experts")]["estimate"]
        line = (
            f"{name} ({experts:.2f} experts): of all that it selects {_value(pooled, '.2f')} is "
            "false at δ0; on average over positions, with 0 where nothing is selected, FDP(δ0) is "
            f"{_value(row, '.2f')}, and {_value(hurt, '.2f')} hurts"
        )
        if name == next(iter(facts["compared"])) and has_one_alpha(diagnosis):
            side = beside_alpha(diagnosis)[2]
            line += f"; alpha is {alpha:g}"
            if side is not None:
                line += f", {'outside' if side else 'inside'} the interval of FDP(δ0)"
            line += f", and FDP(δ0) is {row['estimate'] / alpha:.1f} times alpha"
        yield line + "."


def has_one_alpha(diagnosis: Diagnosed) -> bool:
    """Whether the router has an alpha, the same for all layers, and was ablated."""
    alpha = diagnosis.facts["alpha"]
    return "fdp" in diagnosis.tables and alpha is not None and not isinstance(alpha, tuple | list)


def beside_alpha(diagnosis: Diagnosed) -> tuple[str, str, int | None]:
    """(FDP(δ0) of the router over all layers with its interval, the false of all that it selects,
    the `side_of` alpha that FDP(δ0) lies on). For a diagnosis that `has_one_alpha`."""
    alpha, name = diagnosis.facts["alpha"], next(iter(diagnosis.facts["compared"]))
    frame = diagnosis.to_frame("fdp").set_index(["routing", "layer", "quantity"])
    row, of_all = (frame.loc[(name, ALL, quantity)] for quantity in ("FDP(delta0)", "false of all"))
    return _value(row, ".2f"), _value(of_all, ".2f"), side_of(row, alpha)


def side_of(row: Mapping[str, Any], alpha: float) -> int | None:
    """-1, 0 or 1: a row's interval lies below alpha, holds it, or lies above; None without one."""
    if math.isnan(row["low"]):
        return None
    return int(row["low"] > alpha) - int(row["high"] < alpha)


def as_text(diagnosis: Diagnosed) -> str:
    """Findings and tables, plain text."""
    parts: list[Any] = [fill(line) for line in findings(diagnosis)]
    for view in views(diagnosis):
        parts += [f"\n{view.title}", fill(view.note), _rich(view.frame)]
    return printed(parts)


def _rich(frame: pandas.DataFrame) -> Table:
    """The first column says once what goes on in the rows below."""
    rows = [list(map(str, row)) for row in frame.itertuples(index=False)]
    firsts = [row[0] for row in rows]
    for row, before in zip(rows[1:], firsts, strict=False):
        if row[0] == before:
            row[0] = ""
    return text_table(list(map(str, frame.columns)), rows)


def as_markdown(diagnosis: Diagnosed) -> str:
    parts = [f"# Diagnosis of {diagnosis.facts['router']}"]
    parts.append("\n".join(f"- {line}" for line in findings(diagnosis)))
    for view in views(diagnosis):
        names = list(map(str, view.frame.columns))
        lines = [names, ["---"] * len(names), *view.frame.astype(str).to_numpy().tolist()]
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        parts.append(f"## {view.title}\n\n{view.note}\n\n{table}")
    return "\n\n".join(parts) + "\n"
