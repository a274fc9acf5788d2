"""tokamax's own tests of attention, which its wheel contains, run against `dantinox.kernels.attention`."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.peers import masks
from tests.peers.cases import Mapped, import_peer, unmatched_patterns
from tests.peers.masks import NotMapped

import_peer("chex")
quantization = import_peer("tokamax._src.quantization")
base = import_peer("tokamax._src.ops.attention.base")
test_base = import_peer("tokamax._src.ops.attention.test_base")

pytestmark = pytest.mark.slow

NO_BIAS = "attention has no bias"
NO_DROPOUT = "attention has no dropout"
NO_PAGES = "attention has no pages"
NO_MAXIMUM = "attention returns the log-sum-exp, not the maximum that an unnormalized output needs"
# Tests, and why they do not map; the number is that of a test's parameters.
NOT_MAPPED = {
    "test_cross_attention1": NO_BIAS,
    "test_bias[0-5]": NO_BIAS,
    "test_tanh_clipping0": NO_BIAS,
    "test_dropout": NO_DROPOUT,
    "test_mask[034]": masks.NO_SUCH_MASK,  # random, for each pair of a query and a key
    "test_mask_api[789]": masks.NO_SUCH_MASK,  # hourglasses
    "test_normalize_output": NO_MAXIMUM,
}


def attention_fn(implementation: str) -> Callable[..., Any]:
    """Return a function with the arguments of a `tokamax.DotProductAttention`."""

    def call(
        q, k, v, *, bias=None, mask=None, is_causal=False, precision=None, logits_dtype=None, logits_scale=base.AUTO,
        logits_soft_cap=None, dropout_mask=None, dropout_rate=0.0, paging_info=None, q_indices=None, k_indices=None,
        normalize_output=True, return_residuals=False, q_sharding=None,
    ):  # fmt: skip
        del logits_dtype  # ours are float32, which is at least as exact
        for argument, reason in (
            (bias, NO_BIAS),
            (dropout_mask, NO_DROPOUT),
            (paging_info, NO_PAGES),
        ):
            if argument is not None:
                raise NotMapped(reason)
        if not normalize_output and not return_residuals:
            raise NotMapped(NO_MAXIMUM)
        q, k, v = (quantization.as_array(x) for x in (q, k, v))
        q, k, v = (x.astype(jnp.promote_types(q.dtype, k.dtype)) for x in (q, k, v))
        *batch, T, H, _ = q.shape
        q, k, v = (x.reshape(math.prod(batch), *x.shape[-3:]) for x in (q, k, v))
        queries, keys = T if q_indices is None else q_indices, k.shape[1] if k_indices is None else k_indices
        with jax.default_matmul_precision(precision_name(precision)):
            o, lse = masks.attention(
                q,
                k,
                v,
                as_array(mask, is_causal, queries, keys),
                scale=None if logits_scale is base.AUTO else logits_scale,
                softcap=logits_soft_cap,
                implementation=implementation,
            )
        o = o.reshape(*batch, T, H, -1)
        if not return_residuals:
            return o
        lse = lse.swapaxes(1, 2).reshape(*batch, H, T)
        return o, (lse, jnp.ones_like(lse))  # the maximum and the sum: any pair of this product will do

    return call


def precision_name(precision: Any) -> str | None:
    """Return the precision of all matmuls; a pair is that of queries with keys and of weights with values."""
    precision = precision[0] if isinstance(precision, tuple) else precision
    return "highest" if precision == jax.lax.Precision.HIGHEST else None


def as_array(mask: Any, is_causal: bool, queries: Any, keys: Any) -> np.ndarray | None:
    """Return a mask as a boolean array of four axes."""
    with jax.ensure_compile_time_eval():
        if isinstance(mask, base.CausalMask):
            mask = base.Mask(causal_mask=mask)
        elif not isinstance(mask, base.Mask):
            mask = base.Mask(mask)
        if is_causal:
            mask &= base.CausalMask()
        array = mask.as_array(queries, keys)
    return None if array is None else np.asarray(array).reshape((1,) * (4 - array.ndim) + array.shape)


class AttentionTest(Mapped, test_base.AttentionTestBase):
    NOT_MAPPED = NOT_MAPPED
    __test__ = False

    def __init__(self, name: str = "runTest"):
        super().__init__(name, attention_fn=attention_fn(self.IMPLEMENTATION))

    def _test_small_sequences(self, seq_q, seq_kv):
        # Sums over 256 queries of up to 15: in float32, plain jnp has an error of 2.4e-5, more than the 2e-5 allowed.
        with test_base.override_test_args(atol_grads=4e-5):
            super()._test_small_sequences(seq_q, seq_kv)


class XlaTest(AttentionTest):
    IMPLEMENTATION = "xla"
    __test__ = True


class PallasTest(AttentionTest):
    IMPLEMENTATION = "pallas"
    __test__ = True


def test_every_reason_is_one_of_a_test():
    names = [name for name in dir(test_base.AttentionTestBase) if name.startswith("test_")]
    assert not unmatched_patterns(NOT_MAPPED, names)
