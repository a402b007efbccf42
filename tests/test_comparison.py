"""Routers at an equal budget: texts, controls, effects, what is said of them, the command."""

import json
import re
from collections import Counter

import numpy as np
import pandas
import pytest
import torch
from models import V5, assert_unchanged, expert_weights, olmoe, snapshot, token_ids

import moeprof
from moeprof import demo
from moeprof.cli import main
from moeprof.measure.passes import Reference, collect
from moeprof.studies.comparison import runner
from moeprof.studies.comparison.contenders import CONTENDERS, choose_contenders, popularity
from moeprof.studies.comparison.controls import (
    Oracle,
    random_counts,
    reweigh,
    shuffled,
    threshold_for,
    with_counts,
)
from moeprof.studies.comparison.effects import Table, interpolate, verdict
from moeprof.studies.comparison.findings import findings
from moeprof.studies.comparison.plan import plan_tables
from moeprof.studies.comparison.plots import figure
from moeprof.studies.comparison.report import console_tables, report
from moeprof.studies.comparison.splits import Splits, demo_documents, make_splits, split_documents
from moeprof.studies.comparison.store import Store, frame
from moeprof.texts.windows import HeldOut, Window

FILES = ["comparison.csv", "comparison.json", "comparison.png", "comparison_report.md"]


def text(windows=((0, 12), (0, 12), (1, 12), (2, 9)), domains=("a", "a", "b")):
    pieces = [Window(d, token_ids(1, n, seed=i), n) for i, (d, n) in enumerate(windows)]
    tokens = [sum(n for d, n in windows if d == index) for index in range(len(domains))]
    pairs = zip(domains, tokens, strict=True)
    return HeldOut(pieces, [{"domain": domain, "tokens": size} for domain, size in pairs])


# ---------------------------------------------------------------- texts


def test_the_demos_splits_share_no_document_and_have_all_domains():
    documents = demo_documents()
    texts = {part: {d.text for d in found} for part, found in documents.items()}
    assert not texts["null"] & texts["budget"] and not texts["null"] & texts["test"]
    assert not texts["budget"] & texts["test"]
    for part, each in {"null": 16, "budget": 16, "test": 32}.items():
        assert Counter(d.domain for d in documents[part]) == dict.fromkeys(
            ("bible", "jargon", "docs", "code"), each
        )


def test_windows_are_one_of_each_document():
    tokenizer = demo.load()[1]
    splits = make_splits(tokenizer, demo_documents())
    for part, documents in ((splits.budget, 64), (splits.test, 128)):
        assert len(part.windows) == len(part.documents) == documents
        assert {window.ids.shape[1] for window in part.windows} == {128}
    small = make_splits(tokenizer, demo_documents(), test_tokens=1024)
    assert Counter(small.domains) == {"bible": 2, "jargon": 2, "docs": 2, "code": 2}


def test_a_users_documents_are_split_within_domains():
    documents = [demo.Document("ab"[i % 2], str(i), f"text {i}") for i in range(16)]
    parts = split_documents(documents)
    assert {part: len(found) for part, found in parts.items()} == {
        "null": 4,
        "budget": 4,
        "test": 8,
    }
    assert all(Counter(d.domain for d in found)["a"] * 2 == len(found) for found in parts.values())
    assert sorted(d.name for found in parts.values() for d in found) == sorted(map(str, range(16)))


def test_a_copy_of_a_document_is_in_no_other_part():
    texts = ["one", "two", "one", "three", "two", "four", "one", "five"]
    parts = split_documents([demo.Document("a", str(i), t) for i, t in enumerate(texts)])
    found = {part: [(d.name, d.text) for d in documents] for part, documents in parts.items()}
    assert found == {
        "null": [("0", "one"), ("7", "five")],
        "budget": [("1", "two")],
        "test": [("3", "three"), ("5", "four")],
    }
    with pytest.raises(ValueError, match="has 1 different document"):
        split_documents([demo.Document("a", str(i), "same") for i in range(8)])


def test_the_test_text_only_tests(monkeypatch):
    """Parameters, split, popularity and the oracle's thresholds are from the budget text."""
    seen = []

    def spied(owner, name, place):
        function = getattr(owner, name)

        def spy(*args, **kwargs):
            seen.append((name, args[place]))
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, spy)

    model = olmoe(num_experts=12, num_experts_per_tok=4)
    budget, test = text(), text(((0, 11), (1, 10), (2, 13)))
    for owner, name, place in (
        (runner, "collect", 1),
        (runner, "find", 2),
        (runner, "sensitivity", 1),
        (Oracle, "set_budget", 1),
        (runner, "Reference", 1),
    ):
        spied(owner, name, place)
    nulls = runner.Nulls(model, None, [], "normal")
    plans = plan_tables(4, 12, ["reduction"], [2])
    contenders = [c for c in CONTENDERS if c.name in ("bh", "top_p")]
    made = runner.Comparison(model, Splits([], budget, test), nulls, contenders, plans, [])
    made.run()
    wanted = {"collect", "find", "sensitivity", "set_budget"}
    assert {name for name, read in seen if read is budget} == wanted
    assert {name for name, read in seen if read is not budget} == {"Reference"}
    assert all(len(c["by_document"]["kl"]) == 3 for c in made.cells if c["status"] == "measured")


# ---------------------------------------------------------------- controls


@pytest.mark.parametrize("norm", ["none", "sum", "mass"])
def test_identity_in_place_of_a_shuffle_is_the_router_itself(norm):
    model, heldout = olmoe(), text()
    router = moeprof.BH(0.6, max_k=4)
    with moeprof.patch(model, router, null="normal", norm=norm) as handle, torch.no_grad():
        counts = [[], []]
        handle.on_routing(lambda layer, routing: counts[layer].append(routing.counts))
        own = [model(input_ids=window.ids).logits for window in heldout.windows]
    counts = np.stack([torch.cat(layer).numpy() for layer in counts])
    assert len(np.unique(counts)) > 2
    null = moeprof.null.NORMAL
    routers = with_counts(router, counts, null=null, norm=norm, top_k=2)
    with moeprof.patch(model, routers), torch.no_grad():
        again = [model(input_ids=window.ids).logits for window in heldout.windows]
    for one, other in zip(own, again, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_shuffle_has_the_routers_numbers_of_experts():
    model, heldout = olmoe(), text()
    router = moeprof.BH(0.6, max_k=4)
    counts = collect(model, heldout, router, null="normal").counts
    dealt = shuffled(counts, 7)
    assert (dealt != counts).any()
    for own, other in zip(counts, dealt, strict=True):
        assert Counter(own.tolist()) == Counter(other.tolist())
    routers = with_counts(router, dealt, null=moeprof.null.NORMAL, norm="none", top_k=2)
    assert np.array_equal(collect(model, heldout, routers).counts, dealt)


def test_a_shuffle_depends_on_neither_the_place_nor_the_other_layer():
    own = np.tile(np.repeat(np.arange(1, 9), 250), (2, 1))
    dealt = shuffled(own, 0)
    for one, other in ((dealt[0], own[0]), (dealt[1], own[1]), (dealt[0], dealt[1])):
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.1  # 4.5 standard errors


def test_weights_of_a_cut_routing_have_the_promised_sum():
    p = torch.softmax(torch.randn(50, 8, generator=torch.Generator().manual_seed(0)), 1)
    p = p.sort(1, descending=True).values
    kept = torch.arange(8) < torch.randint(1, 9, (50, 1))
    mass = p[:, :2].sum(1)
    assert torch.equal(reweigh(p, kept, "none"), torch.where(kept, p, 0))
    torch.testing.assert_close(reweigh(p, kept, "sum").sum(1), torch.ones(50))
    torch.testing.assert_close(reweigh(p, kept, "mass", mass).sum(1), mass)


def test_random_numbers_of_experts_have_the_mean_of_the_budget():
    counts = random_counts([2, 5, 8, 1], 40_000, 8, 0)
    assert counts.min() == 1 and counts.max() == 8
    for layer, budget in zip(counts, (2, 5, 8, 1), strict=True):
        chance = (budget - 1) / 7
        assert abs(layer.mean() - budget) <= 4 * np.sqrt(7 * chance * (1 - chance) / 40_000)


def test_the_oracle_without_a_threshold_is_the_full_model():
    model, heldout = olmoe(num_experts_per_tok=4), text()
    before = snapshot(model)
    with Oracle(model) as oracle:
        quality = Reference(model, heldout).measure(oracle.routers([0.0, 0.0]))
    assert quality.average_k == 4 and quality.mean_kl < 1e-6
    assert_unchanged(model, before)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_oracle_keeps_the_slots_with_large_outputs_and_meets_its_budget():
    model, heldout = olmoe(num_experts_per_tok=4), text(((0, 400), (1, 400), (2, 400)))
    with Oracle(model) as oracle:
        thresholds, by_layer, sizes = oracle.set_budget(heldout, [2.5, 3.0])
        oracle.clear()
        routing = [[], []]
        with moeprof.patch(model, oracle.routers(thresholds)) as handle, torch.no_grad():
            handle.on_routing(lambda layer, found: routing[layer].append(found))
            for window in heldout.windows:
                model(input_ids=window.ids)
    np.testing.assert_allclose(by_layer, [2.5, 3.0], rtol=0.01)
    assert sizes.shape == (2, 1200, 4)
    # The first layer's sizes, from the model's own weights.
    block, found = model.model.layers[0].mlp, torch.cat([r.expert_ids for r in routing[0]])
    seen = []
    hook = block.register_forward_pre_hook(lambda m, x: seen.append(x[0].reshape(-1, 32)))
    with torch.no_grad():
        for window in heldout.windows:
            model(input_ids=window.ids)
        hook.remove()
        x = torch.cat(seen)
        p = torch.softmax(torch.cat([r.logits for r in routing[0]]).float(), 1)
        weights, experts = p.topk(4)
        if model.config.norm_topk_prob:
            weights /= weights.sum(1, keepdim=True)
        out = (
            torch.stack(
                [
                    torch.stack(
                        [run_expert(block, e, row) for e, row in zip(column, x, strict=True)]
                    )
                    for column in experts.T.tolist()
                ],
                dim=1,
            )
            * weights[:, :, None]
        )
    sizes = out.norm(dim=2)
    clear = (sizes - thresholds[0]).abs().min(1).values > 1e-5  # rounding does not decide
    kept = (found[:, None, :] == experts[:, :, None]).any(2)
    large = (sizes >= thresholds[0]) | (sizes == sizes.max(1, keepdim=True).values)
    assert clear.sum() > 1100 and torch.equal(kept[clear], large[clear])


def run_expert(block, expert, x):
    """The output (H,) of one expert for one token (H,)."""
    gate_up, down = expert_weights(block, expert)[:2] if V5 else (None, None)
    if not V5:
        return block.experts[expert](x)
    gate, up = (gate_up @ x).chunk(2)
    return down @ (torch.nn.functional.silu(gate) * up)


def test_an_oracles_threshold_meets_the_target():
    sizes = np.random.default_rng(0).exponential(size=(500, 6)).astype(np.float32)
    for target in (1, 1.5, 3.25, 5.9, 6):
        tau = threshold_for(sizes, target)
        kept = np.maximum((sizes >= tau).sum(1), 1)
        assert abs(kept.mean() - target) <= 1 / 500
    assert threshold_for(sizes, 6) == 0


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
        "by_document": {name: list(map(float, values)) for name, values in sums.items()},
    }


def static_kl(k):
    return 0.8 / k - 0.1


def made_run(*cells, plan_budgets=(4, 6)):
    """A run as in the JSON around cells, with their effects."""
    static = [
        made_cell("static", "top-k", budget=k, noise=0) | {"table": None} for k in range(1, 9)
    ]
    Table(list(cells), static, [100] * 40, [101] * 40, ["a", "b"] * 20).analyse()
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
    table = Table(cells, static, predicted, tokens, ["a"] * 40)
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
    assert "budget 4: -0.0" in text and "BH stays closer to the full model" in text
    assert "1 of 1 routers beat static top-k (bh)" in text
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
    assert "1 of 2 routers beat static top-k (fixed_p), 1 lose to it (bh)" in text
    assert "can't be" not in text
    assert "cut at one fixed p, without the correction" in text and "(BH is farther)" in text
    share = best["effect"]["kl"]["estimate"] / oracle["effect"]["kl"]["estimate"]
    assert f"{100 * share:.0f} % of the oracle's gain" in text


def test_findings_without_a_difference_and_without_adaptivity():
    router = made_cell(shift=0.0002, noise=0.05)
    text = said(router, made_cell("shuffled", shift=0.0001, noise=0.05, seed=8))
    assert "No difference between BH and static top-k is shown" in text
    assert "none of 1 routers beats static top-k" in text
    assert "no token adaptivity shown: bh (reduction, equal, budget 4)" in text
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
    assert "Out of reach, so not measured, 1 cells: ebh (lr) (reduction, equal: 6)" in " ".join(
        findings(run)
    )
    assert "1 of 2 routers beat static top-k (bh), 0 lose to it, 1 can't be set to this budget" in (
        " ".join(findings(run))
    )
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
    assert {*names, "short", "oracle (knows the outputs)", "static top-k"} <= said_of
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


def test_contenders_and_tables_are_chosen_by_name():
    assert [c.name for c in choose_contenders(["hc (p)", "bh"])] == [
        "bh",
        "bh (logit)",
        "bh (trimmed)",
        "hc (p)",
    ]
    assert len(choose_contenders()) == len(CONTENDERS) == 18
    with pytest.raises(ValueError, match="expected one of .*'bh'.*, got 'nonsense'"):
        choose_contenders(["nonsense"])
    reduction, wide = plan_tables(8, 64)
    assert reduction.budgets == (2, 3, 4, 5, 6, 7) and reduction.max_k == 8
    assert wide.budgets == (2, 3, 4, 5, 6, 7, 8) and wide.max_k == 16
    assert plan_tables(8, 12)[1].max_k == 12
    with pytest.raises(ValueError, match="budgets: expected some of 2 to 7"):
        plan_tables(8, 64, budgets=[9])


def test_popularity_is_how_often_the_model_takes_an_expert():
    model = olmoe()
    passed = collect(model, text())
    weights = popularity(passed, 2)
    np.testing.assert_allclose(weights.mean(1), 1)
    top = np.argsort(-passed.logits[1], axis=1)[:, :2]
    expected = np.bincount(top.ravel(), minlength=8) * 8 / top.size
    np.testing.assert_allclose(weights[1], expected)


# ---------------------------------------------------------------- the command


SMALL = ("--test-tokens", "512", "--budget-tokens", "512", "--tables", "reduction")


def test_compare_writes_all_files_and_the_json_can_make_them_again(tmp_path, capsys):
    code = main(
        [
            "compare",
            "--routers",
            "fixed_p,top_p,ebh (lr),weighted_bh",
            "--budgets",
            "4",
            *SMALL,
            "--out",
            str(tmp_path),
        ]
    )
    out = capsys.readouterr().out
    assert code == 0 and max(map(len, out.splitlines())) <= 100
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    run = json.loads((tmp_path / "comparison.json").read_text())
    assert len(run["static"]) == 8 and run["static"][7]["kl"] == 0
    assert len(run["static"]) + len(run["cells"]) == run["planned_cells"]
    assert "Interrupted" not in (tmp_path / "comparison_report.md").read_text()
    roles = Counter(cell["role"] for cell in run["cells"])
    assert roles == {"router": 12, "shuffled": 6, "random": 2, "oracle": 2, "static": 1}
    for cell in run["cells"]:
        if cell["role"] == "router" and cell["contender"] == "ebh (lr)":
            assert "reaches from 1" in cell["reason"]
            continue
        assert cell["average_k"] == pytest.approx(4, rel=0.12)  # 512 tokens of other documents
        assert sum(cell["by_document"]["kl"]) > 0 and len(cell["by_document"]["kl"]) == 4
        assert {"kl", "nats", "agree"} == set(cell["effect"])
        if cell["role"] == "router":
            assert cell["tokens_per_s"] > 0 and cell["set_k"] == pytest.approx(4, rel=0.02)
    assert run["command"].endswith("--tables reduction --test-tokens 512 --budget-tokens 512")
    for name in ("machine", "nulls", "model_config", "seed", "splits", "sensitivity"):
        assert run[name] is not None
    page = (tmp_path / "comparison_report.md").read_text()
    assert page == report(run) and "## What the results say" in page
    assert len(pandas.read_csv(tmp_path / "comparison.csv")) == 8 + len(run["cells"])


def test_an_interrupted_comparison_keeps_what_was_finished(tmp_path, monkeypatch, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner.Comparison, "_shuffled", interrupt)
    code = main(["compare", "--routers", "top_p", "--budgets", "4", *SMALL, "--out", str(tmp_path)])
    assert code == 130 and "cells are finished" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    run = json.loads((tmp_path / "comparison.json").read_text())
    assert run["cells"][-1]["contender"] == "top_p" and "effect" in run["cells"][-1]
    assert "Interrupted" in (tmp_path / "comparison_report.md").read_text()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--routers", "nonsense"], "router: expected one of"),
        (["--tables", "c"], "--tables: expected some of reduction, wide, got 'c'"),
        (["--routers", ""], "router: expected some of"),
        (["--budgets", "0"], "expected a number from 1"),
        (["--budgets", "40"], "budgets: expected some of 2 to 7"),
        (["--text", "missing.txt"], "can't be read"),
        (["--null", "missing.npz"], "missing.npz"),
        (["--model", "missing"], "no such folder"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(["compare", *arguments])
    except SystemExit as exit:
        code = exit.code
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1 and message in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "changes", [{"kind": "trimmed"}, {"score": "logit"}, {"alpha_min": 0.5}], ids=str
)
def test_a_null_that_is_not_what_the_tables_call_it_is_refused_first(
    changes, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    null = demo.null("efron")
    for name, value in changes.items():
        object.__setattr__(null, name, value)
    monkeypatch.setattr(moeprof.Null, "load", lambda path: null)
    assert main(["compare", "--null", "some.npz"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--null: expected an efron null on logprob" in error
    assert not list(tmp_path.iterdir())


def test_text_of_ones_own_says_what_is_expected(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"txt": "two"}\n')
    assert main(["compare", "--text", "a.jsonl"]) == 2
    error = capsys.readouterr().err
    assert "a.jsonl, line 2" in error and error.count("\n") == 1
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert main(["compare", "--text", "a.jsonl"]) == 2
    assert "has 2 different document(s), expected at least 4" in capsys.readouterr().err


def test_a_store_that_cannot_be_written_is_refused_first(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="can't be written"):
        Store(tmp_path / "file")
