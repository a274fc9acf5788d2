"""The linear cross-entropy on Mosaic TPU; a CPU interprets the same kernels in larger tiles."""
