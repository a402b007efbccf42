"""What a comparison concludes from its cells: effects, sentences, the figure."""

import re

import numpy as np
import pytest
from wording import says

import moeprof
from moeprof.routers.base import Router
from moeprof.studies.comparison.contenders import CONTENDERS, choose_contenders
from moeprof.studies.comparison.effects import Documents, Table, interpolate, verdict
from moeprof.studies.comparison.files import frame
from moeprof.studies.comparison.findings import findings, foremost
from moeprof.studies.comparison.plan import plan_tables
from moeprof.studies.comparison.plots import figure
from moeprof.studies.comparison.report import console_tables, report

pytestmark = pytest.mark.once

# ---------------------------------------------------------------- effects


def test_interpolation_goes_through_the_knots():
    curve = np.array([[8.0, 4.0, 1.0], [0.0, 1.0, 5.0]])
    at = np.array([[1, 1.5, 2, 2.25, 3, 9], [0.5, 1, 3, 2.5, 2, 1.75]])
    expected = [np.interp(x, [1, 2, 3], y) for x, y in zip(at, curve, strict=True)]
    np.testing.assert_allclose(interpolate(curve, at), expected)
    assert interpolate(np.array([[3.0]]), np.array([[1.0, 2.0]])).tolist() == [[3.0, 3.0]]


def made_cell(
    role="router",
    contender="bh",
    allocation="equal",
    budget=4,
    *,
    shift=0.0,
    seed=0,
    table="reduction",
    noise=0.01,
):
    """A cell of 40 documents with 100 predicted tokens: KL is static's plus `shift`."""
    rng = np.random.default_rng(seed)
    kl = 100 * (static_kl(budget) + shift + noise * rng.standard_normal(40))
    sums = {
        "kl": kl,
        "nats": 300 + kl,
        "agree": np.full(40, 80.0),
        "experts": np.full(40, 101.0 * budget),
    }
    return {
        "table": table,
        "role": role,
        "contender": contender,
        "allocation": allocation,
        "budget": budget,
        "targets": [budget] * 2,
        "status": "measured",
        "average_k": budget,
        "by_layer": [budget, budget],
        "at_floor": 0.1,
        "at_ceiling": 0.1,
        "kl": kl.mean() / 100,
        "nats": 3.0,
        "perplexity": 20.0,
        "agreement": 0.8,
        "tokens_per_s": 100.0,
        "tokens_per_s_low": 95.0,
        "tokens_per_s_high": 110.0,
        "by_document": {name: list(map(float, values)) for name, values in sums.items()},
    }


def static_kl(k):
    return 0.8 / k - 0.1


def made_run(*cells, plan_budgets=(4, 6)):
    """A run as in the JSON around cells, with their effects."""
    static = [
        made_cell("static", "top-k", budget=k, noise=0) | {"table": None} for k in range(1, 9)
    ]
    Table(list(cells), static, Documents.of([100] * 40, [101] * 40, ["a", "b"] * 20)).analyse()
    names = dict.fromkeys(c["contender"] for c in cells if c["role"] == "router")
    return {
        "static": static,
        "cells": list(cells),
        "planned_cells": len(cells) + 8,
        "contenders": [{"name": name} for name in names],
        "tables": [
            {
                "name": "reduction",
                "max_k": 8,
                "budgets": list(plan_budgets),
                "allocations": ["equal", "free", "shared"],
            }
        ],
        "model_config": {
            "num_experts_per_tok": 8,
            "num_hidden_layers": 2,
            "num_experts": 64,
            "norm_topk_prob": False,
        },
        "splits": {
            "null": [{}],
            "budget": [{"domain": "a", "tokens": 9}],
            "test": [{"domain": "a", "tokens": 101}] * 40,
        },
        "nulls": {"efron": "one"},
        "seed": 0,
        "seconds": 60,
        "command": "moeprof compare",
        "model": "toy",
        "dtype": "float32",
        "machine": {"cpu": "c", "features": [], "threads": 1, "versions": {}, "started": "now"},
    }


def test_effects_are_those_of_a_computation_by_hand():
    rng = np.random.default_rng(1)
    cells = [made_cell(budget=4, shift=0.02), made_cell(budget=6, seed=3)]
    cells[0]["by_document"]["experts"] = (101 * rng.uniform(3, 5, 40)).tolist()
    static = [made_cell("static", "top-k", budget=k, seed=k) for k in range(1, 9)]
    predicted, tokens = rng.integers(50, 100, 40), rng.integers(101, 120, 40)
    table = Table(cells, static, Documents.of(predicted, tokens, ["a"] * 40))
    weights = rng.integers(0, 4, (5, 40)).astype(float)
    found = table.effects(weights, "kl")
    for b, w in enumerate(weights):
        for m, cell in enumerate(cells):
            sums = {name: np.array(v) for name, v in cell["by_document"].items()}
            experts = (w * sums["experts"]).sum() / (w * tokens).sum()
            curve = [(w * np.array(c["by_document"]["kl"])).sum() for c in static]
            mean = (w * sums["kl"]).sum() - np.interp(experts, range(1, 9), curve)
            assert found[b, m] == pytest.approx(mean / (w * predicted).sum(), abs=1e-12)


def test_intervals_are_paired_and_bands_are_wider():
    router, twin = made_cell(shift=-0.02), made_cell("shuffled", shift=-0.01)
    others = [made_cell(contender=f"r{i}", shift=0.01, seed=10 + i) for i in range(5)]
    made_run(router, twin, *others)
    effect, against = router["effect"]["kl"], router["against"]["shuffled"]
    assert effect["band_low"] < effect["low"] < effect["estimate"] < effect["high"]
    # The same noise in both: the difference has none.
    assert against["estimate"] == pytest.approx(-0.01) and against["error"] < 1e-9
    assert verdict(effect) == "better"


# ---------------------------------------------------------------- what is said


def said(*cells):
    return " ".join(findings(made_run(*cells)))


def test_findings_when_bh_wins():
    text = said(made_cell(shift=-0.03), made_cell("shuffled", shift=0.05, seed=1))
    planned = (
        "The comparison planned beforehand, BH (efron null) against static top-k, at 4 experts"
    )
    assert f"{planned}: -0.0" in text and says(text, "BH stays closer", "full model")
    assert says(text, "1 of 1", "beat static top-k (bh)")
    assert "Every router in all 1 cells" in text and "no token adaptivity shown" not in text


def test_findings_when_bh_loses():
    best, oracle = (
        made_cell(contender="fixed_p", shift=-0.02, seed=2),
        made_cell("oracle", "oracle", shift=-0.05, seed=4),
    )
    text = said(
        made_cell(shift=0.03),
        best,
        oracle,
        made_cell("random", "random R", shift=0.04, seed=5),
    )
    assert "BH loses to static top-k" in text
    assert says(text, "1 of 2", "beat static top-k (fixed_p)", "1 loses to it (bh)")
    assert "can't be" not in text
    assert says(text, "one fixed p", "without the correction") and "(BH is farther)" in text
    share = best["effect"]["kl"]["estimate"] / oracle["effect"]["kl"]["estimate"]
    assert f"{100 * share:.0f} % of the oracle's gain" in text


def test_the_first_finding_is_who_keeps_quality_best():
    cells = [made_cell(contender=name, shift=shift) for name, shift in (("a", 0.1), ("b", -0.03))]
    four, six, *_ = findings(made_run(*cells))
    kl = cells[1]["kl"]
    assert says(
        four, "At 4 experts", "b is closest to the full model of the 2 routers", f"KL {kl:.4f}"
    )
    assert "beats static top-k" in four and says(six, "At 6 experts", "no router")
    four, *_ = findings(made_run(made_cell(shift=0.03)))
    assert "loses to static top-k" in four


def test_what_was_planned_is_among_the_foremost_findings():
    run = made_run(*(made_cell(budget=budget, shift=-0.02, seed=budget) for budget in (4, 6)))
    run["splits"]["test"] = run["splits"]["test"][:9]
    few, *_, four, six = foremost(run)
    assert findings(run)[:5] == foremost(run) and "9 documents only" in few
    assert "Give more documents" in few
    assert says(four, "planned", "at 4 experts") and says(six, "planned", "at 6 experts")
    other = made_run(made_cell(budget=3, shift=-0.02), plan_budgets=(3,))
    assert says(foremost(other)[-1], "planned", "at 3 experts")


def test_findings_without_a_difference_and_without_adaptivity():
    router = made_cell(shift=0.0002, noise=0.05)
    text = said(router, made_cell("shuffled", shift=0.0001, noise=0.05, seed=8))
    assert says(text, "No difference", "BH", "static top-k")
    assert says(text, "none of 1", "beats static top-k")
    assert says(text, "no token adaptivity", "bh (reduction, equal, budget 4)")
    worse = said(made_cell(shift=0.1), made_cell("shuffled", shift=0.0, seed=8))
    assert "bh (reduction, equal, worse than shuffled, budget 4)" in worse


def test_no_share_of_a_gain_that_the_oracle_does_not_show():
    text = said(
        made_cell(shift=-0.02),
        made_cell("oracle", "oracle", shift=-0.001, noise=0.05, seed=4),
        made_cell("random", "random R", shift=0.04, seed=5),
    )
    assert "Bounds at 4" in text and "of the oracle's gain" not in text


def test_cells_out_of_reach_are_named_with_the_interval():
    missing = {
        "table": "reduction",
        "role": "router",
        "contender": "ebh (lr)",
        "allocation": "equal",
        "budget": 6,
        "status": "outside",
        "reason": "reaches from 1 to 1.5 experts per token",
    }
    run = made_run(made_cell(shift=-0.03), made_cell("shuffled", shift=0.1))
    run["cells"].append(missing)
    run["contenders"].append({"name": "ebh (lr)"})
    text = " ".join(findings(run))
    assert says(text, "Out of reach", "1 cells", "ebh (lr) (reduction, equal: 6)")
    assert says(text, "1 of 2", "beat static top-k (bh)", "0 lose", "1 can't be set to this budget")
    page = report(run)
    assert "| ebh (lr) | - | - |" in page and "reaches from 1 to 1.5 experts per token" in page
    assert "| bh | -30" in page or "| bh | -29" in page or "| bh | -31" in page
    assert len(frame(run)) == 11 and list(console_tables(run))


def test_the_figure_names_its_lines_and_counts_as_the_findings_do():
    names = ["bh", *(f"r{i}" for i in range(9))]
    cells = [
        made_cell(contender=name, budget=budget, shift=0.004 * n - 0.01, seed=9 * n + budget)
        for n, name in enumerate(names)
        for budget in (4, 6)
    ]
    cells.append(made_cell(contender="short", budget=6, shift=0.02, seed=99))
    cells.append(made_cell("oracle", "oracle", shift=-0.04, seed=98))
    run = made_run(*cells)
    run["contenders"].append({"name": "never reached"})
    left, right = figure(run).axes
    said_of = {text.get_text() for text in left.texts}
    assert {*names, "short", "oracle", "static top-k"} <= said_of
    assert left.get_legend() is None
    beside = [text.xyann for text in left.texts if hasattr(text, "xyann")]
    heights = sorted(y for x, y in beside if x > 1)
    assert np.diff(heights).min() > 0.03  # none over another
    shown = [line for line in left.lines if line.get_label() in names]
    assert len({line.get_color() for line in shown if line.get_color() != "#bbbbbb"}) == 5
    for text in (*findings(run), left.get_title("left")):
        assert all(n == "12" for n in re.findall(r"(?:\d|none) of (\d+) routers", text))
    detail = " ".join(text.get_text() for text in right.texts)
    assert "10 of 12 routers reach it" in detail
    for kind in ("95 % interval", "band"):
        assert kind in detail and f'"{kind}"' in report(run)


@pytest.mark.parametrize(
    ("shifts", "words"),
    [
        ((-0.05, 0.05), "1 of 2 routers beats static top-k at 4 experts"),
        ((-0.05, -0.04), "2 of 2 routers beat static top-k at 4 experts"),
        ((0.05, 0.04), "None of 2 routers beats static top-k at 4 experts"),
    ],
)
def test_the_figure_of_one_budget_names_it(shifts, words):
    cells = [made_cell(contender=f"r{n}", shift=shift, seed=n) for n, shift in enumerate(shifts)]
    title = figure(made_run(*cells, plan_budgets=(4,))).axes[0].get_title("left")
    assert title == words


def test_contenders_and_tables_are_chosen_by_name():
    def names(*asked):
        return [c.name for c in choose_contenders(asked)]

    assert names("hc (p)", "bh") == ["bh", "hc (p)"]
    assert names("bh (trimmed)", "ebh") == ["bh (trimmed)", "ebh (lr)", "ebh (calibrator)"]
    assert len(choose_contenders()) == len(CONTENDERS) == 18
    with pytest.raises(ValueError, match="there is no 'nonsense'; expected one of bh, "):
        choose_contenders(["nonsense"])
    reduction, wide = plan_tables(8, 64)
    assert reduction.budgets == (2, 3, 4, 5, 6, 7) and reduction.max_k == 8
    assert wide.budgets == (2, 3, 4, 5, 6, 7, 8) and wide.max_k == 16
    assert plan_tables(8, 12)[1].max_k == 12
    with pytest.raises(ValueError, match="expected some of 2, 3, 4, 5, 6, 7 .table reduction"):
        plan_tables(8, 64, budgets=[9])
    for top_k, tables in ((1, ["reduction", "wide"]), (2, ["reduction"])):
        for budgets in (None, [1]):
            with pytest.raises(ValueError) as raised:
                plan_tables(top_k, 64, tables, budgets)
            assert says(raised.value, f"takes {top_k} expert", "nothing to compare", "3 or more")
    assert [plan.budgets for plan in plan_tables(2, 64)] == [(2,)]


def test_the_report_has_code_that_uses_what_is_best(monkeypatch):
    fixed_p, entropy = (
        made_cell(contender=name, budget=budget, shift=-0.03)
        for name, budget in (("fixed_p", 4), ("entropy", 6))
    )
    run = made_run(fixed_p, entropy, made_cell(contender="bh", budget=4, shift=0.02))
    page = report(run)
    for said in (
        'fit_null(model, tokenizer, texts, kind="efron", score="logprob")',
        "moeprof.FixedP(max_k=8).with_budget(",
        "average_k=4, per_layer=True, null=null",
        "moeprof.Entropy(max_k=8).with_budget(",
        "average_k=6, per_layer=True\n",
    ):
        assert said in page
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    patched = []
    monkeypatch.setattr(moeprof, "fit_null", lambda *_, **options: options)
    monkeypatch.setattr(moeprof, "patch", lambda *args, **options: patched.append((args, options)))
    monkeypatch.setattr(Router, "with_budget", lambda router, *_, **options: options["average_k"])
    given = dict.fromkeys(("model", "tokenizer", "texts", "other_texts"))
    for block in blocks:
        exec(block, {"moeprof": moeprof, **given})
    null = {"kind": "efron", "score": "logprob"}
    assert patched == [((None, 4), {"null": null}), ((None, 6), {})]
    lost = report(made_run(made_cell(contender="bh", budget=4, shift=0.02)))
    assert 'moeprof.patch(model, "topk", k=4)' in lost and "with_budget" not in lost
