"""Decode attention in Pallas for TPUs."""
