"""The benchmarks, on tiny shapes: what they print, write and draw. No test asserts a time."""

import json
import math
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import fails
from matplotlib import image
from matplotlib.colors import to_rgb
from models import V5
from transformers import AutoConfig
from util import in_use

import moeprof
from moeprof import _C
from moeprof.bench import decode, kernels, layer, llama, model, quantized, router, twins
from moeprof.bench.settings import FAMILIES, SHAPES, Shape, family_of
from moeprof.bench.weights import Calls, layer_weights
from moeprof.cli import main
from moeprof.measure import limits
from moeprof.measure.limits import roof, roof_share
from moeprof.measure.machine import check_memory
from moeprof.measure.timing import interleave, ratio
from moeprof.models.families.base import Layout
from moeprof.routers import make_router
from moeprof.show.figures import COLOURS, colours, plain

SHAPE = ("--shape", "8,32,16,4", "--repeats", 2)
STOCK = ["eager", "grouped_mm"] if V5 else ["eager"]
PEERS = {  # of weights in 8 and 4 bits, and what they import
    "torch int8": (),
    "torch int4": (),
    "QMoE int8": ("onnx", "onnxruntime"),
    "QMoE int4": ("onnx", "onnxruntime"),
    "QMoE int4 level 4": ("onnx", "onnxruntime"),
    "llama.cpp Q8_0": ("llama_cpp",),
    "llama.cpp Q4_0": ("llama_cpp",),
}


@pytest.fixture(autouse=True)
def small_gemm(monkeypatch):
    """The limit of the hardware by a small product: torch's of bf16 can take a minute."""
    for module in (limits, kernels):
        monkeypatch.setattr(module, "SIZE", 128)


def bench(capsys, tmp_path, *arguments):
    """(stdout, the JSON) of `moeprof bench ...`; nothing goes to stderr."""
    file = tmp_path / "result.json"
    assert main(["bench", *map(str, arguments), "--json", str(file)]) == 0
    out, err = capsys.readouterr()
    assert err == "" and f"Written: {file}" in out
    assert max(map(len, out.splitlines())) <= max(100, len(f"Written: {file}"))
    assert "…" not in out, "a table that is cut off"
    result = json.loads(file.read_text())
    check(result, arguments[0])
    return out, result


def check(result, name):
    """What every benchmark's JSON holds; all that was measured is positive and finite."""
    assert result["benchmark"] == name
    facts = result["machine"]
    assert facts["features"] == _C.cpu_features() and facts["cpu"]
    assert torch.__version__.startswith(facts["versions"]["torch"])
    assert result["settings"]["repeats"] == 2 and result["rows"]
    for row in result["rows"]:
        for times in row["times"].values():
            assert times["best_ms"] <= times["lower_ms"] <= times["median_ms"] <= times["upper_ms"]
            each = times["each_ms"]
            assert min(each) == times["best_ms"] and np.median(each) == times["median_ms"]
            assert all(value > 0 for value in each)
    signed = ("bh_over_topk_share",)  # a difference
    for key, number in numbers(result):
        assert math.isfinite(number) and (number > 0 or key in signed), key


def numbers(value, key=""):
    """(key, number) of all floats in what JSON gives."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from numbers(item, name)
    elif isinstance(value, list):
        for item in value:
            yield from numbers(item, key)
    elif isinstance(value, float):
        yield key, value


def words(text):
    return " ".join(text.split())


# ---------------------------------------------------------------- the four benchmarks


def test_layer(capsys, tmp_path):
    picture = tmp_path / "layer.png"
    options = ("--tokens", "4,1,40", "--dtype", "float32", "--threads", 1, "--plot", picture)
    out, result = bench(capsys, tmp_path, "layer", *SHAPE, *options)
    names = [*STOCK, "moeprof"]
    assert result["contenders"] == names and result["missing"] == {}
    assert result["machine"]["threads"] == 1
    assert [row["tokens"] for row in result["rows"]] == [1, 4, 40]
    for row in result["rows"]:
        assert set(row["times"]) == {"read", "gemm", *names}
        assert set(row["errors"]) == (set(names) if row["tokens"] <= 32 else set())
        assert all(error < 1e-6 for error in row["errors"].values())
        assert row["bytes"] == row["experts_hit"] * 3 * 32 * 16 * 4
        assert row["flop"] == row["tokens"] * 4 * 6 * 32 * 16
        assert row["roof"]["roof_ms"] == max(row["roof"]["read_ms"], row["roof"]["gemm_ms"])
    skipping = result["skipping"]
    assert (skipping["kept"], skipping["all"], skipping["limit"]) == (2, 4, 0.5)
    first = out.splitlines()[0]
    assert first.startswith("layer: ") and result["machine"]["cpu"] in first
    assert all(feature in first for feature in _C.cpu_features()) and "1 thread" in first
    for header in ("hit", "eager", "moeprof", "GB/s", "GFLOP", "roof", "other/", "error"):
        assert header in out
    assert "decode at an average of 2 experts / decode at 4: " in out
    assert image.imread(picture).shape[2] == 4


def test_layer_names_the_peers_that_are_left_out(capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("VLLM_SO", raising=False)
    monkeypatch.setitem(sys.modules, "zentorch", None)
    out, result = bench(capsys, tmp_path, "layer", *SHAPE, "--tokens", 1, "--peers")
    assert result["contenders"] == [*STOCK, "moeprof"]
    assert "left out: vllm: ValueError: VLLM_SO does not name its library" in out
    assert "left out: zentorch: " in out


def test_quantized(capsys, tmp_path):
    picture, shape = tmp_path / "quantized.png", ("--shape", "8,64,32,4", "--repeats", 2)
    options = ("--tokens", "1,40", "--dtype", "bfloat16", "--threads", 1, "--plot", picture)
    out, result = bench(capsys, tmp_path, "quantized", *shape, *options)
    names, missing = result["contenders"], result["missing"]
    assert names[:3] == ["moeprof", "q8", "q4"] and {*names[3:], *missing} == {*PEERS}
    for name, modules in PEERS.items():
        lacking = [module for module in modules if not find_spec(module)]
        assert (name in missing) >= bool(lacking), name
        assert lacking or name in names or name.startswith("torch"), missing[name]
    assert result["bytes"] == {
        name: 3 * 64 * n for name, n in zip(names[:3], (64, 34, 18), strict=True)
    }
    few, many = result["rows"]
    assert few["errors"]["moeprof"] < 0.01 < few["errors"]["q8"] < 0.04 < few["errors"]["q4"] < 0.3
    assert many["errors"] == {} and set(many["times"]) == {"read", *names}
    for row in result["rows"]:
        for name, share in row["read_share"].items():
            nbytes = row["experts_hit"] * result["bytes"][name]
            speed = nbytes / row["times"][name]["median_ms"] / 1e6
            assert share == pytest.approx(speed / row["read_gbs"])
    for header in ("hit", "moeprof", "q4", "x q8", "read", "error"):
        assert header in out
    assert image.imread(picture).shape[2] == 4


def test_quantized_names_the_peers_that_are_left_out(capsys, tmp_path, monkeypatch):
    """Those that are not installed, in a line for each package; and those that are wrong."""
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.setattr(quantized, "_int4", lambda matrix: lambda x: x @ matrix.roll(1, 0).T)
    llama._ggml.cache_clear()
    options = ("--shape", "8,64,32,4", "--repeats", 2, "--tokens", 1, "--threads", 1)
    out, result = bench(capsys, tmp_path, "quantized", *options)
    assert (
        {"moeprof", "q8", "q4"} <= {*result["contenders"]} <= {"moeprof", "q8", "q4", "torch int8"}
    )
    text = words(out)
    assert "left out: QMoE int8, QMoE int4, QMoE int4 level 4: ModuleNotFoundError" in text
    assert "left out: llama.cpp Q8_0, llama.cpp Q4_0: ModuleNotFoundError: No module named" in text
    assert "left out: torch int4: its outputs are wrong: their relative error is 1." in text


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v2"])
def test_block(family, capsys, tmp_path):
    """The same output from every contender; the seam beside the one call, where there is one."""
    picture = tmp_path / "block.png"
    options = ("--family", family, "--tokens", "1,5", "--dtype", "float32", "--plot", picture)
    out, result = bench(capsys, tmp_path, "block", *SHAPE, *options)
    fused = family == "olmoe" or not V5
    names = [*STOCK, *["batched_mm"] * V5, "moeprof", *["moeprof, seam"] * (fused and V5)]
    assert result["contenders"] == names and result["missing"] == {}
    assert result["path"] == ("fused" if fused else "seam")
    assert [row["tokens"] for row in result["rows"]] == [1, 5]
    for row in result["rows"]:
        assert set(row["times"]) == set(names)
        assert set(row["differences"]) == set(names) - {"eager"}
        assert all(difference < 1e-6 for difference in row["differences"].values())
    assert ("What the seam adds" in out) == (fused and V5)
    assert f"Path of moeprof: {result['path']}" in out
    assert image.imread(picture).shape[2] == 4


def test_block_says_what_does_not_run(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(Layout, "obstacle", lambda layout, block: "a cause")
    out, result = bench(capsys, tmp_path, "block", *SHAPE, "--tokens", 1)
    assert result["missing"] == {"moeprof": "a cause"} and "moeprof" not in result["contenders"]
    assert "left out: moeprof: a cause" in out


@pytest.mark.parametrize("shape", SHAPES.values(), ids=str)
def test_every_named_shape_has_its_family(shape):
    """The config of the family takes the sizes under the names that the record says."""
    family = FAMILIES[family_of(shape)]
    config = AutoConfig.for_model(family_of(shape))
    assert all(hasattr(config, name) for name in (*family.sizes, *family.others))
    assert [name for name, f in FAMILIES.items() if shape.name in f.shapes] == [family_of(shape)]


@pytest.mark.once
def test_kernels(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "cache_bytes", lambda: 2**18)
    before, picture = (in_use(), torch.get_num_threads()), tmp_path / "kernels.png"
    options = ("--dtype", "bfloat16", "--tokens", 9, "--plot", picture)
    out, result = bench(capsys, tmp_path, "kernels", *SHAPE, *options)
    assert (in_use(), torch.get_num_threads()) == before
    assert result["machine"]["threads"] == 1
    timed = {(row["kernel"], row["variant"]) for row in result["rows"]}
    wanted = (
        "linear_bf16",
        "gemm_bf16",
        "glu_bf16",
        "softmax",
        "logprob",
        "p_table",
        "p_normal",
        "order",
        "step_up",
    )
    assert timed == {(k, v) for k, v, has, _ in _C.variants() if has and k in wanted}
    for row in result["rows"]:
        limited = row["kernel"].startswith(("linear", "gemm"))
        assert ("of_limit" in row) == limited
        assert row["variant"] != "scalar" or row["scalar_ratio"] == 1
        if row["kernel"] == "gemm_bf16":
            assert row["best_rate"] <= row["limit_rate"]
    for header in ("kernel", "variant", "x scalar", "limit", "of limit"):
        assert header in out
    assert image.imread(picture).size


@pytest.mark.once
def test_router(capsys, tmp_path):
    picture = tmp_path / "router.png"
    options = ("--tokens", "1,3", "--plot", picture)
    out, result = bench(capsys, tmp_path, "router", *SHAPE, *options)
    for row in result["rows"]:
        topk, bh, layer = (row["times"][name]["median_ms"] for name in ("topk", "bh", "layer"))
        assert row["topk_share"] == topk / layer and row["bh_share"] == bh / layer
        assert row["bh_over_topk_share"] == pytest.approx((bh - topk) / layer)
    assert "(BH - top-k) / layer" in out and "Routing share" in out
    routers = result["routers"]
    assert routers["tokens"] == 3 and [r["router"] for r in routers["rows"]] == [*twins.COUNTS]
    layer = result["rows"][1]["times"]["layer"]["median_ms"]
    for row in routers["rows"]:
        assert row["layer_share"] == row["c"]["median_ms"] / layer
        assert row["torch_over_c"] == row["torch"]["median_ms"] / row["c"]["median_ms"]
    assert "torch / C" in out and "expert_threshold" in out
    assert image.imread(picture).size


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(twins.COUNTS))
def test_the_torch_twins_route_as_the_routers_do(name):
    shape = SHAPES["olmoe"]
    z, null = router.random_logits(500, shape.experts), router.nulls_of_all(shape)[name]
    made = make_router(name)
    weights = made.reference(z, null=null)[0]
    twin = twins.route(made, torch.from_numpy(z), null).numpy()
    same = np.abs(twin - weights).max(axis=1) < 1e-5  # but for what lies on a boundary
    assert same.mean() > 0.99


@pytest.mark.slow
def test_model(capsys, tmp_path):
    picture = tmp_path / "model.png"
    options = ("--tokens", "1,5", "--plot", picture)
    out, result = bench(capsys, tmp_path, "model", *SHAPE, *options)
    assert set(model.CONTENDERS) >= {*STOCK, "moeprof", "moeprof + on_routing(callback)"}
    decode, prefill = result["rows"]
    for row in (decode, prefill, result["demo"]):
        assert set(model.CONTENDERS) <= set(row["times"])
    assert decode["experts_hit"] == [4] * 4 and len(prefill["experts_hit"]) == 4
    assert all(4 <= hit <= 8 for hit in prefill["experts_hit"])
    assert decode["bytes"] == {
        "experts": 4 * 4 * 3 * 32 * 16 * 2,
        "attention": 4 * 4 * 32 * 32 * 2,
        "lm_head": 50304 * 32 * 2,
        "gates and norms": (4 * 8 * 32 + (4 * 4 + 1) * 32) * 2,
    }
    assert "target_ms" in decode and "target_ms" not in prefill
    text = words(out)
    assert "A decode step reads" in text and "on_routing(callback): " in text
    for header in ("contender", "x trans-", "best", "roof", "of a layer"):
        assert header in out
    assert image.imread(picture).size


QUANTIZABLE = ("--shape", "8,64,32,4", "--repeats", 2, "--tokens", "3,5", "--threads", 1)


@pytest.mark.slow
def test_decode(capsys, tmp_path, monkeypatch):
    """Without llama.cpp; a peer that computes something else is left out."""
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.setitem(sys.modules, "gguf", None)
    picture = tmp_path / "decode.png"
    out, result = bench(capsys, tmp_path, "decode", *QUANTIZABLE, "--plot", picture)
    assert result["contenders"] == ["moeprof", "q8", "q4"]
    assert set(result["missing"]) == set(decode.PEERS)
    assert [row["tokens"] for row in result["rows"]] == [3, 5]
    assert all(set(row["times"]) == {"read", "moeprof", "q8", "q4"} for row in result["rows"])
    found = result["distances"]
    assert found["moeprof"] < min(found["q8"], found["q4"]) and max(found.values()) < 0.05
    # Of 4 layers: 4 experts of 3 matrices; 4 matrices of attention and a gate; lm_head.
    experts, others = 4 * 4 * 3 * 64 * 32, 4 * (4 * 64 * 64 + 8 * 64) + 50304 * 64
    assert result["bytes"] == {
        "moeprof": 2 * (experts + others),
        "q8": (experts + others) * 8.5 / 8,
        "q4": (experts * 4.5 + others * 8.5) / 8,
    }
    assert "left out: llama.cpp Q8_0: ModuleNotFoundError" in words(out)
    assert image.imread(picture).size

    class Wrong(decode._Model):
        def __init__(self, path, cached):
            pass

        def fill(self, ids):
            pass

        def step(self, token):
            return torch.ones(decode.VOCABULARY)

    monkeypatch.setattr(decode, "save_gguf", lambda *_: None)
    monkeypatch.setattr(decode, "LlamaModel", Wrong)
    _, result = bench(capsys, tmp_path, "decode", *QUANTIZABLE)
    assert result["contenders"] == ["moeprof", "q8", "q4"]
    assert all("its logits are wrong" in why for why in result["missing"].values())


@pytest.mark.slow
def test_decode_beside_llama(capsys, tmp_path):
    for package in ("llama_cpp", "gguf"):
        pytest.importorskip(package)
    out, result = bench(capsys, tmp_path, "decode", *QUANTIZABLE)
    assert result["missing"] == {} and set(decode.PEERS) < {*result["contenders"]}
    found = result["distances"]
    for ours, peer in (("q8", "llama.cpp Q8_0"), ("q4", decode.BOTH)):
        assert found[peer] < 2 * found[ours]  # the same model, rounded alike
        assert f"{ours} takes" in words(out) and f"of {peer}'s time" in words(out)


# ---------------------------------------------------------------- what they are made of


def test_the_random_model_is_an_olmoe_that_computes():
    words, stock = model.random_model(Shape("tiny", 8, 32, 16, 4), torch.float32)
    total = sum(parameter.nbytes for parameter in stock.parameters())
    assert total <= words.nbytes < total + 64 * 4 * 100  # the rest is alignment
    ids = torch.arange(2, 9)[None]
    with torch.inference_mode():
        expected = stock(ids).logits
        with moeprof.patch(stock):
            patched = stock(ids).logits
    assert expected.std() > 0 and torch.isfinite(expected).all()
    torch.testing.assert_close(patched, expected, rtol=1e-4, atol=1e-5)


def test_no_two_experts_are_alike():
    weights = layer_weights(Shape("", 64, 64, 256, 8), torch.float32)  # more than the random run
    assert len({tuple(matrix[0, :8].tolist()) for matrix in weights.down}) == 64


def test_calls_differ_in_their_experts_but_not_in_how_many():
    calls = Calls(SHAPES["demo"], torch.float32, 3)
    drawn = [calls.next() for _ in range(4)]
    assert len({tuple(call.idx.flatten().tolist()) for call in drawn}) == 4
    assert {call.idx.unique().numel() for call in drawn} == {calls.experts_hit}
    for call in drawn:
        weights, idx = call.logits.softmax(-1).topk(8)
        assert torch.equal(idx, call.idx) and torch.equal(weights, call.weights)


def test_every_contender_runs_once_a_round():
    ran, steps = [], []

    class Bar:
        def step(self):
            steps.append(len(ran))

    calls = {name: lambda value: ran.append(value) for name in "abc"}
    times = interleave(calls, 5, lambda name: (name,), Bar())
    assert set(times) == {"a", "b", "c"} and steps == [3, 6, 9, 12, 15, 18]
    rounds = [ran[n : n + 3] for n in range(0, 18, 3)]
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len(set(map(tuple, rounds))) > 1


def test_roof():
    rates = {"read_gbs": 20.0, "gemm_gflops": 100.0}
    assert roof(4e9, 1e9, rates) == {"read_ms": 200.0, "gemm_ms": 10.0, "roof_ms": 200.0}


def of_rounds(**each):
    return {name: {"best_ms": min(ms), "each_ms": ms} for name, ms in each.items()}


def test_ratios_are_within_the_rounds():
    """The second round is slow for all; the ratio isn't."""
    times = of_rounds(ours=[1.0, 10.0, 2.0], other=[1.1, 11.0, 2.4])
    found = ratio(times, "other", "ours")
    assert found.median == pytest.approx(1.1) and found.lower == pytest.approx(1.1)
    assert found.upper == pytest.approx(1.15) and found.quartiles == "1.10-1.15"


def test_a_share_of_the_roof_is_of_each_round_and_none_of_a_roof_that_was_beaten():
    words = torch.zeros(1000, dtype=torch.uint8)
    times = of_rounds(read=[1.0, 2.0, 1.0], gemm=[1.0, 1.0, 1.0], moeprof=[2.0, 4.0, 2.5])
    # half of the words are read; next to nothing is computed
    share = roof_share(times, words, 500, 1, "moeprof")
    assert share == (0.25, pytest.approx(0.225), 0.25)
    computed = roof_share(times, words, 1, 2 * limits.SIZE**3, "moeprof")
    assert computed.median == 0.4  # in each round a whole GEMM: 1 / 2, 1 / 4, 1 / 2.5
    assert roof_share(times, words, 2001, 1, "moeprof") is None  # read in 2.001 ms at best


def times_of(**medians):
    return {
        name: {"median_ms": ms, "best_ms": ms, "lower_ms": ms / 2, "upper_ms": 2 * ms}
        | {"each_ms": [ms]}
        for name, ms in medians.items()
    }


def test_the_plot_has_the_limits_and_units():
    limits = [
        {"read_ms": 1.0, "gemm_ms": 0.1, "roof_ms": 1.0},
        {"read_ms": 2.0, "gemm_ms": 4.0, "roof_ms": 4.0},
    ]
    result = {
        "settings": {"shape": SHAPES["olmoe"]._asdict(), "dtype": "float32"},
        "machine": {"cpu": "A CPU", "features": ["avx2"], "threads": 2},
        "contenders": ["eager", "moeprof"],
        "rows": [
            {"tokens": tokens, "roof": limit, "times": times_of(eager=9.0, moeprof=5.0)}
            for tokens, limit in zip((1, 32), limits, strict=True)
        ],
    }
    (axis,) = layer.figure(result).axes
    assert axis.get_xlabel() == "T, tokens in the call"
    assert axis.get_ylabel() == "time of the call (ms)"
    assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log")
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    assert labels == [
        "roof",
        "limit: reading the weights",
        "limit: dense GEMM rate",
        "eager",
        "moeprof",
    ]
    drawn = {line.get_label(): line.get_ydata().tolist() for line in axis.get_lines()}
    assert drawn["roof"] == [1.0, 4.0] and drawn["limit: reading the weights"] == [1.0, 2.0]
    assert "top-8" in axis.get_title("left")
    assert any("A CPU (avx2), 2 threads" in text.get_text() for text in axis.texts)


@pytest.mark.parametrize("number", [1, 7, 14, 25])
def test_no_two_contenders_look_alike(number):
    names = [f"contender {n}" for n in range(number)]
    result = {
        "settings": {"shape": SHAPES["olmoe"]._asdict(), "dtype": "float32"},
        "machine": {"cpu": "A $CPU$ \a", "features": [], "threads": 2},
        "contenders": names,
        "layers": 4,
        "rows": [{"tokens": t, "times": times_of(**dict.fromkeys(names, 1.0))} for t in (1, 2)],
    }
    for module in (layer, model):
        (axis,) = module.figure(result).axes
        axis.figure.canvas.draw()
        drawn = [c.lines[0] for c in axis.containers]
        assert len(drawn) == len({line.get_color() for line in drawn}) == number


def test_colours_keep_their_distance():
    for count in (6, 12, 18, 30):
        made = np.array([to_rgb(colour) for colour in colours(count)])
        apart = np.abs(made[:, None] - made).max(-1) + np.eye(count)
        assert apart.min() > (0.12 if count <= 18 else 0.01)
    assert colours(6) == list(COLOURS)


def test_names_are_drawn_as_they_are():
    assert plain("a $x$ name") == r"a \$x\$ name"
    assert plain("\x07\N{BRAIN}é\n") == "□□é□"
    assert plain("long " * 9, 8) == "long lo…"


def test_the_other_figures_are_labelled():
    result = {
        "settings": {"shape": SHAPES["olmoe"]._asdict(), "dtype": None},
        "machine": {"cpu": "A CPU", "features": [], "threads": 1},
    }
    row = {"kernel": "softmax", "what": "", "variant": "scalar", "scalar_ratio": 1.0}
    routed = {"tokens": 1, "times": times_of(topk=1.0, bh=2.0, layer=30.0)}
    for figure in (
        kernels.figure(result | {"rows": [row]}),
        router.figure(result | {"rows": [routed]}),
    ):
        (axis,) = figure.axes
        assert axis.get_xlabel() and axis.get_ylabel() and axis.get_title("left")


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: BENCHMARK"),
        (["all"], "invalid choice: 'all'"),
        (["layer", "--shape", "8,32,16"], "expected E,H,I,K or one of olmoe, mixtral, qwen3-30b"),
        (["layer", "--shape", "olmo"], "expected a number from 1 to 1000000, got olmo"),
        (["layer", "--shape", "8,32,16,9"], "K 9 is more than E 8"),
        (["layer", "--tokens", "1,x"], "expected a number from 1 to 1000000, got x"),
        (["layer", "--tokens", "0"], "expected a number from 1 to 1000000, got 0"),
        (["layer", "--repeats", "0"], "expected a number from 1 to 1000000, got 0"),
        (["layer", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["kernels", "--threads", "2"], "unrecognized arguments: --threads 2"),
        (["router", "--plot", "figure.pdf"], "figure.pdf: a plot ends in .png"),
        (["router", "--json", "no/such/file"], "no/such/file: no such folder no/such"),
        (["router", "--json", "/"], "/: expected a file, this is a folder"),
        (["model", "--shape", "8,31,16,4"], "H 31: a model with rotary positions needs an even"),
        (["layer", "--shape", "999999,9999,9999,1"], "GB of memory"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys):
    assert message in fails(capsys, "bench", *arguments, silent=False)


def test_memory_is_checked():
    check_memory(1)
    with pytest.raises(ValueError, match="this shape needs 1000000000.0 GB of memory"):
        check_memory(1e18)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kernels", "layer", "router", "model"])
def test_scripts_run_alone(name):
    script = Path(__file__).parent / f"bench_{name}.py"
    done = subprocess.run(
        [sys.executable, script, "--help"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and f"usage: moeprof bench {name}" in done.stdout


def test_no_torch_before_a_benchmark_runs():
    code = "import sys, moeprof.cli.bench; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
