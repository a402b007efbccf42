"""Every family with its experts in 8 and 4 bits: what its stock model computes, in float64, with
the weights that the bytes stand for, is the truth."""

import copy

import every
import pytest
import torch
from models import V5
from test_every_family import PATCHED, ROUTED, SAMPLE, own_k

import moeprof
from moeprof.models.blocks import find_blocks
from moeprof.quantizing.convert import FORMATS, decoded, encoded, matrices_of


def by_turns(families, all_bits=(8, 4)):
    """Of SAMPLE both; of the others by turns, and else with the mark `families`."""
    for n, family in enumerate(families):
        for bits in all_bits:
            left_out = V5 and family not in SAMPLE and bits != all_bits[n % 2]
            yield pytest.param(family, bits, marks=[pytest.mark.families] * left_out)


def round_weights(model, bits):
    """Write into the experts what a quantised copy of them keeps."""
    with torch.no_grad():
        for block in find_blocks(model):
            for matrices in matrices_of(block.family.readable(block.module)[0]):
                for matrix in matrices:
                    data = encoded(matrix, FORMATS[bits])
                    matrix.copy_(decoded(data, *matrix.shape, FORMATS[bits]))


def stands_in(model):
    """Or why no other module can take the place of its experts."""
    return not any(block.family.no_stand_in for block in find_blocks(model))


def rounded(model, bits):
    """(inputs, output, truth) of the stock model with rounded weights."""
    model = copy.deepcopy(model)
    round_weights(model, bits)
    inputs = every.inputs(model)
    return inputs, every.run(model, inputs), every.truth(model, inputs)


@pytest.mark.parametrize("family, bits", [*by_turns(PATCHED)])
def test_experts_compute_with_what_is_kept(family, bits):
    model = every.build(family)
    if not stands_in(model):
        with pytest.raises(ValueError, match="can't be quantised: transformers 4.57 calls"):
            moeprof.quantize(model, bits)
        return
    inputs, output, truth = rounded(model, bits)
    bound = max(4 * every.error(output, truth), 1e-6)
    assert every.error(every.run(model, inputs), truth) > bound  # its weights are rounded
    report = moeprof.quantize(model, bits, exact=True, progress=False)
    assert {row.format for row in report.layers} == {FORMATS[bits]}
    alone = every.run(model, inputs)
    assert every.error(alone, truth) <= bound
    with moeprof.patch(model):
        assert every.error(every.run(model, inputs), truth) <= bound
    if family in ROUTED:
        with moeprof.patch(model, **own_k(family)):
            assert every.error(every.run(model, inputs), truth) <= bound
    assert torch.equal(every.run(model, inputs), alone)


@pytest.mark.parametrize("family", ("qwen2_moe", "deepseek_v3", "mixtral"))
def test_linear_layers_compute_with_what_is_kept(family):
    model, rounded = every.build(family), every.build(family)
    report = moeprof.quantize(model, linears=True, exact=True, progress=False)
    blocks = {block.name for block in find_blocks(rounded)}
    round_weights(rounded, 8)
    linears = [r.layer for r in report.layers if r.format == "q8" and r.layer not in blocks]
    assert any("self_attn" in name for name in linears) and "lm_head" in linears
    with torch.no_grad():
        for name in linears:
            weight = rounded.get_submodule(name).weight
            weight.copy_(decoded(encoded(weight, "q8"), *weight.shape, "q8"))
    inputs = every.inputs(model)
    output, truth = every.run(rounded, inputs), every.truth(rounded, inputs)
    bound = max(4 * every.error(output, truth), 1e-6)
    own = every.build(family)
    assert every.error(every.run(own, inputs), truth) > bound  # the weights are rounded
    assert every.error(every.run(model, inputs), truth) <= bound
