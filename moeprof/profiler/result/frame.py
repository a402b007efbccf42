"""A profile as a tidy table: one number a row."""

from ..tally import PHASES
from .metrics import BY_EXPERT, SCALARS
from .profile import ALL

COLUMNS = ["layer", "name", "expert", "phase", "metric", "value"]
WHOLE = ("load_balance_loss", "load_balance_loss_by_layer", "z_loss")  # of all layers together, methods of Profile


def to_frame(profile):
    """See Profile.to_frame. value is a float; layer and expert are pandas' Int64."""
    import pandas

    rows = []
    for phase in (*PHASES, ALL):
        rows += [(None, None, None, phase, m, getattr(profile, m)(phase)) for m in WHOLE]
        for index, metrics in enumerate(profile.each(phase)):
            rows += _of_layer(index, metrics, phase)
    rows.append((None, None, None, ALL, "memory_peak_mb", profile.facts.get("memory_peak_mb")))
    frame = pandas.DataFrame(rows, columns=COLUMNS)
    whole = {name: frame[name].astype("Int64") for name in ("layer", "expert")}
    return frame.assign(**whole, name=frame["name"].astype("string"),
                        value=frame["value"].astype(float))  # fmt: skip


def _of_layer(index, metrics, phase):
    place = index, metrics.layer.name
    for name in SCALARS:
        yield *place, None, phase, name, getattr(metrics, name)
    for experts, tokens in enumerate(metrics.k_distribution):
        if tokens:
            yield *place, None, phase, f"k_distribution_{experts}", tokens
    for name in BY_EXPERT:
        for expert, value in enumerate(getattr(metrics, name)):
            yield *place, expert, phase, name, value
