"""What the parts of an MoE layer hold: matrix elements, bytes, settings.

E experts, k of them a token, H hidden size. A matrix is a parameter with two dimensions or more,
of one expert where experts are stacked. Biases are none: FlopCounterMode counts no addition.
"""

from collections.abc import Collection, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .quantized import QuantizedExperts

COUNTS = (
    "num_experts",
    "n_routed_experts",
    "num_local_experts",
    "moe_num_experts",
    "total_experts",
    "n_experts",
)
_TOP_K = (
    "top_k",
    "topk",
    "moe_top_k",
    "moe_topk",
    "moe_k",
    "num_experts_per_tok",
    "num_experts_per_token",
    "experts_per_token",
    "num_selected_experts",
    "top_k_experts",
)


def walk(module: nn.Module, without: Collection[nn.Module] = ()) -> Iterator[nn.Module]:
    """The module and all in it that runs, each once, but for what lies in `without`."""
    seen = set(without)
    stack = [module]
    while stack:
        part = stack.pop()
        if part not in seen:
            seen.add(part)
            yield part
            stack.extend(reversed(_running(part)))


# ---- adapters, as peft wraps modules ----


def _running(part: nn.Module) -> list[nn.Module]:
    """The children that run: of a wrapper of peft what is active, of others all."""
    children: dict[str, Any] = {n: m for n, m in part._modules.items() if m is not None}
    if copies := _copies(part):
        return copies[:1]
    if not _adapts(part):
        return list(children.values())
    base, active = children.pop("base_layer"), _active(part)
    if not active:
        return [base]
    running = [base]
    for child in children.values():
        by_adapter = isinstance(child, nn.ModuleDict)
        running += [child[n] for n in active if n in child] if by_adapter else [child]
    return running


def _adapts(part: nn.Module) -> bool:
    """Is this a module of peft around another one?"""
    return "base_layer" in part._modules and hasattr(part, "active_adapter")


def _active(wrapper: nn.Module) -> list[str]:
    """The adapters of a wrapper that run beside what it wraps."""
    off = getattr(wrapper, "disable_adapters", False) or getattr(wrapper, "merged", False)
    names: Any = getattr(wrapper, "active_adapters", None)
    names = names or getattr(wrapper, "active_adapter", ())
    return [] if off else [names] if isinstance(names, str) else list(names)


def _copies(part: nn.Module) -> list[nn.Module]:
    """Of peft's modules_to_save the module and its trained copies, the one that runs first."""
    children: dict[str, Any] = part._modules
    if not children.keys() >= {"original_module", "modules_to_save"}:
        return []
    original, saved = children["original_module"], children["modules_to_save"]
    active = _active(part)
    runs = saved[active[0]] if active and all(name in saved for name in active) else original
    return [runs, *(m for m in (original, *saved.values()) if m is not runs)]


def idle(model: nn.Module) -> set[nn.Module]:
    """The modules of copies that are kept and don't run, see `_copies`."""
    return {m for part in model.modules() for copy in _copies(part)[1:] for m in copy.modules()}


def wrappers(model: nn.Module, blocks: list[nn.Module]) -> list[nn.Module]:
    """Of each block the first module of peft that is in it, or that keeps it as a copy."""
    adapting = [m for m in model.modules() if _adapts(m) or _copies(m)]
    found = []
    for block in blocks if adapting else []:
        inside = set(block.modules())
        found += [
            m
            for m in adapting
            if m in inside or block in (part for copy in _copies(m) for part in copy.modules())
        ][:1]
    return found


def active_adapters(wrappers: list[nn.Module]) -> list[list[str]]:
    """Of each wrapper the adapters that run."""
    return [_active(wrapper) for wrapper in wrappers]


def unwrapped(module: nn.Module) -> nn.Module:
    """What the adapters around this module wrap, or the copy that runs in place of it."""
    while True:
        if copies := _copies(module):
            module = copies[0]
        elif isinstance(base := module._modules.get("base_layer"), nn.Module):
            module = base
        else:
            return module


def _adapter_reason(part: nn.Module) -> str:
    """Why what this module adds to another one can't be counted; "" if it is plain LoRA."""
    if "parametrizations" in part._modules:
        return f"a parametrization computes the weights of a {type(part).__name__} in each call"
    if not _adapts(part) or not (active := _active(part)) or _is_plain_lora(part, active):
        return ""
    kind = next((type(v) for v in vars(part).get("lora_variant", {}).values()), type(part))
    return (
        f"an adapter runs in it whose FLOPs are not known ({kind.__module__}.{kind.__qualname__}): "
        "of peft's, plain LoRA on modules is counted; merge or disable it to count the rest"
    )


def _is_plain_lora(part: nn.Module, active: list[str]) -> bool:
    """x A B, for each token, beside x W: no DoRA, no other variant, no adapted parameter."""
    own = vars(part)
    factors: list[Any] = [part._modules.get(name) for name in ("lora_A", "lora_B")]
    if "parameter_name" in own or not all(isinstance(f, nn.ModuleDict) for f in factors):
        return False
    used = [name for name in active if name in factors[0]]
    special = any(own.get(kind, {}).get(n) for kind in ("lora_variant", "use_dora") for n in used)
    return not special and all(type(f[name]) is nn.Linear for f in factors for name in used)


def _adapted_stacks(module: nn.Module) -> Iterator[nn.Module]:
    """The wrappers of peft, from the outermost, around a module with stacked experts."""
    part: Any = module
    while _adapts(part):
        yield part
        part = part._modules["base_layer"]


def _merging(module: nn.Module) -> Iterator[nn.Module]:
    """Those of them that add to a stacked parameter before each call."""
    for part in _adapted_stacks(module):
        if "parameter_name" in vars(part) and "lora_A" in part._modules:
            yield part


def merge_flops(collections: list[nn.Module]) -> int:
    """FLOPs of each call that make adapters' products (E, ., .) of all experts, run or not."""
    return sum(_merge_flops(part) for c in collections for part in _merging(c))


def _merge_flops(wrapper: Any) -> int:
    """Of one wrapper of peft."""
    active = [name for name in _active(wrapper) if name in wrapper.lora_A]
    products = [
        2 * wrapper.lora_A[name].weight.numel() * wrapper.lora_B[name].weight.shape[0]
        for name in active
    ]
    # One adapter of peft >= 0.19 is a parametrization of torch, which is tried when it is
    # registered and computed again when it is used.
    tried = hasattr(wrapper, "get_delta_factors") and len(active) == 1
    return sum(products) * (2 if tried and wrapper.num_experts > 1 else 1)


# ---- matrices and bytes ----

# Several numbers lie in one of these, how many only the module's own code knows.
_PACKED = (torch.uint8, torch.int32)


def matrix_elements(module: nn.Module, without: Collection[nn.Module] = ()) -> int:
    """How many elements the matrices have that multiply a token in `module`."""
    return sum(_own_elements(part) for part in walk(module, without))


def _own_elements(part: nn.Module) -> int:
    if isinstance(part, nn.Embedding):  # a table: it is looked up
        return 0
    if (features := _features(part)) and not _wraps(part):
        return features[0] * features[1]  # a quantised linear's tensors have other shapes
    named = part.named_parameters(recurse=False)
    return sum(p.numel() for name, p in named if p.dim() >= 2 and "bias" not in name)


def _features(part: nn.Module) -> tuple[int, int] | None:
    own = vars(part)
    for names in (("in_features", "out_features"), ("infeatures", "outfeatures")):
        if all(type(own.get(name)) is int for name in names):
            return own[names[0]], own[names[1]]
    return None


def _wraps(part: nn.Module) -> bool:
    """Do the matrices of what says its features lie in modules inside (a LoRA wrapper)?"""
    if part._parameters or part._buffers:
        return False
    return any(
        _features(m) or list(m.parameters(recurse=False)) for m in walk(part, ()) if m is not part
    )


def unknown_reason(module: nn.Module, without: Collection[nn.Module] = ()) -> str:
    """Why what multiplies a token in `module` can't be counted, or "" if it can."""
    for part in walk(module, without):
        if reason := _adapter_reason(part):
            return reason
        if _features(part):
            continue
        for name, p in [*part._parameters.items(), *part._buffers.items()]:
            if p is not None and p.dim() >= 2 and p.dtype in _PACKED:
                return f"{name} of {type(part).__name__} is packed in {p.dtype}"
    return ""


def parameter_bytes(module: nn.Module, without: Collection[nn.Module] = ()) -> int:
    """Bytes of all parameters in `module`, of what is quantised its buffers too."""
    return sum(sum(map(tensor_bytes, weights_of(part))) for part in walk(module, without))


def weights_of(part: nn.Module) -> list[Tensor]:
    """The parameters of this very module, of what is quantised its buffers too."""
    own: list[Tensor] = list(part.parameters(recurse=False))
    if own and not any(p.dtype in _PACKED for p in own):
        return own
    weight_bias: Any = getattr(part, "_weight_bias", None)
    if hasattr(part, "_packed_params") and callable(weight_bias):
        # torch.ao: weight and bias are in an object of C++; the module inside has it as well
        inside = any(hasattr(child, "_packed_params") for child in part.children())
        return [] if inside else [t for t in weight_bias() if t is not None]
    quantised = bool(
        own
        or _features(part)
        or any(b.dtype in _PACKED and b.dim() >= 2 for b in part.buffers(recurse=False))
    )
    return [*own, *part.buffers(recurse=False)] if quantised else own


def tensor_bytes(tensor: Tensor) -> int:
    """Of a tensor that keeps others inside (torchao's) those; its own dtype is what it stands
    for. Of one that is spread over ranks this rank's part."""
    if hasattr(tensor, "to_local") and hasattr(tensor, "placements"):
        return tensor_bytes(tensor.to_local())
    if type(tensor) not in (Tensor, nn.Parameter) and hasattr(tensor, "__tensor_flatten__"):
        inner = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        return sum(map(tensor_bytes, inner))
    state = getattr(tensor, "quant_state", None)  # bitsandbytes: scales beside the packed numbers
    scales = [t for t in vars(state).values() if isinstance(t, Tensor)] if state else []
    return sum(t.numel() * t.element_size() for t in (tensor, *scales))


# ---- experts ----


class Size(NamedTuple):
    """What one expert holds; None where it is not known or not the same in all.

    elements: of its matrices;  each: those of each expert, where they differ
    bytes: of all its parameters;  reason: why something is unknown, or ""
    """

    elements: int | None
    bytes: int | None
    each: list[int] | None = None
    reason: str = ""


def expert_size(collections: list[nn.Module], num_experts: int, *, block: nn.Module) -> Size:
    """The Size of an expert whose parts lie in these `collections`.

    Each of them is a list or a dictionary of E modules, or a module with stacked parameters
    (E, ., .), of which the block itself may be one; an expert owns its part of each.
    """
    sizes = [_size(c, num_experts, recurse=c is not block) for c in collections]
    if len(sizes) == 1:
        return sizes[0]
    if not sizes:
        return Size(None, None, None, "no experts lie beside its router")
    reason = next((s.reason for s in sizes if s.reason), "")
    elements = [s.elements for s in sizes if s.elements is not None]
    held = [s.bytes for s in sizes if s.bytes is not None]
    if len(elements) < len(sizes) or len(held) < len(sizes):
        return Size(None, None, None, reason or "its experts are not all alike")
    return Size(sum(elements), sum(held), None, reason)


def _size(experts: nn.Module, num_experts: int, recurse: bool) -> Size:
    if is_list(experts):
        return _listed(experts)
    if isinstance(experts, QuantizedExperts):
        elements = experts.activation.matrices * experts.hidden_size * experts.intermediate_size
        return Size(elements, _share(experts.buffers(), num_experts))
    return _stacked(experts, num_experts, recurse)


def is_list(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList | nn.ModuleDict)


def expert_slots(experts: nn.Module) -> list[nn.Module | None]:
    """The experts in a list by slot: one module may be in several, None is on another machine.

    A dictionary may hold other modules beside them (a dropout).
    """
    members = list(experts._modules.values())
    if isinstance(experts, nn.ModuleDict):
        members = [m for m in members if m is not None and matrix_elements(m)]
    return members


def _listed(experts: nn.Module) -> Size:
    slots = expert_slots(experts)
    here = [m for m in slots if m is not None]
    if reason := next(filter(None, map(unknown_reason, here)), ""):
        return Size(None, None, None, reason)
    each = [0 if m is None else matrix_elements(m) for m in slots]
    held = {parameter_bytes(m) for m in here}
    known = held.pop() if len(held) == 1 and len(here) == len(slots) else None
    reason = "" if known is not None else "its experts differ in bytes"
    if len(here) < len(slots):
        reason = f"{len(slots) - len(here)} of its {len(slots)} experts are not on this machine"
    alike = {matrix_elements(m) for m in here}
    if len(alike) == 1:
        return Size(alike.pop(), known, None, reason)
    return Size(None, known, each, reason)


def _stacked(experts: nn.Module, num_experts: int, recurse: bool) -> Size:
    core = unwrapped(experts)
    if getattr(core, "_is_expert_parallel", False):
        return Size(None, None, None, "its experts are divided among machines")
    around = set(_adapted_stacks(experts)) - set(_merging(experts))
    if reason := next(filter(None, map(_adapter_reason, around)), ""):
        return Size(None, None, None, reason)
    if recurse and (reason := unknown_reason(core)):
        return Size(None, _share(core.parameters(), num_experts), None, reason)
    elements = size = 0
    for name, p in core.named_parameters(recurse=recurse):
        rows = p.shape[0] if p.dim() else 0
        matrix = p.dim() >= 2 and "bias" not in name
        if (p.dim() >= 3 and rows != num_experts) or (matrix and rows % num_experts):
            reason = f"{name} {tuple(p.shape)} is not one part for each of {num_experts} experts"
            return Size(None, None, None, reason)
        if rows % num_experts == 0 and rows:
            size += tensor_bytes(p) // num_experts
            # (E, I) are E vectors; (E * I, H) are E matrices in a row
            if matrix and not (p.dim() == 2 and rows == num_experts):
                elements += p.numel() // num_experts
    size += sum(_factor_bytes(part) for part in _merging(experts)) // num_experts
    return Size(elements, size)


def _share(parameters: Iterable[Tensor], num_experts: int) -> int:
    return sum(map(tensor_bytes, parameters)) // num_experts


def _factor_bytes(wrapper: Any) -> int:
    """Of the factors A and B of a wrapper of peft."""
    active = _active(wrapper)
    both = (wrapper.lora_A, wrapper.lora_B)
    return sum(parameter_bytes(d[name]) for d in both for name in active if name in d)


# ---- settings ----


def own_int(module: Any, names: Collection[str]) -> int | None:
    """The first of these attributes that is an int, of the module itself."""
    own = vars(module)
    return next((own[n] for n in names if type(own.get(n)) is int), None)


def own_top_k(module: nn.Module) -> int | None:
    """k, if the module itself or the configuration that it keeps says it."""
    said = [own_int(module, (*_TOP_K, "k")), *_from_config(vars(module).get("config"))]
    return next((k for k in said if k is not None), None)


def top_k_owner(
    router: nn.Module, block: nn.Module, top_k: int | None
) -> tuple[dict[str, Any], str] | None:
    """(attributes, name): where the router or the block itself keeps k; None if it is elsewhere."""
    places = ((vars(m), name) for m in (router, block) for name in (*_TOP_K, "k"))
    return next((p for p in places if top_k is not None and p[0].get(p[1]) == top_k), None)


def find_top_k(
    router: nn.Module, block: nn.Module, model: nn.Module, num_experts: int
) -> int | None:
    """Experts per token as router, block, what lies in them, or the configuration say; or None."""
    said = [own_int(m, (*_TOP_K, "k")) for m in (router, block, *walk(router))]
    said += [own_top_k(m) for m in (*walk(router), block, model)]
    return next((k for k in said if k is not None and 1 <= k <= num_experts), None)


def _from_config(config: Any) -> Iterator[int]:
    if config is None or not hasattr(config, "__dict__"):
        return
    # transformers 4 has top_k = 50, for generation, in every configuration
    names = [n for n in _TOP_K if n != "top_k" or not hasattr(config, "model_type")]
    for name in names:
        value = getattr(config, name, None)
        if type(value) is int:
            yield value
    for name, value in vars(config).items():
        if name.endswith("_config"):
            yield from _from_config(value)


def find_hidden_size(router: nn.Module, num_experts: int, *others: nn.Module) -> int | None:
    """The width of the hidden states, from the router's first matrix or an attribute."""
    for part in walk(router):
        if (size := own_int(part, ("in_features",))) is not None:
            return size
        for parameter in part.parameters(recurse=False):
            if parameter.dim() == 2 and num_experts in parameter.shape:
                rows, columns = parameter.shape
                return columns if rows == num_experts else rows
    names = ("hidden_size", "hidden_dim", "d_model")
    owners = [router, *others, *(vars(m).get("config") for m in others)]
    sizes = [getattr(owner, n, None) for owner in owners if owner is not None for n in names]
    return next((size for size in sizes if type(size) is int), None)
