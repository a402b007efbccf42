"""Tasks of lm-evaluation-harness on a model, with its own router and with others."""
