"""The sweep: every configuration in turn, with what is finished kept on disk."""

import platform
from datetime import datetime, timezone
from importlib.metadata import version

import moeprof

from ..checks import check_type
from ..console import WIDTH, make_console, progress
from .configurations import configurations, dropped_max_ks
from .plots import figure
from .report import report
from .runner import Experiment, experts_of
from .store import Store


def sweep(experiment, store, facts, console=None):
    """Run all configurations that fit the model and write the four files of `Store`.

    experiment: Experiment; store: Store, or the path of a folder; facts: a dict that goes into
    the JSON as it is: model, seed, null and null_source (both in words); console: a rich Console.
    Returns the run: a dict as in the JSON. When it is interrupted, what is finished stays on
    disk, and KeyboardInterrupt goes on to the caller. The model is unpatched in every case.
    """
    check_type("sweep: experiment", experiment, Experiment, "an Experiment")
    store = store if isinstance(store, Store) else Store(store)
    console = console or make_console()
    num_experts, top_k = experts_of(experiment.model)
    planned = configurations(num_experts, top_k)
    run = describe(experiment, planned) | facts | {"results": []}
    console.print(f"Total configurations: {len(planned)}")
    for max_k in run["dropped_max_k"]:
        console.print(f"Left out: max_k {max_k}, the model has {num_experts} experts")
    try:
        with progress(console, len(planned) * experiment.steps, "sweep") as bar:
            for number, configuration in enumerate(planned, start=1):
                console.print(f"[{number}/{len(planned)}] Running: {configuration.name}")
                baseline = run["results"][0] if run["results"] else None
                result = experiment.run(configuration, baseline, bar.step)
                run["results"].append(result)
                store.save_results(run)
                console.print(f"Completed in {result['seconds']:.1f}s")
                console.print(f"Avg experts: {result['avg_experts']:.2f}")
    except KeyboardInterrupt:
        console.print(f"Interrupted: {len(run['results'])} of {len(planned)} are finished")
        if run["results"]:
            store.save_results(run)  # it may be this that was interrupted
            _finish(run, store, console)
        raise
    console.print("ALL EXPERIMENTS COMPLETE!")
    _finish(run, store, console)
    return run


def _finish(run, store, console):
    """Report and figure from what is there, and the table on the console."""
    store.save_report(report(run), figure(run["results"]))
    console.print(_table(run["results"]), width=min(WIDTH, console.width))
    for path in (store.json, store.csv, store.report, store.figure):
        console.print(f"Written: {path}")


def _table(results):
    """The main columns as a rich table of at most 100 columns."""
    from rich import box
    from rich.table import Table

    columns = {
        "config": ("config", "{}"),
        "experts": ("avg_experts", "{:.2f}"),
        "saved %": ("reduction_pct", "{:.1f}"),
        "perplexity": ("perplexity", "{:.3f}"),
        "Δ perplexity": ("delta_perplexity", "{:+.3f}"),
        "bits/byte": ("bits_per_byte", "{:.4f}"),
        "agreement": ("token_agreement", "{:.2f}"),
        "tokens/s": ("tokens_per_s", "{:.1f}"),
    }
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, name in enumerate(columns):
        justify = "right" if number else "left"
        table.add_column(name, justify=justify, no_wrap=not number, overflow="fold")
    for result in results:
        cells = ((form, result[field]) for field, form in columns.values())
        table.add_row(*("" if value is None else form.format(value) for form, value in cells))
    return table


def describe(experiment, planned):
    """What was run, on what and how: everything in the JSON but the results."""
    import torch

    model, config = experiment.model, experiment.model.config
    packages = ("torch", "transformers", "numpy")
    prompts = zip(experiment.complexities, experiment.prompts, strict=True)
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "planned": [configuration.name for configuration in planned],
        "dropped_max_k": dropped_max_ks(config.num_experts),
        "versions": {
            "moeprof": moeprof.__version__,
            **{name: version(name) for name in packages},
            "python": platform.python_version(),
        },
        "model_config": {
            "model_type": config.model_type,
            "num_experts": config.num_experts,
            "num_experts_per_tok": config.num_experts_per_tok,
            "num_hidden_layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "norm_topk_prob": config.norm_topk_prob,
        },
        "dtype": str(model.dtype).removeprefix("torch."),
        "cpu": moeprof.cpu_info(),
        "threads": torch.get_num_threads(),
        "new_tokens": experiment.new_tokens,
        "prompts": [{"complexity": label, "text": text} for label, text in prompts],
        "heldout_tokens": experiment.heldout.tokens,
        "heldout_documents": experiment.heldout.documents,
    }
