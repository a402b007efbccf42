"""Agreement of two routings, against Python's sets."""

import numpy as np
import pytest
import torch

from moeprof.profile import agreement
from moeprof.profile.agreement import router_agreement
from moeprof.profiler.records import RecordWriter, read_records

pytestmark = pytest.mark.once


def by_sets(first, second, k=None):
    shares = []
    for a, b in zip(np.asarray(first).tolist(), np.asarray(second).tolist(), strict=True):
        a, b = set(a) - {-1}, set(b) - {-1}
        shares.append(len(a & b) / (k or len(a)) if a else np.nan)
    return shares


def draws(seed, tokens, k, num_experts=8):
    """Experts with empty slots and experts that stand twice; some rows empty."""
    return np.random.default_rng(seed).integers(-1, num_experts, (tokens, k))


@pytest.mark.parametrize("k1, k2", [(1, 1), (2, 5), (8, 3), (64, 64), (3, 0), (0, 3)])
@pytest.mark.parametrize("k", [None, 4])
def test_as_sets_say(k1, k2, k):
    first, second = draws(0, 200, k1, 80), draws(1, 200, k2, 80)
    found = router_agreement(first, second, k=k)
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found, by_sets(first, second, k))
    if k1:
        itself = router_agreement(first, np.fliplr(first))
        np.testing.assert_array_equal(itself[~np.isnan(itself)], 1)


def test_empty_rows_and_duplicates():
    first = [[1, 1, -1], [-1, -1, -1], [0, 2, 4], [5, 6, 7]]
    second = [[1, 3], [1, 2], [2, 2], [0, -1]]
    np.testing.assert_array_equal(router_agreement(first, second), [1, np.nan, 1 / 3, 0])


def test_tensors_no_tokens_and_parts(monkeypatch):
    first, second = draws(2, 57, 4), draws(3, 57, 2)
    monkeypatch.setattr(agreement, "_AT_ONCE", 200)  # a few rows at a time
    found = router_agreement(torch.from_numpy(first).int(), torch.from_numpy(second))
    np.testing.assert_array_equal(found, by_sets(first, second))
    assert router_agreement(np.zeros((0, 2), int), np.zeros((0, 3), int)).shape == (0,)


@pytest.mark.parametrize(
    "first, second, options, error, words",
    [
        (draws(0, 3, 2), draws(0, 4, 2), {}, ValueError, "same tokens, got 3 and 4"),
        (np.arange(3), draws(0, 3, 2), {}, ValueError, r"first: expected experts \(T, k\)"),
        (draws(0, 3, 2), np.zeros((3, 2)), {}, TypeError, "second: expected integers"),
        ([[1, 8]], [[1, 2]], {"num_experts": 8}, ValueError, "first: .* from -1 to 7, got 1 to 8"),
        ([[1, 2]], [[1, -2]], {}, ValueError, "second: .* got -2 to 1"),
        ([[1]], [[1]], {"k": 0}, ValueError, "k: expected at least 1"),
        ([[1]], [[1]], {"k": True}, TypeError, "k: expected an integer"),
        ("path", [[1]], {}, TypeError, "one of each"),
    ],
)
def test_errors(first, second, options, error, words):
    with pytest.raises(error, match=words):
        router_agreement(first, second, **options)


def write(path, routings, **changes):
    """Records of two layers and two steps; routings: (T, k) of each."""
    with RecordWriter(path) as writer:
        for number, experts in enumerate(routings):
            columns = {"real": np.arange(len(experts)) > 0, "input_ids": np.arange(len(experts))}
            writer.add(
                layer=number % 2,
                step=number // 2,
                phase="prefill",
                experts=experts,
                **columns | changes,
            )
    return path


def test_records_by_layer(tmp_path):
    mine = [draws(seed, 9, 3) for seed in range(4)]
    theirs = [draws(seed, 9, 5) for seed in range(10, 14)]
    theirs[1] = mine[1][:, ::-1]
    # Real are the tokens 1 to 8 of one, 0 to 6 of the other.
    first, second = write(tmp_path / "a.parquet", mine), tmp_path / "b"
    write(second, theirs, real=np.arange(9) < 7)
    found = router_agreement(first, second, num_experts=8)
    assert found["layer"].tolist() == [0, 1]
    for layer, row in found.iterrows():
        pairs = [(a[1:7], b[1:7]) for a, b in zip(mine[layer::2], theirs[layer::2], strict=True)]
        shares = np.concatenate([by_sets(a, b) for a, b in pairs])
        same = [set(x) - {-1} == set(y) - {-1} for a, b in pairs for x, y in zip(a, b, strict=True)]
        known = ~np.isnan(shares)
        assert row["tokens"] == known.sum()
        assert row["agreement"] == pytest.approx(shares[known].mean(), rel=1e-12)
        assert row["equal"] == pytest.approx(np.array(same)[known].mean(), rel=1e-12)
    frames = router_agreement(read_records(first), read_records(second), num_experts=8)
    assert frames.equals(found)
    with pytest.raises(ValueError, match="first: .* from -1 to 2"):
        router_agreement(first, second, num_experts=3)


def test_records_of_other_tokens(tmp_path):
    rows = [draws(0, 4, 2)] * 2
    first = write(tmp_path / "a", rows)
    for name, other in {
        "input_id": write(tmp_path / "b", rows, input_ids=[0, 1, 2, 9]),
        "layer": write(tmp_path / "c", rows[:1]),
        "token": write(tmp_path / "d", [draws(0, 5, 2), draws(0, 3, 2)]),
    }.items():
        with pytest.raises(ValueError, match=f"of other tokens .*'({name}|layer)'"):
            router_agreement(first, other)
