"""Decoding attention in Pallas for Hopper GPUs."""
