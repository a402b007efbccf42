"""SimpleBenchmark: what it measures, and that the model stays as it was."""

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from captured import assert_as_before, capture
from models import choose, generate, olmoe, wrap_gates
from scipy.stats import binom
from torch import nn
from wording import says

import moeprof
from moeprof.measure import snapshot as undo
from moeprof.studies.benchmark import SimpleBenchmark, measure
from moeprof.studies.benchmark.measure import Prompt, Seen, Times
from moeprof.studies.benchmark.result import BenchmarkComparison, Measurement, median_interval

pytestmark = pytest.mark.slow  # the tests of the profiler and of decoding run on both versions


class Tokenizer:
    """A token for each character."""

    def __call__(self, text, return_tensors=None):
        ids = [2 + ord(letter) % 60 for letter in text]
        return {"input_ids": torch.tensor([ids]) if return_tensors else ids}


TEXTS = {"short": ["hello", "ab"], "long": ["a longer text than that", "x"]}
ALL = [text for texts in TEXTS.values() for text in texts]


def benchmark(model=None, **options):
    options = {"max_new_tokens": 3, "repeats": 2} | options
    return SimpleBenchmark(olmoe() if model is None else model, Tokenizer(), **options)


def loss_of(model, texts):
    """Nats per predicted token of the prompts."""
    nats, predicted = 0.0, 0
    for text in texts:
        ids = Tokenizer()(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1].double()
        nats += nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        predicted += ids.shape[1] - 1
    return nats / predicted


@pytest.mark.parametrize("linears", (False, True))
def test_a_quantised_model_is_measured_and_stays(linears):
    model = olmoe()
    moeprof.quantize(model, 4, linears=linears, progress=False)
    before = capture(model)
    result = benchmark(model).run_config("q4", TEXTS, lambda m: moeprof.patch(m, "topk", k=1))
    assert_as_before(model, before)
    with moeprof.patch(model, "topk", k=1):
        expected = loss_of(model, ALL)
    assert result.get_summary()["loss"] == pytest.approx(expected, rel=1e-5)
    assert expected != pytest.approx(loss_of(model, ALL), rel=1e-5)


def test_a_run_of_the_stock_model():
    model = olmoe()
    model.train()
    before = capture(model)
    calls = []
    result = benchmark(model, warmup=1).run_config(
        "stock", TEXTS, lambda m: m.register_forward_hook(lambda *_: calls.append(1))
    )
    assert_as_before(model, before)
    model.eval()
    # The uncounted pass, the warm-up and two rounds: a prefill and 3 steps for each text.
    assert len(calls) == (1 + 1 + 2) * len(ALL) * (1 + 3)
    assert result.times.prefill.shape == (2, 4) and result.times.decode.shape == (2, 4, 3)
    assert (result.times.prefill > 0).all() and (result.times.decode > 0).all()
    own = result.get_summary()
    assert own["loss"] == pytest.approx(loss_of(model, ALL), rel=1e-5)
    assert own["loss_short"] == pytest.approx(loss_of(model, TEXTS["short"]), rel=1e-5)
    for text, generated in zip(ALL, result.seen.generated, strict=True):
        ids = Tokenizer()(text, return_tensors="pt")["input_ids"]
        expected = generate(model, ids, 3, eos_token_id=-1)
        assert generated == expected[0, ids.shape[1] :].tolist()
    experts = {name: value for name, value in own.items() if name.startswith("experts")}
    assert len(experts) == 9 and set(experts.values()) == {2.0}
    assert (own["texts"], own["prompt_tokens"], own["new_tokens"]) == (4, 31, 3)
    stored = json.loads(json.dumps(result.to_dict()))
    assert stored["categories"] == ["short", "short", "long", "long"]
    assert np.shape(stored["decode_seconds"]) == (2, 4, 3) and stored["machine"]["threads"]
    assert "experts/token" in repr(result) and "<table" in result._repr_html_()


def recorded(model, configure, texts, new_tokens):
    """{(category, phase): mean experts per token}, from a callback of a patched model."""
    means, found = {}, []
    handle = configure(model)
    handle.on_routing(lambda layer, routing: found.append((routing.expert_ids >= 0).sum(1)))
    for category, members in texts.items():
        for text in members:
            ids = Tokenizer()(text, return_tensors="pt")["input_ids"]
            whole = generate(model, ids, new_tokens + 1, eos_token_id=-1)
            assert whole.shape[1] == ids.shape[1] + new_tokens + 1
            layers = len(handle.layers)
            means.setdefault((category, "prefill"), []).extend(found[:layers])
            means.setdefault((category, "decode"), []).extend(found[layers:])
            found.clear()
    handle.unpatch()
    return {key: torch.cat(counts).float().mean().item() for key, counts in means.items()}


def skipping(model):
    wrap_gates(model, choose)
    return moeprof.patch(model)


@pytest.mark.parametrize(
    "configure",
    [
        lambda m: moeprof.patch(m, "top_p", P=0.7),
        skipping,
    ],
    ids=["top_p", "middleware"],
)
def test_experts_of_a_patched_model_by_category_and_phase(configure):
    model = olmoe()
    own = benchmark(model).run_config("p", TEXTS, configure).get_summary()
    expected = recorded(copy.deepcopy(model), configure, TEXTS, 3)
    for (category, phase), mean in expected.items():
        assert own[f"experts_per_token_{phase}_{category}"] == pytest.approx(mean, rel=1e-6)
    tokens = {"prefill": 31, "decode": 12}
    total = sum(own[f"experts_per_token_{phase}"] * number for phase, number in tokens.items()) / 43
    assert own["experts_per_token"] == pytest.approx(total, rel=1e-12)
    assert len(set(expected.values())) > 2


class Clock:
    """Time that passes with the tokens of the model's calls only: a second each."""

    def __init__(self, monkeypatch, model):
        self.now, self.factor = 0.0, 1.0
        monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: self.now))
        model.register_forward_pre_hook(self._pass, with_kwargs=True)

    def _pass(self, module, args, kwargs):
        self.now += self.factor * kwargs["input_ids"].numel()


def test_times_are_of_the_calls(monkeypatch):
    model = olmoe()
    clock = Clock(monkeypatch, model)
    bench = benchmark(model, repeats=5)
    own = bench.run_config("a", ALL).get_summary()
    assert own["prefill_ms"] == own["prefill_ms_lower"] == 1e3 * 31 / 4
    assert own["decode_ms"] == own["decode_ms_upper"] == 1e3
    assert own["tokens_per_s"] == own["prefill_tokens_per_s"] == 1
    slow = bench.run_config("b", ALL, lambda m: setattr(clock, "factor", 1.25)).get_summary()
    assert slow["prefill_ms"] == 1.25e3 * 31 / 4


def test_compare_runs_all_in_turn_and_undoes_each(monkeypatch):
    model = olmoe()
    model.train()
    before = capture(model)
    clock = Clock(monkeypatch, model)
    order = []

    def configuring(name, factor):
        def configure(model):
            assert not model.training and model.config.num_experts_per_tok == 2
            model.config.num_experts_per_tok = 1
            with torch.no_grad():
                model.lm_head.weight.mul_(2)
            clock.factor = factor
            order.append(name)

        return configure

    bench = benchmark(model, repeats=6)
    for name, factor in (("first", 2.0), ("second", 3.0), ("third", 2.0)):
        bench.run_config(name, ALL, configuring(name, factor))
    assert order == ["first", "second", "third"]
    compared = bench.compare()
    turns = [order[i : i + 3] for i in range(3, len(order), 3)]
    assert [sorted(turn) for turn in turns] == [["first", "second", "third"]] * 7
    assert len(set(map(tuple, turns))) > 1  # the order is drawn
    model._forward_pre_hooks.clear()
    model._forward_pre_hooks_with_kwargs.clear()
    assert_as_before(model, before)
    assert all(result.times.prefill.shape == (6, 4) for result in compared.results)
    frame = compared.to_frame().set_index("config")
    assert frame["prefill_ratio"].tolist() == frame["decode_ratio"].tolist() == [1, 1.5, 1]
    assert frame["decode_ms"].tolist() == [2000, 3000, 2000]
    assert frame["decode_differs"].tolist() == [False, True, False]
    assert frame["token_agreement"].tolist() == [1, 1, 1]
    assert frame["loss_change"].tolist() == [0, 0, 0]
    assert says(compared, "second, decode: 1.500 times", "first (1.500 to 1.500)")
    assert says(compared, "third, prefill: no difference from first", "noise")


def measurement(name, prefill, decode, nats=10.0, generated=(1, 2)):
    """R rounds of one text of five tokens; prefill, decode: (R,) ms."""
    times = Times(
        np.array(prefill)[:, None] / 1e3, np.repeat(np.array(decode), 2).reshape(-1, 1, 2) / 1e3
    )
    seen = Seen(np.array([[4.0, 3.0]]), np.array([nats]), [list(generated)])
    machine = {"cpu": "a CPU", "features": ["avx2"], "threads": 2}
    return Measurement(name, [Prompt("simple", "text", torch.ones(1, 5))], seen, times, machine)


def test_ratios_are_of_the_same_round():
    drift = np.array([10, 20, 15, 30, 12.0])  # the machine's, common to a round
    first = measurement("first", drift, [10, 10.1, 10.2, 9.9, 10])
    other = measurement("other", 0.5 * drift, [9.9, 10.3, 10.2, 9.8, 10.1], 11.0, (1, 3))
    row = BenchmarkComparison([first, other]).to_frame().iloc[1]
    assert row["prefill_ratio"] == row["prefill_ratio_low"] == row["prefill_ratio_high"] == 0.5
    ratios = np.sort(np.array([9.9, 10.3, 10.2, 9.8, 10.1]) / [10, 10.1, 10.2, 9.9, 10])
    assert row["decode_ratio"] == pytest.approx(np.median(ratios))
    assert [row["decode_ratio_low"], row["decode_ratio_high"]] == pytest.approx(
        [ratios[0], ratios[-1]]
    )
    assert not row["decode_differs"]
    assert row["loss_change"] == pytest.approx(1 / 4) and row["token_agreement"] == 0.5
    assert row["experts_per_token"] == pytest.approx((5 * 4 + 2 * 3) / 7)


def test_what_is_within_the_noise():
    steady, noisy = [10, 10.01, 10.02, 10.01, 10], [8, 12, 10, 13, 9]
    slower = measurement("slower", [10.3] * 5, [1.03 * ms for ms in noisy])
    compared = BenchmarkComparison([measurement("first", steady, noisy), slower])
    row = compared.to_frame().iloc[1]
    # 3 % in every round: more than one machine varies by, less than the other.
    assert row["prefill_differs"] and not row["decode_differs"] and row["decode_ratio_low"] > 1
    few = BenchmarkComparison(
        [measurement(n, [t] * 4, [t] * 4) for n, t in (("a", 1.0), ("b", 2.0))]
    )
    assert few.to_frame()[["prefill_ratio_low", "decode_ratio_high"]].isna().all(axis=None)
    assert not few.to_frame()["decode_differs"].any()
    assert says(few, "4 rounds", "noise", "it takes 5")


def test_a_comparison_fits_100_columns_and_a_page():
    rng = np.random.default_rng(0)
    long = "a name of a configuration that says all of it, <with alpha .05 and max_k 64>"
    compared = BenchmarkComparison(
        [measurement(name, *rng.uniform(1e3, 1e5, (2, 5))) for name in ("a", long)]
    )
    shown = repr(compared)
    assert max(map(len, shown.splitlines())) <= 100 and "simple" in shown
    page = compared._repr_html_()
    assert page.count("<table") == 3 and "&lt;with alpha" in page and "<with" not in page


@pytest.mark.parametrize("size", [1, 4, 5, 8, 9, 20, 101])
def test_the_interval_of_a_median(size):
    values = np.random.default_rng(size).permutation(size).astype(float)
    low, high = median_interval(values)
    if size < 5:
        return np.testing.assert_equal((low, high), (np.nan, np.nan))
    rank = int(low)  # the rank-th of the sorted ones, from 0
    assert high == size - 1 - rank
    assert 1 - 2 * binom.cdf(rank, size, 0.5) >= 0.9 > 1 - 2 * binom.cdf(rank + 1, size, 0.5)


@pytest.mark.slow
def test_errors_of_configure_and_of_the_run_leave_the_model(memory):
    def fails(model):
        model.config.num_experts_per_tok = 1
        moeprof.patch(model)
        raise KeyError("mine")

    def fails_later(model):
        model.register_forward_hook(lambda *_: 1 / 0)

    model = olmoe()
    before, bench = capture(model), benchmark(model)
    for configure, error in ((fails, KeyError), (fails_later, ZeroDivisionError)):
        with pytest.raises(error):
            bench.run_config("bad", ALL, configure)
        assert_as_before(model, before)
    assert bench.results == {}
    bench.run_config("good", ALL)
    bench.run_config(
        "bad",
        ALL,
        lambda m: m.register_forward_hook(lambda *_: 1 / 0 if "bad" in bench.results else None),
    )
    with pytest.raises(ZeroDivisionError):
        bench.compare()
    assert_as_before(model, before)


def double_the_head(model):
    with torch.no_grad():
        model.lm_head.weight.mul_(2)


def test_weights_lost_without_memory_are_named(monkeypatch):
    monkeypatch.setattr(undo, "_fits", lambda tensors: False)
    with pytest.raises(RuntimeError, match="not put back: lm_head.weight"):
        benchmark().run_config("a", ALL, double_the_head)


@pytest.mark.slow
def test_runs_that_make_no_sense():
    bench = benchmark()
    with pytest.raises(ValueError, match="no configuration yet"):
        bench.compare()
    for name in ("", 3):
        with pytest.raises(TypeError, match="name: expected a text"):
            bench.run_config(name, ALL)
    with pytest.raises(TypeError, match="configure: expected a function"):
        bench.run_config("a", ALL, 3)
    bench.run_config("a", ALL)
    with pytest.raises(ValueError, match="'a' was run already"):
        bench.run_config("a", ALL)
    bench.run_config("b", ALL[:2])
    with pytest.raises(ValueError, match="'b' was run on other texts than 'a'"):
        bench.compare()
    assert "a, b" in repr(bench)
    with pytest.raises(ValueError, match="No routers found in Linear"):
        benchmark(nn.Linear(2, 2)).run_config("a", ALL)


@pytest.mark.parametrize(
    "texts, error, words",
    [
        ("", ValueError, "the text '' is empty"),
        (b"text", TypeError, "a list of texts or a dict .* got bytes"),
        ({"a": {"b": "text"}}, TypeError, r"texts\['a'\]: expected a text or a list .* got dict"),
        (None, TypeError, "got NoneType"),
        ([], ValueError, "texts: expected at least one text"),
        ({}, ValueError, "texts: expected at least one text"),
        ({"a": "x", "b": ""}, ValueError, r"texts\['b'\]\[0\]: the text '' is empty"),
        ({"a": ["x"], "b": []}, ValueError, r"texts\['b'\]: expected at least one text"),
        (["x", ""], ValueError, r"texts\[1\]: the text '' is empty"),
        (["x", 3], TypeError, r"texts\[1\]: expected a text, got int"),
    ],
)
def test_texts_that_are_none(texts, error, words):
    with pytest.raises(error, match=words):
        benchmark().run_config("a", texts)


@pytest.mark.slow
@pytest.mark.parametrize(
    "texts, prompts",
    [
        ("ab", [(None, "ab")]),
        (["ab", "c"], [(None, "ab"), (None, "c")]),
        ({"short": "ab", "long": "abcdef"}, [("short", "ab"), ("long", "abcdef")]),
        ({"short": "ab", "long": ["cd", "ef"]}, [("short", "ab"), ("long", "cd"), ("long", "ef")]),
    ],
)
def test_a_text_a_list_and_a_dict_of_either(texts, prompts):
    bench = benchmark(warmup=0, repeats=1, max_new_tokens=1)
    measured = bench.run_config("a", texts)
    assert [(prompt.category, prompt.text) for prompt in measured.prompts] == prompts
    bench.run_config("b", texts)
    assert "b" in str(bench.compare())


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens: expected at least 1, got 0"),
        ({"warmup": -1}, ValueError, "warmup: expected at least 0"),
        ({"repeats": True}, TypeError, "repeats: expected an integer"),
        ({"repeats": 1.5}, TypeError, "repeats: expected an integer"),
    ],
)
def test_settings_out_of_range(options, error, words):
    with pytest.raises(error, match=words):
        benchmark(**options)


def test_neither_model_nor_tokenizer():
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got str"):
        SimpleBenchmark("model", Tokenizer())
    with pytest.raises(TypeError, match="tokenizer: expected a callable"):
        SimpleBenchmark(olmoe(), None)
    with pytest.raises(TypeError, match="tokenizer: expected .* got OlmoeForCausalLM"):
        SimpleBenchmark(olmoe(), olmoe())
