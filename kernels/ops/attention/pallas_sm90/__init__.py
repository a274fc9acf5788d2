"""Attention in Pallas for Hopper GPUs."""
