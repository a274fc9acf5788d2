"""Linear cross-entropy in Pallas for Hopper GPUs."""
