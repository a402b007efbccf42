"""Questions about a model that take many runs: sweep, comparison, diagnosis, budget."""
