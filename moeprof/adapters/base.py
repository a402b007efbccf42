"""What the layouts share: hooks that would be skipped, outputs of routers."""

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..experts import tensor_obstacle

# Hooks that may sit on a gate or on all modules, since they change no output: transformers'
# recorder of router logits, torch's own (FlopCounterMode tracks modules) and moeprof's.
_KNOWN_HOOKS = ("transformers.utils.output_capturing", "torch.utils.", "moeprof.")


class RouterOutput(NamedTuple):
    """What a gate said of T tokens; None for what it did not say."""

    logits: Tensor | None  # (T, E)
    weights: Tensor | None = None  # (T, k)
    experts: Tensor | None = None  # (T, k) integer, -1 for a skipped slot


class Adapter:
    """One layout of MoE blocks: `gate` routes, `experts` are skipped where not selected."""

    block_class: ClassVar[type[nn.Module] | None]  # None: not in this transformers
    gate_class: ClassVar[type[nn.Module]]

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return cls.block_class is not None and type(module) is cls.block_class

    # What a layout has to say:

    @classmethod
    def num_experts(cls, block: nn.Module) -> int:
        raise NotImplementedError  # abstract

    @classmethod
    def settings(cls, block: nn.Module) -> tuple[int, bool]:
        """(top_k, norm_topk_prob) of the model's own router."""
        raise NotImplementedError  # abstract

    @classmethod
    def read_experts(cls, block: nn.Module) -> tuple[list[Tensor], str | None]:
        """(the expert weights as `layer_of` takes them, None), or ([], why not).

        Not where the modules, a hook or a forward among them are others than the stock ones.
        """
        raise NotImplementedError  # abstract

    @classmethod
    def logits(cls, block: nn.Module, x: Tensor) -> Any:
        """What the stock gate says of x (T, H), through its __call__."""
        raise NotImplementedError  # abstract

    @classmethod
    def output(cls, hidden: Tensor, router: RouterOutput) -> Any:
        """What the block's forward returns."""
        raise NotImplementedError  # abstract

    gate_forward: ClassVar = None  # replaces gate.forward, where one is needed

    # Shared:

    @classmethod
    def has_stock_gate(cls, block: nn.Module) -> bool:
        return type(block.gate) is cls.gate_class

    @classmethod
    def readable(cls, block: nn.Module) -> tuple[list[Tensor], str | None]:
        """(the expert weights, None), or ([], why this block can't run on the C path now)."""
        if reason := cls.obstacle(block):
            return [], reason
        weights, reason = cls.read_experts(block)
        if reason := reason or tensor_obstacle(weights):
            return [], reason
        return weights, None

    @classmethod
    def obstacle(cls, block: nn.Module) -> str | None:
        """What stands before the experts of this block and would be passed by, or None."""
        if torch.is_autocast_enabled("cpu"):
            return "CPU autocast is active"
        if foreign := [h for h in _global_hooks() if not _is_known(h)]:
            return f"a hook on all modules: {foreign[0]!r}"
        if cls.has_stock_gate(block):
            forward = vars(block.gate).get("forward")
            if forward and getattr(forward, "__func__", None) is not cls.gate_forward:
                return "the gate has a forward of its own"
            if foreign := [h for h in _hooks(block.gate) if not _is_known(h)]:
                return f"a hook on the gate: {foreign[0]!r}"
        return None

    @classmethod
    def route(cls, block: nn.Module, x: Tensor, name: str) -> RouterOutput:
        """What the gate of the block `name`, stock or a user's, says of x (T, H)."""
        if cls.has_stock_gate(block):
            return RouterOutput(cls.logits(block, x))
        return read_router_output(block.gate(x), len(x), cls.num_experts(block), name)


def full_name(module: nn.Module) -> str:
    """The class with the Python module that it is from: several libraries have a Linear."""
    return f"{type(module).__name__} ({type(module).__module__})"


def hooked(module: nn.Module) -> str | None:
    """What of this module, which the C path does not call, would be left out, or None."""
    own = vars(module)
    hooks = own["_forward_hooks"] or own["_forward_pre_hooks"]
    if hooks and all(getattr(h, "__module__", "").startswith("moeprof.") for h in _hooks(module)):
        hooks = None  # the profiler's, which the C path tells by itself what it ran
    if hooks or "forward" in own:
        return f"a hook or a forward of its own on {type(module).__name__} in the experts"
    return None


def _hooks(module: nn.Module) -> list:
    return [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]


def _global_hooks() -> list:
    module = nn.modules.module
    return [*module._global_forward_hooks.values(), *module._global_forward_pre_hooks.values()]


def _is_known(hook) -> bool:
    return (getattr(hook, "__module__", "") or "").startswith(_KNOWN_HOOKS)


def read_router_output(output: Any, tokens: int, num_experts: int, name: str) -> RouterOutput:
    """Read what the router of the block `name` returned.

    Accepted: logits (T, E); (logits (T, E), weights (T, k), indices (T, k)); (weights (T, k) or
    scores (T, E), indices (T, k)). Leading dimensions may be (B, S) in place of T.

    Raises
    ------
    ValueError
        "Router output format unexpected ...", with what came.
    """
    parts = [output] if isinstance(output, Tensor) else output
    if isinstance(parts, tuple | list) and parts and all(isinstance(p, Tensor) for p in parts):
        rows = [p.reshape(-1, p.shape[-1]) for p in parts if p.dim() in (2, 3)]
        if len(rows) == len(parts) and all(len(r) == tokens for r in rows):
            if read := _by_shape(rows, num_experts):
                return read
    raise ValueError(
        f"Router output format unexpected: {name}: wanted logits ({tokens}, {num_experts}), or "
        "(logits, weights (T, k), indices (T, k)), or (weights, indices); got "
        f"{describe_output(output)}"
    )


def _by_shape(rows: list[Tensor], num_experts: int) -> RouterOutput | None:
    *values, last = rows
    if not values:
        is_logits = last.is_floating_point() and last.shape[1] == num_experts
        return RouterOutput(last) if is_logits else None
    if not all(v.is_floating_point() for v in values):
        return None
    if last.is_floating_point() or last.dtype == torch.bool:  # a mask is no index
        return None
    weights = values[-1]
    if weights.shape != last.shape and weights.shape[1] == num_experts:  # scores over all E
        inside = last.clamp(0, num_experts - 1).long()  # what lies outside is refused later
        weights = weights.gather(1, inside)
    if weights.shape != last.shape:
        return None
    if len(values) == 1:
        return RouterOutput(None, weights, last)
    if len(values) == 2 and values[0].shape[1] == num_experts:
        return RouterOutput(values[0], weights, last)
    return None


def describe_output(output: Any) -> str:
    if isinstance(output, Tensor):
        return f"a {output.dtype} tensor of shape {tuple(output.shape)}"
    if isinstance(output, tuple | list):
        return f"{type(output).__name__} of ({', '.join(map(describe_output, output))})"
    return type(output).__name__
