"""A family of MoE blocks is a record: with one more, `patch` runs that family too."""

import pytest
import torch
import zoo

import moeprof
from moeprof.models import families
from moeprof.models.families.base import Family

QWEN3 = Family(
    name="qwen3_moe",
    module="transformers.models.qwen3_moe.modeling_qwen3_moe",
    block="Qwen3MoeSparseMoeBlock",
    router="Qwen3MoeTopKRouter",
    experts="Qwen3MoeExperts",
    expert="Qwen3MoeMLP",
)


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", (*families.FAMILIES, QWEN3))
    return zoo.build("qwen3_moe")


def test_a_record_is_all_that_a_family_of_these_layouts_takes(model):
    inputs = zoo.inputs("qwen3_moe")
    with torch.no_grad():
        stock = model(**inputs).logits
        with moeprof.patch(model) as handle:
            assert len(handle.layers) == 2 and not handle.fallbacks
            assert (model(**inputs).logits - stock).abs().max() < 1e-4
        with moeprof.patch(model, "topk", k=1) as handle:
            seen = []
            handle.on_routing(lambda layer, routing: seen.append(routing.counts))
            assert (model(**inputs).logits - stock).abs().max() > 1e-2
            assert all((counts == 1).all() for counts in seen) and len(seen) == 2
        assert torch.equal(model(**inputs).logits, stock)


def test_inspect_knows_it(model):
    assert {(layer.family, layer.path) for layer in moeprof.inspect(model)} == {
        ("qwen3_moe", "patch")
    }


def test_without_the_record_it_is_named_as_unknown():
    with pytest.raises(ValueError, match="No routers found in Qwen3Moe.*OlmoeSparseMoeBlock"):
        moeprof.patch(zoo.build("qwen3_moe"))
