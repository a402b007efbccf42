"""Nulls in files, merged, made into others, and what a null argument means."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nulls import assert_same, null_of, random_logits

from moeprof import files
from moeprof import null as nulls
from moeprof.models.identity import text_digest
from moeprof.null import Null, storage
from moeprof.null.histograms import Histograms

pytestmark = pytest.mark.once

# ---------------------------------------------------------------- merging and files


@pytest.mark.parametrize("trim", [(0, 0), (2, 1)])
@pytest.mark.parametrize("tokens", [3, 200, 40_000])
def test_merging_is_fitting_to_both(tokens, trim):
    kind = "trimmed" if any(trim) else "all"
    options = {"kind": kind, "r_high": trim[0], "r_low": trim[1]}
    parts = [random_logits(tokens + i, 4, seed=i) for i in range(3)]
    a, b, c = (null_of(z, text=t, **options) for z, t in zip(parts, "xyz", strict=True))
    counter = Histograms(1, 4, "logprob", *trim)
    for part in parts:
        counter.add(0, part)
    whole = a.merge(b).merge(c)
    assert np.array_equal(whole.counts, counter.counts)
    assert np.array_equal(whole.largest, counter.largest)
    assert whole.text_digest == text_digest("zyx")
    assert_same(whole, c.merge(a.merge(b)))
    assert_same(whole, b.merge(c.merge(a)))


def test_merging_different_nulls_is_an_error():
    logits = random_logits(20, 4)
    null = null_of(logits)
    with pytest.raises(ValueError, match="score differs: 'logprob', 'logit'"):
        null.merge(null_of(logits, score="logit"))
    with pytest.raises(ValueError, match="kind differs"):
        null.merge(null_of(logits, kind="trimmed", r_high=1))
    with pytest.raises(ValueError, match="different models"):
        null.merge(null_of(logits, logits))
    for other in (null.router_sample + 1, null.router_sample[:, :3]):  # of the same shape
        with pytest.raises(ValueError, match="different models: 'toy', 'its copy'"):
            null.merge(replace(null, router_sample=other, model_name="its copy"))


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 1500), min_size=2, max_size=5),
    data=st.data(),
    score=st.sampled_from(nulls.SCORES),
)
def test_merging_in_any_order_and_grouping_is_the_same_to_the_bit(sizes, data, score):
    parts = [
        null_of(random_logits(n, 2, seed=i), kind="efron", score=score, text=str(i))
        for i, n in enumerate(sizes)
    ]
    # One model under two names and in two dtypes.
    parts[0] = replace(
        parts[0], model_name="another", router_sample=parts[0].router_sample + np.float32(1e-3)
    )

    def merged(nulls):
        nulls = list(data.draw(st.permutations(nulls)))
        while len(nulls) > 1:
            at = data.draw(st.integers(0, len(nulls) - 2))
            nulls[at : at + 2] = [nulls[at].merge(nulls[at + 1])]
        return nulls[0]

    one, other = merged(parts), merged(parts)
    assert_same(one, other)
    assert one.tokens == sum(sizes) and one.model_name == "another"


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_a_file_gives_the_null_back(tmp_path, suffix):
    logits = random_logits(300, 6)
    null = null_of(logits, logits[::-1] * 2, kind="trimmed", r_high=1, r_low=2)
    path = tmp_path / f"a{suffix}"
    path.write_text("an older file")
    null.save(path)
    assert_same(Null.load(str(path)), null)
    for kind in nulls.COMPLETE_KINDS:
        for other in (null_of(logits, kind=kind), null_of(logits, kind=kind).per_expert(0.05)):
            other.save(path)
            assert_same(Null.load(path), other)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_a_damaged_or_foreign_file_is_an_error(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    null_of(random_logits(30, 3)).save(path)
    whole = path.read_bytes()
    foreign = tmp_path / f"foreign{suffix}"
    if suffix == ".npz":
        np.savez(foreign, x=np.zeros(3))
        array = tmp_path / "array.npy"
        np.save(array, np.zeros(3))
        others = [array.read_bytes()]
    else:
        from safetensors.numpy import save_file

        save_file({"x": np.zeros(3)}, foreign)
        middle = len(whole) // 2  # among the counts, which then don't add up
        others = [whole[:middle] + b"\xff" + whole[middle + 1 :]]
    cut = [whole[:size] for size in (0, 4, 100, len(whole) // 2, len(whole) - 1)]
    for data in [*cut, b"something else entirely", foreign.read_bytes(), *others]:
        path.write_bytes(data)
        with pytest.raises(ValueError, match="expected a whole moeprof null") as caught:
            Null.load(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "other"},
        {"score": "other"},
        {"tokens": 31},
        {"r_high": 1},
        {"tokens": "many"},
        {"tokens": 0},
        {"alpha_min": 2},
        {"kind": "trimmed", "alpha_min": 0.1},
        {"checksum": ""},
        {"alpha_min": "small"},
        {"text_digest": "g" * 64},
        {"text_digest": 5},
        {"kind": "trimmed", "r_high": -1, "r_low": 1},
    ],
)
def test_parts_that_do_not_fit_are_an_error(tmp_path, change):
    path = tmp_path / "a.npz"
    null_of(random_logits(30, 3)).save(path)
    parts = dict(np.load(path))
    facts = json.loads(str(parts[storage.FORMAT])) | change
    np.savez(path, **parts | {storage.FORMAT: np.array(json.dumps(facts))})
    with pytest.raises(ValueError, match="expected a whole moeprof null"):
        Null.load(path)


DESCENDING = np.linspace(0, -9, 30, dtype=np.float32)


@pytest.mark.parametrize(
    "part, value",
    [
        ("counts", np.zeros((1, 3, 8), np.uint64)),
        ("counts", np.zeros((1, 3, 8192), np.int64)),
        ("largest", np.zeros((1, 3))),
        ("largest", np.tile(DESCENDING, (1, 3, 1)).astype(float)),
        ("largest", np.tile(DESCENDING[::-1], (1, 3, 1))),
        ("largest", np.tile(DESCENDING[:-1], (1, 3, 1))),
        ("largest", np.full((1, 3, 30), np.nan, np.float32)),
        ("largest", np.full((1, 3, 30), np.inf, np.float32)),
        ("largest", np.full((1, 3, 30), -50.0, np.float32)),
        ("router_sample", np.zeros((2, 3), np.float32)),
    ],
)
def test_arrays_that_do_not_fit_are_an_error(part, value):
    null = null_of(random_logits(30, 3))
    with pytest.raises(ValueError, match="expected|below"):
        replace(null, **{part: value})


def test_a_complete_null_has_each_experts_scores():
    null = null_of(random_logits(30, 3))
    counts = null.counts.copy()
    at = np.flatnonzero(counts[0, 0])[0]
    counts[0, 0, at] -= np.uint64(1)
    counts[0, 1, at] += np.uint64(1)
    with pytest.raises(ValueError, match="expected 30 scores in each expert's histogram"):
        replace(null, counts=counts)


@pytest.mark.parametrize("version", [1, 3])
def test_another_format_version_is_named(tmp_path, monkeypatch, version):
    monkeypatch.setattr(storage, "VERSION", version)
    null_of(random_logits(30, 3)).save(tmp_path / "a.npz")
    monkeypatch.undo()
    message = f"format version 2: format version {version}; fit it again with `moeprof calibrate`"
    with pytest.raises(ValueError, match=message):
        Null.load(tmp_path / "a.npz")


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_no_damaged_byte_goes_unseen(tmp_path, suffix):
    """A changed byte gives the error, or (in what nothing reads) the same null."""
    null = null_of(random_logits(200, 2), kind="efron").per_expert(0.05)
    path = tmp_path / f"a{suffix}"
    null.save(path)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    facts = range(16, 800) if suffix == ".safetensors" else ()  # the header
    places = [*range(16), *facts, *rng.integers(0, len(whole), 100)]
    places += range(len(whole) - 40, len(whole))
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.integers(8)
        path.write_bytes(bytes(damaged))
        try:
            loaded = Null.load(path)
        except ValueError as error:
            assert "expected a whole moeprof null" in str(error) and str(path) in str(error)
        else:
            assert_same(loaded, null)


def test_paths_that_can_not_be_used(tmp_path):
    null = null_of(random_logits(30, 3))
    for call in (null.save, Null.load):
        with pytest.raises(ValueError, match=r"ends in \.safetensors or \.npz"):
            call(tmp_path / "a.json")
    (tmp_path / "folder.npz").mkdir()
    for name in ("absent.npz", "folder.npz"):
        with pytest.raises(FileNotFoundError, match=f"no such null file: .*{name}"):
            Null.load(tmp_path / name)
    (tmp_path / "file").write_text("x")
    for bad in (tmp_path / "file" / "a.npz", tmp_path / "absent" / "a.npz"):
        with pytest.raises(OSError) as caught:
            null.save(bad)
        assert str(caught.value).startswith(f"{bad} can't be written: ")


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_a_failed_write_leaves_the_older_file(tmp_path, monkeypatch, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_text("an older file")

    def no_space(*paths):
        raise OSError(28, "full")

    monkeypatch.setattr(files.os, "replace", no_space)
    with pytest.raises(OSError, match="full"):
        null_of(random_logits(30, 3)).save(path)
    assert path.read_text() == "an older file" and len(list(tmp_path.iterdir())) == 1


def test_the_null_describes_itself():
    null = null_of(random_logits(30, 3), kind="trimmed", r_high=1)
    text = null.describe()
    for part in ("trimmed", "1 highest", "logprob", "30 tokens", "toy", null.text_digest[:12]):
        assert part in text
    assert "\n" not in text and text in repr(null)
    assert "<th>tail_rule</th><td>exponential, top 1 %</td>" in null._repr_html_()
    assert len(null) == 1 and null.layer(0) is null.layer(0)
    for index in (-1, 1):
        with pytest.raises(IndexError, match="1 layers"):
            null.layer(index)


def test_what_a_null_argument_means(tmp_path):
    null = null_of(random_logits(30, 3))
    null.save(tmp_path / "a.npz")
    both = (nulls.resolve_null, nulls.resolve_layer_null)
    for resolve in both:
        assert resolve("normal") is nulls.NORMAL and resolve("softmax") is nulls.SOFTMAX
        assert resolve(nulls.SOFTMAX) is nulls.SOFTMAX
        with pytest.warns(UserWarning, match="moeprof calibrate") as caught:
            assert resolve(None) is nulls.NORMAL
        assert len(caught) == 1
        with pytest.raises(TypeError, match="got int"):
            resolve(3)
        with pytest.raises(FileNotFoundError):
            resolve(tmp_path / "b.npz")
    layer = null.layer(0)
    assert nulls.resolve_null(null) is null and nulls.resolve_layer_null(null) is layer
    for path in (tmp_path / "a.npz", str(tmp_path / "a.npz")):
        assert_same(nulls.resolve_null(path), null)
        assert np.array_equal(nulls.resolve_layer_null(path).table, layer.table)
    assert nulls.resolve_layer_null(layer) is layer
    with pytest.raises(ValueError, match="has 2 layers; pass one"):
        nulls.resolve_layer_null(null_of(random_logits(30, 3), random_logits(30, 3)))


# ---------------------------------------------------------------- kinds, per expert


def test_complete_kinds_become_one_another():
    logits = random_logits(300, 4)
    fitted = {kind: null_of(logits, kind=kind) for kind in nulls.COMPLETE_KINDS}
    for null in fitted.values():
        for kind, expected in fitted.items():
            assert_same(null.as_kind(kind), expected)
        with pytest.raises(ValueError, match="can't become trimmed"):
            null.as_kind("trimmed")
        with pytest.raises(ValueError, match="kind: expected one of"):
            null.as_kind("other")
    trimmed = null_of(logits, kind="trimmed", r_high=1)
    assert trimmed.as_kind("trimmed") is trimmed
    for use in (lambda: trimmed.as_kind("all"), lambda: trimmed.per_expert()):
        with pytest.raises(ValueError, match="trimmed null"):
            use()


@pytest.mark.parametrize("kind", nulls.COMPLETE_KINDS)
def test_per_expert_is_each_expert_alone(kind):
    logits = random_logits(1500, 4) + np.arange(4, dtype=np.float32)
    whole = null_of(logits, kind=kind, score="logit")
    null = whole.per_expert(0.1)
    assert null.fallbacks == [] and "one for each expert" in null.describe()
    fresh = random_logits(50, 4, seed=7)
    p = null.layer(0).reference(fresh)
    assert p.shape == (50, 4) and null.layer(0).table.shape == (4, null.layer(0).table.shape[1])
    for e in range(4):
        alone = null_of(logits[:, [e]], kind=kind, score="logit").layer(0)
        assert np.array_equal(p[:, [e]], alone.reference(fresh[:, [e]]))
    assert np.array_equal(null.layer(0).p_values(fresh) > 0, p > 0)
    np.testing.assert_allclose(null.layer(0).p_values(fresh), p, rtol=1e-12, atol=1e-300)
    assert_same(null.per_expert(None), whole)
    with pytest.raises(ValueError, match="expected 4 experts, as the null has, got 3"):
        null.layer(0).reference(fresh[:, :3])


def test_experts_with_few_scores_keep_their_layers():
    null = null_of(random_logits(100, 4), random_logits(100, 4, seed=2)).per_expert(0.04)
    assert null.fallbacks == [] and len(null_of(random_logits(99, 4)).per_expert(0.04)) == 1
    few = null_of(random_logits(98, 4), random_logits(98, 4, seed=2))
    assert few.fallbacks == []
    per_expert = few.per_expert(0.04)  # 4 / .04 - 1 = 99 are enough
    assert per_expert.fallbacks == [(layer, e) for layer in range(2) for e in range(4)]
    assert "but for 8 that had too few scores" in per_expert.describe()
    assert "<th>fallbacks</th><td>8</td>" in per_expert._repr_html_()
    fresh = random_logits(20, 4, seed=3)
    for layer in range(2):
        p = per_expert.layer(layer).reference(fresh)
        assert np.array_equal(p, few.layer(layer).reference(fresh))


@pytest.mark.parametrize("alpha", [0, -1, 1.5, float("nan")])
def test_alpha_min_is_a_level(alpha):
    with pytest.raises(ValueError, match="alpha_min: expected a number in"):
        null_of(random_logits(20, 4)).per_expert(alpha)
