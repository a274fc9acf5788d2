"""Grouped matmul in Pallas for Hopper GPUs."""
