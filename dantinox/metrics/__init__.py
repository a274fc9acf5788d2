"""Metrics of a run and the cost of a model."""
