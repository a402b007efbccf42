"""lm-evaluation-harness on patched models: its scores, what is counted, and bad input.

Its tasks are those of data/harness, whose files are named there without a folder: tests that load
them run in that folder.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import moeprof
from moeprof import cli, demo

pytest.importorskip("lm_eval")
# One made for another huggingface_hub than that of transformers 4.57 can't be imported.
pytest.importorskip("datasets", exc_type=ImportError)

DATA = Path(__file__).parent / "data" / "harness"
BH = moeprof.BH(0.3, max_k=16)
TASKS = ("moeprof_choices", "moeprof_completions", "moeprof_pages")


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    """Where the tasks are; what `datasets` makes of them goes elsewhere."""
    import datasets

    monkeypatch.chdir(DATA)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def make_work(loaded, specs=(".",), with_bh=True, num_fewshot=None, **options):
    from moeprof.studies.configuration import Configuration
    from moeprof.studies.harness.tasks import Tasks
    from moeprof.studies.harness.work import HarnessWork

    configurations = [Configuration("bh", BH, null=demo.null())] if with_bh else []
    return HarnessWork(*loaded, Tasks(specs, num_fewshot), configurations, **options)


def run(work, name):
    """The result of a cell, and how often it stepped."""
    steps = []
    (cell,) = [cell for cell in work.cells if cell.name == name]
    result = work.run(cell, lambda: steps.append(1))
    assert len(steps) == work.steps(cell)
    return json.loads(json.dumps(result))


def values(result, metric):
    (found,) = [one for one in result["metrics"] if one["name"] == metric]
    return found


# ---- what is measured ----


def test_cells_are_tasks_by_routers_the_own_one_first(loaded):
    work = make_work(loaded)
    names = [cell.name for cell in work.cells]
    assert names == [f"{task}, {router}" for task in TASKS for router in ("own routing", "bh")]
    keys = {json.dumps(cell.parameters) for cell in work.cells}
    assert len(keys) == 6
    assert work.subject == make_work(loaded, ["pages.yaml"]).subject


@pytest.mark.parametrize("task", TASKS)
def test_padding_is_in_no_count_and_changes_no_score(loaded, task, monkeypatch):
    """Request by request there is no padding, so this is what batches have to give."""
    from moeprof.studies.harness.language_model import CountingLM

    rows = []
    for method in ("_model_call", "_model_generate"):
        own = getattr(CountingLM, method)

        def seen(self, *ids, own=own, **options):
            rows.append((ids[0] if ids else options["context"]).numel())
            return own(self, *ids, **options)

        monkeypatch.setattr(CountingLM, method, seen)
    alone = run(make_work(loaded, batch_size=1), f"{task}, bh")
    assert sum(rows) == alone["tokens"]
    rows.clear()
    together = run(make_work(loaded, batch_size=8), f"{task}, bh")
    assert sum(rows) > together["tokens"] == alone["tokens"]  # there was padding
    assert together["by_layer"] == pytest.approx(alone["by_layer"], abs=0.01)
    assert together["experts"] == pytest.approx(np.mean(together["by_layer"]))
    assert 2 < together["experts"] < 12
    for one, other in zip(together["metrics"], alone["metrics"], strict=True):
        assert one["documents"] == other["documents"]
        np.testing.assert_allclose(one["values"], other["values"], rtol=1e-4)


def test_scores_and_counts_are_those_of_the_patched_model(loaded):
    """The text of one document, by hand: its tokens after the end-of-text token."""
    model, tokenizer = loaded
    result = run(make_work(loaded, ["pages.yaml"], limit=1), "moeprof_pages, bh")
    page = json.loads(Path("pages.jsonl").read_text().splitlines()[0])["page"]
    ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(page)["input_ids"]]])
    counts = []
    with moeprof.patch(model, BH, null=demo.null()) as handle, torch.no_grad():
        handle.on_routing(lambda layer, routing: counts.append(routing.counts.float().mean()))
        logits = model(ids[:, :-1]).logits
    nats = torch.nn.functional.cross_entropy(logits[0], ids[0, 1:], reduction="sum").item()
    assert result["tokens"] == ids.shape[1] - 1 and result["documents"] == 1
    assert result["by_layer"] == pytest.approx([float(c) for c in counts], abs=1e-4)
    assert values(result, "bits_per_byte")["value"] == pytest.approx(
        nats / np.log(2) / len(page.encode()), rel=1e-4
    )


def test_the_own_router_is_the_model_as_it_is(loaded):
    """Its scores are those of the harness alone."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    work = make_work(loaded, ["choices.yaml"], False)
    result = run(work, "moeprof_choices, own routing")
    task = work.tasks.begin("moeprof_choices")
    plain = evaluate(
        HFLM(pretrained=loaded[0], tokenizer=loaded[1]),
        {"tasks": {"moeprof_choices": task}, "groups": {}, "group_map": {}},
        bootstrap_iters=10,
    )["results"]["moeprof_choices"]
    acc = values(result, "acc")
    assert acc["value"] == plain["acc,none"] and acc["stderr"] == plain["acc_stderr,none"]
    assert result["experts"] == 8 and 0 < acc["value"] <= 1 and len(acc["values"]) == 12


def test_few_shot_examples_are_the_same_each_time(loaded):
    work = make_work(loaded, ["choices.yaml"], num_fewshot=2)
    without = make_work(loaded, ["choices.yaml"])
    once, again = (work.tasks.requests("moeprof_choices", None) for _ in range(2))
    assert once == again != without.tasks.requests("moeprof_choices", None)
    assert work.cells[0].parameters["num_fewshot"] == 2


def test_what_is_too_long_is_cut_off_and_counted(loaded, monkeypatch):
    from moeprof.studies.harness.language_model import CountingLM

    monkeypatch.setattr(CountingLM, "max_length", 8)
    cut = run(make_work(loaded, ["choices.yaml"], False), "moeprof_choices, own routing")
    assert 0 < cut["truncated"] < cut["requests"]
    made = run(make_work(loaded, ["completions.yaml"], False), "moeprof_completions, own routing")
    assert 0 < made["truncated"] <= 6 and made["tokens"] <= 6 * 2
    # A long text is read in parts: nothing of it is lost.
    assert (
        run(make_work(loaded, ["pages.yaml"], False), "moeprof_pages, own routing")["truncated"]
        == 0
    )
    monkeypatch.setattr(CountingLM, "max_length", 4)
    with pytest.raises(ValueError, match="answer of [0-9]+ tokens.*context of 4"):
        run(make_work(loaded, ["choices.yaml"], False), "moeprof_choices, own routing")
    with pytest.raises(ValueError, match="generate .6. must be less than.*.4."):
        run(make_work(loaded, ["completions.yaml"], False), "moeprof_completions, own routing")


# ---- differences ----


def mean(items):
    return sum(items) / len(items)


def test_mcnemar_is_that_of_statsmodels():
    from statsmodels.stats.contingency_tables import mcnemar

    from moeprof.studies.harness.paired import paired

    rng = np.random.default_rng(0)
    a, b = (rng.random((2, 60)) < [[0.7], [0.5]]).astype(float).tolist()
    found = paired(a, b, mean)
    table = np.histogram2d(a, b, bins=2)[0]
    assert found.p == pytest.approx(mcnemar(table, exact=True).pvalue)
    assert (found.better, found.worse) == (table[1, 0], table[0, 1])
    assert found.difference == pytest.approx(mean(a) - mean(b))
    assert found.low < found.difference < found.high
    assert paired(a, a, mean)[:4] == (0, 0, 0, 1)
    assert paired([0.5, 1.0], [1.0, 0.0], mean).p is None  # not right or wrong


@pytest.mark.parametrize("name", ["mean", "perplexity", "weighted_perplexity", "bits_per_byte"])
def test_differences_are_of_the_harness_own_metrics(name):
    """And those by sums of documents are what the harness computes of the documents drawn."""
    from lm_eval.api.registry import get_aggregation

    from moeprof.studies.harness import paired

    rng = np.random.default_rng(1)
    pairs = name in ("weighted_perplexity", "bits_per_byte")
    a, b = (
        [(x, int(n)) if pairs else x for x, n in zip(-rng.random(30), sizes, strict=True)]
        for sizes in [rng.integers(1, 9, 30)] * 2
    )
    aggregate = get_aggregation(name)
    found = paired.paired(a, b, aggregate)
    assert found.difference == pytest.approx(aggregate(a) - aggregate(b))
    weights = rng.multinomial(30, [1 / 30] * 30, 3).astype(float)
    drawn = paired._by_weights(a, aggregate)(weights)
    rows = [np.repeat(np.arange(30), row.astype(int)) for row in weights]
    assert drawn == pytest.approx([aggregate([a[i] for i in row]) for row in rows])


def test_any_other_metric_is_computed_anew_of_each_draw():
    from moeprof.studies.harness.paired import paired

    a, b = [[3, 1], [5, 2], [4, 4]], [[1, 1], [1, 2], [1, 4]]
    found = paired(a, b, lambda items: max(x for x, _ in items))
    assert found.difference == 4 and 2 <= found.low <= found.high == 4 and found.p is None


# ---- the command ----


def command(*arguments):
    return cli.main(["eval-harness", *map(str, arguments)])


def test_the_command_resumes_and_writes_what_it_says(tmp_path, capsys):
    once = ("--tasks", "choices.yaml", "pages.yaml", "--limit", 3, "--out", tmp_path)
    assert command(*once) == 0
    assert "Finished: moeprof_pages, own routing" in capsys.readouterr().out
    assert command(*once, "--router", "topk:k=4", "--batch-size", 2) == 0
    out, error = capsys.readouterr()
    assert "In the store: moeprof_pages, own routing" in out and not error
    assert "Finished: moeprof_pages, topk:k=4" in out
    found = json.loads((tmp_path / "harness.json").read_text())
    rows = {(row["metric"], row["router"]): row for row in found["rows"]}
    assert len(rows) == 8
    own, four = rows["bits_per_byte", "own routing"], rows["bits_per_byte", "topk:k=4"]
    assert (own["experts"], four["experts"], own["documents"]) == (8, 4, 3)
    assert own["difference"] is None
    assert four["difference"] == pytest.approx(four["value"] - own["value"])
    assert four["difference_low"] <= four["difference"] <= four["difference_high"]
    assert f"{four['difference']:+.4g}" in out
    assert f"{four['difference']:+.4g}" in (tmp_path / "harness.md").read_text()
    assert len((tmp_path / "harness.csv").read_text().splitlines()) == 9


@pytest.mark.slow
def test_four_bits_and_a_budget(tmp_path, capsys, monkeypatch):
    halves = demo.calibration_halves()
    monkeypatch.setattr(demo, "calibration_halves", lambda: (halves[0], halves[1][::8]))
    arguments = ("--tasks", "choices.yaml", "--limit", 2, "--bits", 4, "--router", "topk@5")
    assert command(*arguments, "--out", tmp_path) == 0, capsys.readouterr().err
    rows = json.loads((tmp_path / "harness.json").read_text())["rows"]
    assert {row["router"]: row["experts"] for row in rows} == {"own routing": 8, "topk@5": 5}
    assert {row["ran"] for row in rows} == {"the model's own top-k", "topk k=5"}


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--tasks", "hellaswagg"], ["'hellaswagg'", "hellaswag,"]),
        (["--tasks", "no/such.yaml"], ["no/such.yaml", "no such file"]),
        (["--tasks", "{tmp}"], ["{tmp}", "no task in this folder"]),
        (["--tasks", "{tmp}/hub/hub.yaml"], ["hub.yaml", "needs the network"]),
        (["--tasks", "{tmp}/bad/bad.yaml"], ["bad.yaml", "can't be loaded"]),
        (["--tasks", "pages.yaml", "--router", "bhh"], ["bhh", "'bh'"]),
        (["--tasks", "pages.yaml", "--router", "topk:k=65"], ["k:", "64", "65"]),
    ],
    ids=["name", "path", "empty", "network", "yaml", "router", "too many"],
)
def test_bad_input_is_one_line(arguments, said, tmp_path, capsys, monkeypatch):
    from moeprof.studies.harness import tasks

    plain = tasks._manager
    # The harness's own index takes 15 seconds.
    monkeypatch.setattr(tasks, "_manager", lambda folders, defaults: plain(folders, False))
    monkeypatch.setattr(
        "lm_eval.tasks.TaskManager.all_tasks", ["arc_easy", "hellaswag", "hellaswag_de"]
    )
    for name, text in (("hub", "task: there\ndataset_path: nobody/nothing"), ("bad", "task: [")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.yaml").write_text(f"{text}\ntest_split: test\n")
    place = tmp_path / "empty" if "{tmp}" in arguments else tmp_path
    out = tmp_path / "results"
    words = [word.format(tmp=place) for word in arguments]
    assert command(*words, "--out", out) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and all(word.format(tmp=place) in error for word in said)
    assert not out.exists()


def test_a_tokenizer_without_an_end_of_text(loaded):
    from copy import deepcopy

    model, tokenizer = loaded[0], deepcopy(loaded[1])
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no token for the end of a text.*eos_token"):
        make_work((model, tokenizer), ["pages.yaml"])


def test_a_tokenizer_without_padding_is_left_as_it_is(loaded):
    from copy import deepcopy

    model, tokenizer = loaded[0], deepcopy(loaded[1])
    tokenizer.pad_token = None
    with_pad = run(make_work(loaded, ["completions.yaml"]), "moeprof_completions, bh")
    without = run(make_work((model, tokenizer), ["completions.yaml"]), "moeprof_completions, bh")
    assert without == with_pad and tokenizer.pad_token is None


def test_without_lm_eval_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("moeprof.checks._is_installed", lambda name: name != "lm_eval")
    assert command("--tasks", "pages.yaml") == 2
    error = capsys.readouterr().err
    assert "eval-harness needs lm_eval" in error and "moeprof[harness]" in error
