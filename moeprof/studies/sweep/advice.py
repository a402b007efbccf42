"""What to use for a number of experts per token: computed from a run, never assumed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ...measure.bootstrap import MORE_DOCUMENTS, are_few
from .beside import budgets
from .compared import interval, missing_ks, on_line, with_band

NEAR = 0.1  # of a budget: what lies further off isn't an answer to it
CODE = "moeprof.patch(model, {router}, null={null})"


def advice(run: dict[str, Any]) -> list[dict[str, Any]]:
    """For each budget a dict: budget, head and others (in words), code (Python), best (a config).

    run: as `compared` gives it. Compared are static top-k, the grid's BH and, set by budget,
    fixed_p and BH; `best_for` chooses. Nothing for a run that isn't finished: what is missing may
    be the answer.
    """
    if not run["finished"]:
        return []
    return [_for(run, budget) for budget in budgets(run["model_config"]["num_experts_per_tok"])]


def best_for(
    budget: float, rows: Iterable[dict[str, Any]], run: dict[str, Any]
) -> dict[str, Any] | None:
    """The row to use for a budget of experts per token; None where it is static top-k.

    rows: results with their distance from static top-k. A row wins only if its whole band is below
    static at its own experts, and it costs less than the static top-k that fits into the budget:
    a row with fewer experts is no answer if static spends the others better.
    """
    better = (row for row in _by_cost(budget, rows, run) if is_below(row))
    return next((row for row in better if _above_static(row, budget, run) < 0), None)


def _near(budget: float, rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if abs(row["avg_experts_heldout"] / budget - 1) <= NEAR]


def _by_cost(
    budget: float, rows: Iterable[dict[str, Any]], run: dict[str, Any]
) -> list[dict[str, Any]]:
    """Those near the budget whose distance from static is known, the best first."""
    near = [row for row in _near(budget, rows) if row.get("bits_above_static") is not None]
    return sorted(near, key=lambda row: _above_static(row, budget, run))


def _above_static(row: Mapping[str, Any], budget: float, run: dict[str, Any]) -> float:
    """Bits per byte above static at the row's own experts, or at the largest whole k within the
    budget if that is more; infinity where that k was not run."""
    own = {"k": run["model_config"]["num_experts_per_tok"], "bits_above_own": 0.0}
    line = sorted([*run["static"], own], key=lambda point: point["k"])
    ks, bits = (np.array([point[n] for point in line], float) for n in ("k", "bits_above_own"))
    at = max(row["avg_experts_heldout"], int(budget))
    if missing_ks(at, ks.tolist()):
        return math.inf
    return row["bits_above_own"] - float(on_line(ks, bits[None], np.array([[at]]))[0, 0])


def _for(run: dict[str, Any], budget: float) -> dict[str, Any]:
    rows = [row for row in _set(run, budget) if not row.get("error")]
    grid = _by_cost(budget, run["results"][1:], run) or _near(budget, run["results"][1:])
    best = best_for(budget, [*grid, *rows], run)
    missing = _missing(budget, [*grid, *rows], run)
    found = [*grid[:1], *_set(run, budget)]
    near = _by_cost(budget, [*grid, *rows], run)
    static = _static(run, budget)
    top = f"the model's own top-{run['results'][0]['max_k']}"
    if best:
        what = f"{_costs(best, top)}, {_beside(best, run)}"
        head = f"{_as_far_as(run)}{_name(best)} is what to use: {what}."
        code = _code(best, run)
    elif static is None or missing:
        ks = sorted({*_ks(run), *missing})
        head = (
            f"no answer: {_static_of(missing)} was not run, and nothing that was tried was shown "
            "to be better than the static top-k that was. "
            f"Run it again with --static {','.join(map(str, ks))}."
        )
        code = None
    else:
        lead = _as_far_as(run) + "static top-{} is what to use"
        if is_one_document(run):
            lead = (
                "nothing is decided, as the held-out text is one document. Until more documents "
                "decide it, static top-{} needs no choice of a parameter"
            )
        head = f"{lead.format(static['k'])}: {_costs(static, top)}; " + (
            f"nothing tried was shown to cost less (the nearest, {_name(near[0])}: "
            f"{_costs(near[0], top)}, {_beside(near[0], run)})."
            if near
            else "nothing that it could be compared with takes about so many experts."
        )
        code = f'moeprof.patch(model, "topk", k={static["k"]})'
    others = [_other(row, budget, top, run) for row in found if row is not best]
    if best and static is not None:
        others.insert(0, f"static top-{static['k']}: {_costs(static, top)}")
    if not grid and len(run["results"]) > 1:
        nearest = min(run["results"][1:], key=lambda r: abs(r["avg_experts_heldout"] - budget))
        others.append(
            f"no BH configuration of the grid is within {100 * NEAR:.0f} % of {budget:g} experts; "
            f"the nearest is {_other(nearest, budget, top, run)}"
        )
    return {
        "budget": budget,
        "best": best["config"] if best else static["config"] if static and not missing else None,
        "head": f"For {budget:g} experts per token on average, {head}",
        "code": code,
        "others": others,
    }


def _missing(budget: float, rows: Iterable[dict[str, Any]], run: dict[str, Any]) -> list[int]:
    """The k that static top-k has to be run for before it can be what to use: the largest within
    the budget, and those beside a setting that costs less."""
    static = _static(run, budget)
    if static is None:
        return [int(budget)]
    near = (row for row in _near(budget, rows) if row["bits_above_own"] < static["bits_above_own"])
    return sorted({k for row in near for k in missing_ks(row["avg_experts_heldout"], _ks(run))})


def _ks(run: dict[str, Any]) -> list[int]:
    """The k that static top-k was run for, the model's own among them."""
    own = run["model_config"]["num_experts_per_tok"]
    return sorted({own, *(row["k"] for row in run["static"])})


def _static_of(ks: Iterable[int]) -> str:
    return "static " + " and ".join(f"top-{k}" for k in ks)


def _set(run: dict[str, Any], budget: float) -> list[dict[str, Any]]:
    return [row for row in run.get("budgets", ()) if row["budget"] == budget]


def _static(run: dict[str, Any], budget: float) -> dict[str, Any] | None:
    """Static top-k with the largest whole k within the budget, None where it was not run."""
    return next((row for row in run.get("static", ()) if row["k"] == int(budget)), None)


def is_below(row: Mapping[str, Any]) -> bool:
    """Is the whole band below static top-k? A single document has none."""
    high = _end(row, "high")
    return high is not None and high < 0


def is_above(row: Mapping[str, Any]) -> bool:
    """Is the whole band above static top-k? A single document has none."""
    low = _end(row, "low")
    return low is not None and low > 0


def _end(row: Mapping[str, Any], end: str) -> float | None:
    """Of the band; of the interval in a run of a version that had no bands."""
    name = f"bits_above_static_band_{end}"
    at: float | None = row[name if name in row else f"bits_above_static_{end}"]
    return at


def caution(run: Mapping[str, Any]) -> str:
    """That nothing is decided, or little, by how few documents there are; "" where they do."""
    documents = len(run["heldout_documents"])
    if documents == 1:
        return (
            "The held-out text is one document, so nothing has an interval, and nothing is decided."
        )
    if not are_few(documents):
        return ""
    return f"The held-out text has {few(documents)}. {MORE_DOCUMENTS}"


def few(documents: int) -> str:
    """What so few documents mean, from their number on."""
    return (
        f"{documents} documents only: intervals and bands over so few are too narrow, so what is "
        "called better or worse may be chance"
    )


def _as_far_as(run: Mapping[str, Any]) -> str:
    documents = len(run["heldout_documents"])
    return f"as far as {documents} documents can tell, " if are_few(documents) else ""


def is_one_document(run: Mapping[str, Any]) -> bool:
    """Whether there are no intervals, since these are over documents, and nothing is decided."""
    return len(run["heldout_documents"]) == 1


def how_sure(rows: Sequence[Mapping[str, Any]], documents: int) -> str:
    """The end of a sentence that counts those of the rows that are below and above static."""
    if _end(rows[0], "high") is None:
        return "the text is one document, so none of it has an interval, and nothing is decided."
    how = "of the others no difference was shown (by 95 % bands, which hold for all together)."
    return f"{how} The text has {few(documents)}." if are_few(documents) else how


def _name(row: Mapping[str, Any]) -> str:
    if "budget" in row:
        return f"{row['router']} set by budget ({row['parameter']}={row['value']:g})"
    return row["config"]


def _costs(row: Mapping[str, Any], top: str) -> str:
    return (
        f"{row['avg_experts_heldout']:.2f} experts on the held-out text, "
        f"{interval(row, 'bits_above_own')} bits per byte above {top}"
    )


def _beside(row: Mapping[str, Any], run: dict[str, Any]) -> str:
    if row.get("bits_above_static") is None:
        ks = missing_ks(row["avg_experts_heldout"], _ks(run))
        return f"can't be compared, as {_static_of(ks)} was not run"
    return f"{with_band(row)} beside static top-k at the same experts"


def _other(row: Mapping[str, Any], budget: float, top: str, run: dict[str, Any]) -> str:
    if row.get("error"):
        return f"{row['router']} can't be set to {budget:g}: {row['error']}"
    return f"{_name(row)}: {_costs(row, top)}, {_beside(row, run)}"


def _code(row: Mapping[str, Any], run: dict[str, Any]) -> str:
    null = run["null_code"]
    if "budget" in row:
        router = f"moeprof.{row['class']}({row['parameter']}={row['value']}, max_k={row['max_k']})"
    else:
        router = f"moeprof.BH(alpha={row['alpha']}, max_k={row['max_k']})"
    return CODE.format(router=router, null=null)
