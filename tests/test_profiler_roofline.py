"""The roofs of a model: its own weights are read, once, and nothing is changed."""

import copy
import gc
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from models import assert_unchanged, olmoe, snapshot
from torch import nn

from moeprof.measure.machine import devices_under
from moeprof.measure.roofline import Roofline, known_roofline, roofline

module = import_module("moeprof.measure.roofline")  # the function has the module's name


@pytest.fixture(autouse=True)
def short(monkeypatch):
    for name in ("READ_SECONDS", "FIRST_SECONDS", "GEMM_SECONDS"):
        monkeypatch.setattr(module, name, 0.01)


class Read:
    """Stands in the place of a piece and tells that it was read."""

    def __init__(self, piece, seen):
        self.piece, self.seen, self.nbytes = piece, seen, piece.nbytes

    def max(self):
        self.seen.append(self.piece)
        return self.piece.max()


def memory(tensor):
    return tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes


def model_of(*shapes, dtype=torch.float32):
    """A router of 4 experts, and experts that hold 4 times each shape."""
    model = nn.Module()
    model.router, model.experts = nn.Linear(1 << 18, 4), nn.ModuleList()
    for _ in range(4):
        model.experts.append(nn.Module())
        for number, shape in enumerate(shapes):
            weight = nn.Parameter(torch.ones(shape, dtype=dtype))
            model.experts[-1].register_parameter(f"weight_{number}", weight)
    return model


def weights_of(model):
    return list(model.experts.parameters())


def test_what_is_measured_and_nothing_changed():
    model = olmoe()
    before, state = snapshot(model), copy.deepcopy(model.state_dict())
    seed = torch.get_rng_state()
    found = roofline(model)
    assert isinstance(found, Roofline) and found.read_gbs > 0 and found.gemm_gflops > 0
    assert (found.dtype, found.threads) == ("float32", torch.get_num_threads())
    assert found.device == "cpu" and found.conditions == "float32"
    # 2 layers of 8 experts of three 16 x 32 matrices
    assert found.weight_bytes == 2 * 8 * 3 * 16 * 32 * 4
    assert "fit the caches" in found.note and "0.1 MB" in found.note
    assert_unchanged(model, before)
    assert all(torch.equal(state[name], t) for name, t in model.state_dict().items())
    assert torch.equal(seed, torch.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_experts_are_read_in_place_all_of_them(dtype):
    model = model_of((1001, 1001), (700, 999), (5,), dtype=dtype)
    pieces = module._pieces(module._weights(model), module.CPU)
    large = [p for p in weights_of(model) if p.nbytes >= module.CPU.small]
    assert sum(p.nbytes for p in pieces) == sum(p.nbytes for p in large)
    inside = [memory(p) for p in large]
    assert large and all(any(a <= x < y <= b for a, b in inside) for x, y in map(memory, pieces))


def test_weights_off_any_alignment():
    data = bytearray(4 << 20)
    model = nn.Module()
    for offset in (1, 3):  # of a mapped file: any byte may be the first
        words = torch.frombuffer(data, dtype=torch.bfloat16, count=1_000_001, offset=offset)
        assert words.data_ptr() % 2 == 1
        model.weight = nn.Parameter(words.view(-1, 1))
        pieces = module._pieces(module._weights(model), module.CPU)
        assert [p.data_ptr() for p in pieces] == [words.data_ptr()]
        assert roofline(model).dtype == "bfloat16"


def test_without_experts_all_weights_count():
    model = nn.Linear(1024, 512)
    assert roofline(model).weight_bytes == 4 * (1024 * 512 + 512)


def test_once_per_model_dtype_and_threads(monkeypatch):
    calls = []
    measure = module._measure
    monkeypatch.setattr(module, "_measure", lambda *a: (calls.append(a[1:]), measure(*a))[1])
    model, other = olmoe(), olmoe()
    assert known_roofline(model) is None
    assert roofline(model) is roofline(model) is known_roofline(model)
    assert len(calls) == 1 and known_roofline(other) is None
    roofline(other)
    assert known_roofline(model.bfloat16()) is None
    roofline(model)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        found = roofline(model)
    finally:
        torch.set_num_threads(threads)
    assert found.threads == threads + 1
    roofline(model)
    kinds = [(torch.float32, threads)] * 2 + [(torch.bfloat16, threads + n) for n in (0, 1)]
    assert calls == [(dtype, torch.device("cpu"), number) for dtype, number in kinds]
    gc.collect()  # models of other tests
    held = len(module._measured)
    del model, other
    gc.collect()
    assert len(module._measured) == held - 2  # they are not kept alive


def test_a_large_model_is_read_in_part_and_past_the_caches(monkeypatch):
    monkeypatch.setattr(module, "LIMIT", 8 << 20)
    monkeypatch.setattr(module, "FIRST_SECONDS", 60)  # a busy machine reads slowly
    monkeypatch.setattr(module, "CPU", module.CPU._replace(piece=1 << 20))
    monkeypatch.setattr(module, "_all_caches", lambda device: 2 << 20)
    model, seen = model_of((10, 256, 1024)), []  # 40 MiB
    pieces = module._pieces(module._weights(model), module.CPU)
    monkeypatch.setattr(module, "_pieces", lambda weights, sizes: [Read(p, seen) for p in pieces])
    found = roofline(model)
    places = {piece.data_ptr(): place for place, piece in enumerate(pieces)}
    parts = sorted({places[piece.data_ptr()] for piece in seen})
    assert len(places) == 40 and len(parts) == 16  # eight times the caches is more than LIMIT
    assert parts[0] < 3 and parts[-1] > 36 and max(np.diff(parts)) <= 3
    assert found.weight_bytes == 40 << 20 and found.note == ""
    monkeypatch.setattr(module, "FIRST_SECONDS", 0)  # the file is slow: one piece only
    module._measured.clear()
    assert "only 1 MB were read" in roofline(model).note


def test_the_dtype_is_that_of_the_largest_weights():
    model = model_of((4, 4), dtype=torch.float32)
    for expert in model.experts:
        expert.large = nn.Parameter(torch.ones(512, 512, dtype=torch.bfloat16))
    assert roofline(model).dtype == "bfloat16"


def test_the_best_of_several_rounds_counts(monkeypatch):
    """Of rounds of 5 and 2 s the latter; a product of n x n matrices is 2 n³ operations."""
    seconds = iter([5, 2])

    class Span:
        def __init__(self, tensor):
            self.stop = lambda: SimpleNamespace(nanoseconds=next(seconds) * 10**9)

    monkeypatch.setattr(module, "Span", Span)
    assert module._best(lambda: None, torch.ones(1), 0) == 2
    monkeypatch.setattr(module, "_best", lambda *_: 1.0)
    found = module._gemm_gflops(torch.float32, torch.device("cpu"), module.CPU)
    assert found == pytest.approx(2 * 256**3 / 1e9)


# ---- other devices, tests/gpu measures one where there is one ----


@pytest.mark.parametrize("device, sizes", [("cpu", module.CPU), ("cuda:0", module.DEVICE)])
def test_how_much_is_read_goes_by_the_device(monkeypatch, device, sizes):
    asked = []

    def pieces(weights, given):
        asked.append(given)
        raise InterruptedError  # there is no such device

    monkeypatch.setattr(module, "_pieces", pieces)
    monkeypatch.setattr(module, "_all_caches", lambda device: 0)
    with pytest.raises(InterruptedError):
        module._measure([torch.ones(1)], torch.float32, torch.device(device), 0)
    assert asked == [sizes]


def test_experts_that_a_gpu_reads_at_once_are_read_from_one_copy():
    model = model_of((700, 999))  # 2.8 MB four times
    sizes = module.DEVICE._replace(small=4 << 20, piece=4 << 20)
    (piece,) = module._pieces(module._weights(model), sizes)
    assert piece.nbytes == 2 * 4 * 700 * 999  # as many as it takes
    assert piece.data_ptr() not in {weight.data_ptr() for weight in weights_of(model)}


@pytest.mark.parametrize(
    "sizes, dtype", [(module.CPU, torch.float32), (module.DEVICE, torch.float16)]
)
def test_float16_is_multiplied_as_the_device_computes_it(monkeypatch, sizes, dtype):
    seen = []
    monkeypatch.setattr(module, "_best", lambda call, near, limit: seen.append(call.args) or 1.0)
    module._gemm_gflops(torch.float16, torch.device("cpu"), sizes)
    assert {matrix.dtype for pair in seen for matrix in pair} == {dtype}


def test_a_device_that_is_nearly_full_multiplies_small_matrices(monkeypatch):
    def best(call, near, limit):
        if len(near) > 512:
            raise torch.OutOfMemoryError
        return 0.01 / len(near)

    monkeypatch.setattr(module, "_best", best)
    found = module._gemm_gflops(torch.float32, torch.device("cpu"), module.DEVICE)
    assert found == pytest.approx(2 * 512**4 / 0.01 / 1e9)


def test_the_cache_of_a_device_is_what_torch_says_of_it(monkeypatch):
    cuda = SimpleNamespace(get_device_properties=lambda d: SimpleNamespace(L2_cache_size=d.index))
    modules = {"cuda": cuda, "mps": SimpleNamespace()}
    monkeypatch.setattr(torch, "get_device_module", lambda device: modules[device.type])
    assert module._all_caches(torch.device("cuda:7")) == 7
    assert module._all_caches(torch.device("mps")) == 0


def test_a_roof_is_of_the_device_that_it_was_measured_on():
    model = olmoe()
    roofline(model)
    assert known_roofline(model.to("meta")) is None


def test_the_devices_under_a_model_and_their_memory(monkeypatch):
    """A CUDA device tells both; MPS has neither; the CPU, and weights elsewhere, are left out."""
    places = ["cuda:1", "cpu", "meta", "cuda:0", "cuda:1", "mps"]
    model = SimpleNamespace(
        parameters=lambda: [SimpleNamespace(device=torch.device(place)) for place in places]
    )
    cuda = SimpleNamespace(
        get_device_name=lambda device: f"GPU {device}", max_memory_allocated=lambda device: 2.5e6
    )
    modules = {"cuda:0": cuda, "cuda:1": cuda, "mps": SimpleNamespace()}
    monkeypatch.setattr(torch, "get_device_module", modules.__getitem__)
    assert devices_under(model) == [
        {"device": "cuda:0", "name": "GPU cuda:0", "memory_peak_mb": 2.5},
        {"device": "cuda:1", "name": "GPU cuda:1", "memory_peak_mb": 2.5},
        {"device": "mps", "name": "mps", "memory_peak_mb": None},
    ]
    assert devices_under(olmoe()) == []


def test_errors():
    with pytest.raises(TypeError, match="expected a torch.nn.Module, got dict"):
        roofline({})
    with pytest.raises(ValueError, match="ReLU has no weights"):
        roofline(nn.ReLU())
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="weight is on the device meta"):
        roofline(model)
    with pytest.raises(ValueError, match="qint8, which has no plain memory"):
        layers = nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 8))
        roofline(torch.ao.quantization.quantize_dynamic(layers, {nn.Linear}))
    model.bias = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"weight is on the device meta and bias is .* cpu;"):
        roofline(model)
