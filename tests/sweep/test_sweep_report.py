"""The report and the figure of a sweep."""

import math

import numpy as np
import pytest
from wording import says

from moeprof.studies.sweep import figure, results_frame
from moeprof.studies.sweep.advice import advice
from moeprof.studies.sweep.merged import merged, same_results
from moeprof.studies.sweep.quality import BESIDE
from moeprof.studies.sweep.report import report

pytestmark = pytest.mark.slow  # test_every_study runs what they are made of on both versions


def test_the_report_begins_with_the_advice(run):
    text = report(run[0])
    place = text.index("## What to use")
    assert place < text.index("## What was measured")
    for item in advice(run[0]):
        assert item["head"] in text and item["code"] in text


def test_equal_results_share_a_row():
    row = dict(routing_type="bh", alpha=0.1, avg_experts=2.0, avg_experts_heldout=2.1, perplexity=9)
    rows = [row | {"config": f"bh_k{k}_a010", "max_k": k} for k in (8, 16, 32)]
    rows[0]["perplexity"] = 8
    assert [name for name, _ in merged(rows)] == ["bh_k8_a010", "bh_k{16,32}_a010"]
    (line,) = same_results(merged(rows))
    assert says(line, "alpha 0.1", "max_k 16, 32", "same", "16 rejections")


def test_the_report_names_what_was_used(run):
    text = report(run[0])
    for said in (
        "a tiny model",
        "Null: a null. From a test.",
        "max_k 16, 32, 64 were left out",
        "9 remain of 21",
        "alpha is a knob for compute",
        "3 prompts",
        "float32",
    ):
        assert said in text
    for result in run[0]["results"][1:]:
        assert result["config"] in text or merged_name(run[0], result) in text


def merged_name(run, result):
    return next(name for name, group in merged(run["results"]) if result in group)


def changed(run, **changes):
    """The run with some fields of its bh_k8_a020 replaced, and all other BH far off."""
    own, *bh = run["results"]
    far = {"avg_experts_heldout": 1.0, "perplexity": 9 * own["perplexity"]}
    bh = [r | (changes if r["config"] == "bh_k8_a020" else far) for r in bh]
    return run | {"results": [own, *bh]}


def test_the_report_says_where_bh_loses(run):
    result, _ = run
    own = result["results"][0]
    worse = [2 * nats for nats in own["nats_by_document"]]
    lost = dict(avg_experts_heldout=3.0, perplexity=own["perplexity"] ** 2, nats_by_document=worse)
    assert says(report(changed(result, **lost)), "BH loses outright", "perplexity", ": bh_k8_a020.")
    won = report(changed(result, **lost | dict(perplexity=0.5 * own["perplexity"])))
    assert "loses outright" not in won
    assert says(won, "at least as many experts", "none was worse", ": bh_k8_a020.")


def test_the_report_says_what_a_tolerance_buys(run):
    result, _ = run
    own = result["results"][0]
    good = dict(avg_experts_heldout=1.01, perplexity=1.004 * own["perplexity"])
    text = report(changed(result, **good))
    assert says(text, "1 %", "perplexity", "fewest experts", "bh_k8_a020")
    assert says(text, "bh_k8_a020: 1.01 experts") and "(+0.40 %)" in text
    best = next(line for line in text.splitlines() if line.startswith("- The best of these is"))
    assert "bh_k8_a020" in best


def test_the_report_compares_no_speeds(run):
    """They are taken minutes apart."""
    text = report(run[0])
    assert "tokens/s, once" in text and says(text, "Tokens per second", "can't be compared")
    assert "slower" not in text and "faster" not in text


def test_the_report_of_equal_caps(run):
    result, _ = run
    other = next(r for r in result["results"] if r["config"] == "bh_k4_a020")
    same = ("avg_experts", "avg_experts_heldout", "perplexity")
    last = result["results"][-1] | {name: other[name] for name in same}
    text = report(result | {"results": [*result["results"][:-1], last]})
    assert says(text, "0.2", "max_k 4, 8", "same results")


def test_the_interval_is_that_of_the_documents(run):
    """A difference that every document shares has an interval of one point; 0 is free."""
    result, _ = run
    own, documents = result["results"][0], result["heldout_documents"]
    shift = [d["bytes"] * math.log(2) * 0.1 for d in documents]
    pairs = zip(own["nats_by_document"], shift, strict=True)
    text = report(changed(result, nats_by_document=[a + b for a, b in pairs]))
    assert "+0.1000 (+0.1000 to +0.1000)" in text


def test_the_figure_shows_the_results(run):
    import matplotlib
    import matplotlib.pyplot as plt

    before = matplotlib.get_backend(), plt.get_fignums()
    result, _ = run
    drawn = figure(results_frame(result["results"]), result)
    assert (matplotlib.get_backend(), plt.get_fignums()) == before
    assert drawn.get_size_inches()[0] * drawn.dpi == 1600
    use, beside, experts, perplexity, layers = drawn.axes
    cells = {text.get_text() for text in experts.texts}
    assert {f"{r['avg_experts']:.2f}" for r in result["results"][1:]} <= cells
    cells = {text.get_text().splitlines()[0] for text in perplexity.texts}
    assert {f"{r['perplexity']:.2f}" for r in result["results"][1:]} <= cells
    for axis, field in ((use, "bits_above_own"), (beside, "bits_above_static")):
        points = {tuple(xy) for line in axis.lines for xy in np.c_[line.get_data()].tolist()}
        for r in [*result["results"][1:], *result["budgets"]]:
            if r.get(field) is not None:  # those of a budget stand beside each other
                x = r["avg_experts_heldout"] + (BESIDE[r["router"]] if "budget" in r else 0)
                assert (x, r[field]) in points
    static = result["static"][0]
    assert [static["k"], static["bits_above_own"]] in np.c_[use.lines[0].get_data()].tolist()
    assert use.get_title(loc="left").startswith("At 1: ")
    assert "bits per byte" in use.get_ylabel() and "experts per token" in use.get_xlabel()
    drawn_layers = [list(line.get_ydata()) for line in layers.lines]
    assert result["results"][-1]["experts_by_layer"] in drawn_layers


def test_the_line_of_static_is_the_one_that_is_used(run):
    """Straight in bits, which a logarithmic axis bends; not over k that were not run."""
    (one,) = run[0]["static"]
    five = one | {"k": 5, "config": "topk_5", "bits_above_own": 0.3 * one["bits_above_own"]}
    result = run[0] | {"static": [one, five]}
    use = figure(result["results"], result).axes[0]
    lines = [np.array(line.get_data()) for line in use.lines if line.get_color() == "black"]
    (x, y), *others = [line for line in lines if len(line[0]) > 10]
    assert not others and (x[0], x[-1]) == (1, 2)
    assert y == pytest.approx((2 - x) * one["bits_above_own"])
    assert {1.0, 2.0, 5.0} == set(lines[0][0])  # their marks


def test_static_top_k_among_the_results_is_drawn(run):
    """Of `run_configuration`, without what `sweep` returns."""
    own, *bh = run[0]["results"]
    (one,) = run[0]["static"]
    one = own | one | {"config": "top 1", "max_k": 1, "reduction_pct": 50.0}
    results = [without_distances(row) for row in (one, own, *bh)]  # in any order
    use, beside = figure(results).axes[:2]
    marks = {tuple(xy) for line in use.lines for xy in np.c_[line.get_data()].tolist()}
    assert (1, one["bits_per_byte"] - own["bits_per_byte"]) in marks
    assert beside.get_title(loc="left").startswith("Nothing is decided of ")
    drawn = np.concatenate([line.get_ydata() for line in beside.lines])
    known = [row["bits_above_static"] for row in bh if row["bits_above_static"] is not None]
    assert known and all(np.abs(drawn - value).min() < 1e-9 for value in known)
    names = [text.get_text() for text in use.get_legend().get_texts()]
    assert "static top-k" in names and not any("by budget" in name for name in names)
    alone = [without_distances(row) for row in (own, *bh)]
    use, beside = figure(alone).axes[:2]
    assert says(beside.texts[0].get_text(), "static top-k", "not run", "1")
    assert "no intervals" in use.texts[0].get_text() and "95 %" not in use.texts[0].get_text()


def without_distances(row):
    return {name: value for name, value in row.items() if "bits_above" not in name}


def test_tiny_differences_have_whole_numbers_at_their_ticks(run):
    def tiny(row):
        known = row.get("bits_above_static") is not None
        return row | {n: 1e-6 * v for n, v in row.items() if known and "above" in n}

    result = run[0] | {n: list(map(tiny, run[0][n])) for n in ("results", "static", "budgets")}
    drawn = figure(result["results"], result)
    drawn.canvas.draw()
    assert all(axis.yaxis.get_offset_text().get_text() == "" for axis in drawn.axes[:2])


@pytest.mark.slow
@pytest.mark.parametrize("part", [slice(1), slice(4), slice(1, 3)])
def test_the_figure_of_a_part(run, part):
    """The baseline alone, an interrupted run, and BH without a baseline."""
    drawn = figure(run[0]["results"][part])
    drawn.canvas.draw()
    assert len(drawn.axes) == 5
