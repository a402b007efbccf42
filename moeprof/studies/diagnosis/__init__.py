"""What a null and a router on it do to a model, measured on held-out text.

`diagnose` (also `Null.diagnose`, and `moeprof diagnose`) measures, layer by layer, with 95 %
intervals by bootstrap over documents within their domains, which all routers share:

- p-values under the stock and under the patched router: histogram, QQ, Storey's pi0 by lambda
- R, the router's count before min_k and max_k: against router entropy and token loss
  (Spearman), and how often min_k and max_k decide instead of it
- nulls fitted to one domain and checked on another
- ablation, "the one testable meaning of false discovery" here: what each selected expert did
  for the next token's loss, set beside alpha

"False discovery rate" is a statement against the null that is named, for p-values that are
valid and independent (or positively dependent) under it. The share of false discoveries by
ablation is another thing, an operational definition (see `moeprof.studies.diagnosis.discoveries`);
nothing guarantees that it is near alpha.
"""

from .result import Diagnosis
from .run import diagnose

__all__ = ["Diagnosis", "diagnose"]
