"""Skip experts or shrink them: quantised static top-k in a comparison, and bytes that are read."""

import copy
import io
import re
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from models import assert_unchanged, olmoe, snapshot
from rich.console import Console
from test_comparison import run_here, text
from test_comparison_results import made_cell, made_run, static_kl
from wording import says

import moeprof
from moeprof.studies.comparison import speed
from moeprof.studies.comparison.bytes_read import BytesTable, expert_bytes
from moeprof.studies.comparison.contenders import Nulls, choose_contenders
from moeprof.studies.comparison.effects import Documents
from moeprof.studies.comparison.files import frame
from moeprof.studies.comparison.findings import findings
from moeprof.studies.comparison.plan import plan_tables
from moeprof.studies.comparison.plots import figure
from moeprof.studies.comparison.report import console_tables, report
from moeprof.studies.comparison.speed import decode_speeds
from moeprof.studies.comparison.splits import Splits
from moeprof.studies.comparison.work import Comparison

pytestmark = pytest.mark.slow  # test_every_study runs what they are made of on both versions

TEST = text(((0, 11), (1, 10), (2, 13)))


def comparison(model, bits=(4, 8)):
    plans = plan_tables(4, 12, ["reduction"], [2])
    nulls = Nulls(model, None, [], {"efron": "normal"})
    contenders, splits = choose_contenders(["top_p"]), Splits([], text(), TEST)
    return Comparison(model, splits, nulls, contenders, plans, [], bits=bits)


def model_of_four():
    return olmoe(num_experts=12, num_experts_per_tok=4)


def log_probs(model, k):
    """Of each window, by the model's own forward with another number of experts."""
    for layer in model.model.layers:
        for module in (layer.mlp, getattr(layer.mlp, "gate", None)):
            if hasattr(module, "top_k"):
                module.top_k = k
    with torch.no_grad():
        windows = [model(input_ids=w.ids, use_cache=False).logits[0, :-1] for w in TEST.windows]
    return torch.log_softmax(torch.cat(windows).double(), -1)


# ---------------------------------------------------------------- what is measured


def test_quantised_lines_are_those_of_a_quantised_model_and_the_model_stays():
    model = model_of_four()
    before, full = snapshot(model), log_probs(copy.deepcopy(model), 4)
    made = comparison(model)
    run_here(made)
    assert_unchanged(model, before)
    rows = made.rows()
    cells = rows["quantized"]
    assert [(cell["bits"], cell["budget"]) for cell in cells] == [
        (bits, k) for bits in (4, 8) for k in (1, 2, 3, 4)
    ]
    assert sum(map(len, rows.values())) == made.describe()["planned_cells"]
    for bits in (4, 8):
        quantised = copy.deepcopy(model)
        moeprof.quantize(quantised, bits, progress=False)
        for cell in (cell for cell in cells if cell["bits"] == bits):
            routed = log_probs(quantised, cell["budget"])
            kl = float((full.exp() * (full - routed)).sum(1).mean())
            assert kl > 1e-6 and cell["kl"] == pytest.approx(kl, rel=1e-2, abs=1e-6)
            # Two layers of gate and up, 16 rows of a group, and down, 32 rows of one.
            read = 2 * cell["budget"] * (2 * 16 + 32) * (4 * bits + 2)
            assert cell["bytes_per_token"] == read
            assert cell["by_document"]["bytes"] == [read * n for n in (11, 10, 13)]


def test_every_cell_has_the_bytes_of_the_experts_that_ran():
    made = comparison(model_of_four())
    run_here(made)
    rows = made.analysed()
    one = 3 * 32 * 16 * 4  # float32
    for cell in [*rows["static"], *rows["cells"]]:
        if cell["status"] == "measured":
            expected = one * sum(cell["by_layer"])
            assert cell["bytes_per_token"] == pytest.approx(expected)
            assert sum(cell["by_document"]["bytes"]) == pytest.approx(expected * 34)
    for cell in rows["quantized"]:
        assert {"kl", "nats", "agree"} == set(cell["effect"])
        assert cell["level"]["bytes"]["estimate"] == pytest.approx(cell["bytes_per_token"])
        assert cell["level"]["kl"]["estimate"] == pytest.approx(cell["kl"])
    assert {"top-4 in 4 bits", "top-4 in 8 bits"} <= set(rows["static"][0]["against"])
    router = next(cell for cell in rows["cells"] if cell["role"] == "router")
    for whole in (rows["quantized"][3], rows["quantized"][7]):
        against = router["against"][f"top-4 in {whole['bits']} bits"]
        assert against["estimate"] == pytest.approx(router["kl"] - whole["kl"])


def test_the_bytes_of_an_expert_are_those_of_its_matrices():
    model = model_of_four()
    assert expert_bytes(model).tolist() == [3 * 32 * 16 * 4] * 2
    moeprof.quantize(model.to(torch.bfloat16), 4, skip="model.layers.1.mlp", progress=False)
    assert expert_bytes(model).tolist() == [(2 * 16 + 32) * 18, 3 * 32 * 16 * 2]


@pytest.mark.parametrize("error", (KeyboardInterrupt, RuntimeError))
def test_interrupted_among_quantised_cells_the_model_has_its_own_experts(error):
    model = model_of_four()
    before, made, steps = snapshot(model), comparison(model), iter(range(4))
    cell = next(cell for cell in made.cells if cell.name == "top-k in 4 bits")

    def step():
        if next(steps, None) is None:
            raise error

    with pytest.raises(error):
        made.run(cell, step)
    assert_unchanged(model, before)


def test_a_quantised_model_is_compared_at_its_own_bytes():
    model = model_of_four()
    moeprof.quantize(model, 8, progress=False)
    before = snapshot(model)
    made = comparison(model, bits=(8,))
    run_here(made)
    assert_unchanged(model, before)
    rows = made.analysed()
    assert rows["static"][3]["kl"] == 0  # its full model is itself
    assert rows["static"][0]["bytes_per_token"] == 2 * (2 * 16 + 32) * 34
    (cell,) = rows["quantized"]
    assert cell["status"] == "outside" and "is quantised already" in cell["reason"]
    assert sum(map(len, rows.values())) == made.describe()["planned_cells"]


def test_speeds_are_of_each_setting_in_turn_in_its_own_bits(monkeypatch):
    """A round has each once, those of the same bits one after the other, in an order of its own."""
    model, ran = model_of_four(), []
    before = snapshot(model)

    def greedy(given, ids, tokens):
        if tokens == 5:
            formats = {row.dtype for row in moeprof.inspect(given)}
            ran.append((ids[0, 0].item(), formats, on[-1]))
        return None, 0.5

    @contextmanager
    def patch(given, router, null):
        on.append(router.k)
        yield

    on = []
    monkeypatch.setattr(speed, "greedy", greedy)
    monkeypatch.setattr(speed, "patch", patch)
    timed = [speed.Timed(moeprof.TopK(k), None, bits) for bits in (None, 8, 4) for k in (1, 2, 3)]
    prompts = [torch.tensor([[number]]) for number in range(4)]
    steps = []
    speeds = decode_speeds(model, prompts, timed, new_tokens=4, step=lambda: steps.append(1))
    assert speeds == [[8.0] * 4] * 9 and len(steps) == len(ran) == 36
    rounds = [ran[start : start + 9] for start in range(0, 36, 9)]
    for number, turn in enumerate(rounds):
        assert [of for of, _, _ in turn] == [number] * 9
        assert sorted(k for _, _, k in turn) == [1, 1, 1, 2, 2, 2, 3, 3, 3]
        assert len({tuple(formats) for _, formats, _ in turn[:3]}) == 1
        assert len({tuple(formats) for _, formats, _ in turn}) == 3
    assert len({str(turn) for turn in rounds}) > 2
    assert_unchanged(model, before)


# ---------------------------------------------------------------- what is concluded


def with_bytes(cell, each, tokens=101):
    cell["by_document"]["bytes"] = [each * n for n in cell["by_document"]["experts"]]
    cell["bytes_per_token"] = sum(cell["by_document"]["bytes"]) / (tokens * 40)
    return cell


def quantised(bits, k, kl, seed=0):
    """A cell of static top-k whose KL is given; an expert has 100 bytes unquantised."""
    cell = made_cell(
        "quantized", f"top-k in {bits} bits", budget=k, shift=kl - static_kl(k), seed=seed
    )
    return with_bytes(cell | {"table": None, "bits": bits}, 100 * (bits + 0.5) / 32)


def shrinking_run(losses, *cells):
    """losses: {bits: KL of all experts}; with fewer experts static's is added."""
    cells = [with_bytes(cell, 100) for cell in cells]
    run = made_run(*cells)
    lines = [
        quantised(bits, k, kl + static_kl(k) - static_kl(8), seed=bits + k)
        for bits, kl in losses.items()
        for k in range(1, 9)
    ]
    for cell in run["static"]:
        with_bytes(cell, 100)
    skipping = [*run["static"][:-1], *(c for c in cells if c["role"] == "router")]
    documents = Documents.of([100] * 40, [101] * 40, ["a", "b"] * 20)
    table = BytesTable(lines, skipping, run["static"], documents)
    table.analyse()
    return run | {"quantized": lines, "planned_cells": len(lines) + run["planned_cells"]}


def test_effects_at_equal_bytes_are_those_of_a_computation_by_hand():
    rng = np.random.default_rng(1)
    run = shrinking_run({4: 0.03, 8: 0.002}, made_cell(budget=6))
    static, lines = run["static"], run["quantized"]
    predicted, tokens = rng.integers(50, 100, 40), rng.integers(101, 120, 40)
    table = BytesTable(lines, static[:-1], static, Documents.of(predicted, tokens, ["a"] * 40))
    weights = rng.integers(0, 4, (5, 40)).astype(float)
    effects, differences = table.effects(weights, "kl"), table.differences(weights)
    names = [name for _, name in table.contrasts()]
    assert names == ["top-8 in 4 bits"] * 7 + ["top-k in 8 bits"] + ["top-8 in 8 bits"] * 7
    for b, w in enumerate(weights):

        def mean(cell, field, of, w=w):
            return (w * np.array(cell["by_document"][field])).sum() / (w * of).sum()

        def at(line, read, mean=mean):
            knots = [mean(cell, "bytes", tokens) for cell in line]
            return np.interp(read, knots, [mean(cell, "kl", predicted) for cell in line])

        for m, cell in enumerate(lines):
            expected = mean(cell, "kl", predicted) - at(static, mean(cell, "bytes", tokens))
            assert effects[b, m] == pytest.approx(expected, abs=1e-12)
        four, eight = lines[7], lines[15]
        expected = [
            mean(cell, "kl", predicted) - mean(four, "kl", predicted) for cell in static[:7]
        ]
        mixed = at(lines[8:], mean(four, "bytes", tokens))
        expected.append(mean(four, "kl", predicted) - mixed)
        expected += [
            mean(cell, "kl", predicted) - mean(eight, "kl", predicted) for cell in static[:7]
        ]
        np.testing.assert_allclose(differences[b], expected, atol=1e-12)


def bytes_lines(run):
    """{name: its row of the report's table of bytes}."""
    lines = [line for line in report(run).splitlines() if line.startswith("| top-")]
    return {line.split("|")[1].strip(): line for line in lines}


def test_findings_where_shrinking_is_better_than_all_that_skip():
    run = shrinking_run({8: 0.0001, 4: 0.0002}, made_cell(budget=6, shift=0.01))
    text = " ".join(findings(run))
    # 8 experts of 26.6 bytes are 212.5, of 800
    assert says(text, "top-8 in 8 bits reads", "27 %", "as much as 2.1 of its 8 experts")
    assert says(text, "Of 8 ways", "6 with more bytes and farther", "2 with no more bytes")
    assert says(text, "top-8 in 4 bits reads", "14 %", "as much as 1.1 of its 8 experts")
    assert says(text, "In 16 bits", "top-8 in 4 bits would then be as much as 2.2 of 8 experts")
    assert "which reads more" not in text
    assert says(text, "static top-8 in 4 bits less static top-k in 8 bits", "fewer bits are closer")
    speeds = "100 (95 to 110)"
    assert says(text, f"Decoding one token at a time: {speeds} tokens/s", "top-8 in 4 bits")
    assert says(text, "Decoding", f"top-4 {speeds}, top-6 {speeds}, top-8 {speeds}")
    assert all(f"| {speeds} |" in row for row in bytes_lines(run).values())
    title = figure(run).axes[-2].get_title("left")
    assert title == "All 8 experts in 4 bits beat fewer that read more"
    marked = {name: ")* |" in row for name, row in bytes_lines(run).items()}
    assert marked["top-1 in 8 bits"] and not marked["top-8 in 4 bits"]
    run["quantized"][-1]["bytes_per_token"] = 99.0  # less than one expert
    assert ")* |" in bytes_lines(run)["top-8 in 4 bits"]
    assert says(" ".join(findings(run)), "top-8 in 4 bits", "(static top-1, which reads more)")


def test_findings_where_it_is_not():
    run = shrinking_run({8: 0.1}, made_cell(budget=6, shift=-0.02))
    text = " ".join(findings(run))
    # Static's KL is 0.1 at 4 experts.
    assert says(text, "Of 8 ways", "1 with more bytes and farther", "2 with no more bytes")
    assert says(text, "4 closer (top-k, budget 5, 6, 7; bh, budget 6)")
    assert says(text, "1 not told from it (top-k, budget 4)")
    title = figure(run).axes[-2].get_title("left")
    assert title == "All 8 experts in 8 bits beat 1 of 6 ways that read more"


def test_all_that_skip_may_read_more():
    run = shrinking_run({4: 0.0001}, made_cell(budget=6, shift=0.01))
    one = run["static"].pop(0)  # which reads less than 8 experts in 4 bits
    assert one["bytes_per_token"] < run["quantized"][-1]["bytes_per_token"]
    assert says(" ".join(findings(run)), "Each of the 7 ways", "reads more bytes and is farther")


def test_report_table_and_figure_say_the_same():
    run = shrinking_run({8: 0.001, 4: 0.01}, made_cell(budget=6, shift=-0.01))
    page = report(run)
    table = page[page.index("## Skip experts or shrink them") :]
    rows = [line for line in table[: table.index("## Table")].splitlines() if "| top-" in line]
    assert len(rows) == 8 + 16
    read = [float(re.split(r"\s*\|\s*", row)[2]) for row in rows]
    assert read == sorted(read)
    assert len(frame(run)) == 8 + 16 + 1 and "bytes_per_token" in frame(run)
    shown = list(console_tables(run))
    console = Console(width=100, file=io.StringIO())
    console.print(shown[-1])
    assert "…" not in console.file.getvalue() and "top-8 in 4 bits" in console.file.getvalue()
    assert any("Skip experts" in part for part in shown if isinstance(part, str))
    left, right = figure(run).axes[-2:]
    labels = {line.get_label() for line in left.lines}
    assert {"static top-k", "best router", "static, 8 bits", "static, 4 bits"} <= labels
    names = {label.get_text().split(":")[0] for label in right.get_yticklabels()}
    assert names == {"bh", "static top-6", "top-8 in 8 bits", "top-8 in 4 bits"}


def test_a_run_from_before_has_no_such_table():
    run = made_run(made_cell(shift=-0.03))
    assert "Skip experts" not in report(run) and len(figure(run).axes) == 2
    assert "Skip experts" not in " ".join(findings(run))


def test_what_cannot_be_quantised_is_named():
    run = made_run(made_cell(shift=-0.03))
    reason = "quantize: model.layers.0.mlp is quantised already"
    cell = made_cell("quantized", "top-k in 8 bits") | {"status": "outside", "reason": reason}
    run["quantized"] = [{k: v for k, v in cell.items() if k != "kl"} | {"bits": 8}]
    assert says(" ".join(findings(run)), "Not measured, top-k in 8 bits", reason)
    assert f"- top-k in 8 bits: {reason}" in report(run)
    assert "## Skip experts" not in report(run)
