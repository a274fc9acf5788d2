"""The mixture of experts in Pallas for Hopper GPUs."""
