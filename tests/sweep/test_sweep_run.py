"""What one run measures: every number against one computed in another way."""

import math

import numpy as np
import pytest
import torch
import transformers
from models import assert_unchanged, snapshot
from sweep_setting import NEW_TOKENS, PROMPTS, measured

import moeprof
from moeprof import demo
from moeprof.measure.generate import greedy
from moeprof.studies.sweep import COLUMNS, Configuration, Experiment, configurations
from moeprof.studies.sweep import runner as runner_module


def counts_by_definition(experiment, configuration, tokens):
    """Experts of each layer and token (L,T): BH in NumPy on the patched model's router logits.

    tokens: for each prompt what was generated; the last one is never fed back. One array a prompt.
    """
    counts = []
    for text, new in zip(experiment.prompts, tokens, strict=True):
        ids = experiment.tokenizer(text)["input_ids"] + new[:-1]
        with (
            moeprof.patch(experiment.model, configuration.router(2), null=experiment.null),
            torch.no_grad(),
        ):
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
    result = measured(experiment, configuration)
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

        def parameters(self):
            return iter([torch.zeros(1)])

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
    measured(experiment, configurations(8, 2)[1])
    assert_unchanged(experiment.model, before)
    monkeypatch.setattr(runner_module, "evaluate", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        measured(experiment, configurations(8, 2)[1])
    assert_unchanged(experiment.model, before)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(prompts=(), complexities=()), "prompts: expected at least one"),
        (dict(complexities=("simple",)), "expected one for each of the 3 prompts, got 1"),
        (dict(complexities=("simple", "hard", None)), "got 'hard'"),
        (dict(new_tokens=0), "max_new_tokens: expected an integer of at least 1, got 0"),
        (dict(new_tokens=1024), "with 1024 more .* longer than the 1024 positions"),
    ],
)
def test_bad_input_to_an_experiment(experiment, change, message):
    fields = {name: getattr(experiment, name) for name in Experiment.__dataclass_fields__}
    with pytest.raises(ValueError, match=message):
        Experiment(**fields | change)


def test_run_configuration_is_the_sweeps_own(experiment, baseline, bh):
    arguments = dict(
        prompts=list(experiment.prompts),
        prompt_complexities=list(experiment.complexities),
        max_new_tokens=NEW_TOKENS,
        model=experiment.model,
        tokenizer=experiment.tokenizer,
        null=experiment.null,
        texts=demo.heldout_texts()[:1],
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
