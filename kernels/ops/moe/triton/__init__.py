"""The mixture of experts on NVIDIA GPUs of compute capability 8.0 and newer, in Triton."""
