"""The linear cross-entropy on NVIDIA GPUs of compute capability 8.0 and newer, in Triton."""
