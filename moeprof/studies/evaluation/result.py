"""An evaluation as it is handed over: numbers, text, a figure, files."""

from __future__ import annotations

import io
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ...files import as_csv, as_json, check_folder, printable, write_whole
from ...measure.bootstrap import MORE_DOCUMENTS, are_few
from ...measure.machine import in_one_line
from ...show.console import fill, printed
from ...show.tables import fine, markdown, text_table, with_interval
from .statistics import Row, results

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure


NAME = "evaluation"
MOST_VALUES, MOST_PAIRS = 6, 15  # shown on a console; all of them are in the files


class View(NamedTuple):
    """A table of texts, the title of it and how to read it."""

    title: str
    note: str
    columns: list[str]
    rows: list[list[str]]


class Evaluated:
    """What `moeprof.evaluate` measured.

    documents : list of dict: domain, name, tokens and bytes of what was read, complexity
    measured : {configuration: a dict of its sums by document}
    facts : dict of model, protocol, nulls, seed and machine, and maybe the command
    """

    def __init__(
        self,
        documents: Sequence[Mapping[str, Any]],
        measured: Mapping[str, Mapping[str, Any]],
        facts: Mapping[str, Any],
    ) -> None:
        self.documents, self.measured, self.facts = list(documents), dict(measured), dict(facts)

    @cached_property
    def _results(self) -> tuple[list[Row], list[Row]]:
        ran = {name: one for name, one in self.measured.items() if "error" not in one}
        draws, seed = self.facts["draws"], self.facts["seed"]
        return results(self.documents, ran, draws=draws, seed=seed)

    @property
    def rows(self) -> list[Row]:
        """A dict for each configuration and slice: see `to_frame`."""
        return self._results[0]

    @property
    def pairs(self) -> list[Row]:
        """A dict for each two configurations.

        first, second; bits, bits_low, bits_high: how many bits per byte the second has above the
        first, with a 95 % interval by bootstrap over documents; p: of flipping the signs of the
        documents' differences; p_holm: the same, adjusted for the number of pairs.
        """
        return self._results[1]

    def to_frame(self) -> pandas.DataFrame:
        """A pandas table with a row for each configuration and slice.

        Columns
        -------
        config; slice: "all", "domain" or "complexity"; value: which one; documents; tokens: scored;
        perplexity, bits_per_byte, bits_above_own, kl (nats per token, from the model's own
        routing), agreement (share of tokens with the same most probable next token), experts (per
        token): each with _low and _high, a 95 % interval by bootstrap over documents.
        """
        import pandas

        return pandas.DataFrame(self.rows)

    def figure(self) -> Figure:
        """A matplotlib Figure: bits per byte above the model's own routing, against experts."""
        from .plots import figure

        routers = {name: str(one.get("router", "")) for name, one in self.measured.items()}
        one_k = r"TopK\(.*\bk=\d+\)"  # one for all layers
        return figure(self.rows, [n for n, words in routers.items() if re.fullmatch(one_k, words)])

    def summary(self) -> str:
        """What was done and what came out, as text for a screen, of at most 100 columns."""
        parts: list[Any] = [fill(line) for line in self.findings()]
        for view in self.views(MOST_VALUES, MOST_PAIRS):
            parts += [f"\n{view.title}", fill(view.note), text_table(view.columns, view.rows)]
        return printed(parts)

    def report(self) -> str:
        """The same in Markdown, with all slices and pairs."""
        parts = [f"# Evaluation of {self.facts['model']}"]
        parts.append("\n".join(f"- {line}" for line in self.findings()))
        parts.append(f"![What each configuration costs]({NAME}.png)")
        for view in self.views():
            table = markdown(view.columns, view.rows)
            parts.append(f"## {view.title}\n\n{view.note}\n\n{table}")
        parts.append("## How it was run\n\n" + "\n".join(f"- {line}" for line in self._run()))
        return printable("\n\n".join(parts) + "\n")

    def save(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write evaluation.json, .csv, .png and evaluation_report.md; returns their paths.

        Each appears whole or not at all. OSError where the folder can't be written.
        """
        folder = Path(folder)
        check_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
        content = {
            "facts": self.facts,
            "documents": self.documents,
            "measured": self.measured,
            "results": self.rows,
            "pairs": self.pairs,
        }
        image = io.BytesIO()
        self.figure().savefig(image, format="png")
        text = json.dumps(as_json(content), indent=1, ensure_ascii=False, allow_nan=False)
        written = {
            f"{NAME}.json": text.encode() + b"\n",
            f"{NAME}.csv": as_csv(self.to_frame()),
            f"{NAME}.png": image.getvalue(),
            f"{NAME}_report.md": self.report().encode(),
        }
        for name, data in written.items():
            write_whole(folder / name, data)
        return [folder / name for name in written]

    def __repr__(self) -> str:
        count = len(self.measured) - 1
        return f"<moeprof Evaluated: {printable(self.facts['model'])}, {count} routers>"

    # ---- in words ----

    def findings(self) -> list[str]:
        """What was read and how, in sentences, and what couldn't be run."""
        facts, documents = self.facts, self.documents
        scored, asked = self.rows[0]["tokens"], facts["tokens_asked"]
        all_of_it = "" if scored >= 0.9 * asked else f" (all there are; {asked:,} were asked for)"
        domains = [document["domain"] for document in documents]
        found = [
            f"{facts['model']} ({facts['dtype']}), {_count(scored, 'token')} scored{all_of_it} of "
            f"{_count(len(documents), 'document')} in {_count(len(set(domains)), 'domain')}.",
            facts["protocol"]["words"],
            "Intervals are 95 % ones by bootstrap over documents."
            if len(documents) > 1
            else "The text is one document, so nothing has an interval or a test.",
        ]
        if are_few(len(documents), domains):
            found.append(
                f"With {len(documents)} documents p can't be below {2 / 2 ** len(documents):.2g}, "
                f"and intervals are too narrow. {MORE_DOCUMENTS}"
            )
        for name, one in self.measured.items():
            if "error" in one:
                found.append(f"{name} was not run: {one['error']}.")
            elif "value" in one:
                short = f" ({one['note']})" if one["note"] else ""
                found.append(
                    f"{name}: {one['parameter']} is {one['value']}, set on shipped calibration "
                    f"text, English prose and code, where it takes {one['average_k']:.2f} experts "
                    f"per token{short}."
                )
        return found

    def _run(self) -> Iterator[str]:
        """Command, nulls, seed, machine and versions."""
        facts, machine = self.facts, self.facts["machine"]
        if "command" in facts:
            yield f"`{facts['command']}`"
        nulls: dict[str, list[str]] = {}
        for name, words in facts["nulls"].items():
            nulls.setdefault(words, []).append(name)
        for words, names in nulls.items():
            yield f"Null of {', '.join(names)}: {words}."
        versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
        yield (
            f"Machine: {in_one_line(machine)}; norm {facts['norm']}; seed {facts['seed']}; "
            f"{facts['draws']:,} bootstrap draws; {versions}; finished {machine['started']}."
        )

    def views(self, values: int | None = None, pairs: int | None = None) -> Iterator[View]:
        """The tables; values, pairs: at most so many columns of slices and rows of pairs."""
        rows = [row for row in self.rows if row["slice"] == "all"]
        yield View(
            "All documents",
            "Above own: thousandths of a bit per byte above the model's own routing. KL: from its "
            "predictions, in thousandths of a nat per token. Agree: % of tokens with the same most "
            "probable next token. [95 % interval]",
            ["configuration", "experts", "perpl.", "bits/B", "above own", "KL", "agree"],
            [
                [
                    row["config"],
                    f"{row['experts']:.2f}",
                    f"{row['perplexity']:.2f}",
                    f"{row['bits_per_byte']:.4f}",
                    "" if place == 0 else _interval(row, "bits_above_own", "+.1f", 1000),
                    "" if place == 0 else _interval(row, "kl", ".1f", 1000),
                    "" if place == 0 else f"{100 * row['agreement']:.1f}",
                ]
                for place, row in enumerate(rows)
            ],
        )
        for kind in ("domain", "complexity"):
            if view := self._by(kind, values):
                yield view
        if self.pairs:
            yield self._paired(pairs)

    def _by(self, kind: str, most: int | None) -> View | None:
        rows = [row for row in self.rows if row["slice"] == kind]
        shown = list(dict.fromkeys(row["value"] for row in rows))
        if not shown:
            return None
        left = 0 if most is None else max(len(shown) - most, 0)
        shown = shown[: len(shown) - left]
        above = fine(*(row["bits_above_own"] for row in rows))
        cells: dict[str, list[str]] = {}
        for row in rows:
            if row["value"] in shown:
                own = row["config"] == rows[0]["config"]
                text = f"{row['bits_per_byte']:.4f}" if own else f"{row['bits_above_own']:{above}}"
                cells.setdefault(row["config"], []).append(text)
        more = f" {left} more, and all intervals: in the files." if left else ""
        return View(
            f"By {kind}",
            f"Bits per byte of the model's own routing, and bits per byte above it.{more}",
            ["configuration", *(printable(str(value)) for value in shown)],
            [[name, *values] for name, values in cells.items()],
        )

    def _paired(self, most: int | None) -> View:
        left = 0 if most is None else max(len(self.pairs) - most, 0)
        more = f" {_count(left, 'more pair')}: in the files." if left else ""
        least = 2 / 2 ** len(self.documents)
        if least > 0.05:
            more = f" With {len(self.documents)} documents no p can be below {least:.2g}.{more}"
        return View(
            "Pairs",
            "Bits per byte of the second above the first, document by document. p: how often "
            "random signs of the documents' differences give a sum as far from 0 (two-sided); "
            f"Holm: adjusted for {_count(len(self.pairs), 'pair')}.{more}",
            ["first", "second", "difference", "p", "Holm"],
            [
                [
                    pair["first"],
                    pair["second"],
                    _interval(pair, "bits", "+.4f"),
                    f"{pair['p']:.2g}",
                    f"{pair['p_holm']:.2g}",
                ]
                for pair in self.pairs[: len(self.pairs) - left]
            ],
        )


def _interval(row: Mapping[str, Any], name: str, form: str, times: float = 1) -> str:
    """ "+0.0213 [+0.0190, +0.0230]", the value alone where there is no interval."""
    fields = (row[name + end] for end in ("", "_low", "_high"))
    value, low, high = (math.nan if field is None else times * field for field in fields)
    return with_interval(value, low, high, fine(value, low, high, form=form))


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"
