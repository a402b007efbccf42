"""Do two checkouts of moeprof compute the same numbers? For a change that is to change none.

    python tests/same_numbers.py run FOLDER        what this checkout computes, written there
    python tests/same_numbers.py compare OLD NEW   the cells that differ between two of these

Run both checkouts on one machine, with the same Python environment and MOEPROF_CPU: kernels of
another CPU round differently. The commands run on the demo model with one thread, so that
nothing depends on the order of sums. Times, rates, memory, dates and versions are left out.
Takes some five minutes a checkout.
"""

import hashlib
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = {
    "sweep": "sweep --tokens 2048 --alphas 0.05,0.2 --max-k 4,8 --static 2,4,6 --out {}",
    "compare": "compare --routers bh,fixed_p,top_p --budgets 4,6 --tables reduction "
    "--tokens 2048 --budget-tokens 2048 --out {}",
    "diagnose": "diagnose --positions 40 --tokens 2048 --out {}",
    "profile": "profile --tokens 2048 --continuations 4 --new-tokens 8 --batch 1 2 --vocabulary "
    "--out {}",
    "routed": "profile --router bh:alpha=0.3,max_k=8 --tokens 1024 --continuations 2 "
    "--new-tokens 4 --out {}",
    "null": "calibrate --text LICENSE --kind efron --out {}/null.npz",
}
# Of the machine, the day or the version, and what is said in words of those.
NOT_NUMBERS = re.compile(
    r"seconds|tokens_per_s|latency|latencies|memory|roofline|roof|gbs|gflops|flops_per_s|time|"
    r"started|version|machine|cpu|threads|advice|library|software|traffic|bandwidth|host|date|"
    r"nanoseconds|duration|path|speed|mbu|mfu|sha256|\.ints$"
)


def run(folder):
    """Every command, each into a folder of its own."""
    for name, line in COMMANDS.items():
        out = folder / name
        out.mkdir(parents=True, exist_ok=True)
        words = [word.format(out) for word in line.split()]
        print("moeprof", *words, flush=True)
        command = [sys.executable, "-m", "moeprof", *words, "--threads", "1"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def cells(folder):
    """{place: value} of every number and word in the files that the commands wrote."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".json":
            _walk(json.loads(path.read_text()), (name,), found)
        elif path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                for key in arrays.files:
                    bits = hashlib.sha256(arrays[key].tobytes()).hexdigest()[:12]
                    _walk(f"{arrays[key].shape} {bits}", (name, key), found)
        elif path.suffix == ".csv":
            import pandas

            table = pandas.read_csv(path)
            for column in table:
                values = [None if pandas.isna(v) else v for v in table[column].tolist()]
                if "metric" in table and column == "value":  # a metric a row
                    for index, (metric, value) in enumerate(
                        zip(table["metric"], values, strict=True)
                    ):
                        _walk(value, (name, index, metric), found)
                else:
                    _walk(values, (name, column), found)
    return found


def _walk(value, place, found):
    if any(NOT_NUMBERS.search(str(part).lower()) for part in place[1:]):
        return
    if isinstance(value, dict):
        for key, inner in value.items():
            _walk(inner, (*place, key), found)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            _walk(inner, (*place, index), found)
    else:
        found[place] = value


def compare(old, new):
    """The places that differ or are in one of them only, each as a line."""
    before, after = cells(old), cells(new)
    lines = []
    for place in sorted(before.keys() | after.keys(), key=str):
        a, b = before.get(place, "absent"), after.get(place, "absent")
        if a != b and not _both_nan(a, b):
            lines.append(f"{'/'.join(map(str, place))}: {a!r}, {b!r}")
    print(f"{len(before):,} cells, {len(lines):,} differ")
    return lines


def _both_nan(a, b):
    return isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["run", folder]:
            run(Path(folder).resolve())
        case ["compare", old, new]:
            found = compare(Path(old), Path(new))
            print(*found[:50], sep="\n")
            sys.exit(bool(found))
        case _:
            sys.exit(__doc__)
