"""What to use for a number of experts per token: computed from a run, never assumed."""

from .beside import budgets
from .compared import interval

NEAR = 0.1  # of a budget: what lies further off isn't an answer to it
CODE = "moeprof.patch(model, {router}, null={null})"


def advice(run):
    """For each budget a dict: budget, lines (in words), code (Python) and best (a config).

    run: as `compared` gives it. Compared are static top-k, the best of the grid within 10 % of
    the budget, and fixed_p and BH set by budget. The best is the one furthest below static top-k
    at its own experts per token; static itself, unless that is below by more than the
    documents' variation explains (the whole interval).
    """
    return [_for(run, budget) for budget in budgets(run["model_config"]["num_experts_per_tok"])]


def _for(run, budget):
    own = run["results"][0]
    found = [row for row in (_of_grid(run, budget), *_set(run, budget)) if row]
    usable = [row for row in found if row.get("bits_above_static") is not None]
    usable = [row for row in usable if abs(row["avg_experts_heldout"] / budget - 1) <= NEAR]
    best = min(usable, key=lambda row: row["bits_above_static"], default=None)
    wins = best is not None and is_below(best)
    static = _static(run, budget)
    top = f"the model's own top-{own['max_k']}"
    if wins:
        head = (
            f"{_name(best)} is best: {_costs(best, top)}, "
            f"{interval(best, 'bits_above_static')} beside static top-k at the same experts."
        )
        code = _code(best, run)
    elif static is None:
        head, code = f"static top-{int(budget)} was not run, so nothing can be recommended.", None
    else:
        head = f"static top-{static['k']} is what to use: {_costs(static, top)}; " + (
            f"nothing tried is below it with certainty (the nearest, {_name(best)}: "
            f"{interval(best, 'bits_above_static')} beside static at the same experts)."
            if best
            else "nothing else that was tried takes about so many experts."
        )
        code = f'moeprof.patch(model, "topk", k={static["k"]})'
    others = [_other(row, budget) for row in found if not (wins and row is best)]
    if wins and static is not None:
        others.insert(0, f"static top-{static['k']}: {_costs(static, top)}")
    if _of_grid(run, budget) is None and len(run["results"]) > 1:
        nearest = min(run["results"][1:], key=lambda r: abs(r["avg_experts_heldout"] - budget))
        others.append(
            f"no BH configuration of the grid is within {100 * NEAR:.0f} % of {budget:g} experts; "
            f"the nearest is {_other(nearest, budget)}"
        )
    return {
        "budget": budget,
        "best": best["config"] if wins else static["config"] if static else None,
        "head": f"For {budget:g} experts per token on average, {head}",
        "code": code,
        "others": others,
    }


def _of_grid(run, budget):
    """The grid's BH row within 10 % of the budget that is furthest below static, or None."""
    rows = [
        row
        for row in run["results"][1:]
        if abs(row["avg_experts_heldout"] / budget - 1) <= NEAR
        and row.get("bits_above_static") is not None
    ]
    return min(rows, key=lambda row: row["bits_above_static"], default=None)


def _set(run, budget):
    return [row for row in run.get("budgets", ()) if row["budget"] == budget]


def _static(run, budget):
    """Static top-k with the largest whole k within the budget, None where it was not run."""
    return next((row for row in run.get("static", ()) if row["k"] == int(budget)), None)


def is_below(row):
    """Below static beyond doubt; for a single document, below it."""
    high = row["bits_above_static_high"]
    return (row["bits_above_static"] if high is None else high) < 0


def _name(row):
    if "budget" in row:
        return f"{row['router']} set by budget ({row['parameter']}={row['value']:g})"
    return row["config"]


def _costs(row, top):
    return (
        f"{row['avg_experts_heldout']:.2f} experts on the held-out text, "
        f"{interval(row, 'bits_above_own')} bits per byte above {top}"
    )


def _other(row, budget):
    if row.get("error"):
        return f"{row['router']} can't be set to {budget:g}: {row['error']}"
    beside = interval(row, "bits_above_static") or "outside of what static top-k was run for,"
    return (
        f"{_name(row)}: {row['avg_experts_heldout']:.2f} experts, {beside} beside static top-k "
        "at the same experts"
    )


def _code(row, run):
    null = run["null_code"]
    if "budget" in row:
        router = f"moeprof.{row['class']}({row['parameter']}={row['value']}, max_k={row['max_k']})"
    else:
        router = f"moeprof.BH(alpha={row['alpha']}, max_k={row['max_k']})"
    return CODE.format(router=router, null=null)
