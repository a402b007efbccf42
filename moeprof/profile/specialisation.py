"""Which experts a domain's tokens, or the occurrences of one token, select.

As in the OLMoE paper (arXiv 2409.02060, section 5): of the tokens of a domain D the share that
selects expert i, N_iD / N_D; of the occurrences of token x, N_xi / N_x. Under a router that
takes all experts alike both are k/E, with k the mean number of experts per token. An expert that
is busy everywhere is above k/E in every domain: what belongs to a domain is told by the share
beside that of the other domains' tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .metrics import ratio_each

if TYPE_CHECKING:
    import pandas
    from numpy.typing import NDArray

    from .types import Profiled


MINIMUM = 8  # occurrences of a token below which its share says little


def _experts(
    profile: Profiled, index: int, selections: NDArray[np.int64], tokens: int, baseline: float
) -> dict[str, Any]:
    """Columns of a table with a row for each expert of layer `index`."""
    share = ratio_each(selections, int(tokens))
    return {
        "layer": profile.labels[index],
        "name": profile.layers[index].name,
        "block": profile.layers[index].block,
        "expert": np.arange(len(selections)),
        "share": share,
        "baseline": baseline,
        "times": share / baseline if baseline > 0 else np.full(len(share), np.nan),
    }


def by_domain(profile: Profiled) -> pandas.DataFrame:
    """Columns: layer, name, block, expert, domain, tokens (of the domain), share, baseline, times,
    others, p.

    baseline: k/E with the layer's mean k over these domains; times: share / baseline; others: the
    share of the other domains' tokens; p: two-sided binomial, of as many of all that select the
    expert being the domain's if it selects as the others do. The last two are nan where no other
    domain has tokens.
    ValueError where the texts had no domain labels.
    """
    import pandas

    if profile.domains is None:
        raise ValueError("this profile has no domains: its texts had no domain labels")
    columns = ["layer", "name", "block", "expert", "domain", "tokens", "share", "baseline", "times"]
    columns += ["others", "p"]
    made: dict[str, list[Any]] = {name: [] for name in columns}
    for index, layer in enumerate(profile.layers):
        rows = {label: table[index] for label, table in profile.domains.items()}
        selections = sum(int(row[:-1].sum()) for row in rows.values())
        tokens = sum(int(row[-1]) for row in rows.values())
        baseline = selections / tokens / layer.num_experts if tokens else np.nan
        all_loads = sum(row[: layer.num_experts] for row in rows.values())
        for label, row in rows.items():
            loads, own = row[: layer.num_experts], int(row[-1])
            cells = _experts(profile, index, loads, own, baseline) | {
                "domain": label,
                "tokens": own,
                "others": ratio_each(all_loads - loads, tokens - own),
                "p": _two_sided(loads, all_loads, own, tokens),
            }
            for name, value in cells.items():
                each = isinstance(value, np.ndarray)
                made[name] += value.tolist() if each else [value] * layer.num_experts
    return pandas.DataFrame(made)  # at once: a frame for each part takes 15 times as long


def _two_sided(
    loads: NDArray[np.int64], all_loads: NDArray[np.int64], own: int, tokens: int
) -> NDArray[np.float64]:
    """(E,) twice the smaller tail of Binomial(all_loads, own / tokens) at `loads`, at most 1."""
    from scipy.special import bdtr, bdtrc

    if not 0 < own < tokens:
        return np.full(len(loads), np.nan)
    chance = own / tokens
    tails = bdtr(loads, all_loads, chance), bdtrc(loads - 1, all_loads, chance)
    return np.minimum(2 * np.minimum(*tails), 1)


LEVEL = 0.05  # of all tests of a profile together


def beyond_chance(frame: pandas.DataFrame) -> pandas.Series[bool]:
    """Of each row of `by_domain`, whether its domain differs from the others: p, by Bonferroni."""
    return frame["p"] * frame["p"].count() <= LEVEL


def most_by_domain(profile: Profiled) -> pandas.DataFrame:
    """The rows of `by_domain` of experts that a domain selects more often than the others do,
    beyond chance; those with the largest difference first."""
    frame = by_domain(profile)
    frame = frame[beyond_chance(frame) & (frame["share"] > frame["others"])]
    return frame.iloc[np.argsort(frame["others"] - frame["share"], kind="stable")]


def by_token(profile: Profiled, minimum: int = MINIMUM, top: int = 10) -> pandas.DataFrame:
    """Columns: layer, name, block, expert, token (id), text, seen, share, baseline, times.

    Of each expert the `top` tokens it is most specialised in, the first the most, among those
    that occurred at least `minimum` times. text: <NA> where there was no tokenizer.
    ValueError where input tokens were not recorded, or for a minimum below 1.
    """
    import pandas

    if minimum < 1:
        raise ValueError(f"minimum: expected at least 1 occurrence, got {minimum!r}")
    if profile.vocabulary is None:
        raise ValueError("this profile has no input tokens: ask the profiler to record them")
    recorded = profile.vocabulary
    seen, names = np.asarray(recorded["seen"]), recorded["text"]
    often = np.flatnonzero(seen >= minimum)
    tables = []
    for index, counts in zip(recorded["layers"], recorded["counts"], strict=True):
        baseline = ratio_each(np.sum(counts), int(seen.sum())) / profile.layers[index].num_experts
        rank, expert, place = _best(counts[often], seen[often], top)
        token = often[place]
        share = counts[token, expert] / seen[token]
        made = pandas.DataFrame(
            {
                "layer": profile.labels[index],
                "name": profile.layers[index].name,
                "block": profile.layers[index].block,
                "expert": expert,
                "token": np.asarray(recorded["tokens"])[token],
                "text": pandas.array([names[t] if names else None for t in token], dtype="string"),
                "seen": seen[token],
                "share": share,
                "baseline": float(baseline),
                "times": share / baseline,
            }
        )
        tables.append(made[share > 0].assign(rank=rank[share > 0], place=index))
    frame = pandas.concat(tables, ignore_index=True).sort_values(["place", "expert", "rank"])
    return frame.drop(columns=["rank", "place"]).reset_index(drop=True)


def _best(
    counts: NDArray[np.int64], seen: NDArray[np.int64], top: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """(rank, expert, token) of each expert's tokens of the largest share, of (tokens, E) counts.

    Of equal shares the token seen more often comes first.
    """
    share = counts / seen[:, None]
    order = np.lexsort((np.broadcast_to(-seen[:, None], share.shape), -share), axis=0)[:top]
    rank, expert = np.indices(order.shape)
    return rank.ravel(), expert.ravel(), order.ravel()
