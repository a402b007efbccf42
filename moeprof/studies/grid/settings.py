"""`Grid`: what is run, as keyword arguments or as a TOML file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from ...checks import near, nearest
from ...files import write_whole
from ...models.load import check_model
from ...null import Null
from ...routers import REGISTRY
from ...routers.base import own_fields, parameters_of
from ...texts.documents import read_documents
from ...texts.prompts import read_prompts
from ...texts.windows import HELDOUT_TOKENS
from ..source import DEMO
from .lines import Lines
from .planned import RESERVED, SIZES, Planned, combinations, experts_of, plan

SHIPPED = Path(__file__).parent / "shipped"
TEXT = "shipped"
FITTED = ("trimmed", "efron")  # nulls that a run fits, or has for the demo model
NULLS = (*FITTED, "normal", "softmax")


class _Rule(NamedTuple):
    """What a setting may be: in words, and as a function."""

    expected: str
    holds: Callable[[Any], bool]


def _words(*words: str | int) -> _Rule:
    expected = "one of " + ", ".join(map(repr, words))
    return _Rule(expected, lambda v: any(type(v) is type(w) and v == w for w in words))


def _whole(low: int, high: int) -> _Rule:
    return _Rule(f"an integer from {low} to {high}", lambda v: type(v) is int and low <= v <= high)


_TEXT = _Rule("a text", lambda v: isinstance(v, str))
_NAME = _Rule("a text that isn't empty", lambda v: isinstance(v, str) and v.strip() != "")
_TABLE = _Rule("a table", lambda v: isinstance(v, Mapping))
_ANY = _Rule("", lambda v: True)


def _is_share(value: Any) -> bool:
    try:
        return isinstance(value, str) and experts_of(value, 1) > 0
    except ValueError:
        return False


_SHARES = '"own", "k/2", "3k/4" … for the model\'s own k or a share of it'
_SIZE = _Rule(
    f"a whole number of experts, or {_SHARES}",
    lambda v: _is_share(v) or (type(v) is int and 1 <= v < 10**9),
)
_BUDGET = _Rule(
    f"a number of experts, or {_SHARES}",
    lambda v: _is_share(v) or (type(v) in (int, float) and 0 < v < 10**9),
)


def _setting(default: Any, rule: _Rule) -> Any:
    """A field; where the default is a tuple it is a list, and one value stands for a list of it."""
    return field(default=default, metadata={"rule": rule})


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Routers, and the models and texts that they are run on.

    Every combination of a model, bits, a text and a seed is run, with every configuration of
    `routers` in each; the model's own top-k is always among these. Where a list is expected, one
    value stands for a list of it. Files are looked for from where the command is run.

    Parameters
    ----------
    name, about : str
        What reports call it, and what it is for.
    models : list of str
        Folders or hub ids; "demo" is the demo model.
    dtype : str
        "float32", "bfloat16" or "float16".
    bits : list
        Of the experts' weights: 8, 4, or "none" for those of the model.
    texts : list of str
        Held-out text: files as `moeprof sweep --text` takes them, or "shipped".
    prompts : str
        A file of prompts, or "shipped" for the twelve of the demo model.
    samples : int or None
        Take so many prompts from the text itself in place of `prompts`: passages of 200
        characters, spread over its domains and documents.
    tokens : int
        Held-out tokens that a configuration is evaluated on, about.
    new_tokens : int
        Tokens that are generated after every prompt.
    nulls : list of str
        For routers on p-values: "trimmed" or "efron", fitted to shipped calibration text
        (the demo model's own are there); "normal" or "softmax", which need no fit; or a file of
        `moeprof calibrate`.
    seeds : list of int
        Each chooses other passages of the texts.
    repeats : int
        Rounds in which the speed of all configurations is taken in turn; 0 for none.
    routers : list of dict
        Of each router its name under "router", and under its parameters' names a value or a list
        of values, whose combinations are taken. Numbers of experts can be "own", "k/2" or "3k/4"
        for a share of the model's own k. "budgets" in place of the main parameter: the experts
        per token that it is set to. "null": in place of `nulls`.

    Raises
    ------
    ValueError
        For an unknown key, router, parameter or value: named, with the nearest that there is;
        of a file with its line.

    Example
    -------
    >>> grid = Grid(routers=[{"router": "bh", "alpha": [0.1, 0.2], "max_k": "own"}])
    >>> [one.name for one in grid.configurations(64, 8).configurations]
    ['topk_8_baseline', 'bh_k8_a010', 'bh_k8_a020']
    """

    name: str = _setting("grid", _NAME)
    about: str = _setting("", _TEXT)
    models: Sequence[str] = _setting((DEMO,), _NAME)
    dtype: str = _setting("float32", _words("float32", "bfloat16", "float16"))
    bits: Sequence[int | str] = _setting(("none",), _words("none", 8, 4))
    texts: Sequence[str] = _setting((TEXT,), _NAME)
    prompts: str = _setting(TEXT, _NAME)
    samples: int | None = _setting(None, _whole(1, 10**6))
    tokens: int = _setting(HELDOUT_TOKENS, _whole(2, 10**9))
    new_tokens: int = _setting(20, _whole(1, 10**6))
    nulls: Sequence[str] = _setting(("trimmed",), _NAME)
    seeds: Sequence[int] = _setting((0,), _whole(0, 2**32 - 1))
    repeats: int = _setting(3, _whole(0, 1000))
    routers: Sequence[Mapping[str, Any]] = _setting((), _TABLE)
    lines: Lines | None = field(default=None, repr=False, compare=False)  # of its file, for errors

    def __post_init__(self) -> None:
        for f in _SETTINGS:
            value = getattr(self, f.name)
            if isinstance(f.default, tuple):
                value = _listed(value)
                if not value and f.default:
                    raise self.error([f.name], f"{f.name}: expected at least one, got none")
                for place, one in enumerate(value):
                    self._check([f.name, place], f.name, one, f.metadata["rule"])
                object.__setattr__(self, f.name, value)
            elif value is not f.default:
                self._check([f.name], f.name, value, f.metadata["rule"])
        tables = tuple(self._table(place, table) for place, table in enumerate(self.routers))
        object.__setattr__(self, "routers", tables)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Grid:
        """The grid of a TOML file, or of one that ships with moeprof, by its name.

        ValueError or OSError in one line, with the file and the line, for what is no grid.
        """
        path, shipped = Path(path), {file.stem: file for file in SHIPPED.glob("*.toml")}
        if not path.exists():
            if str(path) not in shipped:
                raise FileNotFoundError(
                    f"grid {path}: no such file, and none of this name ships with moeprof; "
                    + nearest(str(path), shipped)
                )
            path = shipped[str(path)]
        lines, content = Lines.read(str(path))
        known = [f.name for f in _SETTINGS]
        for key in content:
            if key not in known:
                raise ValueError(f"{lines.place([key])}: no key {key!r}; {nearest(key, known)}")
        return cls(**content, lines=lines)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write it as a TOML file, which `read` takes."""
        write_whole(path, self.to_toml().encode())

    def to_toml(self) -> str:
        """What differs from the defaults, as TOML."""
        values = {f.name: getattr(self, f.name) for f in _SETTINGS if f.name != "routers"}
        defaults = {f.name: f.default for f in _SETTINGS}
        lines = [f"{k} = {_toml(v)}" for k, v in values.items() if v != defaults[k]]
        for table in self.routers:
            lines += ["", "[[routers]]", *(f"{k} = {_toml(v)}" for k, v in table.items())]
        return "\n".join(lines) + "\n"

    def configurations(self, num_experts: int, top_k: int) -> Planned:
        """What is run on a model with so many experts, of which its own routers take top_k.

        Values that the model can't have, such as a max_k above its experts, are left out; the
        result says so. `print` shows it as a table.
        """
        return plan(self.routers, self.nulls, num_experts, top_k)

    def check(self) -> None:
        """ValueError or OSError, with the file's line, unless all it names is there: models,
        texts, prompts, nulls."""
        for place, model in enumerate(self.models):
            if model != DEMO:
                self._look(["models", place], model, (DEMO, *_in_cache()), check_model)
        for place, text in enumerate(self.texts):
            if text != TEXT:
                self._look(["texts", place], text, (TEXT,), lambda path: read_documents([path]))
        if self.prompts != TEXT:
            self._look(["prompts"], self.prompts, (TEXT,), read_prompts)
        for keys, null in self.named_nulls():
            if null not in NULLS:
                self._look(keys, null, NULLS, Null.load)

    def error(
        self, keys: Sequence[str | int], text: str, kind: type[Exception] = ValueError
    ) -> Exception:
        """An error about the value under these keys, which says where it stands."""
        if self.lines is not None:
            return kind(f"{self.lines.place(keys)}: {text}")
        table = f", routers[{keys[1]}]" if keys[0] == "routers" and len(keys) > 1 else ""
        return kind(f"Grid{table}: {text}")

    # ---- checks ----

    def _check(self, keys: Sequence[str | int], name: str, value: Any, rule: _Rule) -> None:
        if not rule.holds(value):
            raise self.error(keys, f"{name}: expected {rule.expected}, got {value!r}")

    def _table(self, place: int, table: Mapping[str, Any]) -> dict[str, Any]:
        """One of `routers`, each value of it a tuple."""
        name = table.get("router")
        if name is None:
            raise self.error(["routers", place], f"no key 'router': expected {_one_of(REGISTRY)}")
        if name not in REGISTRY:
            hint = nearest(str(name), REGISTRY)
            raise self.error(["routers", place, "router"], f"no router {name!r}; {hint}")
        cls = REGISTRY[name]
        fixed = [f.name for f in own_fields(cls) if not f.metadata]  # a value for each expert
        known = [f.name for f in parameters_of(cls) if f.name not in fixed]
        found: dict[str, Any] = {"router": name}
        for key, value in table.items():
            keys: list[str | int] = ["routers", place, key]
            if key not in (*known, *RESERVED):
                hint = nearest(key, (*known, *RESERVED))
                raise self.error(keys, f"{name} takes no {key!r}; {hint}")
            if key == "router":
                continue
            found[key] = _listed(value)
            if not found[key]:
                raise self.error(keys, f"{key}: expected at least one value, got none")
            for number, one in enumerate(found[key]):
                rule = {"null": _NAME, "budgets": _BUDGET}.get(key, _SIZE if key in SIZES else _ANY)
                self._check([*keys, number], key, one, rule)
        if "budgets" in found and cls.main in found:
            text = f"{cls.main}: it is what the budgets set; leave one of the two out"
            raise self.error(["routers", place, cls.main], text)
        if "null" in found and not cls.wants_null:
            raise self.error(["routers", place, "null"], f"null: {name} has no use for one")
        self._fits(place, found)
        return found

    def _fits(self, place: int, table: Mapping[str, Any]) -> None:
        """Each combination of the values makes a router, which can use its nulls."""
        cls = REGISTRY[table["router"]]
        plain = {key: value for key, value in table.items() if key not in SIZES}
        for values in combinations(plain):
            try:
                router: Any = cls(**values)
            except ValueError as error:
                key = str(error).partition(":")[0]
                number = table[key].index(values[key]) if key in values else 0
                raise self.error(["routers", place, key, number], str(error)) from None
            nulls = table.get("null", self.nulls)
            if router.wants_null and router.null_kind == "efron" and "trimmed" in nulls:
                given = "null" if "null" in table else "router"
                text = f'{router.name} can\'t use a trimmed null: give it null = "efron"'
                raise self.error(["routers", place, given], text)

    def named_nulls(self) -> Iterable[tuple[list[str | int], str]]:
        """Each null that is named, and under which keys."""
        for place, null in enumerate(self.nulls):
            yield ["nulls", place], null
        for at, table in enumerate(self.routers):
            for place, null in enumerate(table.get("null", ())):
                yield ["routers", at, "null", place], null

    def _look(
        self,
        keys: Sequence[str | int],
        given: str,
        words: Sequence[str],
        read: Callable[[str], object],
    ) -> None:
        """What reading it raises, with its place and the nearest that there is."""
        try:
            read(given)
        except (ValueError, OSError) as error:
            beside = map(str, Path(given).parent.glob("*"))
            found = near(given, [*words, *beside])
            hint = f"; the nearest is {found[0]!r}" if found and found[0] != given else ""
            kind = OSError if isinstance(error, OSError) else ValueError
            text = f"{next(k for k in reversed(keys) if isinstance(k, str))}: {error}{hint}"
            raise self.error(keys, text, kind) from None


_SETTINGS = [f for f in fields(Grid) if "rule" in f.metadata]


def _listed(value: Any) -> tuple[Any, ...]:
    """One value as a list of it; a value that is there twice, once."""
    values = value if isinstance(value, list | tuple) else [value]
    return tuple(one for place, one in enumerate(values) if one not in values[:place])


def _one_of(words: Iterable[str]) -> str:
    return f"one of {', '.join(sorted(words))}"


def _in_cache() -> list[str]:
    """The ids of the models that the cache of the hub has."""
    from huggingface_hub import constants

    found = Path(constants.HF_HUB_CACHE).glob("models--*--*")
    return [folder.name.removeprefix("models--").replace("--", "/", 1) for folder in found]


def _toml(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value) if isinstance(value, int) else repr(float(value))
