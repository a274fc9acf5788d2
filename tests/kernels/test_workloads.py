"""The workloads, their arrays, and their costs against counts of pairs and arrays."""

import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dantinox import kernels
from dantinox.kernels import cost, workloads
from dantinox.kernels.tutorial import TUTORIALS
from dantinox.kernels.workloads import types as workload_types
from dantinox.reference import visible

OPS = ("attention", "grouped_matmul", "moe_mlp", "decode_attention", "linear_cross_entropy")
# Pure counting: many examples cost little.
MANY = settings(max_examples=5 * settings().max_examples)


def pairs_of(T: int, S: int, causal: bool, window: int | None, q_ids=None, kv_ids=None) -> np.ndarray:
    """[T, S] bool, one pair at a time; of one sequence."""
    mask = np.zeros((T, S), bool)
    for t, s in np.ndindex(T, S):
        distance = (S - T + t) - s
        mask[t, s] = not causal or distance >= 0
        if window is not None and distance >= window:
            mask[t, s] = False
        if q_ids is not None and q_ids[t] != kv_ids[s]:
            mask[t, s] = False
    return mask


@MANY
@given(T=st.integers(0, 12), S=st.integers(0, 12), window=st.none() | st.integers(1, 15), causal=st.booleans())
def test_visible_pairs_match_a_count_of_the_mask(T, S, window, causal):
    window = window if causal else None
    expected = pairs_of(T, S, causal, window)
    assert cost.visible_pairs(T, S, causal=causal, window=window) == expected.sum()


@MANY
@given(data=st.data(), T=st.integers(1, 9), S=st.integers(1, 12), window=st.none() | st.integers(1, 14))
def test_visible_pairs_of_segments_match_a_count_of_the_mask(data, T, S, window):
    causal = window is not None or data.draw(st.booleans())
    ids = lambda n: st.lists(st.lists(st.integers(0, 2), min_size=n, max_size=n), min_size=2, max_size=2)
    q_ids, kv_ids = np.int32(data.draw(ids(T))), np.int32(data.draw(ids(S)))
    expected = sum(pairs_of(T, S, causal, window, q, kv).sum() for q, kv in zip(q_ids, kv_ids, strict=True))
    assert cost.visible_pairs(T, S, causal=causal, window=window, segment_ids=(q_ids, kv_ids)) == expected


@pytest.mark.parametrize("window", [None, 1, 2, 7, 40, 41, 100], ids="window={}".format)
def test_visible_pairs_of_longer_sequences_match_the_mask(window):
    for T, S in ((40, 40), (40, 7), (7, 40), (1, 40)):
        expected = pairs_of(T, S, True, window)
        assert cost.visible_pairs(T, S, window=window) == expected.sum()
        np.testing.assert_array_equal(visible(T, S, causal=True, window=window), expected)


@MANY
@given(T=st.integers(1, 12), S=st.integers(1, 12), window=st.none() | st.integers(1, 15))
def test_num_visible_keys_counts_keys_with_a_query(T, S, window):
    assert cost.num_visible_keys(T, S, window) == pairs_of(T, S, True, window).any(axis=0).sum()


gates = st.sampled_from(["none", "head", "elementwise"])
dtypes = st.sampled_from([("float32",), ("bfloat16", "float32"), ("float16",)])
ANYWHERE = {"name": "x", "suites": ("parity",), "devices": ("small",)}


def gate_size(kind: str, rows: int, D: int) -> int:
    """Elements of the gate's array."""
    return {"none": 0, "head": rows, "elementwise": rows * D}[kind]


@MANY
@given(
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 3)]),
    B=st.integers(1, 2),
    D=st.integers(1, 5),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 11),
    segments=st.sampled_from([None, "packed", "separate", "unmatched"]),
    gate=gates,
    dtypes=dtypes,
)
def test_attention_cost_matches_its_pairs_and_arrays(sizes, heads, B, D, causal, window, segments, gate, dtypes):
    (T, S), (H, K) = sizes, heads
    if segments == "packed":
        S = T
    window = window if causal else None
    row = workloads.Attention(
        T=T, S=S, B=B, H=H, K=K, D=D, causal=causal, window=window, segments=segments, gate=gate, dtypes=dtypes,
        **ANYWHERE,
    )  # fmt: skip
    ids = row.integer_inputs().get("segment_ids")
    ids = (ids, ids) if segments == "packed" else ids
    mask = pairs_of(T, S, causal, window)
    pairs = [mask if ids is None else pairs_of(T, S, causal, window, ids[0][b], ids[1][b]) for b in range(B)]
    products = sum(1 for pair_mask in pairs for _ in np.argwhere(pair_mask) for _ in range(H))
    # Which keys the documents hide is not known before the kernel runs: the window's keys are read.
    visible_keys = mask.any(axis=0).sum() if causal else S
    narrow, wide = (4 if dtypes[0] == "float32" else 2), 4
    q = B * T * H * D * narrow
    k = B * int(visible_keys) * K * D * narrow
    dk = B * S * K * D * narrow
    g = gate_size(gate, B * T * H, D) * narrow
    integers = 0 if ids is None else sum(x.size * 4 for x in ids)
    lse = B * T * H * wide
    exponentials = products + g // narrow
    score = 2 * D  # a multiply and an add a feature: q.k forward, and as much for p v, dp, dq, dk, dv
    assert row.cost() == (2 * score * products, q + k + k + g + q + integers, exponentials)
    moved = (q + q + q + k + k + g + lse) + (q + dk + dk + g) + integers
    assert row.cost(backward=True) == (5 * score * products, moved, exponentials)


@MANY
@given(
    widths=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    sizes=st.lists(st.integers(0, 6), min_size=1, max_size=5).map(tuple),
    spare=st.integers(0, 4),
    dtypes=dtypes,
)
def test_grouped_matmul_cost_matches_its_rows_and_arrays(widths, sizes, spare, dtypes):
    (M, F), E, N = widths, len(sizes), max(1, sum(sizes) + spare)
    row = workloads.GroupedMatmul(N=N, M=M, F=F, E=E, sizes=sizes, dtypes=dtypes, **ANYWHERE)
    item, flops, read, matrices = (4 if dtypes[0] == "float32" else 2), 0, 0, 0
    for size in sizes:
        matrices += M * F if size else 0
        for _ in range(size):
            read += 1
            flops += 2 * M * F
    assert row.cost() == (flops, item * (read * M + matrices + N * F), 0)
    backward = read * M + read * F + matrices + N * M + E * M * F
    assert row.cost(backward=True) == (2 * flops, item * backward, 0)


@MANY
@given(
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 4), st.integers(1, 4)),
    E=st.integers(1, 6),
    data=st.data(),
    skew=st.sampled_from(workload_types.SKEWS),
    dtypes=dtypes,
)
def test_moe_mlp_cost_matches_its_rows_and_arrays(sizes, E, data, skew, dtypes):
    (N, M, F), k, biases = sizes, data.draw(st.integers(1, E)), data.draw(st.booleans())
    row = workloads.MoE(N=N, M=M, F=F, E=E, k=k, skew=skew, biases=biases, dtypes=dtypes, **ANYWHERE)
    item, flops, hidden, touched = (4 if dtypes[0] == "float32" else 2), 0, 0, set()
    for e in row.integer_inputs()["expert_ids"].reshape(-1):
        touched.add(int(e))
        flops += 2 * M * F + 2 * M * F + 2 * F * M
        hidden += F
    expert = sum(math.prod(shape[1:]) for name, shape in row.shapes().items() if name[:2] in ("w_", "b_")) * item
    x, experts, every = N * M * item, len(touched) * expert, E * expert
    ids = weights = N * k * 4
    assert row.cost() == (flops, x + experts + ids + weights + x, hidden)
    assert row.cost(backward=True) == (2 * flops, (x + x + experts + ids + weights) + (x + every + weights), hidden)


@MANY
@given(
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 5), st.integers(1, 9)),
    absent=st.sampled_from(["none", "some", "all"]),
    dtypes=dtypes,
)
def test_linear_cross_entropy_cost_matches_its_rows_and_arrays(sizes, absent, dtypes):
    N, M, V = sizes
    row = workloads.LinearCrossEntropy(N=N, M=M, V=V, absent=absent, dtypes=dtypes, **ANYWHERE)
    item, flops, read, logits = (4 if dtypes[0] == "float32" else 2), 0, 0, 0
    for target in row.integer_inputs()["targets"]:
        if target >= 0:
            flops += 2 * M * V
            read += M * item
            logits += V
    w = V * M * item
    targets = losses = lse = N * 4
    assert row.cost() == (flops, read + (w if read else 0) + targets + losses, logits)
    moved = (read + (w if read else 0) + targets + lse + losses) + (N * M * item + w)
    assert row.cost(backward=True) == (3 * flops, moved, logits)


@MANY
@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=4).map(tuple),
    C=st.integers(1, 9),
    window=st.none() | st.integers(1, 12),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    D=st.integers(1, 5),
    gate=gates,
    dtypes=dtypes,
    T=st.integers(1, 3),
    sinks=st.booleans(),
)
def test_decode_attention_cost_matches_its_slots_and_arrays(lengths, C, window, heads, D, gate, dtypes, T, sinks):
    (H, K), B, T = heads, len(lengths), min(T, C)
    options = {"window": window, "gate": gate, "dtypes": dtypes, "new_tokens": T, "sinks": sinks}
    row = workloads.Decode(lengths=lengths, C=C, H=H, K=K, D=D, **options, **ANYWHERE)
    item, pairs, old = (4 if dtypes[0] == "float32" else 2), 0, 0
    for length in lengths:
        seen = [
            {p for p in range(length + t + 1) if p >= length + T - C and (window is None or p > length + t - window)}
            for t in range(T)
        ]
        pairs += sum(map(len, seen))
        old += len({p for p in set.union(*seen) if p < length})
    q = B * T * H * D * item
    k = B * T * K * D * item
    cached = old * K * D * item
    g = gate_size(gate, B * T * H, D) * item
    length, sink_bytes = B * 4, H * 4 * sinks
    moved = (q + k + k + cached + cached + g + length + sink_bytes) + (q + k + k + length)
    assert row.cost() == (2 * H * pairs * 2 * D, moved, H * pairs + g // item + B * T * H * sinks)
    with pytest.raises(ValueError, match="no backward pass"):
        row.cost(backward=True)


def test_costs_add_and_give_a_time_bound():
    a, b = cost.Cost(600, 20, 3), cost.Cost(1, 2)
    assert a + b == (601, 22, 3) and a.intensity == 30 and cost.Cost(5, 0).intensity == 5
    assert a.seconds(100, 10) == 6 and a.seconds(1000, 10) == 2
    to_pallas = a.to_pallas()
    assert (to_pallas.flops, to_pallas.bytes_accessed, to_pallas.transcendentals) == (600, 20, 3)


@MANY
@given(N=st.integers(0, 500), E=st.integers(1, 40), skew=st.sampled_from(workload_types.SKEWS))
def test_spread_assigns_all_rows(N, E, skew):
    sizes = workload_types.spread(N, E, skew)
    assert sizes.shape == (E,) and sizes.dtype == np.int32 and sizes.sum() == N and (sizes >= 0).all()
    if skew == "uniform":
        assert sizes.max() - sizes.min() <= 1
    if skew == "one":
        assert np.count_nonzero(sizes) == min(N, 1)
    if skew == "empty":
        assert np.count_nonzero(sizes) <= (E + 1) // 2
        assert E == 1 or N < E or (sizes == 0).sum() == (E + 1) // 2


@pytest.mark.parametrize("E", [2, 8, 31], ids="E={}".format)
def test_zipf_sizes_follow_one_over_rank_in_random_order(E):
    sizes = workload_types.spread(1_000_000, E, "zipf")
    expected = 1 / np.arange(1, E + 1)
    np.testing.assert_allclose(np.sort(sizes)[::-1] / 1e6, expected / expected.sum(), atol=2e-6)
    if E > 2:
        assert not (np.diff(sizes) <= 0).all() and not (np.diff(sizes) >= 0).all()


@MANY
@given(N=st.integers(0, 40), E=st.integers(1, 12), data=st.data(), skew=st.sampled_from(workload_types.SKEWS))
def test_route_never_repeats_an_expert_per_token(N, E, data, skew):
    k, seed = data.draw(st.integers(1, E)), data.draw(st.integers(0, 99))
    ids = workload_types.route(N, E, k, skew, seed)
    assert ids.shape == (N, k) and ids.dtype == np.int32
    assert all(len(set(row)) == k and min(row) >= 0 and max(row) < E for row in ids.tolist())
    np.testing.assert_array_equal(ids, workload_types.route(N, E, k, skew, seed))
    if skew == "one":
        assert len(set(ids[:, 0])) <= 1
    if skew == "empty" and k <= E // 2:
        assert len(set(ids.reshape(-1))) <= (E + 1) // 2


@pytest.mark.parametrize("skew", workload_types.SKEWS)
def test_route_follows_the_expert_distribution(skew):
    ids = workload_types.route(20_000, 8, 1, skew)
    shares = np.bincount(ids[:, 0], minlength=8) / 20_000
    np.testing.assert_allclose(shares, workload_types.spread(20_000, 8, skew) / 20_000, atol=0.015)
    other = workload_types.route(20_000, 8, 1, skew, seed=1)
    assert (skew == "one") == np.array_equal(ids, other)


@pytest.mark.parametrize(("T", "S"), [(9, 30), (30, 30), (30, 9)], ids=["T < S", "T = S", "T > S"])
def test_segment_ids_are_aligned_to_the_last_positions(T, S):
    """Queries are the last T positions, keys the last S; documents follow one another in no order of their ids."""
    row = workloads.Attention(T=T, S=S, B=3, segments="separate", **ANYWHERE)
    q_ids, kv_ids = row.integer_inputs(seed=1)["segment_ids"]
    assert q_ids.shape == (3, T) and kv_ids.shape == (3, S) and q_ids.dtype == kv_ids.dtype == np.int32
    both = min(T, S)
    np.testing.assert_array_equal(q_ids[:, T - both :], kv_ids[:, S - both :])
    longest = q_ids if T > S else kv_ids
    assert (np.count_nonzero(np.diff(longest), axis=1) <= 3).all() and len(np.unique(longest)) > 2
    assert (np.diff(longest) > 0).any() and (np.diff(longest) < 0).any()


def test_packed_segment_ids_serve_queries_and_keys():
    row = workloads.Attention(T=20, S=20, B=2, segments="packed", **ANYWHERE)
    (q_ids, kv_ids), packed = (
        workloads.Attention(T=20, S=20, B=2, segments="separate", **ANYWHERE).integer_inputs()["segment_ids"],
        row.integer_inputs(),
    )
    np.testing.assert_array_equal(packed["segment_ids"], q_ids)
    np.testing.assert_array_equal(packed["segment_ids"], kv_ids)
    assert row.cost() == workloads.Attention(T=20, S=20, B=2, segments="separate", **ANYWHERE).cost()


def test_unmatched_segments_have_keys_without_queries():
    q_ids, kv_ids = workloads.Attention(T=30, S=30, segments="unmatched", **ANYWHERE).integer_inputs()["segment_ids"]
    unmatched = ~np.isin(kv_ids, q_ids)
    assert unmatched[:, 10:15].all() and not unmatched[:, 15:].any()


def test_unknown_skew_raises():
    with pytest.raises(ValueError, match="skew is 'flat'; allowed: uniform, zipf, one, empty"):
        workload_types.spread(4, 2, "flat")


@pytest.mark.parametrize("op", OPS)
def test_workload_names_are_unique(op):
    names = [row.name for row in workloads.ROWS if row.op == op]
    assert names and len(names) == len(set(names))


@pytest.mark.parametrize("row", workloads.ROWS, ids=lambda row: f"{row.op}: {row.name}")
def test_workload_is_valid(row):
    assert row.op in OPS
    assert row.suites and set(row.suites) <= set(workloads.SUITES)
    assert row.devices and set(row.devices) <= set(workloads.DEVICES)
    assert row.dtypes and set(row.dtypes) <= {"float32", "bfloat16", "float16"}
    assert row.itemsize == np.dtype(row.dtypes[0] if row.dtypes[0] != "bfloat16" else np.float16).itemsize
    assert all(hasattr(row, axis) or (axis, row.op) == ("W", "attention") for axis in row.sweep)
    assert workloads.get(row.op, row.name) is row
    label = row.label()
    assert label and "\n" not in label and len(label) < 200
    declared = row.shapes()
    if row.op in ("attention", "decode_attention"):
        assert row.H % row.K == 0 and (row.window is None or getattr(row, "causal", True))
        assert row.segments != "packed" or row.T == row.S if row.op == "attention" else min(row.lengths) >= 0
        assert declared["q"][:-1] == row.out_shape()[:-1]
        assert row.out_shape()[-1] == declared["v" if row.op == "attention" else "q"][-1]
    elif row.op == "grouped_matmul":
        assert declared["x"][:1] + declared["w"][2:] == row.out_shape()
        assert (
            row.integer_inputs()["group_sizes"].shape == (row.E,) and row.integer_inputs()["group_sizes"].sum() <= row.N
        )
    elif row.op == "linear_cross_entropy":
        targets = row.integer_inputs()["targets"]
        assert declared["h"][:1] == targets.shape == row.out_shape() and declared["h"][1:] == declared["w"][1:]
        assert targets.dtype == np.int32 and targets.max() < row.V
        assert (targets < 0).any() == (row.absent != "none") and (targets < 0).all() == (row.absent == "all")
    else:
        assert declared["x"] == row.out_shape() and 1 <= row.k <= row.E


@pytest.mark.parametrize("op", OPS)
def test_every_suite_has_workloads(op):
    for purpose in workloads.SUITES:
        # Only attention has shapes so long that they wait for the long run, and a tutorial.
        unused = (purpose == "long" and op != "attention") or (purpose == "tutorial" and op not in TUTORIALS)
        assert workloads.select(op, purpose) or unused, purpose
    for purpose, machine in (("parity", "small"), ("bench", "cpu"), ("bench", "h100"), ("aot", "h100"), ("aot", "tpu")):
        chosen = workloads.select(op, purpose, machine)
        assert chosen and all(purpose in row.suites and machine in row.devices for row in chosen)
    # What the tests run fits any machine, and what is timed is not what the tests run.
    assert all(row.devices == ("small",) for p in ("parity", "long") for row in workloads.select(op, p))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("softmax", "parity"),
            "op is 'softmax'; allowed: attention, decode_attention, grouped_matmul, linear",
        ),
        (("attention", "speed"), "suite is 'speed'; allowed: parity, long, bench, aot, tune"),
        (("attention", "bench", "moon"), "device is 'moon'; allowed: small, cpu, h100, tpu"),
    ],
    ids=["op", "suite", "device"],
)
def test_unknown_suite_op_or_device_raises(arguments, message):
    with pytest.raises(ValueError, match=message):
        workloads.select(*arguments)


def test_unknown_workload_raises_with_the_known_names():
    with pytest.raises(ValueError, match=r"moe_mlp has no spec 'top 9'; allowed: .*top 2, zipf"):
        workloads.get("moe_mlp", "top 9")


@pytest.mark.parametrize("op", OPS)
def test_operation_accepts_the_arrays_of_a_workload(op):
    """Every name that a row gives is an argument of the operation, and what comes back has the shape it says."""
    row = min(workloads.select(op, "parity"), key=lambda row: sum(math.prod(shape) for shape in row.shapes().values()))
    arguments = {name: np.ones(shape, np.float32) for name, shape in row.shapes().items()}
    if op == "decode_attention":
        rings = np.zeros((2, *row.cache_shape()), np.float32)
        arguments["cache"] = kernels.KVCache(*rings, **row.integer_inputs())
    else:
        arguments |= row.integer_inputs()
    # Integers too as tracers: that an operation never looks at their values is part of the check.
    out = jax.eval_shape(lambda arguments: getattr(kernels, op)(**arguments, **row.options()), arguments)
    assert (out[0] if op == "decode_attention" else out).shape == row.out_shape()
