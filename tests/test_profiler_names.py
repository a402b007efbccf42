"""Layers are called by the model's own numbers and by their gates' names, wherever they appear."""

import re

import numpy as np
import pytest
import torch
import transformers
import zoo
from models import olmoe, token_ids
from profiles import layer, make_profile
from torch import nn
from wording import says

import moeprof
from moeprof import demo
from moeprof.models.names import layer_keys, layer_labels, layer_numbers, spans
from moeprof.profile.metrics import load_balance_loss
from moeprof.profiler.records import read_records
from moeprof.studies.ablation import layer_ablation


@pytest.mark.parametrize(
    ("blocks", "labels"),
    [
        (["model.layers.1.mlp", "model.layers.2.mlp"], [1, 2]),
        (["model.layers.0.mlp", "model.layers.12.mlp"], [0, 12]),
        (["transformer.blocks.3.ffn"], [3]),
        (["0", "2"], [0, 2]),
        (
            ["encoder.block.1.layer.1.mlp", "decoder.block.1.layer.2.mlp"],
            ["encoder 1", "decoder 1"],
        ),
        (["encoder.block.1.layer.1.mlp", "encoder.block.3.layer.1.mlp"], [1, 3]),
        (["layers.0.self_attention.experts", "layers.0.mlp"], ["self_attention 0", "mlp 0"]),
        (["tower1.moe", "tower2.moe"], ["tower1.moe", "tower2.moe"]),
        (["a.0.b.0", "a.0.b.1"], ["a.0.b.0", "a.0.b.1"]),
        ([""], ["model"]),
        ([], []),
    ],
)
def test_labels(blocks, labels):
    assert layer_labels(blocks) == labels
    plain = all(isinstance(label, int) for label in labels)
    assert layer_numbers(blocks) == (labels if plain else list(range(len(labels))))


def test_what_may_stand_for_a_layer():
    keys = layer_keys(["model.layers.4.mlp", "model.layers.6.mlp"], ["a.gate", "b.gate"])
    assert keys == {
        4: 0,
        6: 1,
        "model.layers.4.mlp": 0,
        "model.layers.6.mlp": 1,
        "a.gate": 0,
        "b.gate": 1,
    }
    assert spans([1, 2, 3, 5, "x"]) == "1 to 3, 5 and x" and spans([4]) == "4"


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory):
    """A profile of a model whose first layer is dense: its one MoE layer is layer 1."""
    path = tmp_path_factory.mktemp("records") / "records"
    model = zoo.build("deepseek_v3")
    profiler = moeprof.MoEProfiler(model, records=path, trace=True)
    with torch.no_grad(), profiler, profiler.domain("code"):
        model(**zoo.inputs("deepseek_v3", 4, 14))
    return profiler.result(), path


def test_the_first_layer_of_a_deepseek_is_layer_1(deepseek):
    profile, path = deepseek
    assert profile.labels == [1]
    text = profile.summary()
    assert "Layer 1: model.layers.1.mlp" in text and "layer 0" not in text.lower()
    for frame in (profile.to_frame().dropna(subset="layer"), profile.domain_specialisation()):
        assert set(frame["layer"]) == {1}
        assert set(frame["name"]) == set(profile.metrics()) == {"model.layers.1.mlp.gate"}
        assert set(frame["block"]) == {"model.layers.1.mlp"}
    assert set(read_records(path)["layer"]) == {1}
    for layer_ in (1, "model.layers.1.mlp", "model.layers.1.mlp.gate"):
        title = profile.plot("coactivation", layer=layer_).get_suptitle()
        assert "layer 1, as asked for" in title
    with pytest.raises(ValueError, match="layer: expected 1, got 0"):
        profile.plot("coactivation", layer=0)


def later(*numbers):
    """A profile of layers with these numbers."""
    return make_profile(len(numbers), 8, 2, layers=[layer(n) for n in numbers], prefill=(40, 33))


def test_figures_and_findings_of_layers_with_gaps():
    profile = later(3, 5, 7)
    axis = profile.plot("load").axes[0]
    assert [t.get_text() for t in axis.get_yticklabels()] == ["3", "5", "7"]
    right = profile.plot("confidence").axes[0]
    shown = right.xaxis.get_major_formatter()
    assert [shown(place, None) for place in (-1, 0, 0.5, 2, 3)] == ["", "3", "", "7", ""]
    assert "layer 5 to layer 7" in profile.plot("moves", layer=7).get_suptitle()
    with pytest.raises(ValueError, match="layer: expected 5 and 7, got 3"):
        profile.plot("moves", layer=3)
    text = profile.summary()
    rows = re.findall(r"^ *([357]) +\d\.", text, re.MULTILINE)
    assert rows[:3] == ["3", "5", "7"]
    assert not any(f"layer {n}" in text for n in (0, 1, 2, 4, 6))
    compared = profile.compare(later(3, 5, 7))
    assert set(compared.to_frame()["layer"].dropna()) == {3, 5, 7}


def test_routers_of_several_kinds_are_named_by_layer():
    model = olmoe(num_hidden_layers=4)
    routers = {"model.layers.1.mlp.gate": moeprof.routers.TopK(1)}
    with torch.no_grad(), moeprof.patch(model, routers), moeprof.MoEProfiler(model) as profiler:
        model(token_ids())
    router = profiler.result().facts["router"]
    assert router.startswith("layer 0: the model's own") and "; layer 1: TopK(" in router
    assert "; layers 2 to 3: the model's own" in router


@pytest.mark.parametrize("key", [1, "model.layers.1.mlp", "model.layers.1.mlp.gate"])
def test_a_layers_router_by_its_number_its_blocks_name_or_its_gates(key):
    model = olmoe()
    with moeprof.patch(model, {key: moeprof.routers.TopK(1)}) as handle:
        with torch.no_grad(), moeprof.MoEProfiler(model) as profiler:
            model(token_ids())
        assert len(handle.layers) == 2
    assert [m.k_mean for m in profiler.get_metrics().values()] == [2, 1]


def test_a_layer_may_not_be_named_twice_in_two_ways():
    router = moeprof.routers.TopK(1)
    with pytest.raises(ValueError, match="named twice"):
        moeprof.patch(olmoe(), {1: router, "model.layers.1.mlp.gate": router})


@pytest.mark.parametrize("key", [1, "model.layers.1.mlp", "model.layers.1.mlp.gate"])
def test_the_ablation_of_one_layer(key):
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo.PATH, local_files_only=True)
    model = olmoe(vocab_size=len(tokenizer), max_position_embeddings=1024)
    texts = [document.text[:300] for document in demo.heldout_texts()[:2]]
    frame = layer_ablation(model, tokenizer, texts, layers=[key], ks=[1], progress=False)
    assert frame[["layer", "name", "block"]].values.tolist() == [
        [1, "model.layers.1.mlp.gate", "model.layers.1.mlp"]
    ]
    with pytest.raises(ValueError, match=r"layers: expected 0 to 1 or the names .* got \['x'\]"):
        layer_ablation(model, tokenizer, texts, layers=["x"], progress=False)


# ---- one statistic in findings and tables ----


def test_the_slowest_layer_is_that_of_the_largest_median():
    profile = make_profile(3, 8, 2, decode=(1,) * 20, prefill=())
    counts = profile.counts["decode"]
    for own in counts:
        own.latency[:] = 0
    for own, usual, first in zip(counts, (300, 320, 340), (900, 0, 0), strict=True):
        own.latency[usual] = 20
        own.latency[first or usual] += 1
        own.nanoseconds[...] = 0
    # One call of layer 0 took so long that its mean is by far the largest.
    for own, nanoseconds in zip(counts, (10**12, 10**6, 10**6), strict=True):
        own.nanoseconds[...] = nanoseconds
    each = profile.each("decode")
    medians = [m.latency_ms_p50 for m in each]
    assert medians == sorted(medians) and each[0].latency_ms_mean > each[2].latency_ms_mean
    text = " ".join(profile.summary().split())
    share = 100 * medians[2] / sum(medians)
    assert f"(the sum of their medians), {share:.0f} % of it in layer 2, the slowest" in text
    assert says(text, "Some decode steps", "longer", "mean")


def test_the_pooled_loss_stands_beside_that_of_the_layers():
    profile = make_profile(2, 8, 2)
    loads = profile.counts["prefill"]
    for own, expert in zip(loads, (0, 1), strict=True):  # each layer has a favourite of its own
        own.load[0] = 0
        own.load[0, expert] = own.tokens
        own.probability[:] = 0
        own.probability[expert] = own.tokens
    own = [load_balance_loss([c]) for c in profile.counts_of("prefill")]
    mean = profile.load_balance_loss_by_layer("prefill")
    assert mean == pytest.approx(np.mean(own)) and mean > 1.5 * profile.load_balance_loss("prefill")
    text = " ".join(profile.summary().split())
    assert "with all layers' tokens pooled" in text and "the mean of the layers' own" in text
    frame = profile.to_frame()
    at = (frame["metric"] == "load_balance_loss_by_layer") & (frame["phase"] == "all")
    assert frame.loc[at, "value"].tolist() == [profile.load_balance_loss_by_layer()]


def test_a_sequence_of_blocks_has_the_numbers_of_its_places():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.top_k, self.router = 2, nn.Linear(16, 4)
            self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    model = nn.Sequential(nn.Linear(16, 16), Block(), nn.ReLU(), Block())
    assert moeprof.MoEProfiler(model).result().labels == [1, 3]
