"""`python -m moeprof …` is `moeprof …`."""

from moeprof.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
