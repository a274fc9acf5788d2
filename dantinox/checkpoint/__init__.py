"""Checkpoints of a run, and the way back to a model."""
