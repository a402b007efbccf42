"""Benchmarks: the kernels, a layer, a block, the router and a whole model, each against its limits.

``moeprof bench kernels|layer|block|router|model``. Machines drift, and one process sees twice the
bandwidth of another, so all contenders run in turn in every round and only ratios within one
run are compared. Nothing here is imported until a benchmark is asked for.

A benchmark is a module with ``rounds(settings)``, how many rounds it will run;
``measure(settings, bar)``, the result, a dict as it goes into the JSON; ``tables(result)``, what
is printed of it, and ``figure(result)``. Letters: T tokens, E experts, H hidden and I
intermediate size, K experts a token.
"""
