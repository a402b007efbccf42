"""Diagnosis: its statistics against SciPy and NumPy, ablation against decoding one by one."""

import json
import re

import numpy as np
import pytest
import scipy.stats
import torch
from matplotlib.figure import Figure
from models import olmoe
from wording import says

import moeprof
from moeprof import demo
from moeprof.backends.spec import PLAIN
from moeprof.cli import main
from moeprof.measure.bootstrap import bootstrap
from moeprof.models.decoding import cache_of, decode
from moeprof.routers import BH, FixedP, TopK
from moeprof.studies.diagnosis import ablation as ab
from moeprof.studies.diagnosis import diagnose, plots
from moeprof.studies.diagnosis import statistics as st
from moeprof.studies.diagnosis.discoveries import DELTAS, FDP, discovery_rows
from moeprof.studies.diagnosis.pvalues import p_value_rows, selection_rows
from moeprof.studies.diagnosis.result import Diagnosis
from moeprof.studies.diagnosis.rows import ABOVE, ALL
from moeprof.studies.diagnosis.seen import Seen, Selected, entropy
from moeprof.studies.diagnosis.transfer import LEAST, transfer_rows
from moeprof.studies.diagnosis.views import (
    as_markdown,
    departing_layers,
    departures,
    findings,
    views,
)
from moeprof.texts.windows import HeldOut, Window, heldout_windows

pytestmark = pytest.mark.slow  # test_every_study runs a diagnosis on both versions


@pytest.fixture(scope="module")
def null():
    return demo.null("efron")


@pytest.fixture(scope="module")
def small(loaded, null):
    """A diagnosis of little text."""
    return null.diagnose(
        *loaded,
        texts=demo.heldout_texts()[::2],
        calibration=demo.calibration_texts()[::5],
        router=BH(0.3),
        positions=24,
        budget_tokens=2048,
        tokens=4096,
        draws=100,
        progress=False,
    )


def ones(statistic, documents):
    return statistic(np.ones((1, documents)))[0]


# ---------------------------------------------------------------- statistics


def test_p_value_statistics_are_the_plain_formulas():
    rng = np.random.default_rng(0)
    p, documents = rng.beta(0.7, 1, (4000, 8)), rng.integers(0, 12, 4000)
    cdf = st.cdf_statistic(st.count_p(p, documents, 12))
    everything = cdf(np.ones((1, 12)))
    expected = np.histogram(p, bins=20, range=(0, 1), density=True)[0]
    assert np.allclose(st.histogram(everything)[0], expected)
    expected = [(p > lam).mean() / (1 - lam) for lam in st.LAMBDAS]
    assert np.allclose(st.pi0(everything)[0], expected)
    expected = np.quantile(p, st.PROBABILITIES)
    found = st.quantiles(everything)[0]
    assert np.allclose(found[2:], expected[2:], rtol=0.02)
    assert np.allclose(found, expected, rtol=0.123)  # few points: a cell of the grid, 10^0.05
    # weights: a document drawn twice counts twice
    weights = np.arange(12.0)[None]
    repeated = np.repeat(p, documents, axis=0)  # document d, d times
    assert np.allclose(st.pi0(cdf(weights))[0][4], (repeated > 0.5).mean() / 0.5)


def test_a_p_value_on_an_edge_counts_below_it():
    counts = st.count_p(st.EDGES[None], np.zeros(1, int), 1)
    assert counts.tolist() == [[1] * len(st.EDGES) + [0]]
    assert (np.diff(st.cdf_statistic(counts)(np.ones((1, 1)))[0]) > 0).all()


def test_spearman_is_scipys():
    rng = np.random.default_rng(1)
    x = rng.integers(0, 9, 3000).astype(float)  # ties
    ys = np.stack([x + rng.normal(0, 3, 3000), rng.normal(size=3000)])
    documents = rng.integers(0, 20, 3000)
    found = ones(st.spearman_statistic(x, ys, documents, 20), 20)
    assert np.allclose(found, [scipy.stats.spearmanr(x, y).statistic for y in ys], atol=1e-12)
    constant = ones(st.spearman_statistic(np.ones(3000), ys, documents, 20), 20)
    assert np.isnan(constant).all()


def test_entropy_is_scipys():
    logits = np.random.default_rng(2).normal(0, 2, (50, 16)).astype(np.float32)
    expected = scipy.stats.entropy(scipy.special.softmax(logits.astype(float), axis=1), axis=1)
    assert np.allclose(entropy(logits), expected, atol=1e-9)


def test_floor_and_ceiling_count_rejections_not_experts():
    """Of R = 0, 1, 2 .. 9, with min_k 2 and max_k 6: two below, three above."""
    r = np.tile(np.arange(10, dtype=np.int32), (1, 10))
    logits = np.random.default_rng(0).normal(size=(1, 100, 4)).astype(np.float32)
    rules = [PLAIN] * len(logits)
    seen = Seen(logits, np.linspace(0, 1, 100), np.repeat(np.arange(10), 10), 10, rules)
    selected = Selected(np.clip(r, 2, 6), r)
    rows = list(selection_rows(seen, selected, (2, 6), "stock", np.zeros(10, int), 50))
    found = {row["quantity"]: row["estimate"] for row in rows if row["layer"] == 0}
    assert found["P(R < min_k)"] == pytest.approx(0.2)
    assert found["P(R > max_k)"] == pytest.approx(0.3)
    assert found["P(R >= 1)"] == pytest.approx(0.9)
    assert found["rejections"] == pytest.approx(4.5)


class Uniform:
    """A null under which what is seen are its p-values."""

    def layer(self, number):
        return self

    def p_values(self, p):
        return p


def p_values_of(*layers, documents=40):
    """Seen, of p-values (T, E) a layer."""
    tokens = len(layers[0])
    of = np.repeat(np.arange(documents), tokens // documents)
    return Seen(np.stack(layers), np.zeros(tokens), of, documents, [PLAIN] * len(layers))


def test_large_p_values_depart_from_uniform_where_pi0_changes_or_is_above_1():
    """Few needed experts are no departure; p-values that only have the right mean are one."""
    rng = np.random.default_rng(0)
    uniform = rng.random((4000, 16))
    needed = np.concatenate([1e-3 * rng.random((4000, 2)), uniform[:, 2:]], axis=1)
    lumps = np.where(uniform < 0.5, 0.3, 0.6) + 0.1 * rng.random((4000, 16))
    wide = rng.beta(0.5, 0.5, (4000, 16))
    above = np.where(uniform < 0.1, 0.9 + uniform, uniform)  # flat from 0.5 on, but for the end
    high = 0.5 + 0.5 * uniform  # flat from 0.5 on, but twice as many as there can be
    seen = p_values_of(uniform, needed, lumps, wide, above, high)
    rows = list(p_value_rows(seen, Uniform(), "stock", np.zeros(40, int), 200))
    frame = Diagnosis(rows, {}).to_frame
    pi0 = frame("pi0").pivot(index="layer", columns="at", values="estimate")[0.5]
    assert np.allclose(pi0[:4], [1, 0.875, 1, 1], atol=0.02)
    expected = [False, False, True, True, True, True]
    assert list(departures(frame("flatness")).values()) == expected
    assert departing_layers(frame("flatness"))["stock"] == (4, 6)


def test_few_uniform_layers_are_called_departing():
    """Of 100 texts of 40 documents that differ, about 5 %: it is one band for five numbers."""
    rng = np.random.default_rng(1)
    shift = rng.normal(0, 0.3, (100, 40, 1))
    z = np.repeat(shift, 30, axis=1) + rng.normal(size=(100, 1200, 4))
    seen = p_values_of(*scipy.stats.norm.sf(z / np.sqrt(1.09)))
    rows = p_value_rows(seen, Uniform(), "stock", np.zeros(40, int), 200)
    assert departing_layers(Diagnosis(rows, {}).to_frame("flatness"))["stock"][0] <= 12


def test_a_domain_of_few_documents_has_no_interval_and_a_largest_distance_never():
    rng = np.random.default_rng(2)
    domains = np.repeat(["few", "enough"], [LEAST - 1, LEAST])
    seen = p_values_of(*rng.random((2, 220, 8)), documents=11)
    fitted_on = p_values_of(*rng.beta(0.5, 1, (2, 200, 8)), documents=4)
    given = np.array(["few", "few", "enough", "enough"])
    nulls = {"few": Uniform(), "null given": Uniform()}
    rows = transfer_rows(nulls, (fitted_on, given), seen, domains, TopK(2), 50)
    frame = Diagnosis(rows, {}).to_frame("transfer")
    several = (frame["at"] == "enough") & (frame["quantity"] != "KS distance")
    for end in ("low", "high", "band_low", "band_high", "error"):
        assert (frame[end].notna() == several).all()
    assert (frame[frame["quantity"] == "experts"]["estimate"] == 2).all()
    cell = frame.set_index(["routing", "at", "layer", "quantity"])["estimate"]
    for null, source in (("few", given == "few"), ("null given", given != "")):
        of = np.isin(fitted_on.documents, np.flatnonzero(source))
        for domain in ("few", "enough"):
            here = np.isin(seen.documents, np.flatnonzero(domains == domain))
            expected = [
                scipy.stats.ks_2samp(p[here].ravel(), own[of].ravel()).statistic
                for p, own in zip(seen.logits, fitted_on.logits, strict=True)
            ]
            expected.append(np.mean(expected))
            found = [cell[null, domain, layer, "KS distance"] for layer in (0, 1, ALL)]
            assert np.allclose(found, expected, atol=0.01)  # at the edges only


def made_up(rejections, counts, single, added):
    """An Ablation of one layer with one position a document."""
    label, delta = [], []
    for p, changes in enumerate(single):
        for slot, change in enumerate(changes):
            label.append((p, ab.SINGLE, 0, slot))
            delta.append(change)
        label.append((p, ab.ADDED, 0, 0))
        delta.append(added[p])
    columns = np.array(label).T
    n = len(single)
    return ab.Ablation(
        np.arange(n),
        np.ones(n),
        np.array(counts)[:, None],
        np.array(rejections)[:, None],
        *columns,
        np.array(delta),
    )


def test_fdp_by_hand():
    """Forced experts are no discoveries, one that hurts is false, no discovery counts as 0."""
    found = made_up(
        rejections=[2, 0, 4],
        counts=[3, 1, 3],
        single=[[0.5, -0.2, -0.9], [-1.0], [0.4, 0.05, 0.15]],
        added=[-0.1, 0.01, 0.02],
    )
    rows = list(discovery_rows(found, "bh", np.zeros(3, int), 50))
    value = {(r["table"], r["layer"], r["quantity"], r["at"]): r["estimate"] for r in rows}
    assert value["fdp", 0, "delta0", None] == 0.1  # the smallest that reaches 95 %
    assert value["fdp", 0, "FDP(delta0)", None] == pytest.approx((1 / 2 + 0 + 1 / 3) / 3)
    assert value["fdp", 0, "false of all", None] == pytest.approx(2 / 5)
    assert value["fdp", 0, "FDP(0)", None] == pytest.approx((1 / 2 + 0 + 0) / 3)
    assert value["fdp", 0, "forced by min_k", None] == pytest.approx(2 / 3)
    assert value["fdp curve", 0, "FDP", DELTAS[-1]] == pytest.approx((1 / 2 + 0 + 2 / 3) / 3)
    assert all(value["fdp", ALL, name, None] == value["fdp", 0, name, None] for name in FDP)


def test_the_false_of_all_do_not_depend_on_where_nothing_is_selected():
    """As FDP does: of two routers that choose alike one selects at every second position only.

    Over layers, too, they are of all experts that are selected; of none there is no share.
    """
    rng = np.random.default_rng(3)
    changes = np.where(rng.random((400, 2)) < 0.6, -0.1, 0.5)
    shares = {}
    for name, rejections in (("always", np.full(400, 2)), ("at times", np.tile([0, 2], 200))):
        found = made_up(rejections, np.full(400, 2), changes, np.full(400, 0.05))
        rows = discovery_rows(found, name, np.zeros(400, int), 100)
        shares[name] = {row["quantity"]: row for row in rows if row["table"] == "fdp"}
    every, half = shares["always"], shares["at times"]
    assert every["FDP(delta0)"]["estimate"] == every["false of all"]["estimate"]
    assert half["false of all"]["estimate"] == 2 * half["FDP(delta0)"]["estimate"]
    assert half["false of all"]["low"] < 0.6 < half["false of all"]["high"]
    # A second layer, which selects nothing, and a third, which selects one that is false.
    found = made_up([2, 2], [2, 2], [[-1, 1], [-1, 1]], [0.1, 0.1])
    columns = ("position", "kind", "layer", "slot", "delta")
    third = found._replace(layer=found.layer + 2)
    both = found._replace(
        counts=np.full((2, 3), 2),
        rejections=np.array([[2, 0, 1]] * 2),
        **{n: np.concatenate([getattr(found, n), getattr(third, n)]) for n in columns},
    )
    rows = discovery_rows(both, "bh", np.zeros(2, int), 20)
    value = {(r["layer"], r["quantity"]): r["estimate"] for r in rows if r["table"] == "fdp"}
    assert value[0, "false of all"] == 0.5 and value[2, "false of all"] == 1
    assert np.isnan(value[1, "false of all"]) and value[1, "FDP(delta0)"] == 0
    assert value[ALL, "false of all"] == pytest.approx(4 / 6)  # (2 + 0 + 2) of (4 + 0 + 2)
    assert value[ALL, "FDP(delta0)"] == pytest.approx((0.5 + 0 + 1) / 3)


# ---------------------------------------------------------------- ablation


def test_positions_are_even_over_documents(loaded):
    text = heldout_windows(loaded[1], demo.heldout_texts(), 33000)
    places = ab.sample_positions(text, 1000, seed=3)
    documents = np.repeat([w.document for w in text.windows], [len(p) for p in places])
    counts = np.bincount(documents)
    assert len(documents) == 1000 and len(counts) >= 40 and np.ptp(counts) <= 1
    for window, place in zip(text.windows, places, strict=True):
        assert len(set(place)) == len(place)
        assert len(place) == 0 or (place[0] >= 1 and place[-1] <= window.ids.shape[1] - 2)
    again = ab.sample_positions(text, 1000, seed=3)
    assert all(np.array_equal(a, b) for a, b in zip(places, again, strict=True))
    with pytest.raises(ValueError, match="positions: 10000000 asked for"):
        ab.sample_positions(text, 10**7)


def one_by_one(model, ids, place, routers, change):
    """The loss with the position decoded alone: its prefix cached, nothing else in the batch."""
    cache = ab.prefill(model, ids[:, :place], routers)
    for router in routers:
        router.changes = change
    out = decode(model, ids[:, place : place + 1], cache)
    for router in routers:
        router.changes = None
    return float(torch.nn.functional.cross_entropy(out.logits[0].float(), ids[0, place + 1, None]))


@pytest.mark.parametrize("router", [BH(0.3), TopK(3), FixedP(0.02, min_k=2)])
def test_a_row_is_the_position_decoded_alone(loaded, null, router, monkeypatch):
    """Of each kind of change, in pieces of a few rows; the row without one: the plain forward."""
    monkeypatch.setattr(ab, "ROWS", 37)
    model, tokenizer = loaded
    ids = torch.tensor([tokenizer(demo.heldout_texts()[40].text)["input_ids"][:90]])
    routers = ab.changed_routers(model, router, null if router.wants_null else None)
    places = np.array([1, 30, 77])
    with moeprof.patch(model, routers), torch.inference_mode():
        cache = ab.prefill(model, ids[:, :-1], routers)
        counts = np.stack([r.seen[1][places] for r in routers], axis=1)
        extra = [ab._unselected(r.seen[0][places], 64, np.random.default_rng(0)) for r in routers]
        for r, e in zip(routers, extra, strict=True):
            assert not (r.seen[0][places] == e[:, None]).any() and (e >= 0).all()
        rows, label = ab.plan(places, counts, np.stack(extra, axis=1))
        losses = ab.changed_losses(model, ids, cache, rows, routers)
        assert cache.get_seq_length() == ids.shape[1] - 1
        # In an order by chance, the first row of each kind of change in each layer.
        rows_by_chance = 3 + np.random.default_rng(0).permutation(len(losses) - 3)
        _, first = np.unique(label[1:3, rows_by_chance], axis=1, return_index=True)
        assert len(first) == 12  # three kinds, four layers
        for n in [*range(3), *rows_by_chance[first]]:
            alone = one_by_one(model, ids, rows.place[n], routers, rows.take([n]))
            assert losses[n] == pytest.approx(alone, abs=1e-5), (label[:, n], n)
    with moeprof.patch(model, router, null=null if router.wants_null else None):
        logits = model(input_ids=ids, use_cache=False).logits[0].detach()
    plain = torch.nn.functional.cross_entropy(logits[places], ids[0, places + 1], reduction="none")
    assert np.allclose(losses[:3], plain, atol=1e-5)
    assert np.abs(losses[3:] - losses[:3][label[0, 3:]]).max() > 1e-2  # the changes do something


def test_an_emptied_slot_is_minus_one_and_the_other_weights_stay():
    """And an added expert has its own softmax weight, times what the norm makes of the others'."""
    logits = torch.tensor([[3.0, 1.0, 2.0, 0.0]] * 3)
    for norm in ("none", "sum"):
        router = ab.ChangedRouter(0, TopK(2), None, norm, 2, PLAIN)
        weights, experts = router(logits)
        assert experts.tolist() == [[0, 2]] * 3
        router.changes = ab.Changes(
            np.zeros(3, int),
            np.array([0, 1, 0]),
            np.array([1, 0, 0]),
            np.array([2, 1, 0]),
            np.array([-1, -1, 3]),
        )
        changed, slots = router(logits)
        assert slots.tolist() == [[0, -1, -1], [0, 2, -1], [0, 2, 3]]
        assert torch.equal(changed[:, :2], weights)
        softmax = torch.softmax(logits[0], 0)
        scale = 1 if norm == "none" else 1 / float(softmax[[0, 2]].sum())
        assert float(changed[2, 2]) == pytest.approx(float(softmax[3]) * scale)


def test_ablation_leaves_the_model_as_it_was():
    model = olmoe()
    window = Window(0, torch.randint(2, 64, (1, 40)), 40)
    text = HeldOut([window], [{"domain": "a", "name": "a", "tokens": 40, "bytes": 40}])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = ab.ablate(model, text, TopK(8), positions=ab.sample_positions(text, 9))
    assert not (found.kind == ab.ADDED).any()  # all are selected
    assert len(found.delta) == 9 * 2 * (8 + 7)
    assert all(torch.equal(value, before[n]) for n, value in model.state_dict().items())
    assert not any("forward" in vars(module) for module in model.modules())


def test_cache_of_reads_both_names():
    assert cache_of({"cache": 1}) == 1
    assert cache_of(olmoe()(input_ids=torch.tensor([[3, 4]]), use_cache=True)) is not None


# ---------------------------------------------------------------- the whole


def test_diagnosis_holds_what_was_promised(small, null):
    frame = small.to_frame()
    tables = {"histogram", "pi0", "quantiles", "cdf", "selection", "transfer", "fdp", "fdp curve"}
    assert tables <= set(frame["table"])
    known = frame[np.isfinite(frame["low"])]
    assert (known["low"] <= known["high"]).all()
    selection = small.to_frame("selection")
    assert set(selection["routing"]) == {"stock", "patched"}
    assert set(selection["layer"]) == {ALL, 0, 1, 2, 3}
    assert set(small.facts["compared"]) >= {"bh 0.3"} and len(small.facts["compared"]) == 3
    experts = small.to_frame("fdp")
    experts = experts[(experts["quantity"] == "experts") & (experts["layer"] == ALL)]["estimate"]
    assert experts.iloc[1] == pytest.approx(experts.iloc[0], rel=0.15)  # FixedP's budget
    with pytest.raises(ValueError, match="table: expected one of"):
        small.to_frame("nonsense")
    with pytest.raises(ValueError, match="figure: expected one of"):
        small.figure("nonsense")
    assert null.describe() == small.facts["null"]


def test_summary_fits_the_width_and_is_honest(small):
    text = small.summary()
    assert max(map(len, text.split("\n"))) <= 100
    words = " ".join(text.split())
    assert says(words, "alpha", "no promise")
    assert says(words, "false discovery rate", "against that null")
    assert says(words, "fewer than", "1,000 positions")
    # 11 documents in 4 domains have 7 to spare; three times as many are enough.
    assert says(findings(small)[0], "11 documents", "4 domains", "too narrow")
    enough = small.facts | {"heldout_documents": 3 * small.facts["heldout_documents"]}
    assert "too narrow" not in " ".join(findings(Diagnosis(small._rows, enough)))
    assert "<table" in small._repr_html_() and "patched" in small._repr_html_()


def test_one_document_has_no_intervals_and_decides_nothing(loaded, null):
    text = max(demo.heldout_texts(), key=lambda document: len(document.text))
    found = null.diagnose(
        *loaded, texts=[text], router=BH(0.3), calibration=[], positions=3, tokens=300, draws=20,
        budget_tokens=1024, progress=False,
    )  # fmt: skip
    said = found.summary()
    assert says(said, "one document", "nothing is decided") and says(said, "Give more documents")
    assert "nan" not in said and "[" not in said.partition("Storey's")[0]
    assert "[" not in re.sub(r"\[95 %\s+intervals\]", "", said)
    frame = found.to_frame()
    assert frame["low"].isna().all() and frame["estimate"].notna().any()
    for name in found.figures:
        assert found.figure(name).get_suptitle()


def test_an_alpha_for_each_layer_and_positions_in_few_documents(loaded, null):
    """As `with_budget(per_layer=True)` returns a router; 6 positions are in 6 documents."""
    router = BH((0.1, 0.2, 0.3, 0.4))
    found = null.diagnose(
        *loaded,
        texts=demo.heldout_texts()[::2],
        router=router,
        calibration=[],
        positions=6,
        budget_tokens=1024,
        tokens=4096,
        draws=20,
        progress=False,
    )
    words = " ".join(found.summary().split())
    assert "6 positions in 6 documents" in words and "times alpha" not in words
    assert says(words, "fewer than", "40 documents", "intervals over so few documents")
    table = next(v for v in views(found) if v.title.startswith("False discoveries")).frame
    assert list(table["alpha"][:5]) == ["0.1", "0.2", "0.3", "0.4", ""]
    assert "joint" not in found.tables
    for axis in found.figure("ablation").axes[4:]:  # say why there is nothing in them
        words = " ".join(text.get_text().replace("\n", " ") for text in axis.texts)
        assert "fewer than 10 documents" in words and not len(axis.get_xticks())


def test_files_are_written_whole(small, tmp_path):
    paths = small.save(tmp_path / "new")
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == sorted(p.name for p in paths)
    saved = json.loads((tmp_path / "new" / "diagnosis.json").read_text())
    assert len(saved["rows"]) == len(small.to_frame())
    assert {"torch", "transformers", "moeprof"} <= set(saved["facts"]["machine"]["versions"])
    for name in small.figures:
        png = (tmp_path / "new" / f"diagnosis_{name}.png").read_bytes()
        assert png.startswith(b"\x89PNG") and png.rstrip().endswith(b"IEND\xaeB`\x82")


def drawn(figure):
    """The legend of the first panel."""
    return figure.axes[0].get_legend_handles_labels()[1]


def test_a_figure_of_another_diagnosis_does_not_stay(small, tmp_path, monkeypatch):
    monkeypatch.setattr(Diagnosis, "figure", lambda self, name: Figure((1, 1)))
    without = Diagnosis([r for r in small._rows if r["table"] != "fdp"], small.facts)
    (tmp_path / "diagnosis_mine.png").touch()
    small.save(tmp_path)
    assert (tmp_path / "diagnosis_ablation.png").exists()
    without.save(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [
        "diagnosis_mine.png",
        "diagnosis_p_values.png",
        "diagnosis_selection.png",
    ]


def test_figures_say_what_came_out_and_what_their_letters_mean(small):
    ablation, selection, p_values = map(small.figure, ("ablation", "selection", "p_values"))
    for words in ("FDP (dotted):", "δ0 (the dots):", "r: how many of the best"):
        assert words in ablation.get_supxlabel().replace("\n", " ")
    for words in ("R: how many", "λ, π̂0:", "KS distance:"):
        assert words in selection.get_supxlabel().replace("\n", " ")
    fdp = small.to_frame("fdp")
    name = next(iter(small.facts["compared"]))
    of = (fdp["routing"] == name) & (fdp["layer"] == ALL) & (fdp["quantity"] == "FDP(delta0)")
    row = fdp[of].iloc[0]
    of_all = (fdp["routing"] == name) & (fdp["layer"] == ALL) & (fdp["quantity"] == "false of all")
    of_all = fdp[of_all].iloc[0]
    assert f"of all selected {of_all['estimate']:.2f} [" in ablation.get_suptitle()
    assert f"{name}, FDP" in drawn(ablation)
    assert f"{name}: FDP at δ0 is {row['estimate']:.2f}" in ablation.get_suptitle()
    for alpha, side in (
        (row["low"] - 0.01, "above"),
        (row["high"] + 0.01, "below"),
        (row["estimate"], "not told from"),
    ):
        said = plots.fdp_verdict(fdp, small.facts | {"alpha": float(alpha)})
        assert f"], {side} alpha = " in said
        changed = Diagnosis(small._rows, small.facts | {"alpha": float(alpha)})
        _, false, uniform, *_ = findings(changed)  # after the caution
        answer = {"above": "No", "below": "Yes", "not told from": "Undecided"}[side]
        mean = "0 where nothing is selected"
        assert says(false, f"{answer}: ", mean, f"{row['estimate']:.2f} [", f"alpha is {alpha:g}")
        assert says(false, "Of all selected experts", f"{of_all['estimate']:.2f} [")
        assert says(uniform, "of 4 layers (own routing) and", "(patched)", "π̂0 changes", "above 1")
    without = Diagnosis(small._rows, small.facts | {"alpha": None})
    assert "alpha" not in plots.fdp_verdict(fdp, without.facts)
    assert findings(without)[1] == uniform
    assert not any("FDP" in text for text in drawn(without.figure("ablation")))
    assert "of the tokens" in selection.get_suptitle()
    flat = small.to_frame("flatness")
    for low, high, outside in ((-0.1, 0.1, 0), (0.01, 0.1, 4), (-0.1, -0.01, 4)):
        said = plots.uniform_verdict(flat.assign(band_low=low, band_high=high))
        assert said.endswith(f"{outside} of 4 layers (own routing), {outside} of 4 (patched)")
    below = flat.assign(band_low=-0.1, band_high=-0.01)[flat["quantity"] == ABOVE]
    assert " 0 of 4 layers" in plots.uniform_verdict(below)  # fewer than all are nulls
    assert p_values.get_suptitle() == plots.uniform_verdict(flat)


def test_the_row_of_what_experts_do_together_needs_documents(small):
    layers = len(small.figure("ablation").axes)
    if "joint" in small.tables:
        layers //= 2
    rows = [row for row in small._rows if row["table"] != "joint"]
    ablation = Diagnosis(rows, small.facts).figure("ablation")
    assert len(ablation.axes) == layers
    assert "is not known: fewer than 10 documents" in ablation.get_supxlabel().replace("\n", " ")


def test_what_people_read_has_no_word_of_the_files_own_names(small):
    for text in (small.summary(), small._repr_html_(), as_markdown(small)):
        assert "own routing" in text and "the null in use" in text
        assert "stock" not in text and "null given" not in text


def test_a_figures_title_says_what_decides_most(small):
    frame = small.to_frame("selection")
    for floor, ceiling, said in (
        (0.8, 0.1, "min_k = 1 decides for 80 %"),
        (0.1, 0.7, "decides for 70 %"),
        (0.1, 0.2, "R itself decides for 70 %"),
    ):
        values = {"P(R < min_k)": floor, "P(R > max_k)": ceiling}
        made = frame.assign(estimate=frame["quantity"].map(values))
        assert said in plots.clamp_verdict(made, small.facts)


def test_a_null_without_a_fit_has_no_domains(loaded):
    few = demo.heldout_texts()[::8]
    found = diagnose(
        "normal", *loaded, texts=few, positions=0, tokens=1024, draws=20, progress=False
    )
    assert {"transfer", "fdp"}.isdisjoint(found.tables)
    assert found.figures == ["p_values", "selection"]
    assert "normal" in found.summary()
    for name in found.figures:
        assert all(axis.has_data() for axis in found.figure(name).axes)


def test_bad_input_of_the_function(loaded, null):
    with pytest.raises(TypeError, match="router: expected a moeprof.routers.Router"):
        null.diagnose(*loaded, router="bh")
    with pytest.raises(TypeError, match="texts: expected objects with domain"):
        null.diagnose(*loaded, texts=["a text"])
    with pytest.raises(ValueError, match="at least one"):
        null.diagnose(*loaded, texts=[])
    with pytest.raises(ValueError, match="fitted to"):
        null.diagnose(olmoe(), loaded[1])


def test_command(tmp_path, capsys, monkeypatch):
    fewer, few = demo.calibration_texts()[::5], demo.heldout_texts()[::4]
    monkeypatch.setattr(demo, "calibration_texts", lambda: fewer)  # a null for each domain
    monkeypatch.setitem(diagnose.__kwdefaults__, "budget_tokens", 1024)
    monkeypatch.setitem(diagnose.__kwdefaults__, "draws", 100)
    monkeypatch.setattr(demo, "heldout_texts", lambda: few)
    # test_files_are_written_whole draws.
    monkeypatch.setattr(Figure, "savefig", lambda self, out, **settings: out.write(b"drawn"))
    out = tmp_path / "out"
    options = ("--positions", "6", "--tokens", "1024", "--alpha", "0.2", "--seed", "5")
    assert main(["diagnose", *options, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "False discoveries by ablation, beside alpha" in printed
    assert f"Written: {out}/diagnosis.json" in printed
    # Of its domains each has one document, one none that a null was fitted to.
    transfer = printed.partition("Largest distance")[2].partition("False discoveries")[0]
    assert re.search(r"bible +0\.\d+ ", transfer) and "–" in transfer and "nan" not in transfer
    assert (out / "moeprof.sqlite").exists()
    facts = json.loads((out / "diagnosis.json").read_text())["facts"]
    assert (facts["alpha"], facts["seed"], facts["positions"]) == (0.2, 5, 6)


def test_without_a_folder_or_a_store_nothing_is_kept(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    few = demo.heldout_texts()[::16]
    monkeypatch.setattr(demo, "heldout_texts", lambda: few)
    monkeypatch.setattr(demo, "calibration_texts", lambda: few)
    options = ("--null", "normal", "--positions", "0", "--tokens", "300")
    assert main(["diagnose", *options]) == 0
    first = capsys.readouterr().out.split("\n")
    assert not list(tmp_path.iterdir())
    for said in ("", "Of 2 cells 2 are finished, in s.sqlite"):
        assert main(["diagnose", *options, "--store", "s.sqlite"]) == 0
        out = capsys.readouterr().out
        assert out.startswith(said) and first[1] in out
    assert {path.name for path in tmp_path.iterdir()} == {"s.sqlite", "s.sqlite.lock"}


def test_intervals_cover(null):
    """Of 200 samples of 40 documents, pi0's interval holds the truth in nearly 95 %."""
    rng, inside = np.random.default_rng(0), 0
    for _ in range(200):
        documents = np.repeat(np.arange(40), 25)
        tilt = rng.normal(0, 0.3, 40)[documents][:, None]
        p = scipy.stats.norm.sf(rng.normal(size=(1000, 4)) + tilt)
        cdf = st.cdf_statistic(st.count_p(p, documents, 40))
        found = bootstrap(lambda w, cdf=cdf: st.pi0(cdf(w))[:, 4:5], 40, draws=200)
        inside += found.low[0] <= 1.0 <= found.high[0]
    assert 0.86 <= inside / 200 <= 0.99
