"""Digests of what cells are measured on: a model, a text, a null, the code."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn

from ...files import as_json
from ...models.guards import code_of_others, full_name
from ...null.resolve import resolve_null
from ...version import __version__
from .cells import Subject

if TYPE_CHECKING:
    from torch import Tensor

    from ...null.resolve import AnyNull
    from ...texts.documents import Text
    from ...texts.windows import HeldOut

PACKAGE = Path(__file__).resolve().parents[2]


AnyNulls = Union["AnyNull", os.PathLike[str], str, None]


def subject(model: nn.Module, text: str, null: AnyNulls | Mapping[str, AnyNulls]) -> Subject:
    """The Subject of a model, a text's digest and a null, or several by name (None where no
    p-values are used)."""
    return Subject(model_digest(model), text, null_digest(null), code_version())


_digests: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Within it the model is taken to stay as it is: its weights are read for a digest once."""
    if model in _digests:  # within another
        yield
        return
    _digests[model] = model_digest(model)
    try:
        yield
    finally:
        del _digests[model]


def model_digest(model: nn.Module) -> str:
    """SHA-256 over the config, every weight, in whatever format it is kept, and the modules'
    classes and settings.

    It reads the whole model once: about a second for 2 GB on a CPU of 2021. A ValueError names a
    hook or a forward of the user's own, whose code doesn't tell what it does.
    """
    if model in _digests:
        return _digests[model]
    for name, module in model.named_modules():
        if foreign := code_of_others(module):
            raise ValueError(
                f"store: {name or 'the model'} has {foreign}, and what that does can't be told "
                "from its code, so results can't be kept: remove it, or go without a store"
            )
    config = getattr(model, "config", None)
    described = as_json(config.to_dict()) if config is not None else type(model).__name__
    for name in ("_name_or_path", "transformers_version"):  # where it lay, and who read it
        if isinstance(described, dict):
            described.pop(name, None)
    described = [described, *map(_settings, model.modules())]
    whole = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with ThreadPoolExecutor(max(torch.get_num_threads(), 1)) as pool:
        parts = pool.map(_digest, tensors.values())
        for name, part in zip(tensors, parts, strict=True):
            whole.update(name.encode() + part)
    return whole.hexdigest()


# What a model has beside its settings: where it lay, where its parts are, and what transformers
# notes as it makes and runs it.
_NO_SETTINGS = {*vars(nn.Module()), "name_or_path", "hf_device_map", "warnings_issued"}
_NO_SETTINGS |= {"_is_hf_initialized", "_output_capturing_hooks_installed", "max_seq_len_cached"}


def _settings(module: nn.Module) -> list[str]:
    """A module's class, and what it has that is a number, a word or made of these: its top-k,
    the adapter that is active, and so on."""
    own = sorted((n, v) for n, v in vars(module).items() if n not in _NO_SETTINGS and _is_plain(v))
    return [full_name(module), *(f"{name} {_in_order(value)}" for name, value in own)]


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_plain, (*value, *value.values())))
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str | torch.dtype)


def _in_order(value: Any) -> str:
    """In words, a set in the same order in each process, also one inside of others."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_in_order(k)}: {_in_order(v)}' for k, v in value.items())}}}"
    if isinstance(value, list | tuple | set | frozenset):
        each = map(_in_order, value)
        return f"[{', '.join(sorted(each) if isinstance(value, set | frozenset) else each)}]"
    return repr(value)


def _digest(tensor: Tensor) -> bytes:
    """Of a tensor's dtype, shape and numbers."""
    plain = tensor.detach().cpu().contiguous()
    found = hashlib.sha256(f"{plain.dtype} {tuple(plain.shape)}".encode())
    if plain.numel():
        found.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return found.digest()


def text_digest(
    *texts: HeldOut, prompts: Iterable[Tensor] = (), documents: Iterable[Text] = ()
) -> str:
    """SHA-256 over the token ids that are read, window by window, and whose document they are.

    documents : what is read whole, by text and domain
    """
    whole = hashlib.sha256()
    for text in texts:
        whole.update(json.dumps([d["domain"] for d in text.documents]).encode())
        for window in text.windows:
            whole.update(f"{window.document} {window.num_bytes} {window.first}".encode())
            whole.update(_digest(window.ids))
    for ids in prompts:
        whole.update(_digest(ids))
    for document in documents:
        whole.update(json.dumps([document.domain, document.text]).encode())
    return whole.hexdigest()


def null_digest(null: AnyNulls | Mapping[str, AnyNulls]) -> str:
    """SHA-256 over all that a null is made of, or several are; "none" where there is none."""
    if isinstance(null, Mapping):
        each = {name: null_digest(one) for name, one in sorted(null.items())}
        return hashlib.sha256(json.dumps(each).encode()).hexdigest() if each else "none"
    if null is None:
        return "none"
    null = resolve_null(null)
    whole = hashlib.sha256(type(null).__name__.encode())
    for field in fields(null):
        value = getattr(null, field.name)
        if isinstance(value, np.ndarray):
            whole.update(f"{field.name} {value.dtype} {value.shape}".encode())
            whole.update(np.ascontiguousarray(value).data)
        elif isinstance(value, str | int | float | None) and field.name != "model_name":
            whole.update(f"{field.name} {value!r}".encode())
    return whole.hexdigest()


@cache
def code_version() -> str:
    """Versions of moeprof, torch and transformers, and a digest of moeprof's own files."""
    whole = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*")):
        if path.suffix in (".py", ".so", ".pyd"):
            whole.update(path.relative_to(PACKAGE).as_posix().encode() + path.read_bytes())
    others = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    return f"moeprof {__version__} ({whole.hexdigest()[:12]}), {others}"
