"""A text's token ids; whatever stops the tokenizer is a ValueError that says so."""

from textwrap import shorten
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from ..checks import Tokenizer


def token_ids(tokenizer: "Tokenizer", text: str) -> list[int]:
    """The ids of a text, as a list, without special tokens: a piece of a longer one."""
    return _input_ids(tokenizer, text, add_special_tokens=False, verbose=False)


def prompt_ids(tokenizer: "Tokenizer", text: str) -> "Tensor":
    """The ids of a whole prompt, (1, n) int64, with the special tokens that belong to one."""
    return _input_ids(tokenizer, text, return_tensors="pt")


def _input_ids(tokenizer: "Tokenizer", text: str, **options: Any) -> Any:
    try:
        return tokenizer(text, **options)["input_ids"]
    except Exception as error:  # the classes are the tokenizer's own; some are Exception itself
        reason = shorten(f"{type(error).__name__}: {error}", 120, placeholder=" …")
        begun = shorten(text, 40, placeholder=" …")
        raise ValueError(f"the tokenizer can't read the text {begun!r} ({reason})") from error


def most_positions(model: Any) -> int | None:
    """The longest sequence that a model's config says it takes; None where it doesn't say."""
    config: Any = getattr(model, "config", None)
    inner = config.get_text_config() if hasattr(config, "get_text_config") else config
    most = getattr(inner, "max_position_embeddings", None)
    return most if isinstance(most, int) and most > 0 else None
