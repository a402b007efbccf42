"""What routing costs: a share of the layer's time, and each router beside torch.

    python tests/bench_router.py --shape qwen3-30b

The same as `moeprof bench router`; --help lists the options.
"""

import sys

from moeprof.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "router", *sys.argv[1:]]))
