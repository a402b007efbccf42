"""A layer's experts: moeprof beside transformers, and with --peers zentorch and vLLM.

    python tests/bench_layer.py --tokens 1,32 --plot layer.png

The same as `moeprof bench layer`; --help lists the options.
"""

import sys

from moeprof.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "layer", *sys.argv[1:]]))
