"""Three texts that share no document: for the null, for the budgets, for the test."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ... import demo
from ...texts.documents import EXPECTED
from ...texts.windows import BUDGET_TOKENS, HeldOut, heldout_windows

if TYPE_CHECKING:
    from ...checks import Tokenizer
    from ...texts.documents import Document, Text


WINDOW = 128  # tokens: one window of each document, so that many documents have their say
TEST_TOKENS = 16384  # on the demo's text, every document; so are `BUDGET_TOKENS`
TURNS = ("null", "budget", "test", "test")  # of a domain's documents, where a user brings them


class Splits(NamedTuple):
    """What the comparison reads.

    null : documents (objects with .domain, .name, .text) that nulls are fitted to
    budget : HeldOut, sets parameters, weights and the split over the layers
    test : HeldOut, read once with every cell and never before
    """

    null: Sequence[Text]
    budget: HeldOut
    test: HeldOut

    @property
    def domains(self) -> list[str]:
        """(D,) the domain of each test document."""
        return [document["domain"] for document in self.test.documents]


def split_documents(documents: Iterable[Text]) -> dict[str, list[Text]]:
    """{"null", "budget", "test": documents}: a quarter, a quarter and half of every domain.

    Of documents with the same text the first one counts: a copy could be in two parts.
    Raises ValueError, saying what is expected, where a domain has fewer than four documents.
    """
    parts: dict[str, list[Text]] = {"null": [], "budget": [], "test": []}
    seen: dict[str, int] = {}
    different: dict[str, Text] = {}
    for document in documents:
        different.setdefault(document.text, document)
    for document in different.values():
        place = seen.setdefault(document.domain, 0)
        parts[TURNS[place % len(TURNS)]].append(document)
        seen[document.domain] += 1
    for domain, count in seen.items():
        if count < len(TURNS):
            raise ValueError(
                f"--text: domain {domain!r} has {count} different document(s), expected at least "
                f"{len(TURNS)}; {EXPECTED}"
            )
    return parts


def demo_documents() -> dict[str, list[Document]]:
    """The same of the text that ships: calibration documents in halves, all held-out ones."""
    null, budget = demo.calibration_halves()
    return {"null": null, "budget": budget, "test": demo.heldout_texts()}


def make_splits(
    tokenizer: Tokenizer,
    texts: Mapping[str, Sequence[Text]],
    *,
    budget_tokens: int = BUDGET_TOKENS,
    tokens: int = TEST_TOKENS,
    seed: int = 0,
) -> Splits:
    """Splits of what `split_documents` or `demo_documents` gave; windows of 128 tokens.

    One window of each document before a second of any, domains in turns; `seed` chooses them.
    """

    def windows(part: str, count: int) -> HeldOut:
        return heldout_windows(tokenizer, texts[part], count, seed, window=WINDOW, whole=True)

    budget, test = windows("budget", budget_tokens), windows("test", tokens)
    return Splits(texts["null"], budget, test)
