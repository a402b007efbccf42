"""Other libraries that change a model's modules: recognised, and named in errors.

What the C path reads is plain memory, and what it does not call is left out. Where a library
has put its own classes, hooks or tensors into a layer, the error says which one and what to do.
"""

from collections.abc import Iterator

from torch import nn

_QUANTISED = (
    "{name} has quantised this layer, and the C path reads plain float32, bfloat16 or float16: "
    "load the model without quantization"
)
# By how the names of their Python modules begin.
_LIBRARIES = {
    "peft": "PEFT has put an adapter, such as LoRA, on this layer: merge it first, "
    "model = model.merge_and_unload()",
    "accelerate": "accelerate has put its hooks on this layer, which move or offload weights: "
    "load the whole model into memory, without device_map and without offload",
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
    for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
        yield from _origin(hook)
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        if tensor is not None:
            yield type(tensor).__module__
            yield type(tensor.data).__module__  # of a parameter that holds a subclass


def _origin(thing) -> Iterator[str]:
    """Of a function, also one in a functools.partial, or of an object."""
    function = getattr(thing, "func", thing)
    yield getattr(function, "__module__", None) or ""
    yield type(function).__module__
