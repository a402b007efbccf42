"""A text's token ids; whatever stops the tokenizer is a ValueError that says so."""

from textwrap import shorten


def token_ids(tokenizer, text):
    """The ids of a text, as a list, without special tokens: a piece of a longer one."""
    return _input_ids(tokenizer, text, add_special_tokens=False, verbose=False)


def prompt_ids(tokenizer, text):
    """The ids of a whole prompt, (1, n) int64, with the special tokens that belong to one."""
    return _input_ids(tokenizer, text, return_tensors="pt")


def _input_ids(tokenizer, text, **options):
    try:
        return tokenizer(text, **options)["input_ids"]
    except Exception as error:  # the classes are the tokenizer's own; some are Exception itself
        reason = shorten(f"{type(error).__name__}: {error}", 120, placeholder=" …")
        begun = shorten(text, 40, placeholder=" …")
        raise ValueError(f"the tokenizer can't read the text {begun!r} ({reason})") from error
