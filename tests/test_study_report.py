"""The report of a study: fronts, the verdict, and that the page and the Markdown say the same."""

import html
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from profiles import ROOF, make_profile
from test_comparison_bytes import shrinking_run
from test_comparison_results import made_cell, made_run
from test_profiler_page import Reader, chromium, needs_chromium
from wording import says

from moeprof.show.figures import colours
from moeprof.show.tables import fine, markdown
from moeprof.studies.comparison.findings import View, beside, findings
from moeprof.studies.comparison.plots import figure as comparison_figure
from moeprof.studies.comparison.report import bytes_rows
from moeprof.studies.diagnosis import Diagnosis
from moeprof.studies.evaluation.result import Evaluated
from moeprof.studies.grid.rows import COLUMNS
from moeprof.studies.study.report import Results, pareto, parts, verdict, write, write_report
from moeprof.studies.study.report.front import front
from moeprof.studies.sweep import figure as sweep_figure
from moeprof.studies.sweep import report as sweep_report
from moeprof.studies.sweep.advice import advice
from moeprof.studies.sweep.compared import compared

pytestmark = pytest.mark.once

# ---------------------------------------------------------------- the front


def dominated(point, others):
    return any(
        all(a <= b for a, b in zip(other, point, strict=True)) and tuple(other) != tuple(point)
        for other in others
    )


@pytest.mark.parametrize("size", [2, 3])
def test_the_front_is_that_of_brute_force(size):
    """Among few whole numbers, so that there are ties in one coordinate and in all."""
    rng = np.random.default_rng(size)
    for count in range(30):
        points = rng.integers(0, 5, (count, size)).tolist()
        expected = [i for i, point in enumerate(points) if not dominated(point, points)]
        assert front(points) == expected


def test_equal_points_are_all_on_the_front():
    assert front([(1, 1), (1, 1), (1, 2), (0, 2)]) == [0, 1, 3]


def test_what_was_not_measured_neither_dominates_nor_belongs():
    assert front([(None, 0), (0, float("nan")), (2, 2), (3, 1), (3, 3)]) == [2, 3]
    assert front([(None, 1)]) == front([]) == []


def test_points_are_those_of_the_run_and_more_tokens_a_second_are_better():
    run = compared_run(0.0)
    points = pareto.of_compare(run)
    by_name = {point.name: point for point in points}
    own = by_name["static top-8 (the model itself)"]
    assert own.experts == 8 and own.megabytes == pytest.approx(800e-6)
    assert by_name["bh at 4"].loss == next(c["kl"] for c in run["cells"] if c["budget"] == 4)
    assert by_name["bh at 4"].low < by_name["bh at 4"].loss < by_name["bh at 4"].high
    fast = [own._replace(speed=speed, loss=loss) for speed, loss in ((9, 1), (8, 1), (7, 0.5))]
    assert pareto.fronts(fast)["speed"] == [0, 2]
    for name in ("static top-8 (the model itself)", "static top-8 in 4 bits", "bh at 4"):
        point = by_name[name]
        assert (point.speed_low, point.speed, point.speed_high) == (95, 100, 110)


def test_the_speeds_of_compare_have_their_rounds():
    points = pareto.of_compare(compared_run(0.0))
    shown = pareto.table(points, pareto.KL, "front").table
    assert {row[4] for row in shown.rows} == {"100.0 (95.0 to 110.0)"}
    assert "quartiles" in shown.note
    drawn = pareto.drawn(points, pareto.KL, "figure", "front")
    assert "quartiles" in drawn.caption
    level = [line for line in drawn.figure.axes[-1].lines if list(line.get_xdata()) == [95, 110]]
    assert len(level) == len(points)
    of_sweep = pareto.table(pareto.of_sweep(swept_run()), pareto.BITS, "front").table
    assert "quartiles" not in of_sweep.note


def test_the_table_has_each_member_once_and_names_its_fronts():
    points = pareto.of_compare(compared_run(0.0))
    on, rows = pareto.fronts(points), pareto.table(points, pareto.KL, "front").table.rows
    names = [points[i].name for i in {i for places in on.values() for i in places}]
    assert sorted(row[1] for row in rows) == sorted(names)
    assert [row[0] for row in rows] == [str(n) for n in range(1, len(rows) + 1)]
    for row in rows:
        place = next(i for i, point in enumerate(points) if point.name == row[1])
        fronts = {cost.short for cost in pareto.COSTS if place in on[cost.field]}
        assert fronts == set(row[-1].split(", "))


def test_the_figure_numbers_the_fronts_as_the_table_does():
    points = pareto.of_compare(compared_run(0.0))
    numbers = {name: row for row, name, *_ in pareto.table(points, pareto.KL, "front").table.rows}
    figure = pareto.figure(points, pareto.KL)
    for axis, places in zip(figure.axes, pareto.fronts(points).values(), strict=True):
        drawn = {text.get_text() for text in axis.texts}
        assert drawn == {numbers[points[place].name] for place in places}


# ---------------------------------------------------------------- results to report


def compared_run(shift, **more):
    """BH is `shift` nats from static top-k; experts in 4 bits lose 0.05, in 8 bits 0.002."""
    cells = [made_cell(budget=budget, shift=shift, seed=budget, **more) for budget in (4, 6)]
    return shrinking_run({4: 0.05, 8: 0.002}, *cells)


def swept_run(shift=0.0, documents=20):
    """Static top-2 of 4 and four BH configurations, the first two `shift` nats from static."""
    rng = np.random.default_rng(0)

    def row(name, experts, nats, **more):
        each = 100 * (nats + 0.001 * rng.standard_normal(documents))
        return {
            "config": name,
            "avg_experts": experts,
            "avg_experts_heldout": experts,
            "experts_by_document": [101 * experts] * documents,
            "experts_by_layer": [experts, experts],
            "nats_by_document": each.tolist(),
            "perplexity": float(np.exp(nats)),
            "bits_per_byte": float(each.sum() / np.log(2) / (400 * documents)),
            "reduction_pct": 0.0,
            "delta_perplexity": 0.0,
            "token_agreement": 0.5,
            "tokens_per_s": 100.0,
            "share_without_rejection": 0.1,
            "seconds": 1.0,
            **dict.fromkeys(
                (f"avg_experts_{x}" for x in ("simple", "medium", "complex", "technical")), 1.0
            ),
            **more,
        }

    own = row("topk_4_baseline", 4.0, 3.0, routing_type="topk", alpha=None, max_k=4)
    bh = [
        row(f"bh_k4_a0{a}", 1.0 + n, 3.6 - 0.2 * n + shift, routing_type="bh", alpha=a, max_k=4)
        for n, a in enumerate((0.01, 0.1))
    ]
    run = {
        "model": "toy",
        "model_config": {
            "num_experts": 8,
            "num_experts_per_tok": 4,
            "num_hidden_layers": 2,
            "hidden_size": 8,
            "intermediate_size": 8,
            "norm_topk_prob": False,
        },
        "results": [own, *bh],
        "static": [row(f"topk_{k}", float(k), 3.8 - 0.2 * k, k=k) for k in (1, 2, 3)],
        "budgets": [],
        "heldout_documents": [{"domain": "a", "tokens": 101, "bytes": 400}] * documents,
        "heldout_tokens": 2020,
        "budget_tokens": 100,
        "prompts": [{}],
        "new_tokens": 5,
        "null": "a null",
        "null_source": "From a test.",
        "null_code": "null",
        "dtype": "float32",
        "versions": {},
        "cpu": {},
        "threads": 1,
        "started": "now",
        "seed": 0,
    }
    return compared(run)


def diagnosed(alpha=0.3, low=0.37, high=0.47):
    """Every number a diagnosis needs, FDP(δ0) with this interval."""
    rows = []

    def add(table, routing, quantity, at, estimate, low=0.0, high=1.0):
        for layer in (0, -1):
            row = {"table": table, "routing": routing, "layer": layer, "quantity": quantity}
            row |= {"at": at, "estimate": estimate, "error": 0.1, "low": low, "high": high}
            rows.append(row | {"band_low": low, "band_high": high})

    shares = ("P(R >= 1)", "P(R < min_k)", "P(R > max_k)")
    for routing in ("stock", "patched"):
        add("pi0", routing, "pi0", 0.5, 0.9)
        add("flatness", routing, "pi0 less pi0 at 0.5", 0.9, 0.1)
        add("quantiles", routing, "quantile", 0.05, 0.04)
        for name in ("experts", "rejections", *shares):
            add("selection", routing, name, None, 0.5)
        for name in ("entropy", "loss"):
            add("selection", routing, f"Spearman(R, {name})", None, 0.1)
    add("fdp", "bh", "FDP(delta0)", None, (low + high) / 2, low, high)
    for name in ("FDP(0)", "false of all", "experts", "delta0"):
        add("fdp", "bh", name, None, 0.4)
    add("fdp curve", "bh", "FDP", 0.01, 0.4)
    facts = {
        "model": "toy",
        "dtype": "float32",
        "null": "a null",
        "router": "BH",
        "alpha": alpha,
        "min_k": 1,
        "max_k": 8,
        "heldout_tokens": 100,
        "heldout_documents": [{"domain": "a"}] * 4,
        "positions": 2000,
        "ablated_documents": 50,
        "compared": {"bh": "BH"},
    }
    return Diagnosis(rows, facts)


def evaluated():
    rng = np.random.default_rng(0)

    def sums(experts, kl):
        each = kl * 100 * (1 + 0.1 * rng.random(6))
        return {
            "nats": (300 + each).tolist(),
            "kl": each.tolist(),
            "agree": [90] * 6,
            "predicted": [100] * 6,
            "tokens": [101] * 6,
            "experts": [101 * experts] * 6,
            "bytes": [400] * 6,
        }

    documents = [{"domain": name, "name": name} for name in "aaabbb"]
    facts = {"model": "toy", "dtype": "float32", "protocol": {"words": "Windows of 1,024 tokens."}}
    facts |= {"tokens_asked": 600, "draws": 200, "seed": 0}
    measured = {"own routing": sums(8, 0), "topk:k=4": sums(4, 0.2), "bh@4": sums(4, 0.1)}
    return Evaluated(documents, measured, facts)


def grid_rows():
    def row(name, router, experts, bits, static, speed):
        return dict.fromkeys(COLUMNS) | {
            "model": "toy",
            "bits": "none",
            "text": "shipped",
            "seed": 0,
            "configuration": name,
            "router": router,
            "parameters": {"k": 4},
            "avg_experts_heldout": experts,
            "bytes_per_token": 1e6 * experts,
            "bits_above_own": bits,
            "bits_above_own_low": bits - 0.001,
            "bits_above_own_high": bits + 0.001,
            "bits_above_static": static,
            "bits_above_static_low": static - 0.01,
            "bits_above_static_high": static + 0.01,
            "bits_above_static_band_low": static - 0.02,
            "bits_above_static_band_high": static + 0.02,
            "documents": 12,
            "tokens_per_s": speed,
        }

    return [
        row("own", "topk", 8.0, 0.0, 0.0, 50.0),
        row("topk-4", "topk", 4.0, 0.1, 0.0, 80.0),
        row("bh-good", "bh", 4.0, 0.05, -0.05, 70.0),
        row("bh-like", "bh", 4.0, 0.1, 0.0, 60.0),
    ]


def facts(*parts, **more):
    machine = {"cpu": "a CPU", "features": ["avx2"], "threads": 2, "started": "now"}
    said = [
        {"part": part, "seconds": 81.0, "planned_seconds": 90.0, "cells": 4, "words": "some"}
        | {"failed": None}
        for part in parts
    ]
    known = {"model": "toy", "bits": None, "dtype": "float32", "machine": machine, "parts": said}
    known |= {"versions": {"moeprof": "1"}, "command": "moeprof study", "seed": 0}
    known |= {"devices": [{"device": "cuda:0", "name": "a GPU", "memory_peak_mb": 2500.0}]}
    return known | {"store": "out/moeprof.sqlite", "peak_gb": 1.25} | more


PARTS = ("calibrate", "profile", "sweep", "compare", "diagnose", "evaluate")


@pytest.fixture(scope="module")
def whole(profile):
    """Results of all parts but calibrate, which failed."""
    about = facts(*PARTS, model='a <model> | "x"')
    about["parts"][0]["failed"] = "the text is too short"
    return Results(
        about,
        profile=profile,
        sweep=swept_run(),
        compare=compared_run(0.01),
        diagnose=diagnosed(),
        evaluate=evaluated(),
        grid=grid_rows(),
    )


@pytest.fixture(scope="module")
def written(whole, tmp_path_factory):
    """(report, its folder, the Markdown, the page), PNGs and the diagnosis's figures left out."""
    folder = tmp_path_factory.mktemp("study")
    for name in ("sweep/bh_routing_report.md", "compare/comparison.json", "profile/index.html"):
        (folder / name).parent.mkdir()
        (folder / name).write_text("x")
    with pytest.MonkeyPatch.context() as patched:
        from moeprof.show import pictures

        patched.setattr(pictures, "svg", lambda figure, **_: b"<svg></svg>")
        patched.setattr(write, "_png", lambda figure: b"png")
        patched.setattr(Diagnosis, "figures", [])
        paths = write_report(whole, folder)
        report = write.make_report(whole, folder)
    assert all(path.is_file() for path in paths)
    return report, folder, *((folder / n).read_text() for n in ("report.md", "index.html"))


# ---------------------------------------------------------------- the verdict


def said(**parts):
    found = verdict.section(Results(facts(*parts), **parts))
    return [sentence.text for sentence in found.sentences]


@pytest.mark.parametrize(
    ("shift", "words"),
    [(-0.05, "beats static top-k"), (0.05, "loses to static top-k"), (0.0, "undecided")],
)
def test_the_verdict_says_whether_bh_beats_static(shift, words):
    lines = said(compare=compared_run(shift))
    for budget in (4, 6):
        (best,) = [line for line in lines if line.startswith(f"At {budget} experts")]
        assert says(best, "bh", words, "KL", "95 % interval", "band")
    (bh,) = [line for line in lines if line.startswith("BH")]
    assert bh.count(words) == 2


def test_one_document_decides_nothing():
    """What doesn't vary over documents has no interval."""
    run = compared_run(-0.05)
    for cell in [*run["static"], *run["cells"], *run["quantized"]]:
        del cell["tokens_per_s"], cell["tokens_per_s_low"], cell["tokens_per_s_high"]
        for kind in ("effect", "against", "level"):
            for found in cell.get(kind, {}).values():
                ends = ("low", "high", "band_low", "band_high")
                found |= dict.fromkeys(ends, found["estimate"]) | {"error": 0.0}
    lines = said(compare=run)
    assert says(lines[0], "one document", "nothing is decided")
    assert says(lines[0], "Give more documents", ".jsonl")
    text = " ".join(lines + findings(run))
    assert "it beats static" not in text and "loses to static" not in text
    assert "1 of 1 routers beat" not in text and "closer" in text
    assert lines[1].count("undecided") == 1 and "95 % interval" not in lines[1]
    titles = [axis.get_title(loc="left") for axis in comparison_figure(run).axes[::2]]
    assert len(titles) == 2 and all(title.startswith("Nothing is decided") for title in titles)
    points = pareto.of_compare(run)
    front = pareto.table(points, pareto.KL, "front").table
    tables = [*front.rows, *bytes_rows(View(run))[1]]
    assert not any(" to " in cell for row in tables for cell in row)
    assert "95 %" not in front.note + pareto.drawn(points, pareto.KL, "figure", "front").caption


def test_the_best_router_is_the_one_with_the_least_effect():
    cells = [
        made_cell(contender=name, budget=budget, shift=shift, seed=budget)
        for budget in (4, 6)
        for name, shift in (("bh", 0.02), ("fixed_p", -0.02), ("min_p", 0.01))
    ]
    lines = said(compare=made_run(*cells) | {"quantized": []})
    assert says(lines[0], "fixed_p is closest to the full model", "3 routers", "beats")
    assert says(lines[2], "BH", "loses")
    assert any(says(line, "Shrinking", "not measured") for line in lines)


def test_the_verdict_on_shrinking_has_the_bands_and_who_is_closer():
    run = compared_run(0.01)
    (line,) = [line for line in said(compare=run) if "fewer bits" in line]
    view = View(run)
    for whole, part in zip(view.whole(), line.split(";"), strict=True):
        effect = whole["effect"]["kl"]
        assert f"in {whole['bits']} bits" in part and f"{effect['band_low']:+.4f} to" in part
        closer = len(beside(view, whole)["closer"])
        assert f"{closer or 'none'} closer" in part and "shrinking is closer" in part
        assert "beside static top-k that reads as much" in part
        assert "per token, 100 (95 to 110) tokens/s)" in part
    assert says(" ".join(said(compare=run)), "Experts as the model has them: 100 (95 to 110)")
    run["quantized"][-1]["bytes_per_token"] = 99.0  # less than one expert
    (line,) = [line for line in said(compare=run) if "fewer bits" in line]
    assert "beside static top-1, which reads more" in line


def test_each_finding_of_a_profile_leads_to_what_it_is_of():
    few = make_profile(roofline=ROOF._replace(read_gbs=1.0), prefill=(5,))
    sentences = parts._profile(Results(facts("profile"), profile=few)).sentences
    places = {
        words: to for words in parts.PROFILE_PLACES for text, to in sentences if words in text
    }
    assert places["Few tokens"] == "profile-load"
    assert places["More than 100 %"] == "profile-roofline"
    assert places["LRU cache"] == "profile-cache"


def test_what_is_near_the_model_itself_is_not_rounded_to_nothing():
    cell = made_cell(shift=0.0, noise=0.0)
    run = made_run(cell)
    small = {"estimate": 3e-6, "low": 2e-6, "high": 4e-6, "band_low": 1e-6, "band_high": 5e-6}
    cell["kl"], cell["effect"]["kl"] = 2.3e-5, small
    (line, *_) = said(compare=run | {"quantized": []})
    assert "KL 0.000023" in line and "+0.0000030 (band +0.0000010 to +0.0000050)" in line
    point = pareto.Point("a", "a", 2.0, None, 0.00012, 0.0001, 0.00014)
    assert "0.00012 (0.00010 to 0.00014)" in pareto.table([point], pareto.KL, "k").table.rows[0]


def test_numbers_have_at_least_two_digits():
    written = {
        -0.0123: "-0.0123",
        3e-4: "+0.00030",
        2e-6: "+0.0000020",
        2e-9: "+2.0e-09",
        0.0: "+0",
    }
    for value, text in written.items():
        assert format(value, fine(value)) == text
    assert fine(math.nan, form=".4f") == ".4f" and fine(1e-6, 0.5) == "+.4f"


@pytest.mark.parametrize(
    ("ends", "words"),
    [((0.37, 0.47), "above alpha"), ((0.1, 0.2), "below alpha"), ((0.2, 0.4), "undecided")],
)
def test_the_verdict_says_whether_the_p_values_hold(ends, words):
    lines = said(diagnose=diagnosed(0.3, *ends))
    means = ("p-values", "0 where nothing is selected", f"[{ends[0]:.2f}, {ends[1]:.2f}]", words)
    assert any(says(line, *means) for line in lines)
    assert any(says(line, "Of all that it selects", "0.40 [0.00, 1.00]") for line in lines)
    assert any("not tested" in line for line in said(diagnose=diagnosed(None)))


@pytest.mark.parametrize(("shift", "count"), [(-0.05, "2 predict"), (0.05, "0 predict")])
def test_the_verdict_counts_the_settings_of_the_sweep(shift, count):
    lines = said(sweep=swept_run(shift))
    assert any(says(line, "3 configurations of the sweep", "2 settings", count) for line in lines)


def test_a_sweep_of_one_document_decides_nothing():
    """However far from static: there is no interval, and none is shown or spoken of."""
    run = swept_run(-0.5, documents=1) | {"finished": True}
    told = sweep_report.findings(run)
    assert says(told[0], "one document", "nothing is decided")
    assert not any("variation" in line or "pays" in line for line in told)
    assert any("2 settings" in line and "0 predict" in line for line in told)
    for text in (sweep_report.legend(run), sweep_report.beside_legend(run)):
        assert "95 %" not in text and "one document" in text
    assert "The intervals" not in " ".join(sweep_report.limits(run))
    for item in advice(run):
        assert says(item["head"], "nothing is decided", "one document")
        assert "static top-" in item["head"] and item["best"].startswith("topk_")
    drawn = sweep_figure(run["results"], run | {"advice": advice(run)})
    for axis in drawn.axes[:2]:
        assert axis.get_title(loc="left").startswith("Nothing is decided")
        assert "95 %" not in " ".join(text.get_text() for text in axis.texts)
    (line,) = [line for line in said(sweep=run) if "configurations of the sweep" in line]
    assert says(line, "one document", "nothing is decided")


def test_a_sweep_of_several_documents_names_what_is_best():
    run = swept_run(-0.5) | {"finished": True}
    assert [item["best"] for item in advice(run)][0] == "bh_k4_a00.1"
    assert "95 %" in sweep_report.legend(run)


def test_without_compare_the_verdict_is_that_of_evaluate():
    lines = said(evaluate=evaluated())
    assert says(lines[0], "2 configurations", "not beaten", "bh@4 (4.00 experts", "+0.0380")
    assert says(lines[0], "at the same experts", "compare, which has no result")
    assert "topk:k=4" not in lines[0] and "one document" not in lines[0]
    unequal = evaluated()
    for row in unequal.rows:
        row["experts"] += row["config"] == "bh@4"
    both = said(evaluate=unequal)[0]  # who takes most isn't the best by that
    assert says(both, "topk:k=4 (4.00 experts", "bh@4 (5.00 experts")
    of_one = evaluated()
    for row in of_one.rows:
        row |= {"bits_above_own_low": None, "bits_above_own_high": None}
    assert says(said(evaluate=of_one)[0], "one document", "nothing is decided")


def test_without_anything_the_verdict_says_so():
    lines = said()
    assert len(lines) == 3
    assert all("not measured" in line or "no result" in line for line in lines)


def test_the_verdict_of_a_grid_alone():
    results = Results(facts("grid"), grid=grid_rows())
    (line,) = verdict.section(results).sentences
    assert says(line.text, "of 2 configurations 1", "better", "bh-good", "0 worse")
    assert "no difference was shown" in line.text


def test_a_grid_on_one_document_decides_nothing():
    ends = ("low", "high", "band_low", "band_high")
    none = dict.fromkeys(f"bits_above_static_{end}" for end in ends) | {"documents": 1}
    results = Results(facts("grid"), grid=[row | none for row in grid_rows()])
    (line,) = verdict.section(results).sentences
    assert says(line.text, "one document", "nothing is decided")


# ---------------------------------------------------------------- the two files


def test_both_files_say_the_same(written):
    report, _, markdown, page = written
    read = html.unescape(re.sub("<[^>]+>", "", page)).replace("\u00a0", " ")
    for section in report.sections:
        assert f"## {section.title}\n" in markdown and section.title in read
        for sentence in section.sentences:
            assert sentence.text in markdown
            assert sentence.text.replace("`", "") in read
        for shown in section.tables:
            assert f"{report.names()[shown.key]}. {shown.table.title}" in markdown
            assert f"{report.names()[shown.key]}. {shown.table.title}" in read
            for row in shown.table.rows:
                assert all(cell in read for cell in row)
        for drawn in section.figures:
            assert f"figures/{drawn.key}.png" in markdown
    assert 4 <= len(report.sections[0].sentences) <= 6  # for a person to read first


def test_the_page_asks_for_nothing_and_its_links_lead_somewhere(written):
    _, folder, _, page = written
    read = Reader(page)
    assert not {"script", "iframe", "object", "base"} & set(read.tags)
    inside = [address[1:] for address in read.asked if address.startswith("#")]
    assert len(set(read.ids)) == len(read.ids) and set(inside) <= set(read.ids)
    assert not any(re.search(r"\s", name) for name in read.ids)
    assert len(inside) > 40 and "http" not in page
    files = [a for a in read.asked if not a.startswith(("#", "data:"))]
    assert sorted(files) == [
        "compare/comparison.json",
        "profile/index.html",
        "sweep/bh_routing_report.md",
    ]
    assert all((folder / name).is_file() for name in files)
    assert 'a <model> | "x"' in read.text


def test_the_markdowns_links_lead_somewhere(written):
    _, folder, markdown, _ = written
    places = set(re.findall(r'<a id="([^"]+)">', markdown))
    assert set(re.findall(r"\]\(#([^)]+)\)", markdown)) <= places
    for path in re.findall(r"\]\(([^#)][^)]*)\)", markdown):
        assert (folder / path).is_file(), path
    assert 'a <model> \\| "x"' in markdown  # in a table's cell


def test_every_figure_of_a_table_leads_to_it_and_back(written):
    report, _, _, page = written
    partners = report.partners()
    assert partners["front-figure"] == "front" and partners["front"] == "front-figure"
    assert partners["sweep-figure"] == "sweep-settings"
    heads = re.findall(r'<h3 id="front(?:-figure)?">.*?</h3>', page)
    assert [re.search(r'href="#([^"]+)"', head)[1] for head in heads] == ["front", "front-figure"]


def test_the_report_says_which_answer_to_follow(whole):
    """compare and the sweep may name two routers for one budget."""
    advice = [{"budget": 2.0, "best": None, "head": "For 2 experts per token, bh is best."}]
    whole = replace(whole, sweep=whole.sweep | {"advice": advice})
    for results, there in ((whole, True), (replace(whole, compare=None), False)):
        first = parts._sweep(results).sentences[0].text
        assert ("follow the comparison" in first) == there


def test_a_sweeps_speeds_are_not_compared(whole):
    (section,) = pareto.sections(replace(whole, compare=None))
    text = " ".join(sentence.text for sentence in section.sentences)
    assert says(text, "tokens/s", "no front") and len(section.figures[0].figure.axes) == 1


def test_a_sentence_stands_for_a_figure_of_one_number(whole, monkeypatch):
    from moeprof.profile import plots

    monkeypatch.setattr(plots, "instead", lambda profile: {"k": "Every token uses 2 experts."})
    section = parts._profile(whole)
    assert "profile-k" not in {drawn.key for drawn in section.figures}
    assert any(sentence.text == "Every token uses 2 experts." for sentence in section.sentences)


def test_a_part_without_a_result_says_why(written, tmp_path):
    report, _, _, page = written
    assert says(re.sub("<[^>]+>", "\n\n", page), "No result: the text is too short.")
    results = Results(facts("sweep"))
    text = "\n\n".join(
        sentence.text
        for section in write.make_report(results, tmp_path).sections
        for sentence in section.sentences
    )
    assert says(text, "not finished") and says(text, "in the store", "goes on")
    assert text.count("This part was not run.") == 5


def test_the_files_of_a_part_that_was_interrupted_are_shown(tmp_path):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "quality.csv").write_text("config\n")
    report = write.make_report(Results(facts("sweep")), tmp_path)
    section = next(s for s in report.sections if s.title.startswith("Sweep"))
    first, second = (sentence.text for sentence in section.sentences)
    assert "not finished" in first and "its own files" in second
    assert section.links == [("quality.csv", "sweep/quality.csv")]


def test_the_report_of_nothing_is_written(tmp_path):
    paths = write_report(Results(facts()), tmp_path / "study")
    assert [path.name for path in paths] == ["report.md", "index.html"]


def test_the_report_of_a_grid_has_no_word_of_other_parts(tmp_path):
    report = write.make_report(Results(facts("grid"), grid=grid_rows()), tmp_path)
    titles = [section.title for section in report.sections]
    assert titles[:3] == ["The verdict", "Grid", "What was run"]
    assert {shown.key for shown in report.sections[1].tables} == {"grid", "grid-front-0"}


def test_what_was_run_has_the_time_taken_and_planned(written):
    report, *_ = written
    tables = {s.key: s.table for section in report.sections for s in section.tables}
    row = next(row for row in tables["parts"].rows if row[0] == "sweep")
    assert row[1:4] == ["81 s", "90 s", "4"]
    assert ["cuda:0", "a GPU, 2.50 GB at most (10^9 bytes, of torch)"] in tables["ran"].rows
    sentences = [s.text for section in report.sections for s in section.sentences]
    assert any(says(text, "All parts took 8 min", "-10 %") for text in sentences)
    assert any("moeprof store out/moeprof.sqlite --export result.json" in s for s in sentences)
    leads = [s.text.partition(":")[0] for s in report.sections[-1].sentences]
    assert len(set(leads)) == len(leads)  # limits are said once


def test_what_was_finished_before_is_in_no_time_taken(tmp_path):
    about = facts("sweep", "evaluate")
    about["parts"][0]["finished_before"] = 3
    report = write.make_report(Results(about), tmp_path)
    sentences = [s.text for section in report.sections for s in section.sentences]
    assert any(says(text, "All parts took", "3 of the 8 cells", "before") for text in sentences)


@pytest.mark.drawn
def test_a_figure_for_paper_does_not_follow_dark_mode():
    from matplotlib.figure import Figure

    from moeprof.show.pictures import picture, svg

    figure = Figure()
    figure.subplots().plot([1, 2], color="black")
    assert b"var(--" in svg(figure) and b"var(--" not in svg(figure, paper=True)
    assert 'class="picture paper"' in picture(figure, "x", paper=True)


@pytest.mark.drawn
@pytest.mark.parametrize("count", [12, 30])
def test_colours_that_are_lost_on_black_are_lighter_there(count):
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure

    from moeprof.show.pictures import svg

    figure, wanted = Figure(), colours(count)
    axis = figure.subplots()
    for colour in wanted:
        axis.plot([1, 2], color=colour)
    said = svg(figure).decode()
    dark = dict(re.findall(r"--c(\w{6}):(#\w{6})", said))  # the last one, for the dark
    shown = [dark.get(colour[1:].lower(), colour) for colour in wanted]
    assert len(set(shown)) == count
    assert all(np.dot(to_rgb(colour), (0.21, 0.72, 0.07)) > 0.3 for colour in shown)


@needs_chromium
def test_a_phone_scrolls_in_the_boxes_only(written, tmp_path):
    page = tmp_path / "index.html"
    measure = (
        "<script>console.error('widths', document.documentElement.scrollWidth, innerWidth)"
        "</script></body>"
    )
    page.write_text(written[3].replace("</body>", measure), encoding="utf-8")
    ((line,), asked, _) = chromium(page, tmp_path, size="400,3000")
    scroll, screen = map(int, re.findall(r"\d+", line[line.index("widths") :])[:2])
    assert scroll == screen <= 500 and asked == set()


def test_any_text_is_one_cell_of_a_markdown_table():
    """The domains of a user's own text, say."""
    head, _, row = markdown(["a|b", "c\nd"], [["1", "x|y\nz"]]).splitlines()
    assert (head, row) == ("| a\\|b | c d |", "| 1 | x\\|y z |")
