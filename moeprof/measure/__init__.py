"""What a model and a machine do, measured: loss, routing, times, limits."""
