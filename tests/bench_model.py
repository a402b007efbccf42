"""A whole model's decode steps and prefills, patched and not, and what a callback costs.

    python tests/bench_model.py --tokens 1,512 --json model.json

The same as `moeprof bench model`; --help lists the options.
"""

import sys

from moeprof.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "model", *sys.argv[1:]]))
