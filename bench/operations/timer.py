"""Time compiled programs: by the device's own clock on a GPU, by wall clock elsewhere.

On a GPU, CUPTI reports the time of each kernel, and a sample is the sum over the kernels of one call, without dispatch
and Python. Elsewhere, a sample is wall clock around calls and the wait for their results.
"""

import atexit
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax

Call = Callable[[int], Any]  # runs a compiled and warm program on its i-th set of arguments


class Clock(Protocol):
    """A source of times.

    Attributes:
        name: what it measures.
    """

    name: str

    def sample(self, call: Call, calls: int, only: str = "") -> list[float]:
        """Time a program.

        Args:
            call: the program.
            calls: how many times to call it.
            only: if the clock can tell kernels apart, only those with this word in their name count.

        Returns:
            Seconds of each call.
        """
        ...


class WallClock:
    """Wall clock around each call and the wait for it; a sample of a program shorter than `SHORT` is several calls."""

    name = "wall clock"
    SHORT = 1e-3

    def sample(self, call: Call, calls: int, only: str = "") -> list[float]:
        """See `Clock`; `only` has no effect."""
        first = self._time(call, 0, 1)
        inner = max(1, min(200, int(self.SHORT / max(first, 1e-7))))
        if inner == 1:
            return [first] + [self._time(call, i, 1) for i in range(1, calls)]
        return [self._time(call, i * inner, inner) for i in range(calls)]

    @staticmethod
    def _time(call: Call, start: int, calls: int) -> float:
        begin = time.perf_counter()
        for i in range(start, start + calls):
            out = call(i)
        jax.block_until_ready(out)
        return (time.perf_counter() - begin) / calls


class KernelClock:
    """The sum of the times that the GPU reports for the kernels of a call.

    CUPTI stays attached for the life of the process: attaching is slow, and so are the first launches after it.
    """

    name = "kernel time on the device (CUPTI)"
    WARM_UP = 2  # untimed calls before each sample

    def __init__(self, cupti: Any = None) -> None:
        if cupti is None:
            from jax._src.lib import mosaic_gpu

            cupti = mosaic_gpu._mosaic_gpu_ext
            atexit.register(self._detach)
        self._cupti = cupti

    def sample(self, call: Call, calls: int, only: str = "") -> list[float]:
        """See `Clock`."""
        for i in range(-self.WARM_UP, 0):
            jax.block_until_ready(call(i))
        self._cupti._cupti_init()
        try:
            for i in range(calls):
                jax.block_until_ready(call(i))
        finally:
            kernels = self._cupti._cupti_get_timings(False)  # False: unsubscribe, but stay attached
        return per_call([kernel for kernel in kernels if only in kernel[0]], calls)

    def _detach(self) -> None:
        """Detach CUPTI at the end of the process."""
        self._cupti._cupti_init()
        self._cupti._cupti_get_timings(True)


def per_call(kernels: Sequence[tuple[str, float]], calls: int) -> list[float]:
    """Sum the times of kernels by call.

    Args:
        kernels: (name, milliseconds) in the order of execution.
        calls: the number of calls.

    Returns:
        Seconds of each call.

    Raises:
        ValueError: the kernels cannot be split into `calls` equal calls.
    """
    if not kernels or len(kernels) % calls:
        raise ValueError(f"{len(kernels)} kernels were seen in {calls} calls")
    kernels_per_call = len(kernels) // calls
    starts = range(0, len(kernels), kernels_per_call)
    return [sum(ms for _, ms in kernels[start : start + kernels_per_call]) / 1e3 for start in starts]


@functools.cache
def clock() -> Clock:
    """Return the best clock of this device: the GPU's own if it works, else wall clock."""
    if jax.default_backend() != "gpu":
        return WallClock()
    x = jax.numpy.ones((128, 128))
    try:
        kernels = KernelClock()
        product = jax.jit(lambda x: x @ x)
        product(x).block_until_ready()
        kernels.sample(lambda i: product(x), 2)
        return kernels
    except (AttributeError, ImportError, RuntimeError, ValueError) as error:
        fallback = WallClock()
        fallback.name = f"wall clock (no kernel times: {error})"
        return fallback
