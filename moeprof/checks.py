"""Whether arguments are what they should be: TypeError and ValueError that name the argument."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable
from difflib import get_close_matches
from inspect import signature
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import nn


# The packages of `moeprof[hf]`, which whatever works on models needs.
MODELS = ("torch", "transformers", "safetensors", "rich")


class Tokenizer(Protocol):
    """What is needed of a tokenizer: transformers' have it."""

    def __call__(self, text: str, **options: Any) -> Any: ...

    def decode(self, token_ids: Any, **options: Any) -> str: ...


# Versions of transformers in which routers do other things than before and after.
UNKNOWN = tuple(f"5.{minor}." for minor in range(6))

# Packages of other extras than `moeprof[hf]`.
EXTRAS = {"lm_eval": "harness", "ray": "ray"}

ALL = (*MODELS, "scipy", "statsmodels", "pandas", "matplotlib")


def check_type(name: str, value: object, kinds: type | tuple[type, ...], expected: str) -> None:
    """TypeError unless value is one of `kinds`; expected: those, in words."""
    if not isinstance(value, kinds):
        raise TypeError(f"{name}: expected {expected}, got {described(value)}")


def check_model(who: str, model: object) -> None:
    """TypeError unless `model` is a torch.nn.Module, ImportError with a transformers that moeprof
    doesn't know; who: the function that was called."""
    if sys.modules.get("torch") is None:
        check_installed(f"moeprof.{who}", MODELS)
    from torch import nn

    if isinstance(model, nn.Module):
        _check_transformers(f"moeprof.{who}")
        return
    hint = "; are model and tokenizer swapped?" if hasattr(model, "decode") else ""
    if not isinstance(model, type):
        inside = [n for n, v in getattr(model, "__dict__", {}).items() if isinstance(v, nn.Module)]
        if inside:
            hint = f", which holds one: pass its attribute {inside[0]}"
        elif isinstance(model, tuple | list) and any(isinstance(m, nn.Module) for m in model):
            hint = ", which holds one: pass that alone"
    raise TypeError(f"{who}: model: expected a torch.nn.Module, got {described(model)}{hint}")


def check_takes_ids(who: str, model: nn.Module) -> None:
    """TypeError for a part of a model, whose forward isn't called with token ids."""
    try:
        signature(model.forward).bind(input_ids=None, use_cache=False)
    except TypeError as error:
        raise TypeError(
            f"{who}: model: expected one that is called with input_ids and use_cache, got "
            f"{described(model)}: {error}"
        ) from None


def _check_transformers(who: str) -> None:
    version = getattr(sys.modules.get("transformers"), "__version__", "")
    if version.startswith(UNKNOWN):
        raise ImportError(
            f"{who}: transformers {version} is installed, whose routers record probabilities in "
            "place of logits: expected 4.57, or 5.6 and newer: "
            'pip install "transformers>=5.6,<6"'
        )


def check_tokenizer(who: str, tokenizer: object) -> None:
    """TypeError unless `tokenizer` can be one: it is called with a text, and is no model."""
    from torch import nn

    no_tokenizer = isinstance(tokenizer, (nn.Module, type)) or not callable(tokenizer)
    if no_tokenizer:
        raise TypeError(
            f"{who}: tokenizer: expected a callable that gives input_ids, as transformers' "
            f"tokenizers, got {described(tokenizer)}"
        )


def check_token_ids(model: nn.Module, windows: Iterable[Any]) -> None:
    """ValueError if the model's embedding has no row for one of the token ids.

    windows: tensors or lists of ids. Torch itself would raise an IndexError without a number.
    A model that doesn't say which its embedding is isn't checked.
    """
    rows = _embedding_rows(model)
    if rows is None:
        return
    for ids in windows:
        largest = int(ids.max()) if hasattr(ids, "max") else max(ids)
        if largest >= rows:
            raise ValueError(
                f"the tokenizer gives token id {largest}, which needs an embedding of at least "
                f"{largest + 1} rows, and the model's has {rows}: use the model's own tokenizer, "
                "or call model.resize_token_embeddings(len(tokenizer))"
            )


def _embedding_rows(model: Any) -> int | None:
    """How many token ids the model knows; None where that can't be told."""
    try:
        embedding = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    rows = getattr(embedding, "num_embeddings", None)
    if rows is None:
        shape: Any = getattr(getattr(embedding, "weight", None), "shape", ())
        rows = shape[0] if len(shape) == 2 else None
    return rows


def described(value: object) -> str:
    """What was given instead, short: a class by its name, else the value's class."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, str):
        return f"str {value if len(value) <= 40 else value[:37] + '...'!r}"
    return type(value).__name__


def near(word: str, known: Iterable[str], most: int = 1) -> list[str]:
    """Of the names known those that are like the word, whatever their case, the nearest first."""
    by_form = {name.casefold(): name for name in known}
    return [by_form[form] for form in get_close_matches(word.casefold(), by_form, most, 0.5)]


def nearest(word: str, known: Iterable[str]) -> str:
    """What to say of a word that isn't among those known: the nearest one, and all of them."""
    known = sorted(known)
    found = near(word, known)
    hint = f"the nearest is {found[0]!r}, of " if found else "expected one of "
    return hint + ", ".join(known)


def check_installed(who: str, packages: Iterable[str]) -> None:
    """ImportError naming the first of `packages` that isn't installed; imports none of them.

    who: what needs them, as a user calls it.
    """
    for name in packages:
        if not _is_installed(name):
            raise ImportError(missing(who, name))


def missing(who: str, name: str) -> str:
    """What is said where a package is missing."""
    extra = EXTRAS.get(name, "hf")
    return f"{who} needs {name}, which isn't installed: pip install 'moeprof[{extra}]'"


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # hidden by an import hook; a module made by hand
        return False
