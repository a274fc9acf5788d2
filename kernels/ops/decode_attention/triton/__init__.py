"""Decode attention in Triton for NVIDIA GPUs of compute capability 8.0 and newer."""
