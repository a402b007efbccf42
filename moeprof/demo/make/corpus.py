"""The demo's text: read it, split it by document (its sources: moeprof/demo/make/train.py)."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from ...files import write_whole
from ...texts.documents import Document

DOMAINS = ("bible", "jargon", "docs", "code")
# Tables and generated text in the library: not prose, not code, or a copy of the manual.
CODE_LEFT_OUT = {"encodings", "pydoc_data", "lib-dynload", "__phello__"}
HELD_BACK = 32  # documents a domain in each of calibration and held-out
CUT_BYTES = 5000  # 2 * 32 * 4 * 5 kB stays below 1.5 MB
ELIGIBLE_BYTES = (2000, 40000)  # held back: not a stub, and not a book that training would miss
JARGON_BYTES = (3000, 6000)


def read_bible(path: Path) -> Iterator[Document]:
    """Chapters: a heading such as "Genesis 1", then a verse a line."""
    text = re.sub(r"(?m)^  (?=\d)", "", path.read_text(encoding="utf-8", errors="replace"))
    chapters = re.split(r"(?m)^(?=[A-Z0-9][^\n]* \d+\n\n)", text)
    for chapter in filter(None, (c.strip() for c in chapters)):
        yield Document("bible", chapter.split("\n", 1)[0], chapter + "\n")


def read_jargon(path: Path) -> Iterator[Document]:
    """Groups of consecutive entries of 3 kB or more; an entry alone is too short."""
    text = path.read_text(encoding="utf-8", errors="replace")
    # The title occurs in the table of contents and again where the text begins.
    text = text[text.rindex("Welcome to the Jargon File") :] if "Welcome" in text else text
    text = re.sub(r"(?m)^   ", "", text)
    least, most = JARGON_BYTES
    group: list[str] = []
    size, number = 0, 0
    for paragraph in re.split(r"\n{2,}", text):
        new_entry = paragraph.startswith(":")
        if (size >= least and new_entry) or size >= most:
            yield Document("jargon", f"group {number}", "\n\n".join(group) + "\n")
            group, size, number = [], 0, number + 1
        group.append(paragraph)
        size += len(paragraph.encode()) + 2
    if size:
        yield Document("jargon", f"group {number}", "\n\n".join(group) + "\n")


def read_files(domain: str, folder: Path, pattern: str) -> Iterator[Document]:
    """One document a file."""
    for path in sorted(folder.rglob(pattern)):
        name = path.relative_to(folder)
        if domain == "code" and CODE_LEFT_OUT & set(name.parts):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if text.strip():
            yield Document(domain, name.as_posix(), text.replace("\r\n", "\n"))


def read_text(folder: Path) -> dict[str, list[Document]]:
    """All documents under `folder`, by domain, without exact duplicates."""
    found = {
        "bible": read_bible(folder / "bible.txt"),
        "jargon": read_jargon(folder / "jargon.txt"),
        "docs": read_files("docs", folder / "docs", "*.txt"),
        "code": read_files("code", folder / "code", "*.py"),
    }
    seen: set[bytes] = set()
    documents: dict[str, list[Document]] = {}
    for domain in DOMAINS:
        documents[domain] = []
        for document in found[domain]:
            digest = hashlib.sha256(document.text.encode()).digest()
            if digest not in seen:
                seen.add(digest)
                documents[domain].append(document)
    return documents


def cut(document: Document) -> Document:
    """The document's first lines, at most CUT_BYTES of them."""
    kept, size = [], 0
    for line in document.text.splitlines(keepends=True):
        size += len(line.encode())
        if size > CUT_BYTES:
            break
        kept.append(line)
    return document._replace(text="".join(kept))


def split(
    documents: Mapping[str, list[Document]], seed: int
) -> tuple[dict[str, list[Document]], list[Document], list[Document]]:
    """(training documents by domain, calibration, held-out); no document is in two of them."""
    training, calibration, heldout = {}, [], []
    least, most = ELIGIBLE_BYTES
    for domain in DOMAINS:
        pool = list(documents[domain])
        random.Random(f"{seed} {domain}").shuffle(pool)
        fits = [d for d in pool if least <= len(d.text.encode()) <= most]
        chosen = fits[: 2 * HELD_BACK]
        if len(chosen) < 2 * HELD_BACK:
            raise SystemExit(f"{domain}: {len(fits)} documents fit, {2 * HELD_BACK} needed")
        names = {d.name for d in chosen}
        training[domain] = [d for d in pool if d.name not in names]
        calibration += [cut(d) for d in chosen[:HELD_BACK]]
        heldout += [cut(d) for d in chosen[HELD_BACK:]]
    return training, calibration, heldout


def write_jsonl(path: Path, documents: Iterable[Document]) -> None:
    lines = (json.dumps(d._asdict(), ensure_ascii=False) + "\n" for d in documents)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(lines).encode())
