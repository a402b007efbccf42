"""Decode steps on every transformers: what is cached is passed under a name that changed."""

import inspect
from functools import lru_cache


def decode(model, input_ids, cache, **options):
    """Call the model with what it has cached of the tokens before; options: further arguments.

    The argument is ``past_key_values`` up to transformers 5.23 and ``cache`` from then on, where
    the old name warns.
    """
    return model(input_ids=input_ids, use_cache=True, **options, **{_name(type(model)): cache})


def cache_of(output):
    """What a forward pass with ``use_cache=True`` has cached: renamed as the argument was."""
    return output["cache"] if "cache" in output else output.past_key_values


@lru_cache
def _name(model_class) -> str:
    forward = getattr(model_class, "forward", model_class.__call__)
    parameters = inspect.signature(forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"
