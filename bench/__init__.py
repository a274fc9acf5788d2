"""Is it fast? Benchmarks of the model and its kernels."""
