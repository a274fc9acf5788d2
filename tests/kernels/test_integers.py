"""Ids, lengths, sizes and flags: of any integer dtype and right, or refused by name."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dantinox import kernels
from dantinox.kernels import integers, validation

DTYPES = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", ">i4", ">u8")
EDGES = (0, 1, -1, -2, 2, 127, -128, 255, 65535, 2**31 - 1, 2**31, -(2**31), 2**32 - 1, 2**32 + 1, 2**53, 2**53 + 1)
EDGES += (2**63 - 1, 2**63, -(2**63), 2**64 - 1)


def edge_values(dtype: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Values at the edges of all integer dtypes, as far as `dtype` holds them."""
    info = np.iinfo(dtype)
    held = [value for value in EDGES if info.min <= value <= info.max]
    picks = np.random.default_rng(seed).integers(0, len(held), shape)
    return np.array([held[i] for i in picks.ravel()], dtype).reshape(shape)


def equal_pairs(q_ids: np.ndarray, kv_ids: np.ndarray) -> np.ndarray:
    """Which ids are equal, [B, T, S], as Python compares them."""
    return np.array(
        [[[int(a) == int(b) for b in keys] for a in queries] for queries, keys in zip(q_ids, kv_ids, strict=True)]
    )


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("on_device", [(False, False), (True, True), (True, False), (False, True)])
@pytest.mark.sampled(6)
def test_segment_ids_of_any_dtypes_are_equal_where_the_given_ones_are(on_device, x64):
    refused = 0
    with jax.enable_x64(x64):
        # Every pair compiles on a device.
        dtypes = ("int8", "uint32", "int64", "uint64") if all(on_device) else DTYPES
        for q_dtype, kv_dtype in itertools.product(dtypes, dtypes):
            given = []
            for dtype, device, n in zip((q_dtype, kv_dtype), on_device, (9, 12), strict=True):
                ids = edge_values(dtype, (2, n), n)
                if device:  # without x64 a device has no 64-bit integers
                    ids = ids.astype(ids.dtype.newbyteorder("="))
                    ids = jnp.asarray(ids if x64 else ids.astype(ids.dtype.str.replace("8", "4")))
                given.append(integers.as_integers("ids", ids, "Bn"))
            try:
                q_ids, kv_ids = integers.comparable_ids(*given)
            except ValueError as refusal:
                assert not x64 and len(set(on_device)) == 2 and "beside an array on a device" in str(refusal)
                refused += 1
                continue
            assert q_ids.dtype == kv_ids.dtype == jnp.int32
            found = np.asarray(q_ids)[:, :, None] == np.asarray(kv_ids)[:, None]
            np.testing.assert_array_equal(found, equal_pairs(*map(np.asarray, given)), err_msg=f"{q_dtype} {kv_dtype}")
    assert refused <= (30 if len(set(on_device)) == 2 and not x64 else 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_array_of_segment_ids_keeps_its_order(dtype):
    """Ascending ids let the kernels skip blocks."""
    ids = integers.as_integers("ids", edge_values(dtype, (2, 30)), "BT")
    q_ids, kv_ids = integers.comparable_ids(ids, ids)
    assert q_ids is kv_ids
    for given, converted in zip(np.asarray(ids), np.asarray(q_ids), strict=True):
        np.testing.assert_array_equal(np.argsort(given, kind="stable"), np.argsort(converted, kind="stable"))


@pytest.mark.parametrize("implementation", ["reference", "xla", "pallas"])
def test_hashes_of_documents_separate_them(implementation):
    """2^32 + 1 and 1 are the same number in 32 bits."""
    q = jnp.asarray(np.random.default_rng(0).standard_normal((1, 6, 2, 4)), jnp.float32)
    small, large = np.array([[1, 1, 2, 2, 3, 3]]), np.array([[1, 1, 2**32 + 1, 2**32 + 1, 2**40 + 1, 2**40 + 1]])
    found, expected = (
        kernels.attention(q, q, q, segment_ids=ids, implementation=implementation) for ids in (large, small)
    )
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.sampled(2)
def test_expert_id_outside_the_experts_becomes_their_number(dtype, on_device):
    ids = edge_values(dtype, (5, 4))
    if on_device:
        ids = jnp.asarray(ids.astype(ids.dtype.newbyteorder("=")))
    found = integers.expert_ids_within(integers.as_integers("ids", ids, "Nk"), 3)
    np.testing.assert_array_equal(found, np.where([[0 <= int(x) < 3 for x in row] for row in ids], ids, 3))


@pytest.mark.parametrize("implementation", ["reference", "xla", "pallas"])
@pytest.mark.parametrize("num_tokens", [3, 40], ids=["single rows", "sorted rows"])
@pytest.mark.sampled(6)
def test_choice_of_no_expert_contributes_nothing(num_tokens, implementation):
    """-1 and E, as padding: the output and every gradient are those of a weight of zero, whatever its weight."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    x, w_gate, w_up, w_down = draw(num_tokens, 4), draw(3, 4, 5), draw(3, 4, 5), draw(3, 5, 4)
    weights, ids = draw(num_tokens, 2), rng.integers(0, 3, (num_tokens, 2))
    outside = rng.integers(0, 2, ids.shape).astype(bool)
    outside[0], outside[1] = True, (False, True)
    padded_ids = np.where(outside, rng.choice([-1, 3, 7, -(2**40), 2**32 + 1], ids.shape), ids)

    def results(ids, weights):
        f = lambda x, w_gate, w_up, w_down, weights: kernels.moe_mlp(
            x, w_gate, w_up, w_down, ids, weights, implementation=implementation
        )
        y, pull = jax.vjp(f, x, w_gate, w_up, w_down, weights)
        return y, *pull(jnp.ones_like(y))

    expected = results(ids, jnp.where(outside, 0, weights))
    found = results(padded_ids, jnp.where(outside, jnp.nan, weights))
    for name, a, b in zip(("y", "dx", "dw_gate", "dw_up", "dw_down"), found, expected, strict=False):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5, err_msg=name)
    assert not np.any(found[0][0]) and not np.any(found[1][0])
    np.testing.assert_allclose(found[-1], jnp.where(outside, 0, expected[-1]), rtol=2e-5, atol=1e-5)
    assert not np.any(np.asarray(found[-1])[outside])


def test_group_sizes_are_refused_on_the_host_and_clamped_on_a_device():
    x, w = jnp.ones((6, 3)), jnp.ones((3, 3, 5))
    for sizes, message in (
        ([1, -1, 2], "group_sizes holds -1; allowed: 0 to 2147483647"),
        ([3, 3, 3], "group_sizes sums to 9; allowed: at most 6, the rows of x"),
        (np.uint64([2**40, 0, 0]), "group_sizes holds 1099511627776; allowed"),
    ):
        with pytest.raises(ValueError, match=message):
            kernels.grouped_matmul(x, w, sizes)
    for sizes, rows in (([4, -3, 9], [4, 0, 2]), ([7, 7, 7], [6, 0, 0]), ([2**31 - 1] * 3, [6, 0, 0])):
        np.testing.assert_array_equal(integers.group_sizes_within(jnp.array(sizes), 6), rows)
        for implementation in ("reference", "xla", "pallas"):
            found = kernels.grouped_matmul(x, w, jnp.array(sizes), implementation=implementation)
            np.testing.assert_array_equal(found, kernels.grouped_matmul(x, w, rows, implementation="reference"))


@pytest.mark.parametrize("dtype", ["int32", "uint32", "int64", "uint64"])
@pytest.mark.parametrize("length", [0, 3, 4, 9, 2**31 - 2])
@pytest.mark.sampled(2)
def test_lengths_of_any_dtype_give_their_slot_and_their_number_of_tokens(dtype, length):
    with jax.enable_x64(True):
        for given in (np.array([length], dtype), jnp.array([length], dtype)):
            found = int(integers.ring_positions(given, 4)[0])
            assert (found % 4, min(found, 4)) == (length % 4, min(length, 4))


def test_length_past_int32_decodes_and_counts_on():
    q, kv = jnp.ones((1, 2, 4)), jnp.ones((1, 1, 4))
    cache = kernels.KVCache.zeros(1, 1, 4, 4, jnp.float32)
    for implementation in ("reference", "xla", "pallas"):
        for length in (np.uint32([2**31 + 5]), jnp.uint32([2**31 + 5])):
            o, after = kernels.decode_attention(q, kv, kv, cache._replace(length=length), implementation=implementation)
            assert after.length.dtype == jnp.uint32 and int(after.length[0]) == 2**31 + 6
            np.testing.assert_array_equal(np.asarray(after.k)[0, 0, :, 0], [0, 1, 0, 0])
            np.testing.assert_allclose(o, kernels.decode_attention(q, kv, kv, cache._replace(length=jnp.int32([5])))[0])


@pytest.mark.parametrize(
    ("length", "message"),
    [
        ([-1], "cache.length holds -1; allowed: 0 to"),
        ([2**31 - 1], "cache.length holds 2147483647; allowed: 0 to 2147483646"),
        (np.int8([3]), "cache.length has dtype int8; allowed: int32"),
        ([True], "cache.length has dtype bool; allowed: int32"),
        ([0.5], "cache.length has dtype float64; allowed: int32"),
        ([2**70], "cache.length has dtype object; allowed: int32"),
        ("x", r"cache.length has shape \(\); allowed"),
        (None, r"cache.length has shape \(\); allowed"),
    ],
    ids=str,
)
def test_wrong_length_is_refused_by_name(length, message):
    length = np.int32(length) if length == [2**31 - 1] else length
    cache = kernels.KVCache.zeros(1, 1, 4, 4, jnp.float32)._replace(length=length)
    with pytest.raises(ValueError, match=message):
        kernels.decode_attention(jnp.ones((1, 2, 4)), jnp.ones((1, 1, 4)), jnp.ones((1, 1, 4)), cache)


@pytest.mark.parametrize("flag", ["false", 0, 1, None, jnp.array(True), np.array([True]), 1.0], ids=str)
def test_flag_that_is_not_a_bool_is_refused_by_name(flag):
    q = jnp.ones((1, 3, 2, 4))
    with pytest.raises(ValueError, match=r"^causal is .*; allowed: True or False"):
        kernels.attention(q, q, q, causal=flag)
    with pytest.raises(ValueError, match=r"^causal is a traced array of shape \(\); allowed: True or False"):
        jax.jit(lambda flag: kernels.attention(q, q, q, causal=flag))(True)
    assert validation.check_flag("causal", np.bool_(False)) is False


@pytest.mark.parametrize("name", ["window", "scale", "softcap"])
def test_traced_number_is_refused_by_name(name):
    q = jnp.ones((1, 3, 2, 4))
    with pytest.raises(ValueError, match=rf"^{name} is a traced array of shape \(\); allowed: "):
        jax.jit(lambda value: kernels.attention(q, q, q, **{name: value}))(2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 1e39}, "scale is 1e"),
        ({"scale": -1e-40}, "scale is -1e-40"),
        ({"scale": True}, "scale is True"),
        ({"scale": 10**400}, "scale is 1000"),
        ({"scale": 1j}, "scale is 1j"),
        ({"softcap": 1e39}, "softcap is 1e"),
        ({"softcap": 1e-40}, "softcap is 1e-40"),
        ({"softcap": True}, "softcap is True"),
        ({"window": np.array(3)}, r"window is an array of shape \(\)"),
        ({"window": "3"}, "window is '3'"),
    ],
    ids=str,
)
def test_number_that_float32_cannot_hold_is_refused_by_name(options, message):
    q = jnp.ones((1, 3, 2, 4))
    with pytest.raises(ValueError, match=f"^{message}.*; allowed: "):
        kernels.attention(q, q, q, **options)
    with pytest.raises(ValueError, match=f"^{message}.*; allowed: "):
        kernels.decode_attention(q[:, 0], q[:, 0], q[:, 0], kernels.KVCache.zeros(1, 2, 4, 4, jnp.float32), **options)


def test_big_endian_and_unusual_arrays_are_taken():
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((6, 3)).astype(np.float32), rng.standard_normal((2, 3, 5)).astype(np.float32)
    expected = kernels.grouped_matmul(x, w, [2, 3])
    fortran, strided = np.asfortranarray(w), np.repeat(x, 2, axis=0)[::2]
    for arrays in ((x.astype(">f4"), w.astype(">f4"), np.array([2, 3], ">i8")), (strided, fortran, (2, 3))):
        np.testing.assert_array_equal(kernels.grouped_matmul(*arrays), expected)


@pytest.mark.parametrize("shape", [(0, 4, 4), (2, 0, 4), (2, 4, 0)], ids=str)
@pytest.mark.parametrize("implementation", ["reference", "xla", "pallas"])
def test_empty_axis_decodes_to_nothing(shape, implementation):
    """No sequences, no heads, no width."""
    B, H, D = shape
    K = max(1, H // 2)
    cache = kernels.KVCache.zeros(B, K, 4, D, jnp.float32)
    kv = jnp.ones((B, K, D))
    o, after = kernels.decode_attention(jnp.ones(shape), kv, kv, cache, implementation=implementation)
    assert o.shape == shape and not np.isnan(o).any()
    np.testing.assert_array_equal(after.length, cache.length + 1)


@pytest.mark.parametrize("op", ["attention", "decode_attention"])
def test_no_key_heads_is_refused_by_name(op):
    message = "q has 4 heads and k has 0; allowed: a multiple of k's heads"
    with pytest.raises(ValueError, match=message):
        if op == "attention":
            kernels.attention(jnp.ones((1, 3, 4, 8)), jnp.ones((1, 3, 0, 8)), jnp.ones((1, 3, 0, 8)))
        else:
            cache = kernels.KVCache.zeros(1, 0, 4, 8, jnp.float32)
            kernels.decode_attention(jnp.ones((1, 4, 8)), jnp.ones((1, 0, 8)), jnp.ones((1, 0, 8)), cache)
