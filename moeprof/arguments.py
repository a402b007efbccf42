"""Parts of the command line that several commands share."""

import argparse

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
