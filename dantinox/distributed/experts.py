"""A mixture whose experts are cut over the axis expert: tokens travel to the devices of their experts and back.

A device has a queue of tokens for each device of the axis: a token is in it once, however many experts it has there. In
one round every device sends up to C tokens of each queue (`all_to_all`), the experts run, and the outputs return. A
balanced router needs one round. A skewed one needs more, and no token is dropped: the number of rounds is that of the
longest queue of all, and memory is that of one round.

By default the rows that a queue leaves empty travel too. `ragged_all_to_all`, of TPUs only, leaves them out: the slack
over a balanced router, and most of the rounds of a skewed one, whose other queues are empty.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dantinox.distributed.collectives import TOKEN_AXES, axis_index, axis_size, exchanges_ragged, used_axes
from dantinox.kernels.vma import match_vma

Array = jax.Array
Matrices = tuple[Array | None, ...]
SLACK = 1.25  # tokens per queue and round over those of a balanced router


def send_to_experts(
    experts: Callable[..., Array], matrices: Matrices, tokens: Array, ids: Array, weights: Array, E: int
) -> Array:
    """Apply the chosen experts to the tokens of this device.

    Args:
        experts: (*matrices, tokens, ids, weights) -> y, for ids that count this device's experts; an id outside of them
            contributes nothing.
        matrices: this device's share of the experts' parameters.
        tokens: [N, M].
        ids: [N, k] int32, in the whole mixture.
        weights: [N, k].
        E: experts of the whole mixture.

    Returns:
        [N, M]; of a device along the axis tensor, its partial sums.
    """
    devices = axis_size("expert")
    if devices == 1:
        return experts(*matrices, tokens, ids, weights)
    N, k = ids.shape
    probability = 1 - (1 - 1 / devices) ** k  # of a token to be in a given queue
    rows = min(N, -(-math.ceil(SLACK * probability * N) // 8) * 8)
    tokens, ids, weights = (
        match_vma(x, tokens, *[m for m in matrices if m is not None]) for x in (tokens, ids, weights)
    )
    mixture = _Mixture(experts, E // devices, devices, rows, exchanges_ragged())
    return _exchange(mixture, matrices, tokens, ids, weights)


class _Mixture(NamedTuple):
    """What is static: the experts of one device, their number, the devices and the rows of a queue per round.

    With `ragged`, only the rows that exist travel.
    """

    experts: Callable[..., Array]
    num_local: int
    devices: int
    rows: int
    ragged: bool


class _Queues(NamedTuple):
    """The queues of this device.

    Attributes:
        order: for each queue its tokens in order, then the others, [devices, N padded to whole rounds] int32.
        count: length of each queue, [devices] int32.
        place: for each token and choice the place in its queue, [N, k] int32.
        target: for each token and choice the device of the expert, [N, k] int32; `devices` for a choice whose token is
            in the queue already, or of no expert.
        rounds: rounds that the longest queue of all devices needs, int32 scalar.
        expected: lengths of the queues for this device, [devices] int32; None unless only rows that exist travel.
    """

    order: Array
    count: Array
    place: Array
    target: Array
    rounds: Array
    expected: Array | None


def _make_queues(mixture: _Mixture, ids: Array) -> _Queues:
    N, k = ids.shape
    target = jnp.where(
        (ids >= 0) & (ids < mixture.num_local * mixture.devices), ids // mixture.num_local, mixture.devices
    )
    repeats = [jnp.any(target[:, :j] == target[:, j : j + 1], axis=1) for j in range(k)]
    target = jnp.where(jnp.stack(repeats, axis=1), mixture.devices, target)
    queued = jnp.any(target[None] == jnp.arange(mixture.devices)[:, None, None], axis=2)  # [devices, N]
    count = jnp.sum(queued, axis=1, dtype=jnp.int32)
    order = jnp.argsort(~queued, axis=1, stable=True).astype(jnp.int32)
    order = jnp.pad(order, ((0, 0), (0, -N % mixture.rows)))
    places = jnp.cumsum(queued, axis=1, dtype=jnp.int32) - 1
    place = jnp.take_along_axis(places.T, jnp.minimum(target, mixture.devices - 1), axis=1)
    longest = jax.lax.pmax(jnp.max(count), used_axes((*TOKEN_AXES, "tensor")))
    expected = jax.lax.all_to_all(count, "expert", 0, 0, tiled=True) if mixture.ragged else None
    return _Queues(order, count, place, target, -(-longest // mixture.rows), expected)


def _all_to_all(mixture: _Mixture, queues: _Queues, number: Array, x: Array, *, back: bool = False) -> Array:
    """Exchange the rows x [devices, rows, ...] of one round; return them by sender.

    Args:
        mixture: what is static.
        queues: those of this device.
        number: of the round.
        x: rows by receiver.
        back: whether rows of other devices' queues return.
    """
    if queues.expected is None:
        return jax.lax.all_to_all(x, "expert", 0, 0)
    counts = (queues.expected, queues.count) if back else (queues.count, queues.expected)
    sent, received = (jnp.clip(count - number * mixture.rows, 0, mixture.rows) for count in counts)
    starts = jnp.arange(mixture.devices, dtype=jnp.int32) * mixture.rows
    own = jnp.full(mixture.devices, mixture.rows, jnp.int32) * axis_index("expert")
    starts, own = match_vma(starts, sent), match_vma(own, sent)
    flat = x.reshape(-1, *x.shape[2:])
    rows = jax.lax.ragged_all_to_all(flat, jnp.zeros_like(flat), starts, sent, own, received, axis_name="expert")
    return rows.reshape(x.shape)


def _send(mixture: _Mixture, queues: _Queues, number: Array, x: Array, empty: float = 0) -> Array:
    """Send the rows of x [N, ...] of one round and return those received, [devices * rows, ...].

    A received row that no token fills is `empty`.
    """
    start = number * mixture.rows
    order = jax.lax.dynamic_slice_in_dim(queues.order, start, mixture.rows, axis=1)
    exists = start + jnp.arange(mixture.rows)[None] < queues.count[:, None]
    fill = jnp.asarray(empty, x.dtype)
    rows = jnp.where(exists[..., None], x[order], fill)
    rows = _all_to_all(mixture, queues, number, rows)
    if queues.expected is not None:
        exists = start + jnp.arange(mixture.rows)[None] < queues.expected[:, None]
        rows = jnp.where(exists[..., None], rows, fill)
    return rows.reshape(-1, *x.shape[1:])


def _return(mixture: _Mixture, queues: _Queues, number: Array, y: Array) -> Array:
    """Return received rows y [devices * rows, ...] to their devices and add up each token's, [N, ...]."""
    y = y.reshape(mixture.devices, mixture.rows, *y.shape[1:])
    y = _all_to_all(mixture, queues, number, y, back=True)
    y = y.reshape(-1, *y.shape[2:])
    total = jnp.zeros((queues.target.shape[0], *y.shape[1:]), jnp.float32)
    for j in range(queues.target.shape[1]):  # a gather per choice: the order of the sum is fixed
        place = queues.place[:, j] - number * mixture.rows
        exists = (place >= 0) & (place < mixture.rows) & (queues.target[:, j] < mixture.devices)
        row = jnp.where(exists, queues.target[:, j] * mixture.rows + place, 0)
        total = total + jnp.where(exists[:, None], y[row], 0).astype(jnp.float32)
    return total


def _run(mixture: _Mixture, ids: Array, matrices: Matrices, tokens: Array, weights: Array) -> Array:
    local = ids - axis_index("expert") * mixture.num_local
    local = jnp.where((local >= 0) & (local < mixture.num_local), local, mixture.num_local)
    return mixture.experts(*matrices, tokens, local, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _exchange(mixture: _Mixture, matrices: Matrices, tokens: Array, ids: Array, weights: Array) -> Array:
    queues = _make_queues(mixture, ids)

    def one_round(number: Array, y: Array) -> Array:
        received = (_send(mixture, queues, number, x) for x in (tokens, weights))
        there = _send(mixture, queues, number, ids, mixture.num_local * mixture.devices)
        tokens_there, weights_there = received
        return y + _return(mixture, queues, number, _run(mixture, there, matrices, tokens_there, weights_there))

    zeros = match_vma(jnp.zeros(tokens.shape, jnp.float32), tokens)
    return jax.lax.fori_loop(0, queues.rounds, one_round, zeros).astype(tokens.dtype)


def _exchange_fwd(mixture: _Mixture, matrices: Matrices, tokens: Array, ids: Array, weights: Array) -> tuple:
    return _exchange(mixture, matrices, tokens, ids, weights), (matrices, tokens, ids, weights)


def _exchange_bwd(mixture: _Mixture, residuals: tuple, dy: Array) -> tuple:
    matrices, tokens, ids, weights = residuals
    queues = _make_queues(mixture, ids)

    def one_round(number: Array, grads: tuple) -> tuple:
        there = _send(mixture, queues, number, ids, mixture.num_local * mixture.devices)
        primals = (matrices, _send(mixture, queues, number, tokens), _send(mixture, queues, number, weights))
        _, vjp = jax.vjp(functools.partial(_run, mixture, there), *primals)
        dmatrices, dtokens, dweights = vjp(_send(mixture, queues, number, dy))
        new = (dmatrices, *(_return(mixture, queues, number, x) for x in (dtokens, dweights)))
        return jax.tree.map(lambda total, x: total + x.astype(total.dtype), grads, new)

    zeros = jax.tree.map(lambda x: match_vma(jnp.zeros(x.shape, jnp.float32), x), (matrices, tokens, weights))
    grads = jax.lax.fori_loop(0, queues.rounds, one_round, zeros)
    dmatrices, dtokens, dweights = jax.tree.map(
        lambda x, like: x.astype(like.dtype), grads, (matrices, tokens, weights)
    )
    return dmatrices, dtokens, None, dweights


_exchange.defvjp(_exchange_fwd, _exchange_bwd)
