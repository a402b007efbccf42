"""What a person reads first: a few sentences over all parts, all computed from the results."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ...comparison.contenders import PRIMARY
from ...comparison.effects import BETTER, ROUTER, WORSE, verdict
from ...comparison.findings import (
    UNDECIDED,
    View,
    against_static,
    answer,
    beside,
    caution,
    megabytes,
    with_band,
    with_level,
)
from ...comparison.speed import speed_in_words
from ...diagnosis.views import beside_alpha, has_one_alpha
from ...grid.rows import by_setting
from ...sweep.advice import how_sure, is_above, is_below
from ...sweep.compared import interval
from ...sweep.report import beside_static
from .content import Section, Sentence
from .front import front

if TYPE_CHECKING:
    from ...diagnosis.result import Diagnosis
    from .results import Results


NOTE = (
    "95 % intervals are of one number alone, over documents. A band holds together with all other "
    'bands of its table: a verdict is given only where a whole band is on one side of 0, and is "'
    f'{UNDECIDED}" otherwise. KL: of the predictions from those of the model itself, in nats per '
    "token; less is better."
)

ONE_DOCUMENT = " The text is one document, so this has no interval, and nothing is decided."


def section(results: Results) -> Section:
    if results.grid is not None and {one["part"] for one in results.facts["parts"]} == {"grid"}:
        return Section("The verdict", list(_grid(results.grid)))
    found = [
        *_quality(results),
        *_shrinking(results),
        *_settings(results),
        *_p_values(results.diagnose),
    ]
    return Section("The verdict", found, note=NOTE)


# ---- which router ----


def _quality(results: Results) -> Iterator[Sentence]:
    if results.compare is not None and results.compare["cells"]:
        yield from _compared(View(results.compare))
    elif results.evaluate is not None:
        yield _evaluated(results.evaluate.rows)
    else:
        yield Sentence("Which router keeps quality best was not measured (compare, evaluate).")


def _compared(view: View) -> Iterator[Sentence]:
    yield from map(Sentence, caution(view))
    table = next(iter(view.tables))
    for budget in view.budgets(table):
        place = f"compare-{table}-{budget}" if view.ranked(table, budget) else ""
        yield Sentence(answer(view, table, budget), place)
    yield from _bh(view, table)


def _bh(view: View, table: str) -> Iterator[Sentence]:
    said = []
    for budget in view.budgets(table):
        cell = view.cell(
            role=ROUTER, contender=PRIMARY, table=table, allocation="equal", budget=budget
        )
        if cell:
            said.append(f"at {budget} {against_static(cell)}")
    if said:
        yield Sentence(
            f"BH, which was fixed before the run as the router to test: {'; '.join(said)}.",
            f"compare-{table}",
        )


def _evaluated(rows: list[dict[str, Any]]) -> Sentence:
    """None is called best, as each takes a number of experts of its own."""
    own, *others = (row for row in rows if row["slice"] == "all")
    if not others:
        return Sentence("No router was evaluated.", "evaluate-0")
    decided = "" if own["bits_above_own_low"] is not None else ONE_DOCUMENT
    unbeaten = front([(row["experts"], row["bits_above_own"]) for row in others])
    said = (
        f"{row['config']} ({row['experts']:.2f} experts per token), "
        f"{interval(row, 'bits_above_own')}"
        for row in (others[place] for place in unbeaten)
    )
    return Sentence(
        f"Of {len(others)} configurations these are not beaten by another with as few experts: "
        f"{'; '.join(said)} bits per byte above the model's own routing, which takes "
        f"{own['experts']:.2f}. Which router keeps quality best at the same experts is for "
        f"compare, which has no result.{decided}",
        "evaluate-0",
    )


# ---- skip experts or shrink them ----


def _shrinking(results: Results) -> Iterator[Sentence]:
    if results.compare is None:
        return
    view, said = View(results.compare), []
    for whole in view.whole():
        effect, ways = whole["effect"]["kl"], view.skipping()
        what = {BETTER: "shrinking is closer", WORSE: "skipping is closer"}
        alike = "top-1, which reads more" if view.below_one(whole) else "top-k that reads as much"
        speed = speed_in_words(whole)
        cost = f"{megabytes(whole)} MB per token" + f", {speed} tokens/s" * bool(speed)
        said.append(
            f"in {whole['bits']} bits ({cost}) {with_level(whole)}, "
            f"{with_band(effect)} beside static {alike}: "
            f"{what.get(verdict(effect), UNDECIDED)}, and of {len(ways)} ways to skip, whatever "
            f"they read, {len(beside(view, whole)['closer']) or 'none'} closer"
        )
    if said:
        speed = speed_in_words(view.static(view.top_k) or {})
        than = f" Experts as the model has them: {speed} tokens/s." if speed else ""
        yield Sentence(f"All experts, but in fewer bits: {'; '.join(said)}.{than}", "bytes")
    else:
        yield Sentence("Shrinking the experts (8 or 4 bits) was not measured beside skipping.")


# ---- of a grid alone ----


def _grid(rows: list[dict[str, Any]]) -> Iterator[Sentence]:
    """How many of each setting are better and worse than static top-k."""
    for setting, of in by_setting(rows):
        known = [row for row in of if row.get("bits_above_static") is not None]
        known = [row for row in known if row["router"] != "topk"]
        text = f"{setting}: "
        if known:
            better = [row["configuration"] for row in known if is_below(row)]
            named = f" ({', '.join(better)})" if better else ""
            text += (
                f"of {len(known)} configurations {len(better) or 'none'} better than static top-k "
                f"at the same experts per token{named}, {sum(map(is_above, known))} worse; "
                f"{how_sure(known, known[0]['documents'])}"
            )
        else:
            text += "nothing could be compared with static top-k at the same experts per token."
        yield Sentence(text, "grid")


# ---- the 21, and what alpha means ----


def _settings(results: Results) -> Iterator[Sentence]:
    run = results.sweep
    if run is None or len(run["results"]) < 2:
        yield Sentence("The BH configurations of the sweep have no result.")
    elif said := beside_static(run):
        count = len(run["results"])
        yield Sentence(
            f"The {count} configurations of the sweep: {said[0].lower()}{said[1:]}",
            "sweep-settings",
        )
    else:
        yield Sentence("The sweep has no static top-k to set its BH configurations beside.")


def _p_values(diagnosis: Diagnosis | None) -> Iterator[Sentence]:
    if diagnosis is None:
        yield Sentence("Whether the p-values hold was not measured (diagnose).")
        return
    if not has_one_alpha(diagnosis):
        yield Sentence(
            "Whether alpha is a false discovery rate was not tested: diagnose ablated no experts "
            "of a router with one alpha.",
            "diagnose-0",
        )
        return
    share, of_all, side = beside_alpha(diagnosis)
    alpha = diagnosis.facts["alpha"]
    facts = diagnosis.facts
    what = {
        -1: "the whole interval is below alpha, as they promise",
        0: f"the interval holds alpha: {UNDECIDED}",
        None: f"too few documents for an interval: {UNDECIDED}",
        1: "the whole interval is above alpha, so they don't, and alpha is a knob for compute only",
    }
    yield Sentence(
        f"Whether the p-values hold: of what BH at alpha {alpha:g} selects, a share of {share} are "
        f"false discoveries by ablation, on average over {facts['positions']:,} positions in "
        f"{facts['ablated_documents']} documents, with 0 where nothing is selected, as in the "
        f"false discovery rate; {what[side]}. Of all that it selects {of_all} are false.",
        "diagnose-fdp",
    )
