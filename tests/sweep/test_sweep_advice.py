"""A sweep beside static top-k: distances, budgets, and what is advised."""

import math

import numpy as np
import pytest
from wording import says

import moeprof
from moeprof.routers import TopK
from moeprof.studies.sweep import figure
from moeprof.studies.sweep.advice import advice, caution, is_above, is_below
from moeprof.studies.sweep.beside import budgets
from moeprof.studies.sweep.compared import compared, on_line
from moeprof.studies.sweep.merged import merged
from moeprof.studies.sweep.report import beside_static, findings, report

pytestmark = pytest.mark.slow  # test_every_study runs what they are made of on both versions


def test_static_is_what_top_k_does_on_the_same_text(experiment, run):
    (row,) = run[0]["static"]  # the own k is the baseline
    assert row["k"] == 1 and row["avg_experts_heldout"] == 1
    again = experiment.run(TopK(1))
    assert row["nats_by_document"] == again["nats_by_document"]
    tokens = [document["tokens"] for document in run[0]["heldout_documents"]]
    assert row["experts_by_document"] == pytest.approx(tokens)


def test_experts_by_document_add_up(run):
    tokens = sum(document["tokens"] for document in run[0]["heldout_documents"])
    for result in run[0]["results"]:
        average = sum(result["experts_by_document"]) / tokens
        assert average == pytest.approx(result["avg_experts_heldout"])


def test_the_line_is_straight_between_whole_ks():
    static = np.array([[4.0, 2.0, 1.0], [8.0, 4.0, 2.0]])
    found = on_line(np.array([1.0, 2.0, 4.0]), static, np.array([[1.0, 1.5, 3.0], [4, 9, 0.5]]))
    assert found.tolist() == [[4.0, 3.0, 1.5], [2.0, 2.0, 8.0]]


def test_the_distance_from_static_and_its_interval(run):
    """Against a bootstrap by a loop; documents are drawn with what they and the line have."""
    result = run[0]
    row = next(r for r in result["results"] if r["config"] == "bh_k4_a020")
    assert 1 < row["avg_experts_heldout"] < 2
    sizes = np.array([d["bytes"] for d in result["heldout_documents"]])
    tokens = np.array([d["tokens"] for d in result["heldout_documents"]])
    own, one = result["results"][0], result["static"][0]

    def distance(drawn):
        bits = [
            np.array(r["nats_by_document"])[drawn].sum() / math.log(2) / sizes[drawn].sum()
            for r in (row, one, own)
        ]
        k = np.array(row["experts_by_document"])[drawn].sum() / tokens[drawn].sum()
        return bits[0] - ((2 - k) * bits[1] + (k - 1) * bits[2])

    everything = np.arange(len(sizes))
    assert row["bits_above_static"] == pytest.approx(distance(everything), abs=1e-9)
    rng = np.random.default_rng(1)
    draws = [distance(rng.integers(len(sizes), size=len(sizes))) for _ in range(2000)]
    spread_of = np.ptp(np.quantile(draws, [0.025, 0.975]))
    low, high = np.quantile(draws, [0.025, 0.975])
    assert row["bits_above_static_low"] == pytest.approx(low, abs=0.15 * spread_of + 1e-6)
    assert row["bits_above_static_high"] == pytest.approx(high, abs=0.15 * spread_of + 1e-6)


def noise(settings, documents, rng):
    """A run in which each of the settings differs from static top-2 by chance alone."""

    def row(bits):
        nats = 1000 * math.log(2) * bits
        return {"nats_by_document": nats.tolist(), "experts_by_document": [200] * documents}

    own = 1 + 0.1 * rng.normal(size=documents)
    return compared(
        {
            "results": [
                row(own),
                *(row(own + rng.normal(size=documents)) for _ in range(settings)),
            ],
            "model_config": {"num_experts_per_tok": 2},
            "seed": 0,
            "heldout_documents": [{"bytes": 1000, "tokens": 100}] * documents,
        }
    )


def test_a_setting_is_seldom_called_better_or_worse_by_chance():
    """Of 15 settings that are as good as static top-k, the bands call some otherwise in 5 %."""
    rng, runs = np.random.default_rng(0), 100
    called, outside = 0, 0
    for _ in range(runs):
        rows = noise(15, 60, rng)["results"][1:]
        called += any(is_below(row) or is_above(row) for row in rows)
        ends = ((row["bits_above_static_low"], row["bits_above_static_high"]) for row in rows)
        outside += any(low > 0 or high < 0 for low, high in ends)
    assert 0 < called <= 12 and outside > 40


def test_what_cannot_be_compared_does_not_widen_the_bands(run):
    """A row over a gap of the line varies as it likes."""
    wild = dict(run[0]["results"][-1])
    nats, experts = (np.array(wild[f"{name}_by_document"]) for name in ("nats", "experts"))
    wild |= {"config": "wild", "nats_by_document": (nats * np.arange(len(nats))).tolist()}
    wild["experts_by_document"] = (3 * experts).tolist()
    other = compared(run[0] | {"results": [*run[0]["results"], wild]})["results"]
    assert other[-1]["bits_above_static_band_low"] is None
    assert other[:-1] == run[0]["results"]


def test_documents_are_drawn_with_their_experts():
    """All documents have the same bits; only their experts per token, 1.2 and 1.8, vary."""

    def row(bits, experts):
        return {"nats_by_document": [100 * bits * math.log(2)] * 8, "experts_by_document": experts}

    found = compared(
        {
            "results": [row(0.5, [20] * 8), row(0.7, [12, 18] * 4)],
            "static": [row(1.0, [10] * 8) | {"k": 1}],
            "model_config": {"num_experts_per_tok": 2},
            "seed": 0,
            "heldout_documents": [{"bytes": 100, "tokens": 10}] * 8,
        }
    )["results"][1]
    assert found["bits_above_static"] == pytest.approx(-0.05)
    spread_of = 2 * 1.96 * 0.5 * 0.3 / math.sqrt(8)
    width = found["bits_above_static_high"] - found["bits_above_static_low"]
    assert width == pytest.approx(spread_of, rel=0.25)


def test_beyond_the_line_there_is_no_distance(run):
    far = [
        r | {"experts_by_document": [3 * e for e in r["experts_by_document"]]}
        for r in run[0]["results"][1:]
    ]
    found = compared(run[0] | {"results": [run[0]["results"][0], *far]})["results"]
    outside = [r for r in found[1:] if sum(r["experts_by_document"]) > 2 * run[0]["heldout_tokens"]]
    assert outside and all(r["bits_above_static"] is None for r in outside)


def test_over_a_gap_of_the_line_there_is_no_distance(run):
    """The straight line from top-1 to the own top-4 lies above what top-2 and top-3 cost."""
    size = run[0]["model_config"] | {"num_experts_per_tok": 4}
    found = compared(run[0] | {"model_config": size, "results": run[0]["results"]})
    known = [r for r in found["results"][1:] if r["bits_above_static"] is not None]
    assert all(r["avg_experts_heldout"] <= 1 + 1e-9 for r in known)
    told = advice(found)[0]  # for 2: static top-2 was not run
    assert told["best"] is None and told["code"] is None
    assert "can't be compared, as static top-2 was not run" in " ".join(told["others"])


def test_a_budget_between_whole_ks_is_held_against_what_can_be_run(run):
    """For 1.5: a row of 1.40 experts below static there beats top-1, and no top-1.5 exists."""
    (one,) = run[0]["static"]
    slope = one["bits_above_own"]
    told = with_distance(run[0], "bh_k4_a020", *(np.array([-0.03, -0.02, -0.01]) * slope), 1.4)
    assert advice(told)[1]["best"] == "bh_k4_a020"


def test_budgets_are_half_and_three_quarters_of_the_models_own():
    assert budgets(8) == [4.0, 6.0] and budgets(2) == [1.0, 1.5] and budgets(1) == []


def test_budget_rows_are_what_their_parameter_gives(experiment, run):
    rows = [row for row in run[0]["budgets"] if row["error"] is None]
    assert {row["router"] for row in run[0]["budgets"]} == {"fixed_p", "bh"} and rows
    for row in rows:
        router = {"fixed_p": moeprof.FixedP, "bh": moeprof.BH}[row["router"]]
        router = router(**{row["parameter"]: row["value"]}, max_k=row["max_k"])
        again = experiment.quality(router)
        assert again["avg_experts_heldout"] == row["avg_experts_heldout"]
        assert again["nats_by_document"] == row["nats_by_document"]
        assert row["avg_experts_calibration"] == pytest.approx(row["budget"], rel=0.05)


def with_distance(run, config, low, distance, high, experts):
    """The run with one row's distance from static and its band set, and every other one's far
    above it; the intervals are a point each: they decide nothing."""
    (one,) = run["static"]

    def put(row):
        if "nats_by_document" not in row or row["config"].startswith("topk"):
            return row
        mine = row["config"] == config
        values = (low, distance, high) if mine else (1, 1, 1)
        values += (values[1],) * 2
        ends = ("_band_low", "", "_band_high", "_low", "_high")
        names = [f"bits_above_static{end}" for end in ends]
        at = {"avg_experts_heldout": experts} if mine else {"bits_above_own": 2.0}
        if mine and distance is not None:  # the line goes from top-1 to the own top-2
            at["bits_above_own"] = (2 - experts) * one["bits_above_own"] + distance
        return row | dict(zip(names, values, strict=True)) | at

    return run | {name: [put(row) for row in run[name]] for name in ("results", "budgets")}


def test_the_advice_names_the_best_and_its_line_runs(experiment, run):
    """What is said to be best is below static for sure; the code patches with what was run."""
    told = with_distance(run[0], "bh_k4_a020", -0.3, -0.2, -0.1, 1.02)
    first, second = advice(told)
    assert first["best"] == "bh_k4_a020"
    assert "bh_k4_a020 is what to use: 1.02 experts" in first["head"]
    assert "-0.2000 (band -0.3000 to -0.1000) beside static top-k" in first["head"]
    assert first["code"] == "moeprof.patch(model, moeprof.BH(alpha=0.2, max_k=4), null=null)"
    scope = {"moeprof": moeprof, "model": experiment.model, "null": experiment.null}
    eval(first["code"], scope).unpatch()
    assert second["best"] == "topk_1" and second["code"] == 'moeprof.patch(model, "topk", k=1)'
    eval(second["code"], scope).unpatch()


def test_fewer_experts_than_may_be_spent_must_still_cost_less_than_static(run):
    """Below static at its own 0.95 experts, yet above static top-1: static is the answer."""
    (one,) = run[0]["static"]
    slope = one["bits_above_own"]  # of the line from top-1 to top-2, by an expert
    told = with_distance(run[0], "bh_k4_a020", *(np.array([-0.03, -0.02, -0.01]) * slope), 0.95)
    first = advice(told)[0]
    assert first["best"] == "topk_1" and "nearest, bh_k4_a020" in first["head"]
    title = figure(told["results"], told | {"advice": advice(told)}).axes[0].get_title(loc="left")
    assert title.startswith("At 1: static top-1; at 1.5: ")
    told = with_distance(run[0], "bh_k4_a020", *(np.array([-0.08, -0.07, -0.06]) * slope), 0.95)
    assert advice(told)[0]["best"] == "bh_k4_a020"


@pytest.mark.parametrize("high", [0.0, 0.1])
def test_static_is_recommended_where_nothing_is_surely_better(run, high):
    first = advice(with_distance(run[0], "bh_k4_a020", -0.3, -0.2, high, 1.02))[0]
    assert first["best"] == "topk_1" and "static top-1 is what to use" in first["head"]
    assert "nearest, bh_k4_a020" in first["head"]


def test_a_static_top_k_that_was_not_run_is_not_recommended(run):
    """With --static 1 alone, 1 expert is no answer to what to use for 3."""
    size = run[0]["model_config"] | {"num_experts_per_tok": 4}
    only = [row for row in run[0]["static"] if row["k"] == 1]
    last = advice(run[0] | {"model_config": size, "static": only, "budgets": []})[-1]
    assert last["budget"] == 3 and last["code"] is None and last["best"] is None
    assert "static top-3 was not run" in last["head"] and "--static 1,3,4" in last["head"]


@pytest.mark.parametrize("cheaper", [True, False])
def test_static_is_no_answer_beside_what_costs_less_and_was_not_compared(run, cheaper):
    """At 2.1 experts, less than static top-2 costs: static top-3 decides, and was not run."""
    (one,) = run[0]["static"]
    two = one | {"config": "topk_2", "k": 2, "bits_above_own": one["bits_above_own"] / 2}
    size = run[0]["model_config"] | {"num_experts_per_tok": 4}
    told = with_distance(run[0], "bh_k4_a020", None, None, None, 2.1)
    for row in told["results"]:
        if row["config"] == "bh_k4_a020":
            row["bits_above_own"] = two["bits_above_own"] * (0.9 if cheaper else 1.1)
    told |= {"model_config": size, "static": [one, two], "budgets": []}
    first = advice(told)[0]
    assert first["budget"] == 2 and first["best"] == (None if cheaper else "topk_2")
    assert ("static top-3 was not run" in first["head"]) == cheaper
    assert ("--static 1,2,3,4" in first["head"]) == cheaper
    title = figure(told["results"], told | {"advice": advice(told)}).axes[0].get_title(loc="left")
    assert title.startswith("At 2: no answer" if cheaper else "At 2: static top-2")


@pytest.mark.parametrize("high", [-0.1, 0.1])
def test_few_documents_are_said(run, high):
    """5 documents: with the answer, in the report, in the verdict of a study, in the figure."""
    told = with_distance(run[0], "bh_k4_a020", -0.3, -0.2, high, 1.02)
    assert len(told["heldout_documents"]) < 10 and caution(told)
    head = advice(told)[0]["head"]
    count = f"{len(told['heldout_documents'])} documents"
    assert says(head, f"as far as {count} can tell", "is what to use")
    assert says(beside_static(told), f"{count} only", "too narrow", "chance")
    assert findings(told)[0] == caution(told) and says(caution(told), f"{count} only", "chance")
    for axis in figure(told["results"], told).axes[:2]:
        assert any(f"{count} only" in text.get_text() for text in axis.texts)
    many = told | {"heldout_documents": told["heldout_documents"] * 4}
    assert caution(many) == "" and "as far as" not in advice(many)[0]["head"]
    assert "only" not in beside_static(many)


def test_a_run_without_bands_can_still_be_told_and_drawn(run):
    """Of a version that had none: its intervals stand for them, but in the report, made anew."""

    def old(row):
        return {name: value for name, value in row.items() if "band" not in name}

    before = run[0] | {n: list(map(old, run[0][n])) for n in ("results", "static", "budgets")}
    assert "(band" not in str(advice(before)) and "(band" in str(advice(run[0]))
    drawn = figure(before["results"], before).axes[1]
    assert "thin" not in drawn.texts[0].get_text() and len(drawn.lines) > 3
    assert report(before) == report(run[0])


def test_there_is_no_advice_before_all_is_finished(run):
    assert advice(run[0] | {"finished": False}) == [] != advice(run[0])


def test_the_figure_counts_the_settings_that_static_was_run_beside(run):
    far = run[0]["results"][-1]["config"]
    told = with_distance(run[0], far, None, None, None, 2.5)
    points = len(merged([row for row in told["results"][1:] if row["config"] != far]))
    points += sum(row.get("bits_above_static") is not None for row in told["budgets"])
    title = figure(told["results"], told).axes[1].get_title(loc="left")
    assert title == f"0 of {points} settings are better than static top-k"
    told = with_distance(run[0], "bh_k4_a020", -0.3, -0.2, -0.1, 1.02)
    axis = figure(told["results"], told).axes[1]
    assert axis.get_title(loc="left").startswith("1 of ")
    bars = {tuple(line.get_ydata()) for line in axis.lines}
    assert {(-0.3, -0.1), (-0.2, -0.2)} <= bars  # the band, and the interval


def test_a_budget_out_of_reach_is_said(run):
    rows = [row | {"error": "reaches from 1 to 1.2"} for row in run[0]["budgets"]]
    rows = [{k: v for k, v in row.items() if "avg" not in k and "nats" not in k} for row in rows]
    for row in rows:
        row.pop("bits_above_static", None)
    told = advice(run[0] | {"budgets": rows})
    assert "fixed_p can't be set to 1: reaches from 1 to 1.2" in told[0]["others"]
