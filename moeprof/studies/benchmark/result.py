"""What SimpleBenchmark hands over: one configuration, and several against the first."""

from __future__ import annotations

import html
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np

from ...measure.machine import in_one_line
from ...show.console import printed
from ...show.tables import notebook_table, table
from .measure import Prompt, Seen, Times

if TYPE_CHECKING:
    import pandas
    from numpy.typing import NDArray


# Sentences, and tables: {heading: format}, rows.
Parts = Iterator[str | tuple[dict[str, str], Sequence[Sequence[Any]]]]

COVERAGE = 0.9  # of an interval of a median, at least
ENOUGH = 5  # rounds; fewer give no such interval
NAME = 18  # columns for a name beside the times
_SPEEDS = ("prefill_ms", "decode_ms")


def spread(values: Any) -> dict[str, float]:
    """{"median", "lower", "upper"}: the quartiles of some values."""
    lower, median, upper = np.percentile(values, [25, 50, 75])
    return {"median": float(median), "lower": float(lower), "upper": float(upper)}


def median_interval(values: Collection[float]) -> tuple[float, float]:
    """An interval that holds the median with at least 90 %, whatever the distribution is.

    Two of the sorted values (the sign test's interval); nan where there are fewer than 5.
    """
    values, count = sorted(values), len(values)
    place, outside = -1, 0.0
    while place + 1 < count:
        outside += 2 * math.comb(count, place + 1) / 2**count
        if outside > 1 - COVERAGE:
            break
        place += 1
    if place < 0:
        return math.nan, math.nan
    return float(values[place]), float(values[count - 1 - place])


@dataclass(eq=False, repr=False)
class Measurement:
    """One configuration, run on N texts in R rounds with S decode steps after each text.

    name : of the configuration
    prompts : of each text its category, text and ids
    seen : experts per token, loss and generated tokens of each text
    times : in seconds: prefill (R, N), decode (R, N, S)
    machine : a dict of the CPU, its threads and the versions of what ran
    """

    name: str
    prompts: list[Prompt]
    seen: Seen
    times: Times
    machine: dict[str, Any]

    @property
    def categories(self) -> list[str]:
        """Those of the texts, [] where they have none."""
        return [c for c in dict.fromkeys(p.category for p in self.prompts) if c is not None]

    @property
    def new_tokens(self) -> int:
        return self.times.decode.shape[2]

    def rounds(self, quantity: str) -> NDArray[np.float64]:
        """(R,) "prefill_ms" per text or "decode_ms" per token: the means of the rounds."""
        times = self.times.prefill if quantity == "prefill_ms" else self.times.decode
        return 1e3 * times.reshape(len(times), -1).mean(1)

    def quality(self, category: str | None = None) -> dict[str, float]:
        """Experts per token and loss, over all texts or those of a category.

        experts_per_token, and of it prefill and decode: means over tokens and layers;
        loss: nats per predicted token of the prompts, nan where they are single tokens.
        """
        mine = [category is None or p.category == category for p in self.prompts]
        tokens = np.array([[p.ids.shape[1], self.new_tokens] for p in self.prompts])[mine]
        experts = self.seen.experts[mine] * tokens
        prefill, decode = experts.sum(0) / tokens.sum(0)
        predicted = (tokens[:, 0] - 1).sum()
        nats = self.seen.nats[mine].sum()
        return {
            "experts_per_token": float(experts.sum() / tokens.sum()),
            "experts_per_token_prefill": float(prefill),
            "experts_per_token_decode": float(decode),
            "loss": float(nats / predicted) if predicted else math.nan,
        }

    def get_summary(self) -> dict[str, Any]:
        """A flat dict of Python values.

        config; texts, prompt_tokens, new_tokens (per text), repeats, threads; experts_per_token,
        …_prefill, …_decode and loss (nats per token), all of them also with _<category>;
        prefill_ms (per text) and decode_ms (per token), medians over the rounds, their quartiles
        as …_lower and …_upper; tokens_per_s (decode) and prefill_tokens_per_s.
        """
        total = sum(p.ids.shape[1] for p in self.prompts)
        summary = {
            "config": self.name,
            "texts": len(self.prompts),
            "prompt_tokens": total,
            "new_tokens": self.new_tokens,
            "repeats": len(self.times.prefill),
            "threads": self.machine["threads"],
            **self.quality(),
        }
        for category in self.categories:
            found = self.quality(category)
            summary |= {f"{name}_{category}": value for name, value in found.items()}
        for quantity in _SPEEDS:
            found = spread(self.rounds(quantity))
            summary |= {quantity: found.pop("median")}
            summary |= {f"{quantity}_{end}": value for end, value in found.items()}
        summary["tokens_per_s"] = 1e3 / summary["decode_ms"]
        summary["prefill_tokens_per_s"] = 1e3 * total / len(self.prompts) / summary["prefill_ms"]
        return summary

    def to_dict(self) -> dict[str, Any]:
        """The summary and everything that was measured, as JSON has it (nan included).

        prefill_seconds (R, N), decode_seconds (R, N, S), categories (N,), generated (N, S) token
        ids, machine.
        """
        return self.get_summary() | {
            "prefill_seconds": self.times.prefill.tolist(),
            "decode_seconds": self.times.decode.tolist(),
            "categories": [p.category for p in self.prompts],
            "generated": [list(tokens) for tokens in self.seen.generated],
            "machine": self.machine,
        }

    def _parts(self) -> Parts:
        own = self.get_summary()
        yield (
            f"{self.name}: {own['texts']} texts, {own['prompt_tokens']:,} tokens, "
            f"{own['new_tokens']} decode steps each, {own['repeats']} rounds; "
            f"{in_one_line(self.machine)}"
        )
        columns = {
            "texts": "{}",
            "experts/token": "{:.2f}",
            "prefill": "{:.2f}",
            "decode": "{:.2f}",
            "loss (nats)": "{:.4f}",
        }
        yield (
            columns,
            [
                (category or "all", *self.quality(category).values())
                for category in [None, *self.categories]
            ],
        )
        columns = {
            "time (median)": "{}",
            "ms": "{:.3f}",
            "lower quartile": "{:.3f}",
            "upper quartile": "{:.3f}",
            "tokens/s": "{:.1f}",
        }
        rates = own["prefill_tokens_per_s"], own["tokens_per_s"]
        names = "prefill of a text", "decode step"
        yield (
            columns,
            [
                (name, *spread(self.rounds(quantity)).values(), rate)
                for name, quantity, rate in zip(names, _SPEEDS, rates, strict=True)
            ],
        )

    def __repr__(self) -> str:
        return _text(self._parts())

    def _repr_html_(self) -> str:
        return _html(self._parts())


class BenchmarkComparison:
    """Configurations that ran in turn, each against the first of them.

    results : list of Measurement, with the times of the comparison
    """

    def __init__(self, results: Iterable[Measurement]) -> None:
        self.results = list(results)

    def to_frame(self) -> pandas.DataFrame:
        """A pandas frame with a row per configuration.

        Columns: those of `Measurement.get_summary`; prefill_ratio and decode_ratio: the median
        over the rounds of the configuration's time over that of the first in the same round
        (below 1: faster), …_low and …_high: an interval of that median of at least 90 %, nan
        with fewer than 5 rounds; …_differs: whether that interval leaves out 1, and the ratio is
        further from 1 than the quartiles of the first's own times are from each other: else it
        is within the noise; loss_change in nats per token; token_agreement: the share of
        generated tokens equal to the first's, position by position.
        """
        import pandas

        return pandas.DataFrame([self._row(result) for result in self.results])

    def _row(self, result: Measurement) -> dict[str, Any]:
        first = self.results[0]
        row = result.get_summary()
        for quantity in _SPEEDS:
            name = quantity.replace("ms", "ratio")
            ratios = result.rounds(quantity) / first.rounds(quantity)
            (low, high), ratio = median_interval(ratios), float(np.median(ratios))
            own = spread(first.rounds(quantity))
            noise = (own["upper"] - own["lower"]) / own["median"]
            differs = (low > 1 or high < 1) and abs(ratio - 1) > noise
            row |= {
                name: ratio,
                f"{name}_low": low,
                f"{name}_high": high,
                f"{name.replace('ratio', 'differs')}": differs,
            }
        row["loss_change"] = row["loss"] - first.quality()["loss"]
        same = np.equal(result.seen.generated, first.seen.generated)
        return row | {"token_agreement": float(same.mean())}

    def findings(self) -> list[str]:
        """A sentence for each configuration and time: what differs from the first's."""
        first, found = self.results[0], []
        repeats = len(first.times.prefill)
        if repeats < ENOUGH:
            return [
                f"With {repeats} rounds no difference can be told from noise: it takes "
                f"{ENOUGH} (repeats={ENOUGH})."
            ]
        for result in self.results[1:]:
            row = self._row(result)
            for what in ("prefill", "decode"):
                ratio, low, high = (row[f"{what}_ratio{end}"] for end in ("", "_low", "_high"))
                if row[f"{what}_differs"]:
                    words = f"{ratio:.3f} times the time of {first.name}"
                else:
                    words = f"no difference from {first.name} beyond the noise"
                found.append(f"{result.name}, {what}: {words} ({low:.3f} to {high:.3f}).")
        return found

    def _parts(self) -> Parts:
        first = self.results[0]
        yield (
            f"{len(first.prompts)} texts, {first.new_tokens} decode steps each, "
            f"{len(first.times.prefill)} rounds with all configurations in turn; "
            f"{in_one_line(first.machine)}"
        )
        rows = [self._row(result) for result in self.results]
        columns = {
            "config": "{}",
            "experts\nper token": "{:.2f}",
            "in\nprefill": "{:.2f}",
            "in\ndecode": "{:.2f}",
            "loss\n(nats)": "{:.4f}",
            "change": "{:+.4f}",
            "same\ntokens": "{:.0%}",
        }
        names = (
            "config",
            "experts_per_token",
            "experts_per_token_prefill",
            "experts_per_token_decode",
            "loss",
            "loss_change",
            "token_agreement",
        )
        # "+0.0000" for a loss that differs by rounding, not "-0.0000"
        shown = [row | {"loss_change": round(row["loss_change"], 4) + 0.0} for row in rows]
        yield columns, [[row[name] for name in names] for row in shown]
        for start in range(0, len(first.categories), 5):
            some = first.categories[start : start + 5]
            columns = {"experts per token": "{}"} | {category: "{:.2f}" for category in some}
            some_names = ["config", *(f"experts_per_token_{category}" for category in some)]
            yield columns, [[row[name] for name in some_names] for row in rows]
        columns = {
            "config": "{}",
            "prefill\nms": "{}",
            "times the first's\n(interval)": "{}",
            "decode step\nms": "{}",
            "times the first's \n(interval)": "{}",
            "tokens\nper s": "{:.1f}",
        }
        yield (
            columns,
            [
                (
                    fill(row["config"], NAME),
                    *_cells(row, "prefill"),
                    *_cells(row, "decode"),
                    row["tokens_per_s"],
                )
                for row in rows
            ],
        )
        yield (
            "ms: the median ± half of the distance between the quartiles. times the first's: of "
            "the same round, the median and an interval of at least 90 %; ~: within the noise. "
            "same tokens: generated ones equal to the first's."
        )
        yield "\n".join(self.findings())

    def __repr__(self) -> str:
        return _text(self._parts())

    def _repr_html_(self) -> str:
        return _html(self._parts())


def _cells(row: Mapping[str, Any], what: str) -> tuple[str, str]:
    """ "12.3 ± 0.2" ms and "0.970 0.951-0.993 ~" of one configuration."""
    ms, lower, upper = (row[f"{what}_ms{end}"] for end in ("", "_lower", "_upper"))
    ratio, low, high = (row[f"{what}_ratio{end}"] for end in ("", "_low", "_high"))
    interval = "" if math.isnan(low) or low == high else f" {low:.3f}-{high:.3f}"
    noise = " ~" if interval and not row[f"{what}_differs"] else ""
    return f"{ms:.4g} ± {(upper - lower) / 2:.2g}", f"{ratio:.3f}{interval}{noise}"


def _text(parts: Parts) -> str:
    """Sentences and tables (columns, rows) as plain text of at most 100 columns."""
    return printed(part if isinstance(part, str) else table(*part) for part in parts)


def _html(parts: Parts) -> str:
    made = []
    for part in parts:
        if isinstance(part, str):
            made.append("<p>" + html.escape(part).replace("\n", "<br>") + "</p>")
            continue
        columns, rows = part
        cells = [
            [form.format(v) for form, v in zip(columns.values(), row, strict=True)] for row in rows
        ]
        heads = [" ".join(head.split()) for head in columns]
        made.append(notebook_table(heads, cells))
    return "\n".join(made)
