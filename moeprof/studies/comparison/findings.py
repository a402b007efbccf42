"""What a comparison says, in sentences; every number and every verdict is computed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ...measure.bootstrap import MORE_DOCUMENTS, said_of_few
from ...show.tables import fine
from .bytes_read import quantized_name
from .contenders import PRIMARY, THRESHOLDS
from .effects import (
    BETTER,
    ORACLE,
    RANDOM,
    ROUTER,
    SHUFFLED,
    STATIC,
    WORSE,
    level_ends,
    varies,
    verdict,
)
from .plan import REDUCTION, WIDE
from .speed import speed_in_words

PRIMARY_BUDGETS = (4, 6)
NO_ADAPTIVITY = "no token adaptivity shown"
# One notation everywhere, figure, findings and tables.
INTERVALS = (
    'Three kinds of interval, each of 95 %. "95 % interval", a thick bar: of one number alone, '
    'over documents. "band", a thin bar or shaded: all bands of a table hold at once; verdicts '
    'go by it. "band" against shuffled-k: the same of the difference from the router\'s own '
    "numbers of experts dealt to other tokens; where it reaches 0 or is above, the dot is hollow."
)
AGAINST_STATIC = {
    BETTER: "it beats static top-k",
    WORSE: "it loses to static top-k",
}
UNDECIDED = "undecided"
OTHERS = {
    "fixed_p": "the same p-values cut at one fixed p, without the correction",
    "bh (logit)": "BH on raw logits",
    "bh (trimmed)": "BH on the trimmed null",
}


class View:
    """The cells of a run (a dict as in the JSON), to be asked for."""

    def __init__(self, run: dict[str, Any]) -> None:
        self.run = run
        self.tables = {plan["name"]: plan for plan in run["tables"]}
        self.contenders = [c["name"] for c in run["contenders"]]

    def cells(self, **wanted: Any) -> list[dict[str, Any]]:
        """Measured cells with these values."""
        return [
            cell
            for cell in self.run["cells"]
            if cell["status"] == "measured" and all(cell[k] == v for k, v in wanted.items())
        ]

    def cell(self, **wanted: Any) -> dict[str, Any] | None:
        """The one of them, or None."""
        return next(iter(self.cells(**wanted)), None)

    def static(self, k: int) -> dict[str, Any] | None:
        """Static top-k, the same in every layer, as the model has its experts; None if not run."""
        return next((cell for cell in self.run["static"] if cell["budget"] == k), None)

    def twin(self, cell: dict[str, Any], **changes: str) -> dict[str, Any] | None:
        """The measured cell that differs from this one by the changes only, or None."""
        place = ("role", "table", "contender", "allocation", "budget")
        return self.cell(**{name: cell[name] for name in place} | changes)

    def budgets(self, table: str) -> list[int]:
        """The budgets to speak of: those fixed before, or the middle one of the table."""
        there = self.tables[table]["budgets"]
        fixed = [budget for budget in PRIMARY_BUDGETS if budget in there]
        return fixed or [there[len(there) // 2]]

    def places(self) -> list[tuple[str, int]]:
        """Each table with each budget to speak of."""
        return [(table, budget) for table in self.tables for budget in self.budgets(table)]

    def ranked(self, table: str, budget: int) -> list[dict[str, Any]]:
        """The routers' cells at a budget in every layer, by the effect, the best first."""
        cells = self.cells(role=ROUTER, table=table, allocation="equal", budget=budget)
        return sorted(cells, key=lambda cell: cell["effect"]["kl"]["estimate"])

    def count(self, cells: list[dict[str, Any]]) -> str:
        """ "2 of 18 routers": of all that are compared, whether or not they reach the budget."""
        return f"{len({cell['contender'] for cell in cells})} of {len(self.contenders)} routers"

    def unreached(self, cells: list[dict[str, Any]]) -> int:
        """Routers without one of these cells."""
        return len(self.contenders) - len({cell["contender"] for cell in cells})

    @property
    def outside(self) -> list[dict[str, Any]]:
        return [cell for cell in self.run["cells"] if cell["status"] == "outside"]

    @property
    def is_one_document(self) -> bool:
        """Whether no effect varies over documents, so that nothing is decided."""
        cells = [*self.cells(role=ROUTER), *self.quantized()]
        effects = [cell["effect"]["kl"] for cell in cells if "effect" in cell]
        return bool(effects) and not any(map(varies, effects))

    def quantized(self, bits: int | None = None) -> list[dict[str, Any]]:
        """Measured cells of static top-k with quantised experts, k ascending; none in old runs."""
        cells = [
            cell
            for cell in self.run.get("quantized", ())
            if cell["status"] == "measured" and bits in (None, cell["bits"])
        ]
        return sorted(cells, key=lambda cell: cell["budget"])

    @property
    def top_k(self) -> int:
        """The model's own."""
        own: int = self.run["model_config"]["num_experts_per_tok"]
        return own

    def whole(self) -> list[dict[str, Any]]:
        """Of these the ones with all experts that the model takes, bits descending; a run that
        was interrupted may lack them."""
        cells = [cell for cell in self.quantized() if cell["budget"] == self.top_k]
        return sorted(cells, key=lambda cell: -cell["bits"])

    def below_one(self, cell: Mapping[str, Any]) -> bool:
        """Whether it reads less than static top-1, which then stands for what reads as much."""
        one = self.static(1)
        return one is not None and cell["bytes_per_token"] < one["bytes_per_token"]

    def best_routers(self) -> list[dict[str, Any]]:
        """Of each budget in every layer the router's cell with the least KL, of the first table."""
        best: dict[int, dict[str, Any]] = {}
        for cell in self.cells(role=ROUTER, table=next(iter(self.tables)), allocation="equal"):
            held = best.setdefault(cell["budget"], cell)
            best[cell["budget"]] = min(cell, held, key=lambda c: c["kl"])
        return list(best.values())

    def skipping(self) -> list[dict[str, Any]]:
        """What leaves out experts in place of bits: static top-k and routers below all experts."""
        top_k = self.top_k
        static = [cell for cell in self.run["static"] if cell["budget"] < top_k]
        others = [*self.cells(role=STATIC), *self.cells(role=ROUTER)]
        return [*static, *(cell for cell in others if cell["budget"] < top_k)]


def findings(run: dict[str, Any]) -> list[str]:
    """A list of sentences on a run whose cells have their effects."""
    return [line for lines in findings_by_subject(run).values() for line in lines]


def findings_by_subject(run: dict[str, Any]) -> dict[str, list[str]]:
    """The same by what they are about: "effects", "speed", "bytes" and "reach"."""
    view = View(run)
    effects = foremost(run)
    for table in view.tables:
        effects += _ranking(view, table)
    effects += [
        *_adaptivity(view),
        *_contrasts(view),
        *_thresholds(view),
        *_allocation(view),
        *_shared(view),
        *_bounds(view),
        *_wide(view),
    ]
    rest = {"speed": _speed, "bytes": _shrinking, "reach": _outside}
    return {"effects": effects} | {subject: list(say(view)) for subject, say in rest.items()}


def caution(view: View) -> Iterator[str]:
    """That nothing is decided, where no effect varies over documents, or little, by how few."""
    domains = [document["domain"] for document in view.run["splits"]["test"]]
    yield from said_of_few("The test text", domains)
    if view.is_one_document:
        yield (
            "The test text is one document, and intervals are over documents: there are none, and "
            f"nothing is decided. {MORE_DOCUMENTS}"
        )


def foremost(run: dict[str, Any]) -> list[str]:
    """The first of `findings`: a caution, who is closest to the model, what was planned."""
    view = View(run)
    return [*caution(view), *_answers(view), *_primary(view)]


def _answers(view: View) -> Iterator[str]:
    if view.cells(role=ROUTER):
        table = next(iter(view.tables))
        for budget in view.budgets(table):
            yield answer(view, table, budget)


def answer(view: View, table: str, budget: int) -> str:
    """Which router is closest to the full model at a budget in every layer."""
    ranked = view.ranked(table, budget)
    if not ranked:
        return f"At {budget} experts per token there is no router: none was or could be set to it."
    best = ranked[0]
    routers = f"{len(ranked)} router{'s' * (len(ranked) != 1)} that can be set to it"
    if verdict(best["effect"]["kl"]) == WORSE:
        lead = (
            f"static top-k is closest to the full model; of the {routers} {best['contender']} is "
            "next"
        )
    else:
        apart = " (they are not tested against each other)" if len(ranked) > 1 else ""
        lead = f"{best['contender']} is closest to the full model of the {routers}{apart}"
    return f"At {budget} experts per token {lead}: {with_level(best)}, {against_static(best)}."


def with_level(cell: Mapping[str, Any]) -> str:
    """ "KL 0.0756 (95 % interval 0.0698 to 0.0814)"."""
    return f"KL {level(cell)}"


def level(cell: Mapping[str, Any]) -> str:
    """ "0.0756 (95 % interval 0.0698 to 0.0814)"."""
    kl, ends = cell["kl"], level_ends(cell)
    if ends is None:
        return in_digits(kl, ".4f")
    low, high = ends
    form = fine(kl, low, high, form=".4f")
    return f"{kl:{form}} (95 % interval {low:{form}} to {high:{form}})"


def in_digits(value: float, form: str = "+.4f") -> str:
    """ "+0.0123", of a small number more places; see `fine`."""
    return format(value, fine(value, form=form))


def against_static(cell: Mapping[str, Any]) -> str:
    """Its distance from static top-k with the same number of experts, and who wins."""
    effect = cell["effect"]["kl"]
    what = AGAINST_STATIC.get(verdict(effect), UNDECIDED)
    return f"{with_band(effect)} beside static top-k at as many experts: {what}"


def with_band(effect: Mapping[str, float], word: str = "band ") -> str:
    """ "-0.0123 (band -0.0160 to -0.0086)"."""
    return f"{effect['estimate']:{_form(effect)}} ({word}{band(effect)})"


def band(effect: Mapping[str, float]) -> str:
    """ "-0.0160 to -0.0086"."""
    if not varies(effect):
        return "none"
    form = _form(effect)
    return f"{effect['band_low']:{form}} to {effect['band_high']:{form}}"


def _form(effect: Mapping[str, float]) -> str:
    return fine(*(effect[name] for name in ("estimate", "band_low", "band_high")))


def signed(effect: Mapping[str, float]) -> str:
    """ "-0.0123 (95 % interval -0.0140 to -0.0106; band -0.0160 to -0.0086)"; see INTERVALS."""
    value, low, high, band_low, band_high = (
        format(effect[name], _form(effect))
        for name in ("estimate", "low", "high", "band_low", "band_high")
    )
    if not varies(effect):
        return f"{value} (no interval)"
    return f"{value} (95 % interval {low} to {high}; band {band_low} to {band_high})"


def _primary(view: View) -> Iterator[str]:
    table = next(iter(view.tables))
    cells = [
        view.cell(role=ROUTER, contender=PRIMARY, table=table, allocation="equal", budget=budget)
        for budget in view.budgets(table)
    ]
    said = {
        BETTER: "BH stays closer to the full model than static top-k",
        WORSE: "BH loses to static top-k",
    }
    for cell in filter(None, cells):
        effect = cell["effect"]["kl"]
        yield (
            "The comparison planned beforehand, BH (efron null) against static top-k, at "
            f"{cell['budget']} experts: {signed(effect)} nats of KL, both at an average of "
            f"{cell['average_k']:.2f}. "
            f"{said.get(verdict(effect), 'No difference between BH and static top-k is shown')}."
        )


def _ranking(view: View, table: str) -> Iterator[str]:
    for budget in view.budgets(table):
        order = view.ranked(table, budget)
        if not order:
            continue
        won = [cell for cell in order if verdict(cell["effect"]["kl"]) == BETTER]
        lost = [cell for cell in order if verdict(cell["effect"]["kl"]) == WORSE]
        lead = f"Table {table}, budget {budget} in every layer: "
        if won:
            text = f"{view.count(won)} beat static top-k ({_names(won)})"
        else:
            text = f"none of {len(view.contenders)} routers beats static top-k"
        text += f", {len(lost)} lose{'s' * (len(lost) == 1)} to it"
        text += f" ({_names(lost)})" if lost else ""
        undecided = len(order) - len(won) - len(lost)
        text += f", {undecided} can't be told from it" if undecided else ""
        missing = view.unreached(order)
        text += f", {missing} can't be set to this budget" if missing else ""
        best, worst = order[0], order[-1]
        yield (
            f"{lead}{text}. Closest to the full model is {best['contender']}, "
            f"{signed(best['effect']['kl'])}; farthest {worst['contender']}, "
            f"{in_digits(worst['effect']['kl']['estimate'])}."
        )


def _names(cells: list[dict[str, Any]]) -> str:
    return ", ".join(dict.fromkeys(cell["contender"] for cell in cells))


def _adaptivity(view: View) -> Iterator[str]:
    compared = [c for c in view.cells(role=ROUTER) if SHUFFLED in c.get("against", {})]
    if not compared:
        return
    silent = [c for c in compared if verdict(c["against"][SHUFFLED]) != BETTER]
    if not silent:
        yield (
            f"Every router in all {len(compared)} cells is closer to the full model than its own "
            "numbers of experts dealt to other tokens (shuffled-k): which tokens get more matters."
        )
        return
    where: dict[tuple[str, str], list[str]] = {}
    for cell in silent:
        worse = verdict(cell["against"][SHUFFLED]) == WORSE
        place = f"{cell['table']}, {cell['allocation']}" + (", worse than shuffled" * worse)
        where.setdefault((cell["contender"], place), []).append(str(cell["budget"]))
    listed = "; ".join(
        f"{name} ({place}, budget {', '.join(budgets)})" for (name, place), budgets in where.items()
    )
    closer = len(compared) - len(silent)
    yield (
        f"Against their own numbers of experts dealt to other tokens (shuffled-k), "
        f"{NO_ADAPTIVITY}: {listed}. In {closer or 'none'} of {len(compared)} cells the router is "
        "closer to the full model than its shuffle."
    )


def _contrasts(view: View) -> Iterator[str]:
    for table in view.tables:
        for other, meaning in OTHERS.items():
            parts = []
            for budget in view.budgets(table):
                cell = view.cell(
                    role=ROUTER, contender=PRIMARY, table=table, allocation="equal", budget=budget
                )
                if cell and other in cell.get("against", {}):
                    against = cell["against"][other]
                    what = {BETTER: "BH is closer", WORSE: "BH is farther"}
                    parts.append(
                        f"{in_digits(against['estimate'])} at {budget} "
                        f"({what.get(verdict(against), 'no difference shown')})"
                    )
            if parts:
                yield f"BH less {meaning} (table {table}): {', '.join(parts)}."


def _thresholds(view: View) -> Iterator[str]:
    one, other = THRESHOLDS
    gaps = []
    for cell in view.cells(role=ROUTER, contender=one, allocation="equal"):
        twin = view.twin(cell, contender=other)
        if twin:
            gaps.append(abs(twin["effect"]["kl"]["estimate"] - cell["effect"]["kl"]["estimate"]))
    if gaps:
        same = max(gaps) < 5e-4
        yield (
            f"{one} and {other} are both a threshold on the score, so with a parameter for each "
            f"layer they should make the same choices: their effects "
            f"{'agree to' if same else 'differ, by up to'} {max(gaps):.1g} nats"
            f"{'' if same else ' (ties of the local fdr table, or budgets met less closely)'}."
        )


def _allocation(view: View) -> Iterator[str]:
    for table in view.tables:
        static = view.cells(role=STATIC, table=table, allocation="free")
        if not static:
            continue
        won = [str(c["budget"]) for c in static if verdict(c["effect"]["kl"]) == BETTER]
        gain = min(static, key=lambda cell: cell["effect"]["kl"]["estimate"])
        adaptive = [
            c
            for c in view.cells(role=ROUTER, table=table, allocation="free")
            if STATIC in c.get("against", {})
        ]
        ahead = [c for c in adaptive if verdict(c["against"][STATIC]) == BETTER]
        yield (
            f"Table {table}: experts split over the layers by sensitivity make static top-k itself "
            f"better at {len(won)} of {len(static)} budgets (lowest at {gain['budget']}: "
            f"{in_digits(gain['effect']['kl']['estimate'])}). On the same split, {len(ahead)} of "
            f"{len(adaptive)} adaptive cells beat it" + (f" ({_names(ahead)})." if ahead else ".")
        )


def _shared(view: View) -> Iterator[str]:
    for table, budget in view.places():
        both: list[Any] = [
            view.cell(role=ROUTER, contender=PRIMARY, table=table, allocation=a, budget=budget)
            for a in ("shared", "equal")
        ]
        if all(both):
            shared, equal = (cell["effect"]["kl"] for cell in both)
            layers = ", ".join(f"{k:.2f}" for k in both[0]["by_layer"])
            yield (
                f"BH with one alpha for all layers, budget {budget} (table {table}): "
                f"{signed(shared)} against {in_digits(equal['estimate'])} with an alpha a layer; "
                f"its layers took {layers} experts."
            )


def _bounds(view: View) -> Iterator[str]:
    for table, budget in view.places():
        found: dict[str, Any] = {
            role: view.cell(role=role, table=table, allocation="equal", budget=budget)
            for role in (ORACLE, RANDOM)
        }
        if not all(found.values()):
            continue
        oracle, chance = (found[role]["effect"]["kl"] for role in (ORACLE, RANDOM))
        routers = view.cells(role=ROUTER, table=table, allocation="equal", budget=budget)
        best = min((c["effect"]["kl"]["estimate"] for c in routers), default=np.nan)
        share = best / oracle["estimate"] if verdict(oracle) == BETTER else np.nan
        text = (
            f"Bounds at {budget} (table {table}): random numbers of experts "
            f"{in_digits(chance['estimate'])}, the oracle {in_digits(oracle['estimate'])}"
        )
        if np.isfinite(share):
            text += f"; the best router gets {100 * max(share, 0):.0f} % of the oracle's gain"
        yield text + "."


def _wide(view: View) -> Iterator[str]:
    if WIDE not in view.tables:
        return
    top_k, pairs = view.top_k, []
    for cell in view.cells(role=ROUTER, table=WIDE, allocation="equal"):
        twin = view.twin(cell, table=REDUCTION)
        if twin:
            pairs.append((cell, twin))
    if pairs:
        less = sum(a["effect"]["kl"]["estimate"] < b["effect"]["kl"]["estimate"] for a, b in pairs)
        yield (
            f"With leave to give a token up to {view.tables[WIDE]['max_k']} experts instead of "
            f"{top_k}, the estimate is lower in {less} of {len(pairs)} cells at the same budget."
        )
    cells = view.cells(role=ROUTER, table=WIDE, allocation="equal", budget=top_k)
    if cells:
        best = min(cells, key=lambda cell: cell["effect"]["nats"]["estimate"])
        yield (
            f"At a budget of {top_k} static top-{top_k} is the model itself, at KL 0, so nothing "
            f"can be closer. Of next-token loss, {best['contender']} has the least: "
            f"{signed(best['effect']['nats'])} nats per token against the model's own."
        )


def _speed(view: View) -> Iterator[str]:
    for table in view.tables:
        budget = view.budgets(table)[0]
        cell = view.cell(
            role=ROUTER, contender=PRIMARY, table=table, allocation="equal", budget=budget
        )
        static = view.static(budget)
        if cell and static and cell.get("tokens_per_s") and static.get("tokens_per_s"):
            yield (
                f"Decoding one token at a time at a budget of {budget}: {speed_in_words(cell)} "
                f"tokens/s with BH, {speed_in_words(static)} with static top-{budget} "
                f"(table {table})."
            )


def beside(view: View, whole: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """What leaves out experts, beside all experts in few bits: "beaten" reads more bytes and is
    farther from the full model, "cheaper" reads no more and is farther, "closer" is closer,
    "undecided" none of these; by the bands."""
    name = quantized_name(whole["budget"], whole["bits"])
    found: dict[str, list[dict[str, Any]]]
    found = {"beaten": [], "cheaper": [], "closer": [], "undecided": []}
    for cell in view.skipping():
        said = verdict(cell["against"][name])
        more = cell["bytes_per_token"] > whole["bytes_per_token"]
        farther = "beaten" if more else "cheaper"
        found[{WORSE: farther, BETTER: "closer"}.get(said, "undecided")].append(cell)
    return found


def _shrinking(view: View) -> Iterator[str]:
    """Skip experts or shrink them?"""
    top_k = view.top_k
    full = view.static(top_k)
    if full is None:
        return
    for whole in view.whole():
        name = quantized_name(top_k, whole["bits"])
        share = whole["bytes_per_token"] / full["bytes_per_token"]
        yield (
            f"Skip experts or shrink them: static {name} reads {megabytes(whole)} MB of experts' "
            f"weights per token, {100 * share:.0f} % of the {megabytes(full)} MB that the model "
            f"reads in {view.run['dtype']}, as much as {top_k * share:.1f} of its {top_k} experts. "
            f"KL to the full model: {level(whole)} nats. {_dominance(view, whole)}"
        )
        if view.run["dtype"] == "float32":
            yield (
                f"In 16 bits all that is not quantised would read half of these bytes: {name} "
                f"would then be as much as {2 * top_k * share:.1f} of {top_k} experts."
            )
        alike = "top-k that leaves out experts"
        if view.below_one(whole):
            alike += " (static top-1, which reads more)"
        yield (
            f"At as many bytes as static {name}, static {alike} is farther by: "
            f"{signed(_turned(whole['effect']['kl']))} nats of KL, "
            f"{signed(_turned(whole['effect']['nats']))} of next-token loss."
        )
        yield from _decoding(view, whole, full)
        for other, against in whole.get("against", {}).items():
            said = {BETTER: "fewer bits are closer", WORSE: "fewer experts are closer"}
            yield (
                f"Both ways mixed: static {name} less static {other} with as many bytes: "
                f"{signed(against)} nats of KL; {said.get(verdict(against), UNSHOWN)}."
            )


def _decoding(view: View, whole: dict[str, Any], full: dict[str, Any]) -> Iterator[str]:
    """How fast all experts in few bits are, beside fewer experts as the model has them."""
    budgets = sorted({budget for table in view.tables for budget in view.budgets(table)})
    fewer = [cell for cell in view.run["static"] if cell["budget"] in budgets]
    beside = [cell for cell in [*fewer, full] if cell.get("tokens_per_s")]
    if whole.get("tokens_per_s") and beside:
        static = {cell["budget"]: f"top-{cell['budget']} {speed_in_words(cell)}" for cell in beside}
        yield (
            f"Decoding one token at a time: {speed_in_words(whole)} tokens/s with static "
            f"{quantized_name(whole['budget'], whole['bits'])}; as the model has its experts, "
            f"with static {', '.join(static.values())}."
        )


NAMED = 8  # cells, at most, in one sentence
UNSHOWN = "no difference is shown"


def _dominance(view: View, whole: dict[str, Any]) -> str:
    found = beside(view, whole)
    count = len(view.skipping())
    ways = f"{count} ways to leave out experts (static top-k, routers, at all budgets)"
    if len(found["beaten"]) == count:
        return f"Each of the {ways} reads more bytes and is farther from the full model."
    words = {
        "beaten": "with more bytes and farther from the full model",
        "cheaper": "with no more bytes and farther",
        "closer": "closer",
        "undecided": "not told from it",
    }
    parts = [f"{len(cells)} {words[kind]}{_places(cells)}" for kind, cells in found.items()]
    return f"Of {ways}: {', '.join(part for part in parts if part[0] != '0')}."


def _places(cells: list[dict[str, Any]]) -> str:
    """ " (top-k, budget 6, 7; bh, budget 6)", of a few."""
    where: dict[str, list[int]] = {}
    if len(cells) > NAMED:
        return ""
    for cell in cells:
        budgets = where.setdefault(cell["contender"], [])
        if cell["budget"] not in budgets:
            budgets.append(cell["budget"])
    listed = (f"{n}, budget {', '.join(map(str, sorted(b)))}" for n, b in where.items())
    return f" ({'; '.join(listed)})"


def megabytes(cell: Mapping[str, Any]) -> str:
    """Experts' weights that a token reads, "0.42"; "" of a run from before they were counted."""
    read = cell.get("bytes_per_token")
    return "" if read is None else f"{read / 1e6:.3g}"


def _turned(effect: Mapping[str, float]) -> dict[str, float]:
    """The interval of the difference taken the other way round."""
    ends = {"low": "high", "high": "low", "band_low": "band_high", "band_high": "band_low"}
    return {name: -effect[ends.get(name, name)] for name in ("estimate", *ends)}


def _outside(view: View) -> Iterator[str]:
    for cell in view.run.get("quantized", ()):
        if cell["status"] == "outside":
            yield f"Not measured, {cell['contender']}: {cell['reason']}."
    routers = [cell for cell in view.outside if cell["role"] == ROUTER]
    if not routers:
        return
    where: dict[tuple[str, str, str], list[str]] = {}
    for cell in routers:
        place = cell["contender"], cell["table"], cell["allocation"]
        where.setdefault(place, []).append(str(cell["budget"]))
    listed = "; ".join(f"{n} ({t}, {a}: {', '.join(b)})" for (n, t, a), b in where.items())
    yield f"Out of reach, so not measured, {len(routers)} cells: {listed}."
