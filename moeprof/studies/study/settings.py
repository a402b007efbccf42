"""What a study is asked to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...texts.documents import Document
from ...texts.windows import BUDGET_TOKENS, CALIBRATION_CHARACTERS
from ..comparison.plan import REDUCTION, TABLES
from ..comparison.splits import TEST_TOKENS

PARTS = ("calibrate", "profile", "sweep", "compare", "diagnose", "evaluate")
POSITIONS = 1000


@dataclass(frozen=True)
class Settings:
    """What a study is asked to do; ValueError for a part or a table that isn't one.

    parts : some of PARTS; "calibrate" is always among them, for others need its nulls
    documents : the held-out text, None for what ships with moeprof; sources : where it is from
    tokens : of the held-out text, that each part reads
    budgets : experts per token that routers are compared at; None for half and three quarters of
        what the model takes
    budget_tokens : of the shipped calibration text, that budgets are set on
    null_characters : of its other half, that nulls are fitted to
    routers : that are compared, as `moeprof compare` takes them; None for all
    tables : of the comparison
    positions : at which experts are ablated
    seed : of the windows, the controls and the bootstrap
    """

    parts: Sequence[str] = PARTS
    documents: Sequence[Document] | None = None
    sources: Sequence[str] = ("your own text",)
    tokens: int = TEST_TOKENS
    budgets: Sequence[int] | None = None
    budget_tokens: int = BUDGET_TOKENS
    null_characters: int = CALIBRATION_CHARACTERS
    routers: Sequence[str] | None = None
    tables: Sequence[str] = (REDUCTION,)
    positions: int = POSITIONS
    seed: int = 0

    def __post_init__(self) -> None:
        for name, given, known in (("parts", self.parts, PARTS), ("tables", self.tables, TABLES)):
            for one in given:
                if one not in known:
                    raise ValueError(f"{name}: expected some of {', '.join(known)}, got {one!r}")
            if not given:
                raise ValueError(f"{name}: expected some of {', '.join(known)}, got none")

    def budgets_for(self, top_k: int) -> list[int]:
        """Experts per token; none for a model that takes one. ValueError for more than it takes."""
        if self.budgets is None:
            return sorted({top_k * 2 // 4, top_k * 3 // 4} - {0, top_k})
        if bad := [budget for budget in self.budgets if not 1 <= budget <= top_k]:
            raise ValueError(
                f"budgets: expected experts per token from 1 to {top_k}, which the model takes, "
                f"got {', '.join(map(str, bad))}"
            )
        return list(self.budgets)
