"""The experts in torch: against float64, one token and expert after the other."""

import math

import numpy as np
import pytest
import torch
from models import relative
from torch.nn import functional as F

from moeprof.backends.tables import (
    INTERLEAVED,
    ROWS,
    SWIGLU,
    TRANSPOSED,
    Activation,
    LayerMatrices,
    Storage,
)
from moeprof.backends.torch import experts as torch_experts

pytestmark = pytest.mark.slow  # nothing of transformers is in it but for a helper's file

E, H, I, K = 6, 16, 8, 3  # noqa: E741

# Of a layer of experts: how its tensors are stored, with biases, in a list, and what it computes.
LAYOUTS = {
    "rows": (ROWS, False, SWIGLU),
    "rows with biases": (ROWS, True, SWIGLU),
    "transposed": (TRANSPOSED, True, Activation("gelu")),
    "interleaved": (INTERLEAVED, True, Activation("silu", 1.702, 0.7, 1.0)),
    "without gate": (ROWS, False, Activation("relu2", gated=False)),
    "listed": (None, False, Activation("gelu_tanh")),
    "relu": (ROWS, False, Activation("relu")),
}


class Case:
    """Experts of one layout, and what they compute, in float64 on the CPU."""

    def __init__(self, layout: str, dtype: torch.dtype, device: torch.device, sizes=(E, H, I)):
        self.storage, self.biased, self.activation = LAYOUTS[layout]
        self.num_experts, self.hidden_size, width = sizes
        generator = torch.Generator().manual_seed(0)

        def random(*shape):
            values = torch.randn(shape, generator=generator, dtype=torch.float64) / 2
            return values.to(dtype).double()

        gated = self.activation.gated
        self.into = random(self.num_experts, 2 if gated else 1, width, self.hidden_size)
        self.down = random(self.num_experts, self.hidden_size, width)
        self.into_bias = random(self.num_experts, 2 if gated else 1, width)
        self.down_bias = random(self.num_experts, self.hidden_size)
        tensors = [tensor.to(device, dtype) for tensor in self._stored()]
        storage = self.storage or ROWS
        self.read = LayerMatrices(tensors, self.activation, storage, "torch")

    def _stored(self):
        if self.storage is None:
            return [
                m for into, down in zip(self.into, self.down, strict=True) for m in (*into, down)
            ]
        order = self.storage.order
        if order == "rows":
            tensors = [self.into.flatten(1, 2), self.down]
        elif order == "transposed":
            tensors = [self.into.flatten(1, 2).mT, self.down.mT]
        else:
            tensors = [self.into.transpose(1, 2).flatten(1, 2).mT, self.down.mT]
        by_turns = order == "interleaved"
        bias = self.into_bias.transpose(1, 2) if by_turns else self.into_bias
        tensors += [bias.flatten(1), self.down_bias] if self.biased else []
        return [tensor.contiguous() for tensor in tensors]

    def expected(self, x, expert_ids, routing_weights):
        """(T, H): the sum of w_e f_e(x) over the slots that name an expert."""
        out = torch.zeros(len(x), self.hidden_size, dtype=torch.float64)
        for (token, slot), expert in np.ndenumerate(expert_ids.numpy()):
            if 0 <= expert < self.num_experts:
                weight = routing_weights[token, slot].double()
                out[token] += weight * self._expert(x[token].double(), expert)
        return out

    def _expert(self, x, expert):
        parts = self.into[expert] @ x
        parts = parts + self.into_bias[expert] if self.biased else parts
        out = self.down[expert] @ self._between(*parts)
        return out + self.down_bias[expert] if self.biased else out

    def _between(self, gate, up=None):
        a = self.activation
        if up is None:
            return self._function(gate)
        clamped = up.clamp(-a.limit, a.limit) if a.limit < math.inf else up
        return self._function(gate.clamp(max=a.limit)) * (clamped + a.shift)

    def _function(self, x):
        return {
            "silu": lambda: x * torch.sigmoid(self.activation.alpha * x),
            "gelu": lambda: F.gelu(x),
            "gelu_tanh": lambda: F.gelu(x, approximate="tanh"),
            "relu": lambda: F.relu(x),
            "relu2": lambda: F.relu(x) ** 2,
        }[self.activation.name]()


def routing(tokens, device, seed=0, num_experts=E, k=K, empty=0.4):
    """Experts (T, k), each at most once a token, with empty slots of -1 and E; and weights."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(tokens, num_experts, generator=generator).argsort(1)[:, :k].int()
    draw = torch.rand(ids.shape, generator=generator)
    ids = ids.masked_fill(draw < empty, -1).masked_fill(draw < empty / 4, num_experts)
    return ids, torch.rand(ids.shape, generator=generator)


@pytest.fixture(params=["grouped", "one by one"])
def way(request, monkeypatch):
    """All experts in one product, where torch has that for the tensors; or each on its own."""
    if request.param == "one by one":
        monkeypatch.setattr(torch_experts, "_has_grouped_mm", lambda hidden, read: False)
    return request.param


BOUND = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", [1, 7, 400])  # the last one above FEW_PAIRS
def test_experts_against_float64(layout, dtype, tokens, way, device):
    case = Case(layout, dtype, device)
    x = torch.randn(tokens, H, generator=torch.Generator().manual_seed(1)).to(dtype)
    ids, weights = routing(tokens, device)
    out = torch_experts.run_experts(x.to(device), ids.to(device), weights.to(device), case.read)
    assert out.dtype == dtype and out.device.type == device.type
    assert relative(out.cpu(), case.expected(x, ids, weights)) <= BOUND[dtype]


def test_both_ways_are_tried(device):
    """Else the parameter `way` would compare one with itself."""
    case = Case("rows", torch.float32, device)
    x = torch.zeros(1, H, device=device)
    assert torch_experts._has_grouped_mm(x, case.read)
    assert not torch_experts._has_grouped_mm(x.double(), case.read)  # torch has none
    assert not torch_experts._has_grouped_mm(x, Case("listed", torch.float32, device).read)
    narrow = Case("rows", torch.float32, device, (E, H, 6)).read  # rows of 24 bytes
    assert not torch_experts._has_grouped_mm(x, narrow)


@pytest.mark.parametrize("tokens", [5, 400])
def test_experts_that_no_token_has_are_not_read(tokens, way, device):
    case = Case("rows with biases", torch.float32, device)
    ids, weights = routing(tokens, device)
    for unused in (0, 4):
        ids = ids.masked_fill(ids == unused, -1)
        for tensor in case.read.matrices:
            tensor[unused] = math.nan
    x = torch.randn(tokens, H)
    out = torch_experts.run_experts(x.to(device), ids.to(device), weights.to(device), case.read)
    assert relative(out.cpu(), case.expected(x, ids, weights)) <= 2e-6


@pytest.mark.parametrize("tokens", [1, 400])
def test_tokens_without_experts_are_zero(tokens, way, device):
    case = Case("rows with biases", torch.float32, device)
    ids = torch.full((tokens, K), -1, device=device)
    x = torch.full((tokens, H), math.nan, device=device)
    out = torch_experts.run_experts(x, ids, torch.ones(tokens, K, device=device), case.read)
    assert bool((out == 0).all())


def test_what_a_grouped_product_leaves_is_not_read(device, monkeypatch):
    """Behind the rows of the last expert it may hold anything: here NaN, also in derivatives."""
    grouped_mm = F.grouped_mm

    class Leaves(torch.autograd.Function):
        @staticmethod
        def forward(ctx, out, rows):
            ctx.rows = rows
            return out.index_fill(0, torch.arange(rows, len(out), device=out.device), math.nan)

        @staticmethod
        def backward(ctx, gradient):
            assert bool(gradient[ctx.rows :].eq(0).all())
            return gradient, None

    def leaving(x, matrices, offs):
        return Leaves.apply(grouped_mm(x, matrices, offs=offs), int(offs[-1]))

    monkeypatch.setattr(F, "grouped_mm", leaving)
    case = Case("rows with biases", torch.float32, device)
    ids, weights = routing(5, device)
    x = torch.randn(5, H, requires_grad=True)
    assert bool(((ids < 0) | (ids == E)).any())
    out = torch_experts.run_experts(x.to(device), ids.to(device), weights.to(device), case.read)
    assert relative(out.detach().cpu(), case.expected(x.detach(), ids, weights)) <= 2e-6
    out.sum().backward()
    assert bool(x.grad.isfinite().all())


@pytest.mark.parametrize("tokens", [3, 400])
def test_the_weight_of_an_empty_slot_is_not_read(tokens, way, device):
    case = Case("rows", torch.float32, device)
    ids, weights = routing(tokens, device)
    weights = weights.masked_fill((ids < 0) | (ids == E), math.nan)
    x = torch.randn(tokens, H)
    out = torch_experts.run_experts(x.to(device), ids.to(device), weights.to(device), case.read)
    assert relative(out.cpu(), case.expected(x, ids, weights)) <= 2e-6


def test_no_tokens(way, device):
    case = Case("rows", torch.float32, device)
    x, ids = torch.zeros(0, H, device=device), torch.zeros(0, K, dtype=torch.int32, device=device)
    out = torch_experts.run_experts(x, ids, torch.zeros(0, K, device=device), case.read)
    assert out.shape == (0, H)


@pytest.mark.parametrize("tokens", [6, 400])
def test_a_tokens_nan_stays_its_own(tokens, way, device):
    case = Case("rows", torch.float32, device)
    ids, weights = routing(tokens, device, empty=0)
    x = torch.randn(tokens, H)
    x[3] = math.nan
    out = torch_experts.run_experts(x.to(device), ids.to(device), weights.to(device), case.read)
    broken = out.isnan().any(1).cpu()
    assert broken[3] and int(broken.sum()) == 1


@pytest.mark.parametrize("layout", ["rows", "rows with biases", "interleaved", "listed"])
def test_gradients(layout, device):
    """Through the routing weights, the hidden states and the experts, in float64."""
    case = Case(layout, torch.float64, device, (3, 4, 2))
    ids, weights = routing(3, device, num_experts=3, k=2)
    assert bool((ids < 0).any())
    given = [torch.randn(3, 4, dtype=torch.float64), weights.double(), *case.read.matrices]
    given = [tensor.to(device).requires_grad_() for tensor in given]

    def run(x, weights, *matrices):
        read = case.read._replace(matrices=matrices)
        return torch_experts.run_experts(x, ids.to(device), weights, read)

    assert torch.autograd.gradcheck(run, given)


@pytest.mark.parametrize("tokens", [5, 400])
def test_gradients_of_the_grouped_product(tokens, device):
    """float32: those of the experts one by one, and 0 where nothing was selected."""
    case = Case("rows with biases", torch.float32, device)
    ids, weights = routing(tokens, device)
    ids = ids.masked_fill(ids == 2, -1).to(device)
    x = torch.randn(tokens, H, device=device)

    def gradients():
        tensors = [
            t.detach().requires_grad_() for t in (x, weights.to(device), *case.read.matrices)
        ]
        read = case.read._replace(matrices=tensors[2:])
        torch_experts.run_experts(tensors[0], ids, tensors[1], read).square().sum().backward()
        return [t.grad for t in tensors]

    grouped = gradients()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch_experts, "_has_grouped_mm", lambda hidden, read: False)
        alone = gradients()
    for ours, reference in zip(grouped, alone, strict=True):
        assert relative(ours, reference) <= 5e-6
    assert all(bool((g[2] == 0).all()) for g in grouped[2:])


@pytest.mark.parametrize("tokens", [4, 400])
def test_the_same_bits_each_time(tokens, way, device):
    case = Case("rows", torch.bfloat16, device)
    ids, weights = (t.to(device) for t in routing(tokens, device))
    x = torch.randn(tokens, H, device=device).bfloat16()
    first, second = (torch_experts.run_experts(x, ids, weights, case.read) for _ in range(2))
    assert torch.equal(first, second)


def test_quantised_experts_are_refused(device):
    from moeprof.backends.tables import tensor_obstacle

    packed = [torch.zeros(2, 2, 64, dtype=torch.uint8), torch.zeros(2, 1, 64, dtype=torch.uint8)]
    storage = Storage("rows", "q4", "float32", 16, 8)
    assert "4 bits" in tensor_obstacle(packed, storage, "torch")
