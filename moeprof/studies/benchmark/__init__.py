"""Configurations of a model against each other: times, experts, loss; all of it undone after."""

from .simple import SimpleBenchmark

__all__ = ["SimpleBenchmark"]
