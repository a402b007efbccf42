"""A budget of experts per token: solved, split over the layers, reported."""

import copy
import io
import itertools
import math
import pickle
import warnings
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import models  # noqa: E402
from nulls import null_of, random_logits  # noqa: E402

from moeprof import demo  # noqa: E402
from moeprof.backends.spec import PLAIN  # noqa: E402
from moeprof.measure.passes import collect  # noqa: E402
from moeprof.models.blocks import model_norm  # noqa: E402
from moeprof.routers import BH, REGISTRY, Router, TopK, WeightedBH, make_router  # noqa: E402
from moeprof.studies import budget  # noqa: E402
from moeprof.studies.budget import search, setting  # noqa: E402
from moeprof.texts.windows import heldout_windows  # noqa: E402

pytestmark = pytest.mark.slow  # test_every_study meets a budget on both versions

TOKENS = 1500  # of the demo's text: enough for the averages to be nearly continuous


@pytest.fixture(scope="module")
def null():
    return demo.null("efron")


@pytest.fixture(scope="module")
def text(loaded):
    return heldout_windows(loaded[1], demo.calibration_texts(), TOKENS)


@pytest.fixture(scope="module")
def stock(loaded, text):
    return collect(loaded[0], text)


def solvable():
    """The routers that have a continuous main parameter."""
    return [cls for _, cls in sorted(REGISTRY.items()) if cls is not TopK]


# ---- the search ----


@pytest.mark.parametrize("bounds", [(0, 1), (0, math.inf), (-math.inf, math.inf), (2, 5)])
def test_a_scale_goes_there_and_back_and_stays_inside(bounds):
    scale = search.Scale(*bounds)
    low, high = scale.ends
    values = [scale.value(position) for position in np.linspace(low, high, 501)]
    assert all(bounds[0] < value < bounds[1] for value in values)
    assert values == sorted(values)
    for position in (-20.0, -1.0, 0.0, 0.3, 20.0):
        assert scale.position(scale.value(position)) == pytest.approx(position, abs=1e-6)


@given(st.floats(-30, 30), st.floats(0.1, 20), st.floats(0.01, 0.99), st.floats(-30, 30))
def test_a_smooth_average_takes_few_evaluations(centre, width, part, guess):
    def average(position):
        return 1 + 7 / (1 + math.exp(-(position - centre) / width))

    target = 1 + 7 * part
    root = search.solve(average, target, (-300, 300), guess, 0.001)
    assert root.jump is None and abs(root.average - target) <= 0.001
    assert average(root.position) == root.average
    assert root.evaluations <= 30


@given(
    st.lists(st.tuples(st.integers(-50, 50), st.floats(0, 3)), min_size=1, max_size=6),
    st.floats(0.5, 20),
    st.floats(-5, 5),
)
def test_of_a_staircase_the_nearest_step_is_found(steps, target, guess):
    def average(position):
        return 1 + sum(height for at, height in steps if position >= at / 10)

    root = search.solve(average, target, (-10, 10), guess, 0.01)
    levels = {average(at / 10) for at, _ in steps} | {1.0}
    nearest = min(abs(level - target) for level in levels)
    assert abs(root.average - target) <= max(nearest, 0.01) + 1e-9
    assert root.evaluations <= search.EVALUATIONS
    if nearest > 0.01:
        below, above = root.jump
        assert not below < root.average < above


@pytest.mark.parametrize("target", [0.1, 99])
def test_beyond_the_ends_the_end_is_the_answer(target):
    root = search.solve(lambda position: 2 + position / 10, target, (-10, 10), 0, 0.01)
    assert (root.position, root.average) in [(-10, 1), (10, 3)] and root.jump is not None


@pytest.mark.parametrize("cls", solvable())
def test_every_router_is_solved_on_stored_logits(cls):
    logits = np.stack([random_logits(1500, 32, seed=seed) for seed in range(2)])
    router, null = cls(max_k=8), None
    if router.wants_null:
        needed = logits + 4 * (np.arange(32) < 3)  # so that pi0 < 1: e-values are of what is left
        null = router.adapt(null_of(*needed, kind="efron", score="centred"))
    logits[:, :, :6] += 8  # what stands out from the null
    stored = setting.Stored(router, logits, null, [PLAIN] * len(logits))
    low, high = np.mean([stored.averages(end) for end in stored.ends], axis=1)
    assert 1 == low < high <= 8
    for part in (0.1, 0.5, 0.9):
        target = low + part * (high - low)
        root = stored.solve(target, range(2), 0.0, 1e-3)
        one = replace(router, **{cls.main: stored.value(root.position)})
        counts = [
            one.count_tokens(z, null and null.layer(layer))[0] for layer, z in enumerate(logits)
        ]
        assert np.mean(counts) == pytest.approx(root.average)
        if root.jump is None:
            assert abs(root.average - target) <= 1e-3
        else:
            below, above = root.jump
            assert below < target < above, "a jump that isn't one"


def stand_in(main, bounds, increasing, counts):
    """A Router with one parameter whose count_tokens is `counts`; it is not registered."""

    def count_tokens(self, logits, null, rule=PLAIN):
        found = np.clip(counts(self, logits), 1, 8)
        return found, found

    body = {
        "__annotations__": {main: float},
        main: None,
        "name": "stand-in",
        "main": main,
        "main_range": bounds,
        "increasing": increasing,
        "count_tokens": count_tokens,
    }
    body["__module__"] = Router.__module__  # none of a user
    cls = dataclass(frozen=True)(type("StandIn", (Router,), body))
    del REGISTRY["stand-in"]
    return cls()


def ranked(logits):
    z = -np.sort(-logits.astype(float), axis=1)
    p = np.exp(z - z[:, :1])
    return z, p / p.sum(axis=1, keepdims=True)


def min_p(self, logits):
    p = ranked(logits)[1]
    return (p > self.t * p[:, :1]).sum(axis=1)


def entropy(self, logits):
    p = ranked(logits)[1]
    return np.ceil(self.c * np.exp(-(p * np.log(p)).sum(axis=1)))


def gap(self, logits):
    z = ranked(logits)[0]
    with np.errstate(over="ignore"):
        return (z[:, :8] - z[:, 1:9] + self.c * np.arange(1, 9)).argmax(axis=1) + 1


@pytest.mark.parametrize(
    "router",
    [
        stand_in("t", (0.0, 1.0), False, min_p),
        stand_in("c", (0.0, math.inf), True, entropy),
        stand_in("c", (-math.inf, math.inf), True, gap),
    ],
    ids=["falling", "half open", "unbounded"],
)
def test_ranges_and_directions(router):
    logits = np.stack([random_logits(5000, 32, seed=seed) for seed in range(2)])
    stored = setting.Stored(router, logits, None, [PLAIN] * len(logits))
    low, high = (stored.averages(end).mean() for end in stored.ends)
    assert (low, high) == (1, 8)
    for target in (1.2, 3, 6.9):
        root = stored.solve(target, range(2), 0.0, 0.01)
        assert root.jump is None and abs(root.average - target) <= 0.01 and root.evaluations < 25
        value = stored.value(root.position)
        one = replace(router, **{stored.name: value})
        again = np.mean([one.count_tokens(z, None)[0] for z in logits])
        assert again == pytest.approx(root.average)
        assert stored.position(value) == pytest.approx(root.position)


# ---- set_budget ----


@pytest.mark.parametrize("cls", solvable())
def test_the_budget_is_met_in_the_patched_model(cls, loaded, null, text, stock):
    router = cls(max_k=8)
    before = models.snapshot(loaded[0])
    low, high = budget.reach(router, stock, null).mean(axis=0)
    target = low + 0.4 * (high - low)
    found = budget.set_budget(router, loaded[0], text, target=target, null=null)
    models.assert_unchanged(loaded[0], before)
    assert found.reached and len(found.passes) <= 4
    again = collect(loaded[0], text, found.router, null=found.null)
    assert again.counts.mean() == pytest.approx(found.average_k)
    assert abs(again.counts.mean() / target - 1) <= 0.02
    np.testing.assert_allclose(again.counts.mean(axis=1), found.by_layer)
    np.testing.assert_allclose(found.passes[found.chosen].found, found.by_layer)


def test_a_budget_for_each_layer(loaded, null, text):
    target = [6.0, 3.0, 2.5, 4.25]
    found = budget.set_budget(BH(max_k=8), loaded[0], text, target=target, null=null)
    again = collect(loaded[0], text, found.router, null=null)
    np.testing.assert_allclose(again.counts.mean(axis=1), target, rtol=0.02)
    assert len(found.parameter) == 4 and len(set(found.parameter)) == 4


def test_a_neighbouring_budget_starts_from_the_last(loaded, null, text):
    first = budget.set_budget(BH(max_k=8), loaded[0], text, target=4, null=null)
    windows = []
    found = budget.set_budget(
        BH(max_k=8),
        loaded[0],
        text,
        target=5,
        null=null,
        start=first,
        step=lambda: windows.append(1),
    )
    assert found.average_k == pytest.approx(5, rel=0.01)
    assert len(found.passes) <= 2 and len(windows) == len(found.passes) * len(text.windows)


def test_outside_the_reach_the_interval_is_named(loaded, null, text, stock):
    low, high = budget.reach(BH(max_k=8), stock, null).mean(axis=0)
    assert low == 1 and 7.9 < high <= 8
    for target in (0.5, 8.5):
        named = rf"from 1 to {high:.6g} experts.*not {target}"
        with pytest.raises(budget.BudgetError, match=named):
            budget.set_budget(BH(max_k=8), loaded[0], text, target=target, null=null)
    with pytest.raises(budget.BudgetError, match="in layer 2 on this text, not 9"):
        budget.set_budget(BH(max_k=8), loaded[0], text, target=[4, 4, 9, 4], null=null)


def test_a_jump_is_said_not_chased(loaded, text):
    """Equal logits give every token the same count: BH's average is 1 or E and nothing between."""
    model, name = models.olmoe(), "normal"
    for block in models.blocks(model):
        block.gate.weight.data.zero_()
    window = text.windows[0]._replace(ids=models.token_ids(1, 40))
    flat = text._replace(windows=[window], documents=text.documents[:1])
    with pytest.warns(UserWarning, match="jumps from 1 to 8|1 instead of 4|8 instead of 4"):
        found = budget.set_budget(BH(max_k=8), model, flat, target=4, null=name)
    assert not found.reached and len(found.passes) <= 2
    assert found.average_k in (1, 8) and found.passes[0].jumps == {None: (1, 8)}


def test_passes_that_never_agree_end_with_a_warning(loaded, null, text):
    with pytest.warns(UserWarning, match="experts per token after 2 passes"):
        found = budget.set_budget(
            BH(max_k=8), loaded[0], text, target=4, null=null, tolerance=1e-9, max_passes=2
        )
    assert abs(found.average_k / 4 - 1) < 0.01 and not found.reached and len(found.passes) == 2


@pytest.mark.parametrize(
    "target, error",
    [
        (0, ValueError),
        (-1, ValueError),
        (math.nan, ValueError),
        (math.inf, ValueError),
        ("6", TypeError),
        (None, TypeError),
        (True, TypeError),
        ([4, 4], ValueError),
    ],
)
def test_targets_that_are_none(loaded, null, text, target, error):
    with pytest.raises(error, match="average_k"):
        budget.set_budget(BH(), loaded[0], text, target=target, null=null)


def test_the_model_is_as_it_was_after_an_exception(loaded, null, text):
    before = models.snapshot(loaded[0])

    def stop():
        raise KeyboardInterrupt

    for start in (0, len(text.windows)):
        left = itertools.count(-start)
        with pytest.raises(KeyboardInterrupt):
            budget.set_budget(
                BH(),
                loaded[0],
                text,
                target=4,
                null=null,
                step=lambda left=left: stop() if next(left) >= 0 else None,
            )
        models.assert_unchanged(loaded[0], before)


# ---- sensitivity and split ----


def test_sensitivity_is_nothing_at_the_models_own_k(loaded, text):
    few = text._replace(windows=text.windows[:1])
    own = model_norm(loaded[0])[1]
    found = budget.sensitivity(loaded[0], few, [1, 4, own, own + 1])
    assert found.shape == (4, 4)
    assert (found[:, 2] == 0).all() and (found[:, [0, 1, 3]] > 0).all()
    assert (found[:, 0] > found[:, 1]).all()


@settings(deadline=None)
@given(st.data())
def test_allocation_is_as_by_brute_force(data):
    layers = data.draw(st.integers(1, 4))
    ks = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=5, unique=True))
    cost = np.array(
        [
            [data.draw(st.one_of(st.floats(0, 1), st.just(math.inf))) for _ in ks]
            for _ in range(layers)
        ]
    )
    total = data.draw(st.integers(0, 20))
    every = [
        c
        for c in itertools.product(range(len(ks)), repeat=layers)
        if sum(ks[i] for i in c) == total
    ]
    best = min((sum(cost[layer, i] for layer, i in enumerate(c)) for c in every), default=math.inf)
    if not math.isfinite(best):
        with pytest.raises(ValueError, match=f"sums to {total}"):
            budget.allocate(cost, ks, total)
        return
    found = budget.allocate(cost, ks, total)
    assert found.sum() == total
    assert sum(cost[i, ks.index(k)] for i, k in enumerate(found)) == pytest.approx(best)


@given(
    st.floats(0, 1), st.lists(st.tuples(st.floats(1, 3), st.floats(0, 5)), min_size=1, max_size=5)
)
def test_a_split_keeps_the_budget_and_the_reach(part, ends):
    reach = np.array([[low, low + width] for low, width in ends])
    cost = np.exp(-np.arange(8) / np.arange(1, len(reach) + 1)[:, None])
    low, high = reach.mean(axis=0)
    average = low + part * (high - low)
    share = budget.split(cost, range(1, 9), reach, average)
    assert share.mean() == pytest.approx(average)
    assert (share >= reach[:, 0] - 1e-9).all() and (share <= reach[:, 1] + 1e-9).all()


def test_a_split_is_whole_where_it_can_be():
    cost = np.array([[4, 1, 0.5, 0], [1, 0.9, 0.8, 0]])
    reach = np.array([[1.0, 4.0], [1.0, 4.0]])
    assert budget.split(cost, range(1, 5), reach, 1.5).tolist() == [2, 1]
    assert budget.split(cost, range(1, 5), reach, 1.625).tolist() == [2.25, 1]


# ---- with_budget ----


def tuned(router, loaded, average_k, **options):
    options = {"tokens": 2500, "progress": False} | options
    few = demo.calibration_texts()[::2]  # of each domain
    return router.with_budget(*loaded, few, average_k, **options)


def test_with_budget_reports_what_it_did(loaded, null):
    before = models.snapshot(loaded[0])
    plain = BH(max_k=8)
    router = tuned(plain, loaded, 4.0, null=null, heldout=demo.heldout_texts()[::2])
    models.assert_unchanged(loaded[0], before)
    report = router.budget
    assert plain.budget is None and type(router) is BH and router == replace(router)
    assert hash(router) == hash(replace(router)) and router.alpha == report.parameter
    assert copy.deepcopy(router).budget.parameter == router.alpha
    assert abs(report.calibration.average_k / 4 - 1) <= 0.02
    errors = math.hypot(report.calibration.error, report.heldout.error)
    assert abs(report.heldout.average_k - 4) <= 0.02 * 4 + 4 * errors
    assert 0 < report.heldout.error < 0.2
    heldout = heldout_windows(loaded[1], demo.heldout_texts()[::2], 2500)
    assert report.heldout.average_k == pytest.approx(
        collect(loaded[0], heldout, router, null=null).counts.mean()
    )
    for shown in (repr(report), report._repr_html_()):
        assert "held-out" in shown and f"{router.alpha:.6g}" in shown
    assert max(map(len, repr(report).split("\n"))) <= 100


@pytest.mark.parametrize(
    "name, average_k", [("fixed_p", 2.5), ("min_p", 4), ("local_fdr", 2.5), ("gap_ratio", 4)]
)
def test_the_promise_on_held_out_text(name, average_k, loaded, null):
    router = REGISTRY[name](max_k=8)
    options = {"null": null} if router.wants_null else {}
    report = tuned(router, loaded, average_k, tokens=6000, **options).budget
    assert report.passes[-1].jumps == {} and report.note == ""
    assert abs(report.calibration.average_k / average_k - 1) <= 0.02
    errors = math.hypot(report.calibration.error, report.heldout.error)
    assert abs(report.heldout.average_k - average_k) <= 0.02 * average_k + 4 * errors


def test_the_report_as_tables(loaded, null):
    from rich.console import Console

    console = Console(record=True, width=100, file=io.StringIO())
    tuned(BH(max_k=8), loaded, 4.0, null=null, tokens=1000).budget.print(console)
    shown = console.export_text()
    assert "Passes of the calibration text" in shown and "Experts per token by layer" in shown


def test_a_fifth_is_set_aside_by_domain():
    from moeprof.studies.budget import report

    documents = demo.calibration_texts()
    kept, aside = report._texts(documents, None)
    assert len(kept) + len(aside) == len(documents) and len(aside) == len(documents) // 5
    assert {text.domain for text in aside} == {document.domain for document in documents}
    assert not {text.name for text in kept} & {text.name for text in aside}
    assert report._texts(documents, None) == (kept, aside)
    assert list(map(len, report._texts(["a", "b"], None))) == [1, 1]


def test_with_budget_by_layer(loaded, null, monkeypatch):
    monkeypatch.setattr("moeprof.studies.budget.report.SENSITIVITY_TOKENS", 400)
    router = tuned(BH(max_k=8), loaded, 4.0, per_layer=True, null=null)
    report = router.budget
    assert report.targets.sum() == pytest.approx(16) and len(report.parameter) == 4
    np.testing.assert_allclose(report.calibration.by_layer, report.targets, rtol=0.02)
    assert report.sensitivity.shape == (4, 8) and (report.sensitivity[:, 7] == 0).all()
    assert report.targets[0] == report.targets.max()  # the demo's first layer needs the most
    assert type(router) is BH and router.alpha == report.parameter
    assert "target" in repr(report) and "by layer" in repr(report)


def test_top_k_above_the_default_limit(loaded, text):
    found = budget.set_budget(TopK(8), loaded[0], text, target=[20, 8, 17, 8])
    assert found.by_layer.tolist() == [20, 8, 17, 8] and found.router.k == (20, 8, 17, 8)


def test_top_k_takes_whole_numbers(loaded, monkeypatch):
    monkeypatch.setattr("moeprof.studies.budget.report.SENSITIVITY_TOKENS", 300)
    assert tuned(TopK(8), loaded, 6, tokens=300).k == 6
    with pytest.raises(budget.BudgetError, match="nearest to 5.5 are 5 and 6"):
        tuned(TopK(8), loaded, 5.5, tokens=300)
    with pytest.raises(budget.BudgetError, match="nearest to 5.6 are 5.5 and 5.75"):
        tuned(TopK(8), loaded, 5.6, per_layer=True, tokens=300)
    router = tuned(TopK(8), loaded, 5.5, per_layer=True, tokens=300)
    assert router.budget.calibration.by_layer.tolist() == router.budget.targets.tolist()
    assert sum(router.budget.parameter) == 22


def test_arguments_are_checked_before_any_text_is_run(loaded, null):
    class Untouchable:
        def __call__(self, *args, **options):
            raise AssertionError("the text was run")

    def call(router=None, texts=("one text", "another"), average_k=4.0, **options):
        (router or BH()).with_budget(
            loaded[0], Untouchable(), texts, average_k, **{"null": null, **options}
        )

    for average_k in (0, -1, math.nan, math.inf):
        with pytest.raises(ValueError, match="average_k"):
            call(average_k=average_k)
    for average_k in ("4", None, [4, 4, 4, 4]):
        with pytest.raises(TypeError, match="average_k"):
            call(average_k=average_k)
    with pytest.raises(TypeError, match="list of texts"):
        call(texts="one text")
    with pytest.raises(TypeError, match=r"texts\[1\]"):
        call(texts=["one", 2])
    for texts in ([], ["", " "], ["only one"]):
        with pytest.raises(ValueError, match="texts"):
            call(texts=texts)
    with pytest.raises(ValueError, match="heldout"):
        call(heldout=[])
    with pytest.raises(ValueError, match="norm"):
        call(norm="other")
    with pytest.raises(ValueError, match="null: given"):
        call(router=TopK(4))
    with pytest.raises(ValueError, match="max_k"):
        call(router=BH(max_k=99))
    with pytest.raises(ValueError, match="two tokens"):
        BH().with_budget(*loaded, ["a", "b"], null=null)


def test_without_a_null_there_is_one_warning(loaded):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tuned(BH(max_k=8), loaded, 4.0, tokens=1000)
    about = [w for w in caught if "calibrate" in str(w.message) or "null" in str(w.message)]
    assert len(about) == 1 and about[0].filename == __file__


# ---- the report on a router ----


@pytest.mark.parametrize("router", [BH(0.3), TopK(4), TopK((2, 4)), WeightedBH(0.3, v=[1, 1])])
def test_the_report_goes_with_the_router_that_it_is_of(router):
    report = SimpleNamespace(router=repr(router))
    tuned = replace(router, budget=report)
    assert tuned.budget is report and replace(tuned).budget is report
    assert pickle.loads(pickle.dumps(tuned)).budget == report
    assert tuned == router and hash(tuned) == hash(router) and repr(tuned) == repr(router)
    assert router.budget is None and "budget" not in repr(tuned)


def test_the_report_does_not_speak_of_another_router():
    tuned = replace(BH(0.3), budget=SimpleNamespace(router=repr(BH(0.3))))
    changes = [{"alpha": 0.2}, {"min_k": 2}, {"max_k": 4}, {"temperature": 2.0}]
    assert [replace(tuned, **change).budget for change in changes] == [None] * 4
    of_layers = TopK((2, 4))
    tuned = replace(of_layers, budget=SimpleNamespace(router=repr(of_layers)))
    assert tuned.budget is not None and tuned.at(0, 2).budget is None
    with pytest.raises(TypeError, match="unknown parameters.*budget"):
        make_router("bh", budget=4)
