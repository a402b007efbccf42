"""moeprof.inspect: what it says of each family, beside what the zoo knows by hand."""

import every
import pytest
import torch
import zoo
from models import assert_unchanged, blocks, olmoe, snapshot

import moeprof
from moeprof import cli
from moeprof.models import families


def test_of_olmoe():
    model = olmoe()
    before = snapshot(model)
    (first, second) = moeprof.inspect(model)
    assert_unchanged(model, before)
    assert first[2:] == second[2:]
    assert (first.layer, first.name, second.layer) == (0, "model.layers.0.mlp", 1)
    assert (first.block, first.family) == ("OlmoeSparseMoeBlock", "olmoe")
    assert (first.num_experts, first.top_k) == (8, 2)
    assert (first.hidden_size, first.intermediate_size) == (32, 16)
    assert (first.dtype, first.device, first.activation) == ("float32", "cpu", "silu")
    assert first.bytes == sum(p.nbytes for p in blocks(model)[0].parameters())
    assert (first.path, first.reason) == ("fused", "")
    assert first.rule == "softmax, top-k"
    scaled = moeprof.inspect(olmoe(norm_topk_prob=True))[0].rule
    assert scaled.startswith("softmax, top-k") and "sum 1" in scaled
    with moeprof.patch(model):
        assert [layer.path for layer in moeprof.inspect(model)] == ["fused", "fused"]


def test_what_can_not_run_says_why():
    model = olmoe()
    blocks(model)[1].to("meta")
    first, second = moeprof.inspect(model)
    assert first.path == "fused" and second.path == "the model's own"
    assert second.device == "meta" and "meta" in second.reason
    text = str(moeprof.inspect(model))
    assert "Layer 1: " in text and "moeprof.patch(model)" in text


@pytest.mark.parametrize("name", zoo.HERE)
def test_of_every_family(name, monkeypatch):
    """E, k and H are those of the zoo; what isn't patched has a reason, and never a wrong size."""
    monkeypatch.setenv("COLUMNS", "80")
    found = moeprof.inspect(zoo.build(name))
    assert max(map(len, str(found).splitlines())) <= 80
    for layer in found:
        assert layer.activation in (None, "silu", "gelu_tanh", "relu")
        assert layer.num_experts == zoo.E and layer.hidden_size == zoo.H
        assert layer.intermediate_size in (None, zoo.INTERMEDIATE)
        assert (layer.path in ("fused", "seam")) == (not layer.reason)
        assert layer.dtype == "float32"


@pytest.mark.skipif(not zoo.V5, reason="transformers 4 has no experts implementations")
def test_what_patch_has_no_record_of_is_the_models_own(monkeypatch):
    """As of code that comes with a model from the hub: what it says is what patch does."""
    model = zoo.build("mixtral")
    left = tuple(record for record in families.FAMILIES if record.name != "mixtral")
    monkeypatch.setattr(families, "FAMILIES", left)
    for layer in moeprof.inspect(model):
        assert layer.path == "the model's own" and "no record of Mixtral" in layer.reason
        assert 'set_experts_implementation("moeprof") runs its experts in C' in layer.reason
    with pytest.raises(ValueError, match="No routers found"):
        moeprof.patch(model)


@pytest.mark.skipif(not zoo.V5, reason="transformers 4 has none of these families")
@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("deepseek_v4", "its router chooses by input_ids, not by its logits"),
        ("inkling", "shared experts take part of the weights"),
        ("zaya", "a token may choose no expert"),
    ],
)
def test_why_a_rule_has_no_name(family, words):
    layer = moeprof.inspect(every.build(family))[0]
    assert layer.path == "experts only" and words in layer.reason
    assert "Error" not in layer.reason


def test_as_table_page_and_frame():
    pytest.importorskip("pandas")
    found = moeprof.inspect(olmoe())
    frame = found.to_frame()
    assert list(frame["layer"]) == [0, 1] and frame["path"][0] == "fused"
    lines = str(found).splitlines()
    assert lines[0].split()[:3] == ["layer", "E", "k"]
    assert lines[1].startswith("0-1") and lines[1].endswith("fused")
    assert lines[2] == "Layer 0-1: OlmoeSparseMoeBlock, family olmoe"
    assert found._repr_html_().count("<tr>") == 2


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match="inspect: model: expected a torch.nn.Module"):
        moeprof.inspect(3)
    with pytest.raises(ValueError, match="No routers found"):
        moeprof.inspect(torch.nn.Linear(2, 2))


def test_on_the_command_line(capsys):
    """Of the demo model, which is the default and has a name."""

    def printed(*options: str) -> list[str]:
        """Its lines, without the one that is measured: it may change from load to load."""
        assert cli.main(["inspect", *options]) == 0
        lines = capsys.readouterr().out.splitlines()
        return [line for line in lines if not line.startswith("On huge pages")]

    lines = printed()
    assert any("OlmoeSparseMoeBlock" in line for line in lines)
    assert any("fused" in line for line in lines)
    assert printed("--model", "demo") == lines
