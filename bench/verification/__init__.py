"""What decides whether a kernel is right: the error bound, the race detector, and where an array is wrong."""
