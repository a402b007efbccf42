"""What differs between the layouts of MoE blocks: one file per layout, one class each.

An adapter is a class that is never instantiated, so that a patched model can be copied.
"""

from torch import nn

from .base import Adapter
from .transformers4 import Olmoe4
from .transformers5 import Olmoe5

ADAPTERS: list[type[Adapter]] = [Olmoe4, Olmoe5]


def adapter_of(module: nn.Module) -> type[Adapter] | None:
    """The adapter for this block, or None if it is no block of a known layout."""
    return next((a for a in ADAPTERS if a.matches(module)), None)


def check_model(model, function: str) -> None:
    """TypeError unless it is a torch.nn.Module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: expected a torch.nn.Module, got {type(model).__name__}")


def find_moe_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The (qualified name, block) of each MoE block, in the order of the layers.

    Raises
    ------
    ValueError
        "No routers found ...", with what was looked for and what was found.
    """
    blocks = [(name, m) for name, m in model.named_modules() if adapter_of(m)]
    if blocks:
        return blocks
    classes = {type(m).__name__ for m in model.modules()}
    alike = sorted(c for c in classes if any(s in c.lower() for s in ("moe", "router", "expert")))
    raise ValueError(
        f"No routers found in {type(model).__name__}: looked for modules of class "
        f"OlmoeSparseMoeBlock with a gate and experts; found {len(classes)} classes of modules, "
        f"of a mixture of experts: {', '.join(alike) or 'none'}"
    )
