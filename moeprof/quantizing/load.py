"""load(): a model from a checkpoint, its experts in 8 or 4 bits as soon as they are read."""

import copy
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.pages import advised
from ..backends.tables import BY_NAME, DTYPES, LayerMatrices, Storage
from ..models.blocks import Block, find_blocks
from ..models.load import check_loaded, check_model, reason_of
from ..models.quantized import QuantizedExperts, QuantizedLinear, encoded_bytes, expected_shapes
from ..show.console import make_console
from ..show.console import progress as progress_bar
from .checkpoint import CHECKSUMS, Checkpoint, has_weights
from .convert import FORMATS, biases_of, decoded, encoded, matrices_of
from .quantize import quantize
from .save import (
    METHOD,
    STEM,
    Description,
    fingerprint,
    read_description,
    saves_quantized,
)
from .sources import Names, Source, experts_name


def load(
    path_or_hub_id: str | os.PathLike[str],
    bits: int | None = None,
    *,
    dtype: "str | torch.dtype | None" = None,
    linears: bool = False,
    exact: bool = False,
    progress: bool | None = None,
) -> Any:
    """Load a model whose experts are kept in 8 or 4 bits.

    The result is what ``from_pretrained`` and `moeprof.quantize` would make, without their
    memory: each expert is quantised as it is read, so that the model takes no more than its
    quantised size and some hundred megabytes.

    Parameters
    ----------
    path_or_hub_id : str or path
        A folder with ``*.safetensors`` and ``config.json``, or the name of a model on the
        Hugging Face hub, which is downloaded as transformers does. The weights are in float32,
        bfloat16 or float16, or the experts in MXFP4, as those of gpt_oss; or a folder that
        `moeprof.save_quantized` wrote.
    bits : {8, 4}, optional
        Of a weight of the experts. What `save_quantized` wrote has its own, and needs none.
    dtype : str or torch.dtype, optional
        Of all else, and of hidden states; "bfloat16" where nothing is said. What
        `save_quantized` wrote keeps its own.
    linears : bool
        Keep the linear layers around the experts in 8 bits too, as `moeprof.quantize` does.
    exact : bool
        Multiply with hidden states in float32, as `moeprof.quantize` does.
    progress : bool, optional
        False shows no bar. The bar is for a terminal or a notebook.

    Returns
    -------
    model : transformers.PreTrainedModel
        In eval mode, on the CPU. Its tokenizer is loaded apart, by transformers.

    Raises
    ------
    FileNotFoundError
        Without the folder, the model on the hub, its config or its weights.
    ValueError
        In one line: bits that are missing or contradict the files; a damaged file; weights that
        are missing, or that have no place in the model; a checkpoint in another quantised
        format, or with an adapter of PEFT beside it; a model that has no MoE blocks, or whose
        experts can't be quantised.

    Examples
    --------
    >>> model = moeprof.load("allenai/OLMoE-1B-7B-0924", bits=4)   # doctest: +SKIP
    """
    name = os.fspath(path_or_hub_id)
    if bits is not None and (bits not in FORMATS or isinstance(bits, bool)):
        raise ValueError(f"load: bits: expected one of {[*FORMATS]}, got {bits!r}")
    check_model(name, tokenizer=False)
    folder = _folder(name)
    _check_no_adapter(name, folder)
    try:
        with _quiet(), torch.no_grad():
            if has_weights(folder, STEM):
                model = _saved(name, folder, bits, _dtype(dtype), progress)
            else:
                model = _quantized(name, folder, bits, _dtype(dtype or "bfloat16"), progress)
    except (ValueError, FileNotFoundError):
        raise
    except Exception as error:  # transformers and damaged files raise many classes
        raise ValueError(f"model {name} can't be loaded ({reason_of(error)})") from error
    if linears:
        experts = next(m for m in model.modules() if isinstance(m, QuantizedExperts))
        kept: Any = next(bits for bits, format in FORMATS.items() if format == experts.format)
        quantize(model, kept, linears=True, progress=False)  # its experts are quantised already
    for module in model.modules():
        if isinstance(module, QuantizedExperts | QuantizedLinear):
            module.exact = exact
    saves_quantized(model)
    model.eval()
    return model


def is_saved(name: str) -> bool:
    """Is this a folder that `moeprof.save_quantized` wrote?"""
    return has_weights(Path(name), STEM)


def _folder(name: str) -> Path:
    """Where the files are; those of a model on the hub are downloaded first."""
    if (folder := Path(name)).is_dir():
        return folder
    from huggingface_hub import snapshot_download

    folder = Path(
        snapshot_download(
            name,
            allow_patterns=["*.json", "*.safetensors"],
            ignore_patterns=["*/*"],  # folders inside hold the same weights for other programs
        )
    )
    check_model(str(folder), tokenizer=False)
    return folder


def _check_no_adapter(name: str, folder: Path) -> None:
    """ValueError for a folder with an adapter of PEFT, which transformers' from_pretrained adds to
    the model."""
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"model {name}: it has an adapter of PEFT (adapter_config.json), which can't be read "
            "in 8 or 4 bits: merge it first, peft.AutoPeftModelForCausalLM.from_pretrained"
            "(...).merge_and_unload().save_pretrained(another folder), and load that"
        )


def _dtype(dtype: "str | torch.dtype | None") -> torch.dtype | None:
    found = BY_NAME.get(dtype) if isinstance(dtype, str) else dtype
    if (dtype is not None and found is None) or found not in (None, *DTYPES):
        raise ValueError(f"load: dtype: expected one of {', '.join(BY_NAME)}, got {dtype!r}")
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Transformers' bars and warnings: `check_loaded` says what matters of them."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="transformers")
            yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


# ---- from a checkpoint of floats ----


def _quantized(
    name: str, folder: Path, bits: int | None, dtype: torch.dtype | None, progress: bool | None
) -> Any:
    config, said = _config(folder)
    method = _method(said)
    if method == METHOD:
        raise FileNotFoundError(
            f"model {name}: moeprof.save_quantized wrote its config.json, and its "
            f"{STEM}.safetensors, or the .index.json of several, is missing: copy the whole folder "
            "again"
        )
    if method not in ("", "mxfp4"):
        raise ValueError(
            f"model {name}: its weights are in {method}; moeprof.load reads float32, bfloat16, "
            "float16, and MXFP4 for experts"
        )
    if bits is None:
        raise ValueError(
            f"model {name}: bits: expected 8 or 4, for its weights are not quantised; "
            "transformers' from_pretrained loads it as it is"
        )
    if not has_weights(folder):
        raise FileNotFoundError(
            f"model {name}: no model.safetensors, nor model.safetensors.index.json of several "
            "(other files can't be read)"
        )
    checkpoint = Checkpoint(folder)
    bare = _on_meta(config, dtype)
    sources, rest = _sources(name, bare, checkpoint)
    model = _loaded(name, bare, [s.name for s in sources], config, rest, folder)
    format = FORMATS[bits]
    errors: list[float] = []
    for source in _steps(sources, progress):
        _put(model, source.name, _experts(name, source, format, errors))
    if errors:
        warnings.warn(
            f"model {name}: its experts are in MXFP4; in {format} their weights lie "
            f"{100 * max(errors):.2g} % away from that (relative, root mean square)",
            stacklevel=3,
        )
    return model


def _config(folder: Path) -> tuple[Any, Any]:
    """(the config without a word on quantisation, what it said of that or None)."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    return config, vars(config).pop("quantization_config", None)


def _method(said: Any) -> str:
    """The way of quantising that a config names, or ""."""
    if said is None:
        return ""
    method = said.get("quant_method") if isinstance(said, dict) else said.quant_method
    return str(getattr(method, "value", method))


def _on_meta(config: Any, dtype: torch.dtype | None) -> Any:
    """The model without memory for its weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)


def _sources(
    name: str, bare: Any, checkpoint: Checkpoint
) -> tuple[list[Source], dict[str, Tensor]]:
    """(where the experts of each block are, the other tensors by their names in the files)."""
    names = Names(bare)
    blocks = find_blocks(bare)
    for block in blocks:
        if reason := block.family.no_stand_in:
            raise ValueError(f"model {name}: {block.title}: can't be quantised: {reason}")
    sources = [Source(block, checkpoint) for block in blocks]
    rest: dict[str, Tensor] = {}
    for key in checkpoint.names:
        target = names(key)
        if any(source.take(key, target) for source in sources):
            continue
        # What has no place is not read: transformers only looks at its name.
        known = target.name in names.known
        rest[key] = checkpoint.tensor(key) if known else torch.empty(0)
    for source in sources:
        try:
            source.prepare()
        except ValueError as error:
            raise ValueError(f"model {name}: {error}") from None
    return sources, rest


def _loaded(
    name: str,
    bare: Any,
    without: list[str],
    config: Any,
    tensors: dict[str, Tensor],
    folder: Path,
) -> Any:
    """The model as transformers loads it from these tensors, with nothing in the modules of the
    names `without`."""
    from transformers import GenerationConfig

    kind = type(bare)

    def start(self: Any, *args: Any, **kwargs: Any) -> None:
        kind.__init__(self, *args, **kwargs)
        for module in without:
            _put(self, module, nn.Module())

    # What its class does when a model is made is all that differs, and only until it is loaded.
    lacking: Any = type(kind.__name__, (kind,), {"__init__": start, "__module__": kind.__module__})
    model, loading = lacking.from_pretrained(
        None,
        config=config,
        state_dict=tensors,
        dtype=bare.dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # `check_loaded` says which, and stops
    )
    model.__class__ = kind
    check_loaded(name, model, loading)
    if unexpected := sorted(loading["unexpected_keys"]):
        raise ValueError(
            f"model {name}: {len(unexpected)} of the checkpoint's tensors have no place in the "
            f"model, {unexpected[0]} among them"
        )
    model.config.name_or_path = model.name_or_path = str(name)
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    model.get_submodule(parent)._modules[child] = module


def _steps(sources: list[Any], progress: bool | None) -> Iterator[Any]:
    """One after the other, with a bar."""
    shown = progress is not False
    with progress_bar(make_console(), len(sources), "load", "modules", shown=shown) as bar:
        for source in sources:
            yield source
            bar.step()


def _experts(name: str, source: Source, format: str, errors: list[float]) -> QuantizedExperts:
    """A layer's experts, one after the other: none but this one lies in memory as floats."""
    into, out = torch.empty(0), torch.empty(0)
    biases: list[list[Tensor]] = []
    for number in range(source.num_experts):
        try:
            read = source.read(number)
            *first, down = next(matrices_of(read))
            made = [torch.stack([encoded(m, format) for m in first]), encoded(down, format)[None]]
        except ValueError as error:
            raise ValueError(f"model {name}: {source.name}, expert {number}: {error}") from None
        if number == 0:
            into, out = (advised((source.num_experts, *m.shape)) for m in made)
        into[number], out[number] = made
        biases.append(biases_of(read))
        if number == 0 and source.is_mxfp4:
            errors.append(_error(down, made[1][0], format))
    storage = Storage("rows", format, DTYPES[read.dtype], *_sizes(read))
    joined = [torch.cat(parts) for parts in zip(*biases, strict=True)]
    return QuantizedExperts([into, out, *joined], read.activation, storage, source.config)


def _sizes(read: LayerMatrices) -> tuple[int, int]:
    """(H, I)."""
    (*_, down) = next(matrices_of(read))
    return down.shape[0], down.shape[1]


def _error(matrix: Tensor, data: Tensor, format: str) -> float:
    """How far what is kept of a matrix lies from it, by its norm."""
    rows, columns = matrix.shape
    kept = decoded(data, rows, columns, format)
    return float((kept - matrix.float()).norm() / matrix.float().norm())


# ---- what save_quantized wrote ----


def _saved(
    name: str, folder: Path, bits: int | None, dtype: torch.dtype | None, progress: bool | None
) -> Any:
    checkpoint = Checkpoint(folder, STEM)
    said = read_description(name, checkpoint)
    if bits is not None and said.formats != {FORMATS[bits]}:
        raise ValueError(
            f"model {name}: bits={bits} contradicts its files, which are in "
            f"{' and '.join(sorted(said.formats))}: give no bits, or load the original"
        )
    config = _own_config(name, folder, checkpoint)
    bare = _on_meta(config, dtype or BY_NAME[said.dtype])
    blocks = {experts_name(block): block for block in find_blocks(bare)}
    if foreign := said.experts.keys() - blocks.keys():
        raise ValueError(
            f"model {name}: {min(foreign)} is quantised in its files, and no MoE block of the "
            f"model with transformers' current version; it was saved with {said.transformers}"
        )
    linears = {module: bare.get_submodule(module) for module in said.linears}
    without = [*said.experts, *linears]
    inside = tuple(f"{module}." for module in without)
    rest = {k: checkpoint.tensor(k) for k in checkpoint.names if not k.startswith(inside)}
    model = _loaded(name, bare, without, config, rest, folder)
    for module in _steps([*said.experts], progress):
        _put(model, module, _read_back(name, module, blocks[module], said, checkpoint))
    for module, linear in linears.items():
        _put(model, module, _linear_back(name, module, linear, said, checkpoint))
    return model


def _own_config(name: str, folder: Path, checkpoint: Checkpoint) -> Any:
    """The config, if it was saved with these weights; older ones don't say."""
    config, said = _config(folder)
    weights = said.get("weights") if isinstance(said, dict) else None
    checksums = checkpoint.metadata.get(CHECKSUMS)
    if weights is not None and weights != fingerprint(str(checksums)):
        raise ValueError(
            f"model {name}: its config.json was saved with other weights than its "
            f"{STEM}*.safetensors: copy the whole folder again"
        )
    return config


def _read_back(
    name: str, module: str, block: Block, said: Description, checkpoint: Checkpoint
) -> QuantizedExperts:
    """The experts of a layer as they were saved."""
    experts = block.family.experts_of(block.module)
    num_experts = block.num_experts
    read, reason = block.family.read_experts(experts)
    if reason:
        raise ValueError(f"model {name}: {module}: {reason}")
    storage = Storage("rows", said.experts[module], DTYPES[read.dtype], *_sizes(read))
    tensors = []
    shapes = expected_shapes(num_experts, read.activation, storage)
    for own in [*shapes][: 2 + len(biases_of(read))]:
        dtype = read.dtype if own.endswith("_bias") else torch.uint8
        tensors.append(_tensor_back(name, f"{module}.{own}", shapes[own], dtype, checkpoint))
    return QuantizedExperts(tensors, read.activation, storage, getattr(experts, "config", None))


def _tensor_back(
    name: str, key: str, shape: tuple[int, ...], dtype: torch.dtype, checkpoint: Checkpoint
) -> Tensor:
    """A tensor that has to be of this shape. Bytes have to be bytes, as C reads them; a bias is
    cast."""
    if key not in checkpoint:
        raise ValueError(f"model {name}: its files lack {key}")
    tensor = checkpoint.tensor(key)
    if tensor.shape != shape or (tensor.dtype == torch.uint8) != (dtype == torch.uint8):
        raise ValueError(
            f"model {name}: {key} is {tensor.dtype} {tuple(tensor.shape)} in its files, expected "
            f"{dtype} {shape}"
        )
    return tensor.to(dtype)


def _linear_back(
    name: str, module: str, linear: Any, said: Description, checkpoint: Checkpoint
) -> QuantizedLinear:
    """A linear layer as it was saved; linear: that of the model as it was made."""
    if not isinstance(linear, nn.Linear):
        raise ValueError(f"model {name}: {module} is quantised in its files, and no linear layer")
    sizes, format = (linear.in_features, linear.out_features), said.linears[module]
    shape: tuple[int, ...] = (encoded_bytes(linear.out_features, linear.in_features, format),)
    weight = _tensor_back(name, f"{module}.weight", shape, torch.uint8, checkpoint)
    bias = None
    if linear.bias is not None:
        shape = tuple(linear.bias.shape)
        bias = _tensor_back(name, f"{module}.bias", shape, linear.bias.dtype, checkpoint)
    return QuantizedLinear(weight, bias, *sizes, format)
