"""What all routers share: parameters, evidence, the reference; the registry."""

import warnings
from dataclasses import Field, dataclass, field, fields, replace
from functools import cache
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from .. import _C
from ..backends.cpu import get_num_threads
from ..backends.spec import PLAIN, RouteSpec, Rule
from ..late import late

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray
    from torch import nn

    from ..checks import Tokenizer
    from ..null import LayerNull, TokenNull
    from ..null.resolve import AnyNull

REGISTRY: dict[str, type["Router"]] = {}
UNIT = "(0, 1)"
ANY = "(-inf, inf)"
CAP = 16  # of a router on a null without a max_k, where the model has more experts


def parameter(
    default: Any,
    interval: str = "",
    *,
    words: tuple[Any, ...] = (),
    per_layer: bool = False,
    integer: bool = False,
) -> Any:
    """A field of a router: a number in the interval, or one of the words.

    C gets a word as its place in ``words``; 0 lies in no interval that goes with words.
    ``per_layer``: a list or tuple gives each layer its own.
    """
    rule = {"interval": interval, "words": words, "per_layer": per_layer, "integer": integer}
    return field(default=default, metadata=rule)


def check(
    name: str, value: Any, interval: str, words: tuple[Any, ...] = (), integer: bool = False
) -> None:
    """ValueError unless the value is one of the words or a number in the interval."""
    if any(value is word or (isinstance(value, str) and value == word) for word in words):
        return
    kind = "an integer" if integer else "a number"
    expected = [f"{kind} in {interval}"] if interval else []
    number: Any = Integral if integer else Real
    if interval and isinstance(value, number) and fits_a_float(value):
        low, high = map(float, interval[1:-1].split(","))
        above = value >= low if interval[0] == "[" else value > low
        below = value <= high if interval[-1] == "]" else value < high
        if above and below and not isinstance(value, bool):
            return
    expected += map(repr, words)
    raise ValueError(f"{name}: expected {' or '.join(expected)}, got {shown(value)}")


def plain(value: Any) -> Any:
    """Python's own number for one of NumPy, also in a list or tuple; all else as it is."""
    if isinstance(value, np.generic):
        return value.item()
    return type(value)(map(plain, value)) if type(value) in (list, tuple) else value


def fits_a_float(value: Any) -> bool:
    """False for what lies beyond a float's range, such as 10**400."""
    try:
        float(value)
    except OverflowError:
        return False
    return True


def shown(value: Any) -> str:
    """repr() of a value for a message, cut where it is long; Python refuses to write 10**5000."""
    try:
        text = repr(value)
    except ValueError:
        return "an integer of thousands of digits"
    return text if len(text) <= 60 else f"{text[:40]}... ({len(text)} characters)"


def parameters_of(cls: "type[Router]") -> list[Field[Any]]:
    """The fields of a router that say how it routes: all but the report on its budget."""
    return [f for f in fields(cls) if f.name != "budget"]


def _own_fields(cls: type["Router"]) -> list[Field[Any]]:
    """The fields of a router that not all routers share."""
    shared = {f.name for f in fields(Router)}
    return [f for f in fields(cls) if f.name not in shared]


own_fields: "Callable[[type[Router]], list[Field[Any]]]"
own_fields = cache(_own_fields)  # type: ignore[assignment]  # a class is hashable


@dataclass(frozen=True, eq=False)
class Tokens:
    """T tokens as a router sees them, each one's E experts in order of evidence, best first.

    z, p and lfdr are (T, E) float64: logits, p-values (ascending; those of WeightedBH divided
    by their weights), local false discovery rates. What the router does not want is None.
    """

    z: np.ndarray
    p: np.ndarray = None  # type: ignore[assignment]  # a router that wants p has it
    lfdr: np.ndarray | None = None
    min_k: int = 1
    max_k: int = 1
    pi0: float | None = None

    @property
    def ranks(self) -> np.ndarray:
        """r = 1..E."""
        return np.arange(1, self.z.shape[1] + 1)


@dataclass(frozen=True)
class Router:
    """What all routers share. Their selection is in C, so this is no base class of your own: a
    router of your own is a function of the logits, see `moeprof.patch`.

    Parameters
    ----------
    min_k : int
        A token gets at least so many experts, 1 <= min_k <= max_k. As that is 1 or more, some
        tokens get experts that the rule did not select, which voids any statement about false
        discoveries.
    max_k : int or None
        A token gets at most so many, max_k <= E. None is no cap, E, for routers on the logits,
        and min(16, E) for routers on a null; there a warning says so where that cuts more than
        1 % of the tokens.
    temperature : float
        Above 0. Divides the logits before the softmax that gives the weights. It never acts on
        the selection.
    budget : BudgetReport or None
        What `with_budget` reports. A copy with another parameter has none. Two routers that
        differ only in it are equal.

    Raises
    ------
    ValueError
        For a parameter outside its range, naming it.
    """

    min_k: int = field(default=1, kw_only=True)
    max_k: int | None = field(default=None, kw_only=True)
    temperature: float = field(default=1.0, kw_only=True)
    budget: Any = field(default=None, kw_only=True, compare=False, repr=False)

    name: ClassVar[str]
    wants_null: ClassVar[bool] = False  # works on p-values or on a null's local fdr
    main: ClassVar[str]  # the parameter that sets the budget, in the open interval main_range
    main_range: ClassVar[tuple[float, float]] = (0.0, 1.0)
    increasing: ClassVar[bool] = True  # R never falls as the main parameter grows
    notes: ClassVar[dict[str, str]] = {}  # of parameters, for the help, where no rule says it

    def __init_subclass__(cls) -> None:
        if not cls.__module__.startswith("moeprof."):
            raise TypeError(
                f"{cls.__name__}: a moeprof.Router can't be a base class, since selections are in "
                "C: a router of your own is a function that takes logits (T, E) and returns "
                "(weights, experts) or a (T, E) matrix of weights: moeprof.patch(model, function)"
            )
        if cls.name:
            REGISTRY[cls.name] = cls

    def __post_init__(self) -> None:
        for f in parameters_of(type(self)):
            object.__setattr__(self, f.name, plain(getattr(self, f.name)))
        t = self.temperature
        if not (_is_real(t) and fits_a_float(t) and 0 < float(t) < float("inf")):
            raise ValueError(f"temperature: expected a number > 0, got {shown(t)}")
        for name in ("min_k", "max_k"):
            value = getattr(self, name)
            is_integer = isinstance(value, Integral) and not isinstance(value, bool)
            if not (is_integer or (value is None and name == "max_k")):
                raise ValueError(f"{name}: expected an integer, got {shown(value)}")
        for f in own_fields(type(self)):
            value, rule = getattr(self, f.name), dict(f.metadata)
            values: list[Any] | tuple[Any, ...] = [value]
            if rule and rule.pop("per_layer") and isinstance(value, (list, tuple)):
                values = tuple(value)
                object.__setattr__(self, f.name, values)
            for one in values if rule else ():
                check(f.name, one, **rule)
        if self.budget is not None and getattr(self.budget, "router", None) != repr(self):
            object.__setattr__(self, "budget", None)

    def limits(self, num_experts: int, eligible: int | None = None) -> tuple[int, int]:
        """(min_k, max_k) for E = ``num_experts``, of which a token may use ``eligible``, None for
        all; ValueError if they do not fit."""
        max_k, most = self.max_k, num_experts if eligible is None else eligible
        if max_k is None:
            max_k = min(CAP, most) if self.wants_null else most
        for name, value in (("min_k", self.min_k), ("max_k", max_k)):
            if not 1 <= value <= most:
                raise ValueError(
                    f"{name}: expected 1 to {most} ({whose(most, num_experts)}), got {shown(value)}"
                )
        if self.min_k > max_k:
            raise ValueError(f"min_k: expected at most max_k={max_k}, got {self.min_k}")
        return self.min_k, max_k

    def silent_cap(self, num_experts: int) -> int | None:
        """The cap that nobody asked for: of a router on a null without a max_k, or None."""
        capped = self.wants_null and self.max_k is None and num_experts > CAP
        return CAP if capped else None

    def at(self, layer: int, num_layers: int) -> "Router":
        """The router of one layer: where a parameter has a value for each layer, that one."""
        own = {}
        for f in own_fields(type(self)):
            values = getattr(self, f.name)
            if f.metadata and isinstance(values, tuple):
                own[f.name] = of_layer(f.name, values, layer, num_layers)
        return replace(self, **own) if own else self

    def adapt(self, null: "AnyNull") -> "AnyNull":
        """The null that the router works with, of the one that a user gives."""
        return null

    def with_budget(
        self,
        model: "nn.Module",
        tokenizer: "Tokenizer",
        texts: "Sequence[Any]",
        average_k: float = 6.0,
        per_layer: bool = False,
        *,
        null: "AnyNull | str | os.PathLike[str] | None" = None,
        heldout: "Sequence[Any] | None" = None,
        norm: str = "model",
        tokens: int = 32768,
        progress: bool = True,
    ) -> "Router":
        """This router with its main parameter set so that `model` takes `average_k` experts.

        The parameter is solved for on the logits of the model as it is. Then the texts run
        through the patched model, whose deeper layers see other inputs, and it is solved for
        again on the logits found there, until the average is within 1 % or after 4 passes.

        Parameters
        ----------
        model : torch.nn.Module
            Of Hugging Face transformers, on the CPU. It is afterwards as it was.
        tokenizer : callable
            The model's, of Hugging Face transformers.
        texts : list of str
            Or of objects with .text and .domain, as moeprof.demo has them: one a document.
        average_k : float
            Experts per token, averaged over tokens and layers.
        per_layer : bool
            Split the budget over the layers, by dynamic programming, so that the KL from the
            full model is least, as measured with one layer at a time at top-k on 8,192 tokens
            of the texts; then the parameter is a tuple of one for each layer. Takes a run of
            those for each layer and each k from 1 to max_k.
        null : Null, str, path or None
            As for `moeprof.patch`.
        heldout : list of str, optional
            Where to check the setting; else one fifth of the texts is set aside for that,
            before anything is solved.
        norm : {"model", "none", "sum", "mass"}
            As for `moeprof.patch`. Give the same one there.
        tokens : int
            At most about so many of the texts, and of the held-out ones, are run, spread over
            domains and documents; their logits are kept, 4 bytes an expert, layer and token.
        progress : bool
            Whether to show a bar if it takes more than 2 seconds.

        Returns
        -------
        Router
            With a report in its attribute `budget`: the passes, the reach, the average on the
            calibration text and on held-out text with its standard error over documents.
            There is a warning if no pass came within 1 %.

        Raises
        ------
        BudgetError
            A ValueError: average_k is outside what the router reaches, and the interval is named.
        ValueError, TypeError
            For arguments of another kind, or a router without a main parameter.
        """
        router: Router = late("with_budget")(
            self,
            model,
            tokenizer,
            texts,
            average_k,
            per_layer,
            null=null,
            heldout=heldout,
            norm=norm,
            tokens=tokens,
            progress=progress,
        )
        return router

    def parameters(self, null: "LayerNull | TokenNull | None" = None) -> dict[str, float]:
        """The parameters of the C twin by name, in its order; words as their places."""
        return {f.name: self._number(f) for f in own_fields(type(self)) if f.metadata}

    def _number(self, f: Field[Any]) -> float:
        value, words = getattr(self, f.name), f.metadata["words"]
        if isinstance(value, tuple):
            raise ValueError(f"{f.name}: has a value for each layer; choose one by router.at()")
        return float(words.index(value) if value in words else value)

    def table(
        self, num_experts: int, null: "LayerNull | TokenNull | None"
    ) -> "NDArray[np.float64] | None":
        """What the C twin reads besides parameters and null, float64."""
        return None

    def spec(
        self,
        num_experts: int,
        *,
        norm: str,
        norm_k: int = 1,
        null: "LayerNull | TokenNull | None" = None,
        rule: Rule = PLAIN,
    ) -> RouteSpec:
        """What a backend is told of this router at a layer; null: its LayerNull or TokenNull,
        None for the `normal` null; rule: what the model makes of its logits."""
        min_k, max_k = self.limits(num_experts, rule.eligible(num_experts))
        return RouteSpec(
            self.name,
            tuple(self.parameters(null).values()),
            min_k,
            max_k,
            float(self.temperature),
            norm,
            norm_k,
            ("normal", "logit", None) if null is None else null.spec,
            self.table(num_experts, null),
            rule,
            num_experts=num_experts,
        )

    def count_tokens(
        self,
        router_logits: "NDArray[np.float32]",
        null: "LayerNull | TokenNull | None" = None,
        rule: Rule = PLAIN,
    ) -> tuple["NDArray[np.int32]", "NDArray[np.int32]"]:
        """The experts of each token after and before clamping, (T,) int32 both.

        By the C path, of (T, E) float32 logits; ``null`` and ``rule`` as in :meth:`spec`.
        """
        spec = self.spec(router_logits.shape[1], norm="none", null=null, rule=rule)
        routing = _C.route(router_logits, spec.in_c("float32"), get_num_threads(), False)
        return routing[2], routing[3]

    # ---- the reference ----

    def count(self, tokens: Tokens) -> np.ndarray:
        """R of each token before clamping, (T,): the formula in NumPy float64."""
        raise NotImplementedError  # abstract: each router has its own

    def evidence(self, p: np.ndarray, null: "LayerNull | TokenNull | None") -> np.ndarray:
        """What orders the experts (T, E), ascending, before their logits do."""
        return p

    def look(
        self, router_logits: np.ndarray, null: "LayerNull | TokenNull | None" = None
    ) -> tuple[np.ndarray, Tokens]:
        """The experts of each token in order of evidence, and what the router sees of them."""
        z = np.asarray(router_logits, dtype=np.float64)
        bad = np.isnan(z).any(axis=1) | (z == -np.inf).all(axis=1)
        if bad.any():
            raise ValueError(f"router_logits: row {bad.argmax()} has a NaN or is -inf throughout")
        p = np.zeros_like(z)
        if self.wants_null:
            p = self.evidence(_p_reference(z, null), null)
        ids = np.broadcast_to(np.arange(z.shape[1]), z.shape)
        order = np.lexsort((ids, -z, p), axis=1)
        lfdr, pi0 = self._local_fdr(z, null)

        def by_evidence(values: np.ndarray) -> np.ndarray:
            return np.take_along_axis(values, order, axis=1)

        lfdr = None if lfdr is None else by_evidence(lfdr)
        tokens = Tokens(by_evidence(z), by_evidence(p), lfdr, *self.limits(z.shape[1]), pi0)
        return order, tokens

    def _local_fdr(
        self, z: np.ndarray, null: "LayerNull | TokenNull | None"
    ) -> tuple[np.ndarray | None, float | None]:
        return None, None

    def reference(
        self, router_logits: np.ndarray, *, null: "LayerNull | TokenNull | None" = None
    ) -> tuple["NDArray[np.float64]", "NDArray[np.int64]"]:
        """The routing in NumPy float64, weights summing to 1: the oracle of the C path.

        Parameters
        ----------
        router_logits : (T, E) float array
        null : LayerNull or TokenNull, optional
            None is the `normal` null.

        Returns
        -------
        weights : (T, E) float64, zero where not selected
        rejections : (T,) int64, R before clamping
        """
        order, tokens = self.look(router_logits, null)
        rejections = np.asarray(self.count(tokens), dtype=np.int64)
        counts = np.clip(rejections, tokens.min_k, tokens.max_k)
        chosen = tokens.ranks <= counts[:, None]
        # Of S alone: where evidence and logits disagree, it may lie far below the best of all.
        best = np.where(chosen, tokens.z / self.temperature, -np.inf)
        softmax = np.exp(below_top(best)) * chosen
        weights = np.zeros_like(tokens.z)
        total = softmax.sum(axis=1, keepdims=True)
        np.put_along_axis(weights, order, softmax / total, axis=1)
        return weights, rejections


def whose(eligible: int, num_experts: int) -> str:
    """What the number of experts that a token may use is."""
    if eligible == num_experts:
        return "experts"
    return f"of {num_experts} experts, those in the groups that a token may use"


def warn_if_capped(
    capped: int, tokens: int, num_experts: int, *, unit: str = "tokens", stacklevel: int
) -> bool:
    """Warn where the cap that a max_k of None is cuts more than 1 % of the tokens.

    capped, tokens: how many of how many would have more experts without it, counted in
    `unit`. Returns whether it warned.
    """
    if 100 * capped <= tokens:
        return False
    warnings.warn(
        f"max_k=None caps a router on a null at {CAP} of {num_experts} experts, and {capped} of "
        f"{tokens} {unit} would have more: give max_k={num_experts} for no cap, or max_k={CAP} "
        "to keep this one",
        stacklevel=stacklevel,
    )
    return True


def of_layer(name: str, values: tuple[Any, ...], layer: int, num_layers: int) -> Any:
    """The value of one layer; ValueError unless there is one for each."""
    if len(values) != num_layers:
        raise ValueError(f"{name}: expected {num_layers} values, one a layer, got {len(values)}")
    return values[layer]


def below_top(z: np.ndarray) -> np.ndarray:
    """z less its row's maximum; 0 where it is the maximum: inf - inf would be NaN."""
    top = z.max(axis=1, keepdims=True)
    return np.subtract(z, top, out=np.zeros_like(z), where=z != top)


def argmax(h: np.ndarray, c: float) -> np.ndarray:
    """The r = 1..E with the largest h_r + c r, the smallest on ties; 0 where all h are -inf."""
    tilted = h + c * np.arange(1, h.shape[1] + 1)
    return np.where(np.isneginf(tilted).all(axis=1), 0, tilted.argmax(axis=1) + 1)


def last_rank(holds: np.ndarray) -> np.ndarray:
    """The last r = 1..E that holds, 0 if none does; holds (T, E) bool."""
    last = holds.shape[1] - holds[:, ::-1].argmax(axis=1)
    return np.where(holds.any(axis=1), last, 0)


def make_router(router: str | Router, **parameters: Any) -> Router:
    """A router from a name and keywords, or the object itself (then without keywords)."""
    if isinstance(router, Router):
        if parameters:
            raise TypeError(f"router: {router!r} takes no further parameters: {sorted(parameters)}")
        return router
    if not isinstance(router, str):
        raise TypeError(f"router: expected a name or a Router, got {type(router).__name__}")
    if router not in REGISTRY:
        raise ValueError(f"router: expected one of {sorted(REGISTRY)}, got {router!r}")
    cls = REGISTRY[router]
    known = [f.name for f in parameters_of(cls)]
    if unknown := sorted(set(parameters) - set(known)):
        raise TypeError(f"router {router!r}: unknown parameters {unknown}; it takes {known}")
    return cls(**parameters)


def _is_real(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _p_reference(z: np.ndarray, null: "LayerNull | TokenNull | None") -> np.ndarray:
    from ..null import normal_reference

    return normal_reference(z) if null is None else null.reference(z)


def local_fdr_of(z: np.ndarray, null: "LayerNull") -> np.ndarray:
    """(T, E) local fdr of logits: linear between the table's edges, clamped outside."""
    from ..null.scores import scores_of

    table = null.local_fdr
    s = np.clip(scores_of(z, null.spec[1]), -32, 32)
    i = np.minimum(np.floor(s * 128) + 4096, 8191).astype(int)
    return table[i] + (table[i + 1] - table[i]) * (s * 128 + 4096 - i)
