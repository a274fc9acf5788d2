"""Evaluate JAX programs, including Pallas TPU kernels, in NumPy: nothing is lowered or compiled.

A program that runs once on small inputs takes seconds to compile and milliseconds to evaluate, so thousands of random
shapes take minutes. The kernels can be those for a TPU, with its blocks and scratch memory, and not only the form for
CPUs:

    run(f, *args)                       f(*args), as NumPy arrays
    trace(f, *args)(*args)              the same, to be called several times
    with dantinox.kernels.dispatch.target_device("tpu", "TPU v6 lite"): run(f, *args)

Memory is as unfriendly as hardware allows: scratch, outputs before they are written and the padding of a partial last
block hold NaN, or the lowest integer, and a block that the grid revisits is loaded again.
"""

from bench.numpy_interpreter import pallas  # noqa: F401 - registers its rules
from bench.numpy_interpreter.evaluate import NoRuleError, run, trace
from bench.numpy_interpreter.primitives import exact_products
from bench.numpy_interpreter.variables import watch

__all__ = ["NoRuleError", "exact_products", "run", "trace", "watch"]
