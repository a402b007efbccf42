"""What the sweep of these tests is told."""

from moeprof.studies.sweep.runner import row_of

PROMPTS = (("simple", "The list is"), (None, "And it came to pass"), ("complex", "def f(x):"))
NEW_TOKENS = 6
FACTS = {
    "model": "a tiny model",
    "seed": 0,
    "null": "a null",
    "null_source": "From a test.",
    "null_code": "null",
}


def measured(experiment, configuration, baseline=None):
    """The row of one configuration; the baseline is its own."""
    result = experiment.run(configuration.router(2))
    if configuration.is_baseline(2):
        baseline = result
    return row_of(configuration, result, baseline, 2)
