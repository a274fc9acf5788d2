"""Shared by the kernels of the linear cross-entropy: tiles of logits, their gradients, and the call."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dantinox.kernels.cost import Cost
from dantinox.kernels.dispatch import Device
from dantinox.kernels.ops.linear_cross_entropy.pallas_tpu.block_sizes import VMEM_BYTES, BlockSizes
from dantinox.kernels.precision import matmul_precision
from dantinox.kernels.softcap import cap_derivative, cap_scores
from dantinox.kernels.vma import call_invariant, varying_shape

Array = jax.Array
Ref = Any


class Config(NamedTuple):
    """The static parameters of a kernel.

    Attributes:
        sizes: its blocks.
        V: size of the vocabulary; the last block of w may reach past it.
        softcap: bound of the logits, or None.
        z_loss: weight of the squared logsumexp.
        device: the device.
    """

    sizes: BlockSizes
    V: int
    softcap: float | None
    z_loss: float
    device: Device

    @property
    def num_v_blocks(self) -> int:
        """Blocks of the vocabulary."""
        return -(-self.V // self.sizes.block_v)


class Subtile(NamedTuple):
    """Part of a tile of logits [block_v, block_n].

    Attributes:
        v, n: slices of its rows and columns.
        first_v: its first row in the vocabulary.
        num_v: its rows.
    """

    v: Any
    n: Any
    first_v: Any
    num_v: int

    def is_target(self, targets: Array) -> Array:
        """Return a mask: true at the target of each column, for targets [1, columns]."""
        return self._words(targets.shape[1]) == targets

    def in_vocabulary(self, V: int, num_columns: int) -> Array:
        """Return a mask: true in rows of the vocabulary."""
        return self._words(num_columns) < V

    def _words(self, num_columns: int) -> Array:
        return self.first_v + jax.lax.broadcasted_iota(jnp.int32, (self.num_v, num_columns), 0)


def dot_f32(a: Array, b: Array, axes: tuple[int, int]) -> Array:
    """Multiply in float32, contracting axis axes[0] of a with axis axes[1] of b."""
    dims = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=matmul_precision(a, b), preferred_element_type=jnp.float32)


def strips(config: Config) -> Iterator[Any]:
    """Yield slices of the columns of a tile."""
    yield from _slices(config.sizes.block_n, config.sizes.sub_n)


def subtiles(config: Config, v_block: Any, n: Any) -> Iterator[Subtile]:
    """Yield the parts of one strip of columns, from the first row to the last."""
    for v in _slices(config.sizes.block_v, config.sizes.sub_v):
        yield Subtile(v, n, v_block * config.sizes.block_v + v.start, v.size)


def _slices(size: int, step: int) -> list[Any]:
    return [pl.ds(start, min(step, size - start)) for start in range(0, size, step)]


def store_logits(s_ref: Ref, w_ref: Ref, h_ref: Ref, n: Any, softcap: float | None) -> None:
    """Write the logits of one strip of columns."""
    s = dot_f32(w_ref[...], h_ref[n], (1, 1))
    s_ref[:, n] = s if softcap is None else cap_scores(s, scale=1.0, softcap=softcap)


def logit_gradients(config: Config, tile: Subtile, s: Array, rows: "RowRefs", *, masked: bool) -> Array:
    """Return the gradients of the logits s of one part; 0 past the vocabulary if `masked`."""
    row_max, dlse, dloss, targets = (ref[:, tile.n] for ref in rows)
    ds = jnp.exp(s - row_max) * dlse - jnp.where(tile.is_target(targets), dloss, 0.0)
    if config.softcap is not None:
        ds = ds * cap_derivative(s, softcap=config.softcap)
    return jnp.where(tile.in_vocabulary(config.V, s.shape[1]), ds, 0.0) if masked else ds


class RowRefs(NamedTuple):
    """One value per row of h, [1, block_n]: logsumexp, its gradient, the loss's gradient, the target."""

    row_max: Ref
    dlse: Ref
    dloss: Ref
    targets: Ref


def for_each_tile(config: Config, v_block: Any, body: Callable[[bool], None]) -> None:
    """Run body(masked) with masked=True in the block that reaches past the vocabulary."""
    if config.V % config.sizes.block_v == 0:
        body(False)
        return
    is_last = v_block == config.num_v_blocks - 1

    @pl.when(is_last)
    def masked_tile() -> None:
        body(True)

    if config.num_v_blocks > 1:

        @pl.when(jnp.logical_not(is_last))
        def whole_tile() -> None:
            body(False)


def rows_of_w(config: Config, w_ref: Ref, v_block: Any, *, masked: bool) -> Array:
    """Return the block of w, with zeros past the vocabulary if `masked`: unwritten memory may hold NaN."""
    w = w_ref[...]
    if not masked:
        return w
    row = v_block * config.sizes.block_v + jax.lax.broadcasted_iota(jnp.int32, w.shape, 0)
    return jnp.where(row < config.V, w, jnp.zeros_like(w))


def call_kernel(
    kernel: Callable[..., None],
    config: Config,
    grid: tuple[int, int],
    in_specs: Sequence[pl.BlockSpec],
    out_specs: Sequence[pl.BlockSpec],
    out_shapes: Sequence[tuple[tuple[int, ...], Any]],
    scratch: Sequence[Any],
    operands: Sequence[Array],
    cost: Cost,
    name: str,
) -> list[Array]:
    """Run a kernel over a grid whose last axis adds up."""
    is_interpreted = config.device.platform == "cpu"

    def call(*operands: Array) -> list[Array]:
        return pl.pallas_call(
            functools.partial(kernel, config=config),
            out_shape=[varying_shape(shape, dtype, *operands) for shape, dtype in out_shapes],
            grid=grid,
            in_specs=list(in_specs),
            out_specs=list(out_specs),
            scratch_shapes=list(scratch),
            compiler_params=None
            if is_interpreted
            else pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES),
            cost_estimate=cost.to_pallas(),
            interpret=is_interpreted,
            name=name,
        )(*operands)

    return call_invariant(call, *operands) if is_interpreted else call(*operands)
