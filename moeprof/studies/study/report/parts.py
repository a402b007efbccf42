"""A section for each part: what it found, its tables and figures, its files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...comparison.findings import INTERVALS, View, findings_by_subject
from ...comparison.plots import figure as compare_figure
from ...comparison.report import ALLOCATION, BYTES, LEGEND, bytes_rows, detail_rows, effect_rows
from ...diagnosis.views import findings as diagnosis_findings
from ...diagnosis.views import views as diagnosis_views
from ...grid.planned import written
from ...grid.rows import SETTING, by_setting
from ...sweep import report as sweep_report
from ...sweep.compared import interval, with_band
from ...sweep.merged import merged, same_results
from ...sweep.plots import figure as sweep_figure
from .content import Drawn, Section, Sentence, Shown, plain_table
from .pareto import BITS, drawn, of_grid, said, table

if TYPE_CHECKING:
    from collections.abc import Callable

    from .results import Results


SHOWN = (".html", ".md", ".csv", ".json", ".npz", ".safetensors")  # files that are linked
# Columns that make the tables wider than a screen; the parts' own reports have them.
SWEEP_LEFT_OUT = ("reduction %", "Δ perplexity")
COMPARE_LEFT_OUT = ("against shuffled-k",)
PROFILE_FIGURES = ("load", "k", "roofline", "cache")  # all others are on the profile's own page
WHOM_TO_FOLLOW = (
    "Where this names another router than the comparison does, follow the comparison: it sets "
    "every router to the same budget, layer by layer, while the settings here take more or fewer "
    "experts than the budget."
)
# What a finding of the profile is from, by words of it; the first that it has decides.
PROFILE_PLACES = {
    "specialised by domain": "profile-by-domain",
    "LRU cache": "profile-cache",
    "bandwidth": "profile-roofline",
    "More than 100 %": "profile-roofline",
    "Few tokens": "profile-load",
    "balance": "profile-load",
    "Never selected": "profile-load",
    "Counted": "profile-by-layer",
    "FLOPs": "profile-by-layer",
}
# What a finding of the diagnosis is from, as for the profile.
DIAGNOSIS_PLACES = {
    "δ0": "diagnose-fdp",
    "taken out alone": "diagnose-fdp",
    "Storey": "diagnose-0",
    "min_k decides": "diagnose-2",
}
# {figure: (title, key of its table, whether it needs white paper)}
DIAGNOSIS_FIGURES = {
    "p_values": ("The p-values by layer", "diagnose-0", False),
    "selection": ("How many experts BH selects, and where its limits decide", "diagnose-2", True),
    "ablation": ("What the selected experts did for the loss", "diagnose-fdp", False),
}


def sections(results: Results, folder: Path) -> Iterator[Section]:
    """In the order of the report."""
    makers: dict[str, tuple[str, Any, Callable[[Results], Section]]] = {
        "calibrate": ("Calibrate: the nulls", results.nulls, _calibrate),
        "profile": ("Profile: what the model does", results.profile, _profile),
        "sweep": ("Sweep: BH by alpha and max_k, and static top-k", results.sweep, _sweep),
        "compare": ("Compare: routers at equal experts", results.compare, _compare),
        "diagnose": ("Diagnose: do the p-values hold?", results.diagnose, _diagnose),
        "evaluate": ("Evaluate: quality by kind of text", results.evaluate, _evaluate),
        "grid": ("Grid", results.grid, _grid),
    }
    asked = {one["part"] for one in results.facts["parts"]}
    for part, (title, result, make) in makers.items():
        links = _files(folder, part)
        if result:
            section = make(results)
        elif part not in asked and (part == "grid" or asked == {"grid"}):
            continue
        else:
            said = [Sentence(results.missing(part))]
            if part in asked and links:
                said.append(Sentence("What it had finished is in its own files."))
            section = Section(title, said)
        yield section._replace(title=title, links=links)


def _files(folder: Path, part: str) -> list[tuple[str, str]]:
    """The part's own files, those to read before those to load."""
    paths = [path for path in (folder / part).glob("*") if path.suffix in SHOWN]
    paths.sort(key=lambda path: (SHOWN.index(path.suffix), path.name))
    return [(path.name, f"{part}/{path.name}") for path in paths]


def _without(
    found: tuple[list[str], list[list[str]]], *names: str
) -> tuple[list[str], list[list[str]]]:
    """(head, rows) without these columns."""
    head, rows = found
    kept = [place for place, name in enumerate(head) if name not in names]
    return [head[i] for i in kept], [[row[i] for i in kept] for row in rows]


def _from(lines: Iterable[str], to: str) -> list[Sentence]:
    return [Sentence(line, to) for line in lines]


# ---- calibrate, profile ----


def _calibrate(results: Results) -> Section:
    rows = [
        [
            kind,
            null.score,
            f"{null.tokens:,}",
            str(len(null)),
            str(null.counts.shape[1]),
            f"{null.r_high}, {null.r_low}",
            null.text_digest[:12],
        ]
        for kind, null in results.nulls.items()
    ]
    head = ["null", "score", "tokens", "layers", "experts", "left out", "text"]
    note = (
        "What scores an expert has that a token doesn't need: p-values come from it. Left out: the "
        "highest and lowest scores of each token. Text: the first digits of its digest."
    )
    made = plain_table("Nulls", note, head, rows, 2)
    lines = [f"{null.describe()}." for null in results.nulls.values()]
    return Section("", _from(lines, "nulls"), [Shown("nulls", made)])


def _profile(results: Results) -> Section:
    from ....profile.findings import findings
    from ....profile.page import FIGURES
    from ....profile.plots import instead
    from ....profile.tables import tables

    profile = results.profile
    assert profile is not None
    shown: list[Shown] = []
    for made in tables(profile):
        key = f"profile-{made.title.lower().replace(' ', '-')}"
        again = any(key == other.key for other in shown)  # a table for every two phases
        shown.append(Shown(f"{key}-{len(shown)}" if again else key, made))
    in_words = instead(profile)
    figures = [
        Drawn(f"profile-{name}", *FIGURES[name], profile.plot(name), "profile-by-layer")
        for name in PROFILE_FIGURES
        if name in profile.figures and name not in in_words
    ]
    sentences = [
        Sentence(line, next((to for words, to in PROFILE_PLACES.items() if words in line), ""))
        for line in findings(profile)
    ]
    sentences += _from(
        (in_words[name] for name in PROFILE_FIGURES if name in in_words), "profile-by-layer"
    )
    return Section("", sentences, shown, figures)


# ---- sweep, compare ----


def _sweep(results: Results) -> Section:
    run = results.sweep
    assert run is not None
    groups = merged(run["results"])
    sentences = [Sentence(item["head"], "sweep-beside") for item in run.get("advice", ())]
    if sentences and results.compare is not None and results.compare["cells"]:
        sentences.insert(0, Sentence(WHOM_TO_FOLLOW))
    sentences += _from([*sweep_report.findings(run), *same_results(groups)], "sweep-settings")
    note = f"{sweep_report.legend(run)} {sweep_report.beside_legend(run)}"
    grid = plain_table(
        "BH by alpha and max_k", note, *_without(sweep_report.result_rows(groups), *SWEEP_LEFT_OUT)
    )
    shown = [Shown("sweep-settings", grid)]
    head, rows = sweep_report.beside_rows(run)
    if rows:
        title = "Static top-k and routers set by budget"
        beside = plain_table(title, "On the held-out text.", head, rows, 2)
        shown.append(Shown("sweep-beside", beside))
    figure = Drawn(
        "sweep-figure",
        "What each configuration used, and what that cost",
        "",
        sweep_figure(run["results"], run),
        "sweep-settings",
        paper=True,
    )
    return Section("", sentences, shown, [figure])


def _compare(results: Results) -> Section:
    run = results.compare
    assert run is not None
    view = View(run)
    if not run["cells"]:
        return Section("", [Sentence("Only static top-k was measured before it was interrupted.")])
    first = next(iter(view.tables))
    places = {"effects": f"compare-{first}", "bytes": "bytes", "reach": f"compare-{first}"}
    places["speed"] = f"compare-{first}-{view.budgets(first)[0]}"
    sentences = [
        Sentence(line, places[subject])
        for subject, lines in findings_by_subject(run).items()
        for line in lines
    ]
    shown = [Shown(key, made) for key, made in _compare_tables(view)]
    figure = Drawn(
        "compare-figure",
        "Routers at equal experts, and skipping beside shrinking",
        INTERVALS,
        compare_figure(run),
        f"compare-{first}",
    )
    return Section("", sentences, shown, [figure])


def _compare_tables(view: View) -> Iterator[tuple[str, Any]]:
    for name, plan in view.tables.items():
        for allocation in plan["allocations"]:
            if found := effect_rows(view, name, allocation):
                key = f"compare-{name}" + ("" if allocation == "equal" else f"-{allocation}")
                title = f"{name.capitalize()}, at most {plan['max_k']} experts a token: "
                title += ALLOCATION[allocation]
                note = LEGEND if allocation == "equal" else "As the table before."
                yield key, plain_table(title, note, *found)
        for budget in view.budgets(name):
            if found := detail_rows(view, name, budget):
                title = f"{name.capitalize()}: all measures at {budget} experts in every layer"
                note = "Static top-k, then the best first."
                made = plain_table(title, note, *_without(found, *COMPARE_LEFT_OUT))
                yield f"compare-{name}-{budget}", made
    if found := bytes_rows(view):
        yield "bytes", plain_table("Skip experts or shrink them", BYTES, *found)


# ---- diagnose, evaluate, grid ----


def _diagnose(results: Results) -> Section:
    diagnosis = results.diagnose
    assert diagnosis is not None
    shown = []
    for number, view in enumerate(diagnosis_views(diagnosis)):
        key = "diagnose-fdp" if view.title.startswith("False discoveries") else f"diagnose-{number}"
        head, rows = list(map(str, view.frame.columns)), view.frame.astype(str).to_numpy().tolist()
        shown.append(Shown(key, plain_table(view.title, view.note, head, rows)))
    figures = []
    for name in diagnosis.figures:
        title, of, paper = DIAGNOSIS_FIGURES[name]
        figure = diagnosis.figure(name)
        figures.append(Drawn(f"diagnose-{name}", title, "", figure, of, paper))
    sentences = [
        Sentence(
            line,
            next((to for words, to in DIAGNOSIS_PLACES.items() if words in line), ""),
        )
        for line in diagnosis_findings(diagnosis)
    ]
    return Section("", sentences, shown, figures)


def _evaluate(results: Results) -> Section:
    found = results.evaluate
    assert found is not None
    shown = [
        Shown(f"evaluate-{n}", plain_table(view.title, view.note, view.columns, view.rows))
        for n, view in enumerate(found.views())
    ]
    figure = Drawn(
        "evaluate-figure",
        "What each configuration costs",
        "",
        found.figure(),
        "evaluate-0",
    )
    return Section("", _from(found.findings(), "evaluate-0"), shown, [figure])


def _grid(results: Results) -> Section:
    rows = results.grid
    assert rows is not None
    failed = [row for row in rows if row["error"]]
    sentences = [
        Sentence(f"{len(rows)} rows, {len(failed)} of which could not be run.", "grid"),
        *(Sentence(f"{row['configuration']} was not run: {row['error']}.") for row in failed),
    ]
    head = [*SETTING, "configuration", "parameters", "experts", "MB", "perplexity"]
    head += ["bits/B above own", "beside static", "tokens/s"]
    several = any(row["bits_above_own_low"] is not None for row in rows)
    note = "In brackets " + "95 % intervals over documents, of beside static bands; " * several
    note += "of tokens/s the quartiles over rounds."
    made = plain_table("All rows", note, head, list(map(_grid_row, rows)), len(SETTING) + 2)
    shown, figures = [Shown("grid", made)], []
    for number, (about, of) in enumerate(by_setting(rows)):
        points = of_grid(of)
        if not points:
            continue
        front = table(points, BITS, f"grid-front-{number}")
        front = front._replace(table=front.table._replace(title=f"Members of the fronts: {about}"))
        shown.append(front)
        figures.append(drawn(points, BITS, f"grid-figure-{number}", front.key))
        sentences += [Sentence(f"{about}: {line}", front.key) for line in said(points)]
    return Section("", sentences, shown, figures)


def _grid_row(row: dict[str, Any]) -> list[str]:
    def text(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    read = row["bytes_per_token"]
    return [
        *(str(row[name]) for name in SETTING),
        row["configuration"],
        written(row["parameters"]),
        text(row["avg_experts_heldout"], ".2f"),
        text(None if read is None else read / 1e6, ".3g"),
        text(row["perplexity"], ".3f"),
        interval(row, "bits_above_own"),
        with_band(row, ""),
        interval(row, "tokens_per_s", ".1f"),
    ]
