"""A profile on the disk: whole or not at all, checked when it is read; its trace; two compared."""

import contextlib
import hashlib
import io
import json
import math
import os
import threading
import time
import tracemalloc
from dataclasses import replace

import numpy as np
import pandas
import pytest
from profiles import ROOF, layer, make_profile, with_vocabulary

from moeprof.files import as_csv, printable, write_whole
from moeprof.models.phases import PHASES
from moeprof.profile import storage
from moeprof.profile.result import Profile
from moeprof.profiler.tally import Counts

pytestmark = pytest.mark.once

# ---------------------------------------------------------------- files


def test_a_profile_comes_back_as_it_was(profile, tmp_path):
    paths = profile.save(tmp_path / "new" / "folder")
    names = ["counts.npz", "glossary.csv", "metrics.csv", "profile.json"]
    assert sorted(path.name for path in paths) == names
    assert {p.name for p in paths[0].parent.iterdir()} == {p.name for p in paths}
    again = Profile.load(paths[0].parent)
    assert again == profile and again.summary() == profile.summary()
    pandas.testing.assert_frame_equal(again.to_frame(), profile.to_frame())
    # Equality sees a single count.
    again.counts["decode"][1].load[0, 3] += 1
    assert again != profile


def test_what_is_optional_comes_back_too(profile, tmp_path):
    full = with_vocabulary(profile)
    full.save(tmp_path / "a")
    again = Profile.load(tmp_path / "a")
    assert again == full and again.domains is None and again.events is None
    assert again.vocabulary["text"] == ["if", " the", "<b>"]
    bare = make_profile(pairs=False, roofline=None)
    bare.save(tmp_path / "b")
    assert Profile.load(tmp_path / "b") == bare


def test_the_json_is_strict_and_names_what_was_measured(tmp_path):
    facts = {"config": {"dtype": np.dtype("float32"), "id2label": {0: "a"}, "eps": float("nan")}}
    made = make_profile(prefill=(), facts=facts)  # nothing in prefill: nan
    made.save(tmp_path)

    def refuse(constant):
        raise AssertionError(f"{constant} in the JSON")

    read = json.loads((tmp_path / "profile.json").read_text(), parse_constant=refuse)
    assert read["facts"]["config"] == {"dtype": "float32", "id2label": {"0": "a"}, "eps": None}
    assert read["facts"]["machine"]["versions"]["moeprof"] and read["facts"]["model"]
    summary = read["summary"]["decode"]["layers"]["model.layers.0.mlp.gate"]
    assert summary["tokens"] == 10 and summary["k_mean"] == 2
    assert "prefill" not in read["summary"]
    assert Profile.load(tmp_path) == made


def test_the_csv_is_the_frame(profile, tmp_path):
    profile.save_csv(tmp_path / "metrics.csv")
    read = pandas.read_csv(tmp_path / "metrics.csv", dtype={"layer": "Int64", "expert": "Int64"})
    frame = profile.to_frame()
    np.testing.assert_array_equal(read["value"], frame["value"])
    assert read["metric"].tolist() == frame["metric"].tolist()
    assert read["expert"].equals(frame["expert"])


def test_folders_that_hold_no_profile(profile, tmp_path):
    with pytest.raises(FileNotFoundError, match="no profile in .*nothing: it has no profile.json"):
        Profile.load(tmp_path / "nothing")
    profile.save(tmp_path)
    head = json.loads((tmp_path / "profile.json").read_text())

    def refused(error, **changes):
        (tmp_path / "profile.json").write_text(json.dumps({**head, **changes}))
        with pytest.raises(ValueError, match=error):
            Profile.load(tmp_path)

    refused("expected format version 1, got 2", version=2)
    refused("this is no profile of moeprof", format="something else")
    refused("the profile is damaged", layers=head["layers"] * 2)
    refused("the profile is damaged", layers=head["layers"][:-1])
    refused("the profile is damaged", facts=["not", "a", "dict"])
    refused("the profile is damaged", layers=[{"name": "x"}])
    refused("counts.npz is not the one that profile.json was written with", counts_sha256="0")
    (tmp_path / "profile.json").write_text("[1]")
    with pytest.raises(ValueError, match="this is no profile of moeprof"):
        Profile.load(tmp_path)
    (tmp_path / "profile.json").write_text("{")
    with pytest.raises(ValueError, match="profile.json: expected JSON"):
        Profile.load(tmp_path)
    (tmp_path / "counts.npz").unlink()
    with pytest.raises(FileNotFoundError, match="it has no counts.npz"):
        Profile.load(tmp_path)


@pytest.mark.parametrize("stop", range(5))
def test_over_an_older_profile_is_whole_or_the_older_one(profile, tmp_path, monkeypatch, stop):
    """However far the writing got when the machine stopped, and if it was started again."""
    newer, newest = (make_profile(3, 12, 2, seed=seed) for seed in (9, 10))
    profile.save(tmp_path)
    done = 0

    def count(call):
        def counted(*arguments):
            nonlocal done
            if done == stop:
                raise KeyboardInterrupt
            done += 1
            return call(*arguments)

        return counted

    with monkeypatch.context() as patched:
        patched.setattr("moeprof.profile.storage.write_whole", count(write_whole))
        patched.setattr("moeprof.profile.storage.os.replace", count(os.replace))
        for attempt in (newer, newest):
            done = 0
            with contextlib.suppress(KeyboardInterrupt):
                attempt.save(tmp_path)
            assert Profile.load(tmp_path) in (profile, newer, newest)
    newest.save(tmp_path)
    assert Profile.load(tmp_path) == newest
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "counts.npz",
        "glossary.csv",
        "metrics.csv",
        "profile.json",
    ]


def test_two_that_save_to_one_folder_do_not_mix(profile, tmp_path, monkeypatch):
    """One after the other, and who reads meanwhile has one of them whole."""
    other, slow = make_profile(3, 12, 2, seed=5), threading.Barrier(3)
    real = storage.write_whole

    def write_slowly(path, data):
        time.sleep(0.02)
        real(path, data)

    def save(one):
        slow.wait(10)
        one.save(tmp_path)

    profile.save(tmp_path)
    monkeypatch.setattr(storage, "write_whole", write_slowly)
    savers = [threading.Thread(target=save, args=(one,)) for one in (profile, other)]
    for saver in savers:
        saver.start()
    slow.wait(10)
    while any(saver.is_alive() for saver in savers):
        assert Profile.load(tmp_path) in (profile, other)
    last = Profile.load(tmp_path)
    assert (tmp_path / "metrics.csv").read_bytes() == as_csv(last.to_frame())


def test_no_space_leaves_the_older_profile(profile, tmp_path, monkeypatch):
    profile.save(tmp_path)

    def full(path, data, write=write_whole):
        if path.name == "profile.json":
            raise OSError(28, "No space left on device")
        write(path, data)

    monkeypatch.setattr("moeprof.profile.storage.write_whole", full)
    with pytest.raises(OSError, match="No space left"):
        make_profile(3, 12, 2, seed=9).save(tmp_path)
    assert Profile.load(tmp_path) == profile and not (tmp_path / "counts.next.npz").exists()


@pytest.mark.parametrize("name", ("profile.json", "counts.npz"))
def test_flipped_bits_of_a_profile_are_one_kind_of_error(tmp_path, name):
    make_profile(1, 3).save(tmp_path)
    whole = (tmp_path / name).read_bytes()
    unseen = 0
    for at in range(0, 8 * len(whole), 1 + 8 * len(whole) // 700):
        damaged = bytearray(whole)
        damaged[at // 8] ^= 1 << at % 8
        (tmp_path / name).write_bytes(damaged)
        try:
            Profile.load(tmp_path)  # a digit of a fact may change: the JSON is for people too
            unseen += 1
        except ValueError as error:
            assert str(tmp_path) in str(error)
    assert name == "profile.json" or not unseen


def test_facts_are_checked(profile, tmp_path):
    profile.save(tmp_path)
    head = json.loads((tmp_path / "profile.json").read_text())

    def refused(part, name, value):
        changed = json.loads(json.dumps(head))
        (changed[part][0] if part == "layers" else changed[part])[name] = value
        (tmp_path / "profile.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=f"the profile is damaged.*{name}"):
            Profile.load(tmp_path)

    for name, value in (("steps", "3"), ("steps", True), ("model", None), ("notes", "x")):
        refused("facts", name, value)
    for name, value in (
        ("num_experts", "8"),
        ("num_experts", -1),
        ("num_experts", 10**30),
        ("name", 3),
        ("router_bytes", None),
        ("expert_bytes", -1),
    ):
        refused("layers", name, value)
    refused("layers", "slot_flops", [1, 2])
    refused("layers", "slot_flops", ["x"] * 12)
    refused("roofline", "read_gbs", "fast")
    row = {"batch": 1, "steps": 3, "k": 2.0, "unique_experts": 2.0, "latency_ms": 1.0, "bytes": 8}
    for name, value in (
        ("not_counted", 5),
        ("not_counted", [{"label": 1, "block": "b"}]),
        ("decode_by_batch", [1, 2]),
        ("decode_by_batch", [row | {"k": "two"}]),
        ("machine", {"cpu": "A CPU", "threads": 2}),
    ):
        refused("facts", name, value)


def test_a_profile_of_before_there_were_four_phases_is_read(profile, tmp_path):
    profile.save(tmp_path)
    data = {
        n: a
        for n, a in np.load(tmp_path / "counts.npz").items()
        if not n.startswith(("verify", "unknown"))
    }
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **data)
    (tmp_path / "counts.npz").write_bytes(buffer.getvalue())
    head = json.loads((tmp_path / "profile.json").read_text())
    head["counts_sha256"] = hashlib.sha256(buffer.getvalue()).hexdigest()
    (tmp_path / "profile.json").write_text(json.dumps(head))
    assert Profile.load(tmp_path) == profile


def test_batches_of_which_not_all_is_known(tmp_path):
    """Bytes are unknown where experts are packed; JSON has no nan."""
    row = {"steps": 3, "k": 2.0, "unique_experts": 2.5, "latency_ms": 1.0, "bytes": None}
    rows = [row | {"batch": batch} for batch in (1, 4)]
    profile = make_profile(2, 8, 2, facts={"decode_by_batch": rows})
    profile.save(tmp_path)
    text = " ".join(Profile.load(tmp_path).summary().split())
    assert "at batch 4 spends 1.00 ms" in text and "reads – of weights" in text


def test_arrays_that_are_no_profiles_are_not_unpacked(profile, tmp_path):
    """A small file may say that it unpacks to many gigabytes."""
    profile.save(tmp_path)
    data = dict(np.load(tmp_path / "counts.npz"))
    for name in ("huge", "prefill.0.ints", "events", "vocabulary.counts", "vocabulary.seen"):
        array = np.zeros(10**7, np.int64)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **{**data, name: array})
        (tmp_path / "counts.npz").write_bytes(buffer.getvalue())
        head = json.loads((tmp_path / "profile.json").read_text())
        head["counts_sha256"] = hashlib.sha256(buffer.getvalue()).hexdigest()
        (tmp_path / "profile.json").write_text(json.dumps(head))
        tracemalloc.start()
        with pytest.raises(ValueError, match=f"an array '{name}' of"):
            Profile.load(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 10**7
        tracemalloc.stop()


# ---------------------------------------------------------------- trace


def test_the_trace_has_a_row_for_each_layer_and_its_steps(profile, tmp_path):
    profile.save_trace(tmp_path / "trace.json")
    read = json.loads((tmp_path / "trace.json").read_text())
    rows = {e["tid"]: e["args"]["name"] for e in read["traceEvents"] if e["name"] == "thread_name"}
    assert rows == {i: f"{i} model.layers.{i}.mlp" for i in range(3)}
    steps = [e for e in read["traceEvents"] if e["ph"] == "X"]
    assert len(steps) == len(profile.events) == 3 * 20
    for event, (index, phase, start, duration, tokens, unique) in zip(
        steps, profile.events, strict=True
    ):
        assert (event["tid"], event["name"], event["pid"]) == (index, phase, 1)
        assert event["ts"] == pytest.approx((start - profile.events[0][2]) / 1000)
        assert event["dur"] == pytest.approx(duration / 1000)
        assert event["args"] == {"tokens": tokens, "unique experts": unique}
    spent = sum(e["dur"] for e in steps if e["tid"] == 1) * 1e3
    assert spent == pytest.approx(profile.each()[1].counts.nanoseconds, rel=1e-6)


# ---------------------------------------------------------------- comparison


def test_a_comparison_is_second_less_first(profile):
    other = make_profile(3, 12, 3, seed=4, facts={"router": "BH(alpha=0.1)"})
    compared = profile.compare(other)
    frame = compared.to_frame()
    assert list(frame.columns) == [
        "layer",
        "name",
        "block",
        "phase",
        "metric",
        "first",
        "second",
        "difference",
        "relative",
    ]
    row = frame[(frame["layer"] == 1) & (frame["phase"] == "decode")].set_index("metric")
    a, b = profile.each("decode")[1], other.each("decode")[1]
    assert row.loc["k_mean", ["first", "second", "difference", "relative"]].tolist() == [
        2,
        3,
        1,
        0.5,
    ]
    gap = b.expert_load_gini - a.expert_load_gini
    assert row.loc["expert_load_gini", "difference"] == pytest.approx(gap)
    apart = np.abs(np.array(a.expert_load) - b.expert_load).sum() / 2
    assert row.loc["expert_load_distance", "second"] == pytest.approx(apart) and apart > 0.01
    text = compared.summary()
    assert max(map(len, text.split("\n"))) <= 100
    first, second = text.split("\n")[:2]
    assert first.endswith("First: moeprof/demo, router: the model's own top-k.")
    assert second.endswith("Second: moeprof/demo, router: BH(alpha=0.1).")
    assert "2.00 and 3.00 experts a token" in " ".join(text.split())
    assert "+1.00" in text and "+1.00" in compared._repr_html_()


def test_a_profile_does_not_differ_from_itself(profile):
    frame = profile.compare(profile).to_frame()
    assert (frame["difference"].dropna() == 0).all() and len(frame["difference"].dropna()) > 100
    assert "differ most" not in profile.compare(profile).summary()


def test_models_of_other_shapes_are_not_compared(profile):
    for other, said in ((make_profile(2, 12), "2 MoE layers of 12"), (make_profile(3, 8), "of 8")):
        with pytest.raises(ValueError, match=f"same shape, got 3 MoE layers of 12 .*{said} expert"):
            profile.compare(other)


def test_a_phase_that_one_lacks_is_said(profile):
    text = profile.compare(make_profile(3, 12, decode=())).summary()
    assert "decode: second has none" in text and "── decode" not in text


def test_layers_may_differ_in_their_number_of_experts():
    first, second = make_profile(1, 8), make_profile(1, 16)
    counts = {p: first.counts[p] + second.counts[p] for p in PHASES}
    for name in PHASES:
        counts[name][1] = counts[name][1] + Counts(16)
    mixed = Profile(first.layers + [layer(1, 16)], counts, first.facts, roofline=ROOF)
    assert math.isnan(mixed.load_balance_loss()) and mixed.z_loss() > 0
    for name in set(mixed.figures):
        mixed.plot(name).canvas.draw()
    assert "2 layers of 8 or 16 experts" in mixed.summary()


def test_names_with_control_characters_are_shown_alike_everywhere(tmp_path, profile):
    """In the reprs, the summary and the CSV files; to_frame has the names as they are."""
    hostile = "layers.0.\x1b[31m\x07mlp"
    shown = "layers.0.\ufffd[31m\ufffdmlp"
    layers = [replace(profile.layers[0], name=f"{hostile}.gate", block=hostile)]
    made = Profile(layers, {p: c[:1] for p, c in profile.counts.items()}, {"model": "\x1b[2J"})
    made = with_vocabulary(made)
    made.vocabulary |= {"layers": [0], "text": ["\x1b", " the\x00", "\x9b"]}
    assert repr(made.each()[0]).startswith(f"<LayerMetrics of {shown}.gate: ")
    assert "\ufffd[2J" in repr(made.compare(made))
    assert shown in made.summary()
    assert made.to_frame()["block"].dropna().eq(hostile).all()
    made.save_csv(tmp_path / "alone.csv")
    made.save(tmp_path / "folder")
    for path in (tmp_path / "alone.csv", *(tmp_path / "folder").glob("*.csv")):
        text = path.read_text(encoding="utf-8")
        assert text == printable(text) and ("glossary" in path.name or shown in text)
