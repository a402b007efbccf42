"""Routers at an equal budget: the texts, and routings that no router would choose."""

from collections import Counter

import numpy as np
import pytest
import torch
from models import V5, assert_unchanged, expert_weights, olmoe, snapshot, token_ids

import moeprof
from moeprof import demo
from moeprof.backends.spec import PLAIN
from moeprof.measure.passes import Reference, collect
from moeprof.studies.comparison import runner
from moeprof.studies.comparison.contenders import CONTENDERS, Nulls, popularity
from moeprof.studies.comparison.controls import (
    Oracle,
    random_counts,
    reweigh,
    shuffled,
    threshold_for,
    with_counts,
)
from moeprof.studies.comparison.plan import plan_tables
from moeprof.studies.comparison.splits import Splits, demo_documents, make_splits, split_documents
from moeprof.studies.comparison.work import Comparison
from moeprof.studies.engine.engine import Listener
from moeprof.studies.engine.staged import run_stages
from moeprof.texts.windows import HeldOut, Window

pytestmark = pytest.mark.slow  # test_every_study runs what they are made of on both versions


def text(windows=((0, 12), (0, 12), (1, 12), (2, 9)), domains=("a", "a", "b")):
    pieces = [Window(d, token_ids(1, n, seed=i), n) for i, (d, n) in enumerate(windows)]
    tokens = [sum(n for d, n in windows if d == index) for index in range(len(domains))]
    pairs = zip(domains, tokens, strict=True)
    return HeldOut(pieces, [{"domain": domain, "tokens": size} for domain, size in pairs])


def run_here(work, step=lambda: None):
    """All its cells in this process, without a store."""
    done = lambda cell, result, ran: work.found.update({cell.name: result})  # noqa: E731
    run_stages(work, None, Listener(done=done, step=step))


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


@pytest.mark.slow
def test_windows_are_one_of_each_document():
    tokenizer = demo.load()[1]
    splits = make_splits(tokenizer, demo_documents())
    for part, documents in ((splits.budget, 64), (splits.test, 128)):
        assert len(part.windows) == len(part.documents) == documents
        assert {window.ids.shape[1] for window in part.windows} == {128}
    small = make_splits(tokenizer, demo_documents(), tokens=1024)
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


@pytest.mark.slow
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
    nulls = Nulls(model, None, [], {"efron": "normal"})
    plans = plan_tables(4, 12, ["reduction"], [2])
    contenders = [c for c in CONTENDERS if c.name in ("bh", "top_p")]
    made = Comparison(model, Splits([], budget, test), nulls, contenders, plans, [])
    run_here(made)
    wanted = {"collect", "find", "sensitivity", "set_budget"}
    assert {name for name, read in seen if read is budget} == wanted
    assert {name for name, read in seen if read is not budget} == {"Reference"}
    assert all(
        len(c["by_document"]["kl"]) == 3 for c in made.rows()["cells"] if c["status"] == "measured"
    )


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
    routers = with_counts(router, counts, [PLAIN] * len(counts), null=null, norm=norm, top_k=2)
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
    routers = with_counts(
        router, dealt, [PLAIN] * len(dealt), null=moeprof.null.NORMAL, norm="none", top_k=2
    )
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


def test_popularity_is_how_often_the_model_takes_an_expert():
    model = olmoe()
    passed = collect(model, text())
    weights = popularity(passed, 2)
    np.testing.assert_allclose(weights.mean(1), 1)
    top = np.argsort(-passed.logits[1], axis=1)[:, :2]
    expected = np.bincount(top.ravel(), minlength=8) * 8 / top.size
    np.testing.assert_allclose(weights[1], expected)


@pytest.mark.slow
def test_nulls_are_fitted_in_one_pass(loaded):
    model, tokenizer = loaded
    texts = demo.calibration_texts()[:6]
    given = Nulls(model, tokenizer, texts, {"efron": "normal"})
    calls = []
    handle = model.model.register_forward_hook(lambda *_: calls.append(1))
    try:
        assert given.get("efron") == "normal" and given.get(None) is None and not calls
        trimmed, logit = given.get("trimmed"), given.get("efron on logit")
    finally:
        handle.remove()
    words = [text.text for text in texts]
    assert len(calls) == sum(-(-len(tokenizer(text)["input_ids"]) // 512) for text in words)
    again = moeprof.fit_null(model, tokenizer, words, kind="efron", score="logit", progress=False)
    assert (again.counts == logit.counts).all() and (again.largest == logit.largest).all()
    assert (trimmed.kind, trimmed.score) == ("trimmed", "logprob")
