"""Evaluates JAX programs, Pallas TPU kernels included, in NumPy: nothing is lowered or compiled.

A program that runs once on little costs seconds to compile and milliseconds to evaluate, so thousands of random shapes
fit in minutes. And the kernels are those that a TPU would get, blocks, scratch memory and all, not only the form that
is interpreted on a CPU:

    run(f, *args)                       f(*args), as NumPy arrays
    trace(f, *args)(*args)              the same, to be called again
    with dantinox.kernels.dispatch.compiling_for("tpu", "TPU v6 lite"): run(f, *args)

Memory is as unfriendly as hardware allows: scratch, outputs before they are written and what lies past the end of an
array in a last block are NaN, or the lowest integer, and a block that the grid comes back to is loaded again.
"""

from tests.numpy_interpreter import pallas  # noqa: F401 - registers its rules
from tests.numpy_interpreter.evaluate import run, trace

__all__ = ["run", "trace"]
