"""Checkpoints of a run, and loading a model from one."""
