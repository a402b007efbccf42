"""The MoE blocks of a model that moeprof.patch knows."""

from torch import nn

from ..backends.ops import read_packed, tensor_obstacle
from .families.base import Adapter
from .families.olmoe4 import Olmoe4
from .families.olmoe5 import Olmoe5
from .guards import explained

ADAPTERS: list[type[Adapter]] = [Olmoe4, Olmoe5]


def adapter_of(module: nn.Module) -> type[Adapter] | None:
    """The adapter for this block, or None if it is no block of a known layout."""
    return next((a for a in ADAPTERS if a.matches(module)), None)


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
    raise ValueError(_no_routers(model))


def _no_routers(model: nn.Module) -> str:
    """What was looked for and found, and what of moeprof works on such a model."""
    classes = {type(m).__name__ for m in model.modules()}
    alike = sorted(c for c in classes if any(s in c.lower() for s in ("moe", "router", "expert")))
    text = (
        f"No routers found in {type(model).__name__}: looked for modules of class "
        f"OlmoeSparseMoeBlock with a gate and experts, since moeprof.patch knows OLMoE only; found "
        f"{len(classes)} classes of modules, of a mixture of experts: {', '.join(alike) or 'none'}"
    )
    if _profiler_reads(model):
        text += ". moeprof.MoEProfiler(model) reads this model as it is"
    if _has_interface(model):
        text += (
            '. model.set_experts_implementation("moeprof") runs its experts in C, with the '
            "model's own router"
        )
    return text


def _profiler_reads(model: nn.Module) -> bool:
    from .finding import find_sites  # it imports this package

    try:
        return bool(find_sites(model))
    except ValueError:  # it has nothing to read either
        return False


def _has_interface(model: nn.Module) -> bool:
    """Do all its experts lie behind transformers' interface, in a form that the C path reads?

    Its decorator is what sets `is_concatenated` on a class of experts.
    """
    if not hasattr(model, "set_experts_implementation"):  # transformers 4 has no such interface
        return False
    behind = [m for m in model.modules() if "is_concatenated" in vars(m)]
    reasons = [reason or tensor_obstacle(weights) for weights, reason in map(read_packed, behind)]
    return bool(reasons) and not any(reasons)


def check_runnable(blocks: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """The blocks as given; ValueError for one that can't run on the C path, as `moeprof.patch`."""
    for name, block in blocks:
        if reason := adapter_of(block).readable(block)[1]:
            raise ValueError(not_runnable(name or type(block).__name__, explained(reason, block)))
    return blocks


def not_runnable(name: str, reason: str) -> str:
    """What is said of a block that can't run on the C path."""
    return f"{name}: can't run on moeprof's path: {reason}"


def experts_of(model):
    """(experts of a layer, experts that the model's own router takes).

    Raises ValueError, as moeprof.patch does, for a model that can't be patched.
    """
    name, block = check_runnable(find_moe_blocks(model))[0]
    family = adapter_of(block)
    return family.num_experts(block), family.settings(block)[0]
