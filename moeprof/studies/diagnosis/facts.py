"""What a diagnosis was made of: everything in its JSON but the numbers."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from ...measure import machine
from ...models.blocks import fewest_experts
from ...models.identity import model_name

if TYPE_CHECKING:
    from torch import nn

    from ...null.resolve import AnyNull
    from ...routers.base import Router
    from ...texts.windows import HeldOut


def describe(model: nn.Module, null: AnyNull, router: Router, text: HeldOut) -> dict[str, Any]:
    import scipy
    import statsmodels

    facts = machine.describe()
    facts["versions"] |= {"scipy": scipy.__version__, "statsmodels": statsmodels.__version__}
    facts["versions"] |= {name: version(name) for name in ("pandas",)}
    limits = router.limits(fewest_experts(model))
    return {
        "started": facts.pop("started"),
        "model": model_name(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "null": null.describe(),
        "router": repr(router),
        "alpha": getattr(router, "alpha", None),
        "min_k": limits[0],
        "max_k": limits[1],
        "machine": facts,
        "heldout_tokens": text.tokens,
        "heldout_documents": text.documents,
    }
