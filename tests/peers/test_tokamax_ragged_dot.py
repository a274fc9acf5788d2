"""tokamax's own tests of `ragged_dot`, which its wheel contains, run against `dantinox.kernels.grouped_matmul`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from dantinox import kernels
from tests.peers.cases import Mapped, import_peer, unmatched_patterns
from tests.peers.masks import NotMapped

import_peer("chex")
quantization = import_peer("tokamax._src.quantization")
base = import_peer("tokamax._src.ops.ragged_dot.base")
test_base = import_peer("tokamax._src.ops.ragged_dot.test_base")

pytestmark = pytest.mark.slow

TOO_LARGE = "too large for a CPU: its reference multiplies every row with every group's matrix"
MAX_PRODUCTS = 2**34
NOT_MAPPED = {
    "test_bench_compute_bound": TOO_LARGE,
    "test_bench_mixtral_8x7b": TOO_LARGE,
}


def dot_fn(implementation: str) -> Callable[..., Any]:
    """Return a function with the arguments of a `tokamax.RaggedDot`."""

    def call(lhs, rhs, *, group_sizes, precision=None, preferred_element_type=None, activation=None):
        del precision  # a bfloat16 product is exact in float32 already, and float32 ones are float32 products on a CPU
        lhs, rhs = (quantization.as_array(x) for x in (lhs, rhs))
        dtype = jnp.promote_types(lhs.dtype, rhs.dtype)
        out_dtype = preferred_element_type or dtype
        wide = jnp.promote_types(dtype, out_dtype)
        sizes = group_sizes.value if isinstance(group_sizes, base.GroupSizes) else group_sizes
        y = kernels.grouped_matmul(lhs.astype(wide), rhs.astype(wide), sizes, implementation=implementation)
        y = y.astype(out_dtype)
        return y if activation is None else activation(y)

    return call


class RaggedDotTest(Mapped, test_base.RaggedDotTestBase):
    NOT_MAPPED = NOT_MAPPED
    __test__ = False

    def __init__(self, name: str = "runTest"):
        super().__init__(name, dot_fn=dot_fn(self.IMPLEMENTATION))

    def _test_bench(self, spec):
        lhs, rhs = (jax.eval_shape(quantization.as_array, spec[name]) for name in ("lhs", "rhs"))
        if lhs.size * rhs.shape[0] * rhs.shape[2] > MAX_PRODUCTS:
            raise NotMapped(TOO_LARGE)
        super()._test_bench(spec)


class XlaTest(RaggedDotTest):
    IMPLEMENTATION = "xla"
    __test__ = True


class PallasTest(RaggedDotTest):
    IMPLEMENTATION = "pallas"
    __test__ = True


def test_every_reason_is_one_of_a_test():
    names = [name for name in dir(test_base.RaggedDotTestBase) if name.startswith("test_")]
    assert not unmatched_patterns(NOT_MAPPED, names)
