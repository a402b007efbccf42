"""Which model a study is of: enough to load it again, in another process or on another machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from .. import demo

if TYPE_CHECKING:
    import torch


DEMO = "demo"  # what users call the demo model


def source_name(model: str) -> str | None:
    """`Source.name` of a model as users name it."""
    return None if model == DEMO else model


class Source(NamedTuple):
    """A model and how it is loaded.

    name : a folder or a hub id; None for the demo model
    dtype : as torch names it
    bits : 8 or 4, the bits of its experts' weights; None as the model has them
    device : as torch names it
    trust_remote_code : whether Python code that comes with it may be run
    """

    name: str | None = None
    dtype: str = "float32"
    bits: int | None = None
    device: str = "cpu"
    trust_remote_code: bool = False

    def load(self) -> tuple[Any, Any]:
        """(model in eval mode, tokenizer); ValueError or OSError in one line."""
        import torch
        from transformers.utils import logging

        from ..models.load import load_model, load_tokenizer
        from ..quantizing.load import is_saved
        from ..quantizing.load import load as load_quantized
        from ..quantizing.quantize import quantize

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        name, bits, trust = self.name, self.bits, self.trust_remote_code
        dtype, device = getattr(torch, self.dtype), self._device()
        saved = name is not None and is_saved(name)
        if (bits or saved) and device.type != "cpu":
            raise ValueError(
                f"--device {device}: experts in 8 or 4 bits, which run on a CPU only: "
                "leave out --device or the bits"
            )
        if name is not None and (saved or (bits and not trust)):
            model = load_quantized(name, bits, dtype=None if saved else dtype)
            return model, load_tokenizer(name, model)
        model, tokenizer = demo.load(dtype) if name is None else load_model(name, dtype, trust)
        if bits:
            quantize(model, bits)
        return model.to(device), tokenizer

    def _device(self) -> torch.device:
        """Where the model runs; ValueError where that isn't there."""
        import torch

        try:
            device = torch.device(self.device)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, ImportError, AttributeError) as error:
            # as torch says it
            reason = str(error).partition("\n")[0].partition(". ")[0]
            raise ValueError(f"--device {self.device}: {reason}") from None
        if device.type == "meta":
            raise ValueError("--device meta: a model there has no weights")
        return device
