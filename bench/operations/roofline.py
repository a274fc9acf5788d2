"""Measure the two ceilings of the roofline on this machine: the rates of a large matmul and of a large copy.

They are sampled between the turns of every case, not once: a shared machine drifts, and a fraction of the roofline is
only fair against what the machine could do in the same minute.
"""

import functools
from dataclasses import dataclass, field
from statistics import median

import jax
import jax.numpy as jnp

from bench.operations.timer import Call, Clock


@dataclass
class Ceilings:
    """Samples of FLOP/s by dtype and of bytes/s, the newest last."""

    clock: Clock
    flops: dict[str, list[float]] = field(default_factory=dict)
    bytes: list[float] = field(default_factory=list)

    def sample(self, dtype: str) -> tuple[float, float]:
        """Measure (FLOP/s in `dtype`, bytes/s), each the better of two tries."""
        flops, product = _matmul(dtype)
        self.flops.setdefault(dtype, []).append(flops / min(self.clock.sample(product, 2)))
        moved, copy = _copy()
        self.bytes.append(moved / min(self.clock.sample(copy, 2)))
        return self.flops[dtype][-1], self.bytes[-1]

    def summary(self) -> dict[str, float]:
        """Medians over the run, in TFLOP/s and GB/s."""
        rates = {f"matmul {dtype} TFLOP/s": median(values) / 1e12 for dtype, values in self.flops.items()}
        return rates | ({"copy GB/s": median(self.bytes) / 1e9} if self.bytes else {})


@functools.cache
def _matmul(dtype: str) -> tuple[int, Call]:
    size = 1024 if jax.default_backend() == "cpu" else 8192
    pair = tuple(jax.random.normal(jax.random.key(i), (size, size)).astype(dtype) for i in (0, 1))
    product = jax.jit(jnp.matmul).lower(*pair).compile()
    jax.block_until_ready(product(*pair))
    return 2 * size**3, lambda i: product(*pair)


@functools.cache
def _copy() -> tuple[int, Call]:
    # Far larger than any cache; an addition, because XLA may elide a plain copy.
    count = 2**24 if jax.default_backend() == "cpu" else 2**28
    array = jax.random.normal(jax.random.key(2), (count,))
    copy = jax.jit(lambda x: x + 1).lower(array).compile()
    copy(array).block_until_ready()
    return 2 * array.nbytes, lambda i: copy(array)
