"""quantize(): the experts of a model, and its linear layers, to 8 or 4 bits, in place."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..backends.tables import tensor_obstacle
from ..checks import Tokenizer, check_model, check_type
from ..models.blocks import Block, changed_blocks, find_blocks
from ..models.find import find_layers
from ..models.guards import explained, full_name, hooks_of
from ..models.quantized import QuantizedExperts, QuantizedLinear
from ..models.sizes import parameter_bytes
from ..patching.state import is_patched
from ..show.console import make_console
from ..show.console import progress as progress_bar
from .convert import FORMATS, encoded, quantized
from .errors import Calls, distance, outputs, recorded_calls
from .report import QuantizedPart, QuantizeReport
from .save import saves_quantized

LINEAR_BITS = 8


def quantize(
    model: nn.Module,
    bits: int = 8,
    *,
    linears: bool = False,
    skip: str | Collection[str] = (),
    exact: bool = False,
    texts: Sequence[str | Tensor] | None = None,
    tokenizer: Tokenizer | None = None,
    progress: bool | None = None,
) -> QuantizeReport:
    """Keep the experts of a model in 8 or 4 bits, in place; they run in C from then on.

    One layer follows the other, and the memory of each is freed before the next is made: at its
    peak this takes the model and one layer more. The model is then used as before: by itself, or
    with `moeprof.patch`, which also takes another router.

    The weights are rounded, and the way back is lost: `moeprof.unpatch` undoes patches, not
    this. Load the model again to have its own weights.

    Parameters
    ----------
    model : torch.nn.Module
        Whose MoE blocks `moeprof.patch` can run, on the CPU; not patched.
    bits : {8, 4}
        Of a weight; with the scale of each group of 32 it takes 8.5 or 4.5.
    linears : bool
        Also keep the plain ``nn.Linear`` layers outside of the MoE blocks in 8 bits, whatever
        `bits` is: the attention's projections, lm_head. A weight that is tied to another module,
        such as the embedding, is left.
    skip : names
        What is left in its dtype: names of MoE blocks and linear layers, "model.layers.0.mlp",
        or patterns of them, "model.layers.0.*".
    exact : bool
        Multiply with hidden states in float32. By default they are rounded to 8 bits too, each
        group of 32 with a scale of its own, which is faster.
    texts : list of str or of token ids (1, n), optional
        To measure what rounding changes: up to 256 of their tokens run through the model before,
        and every layer is then compared on what it was given. Strings need a `tokenizer`.
    tokenizer : callable, optional
    progress : bool, optional
        False shows no bar. The bar is for a terminal or a notebook, and shows the time that is
        left.

    Returns
    -------
    QuantizeReport
        A row for each layer: its format, its bytes before and after, and, of `texts`, the
        distance between its outputs before and after, by the norm of those before.

    Raises
    ------
    ValueError
        For a model without MoE blocks; one that is patched; a block that can't run in C, with
        the cause; one that is quantised otherwise already; a name in `skip` that is no layer's:
        then the model is as it was. For a weight
        that is NaN or infinite, with its layer, expert and matrix: then the layers before it are
        quantised. This, or Ctrl-C, leaves each layer whole, as it was or quantised, so that the
        model runs; a second call goes on.
    TypeError
        For what is no model, or texts without a tokenizer.

    Examples
    --------
    >>> moeprof.quantize(model, bits=8)                         # doctest: +SKIP
    """
    check_model("quantize", model)
    if bits not in FORMATS or isinstance(bits, bool):
        raise ValueError(f"quantize: bits: expected one of {[*FORMATS]}, got {bits!r}")
    _check_unpatched(model)
    patterns = _patterns(skip)
    plan = _planned(model, FORMATS[bits], linears=linears, exact=exact, skip=patterns)
    calls: Calls = {}
    if texts is not None:
        calls = recorded_calls(model, [part.measured for part in plan.parts], texts, tokenizer)
    made: dict[Any, QuantizedExperts | QuantizedLinear] = {}
    done: list[QuantizedPart] = []
    try:
        shown = progress is not False
        with progress_bar(
            make_console(), len(plan.parts), "quantize", "modules", shown=shown
        ) as bar:
            while plan.parts:
                done.append(_convert(model, plan.parts.pop(0), exact, calls, made))
                bar.step()
    finally:  # also of a model that is quantised in part
        saves_quantized(model)
    return QuantizeReport(sorted([*done, *plan.left], key=lambda row: plan.order[row.layer]))


@contextmanager
def experts_in(model: nn.Module, bits: int) -> Iterator[None]:
    """The model with its experts in 8 or 4 bits for as long as the `with` lasts.

    Its own experts are kept meanwhile, and stand where they stood afterwards, whatever ends it.
    Raises ValueError as `quantize`; the model is then as it was.
    """
    _check_unpatched(model)
    plan = _planned(model, FORMATS[bits], linears=False, exact=False, skip=[])
    if plan.left:
        raise ValueError(f"quantize: {plan.left[0].layer} is quantised already")
    made: dict[Any, QuantizedExperts | QuantizedLinear] = {}
    kept: list[tuple[dict[str, Any], str, nn.Module]] = []
    try:
        for part in plan.parts:
            if part.key not in made:
                made[part.key] = _made(part, exact=False)
            for children, name in _places(model, part.module):
                kept.append((children, name, part.module))
                children[name] = made[part.key]
        yield
    finally:
        for children, name, own in kept:
            children[name] = own


class _Part(NamedTuple):
    """What is to be quantised: the experts of a block, or a linear layer."""

    name: str
    module: nn.Module  # which is replaced
    measured: nn.Module  # whose outputs are compared
    make: Callable[[], QuantizedExperts | QuantizedLinear]
    key: Any  # of what it is made of: what is shared is made once
    format: str


class _Plan(NamedTuple):
    parts: list[_Part]
    left: list[QuantizedPart]
    order: dict[str, int]  # of the names in the report


def _patterns(skip: str | Collection[str]) -> list[str]:
    patterns = [skip] if isinstance(skip, str) else [*skip]
    for pattern in patterns:
        check_type("quantize: skip", pattern, str, "names or patterns")
    return patterns


def _check_unpatched(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if is_patched(module):
            raise ValueError(
                f"quantize: {name or 'the model'} is patched: moeprof.unpatch(model) first, and "
                "patch the quantised model"
            )
        if any(
            getattr(h, "__module__", "").startswith("moeprof.profiler") for h in hooks_of(module)
        ):
            raise ValueError(
                f"quantize: a MoEProfiler looks at {name or 'the model'}: stop it first, and make "
                "a new one for the quantised model"
            )


# ---- what there is to do: nothing is changed yet ----


def _planned(
    model: nn.Module, format: str, *, linears: bool, exact: bool, skip: list[str]
) -> _Plan:
    blocks = find_blocks(model)
    for name, reason in changed_blocks(model).items():
        raise ValueError(f"quantize: {name}: {reason}")
    around = _linears_of(model, blocks) if linears else {}
    names = [*(block.title for block in blocks), *around]
    unknown = [p for p in skip if not any(fnmatchcase(name, p) for name in names)]
    if unknown:
        raise ValueError(f"quantize: skip: {unknown[0]!r} fits none of {', '.join(names)}")
    parts: list[_Part] = []
    left: list[QuantizedPart] = []
    for block in blocks:
        skipped = any(fnmatchcase(block.title, p) for p in skip)
        found = "skip" if skipped else _experts_part(block, format, exact)
        _add(found, block.title, block.family.experts_of(block.module), parts, left)
    tied, adapted = _tied(model), _adapted(model)
    for name, module in around.items():
        skipped = any(fnmatchcase(name, p) for p in skip)
        found = "skip" if skipped else _linear_part(name, module, tied, adapted, exact)
        _add(found, name, module, parts, left)
    places = {name: place for place, (name, _) in enumerate(model.named_modules())}
    return _Plan(parts, left, {name: places.get(name, 0) for name in names})


def _add(
    found: _Part | str,
    name: str,
    module: nn.Module,
    parts: list[_Part],
    left: list[QuantizedPart],
) -> None:
    """A part, or why it is left."""
    if isinstance(found, _Part):
        parts.append(found)
        return
    size = parameter_bytes(module)
    left.append(QuantizedPart(name, _format_of(module), size, size, None, f"left: {found}"))


def _format_of(module: nn.Module) -> str:
    """What a module keeps its weights in."""
    if isinstance(module, QuantizedExperts | QuantizedLinear):
        return module.format
    dtypes = dict.fromkeys(str(p.dtype).removeprefix("torch.") for p in module.parameters())
    return ", ".join(dtypes)


def _experts_part(block: Block, format: str, exact: bool) -> _Part | str:
    experts = block.family.experts_of(block.module)
    if isinstance(experts, QuantizedExperts):
        return _already(block.title, experts, format, exact)
    if reason := block.readable("c") or block.family.no_stand_in:
        raise ValueError(f"quantize: {block.title}: can't be quantised: {reason}")
    read = block.family.readable(block.module, "c")[0]
    key = (*map(id, read.matrices), read.activation, read.storage)

    def make() -> QuantizedExperts:
        # Read again: the plan holds no tensor, so that each layer is freed when it is replaced.
        now = block.family.readable(block.module, "c")[0]
        config = getattr(block.family.experts_of(block.module), "config", None)
        return quantized(now, format, config)

    return _Part(block.title, experts, block.module, make, key, format)


def _already(
    name: str, module: QuantizedExperts | QuantizedLinear, format: str, exact: bool
) -> str:
    """Why it is left; ValueError where it is quantised otherwise than it should be."""
    if (module.format, module.exact) == (format, exact):
        return "quantised already"
    raise ValueError(
        f"quantize: {name} is in {module.format} with exact={module.exact} already, and its own "
        f"weights are gone: load the model again to have {format} with exact={exact}, or leave "
        f"it as it is with skip={name!r}"
    )


# ---- linear layers ----


def _linears_of(model: nn.Module, blocks: list[Block]) -> dict[str, nn.Module]:
    """{name: layer} of what is a linear layer, or made from one, outside of the MoE layers."""
    modules = [block.module for block in blocks]
    for site in find_layers(model)[0]:
        modules += [site.block, site.router]
    inside = {part for module in modules if module is not model for part in module.modules()}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | QuantizedLinear) and module not in inside
    }


def _tied(model: nn.Module) -> dict[int, str]:
    """{id of a parameter: the first of several modules that have it}."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    return {number: names[0] for number, names in owners.items() if len(names) > 1}


def _adapted(model: nn.Module) -> dict[str, str]:
    """{name: what it has to do with an adapter of PEFT}."""
    found = {}
    for name, module in model.named_modules():
        if "base_layer" in module._modules:
            for part, _ in module.named_modules(prefix=name):
                is_base = part.removeprefix(f"{name}.").startswith("base_layer")
                found[part] = "an adapter of PEFT is on it" if is_base else "an adapter of PEFT"
    return found


def _linear_part(
    name: str, module: nn.Module, tied: dict[int, str], adapted: dict[str, str], exact: bool
) -> _Part | str:
    if isinstance(module, QuantizedLinear):
        return _already(name, module, FORMATS[LINEAR_BITS], exact)
    if type(module) is not nn.Linear:
        return f"its class is {full_name(module)}"
    if name in adapted:
        return adapted[name]
    if hooks_of(module) or "forward" in vars(module):
        return explained("it has a hook or a forward of its own", module)
    weight, bias = module.weight, module.bias
    if id(weight) in tied:
        return f"its weight is tied to {tied[id(weight)]}"
    tensors = [weight] if bias is None else [weight, bias]
    if weight.device.type != "cpu":
        raise ValueError(f"quantize: {name}: {explained(tensor_obstacle(tensors) or '', module)}")
    if reason := tensor_obstacle(tensors):
        return reason
    format = FORMATS[LINEAR_BITS]

    def make() -> QuantizedLinear:
        data = encoded(weight, format)
        own = None if bias is None else bias.detach().clone()
        return QuantizedLinear(data, own, module.in_features, module.out_features, format)

    return _Part(name, module, module, make, id(module), format)


# ---- one after the other ----


def _convert(
    model: nn.Module,
    part: _Part,
    exact: bool,
    recorded: Calls,
    made: dict[Any, QuantizedExperts | QuantizedLinear],
) -> QuantizedPart:
    """Quantise one part; until it is replaced the model has the old one."""
    name, old = part.name, part.module
    before = parameter_bytes(old)
    is_new = part.key not in made
    if is_new:
        try:
            made[part.key] = _made(part, exact)
        except ValueError as reason:
            raise ValueError(
                f"{reason}. The layers before it are quantised, this and the others are as "
                "they were"
            ) from None
    new = made[part.key]
    calls = recorded.pop(part.measured, [])
    original = outputs(part.measured, calls)
    for children, name_there in _places(model, old):
        children[name_there] = new
    if not is_new:
        return QuantizedPart(name, part.format, 0, 0, None, "shared with a layer above")
    error = distance(original, outputs(new if part.measured is old else part.measured, calls))
    return QuantizedPart(name, part.format, before, parameter_bytes(new), error)


def _places(model: nn.Module, wanted: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """[(children of a module, name)] of wherever a module stands in the model."""
    each = [vars(module)["_modules"] for module in model.modules()]
    return [(own, name) for own in each for name, value in own.items() if value is wanted]


def _made(part: _Part, exact: bool) -> QuantizedExperts | QuantizedLinear:
    try:
        new = part.make()
    except ValueError as reason:
        raise ValueError(f"quantize: {part.name}: {reason}") from None
    new.exact = exact
    return new.train(part.module.training)
