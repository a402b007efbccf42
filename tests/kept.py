"""The demo's texts become token ids once in a process: a test took half a second, 170 times.

Processes that run commands keep them too, see `commands.IMPORTED`.
"""

from functools import cache

from moeprof import demo
from moeprof.texts import windows

_token_ids = windows.token_ids


def keep(now=False):
    """Held-out windows take the ids of the demo's texts from here. now: make all of them."""
    windows.token_ids = token_ids
    for text in _texts() if now else ():
        _ids(text)


def token_ids(tokenizer, text):
    if text in _texts() and is_demos(tokenizer):
        return list(_ids(text))
    return _token_ids(tokenizer, text)


def is_demos(tokenizer):
    """Whether it is the demo's, without tokens added to it."""
    same = getattr(tokenizer, "name_or_path", None) == str(demo.PATH)
    return same and len(tokenizer) == _tokenizer().get_vocab_size()


@cache
def _texts():
    return {document.text for document in (*demo.heldout_texts(), *demo.calibration_texts())}


@cache
def _ids(text):
    return tuple(_tokenizer().encode(text, add_special_tokens=False).ids)


@cache
def _tokenizer():
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(demo.PATH / "tokenizer.json"))
