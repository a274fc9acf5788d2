"""Time every implementation of an operation, on the workloads of `dantinox.kernels.workloads`."""
