"""Attention in Pallas for TPUs, interpreted on a CPU."""
