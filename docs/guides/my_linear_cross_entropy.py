"""Linear cross-entropy with its backward pass: Pallas kernels for TPUs, interpreted on a CPU.

A tile is 128 rows times 256 words of the vocabulary. One kernel goes along the vocabulary and keeps, of each row, the
largest logit m, the sum l of exp(s - m) and the target's logit. The other computes the logits of a tile again and sums
their gradients: once along the vocabulary for dh, once along the rows for dw.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dantinox.kernels.dispatch import current_device
from dantinox.kernels.precision import matmul_precision
from dantinox.kernels.vma import call_invariant, varying_shape

ROWS, WORDS = 128, 256  # sizes of a tile


def linear_cross_entropy(h, w, targets, *, softcap, z_loss):
    """See `dantinox.kernels.linear_cross_entropy`, which has checked the arguments."""
    if current_device().platform == "gpu" or h.dtype == jnp.float64:
        raise NotImplementedError("my linear cross-entropy runs on TPU and CPU, and not in float64")
    N = h.shape[0]
    h = jnp.where((targets >= 0)[:, None], h, 0)  # dw sums over the rows, and 0 * NaN is NaN
    if h.dtype == jnp.float16:  # a TPU does not multiply it
        h, w = h.astype(jnp.float32), w.astype(jnp.float32)
    h = jnp.pad(h, ((0, -N % ROWS), (0, 0)))
    targets = jnp.pad(targets, (0, -N % ROWS), constant_values=-1)
    return losses(h, w, targets[:, None], softcap, z_loss)[:N]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def losses(h, w, targets, softcap, z_loss):
    """The loss of each row [N], for targets [N, 1] and whole tiles of rows."""
    return losses_forward(h, w, targets, softcap, z_loss)[0]


def losses_forward(h, w, targets, softcap, z_loss):
    """The logsumexp stays in two parts, m and l: the rounding of one number would scale every weight of its row."""
    row_max, total, target_logit = row_stats(h, w, targets, softcap)
    lse = row_max + jnp.log(total)
    loss = row_max - target_logit + jnp.log(total) + z_loss * lse * lse
    return jnp.where(targets >= 0, loss, 0)[:, 0], (h, w, targets, row_max, total)


def losses_backward(softcap, z_loss, residuals, dloss):
    """The gradients of h and w; the targets have none."""
    h, w, targets, row_max, total = residuals
    dloss = jnp.where(targets >= 0, dloss[:, None], 0)
    dlse = (1 + 2 * z_loss * (row_max + jnp.log(total))) * dloss
    rows = (targets, row_max, dlse / total, dloss)
    return gradient("dh", h, w, rows, softcap), gradient("dw", h, w, rows, softcap), None


losses.defvjp(losses_forward, losses_backward)


def dot(a, b, a_axis, b_axis):
    """Multiply two tiles in their own dtype, over one axis of each; accumulate in float32."""
    dims = (((a_axis,), (b_axis,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=matmul_precision(a, b), preferred_element_type=jnp.float32)


def tile_logits(h_ref, w_ref, v, softcap):
    """The logits of tile v of the vocabulary, and the word of each. Words past the end have any logit, NaN too."""
    word = v * WORDS + jax.lax.broadcasted_iota(jnp.int32, (ROWS, WORDS), 1)
    s = dot(h_ref[...], w_ref[...], 1, 1)
    return s if softcap is None else softcap * jnp.tanh(s / softcap), word


def call(kernel, arrays, out, grid, in_specs, out_specs, scratch=()):
    """Call a kernel, also under `shard_map`."""
    run = pl.pallas_call(
        kernel,
        out_shape=out,
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        scratch_shapes=scratch,
        interpret=current_device().platform == "cpu",
        name="my_linear_cross_entropy",
    )
    return call_invariant(run, *arrays)


def row_stats(h, w, targets, softcap):
    """m, l and the target's logit of each row, [N, 1] in float32."""
    (N, M), V = h.shape, w.shape[0]
    row_spec = pl.BlockSpec((ROWS, 1), lambda n, v: (n, 0))
    return call(
        functools.partial(stats_kernel, V=V, softcap=softcap),
        (h, w, targets),
        [varying_shape((N, 1), jnp.float32)] * 3,
        (N // ROWS, pl.cdiv(V, WORDS)),
        [pl.BlockSpec((ROWS, M), lambda n, v: (n, 0)), pl.BlockSpec((WORDS, M), lambda n, v: (v, 0)), row_spec],
        [row_spec] * 3,
    )


def stats_kernel(h_ref, w_ref, target_ref, max_ref, sum_ref, logit_ref, *, V, softcap):
    """Add a tile of logits to the state of its rows, which stays in the output's blocks."""
    v = pl.program_id(1)

    @pl.when(v == 0)
    def init():
        max_ref[...] = jnp.full_like(max_ref, -jnp.inf)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        logit_ref[...] = jnp.zeros_like(logit_ref)

    s, word = tile_logits(h_ref, w_ref, v, softcap)
    s = jnp.where(word < V, s, -jnp.inf)
    row_max = jnp.maximum(max_ref[...], jnp.max(s, axis=1, keepdims=True))
    decay = jnp.exp(max_ref[...] - row_max)
    sum_ref[...] = decay * sum_ref[...] + jnp.sum(jnp.exp(s - row_max), axis=1, keepdims=True)
    logit_ref[...] += jnp.sum(jnp.where(word == target_ref[...], s, 0), axis=1, keepdims=True)
    max_ref[...] = row_max


def gradient(of, h, w, rows, softcap):
    """Return dh or dw, summed over the last axis of the grid."""
    (N, M), V = h.shape, w.shape[0]
    n_v = (lambda n, v: (n, v)) if of == "dh" else (lambda v, n: (n, v))
    row_index, word_index = (lambda *step: (n_v(*step)[0], 0)), (lambda *step: (n_v(*step)[1], 0))
    h_spec, w_spec = pl.BlockSpec((ROWS, M), row_index), pl.BlockSpec((WORDS, M), word_index)
    out, out_spec = (h, h_spec) if of == "dh" else (w, w_spec)
    return call(
        functools.partial(gradient_kernel, of=of, V=V, softcap=softcap),
        (h, w, *rows),
        varying_shape(out.shape, out.dtype),
        n_v(N // ROWS, pl.cdiv(V, WORDS)),
        [h_spec, w_spec, *[pl.BlockSpec((ROWS, 1), row_index)] * 4],
        out_spec,
        [pltpu.VMEM(out_spec.block_shape, jnp.float32)],
    )


def gradient_kernel(h_ref, w_ref, target_ref, max_ref, weight_ref, dloss_ref, out_ref, acc_ref, *, of, V, softcap):
    """Add a tile to dh of its rows, or to dw of its words."""
    v, step = pl.program_id(1 if of == "dh" else 0), pl.program_id(1)

    @pl.when(step == 0)
    def init():
        acc_ref[...] = jnp.zeros_like(acc_ref)

    s, word = tile_logits(h_ref, w_ref, v, softcap)
    ds = jnp.exp(s - max_ref[...]) * weight_ref[...] - jnp.where(word == target_ref[...], dloss_ref[...], 0)
    if softcap is not None:
        ds *= 1 - (s / softcap) ** 2
    ds = jnp.where(word < V, ds, 0)
    if of == "dh":
        row_word = v * WORDS + jax.lax.broadcasted_iota(jnp.int32, (WORDS, 1), 0)
        w = jnp.where(row_word < V, w_ref[...], 0)  # 0 * NaN is NaN
        acc_ref[...] += dot(ds.astype(w.dtype), w, 1, 0)
    else:
        acc_ref[...] += dot(ds.astype(h_ref.dtype), h_ref[...], 0, 0)

    @pl.when(step == pl.num_programs(1) - 1)
    def write():
        out_ref[...] = acc_ref[...].astype(out_ref.dtype)
