"""The profile of a study: its model as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...files import write_whole
from ...measure.roofline import roofline
from ...models.decoding import only_device_of
from ...profile.run import PROMPT, plan, profile_texts
from ..engine.load import STOCK, STOCK_DECODE, Load
from ..engine.measured import Measured
from ..store.subject import subject, text_digest
from .files import digests

if TYPE_CHECKING:
    from torch import nn

    from ...checks import Tokenizer
    from ...texts.documents import Text
    from ..store.cells import Cell, Subject


CONTINUATIONS, NEW_TOKENS = 8, 32


class ProfileWork(Measured):
    """A profile: one cell, which writes it to `folder`."""

    kind = "profile"
    kept_bytes = 0

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        texts: Sequence[Text],
        tokens: int,
        seed: int,
        folder: Path,
    ) -> None:
        super().__init__()
        self.model, self.folder = model, folder
        self.plan = plan(
            tokenizer,
            texts,
            tokens=tokens,
            prompts=CONTINUATIONS,
            new_tokens=NEW_TOKENS,
            batches=[1],
            seed=seed,
        )
        decoded = self.plan.prompts * self.plan.new_tokens
        first = self.plan.text.windows[0].ids.shape[1]  # is run once more, uncounted
        read = first + self.plan.text.tokens + self.plan.prompts * PROMPT
        load = [Load(STOCK, read), Load(STOCK_DECODE, decoded)]
        asked: dict[str, Any] = {"prompts": self.plan.prompts, "new_tokens": self.plan.new_tokens}
        asked["folder"] = str(folder.resolve())
        self.cells = [self.cell("profile", self._measure, 0, load, **asked)]

    @cached_property
    def subject(self) -> Subject:
        return subject(self.model, text_digest(self.plan.text), None)

    def planned(self) -> Sequence[Cell]:
        return self.cells

    def _measure(self, step: Callable[[], object]) -> dict[str, Any]:
        result = profile_texts(self.model, self.plan)
        if only_device_of(self.model):  # afterwards, since it takes memory of the device, too
            result.roofline = roofline(self.model)
        paths = result.save(self.folder)
        page = self.folder / "index.html"
        write_whole(page, result.to_html().encode())
        return {"files": digests(self.folder, [*paths, page])}
