"""The experiment on a tiny OLMoE: every number against one computed in another way."""

import json
import math

import numpy as np
import pandas
import pytest
import torch
import transformers
from models import assert_unchanged, olmoe, snapshot

import moeprof
from moeprof import demo, files
from moeprof.measure.generate import greedy
from moeprof.studies.sweep import (
    COLUMNS,
    Configuration,
    Experiment,
    Store,
    configurations,
    dropped_max_ks,
    figure,
    results_frame,
    sweep,
)
from moeprof.studies.sweep import runner as runner_module
from moeprof.studies.sweep.advice import advice
from moeprof.studies.sweep.beside import budgets
from moeprof.studies.sweep.compared import compared, on_line
from moeprof.studies.sweep.merged import merged, same_results
from moeprof.studies.sweep.report import report
from moeprof.texts.windows import WINDOW, heldout_windows, spread

PROMPTS = (("simple", "The list is"), (None, "And it came to pass"), ("complex", "def f(x):"))
NEW_TOKENS = 6


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(demo.PATH, local_files_only=True)


@pytest.fixture(scope="module")
def model(tokenizer):
    """8 experts, top-2, 2 layers; weights large enough for tokens to differ in their experts."""
    return olmoe(vocab_size=len(tokenizer), max_position_embeddings=1024, initializer_range=0.3)


@pytest.fixture(scope="module")
def null(model, tokenizer):
    texts = [document.text for document in demo.calibration_documents()[::40]]
    return moeprof.fit_null(model, tokenizer, texts, kind="trimmed", progress=False)


@pytest.fixture(scope="module")
def experiment(model, tokenizer, null):
    heldout = heldout_windows(tokenizer, demo.heldout_documents()[::24], 2500)
    complexities, texts = zip(*PROMPTS, strict=True)
    return Experiment(model, tokenizer, texts, complexities, heldout, null, NEW_TOKENS)


@pytest.fixture(scope="module")
def baseline(experiment):
    return experiment.run(configurations(8, 2)[0])


@pytest.fixture(scope="module")
def bh(experiment, baseline):
    return experiment.run(Configuration("bh_k4_a020", "bh", 0.2, 4), baseline)


@pytest.fixture(scope="module")
def run(experiment, tmp_path_factory):
    """A whole sweep, and the folder that it wrote."""
    folder = tmp_path_factory.mktemp("results")
    return sweep(experiment, Store(folder), FACTS), Store(folder)


FACTS = {
    "model": "a tiny model",
    "seed": 0,
    "null": "a null",
    "null_source": "From a test.",
    "null_code": "null",
}


def is_patched(model):
    return any("forward" in vars(module) for module in model.modules())


# ---------------------------------------------------------------- configurations


def test_the_21_configurations_of_the_promise():
    alphas = {0.01: "001", 0.05: "005", 0.10: "010", 0.20: "020"}
    expected = [("topk_8_baseline", "topk", None, 8)]
    for max_k in (4, 8, 16, 32, 64):
        for alpha, digits in alphas.items():
            expected.append((f"bh_k{max_k}_a{digits}", "bh", alpha, max_k))
    found = configurations(64, 8)
    assert [(c.name, c.routing_type, c.alpha, c.max_k) for c in found] == expected
    assert len(found) == 21
    assert dropped_max_ks(64) == []


def test_alphas_that_round_alike_have_names_of_their_own():
    found = configurations(64, 8, alphas=(0.02, 0.025, 0.25, 0.2, 1e-5), max_ks=(8,))[1:]
    assert [c.name for c in found] == [
        "bh_k8_a002",
        "bh_k8_a0025",
        "bh_k8_a025",
        "bh_k8_a020",
        "bh_k8_a000001",
    ]
    assert [c.alpha for c in found] == [0.02, 0.025, 0.25, 0.2, 1e-5]


def test_a_small_model_loses_what_it_has_no_experts_for():
    found = configurations(8, 2)
    assert found[0] == Configuration("topk_2_baseline", "topk", None, 2)
    assert {c.max_k for c in found[1:]} == {4, 8}
    assert len(found) == 9
    assert dropped_max_ks(8) == [16, 32, 64]


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(routing_type="top", alpha=None, max_k=2), "routing_type must be"),
        (dict(routing_type="bh", alpha=None, max_k=2), "alpha belongs to"),
        (dict(routing_type="topk", alpha=0.1, max_k=2), "alpha belongs to"),
        (dict(routing_type="bh", alpha=0.1), "max_k is missing"),
    ],
)
def test_a_configuration_that_says_too_little_or_too_much(fields, message):
    with pytest.raises(ValueError, match=message):
        Configuration(name="mine", **fields)


# ---------------------------------------------------------------- held-out text


def test_windows_are_the_documents_text_and_nothing_else(tokenizer):
    document = demo.heldout_documents()[0]
    heldout = heldout_windows(tokenizer, [document], 10**6)
    ids = tokenizer(document.text, verbose=False)["input_ids"]
    assert heldout.tokens == len(ids)
    assert sorted(w.ids.shape[1] for w in heldout.windows)[1:] == [WINDOW] * (len(ids) // WINDOW)
    pieces = [ids[start : start + WINDOW] for start in range(0, len(ids), WINDOW)]
    assert sorted(w.ids[0].tolist() for w in heldout.windows) == sorted(pieces)
    firsts = sum(len(tokenizer.decode(piece[:1]).encode()) for piece in pieces)
    predicted = sum(window.num_bytes for window in heldout.windows)
    assert predicted + firsts == len(document.text.encode())


def test_windows_are_spread_over_domains_and_documents(tokenizer):
    heldout = heldout_windows(tokenizer, demo.heldout_documents(), 32768)
    assert 32768 <= heldout.tokens < 32768 + WINDOW
    domains = [heldout.documents[w.document]["domain"] for w in heldout.windows]
    counts = [domains.count(domain) for domain in set(domains)]
    assert max(counts) - min(counts) <= 1
    assert len(heldout.documents) == min(len(heldout.windows), len(demo.heldout_documents()))


def test_calibration_and_heldout_text_share_no_document():
    calibration = {document.text for document in demo.calibration_documents()}
    assert not calibration & {document.text for document in demo.heldout_documents()}


def test_spread_takes_turns_and_stops_at_the_budget():
    pieces = {"a": [["a1"] * 3, ["a2"] * 3], "b": [["b1"] * 2]}
    taken = spread(pieces, len, 8)
    assert sorted(taken) == ["a1", "a2", "b1", "b1"]
    assert [piece[0] for piece in taken] == ["a", "b", "a", "b"]
    assert len(spread(pieces, len, 10**6)) == 8
    assert taken == spread(pieces, len, 8)


# ---------------------------------------------------------------- what one run measures


def counts_by_definition(experiment, configuration, tokens):
    """Experts of each layer and token (L,T): BH in NumPy on the patched model's router logits.

    tokens: for each prompt what was generated; the last one is never fed back. One array a prompt.
    """
    counts = []
    for text, new in zip(experiment.prompts, tokens, strict=True):
        ids = experiment.tokenizer(text)["input_ids"] + new[:-1]
        with configuration.patch(experiment.model, experiment.null), torch.no_grad():
            out = experiment.model(torch.tensor([ids]), output_router_logits=True)
        layers = []
        for index, logits in enumerate(out.router_logits):
            p = np.sort(experiment.null.layer(index).reference(logits), axis=1)
            rank = np.arange(1, p.shape[1] + 1)
            rejections = ((p * p.shape[1] <= configuration.alpha * rank) * rank).max(axis=1)
            layers.append(rejections.clip(1, configuration.max_k))
        counts.append(np.stack(layers))
    return counts


def test_experts_are_what_a_recount_finds(experiment, bh):
    configuration = Configuration(bh["config"], "bh", bh["alpha"], bh["max_k"])
    counts = counts_by_definition(experiment, configuration, bh["generated_tokens"])
    everything = np.concatenate(counts, axis=1)
    assert 1 < bh["avg_experts"] < 4  # so that the recount can tell something
    assert bh["avg_experts"] == pytest.approx(everything.mean())
    assert bh["experts_by_layer"] == pytest.approx(everything.mean(axis=1).tolist())
    assert bh["avg_experts_simple"] == pytest.approx(counts[0].mean())
    assert bh["avg_experts_complex"] == pytest.approx(counts[2].mean())
    assert bh["avg_experts_medium"] is None and bh["avg_experts_technical"] is None
    assert bh["reduction_pct"] == pytest.approx(100 * (1 - everything.mean() / 2))
    found = np.bincount(everything.ravel(), minlength=9).tolist()
    assert bh["tokens_by_number_of_experts"] == found


@pytest.mark.parametrize("max_k", [1, 3, 8])
def test_max_k_is_the_cap(experiment, max_k):
    configuration = Configuration("generous", "bh", 0.95, max_k)
    result = experiment.run(configuration)
    counts = counts_by_definition(experiment, configuration, result["generated_tokens"])
    assert result["avg_experts"] == pytest.approx(np.concatenate(counts, axis=1).mean())
    used = np.flatnonzero(result["tokens_by_number_of_experts"])
    assert used.max() == max_k


def test_the_baseline_uses_k_experts_and_agrees_with_itself(baseline):
    assert baseline["avg_experts"] == baseline["avg_experts_heldout"] == 2
    assert baseline["reduction_pct"] == baseline["delta_perplexity"] == 0
    assert baseline["token_agreement"] == 1
    assert set(COLUMNS) <= set(baseline)


def test_perplexity_is_that_of_the_unpatched_model(experiment, baseline):
    nats, predicted, num_bytes = 0.0, 0, 0
    for window in experiment.heldout.windows:
        with torch.no_grad():
            logits = experiment.model(window.ids).logits[0].double().numpy()
        for position, token in enumerate(window.ids[0, 1:].tolist()):
            row = logits[position]
            nats -= row[token] - row.max() - math.log(np.exp(row - row.max()).sum())
        predicted += window.ids.shape[1] - 1
        num_bytes += len(experiment.tokenizer.decode(window.ids[0, 1:]).encode())
    assert baseline["perplexity"] == pytest.approx(math.exp(nats / predicted), rel=1e-4)
    bits = nats / math.log(2) / num_bytes
    assert baseline["bits_per_byte"] == pytest.approx(bits, rel=1e-4)
    assert sum(baseline["nats_by_document"]) == pytest.approx(nats, rel=1e-4)


def test_greedy_is_transformers_greedy(experiment, baseline):
    for text, new in zip(experiment.prompts, baseline["generated_tokens"], strict=True):
        ids = experiment.tokenizer(text, return_tensors="pt")["input_ids"]
        whole = experiment.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            eos_token_id=None,
        )
        assert whole[0, ids.shape[1] :].tolist() == new


def test_comparison_with_the_baseline(baseline, bh):
    own, other = baseline["generated_tokens"], bh["generated_tokens"]
    same = [a == b for x, y in zip(own, other, strict=True) for a, b in zip(x, y, strict=True)]
    assert len(same) == len(PROMPTS) * NEW_TOKENS
    assert bh["token_agreement"] == pytest.approx(sum(same) / len(same))
    assert bh["delta_perplexity"] == pytest.approx(bh["perplexity"] - baseline["perplexity"])


def test_speed_counts_decoding_only(monkeypatch):
    """With a clock that ticks once a forward, n tokens take the n − 1 ticks after the prefill."""

    class Clock:
        ticks = 0

        def __call__(self, input_ids, **_):
            self.ticks += 1
            logits = torch.zeros(*input_ids.shape, 5)
            return transformers.modeling_outputs.CausalLMOutputWithPast(logits=logits)

    clock = Clock()
    monkeypatch.setattr(runner_module.time, "perf_counter", lambda: clock.ticks)
    tokens, seconds = greedy(clock, torch.zeros(1, 3, dtype=torch.int64), 5)
    assert (len(tokens), seconds) == (5, 4)


def test_the_model_is_unpatched_after_a_run_and_after_an_error(experiment, bh, monkeypatch):
    before = snapshot(experiment.model)
    experiment.run(configurations(8, 2)[1])
    assert_unchanged(experiment.model, before)
    monkeypatch.setattr(runner_module, "evaluate", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        experiment.run(configurations(8, 2)[1])
    assert_unchanged(experiment.model, before)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(prompts=(), complexities=()), "prompts: expected at least one"),
        (dict(complexities=("simple",)), "expected one for each of the 3 prompts, got 1"),
        (dict(complexities=("simple", "hard", None)), "got 'hard'"),
        (dict(new_tokens=0), "max_new_tokens: expected an integer of at least 1, got 0"),
    ],
)
def test_bad_input_to_an_experiment(experiment, change, message):
    fields = {name: getattr(experiment, name) for name in Experiment.__dataclass_fields__}
    with pytest.raises(ValueError, match=message):
        Experiment(**fields | change)


# ---------------------------------------------------------------- run_configuration


def test_run_configuration_is_the_sweeps_own(experiment, baseline, bh):
    arguments = dict(
        prompts=list(experiment.prompts),
        prompt_complexities=list(experiment.complexities),
        max_new_tokens=NEW_TOKENS,
        model=experiment.model,
        tokenizer=experiment.tokenizer,
        null=experiment.null,
        heldout_documents=demo.heldout_documents()[:1],
    )
    again = moeprof.run_configuration("bh_k4_a020", **arguments, baseline=baseline)
    for name in ("avg_experts", "generated_tokens", "token_agreement", "experts_by_layer"):
        assert again[name] == bh[name]
    fields = dict(name="mine", routing_type="topk", max_k=1)
    alone = moeprof.run_configuration(fields, **arguments)
    assert alone["avg_experts"] == 1
    assert alone["delta_perplexity"] is None and alone["token_agreement"] is None


def test_run_configuration_says_what_is_wrong(experiment):
    model, tokenizer = experiment.model, experiment.tokenizer
    with pytest.raises(ValueError, match="unknown configuration 'bh_k16_a005'; there are topk_2"):
        moeprof.run_configuration("bh_k16_a005", ["a"], [None], model=model, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="both model and tokenizer"):
        moeprof.run_configuration("bh_k4_a005", ["a"], [None], model=model)


# ---------------------------------------------------------------- the sweep and its files


def test_the_sweep_writes_its_files(run):
    result, store = run
    names = [configuration.name for configuration in configurations(8, 2)]
    table = pandas.read_csv(store.csv)
    assert list(table.columns) == list(COLUMNS)
    assert table["config"].tolist() == names
    assert table["avg_experts"].tolist() == [r["avg_experts"] for r in result["results"]]
    assert math.isnan(table["alpha"][0]) and table["avg_experts_medium"].isna().all()
    loaded = json.loads(store.json.read_text(), parse_constant=pytest.fail)
    assert loaded == json.loads(json.dumps(result))
    assert loaded["dropped_max_k"] == [16, 32, 64]
    assert [r["config"] for r in loaded["results"]] == names
    assert store.figure.read_bytes().startswith(b"\x89PNG")
    assert store.report.read_text() == report(result)


def test_the_sweep_says_where_it_is(experiment, tmp_path, capsys):
    sweep(experiment, tmp_path, FACTS)
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "Total configurations: 9"
    assert "[1/9] Running: topk_2_baseline" in lines
    assert "[9/9] Running: bh_k8_a020" in lines
    assert "Avg experts: 2.00" in lines
    assert sum(line.startswith("Completed in ") and line.endswith("s") for line in lines) == 9
    assert "ALL EXPERIMENTS COMPLETE!" in lines
    code = [line for line in lines if line.startswith("    moeprof.patch(")]
    text = lines[lines.index("ALL EXPERIMENTS COMPLETE!") : -5]
    assert code and max(len(line) for line in text if line not in code) <= 100
    assert any(line.startswith("For 1 experts per token on average, ") for line in text)


def test_interrupted(experiment, tmp_path, monkeypatch, capsys):
    """What is finished is on disk and the model is unpatched, whenever Ctrl-C comes."""
    calls = []

    def interrupt(*arguments):
        calls.append(is_patched(experiment.model))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return evaluate(*arguments)

    evaluate = runner_module.evaluate
    monkeypatch.setattr(runner_module, "evaluate", interrupt)
    before = snapshot(experiment.model)
    with pytest.raises(KeyboardInterrupt):
        sweep(experiment, tmp_path, FACTS)
    assert calls == [True] * 3
    assert_unchanged(experiment.model, before)
    store = Store(tmp_path)
    assert pandas.read_csv(store.csv)["config"].tolist() == ["topk_2_baseline", "bh_k4_a001"]
    assert len(json.loads(store.json.read_text())["results"]) == 2
    assert "Interrupted: 2 of 9 configurations were finished" in store.report.read_text()
    assert store.figure.exists()
    assert "Interrupted: 2 of 9 are finished" in capsys.readouterr().out
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch, broken):
    path = tmp_path / "file.json"
    files.write_whole(path, b"old")

    def refuse(*_):
        raise OSError("no space left")

    monkeypatch.setattr(files.os, broken, refuse)
    with pytest.raises(OSError, match="no space left"):
        files.write_whole(path, b"new and long")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_json_has_no_nan(run, tmp_path):
    result, _ = run
    store = Store(tmp_path)
    broken = result["results"][0] | {"tokens_per_s": math.nan, "generated_tokens": [[math.inf]]}
    store.save_results(result | {"results": [broken]})
    loaded = json.loads(store.json.read_text(), parse_constant=pytest.fail)
    assert loaded["results"][0]["tokens_per_s"] is None
    assert loaded["results"][0]["generated_tokens"] == [[None]]


# ---------------------------------------------------------------- static top-k, budgets, advice


def test_static_is_what_top_k_does_on_the_same_text(experiment, run):
    (row,) = run[0]["static"]  # the own k is the baseline
    assert row["k"] == 1 and row["avg_experts_heldout"] == 1
    again = experiment.run(Configuration("mine", "topk", None, 1))
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
    assert "lie outside of what static top-k was run for" in " ".join(told["others"])


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
    """The run with one row's distance from static set, and every other one's far above it."""
    (one,) = run["static"]

    def put(row):
        if "nats_by_document" not in row or row["config"].startswith("topk"):
            return row
        mine = row["config"] == config
        values = (low, distance, high) if mine else (1, 1, 1)
        names = ("bits_above_static_low", "bits_above_static", "bits_above_static_high")
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
    assert "bh_k4_a020 is best: 1.02 experts" in first["head"]
    assert "-0.2000 (-0.3000 to -0.1000) beside static top-k" in first["head"]
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
    title = figure(told["results"], told).axes[0].get_title(loc="left")
    assert "at 1: static" in title
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
    assert "static top-3 was not run" in last["head"]


def test_the_figure_counts_the_settings_that_static_was_run_beside(run):
    far = run[0]["results"][-1]["config"]
    told = with_distance(run[0], far, None, None, None, 2.5)
    points = len(merged([row for row in told["results"][1:] if row["config"] != far]))
    points += sum(row.get("bits_above_static") is not None for row in told["budgets"])
    title = figure(told["results"], told).axes[1].get_title(loc="left")
    assert title == f"0 of {points} settings are better than static top-k"


def test_a_budget_out_of_reach_is_said(run):
    rows = [row | {"error": "reaches from 1 to 1.2"} for row in run[0]["budgets"]]
    rows = [{k: v for k, v in row.items() if "avg" not in k and "nats" not in k} for row in rows]
    for row in rows:
        row.pop("bits_above_static", None)
    told = advice(run[0] | {"budgets": rows})
    assert "fixed_p can't be set to 1: reaches from 1 to 1.2" in told[0]["others"]


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
    assert "At alpha 0.1 the configurations with max_k 16, 32 gave the same" in line
    assert "no token had more than 16 rejections" in line


# ---------------------------------------------------------------- report and figure


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
    line = "BH loses outright, with at least as many experts and a higher perplexity: bh_k8_a020."
    assert line in report(changed(result, **lost))
    won = report(changed(result, **lost | dict(perplexity=0.5 * own["perplexity"])))
    assert "loses outright" not in won
    assert "With at least as many experts as the baseline, none was worse: bh_k8_a020." in won


def test_the_report_says_what_a_tolerance_buys(run):
    result, _ = run
    own = result["results"][0]
    good = dict(avg_experts_heldout=1.01, perplexity=1.004 * own["perplexity"])
    text = report(changed(result, **good))
    assert "Within 1 % of the baseline's perplexity, the one with the fewest experts is bh_k8_a020"
    assert "bh_k8_a020: 1.01 experts on the held-out text" in text and "(+0.40 %)" in text
    best = next(line for line in text.splitlines() if line.startswith("- The best of these is"))
    assert "bh_k8_a020" in best


def test_the_report_says_how_many_are_slower(run):
    result, _ = run
    speeds = [10.0, 9.0, 8.0, 11.0, 12.0, 13.0, 14.0, 15.0, 16.0]
    results = [r | {"tokens_per_s": v} for r, v in zip(result["results"], speeds, strict=True)]
    assert "2 of 8 BH configurations were slower" in report(result | {"results": results})


def test_the_report_of_equal_caps(run):
    result, _ = run
    other = next(r for r in result["results"] if r["config"] == "bh_k4_a020")
    same = ("avg_experts", "avg_experts_heldout", "perplexity")
    last = result["results"][-1] | {name: other[name] for name in same}
    text = report(result | {"results": [*result["results"][:-1], last]})
    assert "0.2 the configurations with max_k 4, 8 gave the same results" in text


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
            if r.get(field) is not None:
                assert (r["avg_experts_heldout"], r[field]) in points
    static = result["static"][0]
    assert [static["k"], static["bits_above_own"]] in np.c_[use.lines[0].get_data()].tolist()
    assert use.get_title(loc="left").startswith("What to use at 1")
    assert "bits per byte" in use.get_ylabel() and "experts per token" in use.get_xlabel()
    drawn_layers = [list(line.get_ydata()) for line in layers.lines]
    assert result["results"][-1]["experts_by_layer"] in drawn_layers


@pytest.mark.parametrize("part", [slice(1), slice(4), slice(1, 3)])
def test_the_figure_of_a_part(run, part):
    """The baseline alone, an interrupted run, and BH without a baseline."""
    drawn = figure(run[0]["results"][part])
    drawn.canvas.draw()
    assert len(drawn.axes) == 5
