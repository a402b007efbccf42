"""MXFP4, a format of 4 bits of the Open Compute Project, in which gpt_oss gives out its experts.

Specification: OCP Microscaling Formats (MX) v1.0. 32 numbers along a row share a scale of 8
bits, a power of two; each number is a float of 4 bits, a sign, two bits of exponent, one of
mantissa.
"""

import torch
from torch import Tensor

BLOCKS, SCALES = "_blocks", "_scales"  # what the names of the two tensors end in
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of the lower three bits; then the sign
_BIAS = 127  # of the scale's exponent


def _pairs() -> Tensor:
    """(256, 2): the two numbers of each byte, the first in the lower half."""
    numbers = torch.tensor([*_MAGNITUDES, *(-m for m in _MAGNITUDES)])
    byte = torch.arange(256)
    return torch.stack([numbers[byte & 15], numbers[byte >> 4]], dim=1)


def decoded(blocks: Tensor, scales: Tensor) -> Tensor:
    """(..., K) float32 of blocks (..., K / 32, 16) and scales (..., K / 32), both uint8.

    Of a scale of 255, which stands for NaN, no number is finite.
    """
    numbers = _pairs()[blocks.int()].flatten(-2)
    scaled = numbers * torch.exp2(scales.float() - _BIAS)[..., None]
    return scaled.flatten(-2)
