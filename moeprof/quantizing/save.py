"""save_quantized(): a model in 8 or 4 bits as a folder that `moeprof.load` reads."""

import copy
import json
import os
import secrets
import shutil
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..backends.tables import BY_NAME, DTYPES
from ..checks import check_model
from ..files import alone, as_opened, check_folder
from ..models.quantized import GROUP, QuantizedExperts, QuantizedLinear
from ..patching.state import is_patched
from .checkpoint import CHECKSUMS, Checkpoint, checksum

# Not "model": transformers must not take these files for weights that it can read.
STEM = "moeprof"
METHOD = "moeprof"  # what config.json calls the way of quantising
VERSION = 1  # of the layout of the bytes, csrc/quantized.h
SHARD_BYTES = 4 * 10**9  # of a file, at most, unless one tensor is larger


class Description(NamedTuple):
    """What the files say of themselves.

    experts, linears : {name of a module: its format}
    dtype : of all else
    transformers : the version that the names are of
    """

    experts: dict[str, str]
    linears: dict[str, str]
    dtype: str
    transformers: str
    version: int = VERSION
    group: int = GROUP

    @property
    def formats(self) -> set[str]:
        """Of the experts."""
        return set(self.experts.values())


def save_quantized(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write a quantised model to a folder; `moeprof.load(folder)` gives it back bit for bit.

    The folder then holds ``moeprof.safetensors``, or several files of about 4 GB with an index;
    the format stands in their metadata. Beside them are ``config.json`` and
    ``generation_config.json``. Save the tokenizer there too, with its own ``save_pretrained``.
    Transformers' ``from_pretrained`` finds no weights in such a folder and stops.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        From `moeprof.load`, or after `moeprof.quantize`; not patched.
    folder : path
        Is made where it is not there. It may hold other files, but no model.

    Raises
    ------
    ValueError
        For a model that is not quantised, is patched, has adapters of PEFT, or is of another dtype
        than float32, bfloat16 or float16.
    FileExistsError
        Where the folder holds a model.
    OSError
        Where it can't be written. config.json is written last: a folder without one is not
        loaded.

    Examples
    --------
    >>> moeprof.save_quantized(model, "olmoe-q4")              # doctest: +SKIP
    """
    check_model("save_quantized", model)
    description = _described(model)
    folder = Path(folder)
    _check_no_model(folder)
    check_folder(folder)
    existed = folder.is_dir()
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{STEM}.{secrets.token_hex(4)}.part"
    with alone(folder) as locked:
        if locked:
            _remove_parts(folder)
        try:
            _check_no_model(folder)  # another process may have saved one meanwhile
            part.mkdir()
            names = _write(model, description, part)
            _check_no_model(folder)  # or may now, where nothing keeps it out
            _move(names, part, folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
            if not existed:
                with suppress(OSError):
                    folder.rmdir()  # if it is empty


def _remove_parts(folder: Path) -> None:
    """What processes left that were killed: gigabytes under a hidden name."""
    for part in folder.glob(f".{STEM}.*.part"):
        shutil.rmtree(part, ignore_errors=True)


def _write(model: nn.Module, description: Description, part: Path) -> list[str]:
    """The names of the files, config.json last."""
    from safetensors import SafetensorError

    shards = _shards(model)
    checksums = json.dumps({n: checksum(t) for shard in shards for n, t in shard.items()})
    try:
        return [
            *_write_weights(shards, description, checksums, part),
            *_write_configs(model, description, checksums, part),
        ]
    except (SafetensorError, OSError) as error:  # a full disk, which each says in its own words
        said = getattr(error, "strerror", None) or error
        raise OSError(f"save_quantized: {part.parent} can't be written: {said}") from error


def _move(names: list[str], part: Path, folder: Path) -> None:
    """All of the files, or none."""
    moved: list[Path] = []
    try:
        for name in names:
            os.replace(part / name, folder / name)
            moved.append(folder / name)
    except BaseException:
        for file in moved:
            file.unlink()
        raise


def _described(model: Any) -> Description:
    import transformers

    experts: dict[str, str] = {}
    linears: dict[str, str] = {}
    for name, module in model.named_modules():
        if is_patched(module):
            raise ValueError(
                f"save_quantized: {name or 'the model'} is patched: moeprof.unpatch(model) first"
            )
        if type(module).__module__.partition(".")[0] == "peft":
            raise ValueError(
                f"save_quantized: {name or 'the model'} is an adapter of PEFT, which can't be "
                "saved: save what its merge_and_unload() or unload() returns"
            )
        if isinstance(module, QuantizedExperts):
            experts[name] = module.format
        elif isinstance(module, QuantizedLinear):
            linears[name] = module.format
    if not experts:
        raise ValueError(
            "save_quantized: the model is not quantised: moeprof.quantize(model) first, or save "
            "it as it is with model.save_pretrained"
        )
    if model.dtype not in DTYPES:
        dtype = str(model.dtype).removeprefix("torch.")
        raise ValueError(
            f"save_quantized: a model in {dtype} can't be saved: expected {', '.join(BY_NAME)}; "
            "model.to(torch.float32) first"
        )
    return Description(experts, linears, DTYPES[model.dtype], transformers.__version__)


def _check_no_model(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"save_quantized: {folder}: expected a folder, this is a file")
    for pattern in ("config.json", "*.safetensors", "*.bin"):
        for file in folder.glob(pattern):
            raise FileExistsError(
                f"save_quantized: {folder} holds a model already ({file.name}): choose another "
                "folder, or empty it"
            )


def _write_weights(
    shards: list[dict[str, Tensor]], description: Description, checksums: str, part: Path
) -> list[str]:
    """The names of the files, the index behind them."""
    from safetensors.torch import save_file

    metadata = {"format": "pt", METHOD: json.dumps(description._asdict()), CHECKSUMS: checksums}
    weight_map, files = {}, []
    for number, tensors in enumerate(shards, 1):
        several = f"-{number:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        files.append(f"{STEM}{several}.safetensors")
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        with as_opened(part / files[-1]):  # safetensors' own is for its owner alone
            save_file(whole, part / files[-1], metadata)
        weight_map.update(dict.fromkeys(tensors, files[-1]))
    if len(shards) > 1:
        index = {"metadata": metadata, "weight_map": weight_map}
        files.append(f"{STEM}.safetensors.index.json")
        (part / files[-1]).write_text(json.dumps(index, indent=1))
    return files


def _shards(model: nn.Module) -> list[dict[str, Tensor]]:
    """The model's tensors, in files of so many bytes; what is tied is written once."""
    shards: list[dict[str, Tensor]] = [{}]
    size, seen = 0, set()
    for name, tensor in model.state_dict().items():
        place = tensor.data_ptr(), tensor.shape, tensor.stride()
        if tensor.numel() and place in seen:
            continue
        seen.add(place)
        if shards[-1] and size + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def _write_configs(model: Any, description: Description, checksums: str, part: Path) -> list[str]:
    """The names of the files, config.json last."""
    names = []
    if model.can_generate() and getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(part)
        names.append("generation_config.json")
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.quantization_config = {
        "quant_method": METHOD,
        "version": description.version,
        "formats": sorted(description.formats),
        "weights": fingerprint(checksums),
    }
    config.save_pretrained(part)
    return [*names, "config.json"]


def fingerprint(checksums: str) -> str:
    """What config.json says of the weights that it was saved with."""
    return f"{zlib.crc32(checksums.encode()):08x}"


def read_description(name: str, checkpoint: Checkpoint) -> Description:
    """What the files of `save_quantized` say of themselves.

    Raises ValueError for others, and for a newer layout.
    """
    try:
        said = json.loads(checkpoint.metadata[METHOD])
        version = int(said["version"])
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(
            f"model {name}: its {STEM}*.safetensors are not from moeprof.save_quantized: their "
            "metadata says nothing of a format"
        ) from error
    if version > VERSION:
        raise ValueError(
            f"model {name}: its weights are in version {version} of moeprof's layout, and this "
            f"moeprof reads up to {VERSION}: update moeprof"
        )
    return Description(**said)


def saves_quantized(model: Any) -> None:
    """Let `model.save_pretrained` write what `moeprof.load` reads: transformers' own would write
    bytes as if they were its weights."""
    if not any(isinstance(m, QuantizedExperts | QuantizedLinear) for m in model.modules()):
        return
    for module in model.modules():
        if hasattr(module, "save_pretrained") and type(module.save_pretrained) is not _Saver:
            module.save_pretrained = _Saver(module)


class _Saver:
    """A model's `save_pretrained`, as `moeprof.save_quantized`. It is copied and pickled with the
    model, as a bound function of another module would not be."""

    def __init__(self, model: Any):
        self.model = model

    def __call__(self, save_directory: str | os.PathLike[str], **options: Any) -> None:
        if options:
            raise TypeError(
                f"save_pretrained: of a quantised model it takes a folder only, got "
                f"{min(options)}: it is moeprof.save_quantized(model, folder)"
            )
        save_quantized(self.model, save_directory)
