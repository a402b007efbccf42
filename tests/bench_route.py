"""Times routing by itself: ns a token of _C.route, T = 2048, for each E, router and thread count.

Run as a script: python tests/bench_route.py [level of MOEPROF_CPU]...
"""

import sys
import time

import numpy as np
import util

from moeprof import _C

TOKENS = 2048


def specs(table):
    yield "topk", ("topk", (8.0,), 8, 8, 1.0, "none", 8, "logit", None)
    yield "bh", ("bh", (0.3,), 1, 8, 1.0, "none", 8, "logprob", table)


def ns_per_token(logits, spec, threads, seconds=0.15):
    """The best of many calls: the machine is shared, and only ever makes a call slower."""
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        _C.route(logits, "float32", spec, threads, False)
        best = min(best, time.perf_counter() - start)
    return best / TOKENS * 1e9


def main(levels):
    print(f"ns a token, T = {TOKENS}, float32 logits\nlevel      E    router 1 thread  2 threads")
    for level in levels:
        _C.limit_cpu(level)
        for experts in (8, 64, 128, 256):
            logits = np.random.default_rng(0).standard_normal((TOKENS, experts)) * 1.5
            logits = logits.astype(np.float32)
            for name, spec in specs(util.table_of(-0.5)):
                one, two = (ns_per_token(logits, spec, threads) for threads in (1, 2))
                print(f"{level or 'best':10} {experts:<4} {name:6} {one:8.0f} {two:10.0f}")


if __name__ == "__main__":
    main(sys.argv[1:] or [None])
