"""What a study's parts gave, as the report takes it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ....null.model import Null
    from ....profile.result import Profile
    from ...diagnosis.result import Diagnosis
    from ...evaluation.result import Evaluated


@dataclass(frozen=True)
class Results:
    """The results of a study; None for a part that was left out, interrupted or failed.

    Attributes
    ----------
    facts
        A dict: "model" (its name), "dtype" (in words, with the bits of quantised experts),
        "machine" (as `moeprof.measure.machine.describe` gives it), "versions" {name: version},
        "command", "seed", "store" (path), "peak_gb" (resident memory at most, 10^9 bytes, or
        None), "devices" (as `devices_under` gives them), "beside" (other parts whose files are in
        the folder: of another study, or unfinished) and "parts": a dict each of "part", "seconds",
        "planned_seconds" (or None), "cells", "finished_before" (of them, in the store), "words"
        (what it did) and "failed" (why it has no result, or None).
    nulls
        {kind: Null}.
    profile, diagnose, evaluate
        Profile, Diagnosis, Evaluated.
    sweep, compare
        The runs: dicts as in their JSON files.
    grid
        The rows that `run_grid` returns.
    """

    facts: dict[str, Any]
    nulls: dict[str, Null] = field(default_factory=dict)
    profile: Profile | None = None
    sweep: dict[str, Any] | None = None
    compare: dict[str, Any] | None = None
    diagnose: Diagnosis | None = None
    evaluate: Evaluated | None = None
    grid: list[dict[str, Any]] | None = None

    def missing(self, part: str) -> str:
        """Why a part has no result, in a sentence."""
        about = next((one for one in self.facts["parts"] if one["part"] == part), None)
        if about and about.get("failed"):
            return f"No result: {about['failed'].rstrip('.')}."
        if about:
            return (
                "No result yet: this part was not finished. Its cells that were are in the store: "
                "the same command goes on with the others."
            )
        return "This part was not run."
