"""A profile: its tables, its text, its figures, its files, and two of them beside each other."""

import re
import sys

import numpy as np
import pandas
import pytest
from profiles import ROOF, layer, make_profile, with_vocabulary
from wording import says

from moeprof.models.phases import PHASES
from moeprof.profile import tables
from moeprof.profile.findings import findings
from moeprof.profile.metrics import SCALARS
from moeprof.profile.result import Profile

pytestmark = pytest.mark.once

FIGURES = [
    "load",
    "k",
    "confidence",
    "latency",
    "roofline",
    "union",
    "cache",
    "coactivation",
    "moves",
    "domains",
]
EMPTY = dict(prefill=(), decode=())


# ---------------------------------------------------------------- numbers


def test_both_phases_together_are_their_sum(profile):
    both, apart = profile.metrics(), [profile.metrics(phase) for phase in PHASES]
    assert list(both) == [f"model.layers.{i}.mlp.gate" for i in range(3)]
    for name, metrics in both.items():
        for count in ("tokens", "tokens_padding", "steps", "flops_total"):
            assert getattr(metrics, count) == sum(getattr(m[name], count) for m in apart) > 0
    assert profile.phases == ["prefill", "decode"]
    assert profile.metrics("prefill")["model.layers.0.mlp.gate"].steps == 3
    with pytest.raises(ValueError, match="phase: expected one of 'prefill', .*got 'dekode'"):
        profile.metrics("dekode")


def test_the_frame_is_tidy_and_holds_the_metrics(profile):
    frame = profile.to_frame()
    columns = ["layer", "name", "block", "expert", "phase", "metric", "value"]
    assert list(frame.columns) == columns
    keys = ["layer", "expert", "phase", "metric"]
    assert not frame.duplicated(keys).any()
    assert set(frame["phase"]) == {"prefill", "decode", "all"}
    one = frame[(frame["layer"] == 1) & (frame["phase"] == "decode")]
    metrics = profile.each("decode")[1]
    scalars = one[one["expert"].isna()].set_index("metric")["value"]
    for name in SCALARS:
        assert scalars[name] == pytest.approx(getattr(metrics, name), nan_ok=True), name
    load = one[one["metric"] == "expert_load"].sort_values("expert")
    assert load["expert"].tolist() == list(range(12))
    assert load["value"].tolist() == pytest.approx(metrics.expert_load)
    assert scalars["k_distribution_2"] == metrics.tokens
    whole = frame[frame["layer"].isna()].set_index(["phase", "metric"])["value"]
    assert whole["all", "z_loss"] == pytest.approx(profile.z_loss())
    assert whole["decode", "load_balance_loss"] == profile.load_balance_loss("decode")
    assert whole["all", "memory_peak_mb"] == 512.5
    assert whole["all", "device_memory_peak_mb"] == 3072


def test_domains_beside_an_even_choice(profile):
    frame = profile.domain_specialisation()
    assert len(frame) == 3 * 12 * 2
    for (index, label), rows in frame.groupby(["layer", "domain"]):
        table = profile.domains[label][index]
        np.testing.assert_allclose(rows["share"], table[:-1] / table[-1])
        assert rows["share"].sum() == pytest.approx(2)  # every token goes to two experts
    assert set(frame["baseline"].round(12)) == {round(2 / 12, 12)}
    np.testing.assert_allclose(frame["times"], frame["share"] / frame["baseline"])
    assert (
        frame["tokens"]
        .groupby(frame["layer"])
        .apply(lambda t: t.unique().sum())
        .eq(profile.each()[0].tokens)
        .all()
    )


def test_a_domains_table_may_be_wider_than_a_layer(profile):
    table = {"a": np.zeros((3, 21), np.int64), "b": np.zeros((3, 21), np.int64)}
    table["a"][:, 0], table["a"][:, 20] = 8, 4
    wide = Profile(profile.layers, profile.counts, {}, domains=table)
    frame = wide.domain_specialisation()
    assert frame["expert"].max() == 11
    assert frame.loc[(frame["domain"] == "a") & (frame["expert"] == 0), "share"].eq(2).all()
    assert frame.loc[frame["domain"] == "b", "share"].isna().all()


def test_input_tokens_by_expert(profile):
    frame = with_vocabulary(profile).vocabulary_specialisation(minimum=8)
    found = {row["expert"]: [] for row in frame.to_dict("records")}
    for row in frame.to_dict("records"):
        found[row["expert"]].append((row["token"], row["text"], row["share"]))
    assert found == {
        4: [(11, "if", 1.0), (22, " the", 0.25)],
        5: [(11, "if", 1.0)],
        7: [(22, " the", 1.75)],
    }
    assert frame["baseline"].iloc[0] == pytest.approx(66 / 33 / 12)
    rare = with_vocabulary(profile).vocabulary_specialisation(minimum=1, top=1)
    assert rare.set_index("expert")["token"].to_dict() == {4: 11, 5: 11, 7: 33}
    assert len(with_vocabulary(profile).vocabulary_specialisation(minimum=99)) == 0
    assert "' the' 175 %" in with_vocabulary(profile).summary()
    with pytest.raises(ValueError, match="minimum: expected at least 1 occurrence, got 0"):
        with_vocabulary(profile).vocabulary_specialisation(minimum=0)


def test_input_tokens_are_shown_by_layer_and_written(profile, tmp_path):
    made = with_vocabulary(profile)
    words = made.vocabulary
    words |= {"layers": [0, 2], "counts": np.stack([words["counts"][0]] * 2)}
    shown = tables.vocabulary(made)
    assert [row[:2] for row in shown.rows] == [[n, e] for n in "02" for e in "745"]
    assert "fewer than 8 times" in shown.note
    made.save(tmp_path)
    read = pandas.read_csv(tmp_path / "vocabulary.csv")
    expected = made.vocabulary_specialisation()
    assert list(read.columns) == list(expected.columns) and len(read) == len(expected)
    assert set(read["layer"]) == {0, 2} and read["seen"].min() >= 8
    words["seen"] = np.array([1, 2, 3])
    assert "No input token occurred 8 times." in made.summary().replace("\n  ", " ")


def test_what_was_not_recorded_says_so(profile):
    for ask, reason in (
        (profile.vocabulary_specialisation, "no input tokens"),
        (lambda: make_profile(**EMPTY, domains=()).domain_specialisation(), "no domains"),
        (lambda: Profile(profile.layers, profile.counts, {}).save_trace("x"), "no events"),
    ):
        with pytest.raises(ValueError, match=reason):
            ask()


# ---------------------------------------------------------------- text


@pytest.mark.parametrize("shape", [(4, 64, 8), (48, 128, 8), (1, 2, 1)])
@pytest.mark.parametrize("sizes", [{}, {"prefill": ()}, {"decode": ()}])
def test_the_summary_fits_and_has_a_row_for_each_layer(shape, sizes):
    sizes = {"prefill": (30,), "decode": (1, 1), **sizes}
    slow = [layer(i, shape[1], shape[2], 20000, 9000) for i in range(shape[0])]
    text = make_profile(*shape, **sizes, layers=slow, roofline=ROOF, pairs=False).summary()
    assert max(map(len, text.split("\n"))) <= 100
    table = text.split("\nBy layer\n")[1].split("\nMost and least")[0]
    rows = [line.split() for line in table.split("\n") if line.split()[:1] != []]
    rows = [row for row in rows if row[0].isdigit()]
    assert [row[0] for row in rows] == [str(i) for i in range(shape[0])]
    phases = [name for name in PHASES if sizes.get(name)]
    assert all(len(row) == 1 + 8 * len(phases) for row in rows)  # no cell is cut or folded
    for phase in PHASES:
        assert (f"── {phase} ─" in table) == (phase in phases)


def test_the_summary_fits_a_narrower_screen(profile, monkeypatch):
    """The phases stand one below the other there, and no number is cut or on two lines."""
    numbers = re.findall(r"[\d.]+", re.sub(r"\s", " ", profile.summary()))
    monkeypatch.setenv("COLUMNS", "80")
    text = profile.summary()
    assert max(map(len, text.split("\n"))) <= 80
    assert set(numbers) == set(re.findall(r"[\d.]+", text))
    assert text.index("── prefill ─") < text.index("── decode ─")
    by_layer = text[text.index("By layer") : text.index("Most and least")]
    assert by_layer.count(" layer ") == len(profile.phases)


@pytest.mark.parametrize("columns", (20, 30, 40, 44, 60))
def test_the_summary_of_a_very_narrow_screen_names_its_phases(profile, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    text = profile.summary()
    assert all(f"── {phase}" in text for phase in profile.phases)


def test_the_summary_is_the_same_in_a_notebook(profile, monkeypatch):
    """There rich would display what it was to write, and leave nothing to return."""
    expected = profile.summary()
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert profile.summary() == expected and "By layer" in expected


def test_the_summary_says_what_was_measured(profile, capsys):
    text = " ".join(profile.summary().split())
    prefill, decode = (profile.each(phase)[0] for phase in profile.phases)
    assert f"prefill {prefill.tokens} tokens in 3 steps; decode {decode.tokens} tokens" in text
    padded = prefill.tokens_padding + decode.tokens_padding
    assert f"{padded} positions of padding were computed as well" in text
    assert "Least balanced in decode: layer" in text and "load-balance loss" in text
    assert "Layers 0 to 2: model.layers.{0 … 2}.mlp" in text
    profile.print_summary()
    assert capsys.readouterr().out.split() == profile.summary().split()


@pytest.mark.parametrize("steps, many", [(180, False), (40, True)])
def test_experts_that_were_never_selected_are_named(steps, many):
    """A few one by one; of many, the layer with most."""
    found = make_profile(2, 24, 2, prefill=(), decode=(1,) * steps, seed=1)
    idle = {
        f"layer {i}": [str(e) for e, load in enumerate(m.counts.load[0]) if not load]
        for i, m in enumerate(found.each("decode"))
    }
    count = sum(map(len, idle.values()))
    line = next(line for line in findings(found) if line.startswith("Never selected"))
    assert f"{count} of 48 experts" in line and (count > 4) == many
    if many:
        most = max(idle, key=lambda name: len(idle[name]))
        assert f"most in {most}, {len(idle[most])}" in line
    else:
        named = re.findall(r"(layer \d): experts? ([^;)]+)", line)
        assert {name: re.findall(r"\d+", which) for name, which in named} == {
            name: experts for name, experts in idle.items() if experts
        }


def test_nothing_counted_is_said_with_its_reason():
    told = {
        (0, 0, 1): "the model did not run while the profiler was active",
        (3, 5, 1): "all 3 forwards of the model were left out, by warmup_steps=5",
        (1, 1, 1): "the only forward of the model was left out, by warmup_steps=1",
        (9, 2, 50): "all 9 forwards of the model were left out, by warmup_steps=2 and sampling_"
        "rate=50",
    }
    for (left_out, warmup, rate), reason in told.items():
        facts = {"steps_left_out": left_out, "warmup_steps": warmup, "sampling_rate": rate}
        empty = make_profile(**EMPTY, facts={"steps": 0, **facts})
        for text in (empty.summary(), empty._repr_html_(), empty.to_html()):
            assert f"Nothing was counted: {reason}" in text.replace("\n  ", " ")
            assert "By layer" not in text and "0.00" not in text and "nan" not in text
        assert empty.figures == []
        with pytest.raises(ValueError, match="no step was counted"):
            empty.plot("latency")


def test_padding_only_and_unknown_sizes_are_no_obstacle():
    padded = make_profile(padding=1.0)
    assert "prefill 0 tokens in 2 steps" in padded.summary()
    assert padded.figures == ["latency", "roofline", "union", "cache"]
    assert padded._repr_html_()
    plain = make_profile(roofline=None, pairs=False, domains=(("all"),))
    assert "roof" not in plain.summary()
    assert not {"roofline", "coactivation", "moves"} & set(plain.figures)


def test_a_roof_that_is_exceeded_is_explained():
    low = ROOF._replace(read_gbs=1.0)
    text = " ".join(make_profile(4, roofline=low).summary().split())
    assert says(text, "More than 100 %", "decode, layers 0 to 3", "in a cache", "another load")
    assert (
        "More than 100 %" not in make_profile(4, roofline=ROOF._replace(read_gbs=900.0)).summary()
    )


# ---------------------------------------------------------------- figures


@pytest.mark.parametrize("shape", [(3, 8, 1), (1, 2, 2), (2, 5, 5)])
def test_shapes_at_the_edge_are_drawn(shape):
    made = make_profile(*shape)
    for name in made.figures:
        made.plot(name).canvas.draw()
    assert ("coactivation" in made.figures) == (shape[2] > 1)
    assert ("moves" in made.figures) == (shape[0] > 1)
    assert made.to_html() and made.summary()


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_names_its_axes(profile, name):
    before = "matplotlib.pyplot" in sys.modules
    figure = profile.plot(name)
    figure.canvas.draw()
    drawn = [axis for axis in figure.axes if axis.get_label() != "<colorbar>"]
    assert drawn and figure.get_suptitle()
    for axis in drawn:
        assert axis.get_xlabel()
        assert axis.get_ylabel() or [t.get_text() for t in axis.get_yticklabels()]
        assert axis.has_data()
    assert ("matplotlib.pyplot" in sys.modules) == before


def test_the_load_map_shows_the_loads(profile):
    image = profile.plot("load").axes[1].get_images()[0].get_array()
    expected = np.array([m.expert_load for m in profile.each("decode")]) * 12
    np.testing.assert_array_equal(np.ma.getmaskarray(image), expected == 0)
    assert (expected == 0).any()
    np.testing.assert_allclose(2 ** image[expected > 0], expected[expected > 0])


def test_an_unsure_router_is_drawn_from_0_and_its_number_has_digits():
    made = make_profile(2, 8, 2, decode=())
    for counts in made.counts["prefill"]:
        for histogram in (counts.confidence, counts.gap):
            histogram[0], histogram[1:] = histogram.sum(), 0
        counts.sums[0] = 1.4e-5 * counts.confidence.sum()
    assert "1.4e-05" in made.summary()
    assert [axis.get_ylim()[0] for axis in made.plot("confidence").axes] == [0, 0]


def test_colours_are_below_the_maps_and_never_is_crossed(profile):
    for name in ("load", "domains", "coactivation", "moves"):
        figure = profile.plot(name)
        figure.canvas.draw()
        (bar,) = (axis for axis in figure.axes if axis.get_label() == "<colorbar>")
        maps = [axis for axis in figure.axes if axis.get_images()]
        assert bar.get_position().y1 < min(axis.get_position().y0 for axis in maps)
        assert bar.get_position().x1 < 0.5
        assert all(axis.patch.get_hatch() for axis in maps)


def test_a_title_says_crossed_where_something_is(profile):
    every = make_profile(2, 8, 6, prefill=(400, 400), decode=(400, 400))
    assert all(np.all(m.expert_load) for phase in every.phases for m in every.each(phase))
    for of, left_out in ((profile, ""), (every, "crossed")):
        for name in ("load", "coactivation", "moves"):
            maps = [axis for axis in of.plot(name).axes if axis.get_images()]
            for axis in maps:
                crossed = np.ma.getmaskarray(axis.get_images()[0].get_array())
                if name == "coactivation":
                    crossed = crossed & ~np.eye(len(crossed), dtype=bool)
                    assert "diagonal" in axis.get_title(loc="left")
                said = "never selected" in axis.get_title(loc="left")
                assert said == crossed.any() and not (left_out and said)


def test_the_range_of_experts_per_token_is_seen_of_each_phase():
    figure = make_profile(3, 12, 4, skip=0.3).plot("k")
    left, right = figure.axes
    assert left.get_xticks().tolist() == [0, 1, 2, 3, 4]
    bars = [np.array(of.get_segments()) for of in right.collections]
    assert len(bars) == 2 and not np.isin(bars[0][:, 0, 0], bars[1][:, 0, 0]).any()


def test_bars_are_in_the_order_of_the_numbers_beside_them(profile):
    for name in ("coactivation", "moves"):
        right = profile.plot(name).axes[1]
        points = [float(text.get_text()) for text in right.texts]
        assert points == sorted(points, reverse=True) and len(points) == len(right.patches)


def test_steps_of_several_sizes_have_a_mean_number_of_tokens():
    figure = make_profile(2, 8, 2, prefill=(7, 8), decode=(1, 1)).plot("latency")
    titles = [axis.get_title("left") for axis in figure.axes]
    assert titles == [
        "prefill: 2 steps, 7.5 tokens on average",
        "decode: 2 steps, 1 token on average",
    ]


def test_the_pairs_of_a_layer_that_is_asked_for(profile):
    strongest = profile.plot("coactivation").get_suptitle()
    assert "where pairs differ most from chance" in strongest
    assert "layer 2, as asked for" in profile.plot("coactivation", layer=2).get_suptitle()
    assert "layer 1 to layer 2" in profile.plot("moves", layer=2).get_suptitle()
    for name, wrong, first in (("coactivation", 3, 0), ("moves", 0, 1)):
        with pytest.raises(ValueError, match=f"layer: expected {first} to 2, got {wrong}"):
            profile.plot(name, layer=wrong)


def test_the_layer_with_the_strongest_structure_is_found():
    made = make_profile(3, 12, 2, domains=("only",), seed=1)
    for counts in made.counts.values():
        pairs = np.zeros((12, 12), np.int64)
        for i in range(0, 12, 2):  # experts 0 and 1, 2 and 3 ... always go together
            pairs[i : i + 2, i : i + 2] = 50
        counts[1].pairs[:], counts[1].load[0] = pairs, 50
    assert "layer 1, where" in made.plot("coactivation").get_suptitle()


def test_unknown_figures_and_options_are_refused(profile):
    assert profile.figures == FIGURES
    with pytest.raises(ValueError, match="figure: expected one of load, .*got 'loads'"):
        profile.plot("loads")
    with pytest.raises(ValueError, match="takes no options, got layer"):
        profile.plot("load", layer=1)
    with pytest.raises(ValueError, match="there is no measured roof"):
        make_profile(roofline=None).plot("roofline")
