"""`moeprof inspect`: the MoE layers of a model, and which of them moeprof can run."""

from __future__ import annotations

import argparse

from . import options


def declare(parser: argparse.ArgumentParser) -> None:
    """The options of `moeprof inspect`."""
    options.add_model(parser)
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    from ..backends.pages import huge_share
    from ..models.find import find_sites
    from ..models.inspection import inspect
    from ..models.sizes import weights_of

    options.check_named_model(arguments)
    model, _ = options.load(arguments)
    print(inspect(model))
    experts = [site.experts for site in find_sites(model) if site.experts is not None]
    parts = [part for each in experts for part in each.modules()]
    share = huge_share(tensor for part in parts for tensor in weights_of(part))
    if share is not None:
        print(f"On huge pages: {share:.0%} of the experts' weights (see `moeprof cpu`)")
