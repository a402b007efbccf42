"""Passes of a text through a patched model, and bootstrap intervals over documents."""

import numpy as np
import pytest
import torch
from models import assert_unchanged, gate_logits, olmoe, snapshot, token_ids

import moeprof
from moeprof.measure.bootstrap import are_few, bootstrap
from moeprof.measure.passes import Reference, collect
from moeprof.texts.windows import HeldOut, Window


def text(windows=((0, 9), (0, 7), (1, 5), (2, 12))):
    """HeldOut of random tokens: (document, tokens) a window."""
    pieces = [Window(d, token_ids(1, n, seed=i), n) for i, (d, n) in enumerate(windows)]
    return HeldOut(pieces, [{} for _ in {d for d, _ in windows}])


def test_collect_keeps_what_the_gates_said_and_chose():
    model, heldout = olmoe(), text()
    before = snapshot(model)
    found = collect(model, heldout, [moeprof.TopK(1), moeprof.TopK(3)])
    assert_unchanged(model, before)
    assert found.logits.shape == (2, 33, 8) and found.logits.dtype == np.float32
    assert found.counts.tolist() == [[1] * 33, [3] * 33]
    assert np.bincount(found.documents).tolist() == [16, 5, 12]
    seen = []
    block = model.model.layers[0].mlp
    hook = block.register_forward_hook(lambda m, x, y: seen.append(gate_logits(block, x[0])))
    with torch.no_grad():
        for window in heldout.windows:
            model(input_ids=window.ids)
    hook.remove()
    first = torch.cat([z.reshape(-1, 8) for z in seen])
    np.testing.assert_allclose(found.logits[0], first.numpy(), rtol=1e-5, atol=1e-6)


def test_the_models_own_router_has_no_divergence():
    quality = Reference(olmoe(), text()).measure()
    assert np.abs(quality.kl).max() == 0 and quality.average_k == 2
    assert np.array_equal(quality.agree, quality.predicted)


def test_quality_is_what_torch_says_document_by_document():
    model, heldout = olmoe(), text()
    quality = Reference(model, heldout).measure(moeprof.TopK(1))
    kl, nats, agree = np.zeros(3), np.zeros(3), np.zeros(3)
    for window in heldout.windows:
        with torch.no_grad():
            full = model(input_ids=window.ids).logits[0, :-1].double().log_softmax(-1)
            with moeprof.patch(model, "topk", k=1):
                routed = model(input_ids=window.ids).logits[0, :-1].double().log_softmax(-1)
        d = window.document
        kl[d] += torch.nn.functional.kl_div(routed, full, log_target=True, reduction="sum").item()
        nats[d] += torch.nn.functional.nll_loss(routed, window.ids[0, 1:], reduction="sum").item()
        agree[d] += (full.argmax(-1) == routed.argmax(-1)).sum().item()
    np.testing.assert_allclose(quality.kl, kl, rtol=1e-4)
    np.testing.assert_allclose(quality.nats, nats, rtol=1e-5)
    assert np.array_equal(quality.agree, agree)
    assert quality.predicted.tolist() == [14, 4, 11] and quality.tokens.tolist() == [16, 5, 12]
    assert np.array_equal(quality.experts, quality.tokens)
    assert quality.mean_kl == pytest.approx(kl.sum() / 29, rel=1e-4)


def means(values):
    """The statistic "mean of each row", values (M, D)."""
    return lambda weights: weights @ values.T / weights.sum(1, keepdims=True)


def test_bands_cover_all_at_once_and_intervals_each_alone():
    rng = np.random.default_rng(1)
    inside, together, rounds = 0, 0, 200
    for _ in range(rounds):
        found = bootstrap(means(rng.normal(size=(10, 80))), 80, draws=400, seed=2)
        inside += ((found.low <= 0) & (0 <= found.high)).sum()
        together += ((found.band_low <= 0) & (0 <= found.band_high)).all()
    assert 0.90 <= inside / (10 * rounds) <= 0.97  # 0.95, less what percentiles of 80 lack
    assert 0.88 <= together / rounds <= 0.99


def test_the_error_is_that_of_a_mean():
    values = np.random.default_rng(0).normal(size=(1, 400))
    found = bootstrap(means(values), 400)
    assert found.error[0] == pytest.approx(values.std() / 20, rel=0.06)
    assert found.estimate[0] == pytest.approx(values.mean())


def test_documents_are_drawn_within_their_group():
    values = np.repeat([[0.0, 1.0, 5.0]], 4, axis=1).reshape(1, 12)
    groups = np.repeat([0, 1, 2], 4)
    found = bootstrap(means(values), 12, groups=groups)
    assert found.error[0] == pytest.approx(0, abs=1e-12)  # each group is constant
    assert found.low[0] == found.high[0] == found.estimate[0] == 2
    assert bootstrap(means(values), 12).error[0] > 0.3


def test_a_domain_of_one_document_is_no_domain_of_its_own():
    """Drawn within it, it would seem not to vary: those that are alone are drawn together."""
    values = np.repeat([[0.0, 1.0, 5.0]], 4, axis=1).reshape(1, 12)
    for groups, same in (
        (range(12), [0] * 12),
        ([0] * 4 + [1] * 4 + [2, 3, 4, 5], [0] * 4 + [1] * 4 + [2] * 4),
        ([0] * 6 + [1] * 5 + [2], [0] * 6 + [1] * 6),  # with the smallest other
    ):
        found, wanted = (bootstrap(means(values), 12, groups=each) for each in (groups, same))
        for name in ("error", "low", "high"):
            assert getattr(found, name)[0] == pytest.approx(getattr(wanted, name)[0], abs=0.2), name
    assert bootstrap(means(np.ones((1, 1))), 1, groups=[0]).error[0] == 0


@pytest.mark.parametrize("domains, each", [(20, 2), (4, 3), (1, 10), (4, 32)])
def test_intervals_of_small_groups_hold_what_they_say(domains, each):
    """In 95 % of 300 texts; drawn as many as there are, of 20 x 2 it would be 81 %."""
    rng, held, all_held, rounds = np.random.default_rng(3), 0, 0, 300
    count, groups = domains * each, np.repeat(np.arange(domains), each)
    for number in range(rounds):
        values = rng.normal(size=(10, count))
        found = bootstrap(means(values), count, groups=groups, draws=400, seed=number)
        held += ((found.low <= 0) & (0 <= found.high)).sum()
        all_held += ((found.band_low <= 0) & (0 <= found.band_high)).all()
    assert 0.91 <= held / (10 * rounds) <= 0.98
    assert all_held / rounds >= 0.88


def test_a_small_group_keeps_its_part_of_the_text():
    """Fewer are drawn of each group than it has; what they weigh adds up to the group."""
    values = np.random.default_rng(0).normal(np.repeat([0.0, 1.0], [2, 30]), 0.01)[None]
    found = bootstrap(means(values), 32, groups=np.repeat([0, 1], [2, 30]))
    assert found.low[0] < found.estimate[0] < found.high[0]
    assert found.high[0] - found.low[0] < 0.01


def test_few_documents_have_wider_bands_and_are_called_few():
    values = np.random.default_rng(0).normal(size=(20, 5))
    few, many = (bootstrap(means(np.tile(values, n)), 5 * n) for n in (1, 40))
    few_q, many_q = ((each.band_high - each.estimate) / each.error for each in (few, many))
    assert few_q.min() > 1.6 * many_q.max()  # 1.42 in each interval, more in several
    assert are_few(2) and are_few(9) and not are_few(10) and not are_few(1)
    assert are_few(12, [0] * 4 + [1] * 4 + [2] * 4) is False
    assert are_few(8, [*"aabbccdd"]) and not are_few(20, [n // 2 for n in range(20)])


def test_differences_are_paired():
    a = np.random.default_rng(0).normal(size=50)
    found = bootstrap(means(np.stack([a, a + 1, np.ones(50)])), 50)
    pair = bootstrap(lambda w: means(np.stack([a + 1]))(w) - means(np.stack([a]))(w), 50)
    assert found.error[0] > 0.1 and pair.error[0] < 1e-12
    assert found.band_low[2] == found.band_high[2] == 1
