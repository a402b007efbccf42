"""Loading a model and its tokenizer: whatever is wrong with them is said in one line."""

import re
import warnings
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from ..checks import Tokenizer, check_token_ids
from .tokens import prompt_ids

if TYPE_CHECKING:
    import torch
    from torch import nn

WORDS = "The list is"  # which a model is tried on when it was loaded


TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def check_model(name: str, tokenizer: bool = True) -> None:
    """Fail at once where `load_model` couldn't succeed: no such folder, or an unreachable id.

    tokenizer: whether a folder has to have one.
    """
    if not name.strip():
        raise ValueError("model: expected a folder or a hub id, got an empty name")
    folder = Path(name)
    if folder.is_dir():
        _check_folder(folder, tokenizer)
    elif folder.exists():
        raise ValueError(f"model {name}: expected a folder or a hub id, got a file")
    elif not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise FileNotFoundError(f"model {name}: no such folder")
    else:
        _check_hub(name)


def _check_folder(folder: Path, tokenizer: bool) -> None:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"model {folder}: the folder has no config.json")
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise FileNotFoundError(f"model {folder}: the folder has no weights (*.safetensors, *.bin)")
    if tokenizer and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise FileNotFoundError(f"model {folder}: the folder has no tokenizer (tokenizer.json, …)")


def _check_hub(name: str) -> None:
    """One request without retries, for transformers repeats each of its own several times."""
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return
    except ValueError:  # no name that the hub gives, such as one with other letters
        raise FileNotFoundError(f"model {name}: no such folder") from None
    missing = f"model {name}: neither a folder here nor in the Hugging Face cache"
    if constants.HF_HUB_OFFLINE:
        raise FileNotFoundError(f"{missing}, and HF_HUB_OFFLINE is set")
    try:
        HfApi().model_info(name, timeout=10)
    except Exception as error:  # the client's classes differ by version, some aren't OSErrors
        raise FileNotFoundError(
            f"{missing}, and the hub doesn't give it ({reason_of(error, 120)})"
        ) from error


def reason_of(error: Exception, width: int = 160) -> str:
    """An exception in one line of at most `width` characters."""
    return shorten(f"{type(error).__name__}: {error}", width, placeholder=" …")


def load_model(
    name: str, dtype: "torch.dtype", trust_remote_code: bool = False
) -> tuple["nn.Module", Tokenizer]:
    """(model in eval mode, tokenizer) from a folder or the hub; dtype: a torch.dtype.

    trust_remote_code: whether Python code that comes with them may be run.

    Raises ValueError or OSError in one line, also for a checkpoint that lacks some of the
    weights: transformers would make them up and warn.
    """
    check_model(name)
    try:
        model, loading = _loaded(name, dtype, trust_remote_code)
        tokenizer = _tokenizer(name, trust_remote_code)
    except Exception as error:  # damaged files raise classes of several libraries
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise ValueError(
                f"model {name} needs Python code that comes with it: read that code, and give "
                "--trust-remote-code if it may be run"
            ) from error
        raise ValueError(f"model {name} can't be loaded ({reason_of(error)})") from error
    check_loaded(name, model, loading)
    model.eval()
    _try(name, model, tokenizer)
    return model, tokenizer


def check_loaded(name: str, model: "nn.Module", loading: dict[str, Any]) -> None:
    """ValueError where the checkpoint doesn't fit the model; loading: what transformers says of
    the two."""
    # names, on transformers 5 each with both shapes
    other = sorted(key if isinstance(key, str) else key[0] for key in loading["mismatched_keys"])
    if other:
        raise ValueError(
            f"model {name}: the shape of {other[0]} is another one in the checkpoint than by the "
            f"config, {tuple(model.state_dict()[other[0]].shape)}"
        )
    absent = sorted(map(str, loading["missing_keys"]))
    if absent:
        raise ValueError(
            f"model {name}: the checkpoint lacks {len(absent)} of the model's weights, "
            f"{absent[0]} among them"
        )


def load_tokenizer(name: str, model: "nn.Module") -> Tokenizer:
    """The tokenizer of a model that was loaded by other means; ValueError in one line."""
    try:
        tokenizer = _tokenizer(name, trust_remote_code=False)
    except Exception as error:  # damaged files raise classes of several libraries
        raise ValueError(f"model {name}: no tokenizer ({reason_of(error)})") from error
    _try(name, model, tokenizer)
    return tokenizer


def _tokenizer(name: str, trust_remote_code: bool) -> Tokenizer:
    from transformers import AutoTokenizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer: Any = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    return tokenizer


def _loaded(
    name: str, dtype: "torch.dtype", trust_remote_code: bool
) -> tuple["nn.Module", dict[str, Any]]:
    """(model, what of it was found) of transformers; its warnings are not shown."""
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: Any = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype,
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
            ignore_mismatched_sizes=True,  # `load_model` says which, and stops
        )
        model, loading = found
    return model, loading


def _try(name: str, model: "nn.Module", tokenizer: Tokenizer) -> None:
    """ValueError where the model and its tokenizer, as loaded, can't run a few words.

    Files that contradict each other, such as a config with more experts a token than there are,
    are loaded without an error.
    """
    import torch

    ids = prompt_ids(tokenizer, WORDS)
    if ids.shape[-1] < 1:
        raise ValueError(f"model {name}: its tokenizer gives no tokens for {WORDS!r}")
    check_token_ids(model, [ids])
    try:
        with torch.inference_mode():
            model(input_ids=ids.long(), use_cache=False)
    except Exception as error:  # whatever class the model's code raises
        raise ValueError(f"model {name} was loaded, but can't run ({reason_of(error)})") from error
