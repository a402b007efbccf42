"""Calling a model: where it takes its tokens, and decode steps on every transformers."""

import inspect
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, device, nn


def device_of(model: "nn.Module") -> "device":
    """Where it takes its tokens; of one that is spread over several, the first. Weights on the
    device meta are fetched by accelerate, which also moves the inputs."""
    import torch

    found = next(model.parameters()).device
    return torch.device("cpu") if found.type == "meta" else found


def only_device_of(model: "nn.Module") -> "device | None":
    """That of all its parameters and buffers; None where they lie on several, or on meta, from
    where accelerate fetches them."""
    found = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    return found.pop() if len(found) == 1 and next(iter(found)).type != "meta" else None


def decode(model: Any, input_ids: "Tensor", cache: Any, **options: Any) -> Any:
    """Call the model with what it has cached of the tokens before; options: further arguments.

    The argument is ``past_key_values`` up to transformers 5.23 and ``cache`` from then on, where
    the old name warns.
    """
    name = _name(type(model))  # type: ignore[arg-type]  # a class is hashable
    return model(input_ids=input_ids, use_cache=True, **options, **{name: cache})


def cache_of(output: Any) -> Any:
    """What a forward pass with ``use_cache=True`` has cached: renamed as the argument was."""
    return output["cache"] if "cache" in output else output.past_key_values


@lru_cache
def _name(model_class: type[Any]) -> str:
    forward = getattr(model_class, "forward", model_class.__call__)
    parameters = inspect.signature(forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


def keeps_all(cache: Any, more: int) -> bool:
    """Whether a cache still has every token that it was given, and will after `more` of them.

    Attention to all tokens has them. A sliding window drops those before it, and linear attention
    and convolutions keep none. Of a cache of a model's own class it is not known: False.
    """
    return type(cache).__name__ == "DynamicCache" and all(
        _layer_keeps_all(layer, more) for layer in cache.layers
    )


def _layer_keeps_all(layer: Any, more: int) -> bool:
    kind = type(layer).__name__
    if kind == "DynamicSlidingWindowLayer":
        return layer.get_seq_length() + more < layer.sliding_window
    return kind in ("DynamicLayer", "DynamicIndexedLayer")
