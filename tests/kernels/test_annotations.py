"""The shapes in the annotations of the public operations are those that the operations take and return."""

import typing

import jax
import jax.numpy as jnp
import jaxtyping
import pytest

from dantinox import kernels, reference

typeguard = pytest.importorskip("typeguard")

Q, KV = jnp.ones((2, 5, 4, 8)), jnp.ones((2, 7, 2, 8))
X, W, SIZES = jnp.ones((6, 3)), jnp.ones((2, 3, 5)), jnp.array([2, 3])
CACHE = kernels.KVCache.zeros(2, 2, 6, 8, jnp.float32)
SEGMENTS = (jnp.zeros((2, 5), jnp.int32), jnp.zeros((2, 7), jnp.int32))
CALLS = {
    "attention": {"q": Q, "k": KV, "v": KV, "gate": Q[..., :1], "segment_ids": SEGMENTS},
    "grouped_matmul": {"x": X, "w": W, "group_sizes": SIZES},
    "moe_mlp": {
        "x": X,
        "w_gate": W,
        "w_up": W,
        "w_down": W.mT,
        "expert_ids": jnp.zeros((6, 2), jnp.int32),
        "expert_weights": jnp.ones((6, 2)),
    },
    "linear_cross_entropy": {"h": X, "w": jnp.ones((5, 3)), "targets": jnp.zeros(6, jnp.int32)},
    "decode_attention": {"q": Q[:, 0], "k": KV[:, 0], "v": KV[:, 0], "cache": CACHE, "gate": Q[:, 0]},
}


def check_call(function, arguments):
    """Call a function; raise TypeCheckError unless arguments and result have the annotated shapes and dtypes."""
    hints = typing.get_type_hints(function)
    with jaxtyping.jaxtyped("context"):
        for name, value in arguments.items():
            typeguard.check_type(value, hints[name])
        typeguard.check_type(function(**arguments), hints["return"])


@pytest.mark.parametrize("module", [kernels, reference], ids=["kernels", "reference"])
@pytest.mark.parametrize("op", kernels.OPERATIONS)
@pytest.mark.sampled(8)
def test_annotations_accept_valid_arguments(module, op):
    check_call(getattr(module, op), CALLS[op])


@pytest.mark.parametrize("module", [kernels, reference], ids=["kernels", "reference"])
@pytest.mark.parametrize("op", kernels.OPERATIONS)
@pytest.mark.sampled(2)
def test_annotations_reject_wrong_shape_or_dtype_of_each_array(module, op):
    for name, value in CALLS[op].items():
        if not isinstance(value, jax.Array):
            continue
        wrong = [value[None], value.astype(jnp.int32 if jnp.issubdtype(value.dtype, jnp.floating) else jnp.float32)]
        for array in wrong:
            with pytest.raises(typeguard.TypeCheckError):
                check_call(getattr(module, op), CALLS[op] | {name: array})


def test_annotations_bind_an_axis_letter_to_one_size():
    with pytest.raises(typeguard.TypeCheckError):
        check_call(kernels.attention, CALLS["attention"] | {"v": KV[:, :3]})
