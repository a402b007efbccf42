"""What moeprof evaluate makes of sums by document: slices, intervals, paired tests."""

import numpy as np
import pytest
from scipy.stats import permutation_test
from statsmodels.stats.multitest import multipletests

from moeprof.studies.evaluation.statistics import holm, results, sign_flip, slices

pytestmark = pytest.mark.once


def scipys(differences, **options):
    return permutation_test(
        (differences, np.zeros_like(differences)),
        lambda x, y, axis: np.sum(x - y, axis),
        permutation_type="samples",
        vectorized=True,
        **options,
    ).pvalue


@pytest.mark.parametrize("size", [2, 5, 12])
def test_all_flips_give_scipys_p(size):
    differences = np.random.default_rng(size).normal(0.4, 1, (size, 6))
    differences[:, 0] = 0  # equal configurations
    differences[:, 1] = 1
    found = sign_flip(differences)
    expected = [scipys(one, n_resamples=np.inf) for one in differences.T]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert found[0] == 1 and found[1] == 2 / 2**size


def test_random_flips_give_about_scipys_p():
    differences = np.random.default_rng(1).normal(0.2, 1, (60, 4))
    found = sign_flip(differences, seed=3)
    for p, one in zip(found, differences.T, strict=True):
        other = scipys(one, n_resamples=9999)
        assert abs(p - other) < 5 * np.sqrt(2 * other / 10**4)
    assert sign_flip(np.ones((60, 1)))[0] == 1e-4  # the least that there can be


def test_under_the_null_p_is_uniform():
    rng = np.random.default_rng(0)
    differences = rng.normal(size=(30, 400)) * rng.exponential(size=(30, 1))
    p = sign_flip(differences, flips=999)
    assert abs((p <= 0.05).mean() - 0.05) < 0.035 and abs(np.median(p) - 0.5) < 0.09


def test_holm_is_statsmodels():
    p = np.random.default_rng(0).uniform(size=20) ** 3
    np.testing.assert_allclose(holm(p), multipletests(p, method="holm")[1])


def row(nats, documents):
    size = len(documents)
    return {
        "nats": nats,
        "kl": [0.0] * size,
        "agree": [1] * size,
        "predicted": [10] * size,
        "tokens": [11] * size,
        "experts": [22.0] * size,
        "bytes": [40] * size,
    }


DOCUMENTS = [{"domain": "a", "complexity": "easy"}, {"domain": "b"}, {"domain": "a"}]


def test_slices_are_domains_and_named_complexities():
    assert slices(DOCUMENTS) == [
        ("all", "", [0, 1, 2]),
        ("domain", "a", [0, 2]),
        ("domain", "b", [1]),
        ("complexity", "easy", [0]),
    ]
    assert slices([{"domain": "a"}, {"domain": "a"}]) == [("all", "", [0, 1])]


def test_intervals_are_of_documents_and_paired():
    rng = np.random.default_rng(0)
    documents = [{"domain": "ab"[i % 2]} for i in range(40)]
    own = rng.normal(30, 8, 40)
    rows, pairs = results(documents, {"own": row(own, documents), "other": row(own + 1, documents)})
    by = {(r["config"], r["slice"], r["value"]): r for r in rows}
    other = by["other", "all", ""]
    above = 1 / np.log(2) / 40  # in every document: it doesn't vary
    for end in ("", "_low", "_high"):
        assert other[f"bits_above_own{end}"] == pytest.approx(above)
    width = other["bits_per_byte_high"] - other["bits_per_byte_low"]
    # Drawn within domains; Student's t of 38.
    within = np.sqrt(np.mean([own[::2].var(ddof=1), own[1::2].var(ddof=1)]))
    assert width == pytest.approx(2 * 2.024 * within / np.sqrt(40) / np.log(2) / 40, rel=0.1)
    assert other["experts"] == 2 and other["tokens"] == 400
    assert pairs[0]["bits"] == pytest.approx(above) and pairs[0]["p"] == 1e-4
    again, _ = results(documents, {"own": row(own, documents)}, seed=1)
    assert again[0]["perplexity"] == pytest.approx(np.exp(own.sum() / 400))


def test_one_document_of_a_domain_has_an_interval_of_all_documents_only():
    rows, _ = results(DOCUMENTS, {"own": row([3.0, 9.0, 5.0], DOCUMENTS)})
    all_of_them, _, single, _ = rows
    assert all_of_them["kl_low"] == 0 and all_of_them["perplexity_low"] < all_of_them["perplexity"]
    assert single["value"] == "b" and single["perplexity_low"] is None
