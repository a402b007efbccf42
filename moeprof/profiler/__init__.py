"""The profiler: what the mixture-of-experts layers of a model do, and what it costs."""
