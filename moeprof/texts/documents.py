"""Documents: texts with a domain and a name, from files or as a user gives them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ..checks import check_type

EXPECTED = (
    '--text: a .jsonl file has a document a line ({"text": ..., "domain": ..., the domain '
    "optional), any other file is one document"
)


def read_documents(paths: Iterable[str | os.PathLike[str]]) -> list[Document]:
    """Documents of a user's files; ValueError or OSError in one line for what is no text."""
    documents = []
    for path in map(Path, paths):
        text = read_document(path, "text")
        if path.suffix != ".jsonl":
            documents.append(Document("text", path.name, text))
            continue
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                documents.append(_from_line(line, path, number))
    return documents


def _from_line(line: str, path: Path, number: int) -> Document:
    try:
        fields = json.loads(line)
        text, domain = fields["text"], fields.get("domain", "text")
        if not (isinstance(text, str) and isinstance(domain, str)):
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"text {path}, line {number}: no such document; {EXPECTED}") from None
    return Document(domain, f"{path.name}:{number}", text)


def read_text(path: str | os.PathLike[str], what: str) -> str:
    """The text of a UTF-8 file; `what` names it in errors."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise OSError(f"{what} {path} can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} {path} isn't UTF-8 text (byte {error.start})") from error


def read_document(path: str | os.PathLike[str], what: str) -> str:
    """The same, of a file that has to have something in it."""
    text = read_text(path, what)
    if not text.strip():
        raise ValueError(f"{what} {path} is empty")
    return text


class Text(Protocol):
    """What runs read: a text, its domain and its name, as Document and the demo's texts."""

    @property
    def domain(self) -> str: ...

    @property
    def name(self) -> str: ...

    @property
    def text(self) -> str: ...


class Document(NamedTuple):
    """One document of one domain (bible, jargon, docs or code)."""

    domain: str
    name: str
    text: str


def read_texts(texts: Iterable[Any], argument: str) -> list[Document]:
    """Strings, or objects with .text and .domain as moeprof.demo has them."""
    if isinstance(texts, str):
        raise TypeError(f"{argument}: expected a list of texts, got one string")
    check_type(argument, texts, Iterable, "a list of texts")
    result = []
    for index, item in enumerate(texts):
        content = item if isinstance(item, str) else getattr(item, "text", None)
        if not isinstance(content, str):
            raise TypeError(f"{argument}[{index}]: expected a string, got {type(item).__name__}")
        domain = "" if isinstance(item, str) else getattr(item, "domain", "")
        result.append(Document(domain, f"{argument}[{index}]", content))
    if not result:
        raise ValueError(f"{argument}: expected at least one text, got none")
    if not any(text.text.strip() for text in result):
        raise ValueError(f"{argument}: expected text, got empty strings only")
    return result
