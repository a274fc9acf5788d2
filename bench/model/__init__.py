"""A whole training step: ours, and those of transformers on torch."""
