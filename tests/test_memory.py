"""Memory: no second copy of the weights, bounded scratch, nothing new in a decode step."""

import json
import sys
from pathlib import Path

import pytest
import util

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's"),
]

MIB = 1 << 20

# Each case is a fork of `forked`, a process that has imported torch and the models: the peaks are
# of a whole process, and no case has the memory that another has freed.
CASES = """
import ctypes, json, re, sys, torch
from models import olmoe, olmoe_config, random_hidden
from torch import nn
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
import moeprof

def status(name):
    found = re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())
    return int(found[1]) * 1024

def begin():
    ctypes.CDLL(None).malloc_trim(0)  # nothing that was freed is used again unseen
    open("/proc/self/clear_refs", "w").write("5")  # the peak begins at what is in use now

# Half an experts layer of OLMoE-1B-7B, 403 MB of bfloat16.
def patched_layer():
    config = olmoe_config(num_experts=32, num_experts_per_tok=8, hidden_size=2048,
                          intermediate_size=1024)
    config._experts_implementation = "eager"
    with torch.device("meta"):
        model = nn.ModuleDict({"mlp": OlmoeSparseMoeBlock(config)}).to(torch.bfloat16)
    model = model.to_empty(device="cpu").eval().requires_grad_(False)
    for parameter in model.parameters():  # one row of random numbers for all: what is quick
        parameter.copy_(torch.empty(parameter.shape[-1]).uniform_(-0.02, 0.02))

    def peak(*lengths):
        begin()
        for length in lengths:
            model.mlp(random_hidden(1, length, 2048, torch.bfloat16))
        return status("VmHWM")

    unpatched = peak(1, 40)
    moeprof.patch(model)
    return unpatched, peak(1, 40, 300)

# Four layers, each 50 MB of experts in float32.
def quantized(bits, dtype):
    sizes = dict(num_hidden_layers=4, num_experts=32, hidden_size=256, intermediate_size=512)
    moeprof.quantize(olmoe(), progress=False)  # the first call loads what all need
    model = olmoe(**sizes).to(getattr(torch, dtype))
    begin()
    before = status("VmRSS")
    report = moeprof.quantize(model, bits, linears=True, progress=False)
    layer = next(row for row in report.layers if row.layer.endswith("mlp"))
    return before, status("VmHWM"), layer.bytes_before, layer.bytes_after

print(json.dumps(globals()[sys.argv[1]](*json.loads(sys.argv[2]))))
"""


@pytest.fixture
def measured(forked):
    """A function of CASES and its arguments: the numbers that it gives in a process of its own."""

    def run(function, *arguments):
        done = forked.run(CASES, function, json.dumps(arguments), folder=Path(__file__).parent)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout)

    return run


def test_peak_of_a_patched_layer_is_that_of_the_unpatched_one(measured):
    """Within 1 % and the 64 MiB of scratch, for many more tokens too."""
    unpatched, patched = measured("patched_layer")
    assert unpatched > 402 * 10**6  # it holds the weights
    assert patched <= 1.01 * unpatched + 64 * MIB


@pytest.mark.parametrize("dtype", util.DTYPES)
def test_scratch_is_bounded(dtype):
    """However long the prompt: 64 MiB beside the input and the output."""
    rows = 100 if dtype == "float32" else 200  # more than fit into one piece
    code = f"""if True:
        import re, numpy as np, util
        def peak():
            status = open("/proc/self/status").read()
            return int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) * 1024
        layer = util.Layer(8, 256, 512, {dtype!r})
        ids, weights = util.random_slots(100 * {rows}, 4, 8)
        hidden = np.ascontiguousarray(np.tile(layer.hidden(100), ({rows}, 1)))
        before = peak()
        out = layer(hidden, ids, weights, 2)
        print(peak() - before - out.nbytes)"""
    assert int(util.run_python(code).stdout) <= 66 * MIB  # the threads' stacks come on top


def test_a_decode_step_touches_no_new_memory():
    """Page faults of 200 steps after the first ones: none that comes again with each step."""
    code = """if True:
        import resource, numpy as np, util
        from moeprof import _C
        layer, x = util.Layer(16, 512, 256, "bfloat16"), None
        hidden, (ids, weights) = layer.hidden(1), util.random_slots(1, 8, 16)
        w = layer.hidden(700)
        def step():
            layer(hidden, ids, weights, 2)
            _C.dense(hidden, w.ctypes.data, 700, 0, "bfloat16", "bfloat16", 2)
        def faults():
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(20): step()
        before = faults()
        for _ in range(200): step()
        print(faults() - before)"""
    assert int(util.run_python(code).stdout) < 100


@pytest.mark.parametrize("bits, dtype", ((8, "float32"), (4, "float32"), (8, "bfloat16")))
def test_peak_of_quantize_is_the_model_and_one_layer(measured, bits, dtype):
    """Each layer is freed before the next is made; measured of the whole process."""
    before, peak, layer, quantised = measured("quantized", bits, dtype)
    assert layer == 32 * 3 * 256 * 512 * (4 if dtype == "float32" else 2)
    assert before > 4 * layer  # the process holds the weights
    assert peak <= before + quantised + 4 * MIB
