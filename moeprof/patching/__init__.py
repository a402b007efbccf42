"""Changing how a model runs, and putting it back."""
