"""Collecting: what the layers of a model do while it runs, as counts."""
