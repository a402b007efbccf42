"""Bad input on a model of each family: routers that return nonsense, and models that aren't
transformers'."""

import copy
import importlib
import sys
import types
from pathlib import Path

import every
import pytest
import torch
from models import assert_unchanged, snapshot
from test_every_family import PATCHED, ROUTED, stock

import moeprof

each_routed = pytest.mark.parametrize("family", ROUTED)
each_patched = pytest.mark.parametrize("family", PATCHED)


def _choice(logits, k=2):
    ids = torch.arange(k) % logits.shape[1]
    return torch.full((len(logits), k), 0.5), ids.repeat(len(logits), 1)


BAD = {  # {what: (the router, the error)}
    "k above E": (
        lambda z: _choice(z, z.shape[1] + 1),
        "9 experts for a token, and there are 8",
    ),
    "an id above": (lambda z: (_choice(z)[0], _choice(z)[1] + z.shape[1] + 1), "index"),
    "an id below": (lambda z: (_choice(z)[0], _choice(z)[1] - 7), "index"),
    "NaN": (lambda z: (_choice(z)[0] * torch.nan, _choice(z)[1]), "NaN"),
}


@each_routed
def test_a_router_that_returns_nonsense(family):
    """The error names the layer and its family, and the model is none the worse."""
    found = stock(family)
    for router, words in BAD.values():
        with moeprof.patch(found.model, router) as handle:
            first = handle.layers[0]
            with pytest.raises(ValueError, match=words) as caught:
                every.run(found.model, found.inputs)
            assert f"{first.name} ({first.family.family.name}): " in str(caught.value)
    assert torch.equal(every.run(found.model, found.inputs), found.output)


@each_patched
def test_two_models_of_one_config_object(family):
    """What is done to one is not done to the other."""
    one = every.build(family)
    other = type(one)(one.config).eval()
    other.load_state_dict(one.state_dict())
    before, inputs = snapshot(other), stock(family).inputs
    expected = every.run(other, inputs)
    with moeprof.patch(one):
        every.run(one, inputs)
        assert torch.equal(every.run(other, inputs), expected)
    assert_unchanged(other, before)
    with moeprof.patch(other):
        assert torch.equal(every.run(one, inputs), expected)


@pytest.fixture
def remote(monkeypatch):
    """The classes of a family under a module that isn't transformers', as remote code has them."""
    module = importlib.import_module("transformers.models.olmoe.modeling_olmoe")
    copied = types.ModuleType("transformers_modules.someone.modeling_olmoe")
    copied.__file__, copied.__package__ = module.__file__, module.__package__  # for its imports
    monkeypatch.setitem(sys.modules, copied.__name__, copied)
    exec(compile(Path(module.__file__).read_text(), module.__file__, "exec"), vars(copied))
    return copied


def test_a_model_of_remote_code(remote, monkeypatch):
    """It is refused, and nothing of it runs or changes; `inspect` says why."""
    config = copy.deepcopy(stock("olmoe").model.config)
    model = remote.OlmoeForCausalLM(config).eval()
    before = snapshot(model)
    for kind in {type(module) for module in model.modules()}:
        if kind.__module__ == remote.__name__ and "forward" in vars(kind):
            monkeypatch.setattr(kind, "forward", lambda *_, **__: pytest.fail("it ran"))
    for options in ({}, {"router": "topk", "k": 1}, {"strict": False}):
        with pytest.raises(ValueError, match="No routers found in OlmoeForCausalLM"):
            moeprof.patch(model, **options)
    layers = moeprof.inspect(model)
    assert len(layers) == 2
    for layer in layers:
        assert layer.family is None and layer.path != "fused"
        assert "no record of OlmoeSparseMoeBlock" in layer.reason
    assert_unchanged(model, before)
