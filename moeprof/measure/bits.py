"""The bits of a tensor, to be read or compared as they are: no NaN, no -0, no rounding."""

from contextlib import suppress

import torch
from torch import Tensor


def words_of(tensor: Tensor) -> Tensor:
    """The same memory as integers, the widest that shape and offset allow; any alignment."""
    tensor = tensor.detach()
    for dtype in (torch.int64, torch.int32, torch.int16):
        with suppress(RuntimeError):
            return tensor.view(dtype)
    return tensor.view(torch.uint8)
