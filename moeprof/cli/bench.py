"""The arguments of `moeprof bench`."""

from __future__ import annotations

import argparse

from ..bench.settings import DTYPES, FAMILIES, SHAPES, Settings, Shape
from . import options

_MOST = 10**6


def declare(bench: argparse.ArgumentParser) -> None:
    """Its benchmarks and their options."""
    names = bench.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    kernels = names.add_parser(
        "kernels", help="every variant of every kernel against scalar and its limit, one thread"
    )
    _add_common(kernels, (48, 192), "rows of gemm_*")
    kernels.add_argument("--dtype", choices=DTYPES, help="default: all three")
    kernels.set_defaults(threads=1)
    layer = names.add_parser("layer", help="a layer's experts against other implementations")
    _add_common(layer, (1, 4, 32, 128, 512, 2048), "tokens")
    _add_dtype_and_threads(layer)
    layer.add_argument(
        "--peers",
        action="store_true",
        help="with AMD's zentorch, where installed, and vLLM's CPU kernel, where VLLM_SO names "
        "its library",
    )
    block = names.add_parser("block", help="an MoE block of a model family, stock and patched")
    _add_common(block, (1, 4, 32, 128, 512, 2048), "tokens")
    _add_dtype_and_threads(block)
    block.add_argument(
        "--family",
        choices=FAMILIES,
        help="whose block, in any shape; default: the family of the named shape, or olmoe",
    )
    quantized = names.add_parser(
        "quantized",
        help="a layer's experts in 8 and 4 bits, beside the same in a dtype, torch, and "
        "onnxruntime (with onnx) and llama-cpp-python, where installed",
    )
    _add_common(quantized, (1, 4, 32, 128, 512), "tokens")
    _add_dtype_and_threads(quantized)
    router = names.add_parser("router", help="what routing costs, as a share of the layer")
    _add_common(router, (1, 4, 32, 128, 512, 2048), "tokens")
    _add_dtype_and_threads(router)
    model = names.add_parser("model", help="a whole model: decode steps and prefills")
    _add_common(model, (1, 32, 512, 2048), "tokens of a forward pass; 1 is a decode step")
    _add_dtype_and_threads(model)
    decode = names.add_parser(
        "decode",
        help="a decode step of a whole model in 8 and 4 bits, beside llama.cpp (llama-cpp-python, "
        "gguf), where installed",
    )
    _add_common(decode, (64,), "tokens cached before the step")
    _add_dtype_and_threads(decode)


def _add_common(parser: argparse.ArgumentParser, tokens: tuple[int, ...], what: str) -> None:
    parser.add_argument(
        "--shape",
        type=_shape,
        default=SHAPES["olmoe"],
        metavar="SHAPE",
        help=f"E,H,I,K (experts, hidden and intermediate size, experts a token) or one of "
        f"{', '.join(SHAPES)}; default: olmoe",
    )
    parser.add_argument(
        "--tokens",
        type=_numbers,
        default=tokens,
        metavar="T,T,...",
        help=f"{what}; default: {','.join(map(str, tokens))}",
    )
    parser.add_argument(
        "--repeats",
        type=options.integer(1),
        default=15,
        metavar="N",
        help="rounds of each measurement, a third of them above 128 tokens; default: 15",
    )
    parser.add_argument("--json", metavar="FILE", help="write all numbers to FILE")
    parser.add_argument("--plot", metavar="FILE.png", help="draw them in FILE.png")
    parser.set_defaults(run=_run, threads=None, peers=False, family=None)


def _add_dtype_and_threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default: bfloat16")
    options.add_threads(parser)


def _numbers(text: str) -> tuple[int, ...]:
    """ "1,4,32" as ascending numbers."""
    return tuple(sorted({options.integer(1, _MOST)(part) for part in text.split(",")}))


def _shape(text: str) -> Shape:
    if text in SHAPES:
        return SHAPES[text]
    numbers = [options.integer(1, _MOST)(part) for part in text.split(",")]
    if len(numbers) != 4:
        raise argparse.ArgumentTypeError(
            f"expected E,H,I,K or one of {', '.join(SHAPES)}, got {text!r}"
        )
    shape = Shape(text, *numbers)
    if shape.top_k > shape.experts:
        raise argparse.ArgumentTypeError(f"K {shape.top_k} is more than E {shape.experts}")
    return shape


def _run(arguments: argparse.Namespace) -> None:
    from ..bench.run import run

    settings = Settings(
        arguments.benchmark,
        arguments.shape,
        arguments.dtype,
        arguments.tokens,
        arguments.repeats,
        arguments.threads,
        arguments.peers,
        arguments.family,
    )
    run(settings, arguments.json, arguments.plot)
