"""What a routing does to a model on a text: experts, KL to the full model, next-token loss.

`passes` runs texts through a patched model, `bootstrap` puts intervals on what came out.
"""

from .bootstrap import Intervals, bootstrap
from .passes import Pass, Quality, Reference, collect, evaluating

__all__ = ["Intervals", "Pass", "Quality", "Reference", "bootstrap", "collect", "evaluating"]
