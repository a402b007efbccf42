"""The studies on families whose rule is no plain softmax: they see what the model chooses by."""

import warnings

import numpy as np
import pytest
import torch
import zoo

import moeprof
from moeprof import demo
from moeprof.measure.passes import collect
from moeprof.models.blocks import experts_of, find_blocks
from moeprof.studies.comparison.controls import Oracle, with_counts
from moeprof.studies.diagnosis.ablation import changed_routers
from moeprof.studies.diagnosis.run import diagnose
from moeprof.texts.windows import heldout_windows

FAMILIES = ("qwen2_moe", "deepseek_v3", "ernie4_5_moe", "mixtral")
TEXTS = demo.calibration_texts()[:12]


@pytest.fixture(scope="module", params=FAMILIES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def tokenizer(_demo):
    return _demo[1]


@pytest.fixture(scope="module")
def model(name, tokenizer):
    pad = tokenizer.pad_token_id or 0
    model = zoo.build(name, vocab_size=len(tokenizer), pad_token_id=pad)
    for block in find_blocks(model):  # a bias that says something
        for key, buffer in [*block.module.named_buffers(), *block.module.named_parameters()]:
            if key.endswith("e_score_correction_bias"):
                with torch.no_grad():
                    buffer.copy_(torch.linspace(-0.1, 0.1, buffer.numel()).view_as(buffer))
    return model


@pytest.fixture(scope="module")
def null(model, tokenizer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a small text
        return moeprof.fit_null(model, tokenizer, [t.text for t in TEXTS], progress=False)


@pytest.fixture(scope="module")
def text(tokenizer):
    return heldout_windows(tokenizer, TEXTS, 300, window=48)


def test_what_a_router_sees_is_what_the_model_chooses_by(model, text, null):
    """Its own choice has the largest choice logits among what a token may use, in each layer."""
    chosen = []
    with moeprof.patch(model) as handle, torch.no_grad():
        handle.on_routing(lambda layer, routing: chosen.append((layer, routing.expert_ids)))
        model.base_model(input_ids=text.windows[0].ids, use_cache=False)
    passed = collect(model, text)
    assert len(passed.rules) == len(find_blocks(model)) == len(chosen)
    for layer, ids in chosen:
        z = torch.from_numpy(passed.logits[layer][: len(ids)])
        if passed.rules[layer].groups == 1:
            best = z.topk(ids.shape[1]).indices
            assert torch.equal(best.sort(1).values, ids.long().sort(1).values)
    null.check(model)
    assert null.counts.sum() > 0


def test_a_budget_is_met_by_the_patched_model(model, tokenizer, null):
    k = 1.6
    router = moeprof.BH(max_k=3).with_budget(
        model, tokenizer, TEXTS, average_k=k, null=null, tokens=1500, progress=False
    )
    assert abs(router.budget.average_k - k) <= 0.011 * k


def test_controls_and_changed_routers_give_the_models_own_output(model, text):
    k = find_blocks(model)[0].top_k
    own = moeprof.TopK(k)
    ids = text.windows[0].ids
    counts = np.full((len(find_blocks(model)), ids.numel()), k, np.int32)
    rules = [block.rule() for block in find_blocks(model)]
    norm = (
        "sum" if find_blocks(model)[0].family.settings(find_blocks(model)[0].module)[1] else "none"
    )
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        ways = {
            "with_counts": with_counts(own, counts, rules, null=None, norm=norm, top_k=k),
            "changed": changed_routers(model, own, None),
        }
        for way, routers in ways.items():
            with moeprof.patch(model, routers):
                got = model(input_ids=ids).logits
            assert (got - expected).abs().max() < 1e-4 * expected.abs().max(), way
        with Oracle(model) as oracle, moeprof.patch(model, oracle.routers(np.zeros(len(counts)))):
            got = model(input_ids=ids).logits
        assert (got - expected).abs().max() < 1e-4 * expected.abs().max()


def test_diagnose_and_layer_ablation_run(model, tokenizer, null):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = diagnose(
            null, model, tokenizer, texts=TEXTS, calibration=[], positions=3, tokens=600,
            draws=20, progress=False,
        )  # fmt: skip
        frame = moeprof.layer_ablation(model, tokenizer, TEXTS[:2], progress=False)
    assert found is not None and len(frame)


def test_a_sweep_names_its_configurations_by_the_models_own_k(model):
    from moeprof.studies.sweep import configurations

    num_experts, k = experts_of(model)
    names = [c.name for c in configurations(num_experts, k)]
    assert names[0] == f"topk_{k}_baseline"
