"""The demo's texts become token ids once in a process: a test took half a second, 170 times.

Processes that run commands keep them too, see `commands.IMPORTED`.
"""

import json
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer

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
    """Whether it is the demo's, or one that was saved from it, without tokens added to it."""
    if not hasattr(tokenizer, "name_or_path"):
        return False
    file = Path(tokenizer.name_or_path, "tokenizer.json").resolve()
    same = file.is_file() and _makes_its_ids(file, file.stat().st_mtime_ns)
    return same and len(tokenizer) == _tokenizer().get_vocab_size()


@cache
def _makes_its_ids(file, written):
    """written: when, so that a file which is written anew is read anew."""
    return _of_ids(file) == _of_ids(demo.PATH / "tokenizer.json")


def _of_ids(file):
    """What makes ids of a text: no post-processor, as it adds special tokens."""
    made = json.loads(file.read_text(encoding="utf-8"))
    return {key: made[key] for key in ("normalizer", "pre_tokenizer", "model", "added_tokens")}


@cache
def _texts():
    return {document.text for document in (*demo.heldout_texts(), *demo.calibration_texts())}


@cache
def _ids(text):
    return tuple(_tokenizer().encode(text, add_special_tokens=False).ids)


@cache
def _tokenizer():
    return Tokenizer.from_file(str(demo.PATH / "tokenizer.json"))
