"""moeprof evaluate: what it measures against transformers and NumPy, its statistics, its files."""

import json
import math
import re

import numpy as np
import pytest
import torch
from letters import Letters
from models import assert_unchanged, olmoe, snapshot
from wording import says

import moeprof
from moeprof import demo
from moeprof.cli import main
from moeprof.measure import passes
from moeprof.studies.configuration import OWN
from moeprof.studies.evaluation.measure import Evaluation, Protocol, evaluation_text, protocol_for
from moeprof.studies.evaluation.plots import figure
from moeprof.texts.documents import Document
from moeprof.texts.windows import heldout_windows

LENGTHS = (61, 16, 40, 3, 17, 5)


def documents():
    rng = np.random.default_rng(0)
    return [
        Document("ab"[i % 2], f"d{i}", "".join(map(chr, rng.integers(32, 94, n))), "xy"[i // 3])
        for i, n in enumerate(LENGTHS)
    ]


@pytest.fixture(scope="module")
def model():
    return olmoe(max_position_embeddings=1024)


def measured(model, context, stride, *routers, **options):
    """[what `measure` gives] of all tokens of the documents, in their order."""
    text = evaluation_text(Letters(), documents(), Protocol(context, stride), 10**6)
    evaluation = Evaluation(model, text, text)
    assert [d["name"] for d in text.documents] == [f"d{i}" for i in range(len(LENGTHS))]
    return [evaluation.measure(router, **options) for router in routers]


def sliding(model, ids, context, stride):
    """(nats, tokens scored) as in "Perplexity of fixed-length models" of transformers' docs."""
    total, count, before = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + context, len(ids))
        piece = torch.tensor([ids[begin:end]])
        targets = piece.clone()
        targets[:, : -(end - before)] = -100
        scored = int((targets[:, 1:] != -100).sum())
        if scored:
            with torch.no_grad():
                total += model(piece, labels=targets).loss.item() * scored
        count, before = count + scored, end
        if end == len(ids):
            break
    return total, count


@pytest.mark.parametrize(("context", "stride"), [(16, 16), (16, 5), (16, 15), (512, 512)])
def test_nats_are_those_of_transformers_sliding_window(model, context, stride):
    own, routed = measured(model, context, stride, None, moeprof.TopK(2))
    for i, document in enumerate(documents()):
        nats, count = sliding(model, Letters()(document.text)["input_ids"], context, stride)
        assert own["predicted"][i] == own["bytes"][i] == count
        assert own["nats"][i] == pytest.approx(nats, rel=1e-5)
        assert routed["nats"][i] == pytest.approx(nats, rel=1e-5)  # its own k, as a router
    if stride < context:  # each token but a document's first, once
        assert own["predicted"] == [n - 1 for n in LENGTHS]


def test_kl_and_agreement_are_numpys(model):
    context, stride = 16, 5
    before = snapshot(model)
    own, routed = measured(model, context, stride, None, moeprof.TopK(1))
    assert_unchanged(model, before)
    assert own["kl"] == [0] * len(LENGTHS) and own["agree"] == own["predicted"]
    for i, document in enumerate(documents()):
        kl = agree = end = 0
        ids = Letters()(document.text)["input_ids"]
        for begin in range(0, len(ids), stride):
            piece, scored = torch.tensor([ids[begin : begin + context]]), max(end - begin, 1)
            end = begin + piece.shape[1]
            with torch.no_grad():
                full = model(piece).logits[0].double().numpy()
                with moeprof.patch(model, "topk", k=1):
                    other = model(piece).logits[0].double().numpy()
            p, q = (z - np.log(np.exp(z).sum(1, keepdims=True)) for z in (full, other))
            at = slice(scored - 1, piece.shape[1] - 1)
            kl += (np.exp(p) * (p - q))[at].sum()
            agree += (p.argmax(1) == q.argmax(1))[at].sum()
            if end == len(ids):
                break
        assert routed["kl"][i] == pytest.approx(kl, rel=1e-4)
        assert routed["agree"][i] == agree
    assert 0 < sum(routed["agree"]) < sum(routed["predicted"])
    assert routed["experts"] == routed["tokens"]  # one each


SUMS = ("nats", "kl", "experts")
COUNTS = ("agree", "predicted", "tokens", "bytes")


@pytest.mark.parametrize("batch", [passes.BATCH, 3])  # 3: less than a window
@pytest.mark.parametrize("stride", [16, 5])
def test_batched_is_as_one_by_one(model, stride, batch, monkeypatch):
    router = moeprof.BH(0.3, max_k=4)
    together = measured(model, 16, stride, None, router, null=moeprof.null.NORMAL)
    monkeypatch.setattr(passes, "BATCH", batch)
    monkeypatch.setattr(passes, "PIECE", 1)  # of each window a token at a time
    alone = measured(model, 16, stride, None, router, null=moeprof.null.NORMAL)
    for one, other in zip(together, alone, strict=True):
        for field in SUMS:
            np.testing.assert_allclose(one[field], other[field], rtol=1e-5, atol=1e-9)
        assert all(one[field] == other[field] for field in COUNTS)


def test_log_probabilities_in_a_file_are_the_same(model, monkeypatch):
    inside = measured(model, 16, 5, None, moeprof.TopK(1), moeprof.TopK(3))
    monkeypatch.setattr(passes, "IN_MEMORY", 0)
    outside = measured(model, 16, 5, None, moeprof.TopK(1), moeprof.TopK(3))
    for one, other in zip(inside, outside, strict=True):
        assert all(one[field] == other[field] for field in (*SUMS, *COUNTS))


def test_a_temporary_folder_without_room_is_told_before_it_is_filled(model, monkeypatch):
    monkeypatch.setattr(passes, "IN_MEMORY", 0)
    monkeypatch.setattr(passes.shutil, "disk_usage", lambda folder: type("D", (), {"free": 5}))
    with pytest.raises(OSError, match="log-probabilities take .* GB, .* TMPDIR"):
        measured(model, 16, 5, None)


def test_windows_without_a_stride_are_those_of_the_sweep():
    texts = [Document("a", "d", "A" * 1300)]
    old, new = (
        heldout_windows(Letters(), texts, 10**6),
        evaluation_text(Letters(), texts, Protocol(512, 512), 10**6),
    )
    assert [w.ids.tolist() for w in old.windows] == [w.ids.tolist() for w in new.windows]
    assert [(w.first, w.num_bytes) for w in new.windows] == [(1, w.num_bytes) for w in old.windows]
    assert old.documents == new.documents


def test_the_protocol_follows_the_model(model):
    assert protocol_for(model) == (1024, 1024)
    assert protocol_for(olmoe(max_position_embeddings=4096)) == (2048, 2048)
    assert protocol_for(model, 64, 16) == (64, 16)
    for arguments, words in (
        ((1025,), "context: expected 2 to 1,024, the positions of this model tokens, got 1,025"),
        ((1,), "context"),
        ((64, 65), "stride: expected 1 to 64, the context, got 65"),
        ((64, 0), "stride"),
    ):
        with pytest.raises(ValueError, match=words):
            protocol_for(model, *arguments)
    assert "at least 48 tokens" in Protocol(64, 16).words()


# ---- evaluate() ----


def evaluate(model, routers=("topk:k=1", "bh:alpha=0.3,max_k=4"), **options):
    settings = {"texts": documents(), "null": "normal", "context": 32, "progress": False}
    return moeprof.evaluate(model, Letters(), routers, **{**settings, **options})


def test_what_is_reported_is_what_was_measured(model):
    found = evaluate(model)
    frame = found.to_frame().set_index(["config", "slice", "value"])
    assert list(found.measured) == [OWN, "topk:k=1", "bh:alpha=0.3,max_k=4"]
    one, own = found.measured["topk:k=1"], found.measured[OWN]
    row = frame.loc[("topk:k=1", "all", "")]
    nats, scored = sum(one["nats"]), sum(one["predicted"])
    assert row["perplexity"] == pytest.approx(math.exp(nats / scored))
    assert row["bits_per_byte"] == pytest.approx(nats / math.log(2) / sum(one["bytes"]))
    above = (nats - sum(own["nats"])) / math.log(2) / sum(one["bytes"])
    assert row["bits_above_own"] == pytest.approx(above)
    assert row["kl"] == pytest.approx(sum(one["kl"]) / scored)
    assert row["agreement"] == sum(one["agree"]) / scored and row["experts"] == 1
    assert row["tokens"] == scored and row["bits_per_byte_low"] < row["bits_per_byte_high"]
    of_a = [i for i, d in enumerate(found.documents) if d["domain"] == "a"]
    row = frame.loc[("topk:k=1", "domain", "a")]
    assert row["kl"] == pytest.approx(
        sum(one["kl"][i] for i in of_a) / sum(one["predicted"][i] for i in of_a)
    )
    assert set(frame.xs("complexity", level="slice").index.get_level_values("value")) == {"x", "y"}
    assert [(pair["first"], pair["second"]) for pair in found.pairs][:2] == [
        (OWN, "topk:k=1"),
        (OWN, "bh:alpha=0.3,max_k=4"),
    ]
    assert all(len(line) <= 100 for line in found.summary().splitlines())
    assert "32 tokens" in found.summary() and "no window before had" in found.report()


def test_a_router_of_ones_own_is_measured_as_the_one_that_does_the_same(model):
    def mine(logits):
        weights, experts = logits.softmax(-1).topk(1)
        return weights, experts

    found = evaluate(model, {"mine": mine, "top-1": moeprof.TopK(k=1)}, norm="none")
    mine, top = found.measured["mine"], found.measured["top-1"]
    assert mine["experts"] == top["experts"] and mine["router"] == "mine (in Python)"
    np.testing.assert_allclose(mine["nats"], top["nats"], rtol=1e-6)
    with pytest.raises(ValueError, match="store: what the router 'mine' is"):
        evaluate(model, {"mine": lambda logits: logits}, store="never.sqlite")


def test_tables_fit_a_terminal_of_80_columns(model, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = evaluate(model, ["topk:k=1", "bh:alpha=0.3,max_k=4"]).summary()
    assert all(len(line) <= 80 for line in text.splitlines())
    tables = text[text.index("All documents") :]
    assert "…" not in tables
    assert re.search(r"\n +\[[-+.\d]+, [-+.\d]+\]", tables)  # intervals in a line of their own
    assert not re.search(r"\[[-+.\d]+,\s*\n", tables)


def test_few_documents_are_said_to_bound_p(model):
    found = evaluate(model)
    assert "With 6 documents p can't be below 0.031" in " ".join(found.summary().split())
    assert min(pair["p"] for pair in found.pairs) >= 2 / 2**6
    few = evaluate(model, texts=[document.text for document in documents()[:3]], tokens=10**6)
    assert says(list(few.views())[-1].note, "3 documents", "below 0.25")
    assert "can be below" not in list(found.views())[-1].note
    many = evaluate(model, texts=[d._replace(name=f"{i}") for i in range(2) for d in documents()])
    assert "p can't be below" not in many.summary()


def test_the_figure_names_its_points_and_draws_static(model):
    routers = {"one": moeprof.TopK(k=1), "topk-like": moeprof.BH(0.3, max_k=4)}
    (axis,) = evaluate(model, routers).figure().axes
    assert {text.get_text() for text in axis.texts} == {OWN, *routers}
    (static,) = [line for line in axis.lines if line.get_label() == "static top-k"]
    assert list(static.get_xdata()) == [1, 2]


def test_static_is_a_line_between_neighbouring_k_alone():
    """A line over a gap lies above what static top-k costs there."""

    def row(config, experts, bits):
        ends = {f"{name}_{end}": None for name in ("bits_above_own", "experts") for end in ("low",)}
        return {"slice": "all", "config": config, "experts": experts, "bits_above_own": bits} | ends

    static = {"three": 0.4, "four": 0.3, "six": 0.1}
    ks = {"three": 3.0, "four": 4.0, "six": 6.0}
    rows = [row(OWN, 8.0, 0.0), *(row(n, ks[n], bits) for n, bits in static.items())]
    (axis,) = figure([*rows, row("bh", 6.5, 0.05)], list(static)).axes
    lines = [list(x) for x in (line.get_xdata() for line in axis.lines) if len(x) > 1]
    assert [3, 4] in lines and not any(max(x) > 4 for x in lines if x != [0, 1])
    title = axis.figure.get_suptitle()
    assert says(title, "4 configurations", "+0.0500 to +0.4000", "3.00 to 6.50 experts")
    one = figure(rows[:2], ["three"]).get_suptitle()
    assert says(one, "three", "+0.4000 bits", "3.00 experts") and "to" not in one


def test_a_budget_is_set_on_calibration_text_and_one_out_of_reach_is_said(model):
    found = evaluate(model, ["top_p@1.5", "top_p@7:max_k=4"])
    assert found.measured["top_p@1.5"]["average_k"] == pytest.approx(1.5, rel=0.02)
    assert f"P is {found.measured['top_p@1.5']['value']}" in " ".join(found.summary().split())
    average = f"{found.measured['top_p@1.5']['average_k']:.2f} experts"
    assert says(found.summary(), "top_p@1.5", "calibration", "English", average)
    assert "top_p@7:max_k=4 was not run: top_p" in " ".join(found.summary().split())
    assert set(found.to_frame()["config"]) == {OWN, "top_p@1.5"}


def test_routers_as_objects_and_by_name(model):
    found = evaluate(model, [moeprof.TopK(1), "topk:k=3"], texts=["A TEXT", "ANOTHER ONE"])
    assert list(found.measured) == [OWN, "topk k=1", "topk:k=3"]
    assert list(evaluate(model, {"mine": moeprof.TopK(1)}).measured) == [OWN, "mine"]


def test_the_report_names_the_nulls(model):
    found = evaluate(model, ["bh:alpha=0.2,max_k=4", "bh:alpha=0.1,max_k=4", "topk:k=1"])
    words = found.facts["nulls"]["bh:alpha=0.2,max_k=4"]
    assert says(found.report(), "Null of bh:alpha=0.2,max_k=4, bh:alpha=0.1,max_k=4", words[:20])
    assert "`moeprof" not in found.report()  # it was a call in Python


def test_one_document_has_no_interval(model):
    found = evaluate(model, texts=["SOME TEXT OF ONE DOCUMENT"])
    assert found.pairs == [] and found.rows[0]["perplexity_low"] is None
    assert "one document, so nothing has an interval" in found.summary()
    found.figure()


@pytest.mark.parametrize(
    ("routers", "options", "error", "words"),
    [
        ("topk:k=1", {}, TypeError, "routers: expected a list"),
        (["topk:k=1"] * 2, {}, ValueError, "'topk:k=1': it is there twice"),
        ([OWN], {}, ValueError, "there is no 'own routing'"),
        ([3], {}, TypeError, "a router or its text"),
        ([len], {}, TypeError, "or a dict {name: function} for one of your own"),
        (["topk:k=9"], {}, ValueError, "k: expected at most 8"),
        ([], {"texts": []}, ValueError, "expected at least one text"),
        ([], {"texts": ["A", "B"]}, ValueError, "no document has two tokens"),
        ([], {"texts": "A TEXT"}, TypeError, "got one string"),
        ([], {"context": 1025}, ValueError, "context: expected 2 to 1,024"),
        ([], {"stride": 40}, ValueError, "stride: expected 1 to 32"),
    ],
)
def test_what_is_wrong_is_said_and_the_model_stays(model, routers, options, error, words):
    before = snapshot(model)
    with pytest.raises(error, match=words):
        evaluate(model, routers, **options)
    assert_unchanged(model, before)


# ---- the command ----


@pytest.fixture
def text(tmp_path):
    lines = [
        json.dumps({"text": d.text[:700], "domain": d.domain, "complexity": "ab"[i % 2]})
        for i, d in enumerate(demo.heldout_texts()[::16])
    ]
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(lines))
    return path


@pytest.mark.slow  # what it runs is tested in Python on both versions
def test_the_command_writes_all_and_goes_on_where_it_was(text, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    command = ["evaluate", "--text", str(text), "--context", "64", "--stride", "48"]
    command += ["--tokens", "600", "--out", str(out)]
    assert main([*command, "--router", "topk:k=4"]) == 0
    printed = capsys.readouterr().out
    assert all(len(line) <= 100 for line in printed.splitlines() if "Written" not in line)
    saved = json.loads((out / "evaluation.json").read_text())
    assert list(saved["measured"]) == [OWN, "topk:k=4"]
    assert saved["facts"]["protocol"]["context"] == 64 and saved["facts"]["model"] == "moeprof/demo"
    header, *rows = (out / "evaluation.csv").read_text().splitlines()
    assert header.startswith("config,slice,value,documents,tokens,perplexity,perplexity_low")
    assert len(rows) == len(saved["results"]) == 2 * (1 + 4 + 2)
    assert (out / "evaluation.png").read_bytes()[:4] == b"\x89PNG"
    report = (out / "evaluation_report.md").read_text()
    assert "By complexity" in report and "| topk:k=4 |" in report
    how = report.partition("## How it was run")[2]
    words = "--tokens 600 --context 64 --stride 48 --router topk:k=4`"
    assert f"`moeprof evaluate --text {text} {words}" in how
    assert all(says(how, "Machine", name) for name in ("seed 0", "torch", "thread", "moeprof"))

    runs = []
    run = Evaluation.measure
    monkeypatch.setattr(
        Evaluation,
        "measure",
        lambda self, router, **o: runs.append(router) or run(self, router, **o),
    )
    assert main([*command, "--router", "topk:k=4", "--router", "topk:k=2"]) == 0
    assert runs == [moeprof.TopK(2)] and "2 are finished" in capsys.readouterr().out
    again = json.loads((out / "evaluation.json").read_text())
    assert again["measured"]["topk:k=4"] == saved["measured"]["topk:k=4"]
