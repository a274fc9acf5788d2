"""Grouped matmul in Pallas for TPUs."""
