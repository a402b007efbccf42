"""Fewer experts in one layer: against the stock model with its own top_k changed."""

import numpy as np
import pytest
import torch
import transformers
from models import V5, assert_unchanged, blocks, olmoe, snapshot
from scipy.stats import norm, t

from moeprof import demo
from moeprof.studies.ablation import COLUMNS, _frame, ablation_figure, layer_ablation

pytestmark = pytest.mark.slow  # test_every_study runs what they are made of on both versions

TEXTS = [document.text[:700] for document in demo.heldout_texts()[::16]]


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(demo.PATH, local_files_only=True)


def model_of(tokenizer, **changes):
    return olmoe(vocab_size=len(tokenizer), max_position_embeddings=1024, **changes)


def stock_nats(model, tokenizer, texts=TEXTS):
    """(D,) nats and (D,) predicted tokens of a model as it is."""
    nats, predicted = [], []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1].double()
        loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
        nats.append(loss.item())
        predicted.append(ids.shape[1] - 1)
    return np.array(nats), np.array(predicted)


def by_brute_force(model, tokenizer, layer, k):
    """As `stock_nats`, with the model's own top_k of one layer changed."""
    block = blocks(model)[layer]
    router = block.gate if V5 else block
    own, router.top_k = router.top_k, k
    try:
        return stock_nats(model, tokenizer)
    finally:
        router.top_k = own


@pytest.mark.parametrize("norm", [False, True])
def test_as_the_stock_model_with_another_top_k(tokenizer, norm):
    model = model_of(tokenizer, num_experts_per_tok=4, norm_topk_prob=norm, attention_dropout=0.5)
    model.train()  # with dropout, which may not come into the losses
    before = snapshot(model)
    frame = layer_ablation(model, tokenizer, TEXTS, progress=False)
    assert_unchanged(model, before)
    model.eval()
    assert tuple(frame.columns) == COLUMNS
    assert [*zip(frame["layer"], frame["k"], strict=True)] == [
        (layer, k) for layer in (0, 1) for k in (3, 2, 1)
    ]
    assert set(frame["name"]) == {"model.layers.0.mlp.gate", "model.layers.1.mlp.gate"}
    assert set(frame["block"]) == {"model.layers.0.mlp", "model.layers.1.mlp"}
    whole, predicted = stock_nats(model, tokenizer)
    assert frame.attrs["loss"] == pytest.approx(whole.sum() / predicted.sum(), rel=1e-5)
    assert frame.attrs["own_k"] == [4, 4] and frame.attrs["documents"] == len(TEXTS)
    changes = []
    for row in frame.itertuples():
        nats, _ = by_brute_force(model, tokenizer, row.layer, row.k)
        changes.append((nats - whole).sum() / predicted.sum())
        assert row.loss == pytest.approx(nats.sum() / predicted.sum(), rel=1e-5)
        assert row.loss_change == pytest.approx(changes[-1], abs=1e-5)
        assert row.low < row.loss_change < row.high
    assert np.ptp(changes) > 1e-3  # so that 1e-5 tells them apart


def by_loop(change, predicted):
    """The interval of sum(change) / sum(predicted) over D documents, D - 1 of which are drawn."""
    count = len(change)
    drawn = np.random.default_rng(0).integers(0, count, (4000, count - 1))
    means = change[drawn].sum(1) / predicted[drawn].sum(1)
    level = norm.cdf(t.ppf(0.025, count - 1))
    return np.quantile(means, [level, 1 - level])


def test_intervals_are_paired_bootstrap_of_documents(tokenizer):
    model = model_of(tokenizer)
    frame = layer_ablation(model, tokenizer, TEXTS, ks=[1], seed=3, draws=4000)
    whole, predicted = stock_nats(model, tokenizer)
    for row in frame.itertuples():
        change = by_brute_force(model, tokenizer, row.layer, 1)[0] - whole
        low, high = by_loop(change, predicted)
        assert row.low == pytest.approx(low, abs=0.1 * (high - low))
        assert row.high == pytest.approx(high, abs=0.1 * (high - low))


def test_long_documents_weigh_more_in_the_interval():
    """Of each draw the nats over the tokens drawn, not over the tokens of all documents."""
    rng = np.random.default_rng(0)
    predicted = np.array([10.0, 400, 20, 30, 10, 300, 15, 25])
    whole = 3 * predicted
    changed = (whole + predicted * (0.5 + rng.normal(0, 0.02, 8)))[None]
    row = _frame([(0, 1)], ["mlp"], ["mlp.gate"], changed, whole, predicted, 1, 4000).iloc[0]
    low, high = by_loop(changed[0] - whole, predicted)
    assert row["low"] == pytest.approx(low, abs=0.1 * (high - low))
    assert row["high"] == pytest.approx(high, abs=0.1 * (high - low))


def test_given_ks_win_and_the_own_k_changes_nothing(tokenizer):
    frame = layer_ablation(model_of(tokenizer), tokenizer, TEXTS[:3], ks=[2, 8, 2])
    assert frame["k"].tolist() == [8, 2, 8, 2]
    own = frame[frame["k"] == 2]
    assert (own[["loss_change", "low", "high"]] == 0).all(axis=None)
    assert (frame[frame["k"] == 8]["loss_change"] != 0).all()


def test_default_ks(tokenizer):
    from moeprof.studies.ablation import _ks

    assert _ks(None, 8, 64) == [7, 6, 4, 1] and _ks(None, 6, 64) == [5, 4, 2, 1]
    assert _ks(None, 2, 8) == [1] and _ks(None, 1, 8) == []


def test_one_document_has_no_interval(tokenizer):
    frame = layer_ablation(model_of(tokenizer), tokenizer, TEXTS[:1])
    assert frame[["low", "high"]].isna().all(axis=None) and frame["loss_change"].notna().all()
    ablation_figure(frame).canvas.draw()


def test_a_figure_of_the_changes(tokenizer):
    frame = layer_ablation(model_of(tokenizer, num_experts_per_tok=4), tokenizer, TEXTS)
    axis = ablation_figure(frame).axes[0]
    lines = {c.get_label(): c.lines[0].get_ydata() for c in axis.containers}
    assert list(lines) == ["top-3", "top-2", "top-1"]
    for k in (1, 2, 3):
        expected = frame[frame["k"] == k]["loss_change"]
        np.testing.assert_array_equal(lines[f"top-{k}"], expected)
    assert "nats" in axis.get_ylabel() and f"{len(TEXTS)} documents" in axis.texts[0].get_text()


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"ks": [9]}, ValueError, "ks: expected integers from 1 to 8, got 9"),
        ({"ks": [0]}, ValueError, "from 1 to 8, got 0"),
        ({"ks": [1.5]}, ValueError, "got 1.5"),
        ({"ks": []}, ValueError, "at least one number"),
        ({"texts": "one"}, TypeError, "got one string"),
        ({"texts": []}, ValueError, "at least one text"),
        ({"texts": ["a"]}, ValueError, "no document has two tokens"),
    ],
)
def test_errors_leave_the_model(tokenizer, options, error, words):
    model = model_of(tokenizer)
    before = snapshot(model)
    with pytest.raises(error, match=words):
        layer_ablation(model, tokenizer, **({"texts": TEXTS} | options))
    assert_unchanged(model, before)


def test_models_that_cannot_be_ablated(tokenizer):
    with pytest.raises(ValueError, match="No routers found in Linear"):
        layer_ablation(torch.nn.Linear(2, 2), tokenizer, TEXTS)
    with pytest.raises(ValueError, match="one expert per token"):
        layer_ablation(model_of(tokenizer, num_experts_per_tok=1), tokenizer, TEXTS)
    model = model_of(tokenizer)
    blocks(model)[1].experts.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="model.layers.1.mlp: can't run on moeprof's path"):
        layer_ablation(model, tokenizer, TEXTS)
