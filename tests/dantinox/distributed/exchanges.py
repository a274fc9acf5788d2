"""The exchanges of a mesh alone, against one device; run as a program with four simulated devices."""

import functools
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from dantinox import kernels
from dantinox.distributed.collectives import per_device, whole_weight
from dantinox.distributed.context import attend_over_context
from dantinox.distributed.experts import send_to_experts
from dantinox.distributed.mesh import make_mesh
from dantinox.kernels.dispatch import Device, target_device

E, K, N, M, F = 8, 2, 256, 16, 24


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def mesh_of(**sizes: int) -> Mesh:
    mesh = make_mesh(sizes)
    assert mesh is not None
    return mesh


def assert_close(actual, expected, name: str) -> None:
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-6 * float(jnp.abs(b).max() + 1), err_msg=name)


def routings() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    balanced = np.stack([rng.permutation(E)[:K] for _ in range(N)])
    rare = balanced.copy()
    rare[1:] = [0, 1]
    outside = balanced.copy()
    outside[::3, 1], outside[1::3, 0], outside[5] = E, -1, E + 3
    return {
        "balanced": balanced,
        "all to the first device": np.tile([0, 1], (N, 1)),
        "all to one expert and others": np.stack([np.full(N, 7), np.arange(N) % 7], axis=1),
        "one token elsewhere": rare,
        "ids outside": outside,
    }


def ragged_all_to_all(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """The collective of that name in `jax.lax`, which XLA for CPUs lacks, by exchanges of whole arrays.

    Rows that no device sends are NaN in what it exchanges, and so is all of it if the sizes disagree.
    """
    swap = functools.partial(jax.lax.all_to_all, axis_name=axis_name, split_axis=0, concat_axis=0)
    rows = jnp.arange(operand.shape[0])
    sliced = jnp.take(operand, input_offsets[:, None] + rows, axis=0, mode="clip")
    hole = jnp.nan if jnp.issubdtype(operand.dtype, jnp.floating) else -(2**31)
    sliced = swap(jnp.where(jnp.expand_dims(rows < send_sizes[:, None], range(2, sliced.ndim)), sliced, hole))
    agree = jnp.all(swap(send_sizes[:, None])[:, 0] == recv_sizes)
    for source in range(input_offsets.shape[0]):
        place = swap(output_offsets[:, None])[source, 0] + rows
        place = jnp.where(rows < recv_sizes[source], place, output.shape[0])
        output = output.at[place].set(jnp.where(agree, sliced[source], hole), mode="drop")
    return output


def check_experts(*, ragged: bool) -> None:
    """Any skew, gradients included; queues longer than one round."""
    mesh = mesh_of(expert=4)
    x, dy, weights = draw(N, M), draw(N, M, seed=2), jnp.abs(draw(N, K, seed=3))
    matrices = draw(E, M, F, seed=4), draw(E, M, F, seed=5), draw(E, F, M, seed=6)

    def experts(w_gate, w_up, w_down, tokens, ids, weights):
        return kernels.moe_mlp(tokens, w_gate, w_up, w_down, ids, weights, implementation="xla")

    def share(matrices, x, ids, weights, dy):
        with per_device(mesh, ragged=ragged):
            f = lambda matrices, x, weights: send_to_experts(experts, matrices, x, ids, weights, E)
            y, pull = jax.vjp(f, matrices, x, weights)
            return y, pull(dy)

    cut = P("expert")
    on_mesh = jax.jit(jax.shard_map(share, mesh=mesh, in_specs=(cut,) * 5, out_specs=cut))

    def whole(matrices, x, ids, weights, dy):
        reference = lambda w, x, weights: kernels.moe_mlp(x, *w, ids, weights, implementation="reference")
        y, pull = jax.vjp(reference, matrices, x, weights)
        return y, pull(dy)

    for name, ids in routings().items():
        arguments = matrices, x, jnp.int32(ids), weights, dy
        result = on_mesh(*arguments)
        assert_close(result, jax.jit(whole)(*arguments), name)
        again = on_mesh(*arguments)
        assert all(bool((a == b).all()) for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(again))), name


def check_context(windows: Sequence[int | None]) -> None:
    """Windows that end in this device's tokens, in the neighbour's, further left, and none; gradients included."""
    mesh = mesh_of(context=4)
    B, T, H, K, D = 2, 32, 4, 2, 8
    q, k, v, gate, sinks = (
        draw(B, T, H, D),
        draw(B, T, K, D, seed=1),
        draw(B, T, K, D, seed=2),
        draw(B, T, H, 1),
        draw(H),
    )
    do, cut = draw(B, T, H, D, seed=3), P(None, "context")
    for window in windows:

        def attend(sinks, q, k, v, gate, segment_ids=None, window=window):
            options = dict(gate=gate, sinks=sinks, window=window, segment_ids=segment_ids, implementation="xla")
            return kernels.attention(q, k, v, **options)

        def share(sinks, q, k, v, gate, do, attend=attend, window=window):
            with per_device(mesh):
                f = lambda *x: attend_over_context(attend, *x, window)
                o, pull = jax.vjp(f, sinks, q, k, v, gate)
                return o, pull(do)

        def whole(sinks, q, k, v, gate, do, attend=attend):
            o, pull = jax.vjp(attend, sinks, q, k, v, gate)
            return o, pull(do)

        specs = P(), cut, cut, cut, cut, cut
        out_specs = cut, (P(), cut, cut, cut, cut)
        on_mesh = jax.jit(jax.shard_map(share, mesh=mesh, in_specs=specs, out_specs=out_specs))
        arguments = sinks, q, k, v, gate, do
        text = on_mesh.lower(*arguments).compile().as_text()
        if window is not None and window < 25:
            assert "all-gather" not in text and ("collective-permute" in text or window == 1), window
        assert_close(on_mesh(*arguments), jax.jit(whole)(*arguments), f"window {window}")


def check_weights(device: Device, letters: str, **sizes: int) -> None:
    """A bfloat16 weight's gradient is summed in float32, and each device keeps its share of M."""
    mesh, shape = mesh_of(**sizes), (6, M) if letters == "FM" else (M, 6)
    w, dy = draw(*shape), draw(4, *shape, seed=1)

    def share(w, dy):
        with per_device(mesh), target_device(*device):
            y, pull = jax.vjp(lambda w: whole_weight(w, letters, jnp.dtype("bfloat16")), w)
            return y[None], pull(dy[0].astype(jnp.bfloat16))[0]

    batch, cut = P(tuple(sizes)), P(*("fsdp" if letter == "M" else None for letter in letters))
    on_mesh = jax.jit(jax.shard_map(share, mesh=mesh, in_specs=(cut, batch), out_specs=(batch, cut)))
    y, dw = on_mesh(w, dy)
    np.testing.assert_array_equal(y, np.broadcast_to(w.astype(jnp.bfloat16), (4, *shape)))
    np.testing.assert_allclose(dw, dy.astype(jnp.bfloat16).astype(jnp.float32).sum(0), rtol=1e-6)
    assert dw.dtype == jnp.float32
    steps = 2 if device.platform == "tpu" and mesh.size == sizes["fsdp"] else 1
    assert on_mesh.lower(w, dy).as_text().count("stablehlo.reduce_scatter") == steps


if __name__ == "__main__":
    for device in (Device("cpu", "cpu"), Device("tpu", "TPU v6 lite")):
        for letters in ("FM", "MF"):
            check_weights(device, letters, data=2, fsdp=2)
            check_weights(device, letters, fsdp=4)
    check_context((9, 26, None) if "--short" in sys.argv else (1, 2, 8, 9, 10, 17, 25, 26, 31, 32, 100, None))
    check_experts(ragged=False)
    jax.lax.ragged_all_to_all = ragged_all_to_all
    check_experts(ragged=True)
