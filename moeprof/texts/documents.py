"""Documents: texts with a domain and a name, from files or as a user gives them."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple, Protocol

from ..checks import check_type

FIELDS = "text", "domain", "complexity"
EXPECTED = (
    "--text: a .jsonl or .parquet file has a document a line or row, of a text, and optionally a "
    "domain and a complexity; datasets:NAME:SPLIT or datasets:NAME:CONFIG:SPLIT is a dataset of "
    "the Hugging Face hub with the same columns; any other file is one document; a folder stands "
    "for its .txt, .md, .jsonl and .parquet files, each folder in it a domain"
)
SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")  # of the files that are read in a folder
DATASETS = "datasets:"
SPLIT = "test"


def holds_documents(path: str | os.PathLike[str]) -> bool:
    """Whether it may hold several documents; any other file is one, see `EXPECTED`."""
    return (
        str(path).startswith(DATASETS)
        or Path(path).suffix.lower() in (".jsonl", ".parquet")
        or Path(path).is_dir()
    )


def read_documents(paths: Iterable[str | os.PathLike[str]], domain: str = "text") -> list[Document]:
    """Documents of what a user names: files, folders and datasets, see `EXPECTED`.

    domain: of those that have none of their own and lie in no folder of a folder named. Files with
    nothing in them are left out, with a warning.

    ValueError or OSError in one line for what is no text, or where all of it is empty; ImportError
    where a package is missing.
    """
    documents: list[Document] = []
    empty: list[Path] = []
    for path in paths:
        if str(path).startswith(DATASETS):
            documents += _of_dataset(str(path), domain)
            continue
        for file, name, its_domain in _files(Path(path), domain):
            found = list(_of_file(file, name, its_domain))
            if any(document.text.strip() for document in found):
                documents += found
            else:
                empty.append(file)
    if not empty:
        return documents
    said = f"text {empty[0]} is empty"
    if len(empty) > 1:
        said = f"text: {len(empty)} files are empty, the first {empty[0]}"
    if not documents:
        raise ValueError(said)
    warnings.warn(f"{said}, and left out", stacklevel=2)
    return documents


def _files(path: Path, domain: str) -> Iterator[tuple[Path, str, str]]:
    """(file, its name, the domain of its documents) of a file, or of all in a folder, in the order
    of their names; hidden ones are left out."""
    if not path.is_dir():
        yield path, path.name, domain
        return
    found = False
    for file in sorted(path.rglob("*")):
        inside = file.relative_to(path)
        hidden = any(part.startswith(".") for part in inside.parts)
        if file.suffix.lower() in SUFFIXES and file.is_file() and not hidden:
            found = True
            folder = inside.parent.as_posix()
            yield file, inside.as_posix(), domain if folder == "." else folder
    if not found:
        raise ValueError(f"text {path}: the folder has no {', '.join(SUFFIXES)} file in it")


def _of_file(path: Path, name: str, domain: str) -> Iterator[Document]:
    """domain: of the documents that name none."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        yield from _of_parquet(path, name, domain)
        return
    text = read_text(path, "text")
    if suffix != ".jsonl":
        yield Document(domain, name, text)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                fields = json.loads(line)
            except (ValueError, RecursionError):  # the latter of JSON nested without end
                fields = None
            yield _from_fields(fields, f"text {path}, line {number}", f"{name}:{number}", domain)


def _of_parquet(path: Path, name: str, domain: str) -> Iterator[Document]:
    if importlib.util.find_spec("pyarrow") is None:
        raise ImportError(
            f"text {path}: Parquet needs pyarrow, which isn't installed: "
            "pip install 'moeprof[records]'"
        )
    import pyarrow
    from pyarrow import parquet

    try:
        with open(path, "rb") as file:
            table = parquet.ParquetFile(file)
            columns = [column for column in FIELDS if column in table.schema_arrow.names]
            rows = table.read(columns=columns).to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(f"text {path} is no Parquet file ({_line(error)})") from None
    except OSError as error:
        raise OSError(f"text {path} can't be read: {error.strerror or _line(error)}") from error
    for number, row in enumerate(rows, start=1):
        yield _from_fields(row, f"text {path}, row {number}", f"{name}:{number}", domain)


def _of_dataset(written: str, domain: str) -> Iterator[Document]:
    """A row of a dataset is a document; those without text are left out."""
    name, *more = re.split(r":(?![^\[]*\])", written.removeprefix(DATASETS))
    if not name or len(more) > 2:
        raise ValueError(f"text {written}: expected datasets:NAME:SPLIT or …:NAME:CONFIG:SPLIT")
    if importlib.util.find_spec("datasets") is None:
        raise ImportError(
            f"text {written}: this needs datasets, which isn't installed: "
            "pip install 'moeprof[datasets]'"
        )
    import datasets

    split, config = more[-1] if more else SPLIT, more[0] if len(more) == 2 else None
    try:
        rows = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # its classes are of many packages
        reason = _line(error)
        raise OSError(f"text {written} can't be loaded ({reason})") from error
    documents = [
        _from_fields(row, f"text {written}, row {number}", f"{name}:{number}", domain)
        for number, row in enumerate(rows, start=1)
    ]
    documents = [document for document in documents if document.text.strip()]
    if not documents:
        raise ValueError(f"text {written} is empty")
    yield from documents


def _from_fields(fields: Any, where: str, name: str, domain: str) -> Document:
    """A document of a line or row; where: what it is called in errors."""
    given = fields if isinstance(fields, Mapping) else {}
    text, own, complexity = (given.get(field) for field in FIELDS)
    optional = all(isinstance(value, str | None) for value in (own, complexity))
    if not (isinstance(text, str) and optional):
        raise ValueError(f"{where}: no such document; {EXPECTED}")
    for field in FIELDS:
        if re.search("[\ud800-\udfff]", given.get(field) or ""):
            raise ValueError(f"{where}: its {field} has a lone surrogate, which is no character")
    return Document(domain if own is None else own, name, text, complexity)


def _line(error: Exception) -> str:
    """What another package says is wrong, cut to one short line."""
    return shorten(f"{type(error).__name__}: {error}", 160, placeholder=" …")


def read_text(path: str | os.PathLike[str], what: str) -> str:
    """The text of a UTF-8 file; `what` names it in errors."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise OSError(f"{what} {path} can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} {path} isn't UTF-8 text (byte {error.start})") from error


class Text(Protocol):
    """What runs read: a text, its domain and its name, as Document and the demo's texts."""

    @property
    def domain(self) -> str: ...

    @property
    def name(self) -> str: ...

    @property
    def text(self) -> str: ...


class Document(NamedTuple):
    """One document of one domain, such as code; complexity: how hard it is, where that is known."""

    domain: str
    name: str
    text: str
    complexity: str | None = None


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
