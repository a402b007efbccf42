"""Studies that are killed and begun again: nothing that was finished is run twice, nor changed."""

import io
import json
import os
import signal
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from matplotlib.figure import Figure
from models import olmoe
from rich.console import Console
from test_comparison import text

import moeprof
from moeprof import demo
from moeprof.studies.comparison import compare as comparing
from moeprof.studies.comparison.contenders import Nulls, choose_contenders
from moeprof.studies.comparison.files import ComparisonFiles
from moeprof.studies.comparison.plan import plan_tables
from moeprof.studies.comparison.splits import Splits
from moeprof.studies.comparison.work import Comparison
from moeprof.studies.diagnosis.run import diagnose
from moeprof.studies.diagnosis.work import DiagnosisWork
from moeprof.studies.store.store import Store

pytestmark = pytest.mark.slow

FACTS = {
    "command": "moeprof compare",
    "model": "toy",
    "dtype": "float32",
    "machine": {"cpu": "c", "features": [], "threads": 1, "versions": {}, "started": "now"},
    "model_config": {
        "num_hidden_layers": 2,
        "num_experts": 12,
        "num_experts_per_tok": 4,
        "norm_topk_prob": False,
    },
}
TEXTS = demo.calibration_texts()[:4]


def comparison():
    model = olmoe(num_experts=12, num_experts_per_tok=4)
    splits = Splits([], text(), text(((0, 11), (1, 10), (2, 13))))
    contenders, nulls = (
        choose_contenders(["weighted_bh", "top_p"]),
        Nulls(model, None, [], {"efron": "normal"}),
    )
    plans, prompts = plan_tables(4, 12, ["reduction"], [2, 3]), [torch.tensor([[3, 4, 5]])]
    return Comparison(model, splits, nulls, contenders, plans, prompts, bits=(4,))


def compared(folder):
    """A comparison in a folder: its numbers, but for times."""
    made = comparison()
    files = ComparisonFiles(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparing, "figure", lambda run: Figure((1, 1)))  # most of the time
        comparing.compare(made, files, FACTS, Console(file=io.StringIO()))
    run = json.loads(files.json.read_text())
    assert run.pop("seconds") > 0
    for row in [*run["static"], *run["quantized"], *run["cells"]]:
        if row["role"] in ("static", "quantized", "router") and row["status"] == "measured":
            assert all(row.pop(f"tokens_per_s{end}") > 0 for end in ("_low", "", "_high"))
    return run


def diagnosed(folder):
    """A diagnosis in a folder: its rows and facts, but for times."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo.PATH, local_files_only=True)
    model = olmoe(vocab_size=len(tokenizer), max_position_embeddings=1024, initializer_range=0.3)
    with warnings.catch_warnings(), Store(folder / "moeprof.sqlite") as store:
        warnings.simplefilter("ignore")  # a small text
        null = moeprof.fit_null(model, tokenizer, [t.text for t in TEXTS], progress=False)
        found = diagnose(
            null, model, tokenizer, texts=TEXTS, calibration=TEXTS, router=moeprof.BH(0.5),
            positions=3, tokens=600, draws=20, progress=False, store=store,
        )  # fmt: skip
    assert found.facts.pop("seconds") > 0 and found.facts.pop("started")
    return found.to_frame().to_csv(), found.facts


STUDIES = {"compare": (compared, Comparison), "diagnose": (diagnosed, DiagnosisWork)}


def killed(study, folder, number):
    """The study, killed in the middle of its cell of this number; never returns."""
    run, calls = STUDIES[study][1].run, 0

    def last(self, cell, step):
        nonlocal calls
        calls += 1
        die = lambda: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
        return run(self, cell, die if calls == number else step)

    STUDIES[study][1].run = last
    STUDIES[study][0](folder)
    os._exit(3)


TWICE = """
import os, sys, warnings
from pathlib import Path
import torch
torch.set_num_threads(1)
warnings.simplefilter("ignore")
from test_resumed import killed
for study, *numbers in (("compare", 4, 17), ("diagnose", 3, 3)):
    for number in map(int, numbers):
        child = os.fork()
        if not child:
            killed(study, Path(sys.argv[1]) / study, number)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, forked):
    """Where each study was killed twice, in different cells."""
    folder = tmp_path_factory.mktemp("killed")
    done = forked.run(TWICE, folder, folder=Path(__file__).parent)
    ends = [line for line in done.stderr.split("\n") if line == str(-signal.SIGKILL)]
    assert len(ends) == 4, done.stderr
    return folder


@pytest.fixture
def one_thread():
    """As in the process that was killed: sums in another order round otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("study, before", [("compare", 3 + 16), ("diagnose", 2 + 2)])
def test_killed_twice_and_resumed(folder, tmp_path, monkeypatch, one_thread, study, before):
    measured, work = STUDIES[study]
    ran, run = [], work.run

    def counted(self, cell, step):
        ran.append(cell.name)
        return run(self, cell, step)

    monkeypatch.setattr(work, "run", counted)
    with Store(folder / study / "moeprof.sqlite") as store:
        finished = [row["name"] for row in store.rows()]
    assert len(finished) == before
    resumed, again = measured(folder / study), ran.copy()
    ran.clear()
    whole = measured(tmp_path)
    assert sorted(finished + again) == sorted(ran) and len(set(ran)) == len(ran)
    assert resumed == whole
    ran.clear()
    assert measured(folder / study) == whole and not ran


def test_cells_run_in_any_order_on_work_made_anew(one_thread):
    """What another process gives, which knows of no result before."""
    made = comparison()
    cells, steps = {}, []
    while new := [cell for cell in made.cells if cell.name not in made.found]:
        for cell in new:
            cells[cell.name] = cell
            made.found[cell.name] = made.run(cell, lambda: None)
    anew = made.make(olmoe(num_experts=12, num_experts_per_tok=4), None)
    assert anew.subject == made.subject
    # The quantised one first: what all are compared with is of the model before that.
    for cell in sorted(reversed(cells.values()), key=lambda cell: cell.name != "top-k in 4 bits"):
        steps.clear()
        here = anew.run(cell, lambda: steps.append(1))
        for times in (here, made.found[cell.name]):
            assert times.pop("seconds") > 0
            times.pop("tokens_per_s", None)
        assert here == made.found[cell.name], cell.name
        assert len(steps) == made.steps(cell) == anew.steps(cell), cell.name
