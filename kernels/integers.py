"""Ids, lengths and sizes of any integer dtype as int32, and which of their values are taken.

Values of an array on a device are not read back, so that nothing waits for it: what such an array may not hold is
clamped, as each function says. Values that are already on the host, in a NumPy array or a list, are checked. Two checks
of eager calls do read values back, those that use `concrete_value`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
Integers = jax.Array | np.ndarray
INT32 = np.iinfo(np.int32)


def native_order(x: np.ndarray) -> np.ndarray:
    """Return x in the byte order of this machine."""
    return x if x.dtype.isnative else x.astype(x.dtype.newbyteorder("="))


def as_integers(name: str, x: Any, axes: str) -> Integers:
    """Convert x to an array of integers that has one axis per letter of `axes`; on the host it keeps all 64 bits.

    Raises:
        ValueError: x is not a valid array of integers with these axes.
    """
    if not isinstance(x, jax.Array):
        try:
            x = jnp.asarray(x) if hasattr(x, "__jax_array__") else native_order(np.asarray(x))
        except (TypeError, ValueError):
            raise ValueError(f"{name} is {type(x).__name__}; allowed: an array [{', '.join(axes)}]") from None
    if x.ndim != len(axes):
        raise ValueError(f"{name} has shape {x.shape}; allowed: [{', '.join(axes)}]")
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"{name} has dtype {x.dtype}; allowed: int32 or another integer dtype")
    return x


def saturate_int32(x: Integers) -> Array:
    """Convert integers to int32; values beyond its range become its ends."""
    info = jnp.iinfo(x.dtype)
    low, high = max(int(info.min), INT32.min), min(int(info.max), INT32.max)
    if (low, high) != (int(info.min), int(info.max)):
        clip = jnp.clip if isinstance(x, jax.Array) else np.clip
        x = clip(x, x.dtype.type(low), x.dtype.type(high))
    return jnp.asarray(x.astype(np.int32))


def check_range(name: str, x: Integers, low: int, high: int) -> None:
    """Check values that are on the host: low <= x <= high."""
    if isinstance(x, np.ndarray) and x.size and not (low <= int(x.min()) and int(x.max()) <= high):
        wrong = int(x.min()) if int(x.min()) < low else int(x.max())
        raise ValueError(f"{name} holds {wrong}; allowed: {low} to {high}")


def concrete_value(x: Any) -> np.ndarray | None:
    """Return the value of an array on the host, or of one on a device that is not traced; None for any other.

    It waits for the device. Only checks of eager calls use it whose failure would go unseen otherwise.
    """
    if isinstance(x, jax.core.Tracer) or (isinstance(x, jax.Array) and not x.is_fully_addressable):
        return None
    return np.asarray(x)


def group_sizes_within(group_sizes: Integers, N: int) -> Array:
    """Return sizes [E] int32, each at least 0, that sum to at most N rows.

    On a device, negative sizes count as 0 and groups end at row N.

    Raises:
        ValueError: sizes on the host are negative or sum to more than N.
    """
    check_range("group_sizes", group_sizes, 0, INT32.max)
    if isinstance(group_sizes, np.ndarray) and (total := sum(map(int, group_sizes))) > N:
        raise ValueError(f"group_sizes sums to {total}; allowed: at most {N}, the rows of x")
    ends = jnp.minimum(jnp.cumsum(jnp.clip(saturate_int32(group_sizes), 0, N), dtype=jnp.int32), N)
    return jnp.diff(ends, prepend=jnp.zeros_like(ends[:1]))


def expert_ids_within(expert_ids: Integers, E: int) -> Array:
    """Return ids int32 in [0, E]; E stands for every id outside [0, E), whose choice contributes nothing."""
    ids = saturate_int32(expert_ids)
    return jnp.where((ids >= 0) & (ids < E), ids, jnp.int32(E))


def targets_within(targets: Integers, V: int) -> Array:
    """Return targets int32 in [-1, V); -1 stands for every negative one, whose row takes no part.

    On a device, a target of V or more becomes -1 too.

    Raises:
        ValueError: a target on the host is V or more.
    """
    if isinstance(targets, np.ndarray) and targets.size and (largest := int(targets.max())) >= V:
        raise ValueError(f"targets holds {largest}; allowed: 0 to {V - 1}, or negative for a row that takes no part")
    ids = saturate_int32(targets)
    return jnp.where((ids >= 0) & (ids < V), ids, jnp.int32(-1))


def ring_positions(length: Integers, C: int, T: int = 1) -> Array:
    """Return int32 lengths with the same slot, length % C, and as many cached tokens, min(length, C).

    T tokens are about to be appended.

    On a device, negative lengths count as 0.

    Raises:
        ValueError: the dtype is narrower than 32 bits, so that counting would overflow; or a length on the host is
            negative or among the last T of its dtype.
    """
    if length.dtype.itemsize < 4:
        raise ValueError(f"cache.length has dtype {length.dtype}; allowed: int32, or an integer dtype as wide or wider")
    info = jnp.iinfo(length.dtype)
    check_range("cache.length", length, 0, int(info.max) - T)
    length = jnp.maximum(length, jnp.zeros_like(length))
    if length.dtype == jnp.int32:
        return length
    slots = length.dtype.type(C)
    return jnp.where(length < slots, length, slots + length % slots).astype(jnp.int32)


def comparable_ids(q_ids: Integers, kv_ids: Integers) -> tuple[Array, Array]:
    """Return int32 ids [B, T] and [B, S]: a query's and a key's are equal where the given ones are, and only there.

    If both arrays are the same object, so are the results.

    Raises:
        ValueError: one array is on a device without 64-bit integers and the other holds ids beyond int32.
    """
    arrays = [_narrow_on_host(x) for x in ([q_ids] if q_ids is kv_ids else [q_ids, kv_ids])]
    wide = [x for x in arrays if x.dtype.itemsize > 4]
    on_device = [x for x in arrays if isinstance(x, jax.Array)]
    if wide and on_device and not jax.config.jax_enable_x64:
        largest = max(map(int, np.ravel(wide[0])), key=abs)
        raise ValueError(f"segment_ids holds {largest} in one array; allowed beside an array on a device: int32 values")
    if len({_is_unsigned(x) for x in arrays}) > 1:
        arrays = [_as_signed(x, np.dtype(np.int64 if wide else np.int32)) for x in arrays]
    if wide:
        arrays = _ranks(arrays)
    # Unsigned 32-bit ids are shifted, which keeps their order.
    arrays = [x ^ np.uint32(1 << 31) if x.dtype == np.uint32 else x for x in arrays]
    ids = [jnp.asarray(x.view(np.int32) if x.dtype == np.uint32 else x.astype(np.int32)) for x in arrays]
    return ids[0], ids[-1]


def _narrow_on_host(x: Integers) -> Integers:
    """Convert an array on the host to int32 if its values allow it."""
    fits = isinstance(x, np.ndarray) and (not x.size or (x.min() >= INT32.min and x.max() <= INT32.max))
    return x.astype(np.int32) if fits else x


def _is_unsigned(x: Integers) -> bool:
    """Return whether the dtype has values beyond those of the signed dtype of its size that int32 does not hold."""
    return x.dtype.itemsize >= 4 and jnp.issubdtype(x.dtype, jnp.unsignedinteger)


def _as_signed(x: Integers, dtype: np.dtype) -> Integers:
    """Convert an array of ids to a signed dtype; ids that the other array's dtype cannot hold become negative."""
    where = jnp.where if isinstance(x, jax.Array) else np.where
    if not _is_unsigned(x):
        x = x.astype(dtype)
        return where(x < 0, dtype.type(-1), x)
    is_held = x <= x.dtype.type(min(np.iinfo(dtype).max, np.iinfo(x.dtype).max))
    return where(is_held, x.astype(dtype), dtype.type(-2))


def _ranks(arrays: list[Integers]) -> list[Integers]:
    """Return the rank of each id among those of all arrays, on a device among those of its sequence."""
    if all(isinstance(x, np.ndarray) for x in arrays):
        ranks = np.unique(np.concatenate(arrays, axis=1), return_inverse=True)[1].reshape(len(arrays[0]), -1)
    else:
        dtype = max((x.dtype for x in arrays), key=lambda dtype: dtype.itemsize)
        ids = jnp.concatenate([jnp.asarray(x).astype(dtype) for x in arrays], axis=1)
        order = jnp.argsort(ids, axis=1)
        sorted_ids = jnp.take_along_axis(ids, order, axis=1)
        is_new = jnp.diff(sorted_ids, axis=1, prepend=sorted_ids[:, :1]) != 0
        ranks = jnp.take_along_axis(jnp.cumsum(is_new, axis=1, dtype=np.int32), jnp.argsort(order, axis=1), axis=1)
    ends = np.cumsum([x.shape[1] for x in arrays])
    return [ranks[:, end - x.shape[1] : end] for x, end in zip(arrays, ends, strict=True)]
