"""What others have changed in a model: recognised, and named in errors.

What the C path reads is plain memory, and what it does not call is left out. Where a library
has put its own classes, hooks or tensors into a layer, the error says which one and what to do.
"""

import sys
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import nn

from .. import _C

_QUANTISED = (
    "{name} has quantised this layer, and the C path reads plain float32, bfloat16 or float16: "
    "load the model without quantization"
)
# By how the names of their Python modules begin.
_LIBRARIES = {
    "peft": "PEFT has put an adapter, such as LoRA, on this layer: merge it first, "
    "model = model.merge_and_unload()",
    "accelerate": "accelerate has put its hooks on this layer, which bring its weights for each "
    "call: load the model onto devices that hold it, without offload",
    "nnsight": "nnsight has put its hooks on this layer: patch a model that it does not wrap",
    **{
        prefix: _QUANTISED.format(name=name)
        for prefix, name in {
            "bitsandbytes": "bitsandbytes",
            "torchao": "torchao",
            "optimum.quanto": "quanto",
            "quanto": "quanto",
            "torch.ao": "torch.ao (quantize_dynamic)",
            "hqq": "HQQ",
            "awq": "AWQ",
            "auto_gptq": "GPTQ",
            "gptqmodel": "GPTQ",
            "compressed_tensors": "compressed-tensors",
            "transformers.integrations.finegrained_fp8": "transformers (FP8)",
        }.items()
    },
}


def explained(reason: str, module: nn.Module) -> str:
    """`reason`, and which library has changed this module or one in it, where that is known."""
    for part in module.modules():
        for name in _origins(part):
            for prefix, advice in _LIBRARIES.items():
                if name == prefix or name.startswith(prefix + "."):
                    return f"{reason}; {advice}"
    return reason


def _origins(module: nn.Module) -> Iterator[str]:
    """The names of the Python modules that this module's own parts come from."""
    own = vars(module)
    yield type(module).__module__
    for name in ("_hf_hook", "forward"):
        if name in own:
            yield from _origin(own[name])
    for hook in hooks_of(module):
        yield from _origin(hook)
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        if tensor is not None:
            yield type(tensor).__module__
            yield type(tensor.data).__module__  # of a parameter that holds a subclass


def _origin(thing: Any) -> Iterator[str]:
    """Of a function, also one in a functools.partial, or of an object."""
    function = getattr(thing, "func", thing)
    yield getattr(function, "__module__", None) or ""
    yield type(function).__module__


# ---- hooks and forwards that would be skipped ----

# Hooks that may sit on a gate or on all modules, since they change no output: transformers'
# recorder of router logits, torch's own (FlopCounterMode tracks modules) and moeprof's.
_KNOWN_HOOKS = ("transformers.utils.output_capturing", "torch.utils.", "moeprof.")


def full_name(module: nn.Module) -> str:
    """The class with the Python module that it is from: several libraries have a Linear."""
    return f"{type(module).__name__} ({type(module).__module__})"


def hooked(module: nn.Module) -> str | None:
    """What of this module, which the C path does not call, would be left out, or None."""
    own = vars(module)
    hooks = own["_forward_hooks"] or own["_forward_pre_hooks"]
    backward = own["_backward_hooks"] or own["_backward_pre_hooks"]
    if hooks and all(getattr(h, "__module__", "").startswith("moeprof.") for h in hooks_of(module)):
        hooks = None  # the profiler's, which the C path tells by itself what it ran
    if hooks or backward or _own_forward(module):
        return f"a hook or a forward of its own on {type(module).__name__} in the experts"
    return None


# Whose hooks and forwards a model's classes and settings tell of.
_KNOWN_CODE = ("torch", "transformers", "transformers_modules", "accelerate", "peft", "moeprof")


def code_of_others(module: nn.Module) -> str | None:
    """A hook or a forward on this module that is no library's, but a user's, or None."""
    forward = vars(module).get("forward")
    if forward is not None and not _is_ours_or_stock(forward, module):
        if _package(forward) not in _KNOWN_CODE:
            return "a forward of its own"
    for hook in hooks_of(module):
        if _package(hook) not in _KNOWN_CODE:
            return f"a hook, {getattr(hook, '__qualname__', type(hook).__qualname__)}"
    return None


def _package(code: Any) -> str:
    return _defined_in(code).partition(".")[0]


def _defined_in(code: Any) -> str:
    """The Python module of a function, also one in a functools.partial, or of a callable object.

    That of its globals: `functools.wraps` renames the rest.
    """
    function = getattr(code, "func", code)
    return str(getattr(function, "__globals__", {}).get("__name__") or type(function).__module__)


def _own_forward(module: nn.Module) -> bool:
    """Has it a forward of its own, other than one of `moeprof.patch`?"""
    own = vars(module)
    forward = own.get("forward")
    if _only_moves_inputs(forward, own):
        forward = own["_old_forward"]
    return not (forward is None or _is_ours_or_stock(forward, module))


def _only_moves_inputs(forward: Any, own: dict[str, Any]) -> bool:
    """Is it accelerate's, on a module whose weights stay where they are? So it spreads a model
    over several devices; the inputs of a block are moved before that is called."""
    hook = own.get("_hf_hook")
    return (
        getattr(getattr(forward, "func", None), "__module__", None) == "accelerate.hooks"
        and type(hook).__name__ == "AlignDevicesHook"
        and not getattr(hook, "offload", True)
    )


def _is_ours_or_stock(forward: Any, module: nn.Module) -> bool:
    if (getattr(forward, "__module__", "") or "").startswith("moeprof."):
        return True
    # That of the class, bound: as the recorder of transformers 4 leaves it.
    return getattr(forward, "__func__", None) is type(module).forward and forward.__self__ is module


_RECORDER = "transformers.utils.generic"


def _is_recorder(forward: Any) -> bool:
    """Is it the recorder of outputs of transformers 4?"""
    return _defined_in(forward) == _RECORDER


def _is_recorded(gate: nn.Module) -> bool:
    """Is its own forward that recorder, around the stock one?"""
    forward = vars(gate)["forward"]
    return _is_recorder(forward) and _is_ours_or_stock(forward.__wrapped__, gate)


def recorded_by(module: nn.Module) -> int | None:
    """The thread that is in a call of transformers 4 that records this module's outputs.

    None, too, where such a call was ended by an error and left its recorder.
    """
    if not _is_recorder(vars(module).get("forward")):
        return None
    for thread, top in sys._current_frames().items():
        frame: FrameType | None = top
        while frame is not None:
            if frame.f_globals.get("__name__") == _RECORDER:
                recorded = [one for one, _ in [*frame.f_locals.get("monkey_patched_layers", ())]]
                # It changes a module before it notes it.
                if any(one is module for one in (*recorded, frame.f_locals.get("module"))):
                    return thread
            frame = frame.f_back
    return None


def gate_obstacle(gate: nn.Module, is_stock: bool) -> str | None:
    """What stands before the experts of a block and would be passed by, or None.

    is_stock: the C path passes by the choice of such a gate, which has to be the class's then.
    """
    if reason := autocast_obstacle(gate):
        return reason
    everywhere = nn.modules.module
    if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
        if foreign := [h for h in _global_hooks() if not _is_known(h)]:
            return f"a hook on all modules: {foreign[0]!r}"
    if not is_stock:
        return None
    own = vars(gate)
    if _own_forward(gate) and not _is_recorded(gate):
        return "the gate has a forward of its own"
    if own["_forward_hooks"] or own["_forward_pre_hooks"]:
        if foreign := [h for h in hooks_of(gate) if not _is_known(h)]:
            return f"a hook on the gate: {foreign[0]!r}"
    return None


def autocast_obstacle(gate: nn.Module) -> str | None:
    """What a thread has switched on that no module shows, or None."""
    if torch._C._is_any_autocast_enabled():
        device = next((parameter.device.type for parameter in gate.parameters()), "cpu")
        if torch.is_autocast_enabled(device):
            return f"{device.upper()} autocast is active"
    return None


def hooks_of(module: nn.Module) -> list[Any]:
    """What stands before its forward, and after."""
    return [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]


def _global_hooks() -> list[Any]:
    module = nn.modules.module
    return [*module._global_forward_hooks.values(), *module._global_forward_pre_hooks.values()]


def _is_known(hook: Any) -> bool:
    return (getattr(hook, "__module__", "") or "").startswith(_KNOWN_HOOKS)


class Watched:
    """What of modules has to stay as it is, to be looked at in every step: see `_C.Watch`.

    To read the experts of a layer takes a look at hundreds of modules; a `_C.Watch` takes one at
    their dictionaries, in C.
    """

    def __init__(self) -> None:
        self._places: list[tuple[dict[Any, Any], Any]] = []
        self._tables: list[dict[Any, Any]] = []
        self._modules: list[nn.Module] = []

    def attributes(self, module: nn.Module, *names: str) -> None:
        """These of its attributes, also that it has none of this name."""
        own = vars(module)
        self._places += [(own, name) for name in names]

    def children(self, module: nn.Module) -> None:
        self._entries(module, "_modules")

    def hooks(self, module: nn.Module) -> None:
        """What stands before its forward, and after."""
        self.attributes(module, "forward")
        self._entries(module, "_forward_hooks", "_forward_pre_hooks")
        self._modules.append(module)

    def parts(self, root: nn.Module, flags: Iterable[str]) -> None:
        """All that is in it: modules, parameters, buffers, hooks and these attributes."""
        for module in root.modules():
            self.hooks(module)
            if type(module) is not nn.Linear:  # of which nothing else is read, and there are many
                self.attributes(module, *flags)
            self._entries(module, "_modules", "_parameters", "_buffers")
            self._entries(module, "_backward_hooks", "_backward_pre_hooks")

    def everywhere(self) -> None:
        """Hooks on all modules."""
        self._table(nn.modules.module._global_forward_hooks)
        self._table(nn.modules.module._global_forward_pre_hooks)

    def begin(self) -> _C.Watch:
        """True for as long as all of it is what it is now."""
        return _C.Watch(self._places, self._tables, self._modules)

    def _entries(self, module: nn.Module, *names: str) -> None:
        for name in names:
            self._table(vars(module)[name])

    def _table(self, table: dict[Any, Any]) -> None:
        self._tables.append(table)
        self._places += [(table, key) for key in list(table)]  # others may add to it
