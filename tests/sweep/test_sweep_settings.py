"""Which configurations a sweep has, and the held-out text they are measured on."""

import pytest

from moeprof import demo
from moeprof.studies.sweep import Configuration, configurations, dropped_max_ks
from moeprof.texts.windows import WINDOW, heldout_windows, spread


def test_the_21_configurations_of_the_promise():
    alphas = {0.01: "001", 0.05: "005", 0.10: "010", 0.20: "020"}
    expected = [("topk_8_baseline", "topk", None, 8)]
    for max_k in (4, 8, 16, 32, 64):
        for alpha, digits in alphas.items():
            expected.append((f"bh_k{max_k}_a{digits}", "bh", alpha, max_k))
    found = configurations(64, 8)
    assert [(c.name, c.routing_type, c.alpha, c.max_k) for c in found] == expected
    assert len(found) == 21
    assert dropped_max_ks(64) == []


def test_alphas_that_round_alike_have_names_of_their_own():
    found = configurations(64, 8, alphas=(0.02, 0.025, 0.25, 0.2, 1e-5), max_ks=(8,))[1:]
    assert [c.name for c in found] == [
        "bh_k8_a002",
        "bh_k8_a0025",
        "bh_k8_a025",
        "bh_k8_a020",
        "bh_k8_a000001",
    ]
    assert [c.alpha for c in found] == [0.02, 0.025, 0.25, 0.2, 1e-5]


def test_a_small_model_loses_what_it_has_no_experts_for():
    found = configurations(8, 2)
    assert found[0] == Configuration("topk_2_baseline", "topk", None, 2)
    assert {c.max_k for c in found[1:]} == {4, 8}
    assert len(found) == 9
    assert dropped_max_ks(8) == [16, 32, 64]


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(routing_type="top", alpha=None, max_k=2), "routing_type must be"),
        (dict(routing_type="bh", alpha=None, max_k=2), "alpha belongs to"),
        (dict(routing_type="topk", alpha=0.1, max_k=2), "alpha belongs to"),
        (dict(routing_type="bh", alpha=0.1), "max_k is missing"),
    ],
)
def test_a_configuration_that_says_too_little_or_too_much(fields, message):
    with pytest.raises(ValueError, match=message):
        Configuration(name="mine", **fields)


def test_windows_are_the_documents_text_and_nothing_else(tokenizer):
    document = demo.heldout_texts()[0]
    heldout = heldout_windows(tokenizer, [document], 10**6)
    ids = tokenizer(document.text, verbose=False)["input_ids"]
    assert heldout.tokens == len(ids)
    assert sorted(w.ids.shape[1] for w in heldout.windows)[1:] == [WINDOW] * (len(ids) // WINDOW)
    pieces = [ids[start : start + WINDOW] for start in range(0, len(ids), WINDOW)]
    assert sorted(w.ids[0].tolist() for w in heldout.windows) == sorted(pieces)
    firsts = sum(len(tokenizer.decode(piece[:1]).encode()) for piece in pieces)
    predicted = sum(window.num_bytes for window in heldout.windows)
    assert predicted + firsts == len(document.text.encode())


def test_windows_are_spread_over_domains_and_documents(tokenizer):
    heldout = heldout_windows(tokenizer, demo.heldout_texts(), 32768)
    assert 32768 <= heldout.tokens < 32768 + WINDOW
    domains = [heldout.documents[w.document]["domain"] for w in heldout.windows]
    counts = [domains.count(domain) for domain in set(domains)]
    assert max(counts) - min(counts) <= 1
    assert len(heldout.documents) == min(len(heldout.windows), len(demo.heldout_texts()))


def test_calibration_and_heldout_text_share_no_document():
    calibration = {document.text for document in demo.calibration_texts()}
    assert not calibration & {document.text for document in demo.heldout_texts()}


def test_spread_takes_turns_and_stops_at_the_budget():
    pieces = {"a": [["a1"] * 3, ["a2"] * 3], "b": [["b1"] * 2]}
    taken = spread(pieces, len, 8)
    assert sorted(taken) == ["a1", "a2", "b1", "b1"]
    assert [piece[0] for piece in taken] == ["a", "b", "a", "b"]
    assert len(spread(pieces, len, 10**6)) == 8
    assert taken == spread(pieces, len, 8)
