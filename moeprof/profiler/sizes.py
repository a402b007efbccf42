"""What the parts of an MoE layer hold: matrix elements, bytes, settings.

E experts, k of them a token, H hidden size. A matrix is a parameter with two dimensions or more,
of one expert where experts are stacked. Biases are none: FlopCounterMode counts no addition.
"""

from collections.abc import Collection, Iterator
from typing import Any

from torch import nn

COUNTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts",
          "total_experts", "n_experts")  # fmt: skip
_TOP_K = ("top_k", "topk", "moe_top_k", "moe_topk", "moe_k", "num_experts_per_tok",
          "num_experts_per_token", "experts_per_token", "num_selected_experts",
          "top_k_experts")  # fmt: skip


def walk(module: nn.Module, without: Collection[nn.Module] = ()) -> Iterator[nn.Module]:
    """The module and all in it, each once, but for what lies in `without`."""
    seen = set(without)
    stack = [module]
    while stack:
        part = stack.pop()
        if part not in seen:
            seen.add(part)
            yield part
            stack.extend(reversed(list(part.children())))


def matrix_elements(module: nn.Module, without: Collection[nn.Module] = ()) -> int:
    """How many elements the matrices have that multiply a token in `module`."""
    return sum(_own_elements(part) for part in walk(module, without))


def _own_elements(part: nn.Module) -> int:
    if isinstance(part, nn.Embedding):  # a table: it is looked up
        return 0
    sizes = vars(part).get("in_features"), vars(part).get("out_features")
    if all(isinstance(n, int) for n in sizes) and (part._parameters or part._buffers):
        return sizes[0] * sizes[1]  # a quantised linear's tensors have other shapes
    named = part.named_parameters(recurse=False)
    return sum(p.numel() for name, p in named if p.dim() >= 2 and "bias" not in name)


def parameter_bytes(module: nn.Module, without: Collection[nn.Module] = ()) -> int:
    """Bytes of all parameters in `module`."""
    return sum(_bytes(p) for part in walk(module, without) for p in part.parameters(recurse=False))


def _bytes(parameter) -> int:
    return parameter.numel() * parameter.element_size()


def expert_size(
    collections: list[nn.Module], num_experts: int, *, block: nn.Module
) -> tuple[int, int] | None:
    """(matrix elements, bytes) of one expert, or None if the experts are not all alike.

    Each of the `collections` is a list or a dictionary of E modules, or a module with stacked
    parameters (E, ., .), of which the block itself may be one; an expert owns its part of each.
    """
    sizes = [
        _listed(c) if is_list(c) else _stacked(c, num_experts, recurse=c is not block)
        for c in collections
    ]
    if not sizes or None in sizes:
        return None
    return sum(elements for elements, _ in sizes), sum(size for _, size in sizes)


def is_list(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList | nn.ModuleDict)


def listed_experts(experts: nn.Module) -> list[nn.Module]:
    """The experts in a list; a dictionary may hold other modules beside them (a dropout)."""
    members = list(experts.children())
    if isinstance(experts, nn.ModuleDict):
        members = [m for m in members if matrix_elements(m)]
    return members


def _listed(experts: nn.Module) -> tuple[int, int] | None:
    first, *others = listed_experts(experts)
    shapes = _shapes(first)
    if any(_shapes(other) != shapes for other in others):
        return None
    return matrix_elements(first), parameter_bytes(first)


def _shapes(module: nn.Module) -> list:
    return [p.shape for p in module.parameters()]


def _stacked(experts: nn.Module, num_experts: int, recurse: bool) -> tuple[int, int] | None:
    elements = size = 0
    for name, p in experts.named_parameters(recurse=recurse):
        rows = p.shape[0] if p.dim() else 0
        if p.dim() >= 3 and rows != num_experts:
            return None
        if rows % num_experts == 0 and rows:
            size += _bytes(p) // num_experts
            # (E, I) are E vectors; (E * I, H) are E matrices in a row
            vectors = p.dim() < 2 or (p.dim() == 2 and rows == num_experts)
            if not vectors and "bias" not in name:
                elements += p.numel() // num_experts
    return elements, size


# ---- settings ----


def own_int(module: Any, names: Collection[str]) -> int | None:
    """The first of these attributes that is an int, of the module itself."""
    own = vars(module)
    return next((own[n] for n in names if type(own.get(n)) is int), None)


def own_top_k(module: nn.Module) -> int | None:
    """k, if the module itself or the configuration that it keeps says it."""
    said = [own_int(module, (*_TOP_K, "k")), *_from_config(vars(module).get("config"))]
    return next((k for k in said if k is not None), None)


def top_k_owner(router: nn.Module, block: nn.Module, top_k: int | None):
    """(attributes, name): where the router or the block itself keeps k; None if it is elsewhere."""
    places = ((vars(m), name) for m in (router, block) for name in (*_TOP_K, "k"))
    return next((p for p in places if top_k is not None and p[0].get(p[1]) == top_k), None)


def find_top_k(router: nn.Module, block: nn.Module, model: nn.Module, num_experts: int):
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
