"""The nulls of a study, fitted in one pass over text that nothing is evaluated on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...models.tokens import token_ids
from ...null import Null
from ...null.fitting import Form, fit_nulls
from ...texts.documents import Document
from ..comparison.contenders import FORMS
from ..engine.load import FIT, Load
from ..engine.measured import Measured
from ..store.subject import subject, text_digest
from .files import digests

if TYPE_CHECKING:
    from torch import nn

    from ...checks import Tokenizer
    from ..engine.work import Make
    from ..store.cells import Cell, Subject


class CalibrationWork(Measured):
    """The nulls that all parts need as `Work` of one cell, which writes them to `folder`.

    texts: passages
    """

    kind = "calibrate"
    kept_bytes = 0

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        texts: Sequence[str],
        folder: Path,
        progress: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.tokenizer, self.texts = model, tokenizer, texts
        self.folder, self.progress = folder, progress
        tokens = sum(len(token_ids(tokenizer, text)) for text in texts)
        forms = [list(form) for form in FORMS.values()]
        self.cells = [self.cell("nulls", self._measure, 0, [Load(FIT, tokens)], forms=forms)]

    @cached_property
    def subject(self) -> Subject:
        documents = [Document("", "", text) for text in self.texts]
        return subject(self.model, text_digest(documents=documents), None)

    def planned(self) -> Sequence[Cell]:
        return self.cells

    @property
    def make(self) -> Make:
        return partial(CalibrationWork, texts=self.texts, folder=self.folder)

    def _measure(self, step: Callable[[], object]) -> dict[str, Any]:
        forms = [Form(*form) for form in FORMS.values()]
        nulls = fit_nulls(self.model, self.tokenizer, self.texts, forms, progress=self.progress)
        self.folder.mkdir(parents=True, exist_ok=True)
        paths = [null_path(self.folder, name) for name in FORMS]
        for null, path in zip(nulls, paths, strict=True):
            null.save(path)
        words = {name: null.describe() for name, null in zip(FORMS, nulls, strict=True)}
        return {"files": digests(self.folder, paths), "words": words}


def null_path(folder: Path, name: str) -> Path:
    """Where the null of this name is; names as in `FORMS`."""
    return folder / f"{name.replace(' ', '_')}.safetensors"


def read_nulls(folder: Path) -> dict[str, Null]:
    """{name: null} of what `CalibrationWork` wrote."""
    return {name: Null.load(null_path(folder, name)) for name in FORMS}
