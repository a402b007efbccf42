"""Which modules of a model are mixture-of-experts layers, and what their parts cost.

By structure first: a module with experts among its children (a list of alike modules, or stacked
parameters (E, ., .)) and beside them a child that gives E columns. By name second: a gate or
router without experts beside it. E experts, k of them a token, H hidden size.
"""

import inspect
import re
from typing import NamedTuple

from torch import nn

from .families import family_of
from .layer import Layer
from .quantized import QuantizedExperts
from .sizes import (
    COUNTS,
    Size,
    expert_size,
    expert_slots,
    find_hidden_size,
    find_top_k,
    idle,
    is_list,
    matrix_elements,
    merge_flops,
    own_int,
    own_top_k,
    parameter_bytes,
    unknown_reason,
    unwrapped,
    walk,
)


class Unread(NamedTuple):
    """What looks like an MoE layer and can't be counted."""

    name: str  # of the block
    reason: str


class Site(NamedTuple):
    layer: Layer
    router: nn.Module
    block: nn.Module
    experts: nn.Module | None  # a list of modules, or the module that holds stacked parameters
    chooses: str  # whose call tells the selected experts: the "router"'s or the "experts"'


class _Parts(NamedTuple):
    """The modules of a layer, as the structure shows them."""

    router: nn.Module
    name: str  # the router's
    block: nn.Module
    collections: list[nn.Module]  # several where an expert's matrices lie in several modules
    num_experts: int


def find_sites(model: nn.Module) -> list[Site]:
    """The MoE layers of a model, in its order. Of nested routers the outermost counts.

    Raises
    ------
    ValueError
        "No routers found in ...", with what was looked for and what was found.
    """
    return find_layers(model)[0]


def find_layers(model: nn.Module) -> tuple[list[Site], list[Unread]]:
    """The MoE layers as `find_sites`, and what looks like one and can't be counted.

    Raises
    ------
    ValueError
        As `find_sites`.
    """
    kept = idle(model)
    parts = _by_structure(model, kept)
    parts += _by_name(model, kept | _covered(model, parts))
    unread = _unread(model, kept | _covered(model, parts))
    if not parts:
        raise ValueError(_nothing_found(model, unread))
    order = {module: number for number, module in enumerate(model.modules())}
    parts.sort(key=lambda p: (order[p.block], order[p.router]))
    return [_site(model, p) for p in parts], unread


def _covered(model: nn.Module, parts: list[_Parts]) -> set[nn.Module]:
    """The modules of layers that are found."""
    inside: set[nn.Module] = set()
    for p in parts:
        whole = (p.router, *p.collections) if p.block is model else (p.block,)
        inside.update(m for part in whole for m in part.modules())
    return inside - {model}


def _nothing_found(model: nn.Module, unread: list[Unread]) -> str:
    classes = {type(m).__name__ for m in model.modules()}
    alike = sorted(c for c in classes if re.search("moe|router|expert|gat(e|ing)$", c.lower()))
    return (
        f"No routers found in {type(model).__name__}{dense(alike)}: looked for modules with "
        "experts (a ModuleList of alike modules, or stacked (E, ., .) parameters) and a child that "
        f"gives E columns, and for modules named gate or router; found {len(classes)} classes of "
        f"modules, of a mixture of experts: {', '.join(alike) or 'none'}"
        + "".join(f"; {u.name or 'the model'}: {u.reason}" for u in unread)
    )


def dense(alike: list[str]) -> str:
    """The likely cause, where no class of the model is `alike` those of a mixture of experts."""
    return "" if alike else ", which looks like a dense model, one without experts"


# ---- names ----

_ROUTER = re.compile("gate|router|gating")
# SwiGLU's gates, a shared expert's gate, an attention's or an output's
_NO_ROUTER = re.compile("gate_proj|gate_up|up_gate|shared|attn|attention|out(put)?_gate|norm|bias")
# Without experts beside it the name alone must say so: "per_layer_input_gate" is no router.
_ROUTER_ALONE = re.compile("router|^((moe|mlp|experts?|noisy|top_?k)_?)*gat(e|ing)$")


def _leaf(name: str) -> str:
    return name.rpartition(".")[2].lower()


def _named_router(name: str) -> bool:
    return bool(_ROUTER.search(_leaf(name))) and not _NO_ROUTER.search(_leaf(name))


# ---- by structure ----


def _by_structure(model: nn.Module, idle: set[nn.Module]) -> list[_Parts]:
    found: list[_Parts] = []
    inside = set(idle)  # and the experts and routers that are taken
    for name, module in model.named_modules():
        if module in inside or is_list(module):
            continue
        if parts := _parts(name, module):
            found.append(parts)
            for taken in (parts.router, *parts.collections):
                if taken is not module:  # stacked parameters of the block itself
                    inside.update(taken.modules())
    return found


def _parts(name: str, block: nn.Module) -> _Parts | None:
    """The parts of this block, or None if it is none."""
    for num_experts, collections in _collections(block).items():
        if found := _router_child(block, collections, num_experts):
            router, columns = found
            router_name = f"{name}.{router}".lstrip(".")
            module = block.get_submodule(router)
            return _Parts(module, router_name, block, collections, columns)
    if family := family_of(block):
        gate, experts = family.gate_of(block), family.experts_of(block)
        router_name = f"{name}.{family.family.gate_at}".lstrip(".")
        return _Parts(gate, router_name, block, [experts], family.num_experts(block))
    return None


def _collections(block: nn.Module) -> dict[int, list[nn.Module]]:
    """{E: the children, or the block itself, that hold parts of E experts}."""
    by_size: dict[int, list[nn.Module]] = {}
    for child_name, child in block.named_children():
        if "shared" not in child_name and (found := _collection(child_name, child)):
            by_size.setdefault(found[1], []).append(found[0])
    if size := _stacked_size([p for _, p in block.named_parameters(recurse=False)]):
        by_size.setdefault(size, []).append(block)
    return by_size


def _collection(name: str, module: nn.Module) -> tuple[nn.Module, int] | None:
    """(experts, E) if this child of a block holds the experts; they may lie one level down."""
    if is_list(module):
        members = expert_slots(module)
        classes = {type(m) for m in members if m is not None and matrix_elements(m)}
        if "expert" in name and classes:  # some may be quantised, wrapped, or elsewhere
            return (module, len(members)) if len(members) >= 2 else None
        return (module, len(members)) if len(members) >= 2 and len(classes) == 1 else None
    if size := _packed_size(name, unwrapped(module)):
        return module, size
    lists = [m for m in module.children() if is_list(m)]
    if "expert" in name and len(lists) == 1 and not matrix_elements(module, lists):
        return _collection(name, lists[0])
    return None


def _packed_size(name: str, module: nn.Module) -> int | None:
    """E if all that this module holds is stacked by expert, or None."""
    if any(isinstance(m, nn.modules.conv._ConvNd) for m in module.modules()):
        return None
    if any(_named_router(n) and _is_flat(m) for n, m in module.named_modules()):
        return None  # a whole block
    named = dict(module.named_parameters())
    matrices = [p for n, p in named.items() if p.dim() >= 2 and "bias" not in n]
    size = _stacked_size(matrices)
    if size is None and "expert" in name + type(module).__name__.lower():
        size = own_int(module, COUNTS)  # DBRX: (E * I, H)
    if size is None or size < 2 or not matrices:
        return None
    flat = [p for p in matrices if p.dim() == 2]
    called = "expert" in name + type(module).__name__.lower()
    return None if any(p.shape[0] % size for p in flat) and not called else size


def _is_flat(module: nn.Module) -> bool:
    """Has it matrices, none of which is stacked by expert?"""
    dimensions = {p.dim() for p in module.parameters()}
    return 2 in dimensions and max(dimensions) == 2


def _stacked_size(parameters: list[nn.Parameter]) -> int | None:
    sizes = {p.shape[0] for p in parameters if p.dim() >= 3}
    return max(sizes) if sizes and min(sizes) >= 2 else None


def _router_child(
    block: nn.Module, collections: list[nn.Module], num_experts: int
) -> tuple[str, int] | None:
    """(name, E) of the child that routes to these experts, or None.

    E is more than the experts that are here where the others are on other machines.
    """
    children = [
        (name, child)
        for name, child in block.named_children()
        if child not in collections and not is_list(child) and not _NO_ROUTER.search(name.lower())
    ]
    named = [(name, child) for name, child in children if _named_router(name)]
    giving = [(name, num_experts) for name, child in named if _gives(child, num_experts)]
    if giving or named:  # a router of no parameters (by hash, a user's function) shows nothing
        bare = [(name, num_experts) for name, child in named if not matrix_elements(child)]
        return next(iter(giving + bare + _of_a_part(block, named, collections, num_experts)), None)
    if not any(_is_called_experts(block, c) for c in collections):
        return None  # decoder layers and a head of as many classes look the same
    plain = [name for name, child in children if _gives(child, num_experts)]
    return (plain[0], num_experts) if len(plain) == 1 else None


def _of_a_part(
    block: nn.Module,
    named: list[tuple[str, nn.Module]],
    collections: list[nn.Module],
    num_experts: int,
) -> list[tuple[str, int]]:
    """[(router, E)] where the experts here are an even part of E: expert parallelism."""
    if not any(_is_called_experts(block, c) for c in collections):
        return []
    sizes = [(name, _columns(child, block)) for name, child in named]
    return [
        (name, size)
        for name, size in sizes
        if size
        and size > num_experts
        and not size % num_experts
        and _gives_columns(block.get_submodule(name), size)
    ]


def _gives_columns(router: nn.Module, size: int) -> bool:
    """Is E what a linear gives, not merely one side of some matrix?"""
    return any(
        vars(m).get("out_features") == size or any(vars(m).get(n) == size for n in COUNTS)
        for m in walk(router)
    )


def _is_called_experts(block: nn.Module, collection: nn.Module) -> bool:
    names = [name for name, child in block.named_children() if child is collection]
    return any("expert" in n.lower() for n in (*names, type(collection).__name__))


def _gives(module: nn.Module, num_experts: int) -> bool:
    """Does this module show that it gives a column for each of E experts?"""
    for part in walk(module):
        own = vars(part)
        if own.get("out_features") == num_experts:
            return True
        if any(own.get(name) == num_experts for name in COUNTS):
            return True
        parameters = [p for p in part.parameters(recurse=False) if p.dim() == 2]
        if "out_features" not in own and any(num_experts in p.shape for p in parameters):
            return True
    return False


# ---- by name ----


def _by_name(model: nn.Module, covered: set[nn.Module]) -> list[_Parts]:
    found: list[_Parts] = []
    inside = set(covered)
    for name, module in model.named_modules():
        leaf_fits = _named_router(name) and _ROUTER_ALONE.search(_leaf(name))
        if module in inside or not leaf_fits or re.search("attn|attention", name.lower()):
            continue
        block = model.get_submodule(name.rpartition(".")[0])
        num_experts = _columns(module, block)
        if num_experts and not _is_glu_gate(module, block) and not _experts_beside(block):
            found.append(_Parts(module, name, block, [], num_experts))
            inside.update(module.modules())
    return found


# ---- what looks like a layer and is none that can be read ----

_EXPERTS = re.compile("^(moe_|local_|routed_|sparse_)?experts?$")


def _experts_beside(block: nn.Module) -> list[tuple[str, nn.Module]]:
    """The children that are called experts and hold something."""
    return [
        (name, child)
        for name, child in block.named_children()
        if _EXPERTS.search(name.lower()) and (child._modules or [*child.parameters()])
    ]


def _unread(model: nn.Module, covered: set[nn.Module]) -> list[Unread]:
    found = []
    for name, block in model.named_modules():
        if block in covered or is_list(block) or not (experts := _experts_beside(block)):
            continue
        if any(child in covered for _, child in experts):
            continue
        found.append(Unread(name, _reason(block, *experts[0])))
    return found


def _reason(block: nn.Module, name: str, experts: nn.Module) -> str:
    """Why this block with experts is no layer that can be counted."""
    routers = [(n, m) for n, m in block.named_children() if _named_router(n)]
    if not routers:
        return f"no router was found beside its {name}"
    router, module = routers[0]
    columns = _columns(module, block)
    held = _collection(name, experts)
    if held is None:
        return f"the {name} ({type(experts).__name__}) are of a form that is not known"
    gives = "nothing that shows a number" if columns is None else f"{columns} columns"
    return f"its {router} gives {gives}, and it has {held[1]} {name}"


def _columns(router: nn.Module, block: nn.Module) -> int | None:
    """E of a router without experts: what it or the block says, or the shape of its matrix."""
    for part in (*walk(router), block):
        if size := own_int(part, COUNTS):
            return size
    shapes = [p.shape for p in router.parameters() if p.dim() == 2]
    if not shapes:
        return None
    rows, columns = shapes[-1]
    if isinstance(router, nn.Linear) and rows >= columns:  # a gate of as many channels
        return None
    size = min(rows, columns)
    return size if size >= 2 else None


def _is_glu_gate(module: nn.Module, block: nn.Module) -> bool:
    """Has a linear beside this one the same shape, as gate and up of a SwiGLU have?"""
    if not isinstance(module, nn.Linear):
        return False
    beside = [m for m in block.children() if isinstance(m, nn.Linear) and m is not module]
    return any(m.weight.shape == module.weight.shape for m in beside)


# ---- a site ----

# What the forwards of these take where they run every expert for every token, the outputs (or,
# Llama 4, the inputs) multiplied with scores that are mostly zero. The Qwen3-VL of
# transformers 4 does so in eval mode only; that of transformers 5 takes other arguments
# and runs the selected ones.
_DENSE_EXPERTS = {
    "Llama4TextExperts": ["hidden_states"],
    "Qwen3VLMoeTextExperts": ["hidden_states", "routing_weights", "router_indices"],
}


def _site(model: nn.Module, parts: _Parts) -> Site:
    router, collections, num_experts = parts.router, parts.collections, parts.num_experts
    block_name = parts.name.rpartition(".")[0]
    inner = parts.block
    block = inner
    while block_name and _only_raises(block):  # JetMoE calls parts of its attention experts
        block_name = block_name.rpartition(".")[0]
        block = model.get_submodule(block_name)
    here = dict(_collections(inner))
    if any(c in collections for cs in here.values() for c in cs) and num_experts not in here:
        size = Size(None, None, None, "its experts are divided among machines")
    else:
        size = expert_size(collections, num_experts, block=inner)
    taken = {router, *collections}
    shared = _shared(block_name, block, taken, model)
    elements = sum(matrix_elements(m, taken) for m in shared)
    reasons = [unknown_reason(router), *(unknown_reason(m, taken) for m in shared)]
    layer = Layer(
        name=parts.name,
        block=block_name,
        num_experts=num_experts,
        top_k=find_top_k(router, inner, model, num_experts),
        hidden_size=find_hidden_size(router, num_experts, inner, model),
        router_flops=None if reasons[0] else 2 * matrix_elements(router),
        expert_flops=None if size.elements is None else 2 * size.elements,
        shared_flops=None if any(reasons[1:]) else 2 * elements,
        router_bytes=parameter_bytes(router),
        expert_bytes=size.bytes,
        shared_bytes=sum(parameter_bytes(m, taken) for m in shared),
        dense=any(_is_dense(c) for c in collections),
        slot_flops=None if size.each is None else [2 * n for n in size.each],
        call_flops=merge_flops(collections),
        unknown="; ".join(dict.fromkeys(filter(None, [size.reason, *reasons]))),
    )
    experts = collections[0] if len(collections) == 1 else (inner if collections else None)
    in_list = calls_one_by_one(inner, experts)
    tells = experts is not None and not in_list and _experts_tell(router, experts)
    chooses = "experts" if tells else "router"
    return Site(layer, router, block, experts, chooses)


def calls_one_by_one(block: nn.Module, experts: nn.Module | None) -> bool:
    """Does the block call its experts by their numbers, as a list?"""
    if not isinstance(experts, QuantizedExperts):
        return experts is not None and is_list(experts)
    family = family_of(block)
    return family is not None and not family.has_seam


def _only_raises(module: nn.Module) -> bool:
    code = getattr(type(module).forward, "__code__", None)
    return code is not None and code.co_names == ("NotImplementedError",)


def _shared(
    name: str, block: nn.Module, without: set[nn.Module], model: nn.Module
) -> list[nn.Module]:
    """The modules of what runs for each token in a block, or beside it as shared."""
    named = list(block.named_children())
    in_layer = any(re.search("attn|attention", n.lower()) for n, _ in named)
    if in_layer or "attention" in type(block).__name__.lower():
        # The experts are among the children of a decoder layer: not all there belongs to them.
        modules = [m for n, m in named if "shared" in n.lower()]
    else:  # stacked parameters of the block's own are its experts
        modules = [m for _, m in named] if block in without else [block]
    if name:
        # peft's modules_to_save has the block one or two levels further down
        name = re.sub(r"\.(original_module|modules_to_save\.[^.]+)$", "", name)
        parent, _, own = name.rpartition(".")
        beside = [(n, m) for n, m in model.get_submodule(parent).named_children() if n != own]
        modules += [m for n, m in beside if "shared" in n.lower()]
    return modules


def _taken(module: nn.Module) -> list[str]:
    """The names of what the forward of this module, without adapters around it, takes."""
    return list(inspect.signature(type(unwrapped(module)).forward).parameters)[1:]


def _is_dense(experts: nn.Module) -> bool:
    return _DENSE_EXPERTS.get(type(unwrapped(experts)).__name__) == _taken(experts)


def _experts_tell(router: nn.Module, experts: nn.Module) -> bool:
    """Does the call of the experts tell the choice, of a router that can't have chosen?"""
    if is_list(experts) or any(own_top_k(part) is not None for part in walk(router)):
        return False
    return any(re.search("ind(ex|ices)|idx|selected|top_experts", n) for n in _taken(experts))
