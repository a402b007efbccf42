"""The studies on families whose rule is no plain softmax: they see what the model chooses by."""

import warnings

import every
import numpy as np
import pytest
import torch
import zoo
from models import V5
from test_every_family import OWN_RULE, PATCHED

import moeprof
from moeprof import demo
from moeprof.measure.passes import collect
from moeprof.models.blocks import experts_of, find_blocks
from moeprof.models.decoding import keeps_all
from moeprof.studies.comparison.controls import Oracle, with_counts
from moeprof.studies.diagnosis import ablation
from moeprof.studies.diagnosis.ablation import changed_routers
from moeprof.studies.diagnosis.run import diagnose
from moeprof.texts.windows import heldout_windows

# {family: settings}; the sliding windows are shorter than the texts
FAMILIES = {
    "qwen2_moe": {},
    "deepseek_v3": {},
    "ernie4_5_moe": {},
    "mixtral": dict(sliding_window=16),
    "qwen3_moe": {},
    "gpt_oss": dict(sliding_window=16),
    "aria": {},
}
# {family: bits}: the same of models whose experts are quantised
QUANTISED = {"olmoe": 8, "deepseek_v3": 4}
TEXTS = demo.calibration_texts()[:4]


@pytest.fixture(scope="module", params=[*FAMILIES, *(f"{n}, quantised" for n in QUANTISED)])
def case(request):
    return request.param.split(", ")


@pytest.fixture(scope="module")
def name(case):
    return case[0]


@pytest.fixture(scope="module")
def tokenizer(_demo):
    return _demo[1]


@pytest.fixture(scope="module")
def model(case, name, tokenizer):
    pad, options = tokenizer.pad_token_id or 0, FAMILIES.get(name, {})
    model = zoo.build(name, vocab_size=len(tokenizer), pad_token_id=pad, **options)
    for block in find_blocks(model):  # a bias that says something, and leaves no ties at 0
        for key, buffer in [*block.module.named_buffers(), *block.module.named_parameters()]:
            if key.endswith("e_score_correction_bias"):
                with torch.no_grad():
                    buffer.copy_(torch.linspace(0, 0.2, buffer.numel()).view_as(buffer))
    if len(case) > 1:
        moeprof.quantize(model, QUANTISED[name], progress=False)
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
            null, model, tokenizer, texts=TEXTS, calibration=[], positions=3, tokens=300,
            draws=20, progress=False,
        )  # fmt: skip
        texts = [text.text[:300] for text in TEXTS[:2]]
        frame = moeprof.layer_ablation(model, tokenizer, texts, progress=False)
    assert found is not None and len(frame)


# Whose own decoding differs from a forward pass over all tokens: {family: why}
DECODES_OTHERWISE = {} if V5 else {"phimoe": "transformers forgets the window of its full cache"}
DECODED = [f for f in PATCHED if f not in OWN_RULE and f not in DECODES_OTHERWISE]


@pytest.mark.parametrize("family", DECODED)
def test_a_changed_expert_is_judged_by_what_its_position_sees(family):
    """Whatever the model keeps of the tokens before: as if all of them ran again, uncached."""
    model = every.build(family)
    if not model.can_generate():
        pytest.skip(f"{type(model).__name__} has no logits")
    ids = torch.randint(3, every.VOCABULARY, (1, 33), generator=torch.Generator().manual_seed(0))
    places = np.array([1, 20, 30])  # the last two see all of a window of 16, and more
    routers = changed_routers(model, moeprof.TopK(2), None)
    with moeprof.patch(model, routers), torch.inference_mode():
        cache = ablation.prefill(model, ids[:, :-1], routers)
        counts = np.stack([router.seen[1][places] for router in routers], axis=1)
        rows, label = ablation.plan(places, counts, np.zeros_like(counts) + every.E - 1)
        losses = ablation.changed_losses(model, ids, cache, rows, routers)
        for n in range(0, len(losses), 4):
            place = rows.place[n]
            for router in routers:
                router.changes = rows.take([n]).at_end_of(place + 1)
            logits = model(input_ids=ids[:, : place + 1], use_cache=False).logits[0, -1]
            loss = torch.nn.functional.cross_entropy(logits, ids[0, place + 1])
            assert losses[n] == pytest.approx(float(loss), abs=3e-5), label[:, n]
    assert np.abs(losses[3:] - losses[label[0, 3:]]).max() > 1e-2  # the changes do something


def test_which_caches_are_shared():
    """Sliding windows as long as they are not full; none that holds more than tokens."""
    ids = torch.arange(3, 23)[None]
    found = {}
    for family in ("olmoe", "gpt_oss", "minimax", "qwen3_next"):
        cache = ablation.prefill(every.build(family), ids[:, :10], [])
        found[family] = keeps_all(cache, 5), keeps_all(cache, 6)
    assert found == {
        "olmoe": (True, True),
        "gpt_oss": (True, False),  # a window of 16
        "minimax": (False, False),
        "qwen3_next": (False, False),
    }


def test_a_sweep_names_its_configurations_by_the_models_own_k(model):
    from moeprof.studies.sweep import configurations

    num_experts, k = experts_of(model)
    names = [c.name for c in configurations(num_experts, k)]
    assert names[0] == f"topk_{k}_baseline"
