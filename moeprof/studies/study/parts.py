"""The parts of a study: what each is to run, and how it is run into its own folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ... import demo
from ...measure import machine
from ...measure.bootstrap import DRAWS
from ...models.blocks import experts_of, model_sizes
from ...models.quantized import described_dtype
from ...models.tokens import prompt_ids
from ...profile.result import Profile
from ...routers import BH
from ...texts.documents import Document
from ...texts.windows import calibration_passages, heldout_windows
from ..budget.stock import budget_text
from ..comparison.compare import compare
from ..comparison.contenders import EFRON, TRIMMED, Nulls, choose_contenders
from ..comparison.files import ComparisonFiles
from ..comparison.plan import plan_tables
from ..comparison.splits import make_splits
from ..comparison.work import Comparison
from ..diagnosis.ablation import most_positions
from ..diagnosis.run import ALPHA, diagnose, diagnosis_work
from ..evaluation.run import evaluate, evaluation_work
from ..sweep.files import SweepFiles
from ..sweep.run import sweep, sweep_work
from ..sweep.runner import Experiment
from .calibration import CalibrationWork
from .files import run_files
from .profiling import ProfileWork

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

    from ...checks import Tokenizer
    from ...null.model import Null
    from ...texts.windows import HeldOut
    from ..engine.engine import Engine
    from ..engine.load import Loaded
    from ..store.store import Store
    from .files import FilesWork, StudyFiles
    from .settings import Settings


BITS = (4, 8)  # that shrinking is compared with, of a model that isn't quantised
AT_BUDGET = ("bh", "fixed_p", "top_p")  # what is evaluated beside static top-k


@dataclass
class Ground:
    """What all parts of a study stand on.

    name : of the model, for people; bits : of its experts, None where they aren't quantised
    command : that makes the same again
    nulls : by the names of `FORMS`, once they are fitted
    """

    model: nn.Module
    tokenizer: Tokenizer
    settings: Settings
    files: StudyFiles
    name: str
    bits: int | None = None
    command: str = "moeprof study"
    progress: bool = True
    nulls: dict[str, Null] = field(default_factory=dict)

    @cached_property
    def documents(self) -> list[Document]:
        given = self.settings.documents
        return demo.heldout_texts() if given is None else list(given)

    @cached_property
    def heldout(self) -> HeldOut:
        settings = self.settings
        return heldout_windows(self.tokenizer, self.documents, settings.tokens, settings.seed)

    @cached_property
    def calibration(self) -> HeldOut:
        """What budgets are set on."""
        settings = self.settings
        return budget_text(self.tokenizer, settings.seed, settings.budget_tokens)

    @cached_property
    def budgets(self) -> list[int]:
        return self.settings.budgets_for(experts_of(self.model)[1])

    @cached_property
    def passages(self) -> list[str]:
        """What nulls are fitted to."""
        settings, half = self.settings, demo.calibration_halves()[0]
        return calibration_passages(half, settings.null_characters, settings.seed)

    def null(self, name: str) -> Null:
        """ValueError where the part calibrate gave none."""
        if name not in self.nulls:
            raise ValueError("it needs the nulls of the part calibrate, which there are none of")
        return self.nulls[name]


Run = Callable[["Store", "Engine", "Console"], Any]


@dataclass(frozen=True)
class Part:
    """A part: `work` is what it has to run, and `run` runs it and writes its files.

    files : the work, where its result are files
    """

    name: str
    words: str
    work: Loaded
    run: Run
    files: FilesWork | None = None


def calibration_of(ground: Ground) -> CalibrationWork:
    """What the part calibrate runs."""
    asked = ground.model, ground.tokenizer, ground.passages
    return CalibrationWork(*asked, ground.files.of("calibrate"), ground.progress)


def calibrate_part(ground: Ground) -> Part:
    work = calibration_of(ground)

    def run(store: Store, engine: Engine, console: Console) -> dict[str, Null]:
        for line in run_files(work, store)["words"].values():
            console.print(line)
        ground.nulls = work.read()
        return ground.nulls

    return Part("calibrate", "null distributions of the router's scores", work, run, work)


def profile_part(ground: Ground) -> Part:
    settings, folder = ground.settings, ground.files.of("profile")
    asked = ground.model, ground.tokenizer, ground.documents, settings.tokens, settings.seed
    work = ProfileWork(*asked, folder)

    def run(store: Store, engine: Engine, console: Console) -> Profile:
        run_files(work, store)
        profile = Profile.load(folder)
        profile.print_summary()
        return profile

    return Part("profile", "what the experts do as the model is", work, run, work)


def sweep_part(ground: Ground) -> Part:
    settings = ground.settings
    prompts, null = demo.prompts(), ground.null(TRIMMED)
    experiment = Experiment(
        ground.model,
        ground.tokenizer,
        tuple(text for _, text in prompts),
        tuple(complexity for complexity, _ in prompts),
        ground.heldout,
        null,
    )
    facts = {
        "model": ground.name,
        "seed": settings.seed,
        "null": null.describe(),
        "null_source": "It was fitted in the part calibrate.",
        "null_code": repr(str(calibration_of(ground).path(TRIMMED))),
        "heldout_source": "shipped" if settings.documents is None else list(settings.sources),
    }

    def run(store: Store, engine: Engine, console: Console) -> dict[str, Any]:
        return sweep(
            experiment,
            SweepFiles(ground.files.of("sweep"), store.path),
            facts,
            console,
            calibration=ground.calibration,
            store=store,
            engine=engine,
        )

    return Part(
        "sweep",
        "static top-k, and BH by alpha and max_k",
        sweep_work(experiment, ground.calibration),
        run,
    )


def compare_part(ground: Ground) -> Part:
    settings, model = ground.settings, ground.model
    num_experts, top_k = experts_of(model)
    ground.null(EFRON)
    passages = (
        Document("calibration", f"passage {number}", text)
        for number, text in enumerate(ground.passages, 1)
    )
    splits = make_splits(
        ground.tokenizer,
        {"null": list(passages), "budget": demo.calibration_halves()[1], "test": ground.documents},
        budget_tokens=settings.budget_tokens,
        tokens=settings.tokens,
        seed=settings.seed,
    )
    prompts = [prompt_ids(ground.tokenizer, text) for _, text in demo.prompts()]
    comparison = Comparison(
        model,
        splits,
        Nulls(model, ground.tokenizer, splits.null, ground.nulls),
        choose_contenders(settings.routers),
        plan_tables(top_k, num_experts, settings.tables, ground.budgets),
        prompts[::3],  # one of each kind
        settings.seed,
        BITS if ground.bits is None else (),
    )
    facts = {
        "command": ground.command,
        "machine": machine.describe(),
        "model": ground.name,
        "dtype": described_dtype(model),
        "model_config": model_sizes(model),
        "test_tokens": settings.tokens,
        "budget_tokens": settings.budget_tokens,
    }

    def run(store: Store, engine: Engine, console: Console) -> dict[str, Any]:
        files = ComparisonFiles(ground.files.of("compare"), store.path)
        return compare(comparison, files, facts, console, store=store, engine=engine)

    return Part("compare", "routers at an equal budget of experts", comparison, run)


def diagnose_part(ground: Ground) -> Part:
    settings, null = ground.settings, ground.null(EFRON)
    asked: Mapping[str, Any] = {
        "texts": ground.documents,
        "calibration": _shortened(settings.null_characters),
        "router": BH(ALPHA),
        "positions": min(settings.positions, most_positions(ground.heldout)),
        "tokens": settings.tokens,
        "budget_tokens": settings.budget_tokens,
        "norm": "model",
        "seed": settings.seed,
        "draws": DRAWS,
    }
    work = diagnosis_work(null, ground.model, ground.tokenizer, **asked)

    def run(store: Store, engine: Engine, console: Console) -> Any:
        found = diagnose(null, ground.model, ground.tokenizer, store=store, engine=engine, **asked)
        paths = found.save(ground.files.of("diagnose"))
        console.print(found.summary())
        for path in paths:
            console.print(f"Written: {path}")
        return found

    return Part("diagnose", "whether p-values are what they say", work, run)


def evaluate_part(ground: Ground) -> Part:
    settings = ground.settings
    routers = [f"topk:k={budget}" for budget in ground.budgets]
    routers += [f"{name}@{budget}" for budget in ground.budgets for name in AT_BUDGET]
    asked: Mapping[str, Any] = {
        "texts": ground.documents,
        "null": ground.null(TRIMMED),
        "context": None,
        "stride": None,
        "tokens": settings.tokens,
        "norm": "model",
        "budget_tokens": settings.budget_tokens,
        "seed": settings.seed,
        "progress": ground.progress,
    }
    work = evaluation_work(ground.model, ground.tokenizer, routers, **asked)[0]

    def run(store: Store, engine: Engine, console: Console) -> Any:
        found = evaluate(
            ground.model, ground.tokenizer, routers, store=store, engine=engine, **asked
        )
        paths = found.save(ground.files.of("evaluate"))
        console.print(found.summary())
        for path in paths:
            console.print(f"Written: {path}")
        return found

    return Part("evaluate", "how well the text is predicted", work, run)


MAKERS: dict[str, Callable[[Ground], Part]] = {
    "calibrate": calibrate_part,
    "profile": profile_part,
    "sweep": sweep_part,
    "compare": compare_part,
    "diagnose": diagnose_part,
    "evaluate": evaluate_part,
}


def _shortened(characters: int) -> Sequence[Document]:
    """The calibration documents, each half of them cut to about so many characters."""
    documents = demo.calibration_texts()
    share = min(2 * characters / sum(len(document.text) for document in documents), 1)
    return [d._replace(text=d.text[: int(len(d.text) * share)]) for d in documents]
