"""Patched models by the backend in torch: what transformers computes, and what C selects."""

import copy

import every
import pytest
import torch
from models import V5, assert_unchanged, fit_null, olmoe, relative, snapshot, token_ids

import moeprof
from moeprof.backends import tables
from moeprof.patching import span as spans

pytestmark = pytest.mark.filterwarnings("ignore:router .bh. without a null")


@pytest.fixture
def model(device):
    return olmoe().to(device)


@pytest.fixture(scope="module")
def null():
    return fit_null(olmoe())


def logits(model, device, ids=None):
    with torch.no_grad():
        return model((token_ids() if ids is None else ids).to(device)).logits.cpu()


def routings(model, device, **options):
    """(the logits, what each layer routed) of the model, patched so."""
    found = []
    with moeprof.patch(model, **options) as handle:
        handle.on_routing(lambda layer, routing: found.append(routing.on_host()))
        return logits(model, device), found


# ---- the same as on the C path ----

ROUTERS = {
    "own": {},
    "bh": dict(router="bh", alpha=0.4),
    "top_p": dict(router="top_p", P=0.7),
    "fixed_p": dict(router="fixed_p", t=0.3),
    "topk": dict(router="topk", k=3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", ["model", "sum", "mass"])
@pytest.mark.parametrize("router", ROUTERS)
def test_selects_and_weighs_as_c(router, norm, dtype, null, device):
    options = ROUTERS[router]
    if options.get("router") in ("bh", "fixed_p"):
        options = options | {"null": null}
    here, there = olmoe().to(dtype), olmoe().to(device, dtype)
    _, in_c = routings(here, torch.device("cpu"), norm=norm, backend="c", **options)
    _, in_torch = routings(there, device, norm=norm, backend="torch", **options)
    first, other = in_c[0], in_torch[0]  # later ones see what the first layer's sums rounded to
    if dtype == torch.float32:
        assert torch.equal(first.expert_ids, other.expert_ids)
        assert torch.equal(first.rejections, other.rejections)
        assert torch.allclose(first.weights, other.weights, atol=1e-6, rtol=1e-6)
    else:
        same = (first.expert_ids == other.expert_ids).all(1)
        assert same.float().mean() >= 0.9  # ties of rounded logits on another device
        assert torch.allclose(first.weights[same], other.weights[same], atol=8e-3)


def test_outputs_are_those_of_the_stock_model(model, device):
    before, state = logits(model, device), snapshot(model)
    with moeprof.patch(model, backend="torch"):
        assert relative(logits(model, device), before) <= 2e-5
    assert_unchanged(model, state)
    assert torch.equal(logits(model, device), before)


def test_a_callable_is_a_router(model, device):
    def second_best(z):
        return torch.ones(len(z), 1, device=z.device), z.argsort(1)[:, -2:-1]

    ours, routed = routings(model, device, router=second_best, backend="torch")
    assert ours.isfinite().all() and bool((routed[0].counts == 1).all())


def test_an_id_that_is_no_expert_is_refused(model, device):
    def wrong(z):
        return torch.ones(len(z), 1, device=z.device), torch.full((len(z), 1), 99, device=z.device)

    with moeprof.patch(model, wrong, backend="torch"):
        with pytest.raises(ValueError, match=r"layers\.0\.mlp.*expected -1 to 8, got 99"):
            logits(model, device)


@pytest.mark.slow
def test_an_id_that_is_no_expert_is_refused_when_compiled(device):
    def wrong(z):
        return torch.ones(len(z), 1, device=z.device), torch.full((len(z), 1), 99, device=z.device)

    if device.type != "cpu":
        pytest.skip("a failed assertion leaves a GPU unusable")
    block = olmoe().model.layers[0].mlp
    with moeprof.patch(block, wrong, backend="torch"), torch.no_grad():
        torch.compiler.reset()
        with pytest.raises(RuntimeError, match="expert_ids: expected -1 to 8"):
            torch.compile(block, backend="aot_eager")(torch.zeros(1, 3, 32))


def test_callbacks_get_no_gradients(model, device):
    found = []
    with moeprof.patch(model, backend="torch") as handle:
        handle.on_routing(lambda layer, routing: found.append(routing))
        model(token_ids().to(device), labels=token_ids().to(device)).loss.backward()
    assert found and not any(routing.weights.requires_grad for routing in found)


def test_nan_and_overflow(model, device):
    """Logits that are NaN, or infinite as those of float16 are: an error or NaN, no wrong text."""
    for value in (float("nan"), float("inf")):
        broken = copy.deepcopy(model)
        with torch.no_grad():
            broken.model.layers[0].mlp.gate.weight.fill_(value)
        with moeprof.patch(broken, backend="torch"):
            try:
                assert not logits(broken, device).isfinite().all()
            except ValueError as error:
                assert "layers.0.mlp" in str(error)


def test_nothing_to_do(model, device):
    block = model.model.layers[0].mlp
    with moeprof.patch(model, backend="torch"):
        out = block(torch.zeros(1, 0, 32, device=device))
    assert (out if V5 else out[0]).shape == (1, 0, 32)


# ---- which backend ----


def test_backends_are_chosen_by_the_device(model, device):
    expected = "c" if device.type == "cpu" else "torch"
    assert {layer.backend for layer in moeprof.inspect(model)} == {expected}
    assert tables.backend_of([torch.zeros(1)]) == "c"
    assert tables.backend_of([torch.zeros(1, device="meta")]) == "torch"


def test_an_unknown_backend_is_named(model):
    with pytest.raises(ValueError, match=r"backend: expected one of \('c', 'torch'\)"):
        moeprof.patch(model, backend="cuda")


def test_two_models_with_two_backends(model, device):
    other = olmoe(seed=1)
    stock = logits(model, device), logits(other, torch.device("cpu"))
    with moeprof.patch(model, backend="torch"), moeprof.patch(other):
        ours = logits(model, device), logits(other, torch.device("cpu"))
    for mine, reference in zip(ours, stock, strict=True):
        assert relative(mine, reference) <= 2e-5


def test_moved_and_changed_while_patched(model, device):
    """The backend goes with the device, and the weights with the model."""
    before = logits(model, device)
    with moeprof.patch(model):
        ours = logits(model, device)
        model.to("cpu")
        assert relative(logits(model, torch.device("cpu")), before) <= 2e-5
        model.to(device)
        assert torch.equal(logits(model, device), ours)
        model.double()
        if device.type == "cpu":
            with pytest.raises(RuntimeError, match='float64 by backend="torch"'):
                logits(model, device)
        else:
            assert relative(logits(model, device), before) <= 1e-4


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe"])
@pytest.mark.parametrize("backend", ["c", "torch"])
def test_a_model_that_accelerate_spreads_over_devices(family, backend, device):
    """Its hooks on every module move inputs; weights that stay where they are can be read."""
    accelerate = pytest.importorskip("accelerate")
    model = every.build(family)
    where = "cpu" if backend == "c" else device
    given = every.inputs(model)
    parts = {name.rpartition(".weight")[0] or name: where for name, _ in model.named_parameters()}
    layers = {f"model.layers.{n}": where for n in range(len(model.model.layers))}
    others = {name: where for name in parts if not name.startswith("model.layers.")}
    spread = accelerate.dispatch_model(model, {**layers, **others}, force_hooks=True)
    given = {name: value.to(where) for name, value in given.items()}
    assert hasattr(spread.model.layers[0].mlp.experts, "_hf_hook") or not V5
    before, state = every.run(spread, given), snapshot(spread)
    with moeprof.patch(spread, backend=backend) as handle:
        assert handle.layers and not handle.fallbacks
        assert relative(every.run(spread, given), before) <= 2e-5
        copied = copy.deepcopy(spread)
        assert relative(every.run(copied, given), before) <= 2e-5
    assert_unchanged(spread, state)
    assert torch.equal(every.run(spread, given), before)


def test_float64(device):
    model = olmoe().double().to(device)
    if V5:
        model.set_experts_implementation("eager")  # transformers' grouped product has no float64
    before = logits(model, device)
    with moeprof.patch(model, backend="torch"):
        # transformers computes the softmax of the logits in float32
        assert relative(logits(model, device), before) <= 1e-6


def test_c_says_which_backend_trains(model):
    model.cpu()
    with moeprof.patch(model, backend="c"):
        with pytest.raises(RuntimeError, match='backend="torch", which trains'):
            model(token_ids(), labels=token_ids()).loss.backward()


# ---- gradients, compiler ----


@pytest.mark.parametrize("router", ["own", "bh"])
def test_gradients_are_those_of_the_stock_model(router, null, device):
    """With BH, selected to be all experts, those of the dense sum."""
    model = olmoe(num_experts_per_tok=2 if router == "own" else 8).to(device)
    if V5:
        model.set_experts_implementation("eager")
    ids = token_ids().to(device)
    options = {} if router == "own" else dict(router="bh", alpha=0.5, min_k=8, null=null)

    def gradients():
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    with moeprof.patch(model, backend="torch", **options):
        found = gradients()
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert relative(gradient, expected[name]) <= 1e-4, name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("router", "dtype"),
    [("own", torch.bfloat16), ("bh", torch.bfloat16), ("own", torch.float32)],
    ids=str,
)
def test_compiled(router, dtype, null, device):
    """Without a break in bfloat16, whose grouped product torch compiles; else with one."""
    model = olmoe().to(device, dtype)
    options = {} if router == "own" else dict(router="bh", alpha=0.4, null=null)
    torch.compiler.reset()
    block, x = model.model.layers[0].mlp, torch.randn(1, 7, 32, device=device, dtype=dtype)
    with moeprof.patch(model, backend="torch", **options), torch.no_grad():
        whole = V5 and dtype == torch.bfloat16  # 4.57 has a list of experts
        compiled = torch.compile(block, backend="aot_eager", fullgraph=whole)
        assert relative(compiled(x)[0].float(), block(x)[0].float()) <= 1e-2


# ---- the profiler ----


def test_the_profiler_counts_the_same(model, null, device):
    options = dict(router="bh", alpha=0.4, null=null)
    found = {}
    for backend in ("c", "torch"):
        mine = olmoe() if backend == "c" else model
        where = torch.device("cpu") if backend == "c" else device
        with moeprof.patch(mine, backend=backend, **options), moeprof.MoEProfiler(mine) as profiler:
            logits(mine, where)
        found[backend] = profiler.get_metrics()
    for mine, other in zip(found["c"].values(), found["torch"].values(), strict=True):
        assert mine.k_mean == pytest.approx(other.k_mean, rel=1e-3)
        assert mine.tokens == other.tokens


@pytest.mark.parametrize("patched", [False, True])
def test_layers_elsewhere_are_counted_at_the_end_of_the_step(patched, device, monkeypatch):
    """As on a device that the host would have to wait for, in each layer."""
    from moeprof.profiler import step as steps

    model, counts = olmoe().to(device), {}
    for later in (False, True):
        waiting = []
        if later:

            def count(self, routing, how, waiting=waiting):
                waiting.append(how)
                self._waiting.append(how)

            monkeypatch.setattr(steps.Step, "count", count)
        handle = moeprof.patch(model, backend="torch") if patched else None
        with moeprof.MoEProfiler(model) as profiler:
            logits(model, device)
            logits(model, device, token_ids(3, 5))
            model.model.layers[1].mlp(torch.zeros(1, 3, 32, device=device))  # a block alone
        if handle:
            handle.unpatch()
        counts[later] = {
            name: (m.tokens, [*m.expert_selections]) for name, m in profiler.get_metrics().items()
        }
        assert len(waiting) == (5 if later else 0)
    assert counts[False] == counts[True]


def test_a_span_on_another_device_is_timed_by_its_events(monkeypatch):
    class Event:
        """Stands for torch.Event: on a device that takes 3 ms."""

        def __init__(self, device, enable_timing):
            assert enable_timing

        def record(self, stream):
            self.stream = stream

        def synchronize(self):
            self.waited = True

        def elapsed_time(self, other):
            assert other.waited
            return 3.0

    monkeypatch.setattr(torch, "Event", Event)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: device)
    assert spans.Span(torch.zeros(1, device="meta")).stop().nanoseconds == 3_000_000


def test_the_roof_and_the_memory_are_those_of_the_device(model, device):
    roof = moeprof.roofline(model)
    where = str(next(model.parameters()).device)
    assert roof.device == where and roof.read_gbs > 0 and roof.gemm_gflops > 0
    with moeprof.MoEProfiler(model) as profiler:
        logits(model, device)
    found = profiler.result()
    assert found.roofline == roof
    rows = found.facts["devices"]
    assert [row["device"] for row in rows] == [where] * (device.type != "cpu")
    assert all(row["memory_peak_mb"] > 0 for row in rows)


def test_a_cap_is_watched_now_and_then():
    """Of rejections on a device that the host waits for: after 1, 2, 4, ... calls."""
    from moeprof.patching.layer import CapWatch

    watch = CapWatch(2, 8)
    found = [watch._now_and_then(torch.tensor([1, 3])) for _ in range(8)]
    assert found == [1, 1, 0, 2, 0, 0, 0, 4]
