"""Decode attention in Pallas for Hopper GPUs."""
