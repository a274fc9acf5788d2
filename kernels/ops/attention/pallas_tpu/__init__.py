"""Attention in Pallas for TPUs."""
