"""Compile for NVIDIA GPUs and read what ptxas and the disassemblers print."""
