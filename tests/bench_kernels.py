"""Every variant of every kernel against scalar and against its limit, on one thread.

    python tests/bench_kernels.py --dtype bfloat16

The same as `moeprof bench kernels`; --help lists the options.
"""

import sys

from moeprof.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "kernels", *sys.argv[1:]]))
