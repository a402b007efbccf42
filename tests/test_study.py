"""moeprof study: planned, run part by part, begun again, and what can be wrong with it."""

import io
import math
import warnings
from datetime import datetime, timezone

import pytest
import torch
import transformers
from matplotlib.figure import Figure
from models import olmoe, token_ids
from rich.console import Console
from wording import says

from moeprof import demo, patch
from moeprof.profile.result import Profile
from moeprof.routers import BH, TopK
from moeprof.studies.comparison import compare as comparing
from moeprof.studies.comparison.work import Comparison
from moeprof.studies.diagnosis.result import Diagnosis
from moeprof.studies.diagnosis.work import DiagnosisWork
from moeprof.studies.engine.load import COLLECT, DECODE, FIT, KL, LOSS, Load
from moeprof.studies.evaluation.result import Evaluated
from moeprof.studies.evaluation.work import EvaluationWork
from moeprof.studies.store import subject
from moeprof.studies.store.store import Store
from moeprof.studies.store.subject import null_digest
from moeprof.studies.study import costs as study_costs
from moeprof.studies.study import parts as study_parts
from moeprof.studies.study import run as study_run
from moeprof.studies.study.calibration import CalibrationWork
from moeprof.studies.study.costs import Costs, Rate
from moeprof.studies.study.files import StudyFiles
from moeprof.studies.study.parts import MAKERS, Ground
from moeprof.studies.study.plan import in_words
from moeprof.studies.study.profiling import ProfileWork
from moeprof.studies.study.report import pareto
from moeprof.studies.study.report import parts as report_parts
from moeprof.studies.study.run import plan_study, run_study, study
from moeprof.studies.study.settings import PARTS, Settings
from moeprof.studies.sweep import run as sweep_run
from moeprof.studies.sweep.work import SweepWork

pytestmark = pytest.mark.slow  # test_every_study runs what they are made of on both versions

QUICK = {"tokens": 300, "budget_tokens": 300, "null_characters": 4000, "positions": 2}


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(demo.PATH, local_files_only=True)


@pytest.fixture
def ground(tmp_path, tokenizer, monkeypatch):
    """Makes a Ground of a small model in a folder; the same each time."""
    two, few = demo.prompts()[:2], [half[::4] for half in demo.calibration_halves()]
    documents, all_of_it = demo.heldout_texts()[::16], demo.calibration_texts()[::8]
    monkeypatch.setattr(demo, "prompts", lambda: two)
    monkeypatch.setattr(demo, "calibration_halves", lambda: few)
    monkeypatch.setattr(demo, "calibration_texts", lambda: all_of_it)
    monkeypatch.setattr(demo, "heldout_texts", lambda: documents)
    monkeypatch.setattr(study_costs, "REPEATS", 2)  # of what is timed
    monkeypatch.setattr(study_parts, "DRAWS", 100)  # of the diagnosis' intervals

    def make(top_k=4, **changes):
        model = olmoe(
            vocab_size=len(tokenizer),
            max_position_embeddings=1024,
            initializer_range=0.3,
            num_experts_per_tok=top_k,
        )
        settings = Settings(**QUICK | {"routers": ["fixed_p"], "budgets": [2]} | changes)
        files = StudyFiles(tmp_path / "study")
        return Ground(model, tokenizer, settings, files, "toy", progress=False)

    return make


@pytest.fixture(autouse=True)
def _nothing_is_drawn(monkeypatch):
    """That takes most of the time; the figures have tests of their own."""
    monkeypatch.setattr(Figure, "savefig", lambda self, out, **settings: out.write(b"drawn"))


def no_figures(monkeypatch):
    """Parts and reports have empty figures."""
    for module, name in (
        (comparing, "figure"),
        (sweep_run, "figure"),
        (report_parts, "compare_figure"),
        (report_parts, "sweep_figure"),
        (pareto, "figure"),
        (Diagnosis, "figure"),
        (Evaluated, "figure"),
        (Profile, "plot"),
    ):
        monkeypatch.setattr(module, name, lambda *_, **__: Figure())


@pytest.fixture
def figures():
    """The test's figures are made, though not drawn; those of other tests are empty."""


@pytest.fixture(autouse=True)
def _no_figures(request, monkeypatch):
    if "figures" not in request.fixturenames:
        no_figures(monkeypatch)


@pytest.fixture(autouse=True)
def _few_tokens_are_no_news():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the null was fitted to")
        warnings.filterwarnings("ignore", "Ill-conditioned")
        yield


def quiet():
    return Console(file=io.StringIO(), width=100)


def run(made, engine=None):
    """(Results, what the console showed)."""
    console = quiet()
    with Store(made.files.store) as store:
        return study(made, store, engine, console), console.file.getvalue()


def test_a_study_in_python_is_the_same_study(ground, tmp_path, capsys):
    given = ground(parts=["evaluate"])
    folder, texts = tmp_path / "python", demo.heldout_texts()
    settings = QUICK | {"parts": ["evaluate"], "routers": ["fixed_p"], "budgets": [2]}
    found = run_study(given.model, given.tokenizer, folder, texts=texts, **settings)
    assert found.compare is None and (folder / "report.md").is_file()
    expected, _ = run(given)
    kls = [[row["kl"] for row in each.evaluate.rows] for each in (found, expected)]
    assert kls[0] == pytest.approx(kls[1])
    assert "evaluate (part 2 of 2)" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no 'bhh'; the nearest is 'bh'"):
        run_study(given.model, given.tokenizer, folder, routers=["bhh"])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"token": 1024}, "no setting 'token'; the nearest is 'tokens'"),
        ({"documents": []}, "no setting 'documents'"),
        ({"tokens": "1024"}, "tokens: expected a whole number from 2 on, got '1024'"),
        ({"tokens": 0}, "tokens: expected a whole number"),
        ({"seed": -1}, "seed: expected a whole number from 0 on"),
        ({"parts": "sweep"}, "parts: expected a list, got str 'sweep'"),
        ({"parts": None}, "parts: expected a list, got NoneType"),
        ({"routers": [3]}, "routers: expected names, got int"),
        ({"budgets": 4}, "budgets: expected a list, got int"),
        ({"budgets": ["4"]}, "budgets: expected whole numbers, got str"),
    ],
)
def test_settings_in_python_that_are_none(ground, tmp_path, settings, said):
    given = ground(parts=["evaluate"])
    with pytest.raises(TypeError, match=said):
        run_study(given.model, given.tokenizer, tmp_path / "none", **settings)
    assert not (tmp_path / "none").exists()


def test_a_patched_model_is_no_model_to_study(ground, tmp_path):
    given = ground(parts=["evaluate"])
    with patch(given.model), pytest.raises(ValueError, match="patched.*unpatch"):
        run_study(given.model, given.tokenizer, tmp_path / "none")
    assert not (tmp_path / "none").exists()


# ---- the settings ----


def test_budgets_are_half_and_three_quarters_of_what_the_model_takes():
    assert Settings().budgets_for(8) == [4, 6] and Settings().budgets_for(2) == [1]
    assert Settings().budgets_for(4) == [2, 3] and Settings(budgets=[5]).budgets_for(8) == [5]
    assert Settings().budgets_for(1) == []
    with pytest.raises(ValueError, match="from 1 to 8, which the model takes, got 9, 20"):
        Settings(budgets=[4, 9, 20]).budgets_for(8)


@pytest.mark.parametrize("name, given", [("parts", ["swep"]), ("tables", ["long"]), ("parts", [])])
def test_what_is_none_is_said(name, given):
    with pytest.raises(ValueError, match=f"{name}: expected some of .+, got"):
        Settings(**{name: given})


# ---- the plan ----


FORMS = [study_run.Form(*form) for form in study_run.FORMS.values()]


@pytest.fixture
def costs(ground):
    made = ground()
    read = made.heldout.windows, made.passages
    return made, Costs(made.model, made.tokenizer, *read, FORMS, quiet())


def test_a_load_takes_its_tokens_at_the_rate_of_its_kind(costs):
    _, costs = costs
    assert set(costs.rates) == {LOSS, KL, COLLECT, FIT, DECODE, "stock", "stock decode"}
    assert all(rate.at(4) > 0 for rate in costs.rates.values())
    costs.rates = {LOSS: Rate(2.0, 0.5), FIT: Rate(3.0, 0.0)}
    assert costs.seconds(Load(LOSS, 10)) == 10 * (2 + 4 * 0.5)  # the model's own k
    assert costs.seconds(Load(LOSS, 10, 3)) == 10 * (2 + 3 * 0.5)
    assert costs.seconds(Load(FIT, 7, 3)) == 21


def test_a_short_text_is_no_measure_for_long_ones(ground):
    """A pass of a few tokens takes nearly as long as one of many: rates are of a longer window."""
    made = ground()
    short = made.heldout.windows[0]
    short = short._replace(ids=short.ids[:, :3])
    measured = []
    for windows in ([short], [short, *made.calibration.windows]):
        costs = Costs(made.model, made.tokenizer, windows, made.passages, FORMS[:1], quiet())
        measured.append(costs.text.tokens)
    assert measured == [3, max(w.ids.shape[1] for w in made.calibration.windows)]


def test_a_routers_experts_are_what_it_would_choose(costs):
    """Beside the patched model on the same window, whose first layer sees the same."""
    made, costs = costs
    ids = costs.text.windows[0].ids
    assert costs.experts(Load(LOSS, 1, TopK(3))) == 3
    for router in (BH(0.3, max_k=8), BH(0.05, max_k=4)):
        counts = []
        with patch(made.model, router, null=costs.nulls[0]) as handle, torch.no_grad():
            handle.on_routing(lambda layer, routing, c=counts: c.append(routing.counts))
            made.model(input_ids=ids)
        ran = torch.cat(counts).double().mean().item()
        assert costs.experts(Load(LOSS, 1, router, costs.nulls[0])) == pytest.approx(ran, rel=0.1)


def test_the_plan_has_every_cell_and_nothing_is_run(ground):
    made = ground()
    with Store(made.files.store) as store:
        plan = plan_study(made, store, quiet())
        assert store.rows() == []
    assert [part.name for part in plan.parts] == list(PARTS)
    cells = {part.name: part.cells for part in plan.parts}
    # baseline, BH by 2 max_k x 4 alphas, static 1 to 3, 2 routers at 2 budgets
    assert cells["sweep"] == 1 + 8 + 3 + 4
    # 2 layers, static 1 to 4, 2 quantised, 5 controls, 1 router spread in 3 ways, speeds
    assert cells["compare"] == 2 + 4 + 2 + 5 + 3 + 1
    assert cells["evaluate"] == 1 + 1 + 3
    assert all(part.seconds > 0 and part.tokens > 0 for part in plan.parts)
    assert all(part.peak_bytes > 0 for part in plan.parts)
    assert made.nulls == {} and not any((made.files.folder / part).exists() for part in PARTS)
    shown = str(plan)
    assert all(name in shown for name in (*PARTS, "all", "peak memory", "finished"))


def test_times_in_words():
    assert [in_words(s) for s in (3.4, 99, 700, 12345)] == ["3 s", "99 s", "12 min", "3 h 26 min"]


# ---- the run ----


def test_a_study_from_end_to_end_and_again(ground, figures, monkeypatch):
    begun = datetime.now(timezone.utc)
    results, shown = run(ground())
    started = datetime.fromisoformat(results.facts["machine"]["started"])
    assert (started - begun).total_seconds() < 2  # not when all was finished
    folder = ground().files.folder
    page = (folder / "index.html").read_text()
    assert [part["part"] for part in results.facts["parts"]] == list(PARTS)
    assert all(part["failed"] is None for part in results.facts["parts"])
    assert set(results.nulls) == {"efron", "efron on logit", "trimmed"}
    assert len(results.sweep["results"]) == 9
    routers = [cell for cell in results.compare["cells"] if cell["role"] == "router"]
    assert {cell["allocation"] for cell in routers} >= {"equal"}
    for cell in routers:  # as in docs/studies.md
        assert cell["contender"] and cell["budget"] == 2 and cell["kl"] > 0
        assert math.isfinite(cell["effect"]["kl"]["estimate"])
    assert "own routing" in results.evaluate.measured and "bh@2" in results.evaluate.measured
    assert results.profile.facts["steps"] > 0 and len(results.diagnose.to_frame())
    for part in PARTS:
        assert f"{part} (part {PARTS.index(part) + 1} of 6)" in shown
        assert (folder / part).is_dir() and f'href="{part}/' in page
    verdict = shown.partition("The verdict")[2]
    assert "closest to the full model" in verdict and "closest to the full model" in page

    def never(self, cell, step):
        raise AssertionError(f"{cell.name} was run again")

    with Store(folder / "moeprof.sqlite") as store:
        finished = len(store.rows())
        plan = plan_study(ground(), store, quiet())
        assert [part.finished for part in plan.parts] == [part.cells for part in plan.parts]
        assert plan.seconds == 0
    no_figures(monkeypatch)
    works = (Comparison, DiagnosisWork, EvaluationWork, CalibrationWork, ProfileWork, SweepWork)
    for work in works:
        monkeypatch.setattr(work, "run", never)
    again, _ = run(ground(parts=["evaluate"]))  # the others are finished, so it has them, too
    assert again.sweep["results"] == results.sweep["results"] and again.diagnose is not None
    assert again.evaluate.measured == results.evaluate.measured
    assert null_digest(again.nulls) == null_digest(results.nulls)
    with Store(folder / "moeprof.sqlite") as store:
        assert len(store.rows()) == finished


def test_a_file_that_is_gone_or_changed_is_made_again(ground):
    made = ground(parts=["calibrate"])
    first, _ = run(made)
    path = next((made.files.folder / "calibrate").glob("trimmed-*.safetensors"))
    before = path.read_bytes()
    for spoil in (path.unlink, lambda: path.write_bytes(b"")):
        spoil()
        again, _ = run(ground(parts=["calibrate"]))
        assert path.read_bytes() == before
        assert null_digest(again.nulls["trimmed"]) == null_digest(first.nulls["trimmed"])


def test_nulls_are_those_that_are_fitted_one_by_one(ground):
    import moeprof

    made = ground(parts=["calibrate"])
    results, _ = run(made)
    texts = MAKERS["calibrate"](made).work.texts
    for name, kind, score in (
        ("efron on logit", "efron", "logit"),
        ("trimmed", "trimmed", "logprob"),
    ):
        one = moeprof.fit_null(
            made.model, made.tokenizer, texts, kind=kind, score=score, progress=False
        )
        assert null_digest(results.nulls[name]) == null_digest(one)


def test_a_model_that_takes_two_experts_is_compared_with_none(ground):
    """One of two is a budget for evaluate, and none for the table of the comparison."""
    made = ground(parts=["compare", "evaluate"], budgets=None, top_k=2)
    with pytest.raises(ValueError, match="compare: budgets: .+; the report has the other parts"):
        run(made)
    report = (made.files.folder / "report.md").read_text()
    assert "can't be run" in report or "No result: budgets" in report
    assert "bh@1" in report


def test_a_model_that_cannot_be_patched_is_profiled(ground, monkeypatch):
    def refused(*args, **kwargs):
        raise ValueError("no logits")

    made = ground(parts=["profile", "evaluate"])
    monkeypatch.setattr(study_run, "Costs", refused)
    with pytest.MonkeyPatch.context() as patched:
        for part in ("calibrate", "evaluate"):
            patched.setitem(study_run.MAKERS, part, refused)
        with pytest.raises(ValueError, match="calibrate: no logits; evaluate: no logits"):
            run(made)
    assert (made.files.folder / "profile" / "index.html").is_file()
    assert "no logits" in (made.files.folder / "report.md").read_text()


def test_two_studies_with_one_store_have_their_own_files(ground, tmp_path):
    made = ground(parts=["calibrate"])
    run(made)
    other = ground(parts=["calibrate"])
    other.files = StudyFiles(tmp_path / "other", made.files.store)
    results, _ = run(other)
    assert set(results.nulls) == set(study_run.FORMS)
    with Store(made.files.store) as store:
        plan = plan_study(ground(parts=["calibrate"]), store, quiet())
    assert plan.parts[0].is_done


def test_other_settings_in_one_folder_leave_each_other_alone(ground):
    """The nulls of the first are found again after a study with another seed."""
    run(ground(parts=["calibrate"]))
    run(ground(parts=["calibrate"], seed=1))
    with Store(ground().files.store) as store:
        plan = plan_study(ground(parts=["calibrate"]), store, quiet())
    assert plan.parts[0].is_done


def test_what_is_left_of_another_models_study_is_named(ground):
    """Its parts aren't in the report of this one, but their files are beside it."""
    before, _ = run(ground(parts=["evaluate"]))
    results, _ = run(ground(top_k=2, parts=["calibrate"]))
    assert before.facts["beside"] == []
    assert results.evaluate is None and results.facts["beside"] == ["evaluate"]
    said = (ground().files.folder / "report.md").read_text()
    assert says(said, "also in the folder", "evaluate: not of this study, or unfinished")


def test_own_texts_are_named(ground):
    documents = demo.heldout_texts()
    made = ground(parts=["sweep"], documents=documents, sources=["mine.txt"])
    results, _ = run(made)
    assert results.sweep["heldout_source"] == ["mine.txt"]


# ---- what cells take ----


@pytest.mark.parametrize("part", ["sweep", "compare", "diagnose", "evaluate"])
def test_a_cell_reads_as_many_tokens_as_its_load_says(part, ground, costs):
    """Counted at the embedding, over all cells; a budget may take other passes than is usual."""
    made, costs = costs
    made.nulls = dict(zip(study_run.FORMS, costs.nulls, strict=True))
    work = MAKERS[part](made).work
    read = 0

    def count(module, args, output):
        nonlocal read
        read += args[0].numel()

    planned = 0.0
    handle = made.model.get_input_embeddings().register_forward_hook(count)
    try:
        for cell in work.cells:  # of those that can be named
            planned += sum(map(costs.tokens, work.load(cell)))
            work.run(cell, lambda: None)
    finally:
        handle.remove()
    assert 0.75 < read / planned < 1.33


def test_a_part_that_cannot_be_run_does_not_stop_the_others(ground, monkeypatch):
    made, original = ground(parts=["diagnose", "evaluate"]), study_parts.diagnose

    def broken(*args, **kwargs):
        raise ValueError("no such thing")

    monkeypatch.setattr(study_parts, "diagnose", broken)
    with pytest.raises(ValueError, match="diagnose: no such thing; the report has the other parts"):
        run(made)
    report = (made.files.folder / "report.md").read_text()
    assert "no such thing" in report and "bh@2" in report
    monkeypatch.setattr(study_parts, "diagnose", original)
    results, _ = run(ground(parts=["diagnose", "evaluate"]))
    assert results.diagnose is not None and results.sweep is None


def test_interrupted_it_reports_what_is_there_and_goes_on(ground, monkeypatch):
    calls, measure = [], CalibrationWork.run

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    made = ground(parts=["evaluate"])
    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(study_parts, "evaluate", interrupted)
        run(made)
    assert (made.files.folder / "report.md").is_file()

    def counted(self, cell, step):
        calls.append(cell.name)
        return measure(self, cell, step)

    monkeypatch.setattr(CalibrationWork, "run", counted)
    results, _ = run(ground(parts=["evaluate"]))
    assert calls == [] and results.evaluate is not None


# ---- the command ----


def test_the_weights_are_read_once_within_and_again_afterwards():
    model = olmoe()
    with subject.unchanged(model):
        before = subject.model_digest(model)
        with subject.unchanged(model):
            model.lm_head.weight.data += 1
        assert subject.model_digest(model) == before
    assert subject.model_digest(model) != before


def test_a_setting_makes_another_model_and_a_hook_one_that_is_not_kept():
    """What a model gives hangs on more than its weights."""
    model = olmoe()
    block = model.model.layers[0].mlp
    digests = [subject.model_digest(model)]
    model(token_ids(), output_router_logits=True)  # transformers 5 leaves its recorder
    assert subject.model_digest(model) == digests[0]
    keeps_k = block.gate if hasattr(block.gate, "top_k") else block
    for module, name, value in (
        (keeps_k, "top_k", 1),
        (keeps_k, "norm_topk_prob", not keeps_k.norm_topk_prob),
        (block, "adapters", {"a": [1.0], "b": {"c", "d"}}),  # of one's own
    ):
        setattr(module, name, value)
        digests.append(subject.model_digest(model))
    block.gate.__class__ = type("OtherGate", (type(block.gate),), {})
    digests.append(subject.model_digest(model))
    assert len(set(digests)) == 5
    for put_in in (
        lambda: model.lm_head.register_forward_hook(lambda *_: None),
        lambda: setattr(model.lm_head, "forward", lambda x: x),
    ):
        changed = put_in()
        with pytest.raises(ValueError, match="lm_head has a .*can't be told.*without a store"):
            subject.model_digest(model)
        changed and changed.remove()


def test_a_set_among_settings_is_in_the_same_order_in_each_process():
    letters = "abcdefgh"
    expected = f"{{'a': [1.0, {list(letters)!r}]}}"
    assert subject._in_order({"a": [1.0, set(letters)]}) == expected


@pytest.mark.slow
def test_each_adapter_is_another_model():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(olmoe(), peft.LoraConfig(target_modules=["q_proj"], r=2))
    model.add_adapter("b", peft.LoraConfig(target_modules=["q_proj"], r=2))
    digests = {subject.model_digest(model)}
    model.set_adapter("b")
    digests.add(subject.model_digest(model))
    with model.disable_adapter():
        digests.add(subject.model_digest(model))
    assert len(digests) == 3
