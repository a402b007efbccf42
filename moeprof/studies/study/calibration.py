"""The nulls of a study, fitted in one pass over text that nothing is evaluated on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...measure.fitting import Form, fit_nulls
from ...measure.passes import quick
from ...models.tokens import token_ids
from ...null import Null
from ...texts.documents import Document
from ..comparison.contenders import FORMS
from ..engine.load import FIT, Load
from ..engine.measured import Measured
from ..store.subject import subject, text_digest
from .files import digests

if TYPE_CHECKING:
    from torch import nn

    from ...checks import Tokenizer
    from ..store.cells import Cell, Subject


class CalibrationWork(Measured):
    """The nulls that all parts need: one cell, which writes them to `folder`.

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
        asked: dict[str, Any] = {
            "forms": [list(form) for form in FORMS.values()],
            "folder": str(folder.resolve()),
        }
        self.cells = [self.cell("nulls", self._measure, 0, [Load(FIT, tokens)], **asked)]
        self._documents = [Document("", "", text) for text in texts]

    @cached_property
    def subject(self) -> Subject:
        return subject(self.model, text_digest(documents=self._documents), None)

    def planned(self) -> Sequence[Cell]:
        return self.cells

    def read(self) -> dict[str, Null]:
        """{name: null} of what was written."""
        return {name: Null.load(self.path(name)) for name in FORMS}

    def path(self, name: str) -> Path:
        """Of the null of this name; other texts make other files."""
        text = text_digest(documents=self._documents)
        return self.folder / f"{name.replace(' ', '_')}-{text[:8]}.safetensors"

    def _measure(self, step: Callable[[], object]) -> dict[str, Any]:
        forms = [Form(*form) for form in FORMS.values()]
        with quick(self.model):
            nulls = fit_nulls(self.model, self.tokenizer, self.texts, forms, progress=self.progress)
        self.folder.mkdir(parents=True, exist_ok=True)
        paths = [self.path(name) for name in FORMS]
        for null, path in zip(nulls, paths, strict=True):
            null.save(path)
        words = {name: null.describe() for name, null in zip(FORMS, nulls, strict=True)}
        return {"files": digests(self.folder, paths), "words": words}
