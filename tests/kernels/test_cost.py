"""Sizes of intermediates: no S x S scores with a window, memory linear in S, no N x E x F activations."""

import jax
import jax.numpy as jnp
import pytest

from dantinox import kernels
from tests.helpers.jaxpr_walk import largest_intermediate, matmuls


def attention(q: jax.Array, **options) -> jax.Array:
    """Self-attention of one array, in XLA."""
    return kernels.attention(q, q, q, implementation="xla", **options)


def gradient(f):
    """The gradient of f's sum of squares."""
    return jax.grad(lambda *x: jnp.sum(f(*x) ** 2))


def query(S: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, S, 1, 16), jnp.float32)


@pytest.mark.parametrize("segments", [False, True], ids=["no segments", "segments"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_window_does_not_materialize_full_scores(backward, segments):
    """Fault 11: scores and masks of all S x S pairs are built, whatever the window."""
    S, W = 2048, 64
    ids = jnp.zeros((1, S), jnp.int32) if segments else None
    f = lambda q: attention(q, window=W, segment_ids=ids)
    jaxpr = jax.make_jaxpr(gradient(f) if backward else f)(query(S))
    assert largest_intermediate(jaxpr) < S * S // 4
    assert matmuls(jaxpr), "the walk saw no matrix product at all"


def test_jaxpr_walk_detects_full_scores():
    S = 512
    f = lambda q: kernels.attention(q, q, q, window=64, implementation="reference")
    assert largest_intermediate(jax.make_jaxpr(jax.jit(f))(query(S))) >= S * S


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(
    ("options", "S"),
    [({"window": 64}, 1024), pytest.param({}, 2048, marks=pytest.mark.slow)],
    ids=["window", "chunked"],
)
def test_memory_grows_linearly_with_sequence_length(options, S, backward):
    """Fault 11: scores and masks of all S x S pairs are built, whatever the window."""
    f = lambda q: attention(q, **options)
    program = jax.jit(gradient(f) if backward else f)
    one, two = (program.lower(query(n)).compile().memory_analysis().temp_size_in_bytes for n in (S, 2 * S))
    assert 0 < two <= 2.3 * one, f"{one} bytes at {S}, {two} at {2 * S}"


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_long_full_attention_does_not_materialize_full_scores(backward):
    S = 4096
    jaxpr = jax.make_jaxpr(gradient(attention) if backward else attention)(query(S))
    assert largest_intermediate(jaxpr) < S * S // 4


def experts(N: int, E: int, k: int, M: int = 32, F: int = 48) -> tuple[list, jax.ShapeDtypeStruct]:
    """(differentiable arguments, ids) of `moe_mlp`, as shapes."""
    shapes = [(N, M), (E, M, F), (E, M, F), (E, F, M), (N, k)]
    return [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes], jax.ShapeDtypeStruct((N, k), jnp.int32)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_intermediates_do_not_grow_with_the_number_of_experts(backward):
    """Fault 10: every expert runs on every token. Here nothing of N x E x F is built: only weights grow with E."""

    def build(E: int) -> int:
        (x, gate, up, down, weights), ids = experts(N=256, E=E, k=2)
        f = lambda x, gate, up, down, weights, ids: kernels.moe_mlp(
            x, gate, up, down, ids, weights, implementation="xla"
        )
        g = jax.grad(lambda *a: jnp.sum(f(*a) ** 2), argnums=(0, 1, 2, 3, 4)) if backward else f
        return largest_intermediate(jax.make_jaxpr(g)(x, gate, up, down, weights, ids))

    N, M, F = 256, 32, 48
    assert build(64) < N * 64 * F // 4
    # Beyond the weights' own gradients [E, M, F] nothing grows.
    assert build(64) <= max(build(4), 64 * M * F if backward else 0)


@pytest.mark.parametrize("op", ["grouped_matmul", "moe_mlp"])
def test_tile_matmul_shapes_do_not_depend_on_the_number_of_experts(op):
    """Each product inside the loops is one tile times one expert's matrix: there is no E in its shape."""

    def shapes(E: int) -> list:
        (x, gate, up, down, weights), ids = experts(N=256, E=E, k=2)
        if op == "moe_mlp":
            f = lambda x, gate, up, down, weights, ids: kernels.moe_mlp(
                x, gate, up, down, ids, weights, implementation="xla"
            )
            jaxpr = jax.make_jaxpr(f)(x, gate, up, down, weights, ids)
        else:
            sizes = jax.ShapeDtypeStruct((E,), jnp.int32)
            f = lambda x, w, sizes: kernels.grouped_matmul(x, w, sizes, implementation="xla")
            jaxpr = jax.make_jaxpr(f)(x, gate, sizes)
        return [[v.aval.shape for v in e.invars] for e in matmuls(jaxpr) if e.primitive.name == "dot_general"]

    if jax.default_backend() == "cpu":
        assert shapes(4) and shapes(4) == shapes(32)
