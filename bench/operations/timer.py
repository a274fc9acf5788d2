"""How long a compiled program takes: the device's own time on a GPU, wall clock elsewhere.

On a GPU, CUPTI reports how long each kernel ran, and a sample is the sum over the kernels of one call: what dispatch
and Python add is not in it. Elsewhere a sample is wall clock around calls that are waited for.
"""

import atexit
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax

Call = Callable[[int], Any]  # runs a program that is compiled and warm, on its i-th set of arguments


class Clock(Protocol):
    """`name` says what is measured."""

    name: str

    def sample(self, call: Call, calls: int, only: str = "") -> list[float]:
        """Seconds a call, `calls` times; where kernels can be told apart, of those alone whose name holds `only`."""
        ...


class WallClock:
    """Wall clock around each call, waited for. Programs shorter than `SHORT` are timed several calls at once."""

    name = "wall clock"
    SHORT = 1e-3

    def sample(self, call: Call, calls: int, only: str = "") -> list[float]:
        """See `Clock`; `only` cannot be told apart."""
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
    """The sum of the times of the kernels that a call starts, as the GPU reports them.

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
        """At the end of the process."""
        self._cupti._cupti_init()
        self._cupti._cupti_get_timings(True)


def per_call(kernels: Sequence[tuple[str, float]], calls: int) -> list[float]:
    """Seconds of each call, from (kernel name, milliseconds) in the order of execution.

    Raises:
        ValueError: the kernels cannot be split into `calls` equal calls.
    """
    if not kernels or len(kernels) % calls:
        raise ValueError(f"{len(kernels)} kernels were seen in {calls} calls")
    each = len(kernels) // calls
    return [sum(ms for _, ms in kernels[i : i + each]) / 1e3 for i in range(0, len(kernels), each)]


@functools.cache
def clock() -> Clock:
    """The best clock of this device: the GPU's own where it works, else wall clock."""
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
