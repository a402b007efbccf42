"""The routers that are compared, each with the null that it works on."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ...checks import nearest
from ...routers import REGISTRY, make_router

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn

    from ...checks import Tokenizer
    from ...measure.passes import Pass
    from ...null.model import Null
    from ...null.resolve import AnyNull
    from ...routers.base import Router
    from ...texts.documents import Text


PRIMARY = "bh"  # BH on logprob under the fitted null: fixed before anything was run
THRESHOLDS = ("fixed_p", "local_fdr")  # with a parameter per layer one rule, if lfdr is monotone
LEFT_OUT = "BY is not run: it is BH at alpha/c(E), so at an equal budget it makes the same choices."


class Contender(NamedTuple):
    """A router by its name in the tables.

    null : "efron", "efron on logit", "trimmed" (see `Nulls`), or None for one without p-values
    parameters : of the router, besides the main one and max_k
    """

    name: str
    router: str
    null: str | None = None
    parameters: dict[str, Any] = {}  # never changed

    def make(self, max_k: int, weights: NDArray[np.float64]) -> Router:
        """The router, its main parameter still to be set. weights: (L, E) for weighted_bh."""
        parameters = dict(self.parameters)
        if self.router == "weighted_bh":
            parameters["u"] = tuple(tuple(row) for row in weights.tolist())
        return make_router(self.router, max_k=max_k, **parameters)


EFRON, LOGIT, TRIMMED = "efron", "efron on logit", "trimmed"
FORMS = {EFRON: ("efron", "logprob"), LOGIT: ("efron", "logit"), TRIMMED: ("trimmed", "logprob")}
CONTENDERS = (
    Contender("bh", "bh", EFRON),
    Contender("bh (logit)", "bh", LOGIT),
    Contender("bh (trimmed)", "bh", TRIMMED),
    Contender("storey_bh", "storey_bh", EFRON),
    Contender("weighted_bh", "weighted_bh", EFRON),
    Contender("ebh (lr)", "ebh", EFRON, {"e": "lr"}),
    Contender("ebh (calibrator)", "ebh", EFRON, {"e": "calibrator"}),
    Contender("local_fdr", "local_fdr", EFRON),
    Contender("fixed_p", "fixed_p", EFRON),
    Contender("hc (rank)", "higher_criticism", EFRON, {"denominator": "rank"}),
    Contender("hc (p)", "higher_criticism", EFRON, {"denominator": "p"}),
    Contender("top_p", "top_p"),
    Contender("min_p", "min_p"),
    Contender("entropy", "entropy"),
    Contender("kneedle (prob)", "kneedle", None, {"on": "prob"}),
    Contender("kneedle (log)", "kneedle", None, {"on": "log"}),
    Contender("gap_ratio", "gap_ratio"),
    Contender("expert_threshold", "expert_threshold", EFRON),
)


def choose_contenders(names: Collection[str] | None = None) -> list[Contender]:
    """The contenders of these names, in the order of the tables; all of them for None.

    A router's name stands for all of its contenders, unless one of them is called so: "bh" is the
    contender "bh" alone. ValueError for an unknown name, for "by", which is none, and for no name.
    """
    known = [c for c in CONTENDERS if c.router in REGISTRY]
    if names is None:
        return known
    if not names:
        raise ValueError(f"routers: expected some of {[c.name for c in known]}, got none")
    words = {word for c in known for word in (c.name, c.router)}
    for name in names:
        if name == "by":
            raise ValueError(f"routers: {LEFT_OUT}")
        if name not in words:
            raise ValueError(f"routers: there is no {name!r}; {nearest(name, words)}")
    routers = set(names) - {c.name for c in known}
    return [c for c in known if c.name in names or c.router in routers]


@dataclass
class Nulls:
    """The nulls of a comparison, fitted to the null split when one is first asked for: all of
    them, since a pass over the text takes most of the time.

    given: {name: null} of those that aren't fitted.
    """

    model: nn.Module
    tokenizer: Tokenizer
    texts: Sequence[Text]
    given: Mapping[str, AnyNull | str] = field(default_factory=dict)
    fitted: dict[str, Null] = field(default_factory=dict)

    def get(self, name: str | None) -> AnyNull | str | None:
        """What `patch` takes as null= for a contender's null; None for None."""
        if name is None:
            return None
        if name in self.given:
            return self.given[name]
        if not self.fitted:
            self._fit()
        return self.fitted[name]

    def _fit(self) -> None:
        from ...measure.fitting import Form, fit_nulls
        from ...measure.passes import quick

        names = [name for name in FORMS if name not in self.given]
        texts = [document.text for document in self.texts]
        forms = [Form(*FORMS[name]) for name in names]
        with quick(self.model):
            nulls = fit_nulls(self.model, self.tokenizer, texts, forms, progress=False)
        self.fitted.update(zip(names, nulls, strict=True))


def popularity(passed: Pass, top_k: int) -> NDArray[np.float64]:
    """(L, E) weights of mean 1 in each layer: how often the model's own top-k takes each expert.

    passed: a Pass of the unchanged model over the budget text.
    """
    layers, tokens, experts = passed.logits.shape
    chosen = np.argpartition(-passed.logits, top_k - 1, axis=2)[:, :, :top_k]
    counts = np.stack([np.bincount(layer.ravel(), minlength=experts) for layer in chosen])
    return counts * (experts / (tokens * top_k))
