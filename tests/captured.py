"""All of a model that a run may not change, and whether it is as it was."""

import copy
from types import SimpleNamespace

import torch
from models import assert_unchanged, snapshot, token_ids

import moeprof
from moeprof.backends import cpu
from moeprof.measure.bits import words_of


def tensors(model):
    """Clones of all tensors of the modules, also of those that are no parameter or buffer."""
    return {
        f"{name}.{key}": value.detach().clone()
        for name, module in model.named_modules()
        for held in (module._parameters, module._buffers, vars(module))
        for key, value in held.items()
        if isinstance(value, torch.Tensor)
    }


def capture(model):
    parameters = {
        name: (p, p.data_ptr(), p.dtype, p.requires_grad, p.grad, dict(vars(p)))
        for name, p in model.named_parameters()
    }
    with torch.no_grad():
        logits = model(input_ids=token_ids()).logits
    return SimpleNamespace(
        modules=snapshot(model),
        classes=[type(m) for m in model.modules()],
        tensors=tensors(model),
        parameters=parameters,
        logits=logits,
        configs=[copy.deepcopy(vars(c)) for c in (model.config, model.generation_config)],
        threads=(torch.get_num_threads(), moeprof.get_num_threads(), cpu._threads),
    )


def assert_as_before(model, before):
    assert_unchanged(model, before.modules)
    after = capture(model)
    assert after.classes == before.classes and after.threads == before.threads
    assert after.configs == before.configs
    assert after.tensors.keys() == before.tensors.keys()
    for name, tensor in before.tensors.items():
        assert torch.equal(words_of(after.tensors[name]), words_of(tensor)), name
    for name, (parameter, *facts) in before.parameters.items():
        assert after.parameters[name][0] is parameter and after.parameters[name][1:] == (*facts,)
    assert torch.equal(words_of(after.logits), words_of(before.logits))
