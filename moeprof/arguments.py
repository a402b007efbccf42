"""Parts of the command line that several commands share."""

import argparse

DEMO = "the demo model of moeprof"
DTYPES = ("float32", "bfloat16", "float16")


def integer(low, high=10**6):
    """A parser of integers from low to high."""

    def parse(text):
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"expected a number from {low} to {high}, got {text}")
        return value

    return parse


def add_model(parser):
    """--model, --dtype and --threads, which `load` reads."""
    parser.add_argument("--model", metavar="PATH_OR_HUB_ID", help=f"default: {DEMO}")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: float32")
    parser.add_argument(
        "--threads", type=integer(1), metavar="N", help="default: as torch chooses"
    )


def load(arguments):
    """(model, tokenizer) as --model, --dtype and --threads say."""
    import torch
    from transformers.utils import logging

    from . import demo
    from .experiment.inputs import load_model

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    return demo.load(dtype) if arguments.model is None else load_model(arguments.model, dtype)
