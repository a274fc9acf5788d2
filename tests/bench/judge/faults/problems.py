"""Problems on which the kernels of the guides are checked, with the features that each has."""

from typing import Any, NamedTuple

import numpy as np

Index = Any


class Problem(NamedTuple):
    """One call of an operation.

    Attributes:
        features: what it asks of a kernel.
        inputs: the floating-point inputs, in float64.
        aux: integer inputs.
        options: static arguments.
        dtype: of the inputs.
        unseen: (name of an input, index) of what may hold NaN.
    """

    features: frozenset[str]
    inputs: dict[str, np.ndarray]
    aux: dict[str, Any]
    options: dict[str, Any]
    dtype: str = "float32"
    unseen: tuple[tuple[str, Index], ...] = ()


def attention(
    T: int,
    S: int,
    *names: str,
    B: int = 1,
    H: int = 2,
    K: int = 2,
    D: int = 16,
    dtype: str = "float32",
    **options: Any,
) -> Problem:
    """`names` may be "segments", "gate per head", "gate per element" and "unseen NaN"."""
    rng = np.random.default_rng(T + 7 * S + 3 * len(names))
    shapes = {"q": (B, T, H, D), "k": (B, S, K, D), "v": (B, S, K, D)}
    if gates := {"gate per head", "gate per element"}.intersection(names):
        shapes["gate"] = (B, T, H, 1 if gates == {"gate per head"} else D)
    inputs = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    window, aux, unseen = options.get("window"), {}, 0
    if window is not None:
        unseen = max(0, S - T - window + 1)
    if "segments" in names:
        ids = np.sort(rng.integers(1, 5, (B, max(T, S))), axis=1)
        q_ids, kv_ids = ids[:, -T:], ids[:, -S:].copy()
        if T == S > 8:  # padding keys, which no query has
            unseen, kv_ids[:, :3] = 3, 9
        aux["segment_ids"] = (np.int32(q_ids), np.int32(kv_ids))
    present = {
        "causal": options.get("causal", True),
        "full": not options.get("causal", True),
        "one tile": max(T, S) <= 128,
        "several tiles": max(T, S) > 128,
        "window": window is not None,
        "T < S": T < S,
        "T > S": T > S,
        "GQA": H != K,
        "soft cap": "softcap" in options,
        "scale": "scale" in options,
        "odd sizes": bool(T % 8 or S % 8 or D % 8),
    }
    features = frozenset([*names, dtype, *(name for name, here in present.items() if here)])
    hidden = tuple((name, np.s_[:, :unseen]) for name in "kv") if "unseen NaN" in names else ()
    return Problem(features, inputs, aux, options, dtype, hidden)


_LONG = [(1040, 1040), (300, 300), (129, 129)]
_T_S = [(7, 300), (129, 300), (300, 129), (129, 7)]
_ALL = {"window": 40, "scale": 0.4, "softcap": 1.5}
ATTENTION = [
    *(attention(*size) for size in ((1, 1), (7, 7), (128, 128), *_LONG)),
    attention(300, 300, H=4),
    attention(300, 300, B=2, H=3, K=1, D=5),
    *(attention(T, S, causal=False) for T, S in (*_LONG[1:], *_T_S)),
    *(attention(T, S) for T, S in _T_S),
    *(attention(T, S, window=window) for T, S in (*_LONG, *_T_S) for window in (1, 40, 128, 129, 150)),
    *(attention(T, S, H=4, window=40, softcap=1.5) for T, S in _T_S),
    *(attention(T, S, H=4, causal=False, softcap=1.5, scale=0.4) for T, S in _T_S),
    *(attention(T, S, H=4, scale=0.4) for T, S in ((7, 7), (300, 300))),
    *(attention(T, S, causal=causal, softcap=0.7) for T, S in ((7, 7), (300, 300)) for causal in (True, False)),
    *(attention(T, T, gate, H=4) for T in (7, 300) for gate in ("gate per head", "gate per element")),
    *(attention(300, 300, gate, softcap=0.7, scale=0.4) for gate in ("gate per head", "gate per element")),
    *(attention(T, S, "segments", B=2) for T, S in ((7, 7), (300, 300), *_T_S)),
    *(attention(T, S, "segments", B=2, causal=False) for T, S in ((7, 7), (300, 300), *_T_S)),
    attention(300, 300, "segments", "gate per head", B=2, H=4, **_ALL),
    attention(1040, 1040, "segments", "gate per element", H=4, D=32, **_ALL),
    *(attention(T, S, "unseen NaN", window=40) for T, S in ((7, 300), (129, 300))),
    attention(300, 300, "unseen NaN", "segments", B=2),
    attention(300, 300, "unseen NaN", "segments", B=2, causal=False, H=4),
    *(
        attention(T, S, *names, H=4, dtype=dtype, **options)
        for dtype in ("bfloat16", "float16")
        for T, S in ((7, 7), (300, 300), (129, 300), (300, 129))
        for names, options in (((), {}), (("gate per head",), _ALL), (("gate per element", "segments"), {"softcap": 2}))
    ),
    attention(1040, 1040, H=4, D=64, dtype="bfloat16"),
]


def grouped_matmul(sizes: list[int], M: int, F: int, *names: str, rest: int = 0, dtype: str = "float32") -> Problem:
    """`rest` is the number of rows past the sum; `names` may be "unseen NaN"."""
    N, E = sum(sizes) + rest, len(sizes)
    rng = np.random.default_rng(N + M)
    inputs = {"x": rng.standard_normal((N, M)), "w": rng.standard_normal((E, M, F))}
    present = {
        "uniform groups": len(set(sizes)) == 1 and E > 1,
        "uneven groups": len(set(sizes)) > 1,
        "empty groups": 0 in sizes,
        "one group": E == 1,
        "rows past the sum": rest > 0,
        "one tile": N <= 128,
        "several tiles": N > 128,
        "odd sizes": bool(N % 8 or M % 8 or F % 8),
    }
    features = frozenset([*names, dtype, *(name for name, here in present.items() if here)])
    hidden = (("x", np.s_[N - rest :]), ("w", np.flatnonzero(np.equal(sizes, 0)))) if "unseen NaN" in names else ()
    return Problem(features, inputs, {"group_sizes": np.int32(sizes)}, {}, dtype, hidden)


_SIZES = [
    [64, 64],
    [128, 128, 128],
    [100, 100, 100],
    [16, 90, 3, 20],
    [7, 300, 129, 1],
    [0, 20, 0, 0, 30, 0],
    [0, 200, 0, 0, 130, 0],
    [128, 0, 256, 0],
    [50],
    [300],
    [0, 0],
    [1],
]
GROUPED_MATMUL = [
    *(
        grouped_matmul(sizes, M, F, rest=rest)
        for sizes in _SIZES
        for M, F, rest in ((16, 24, 0), (16, 24, 5), (7, 33, 0), (5, 1, 140))
        if sum(sizes) + rest
    ),
    grouped_matmul([100, 100, 100], 600, 520),
    grouped_matmul([300, 0, 740], 600, 520),
    grouped_matmul([30, 0, 20], 520, 1030, rest=7),
    *(grouped_matmul(sizes, 24, 16, "unseen NaN", rest=rest) for sizes in _SIZES[4:8] for rest in (0, 5, 200)),
    *(
        grouped_matmul(sizes, M, F, rest=rest, dtype=dtype)
        for dtype in ("bfloat16", "float16")
        for sizes in _SIZES[:9]
        for M, F, rest in ((64, 24, 0), (7, 33, 5))
    ),
]


def moe_mlp(N: int, k: int, *names: str, E: int = 4, M: int = 16, F: int = 24, dtype: str = "float32") -> Problem:
    """`names` may be "one expert takes all", "experts without tokens", "ids of no expert" and "unseen NaN"."""
    rng = np.random.default_rng(N + k)
    shapes = {"x": (N, M), "w_gate": (E, M, F), "w_up": (E, M, F), "w_down": (E, F, M)}
    inputs = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    inputs["expert_weights"] = rng.uniform(0.1, 1, (N, k))
    chosen = range(1, E) if "experts without tokens" in names else range(E)
    ids = np.array([rng.permutation(chosen)[:k] for _ in range(N)])
    if "one expert takes all" in names:
        ids[:, 0] = 2
    hidden: list[tuple[str, Index]] = []
    if "experts without tokens" in names:
        hidden += [(name, np.s_[:1]) for name in ("w_gate", "w_up", "w_down")]
    if "ids of no expert" in names:
        ids[rng.random((N, k)) < 0.3] = E
        ids[0] = E
        hidden += [("x", np.flatnonzero((ids == E).all(axis=1)))]
    inputs["expert_weights"][ids == E] = 0
    present = {
        f"top {k}": True,
        "one tile": N * k <= 128,
        "several tiles": N * k > 128,
        "odd sizes": bool(N % 8 or M % 8 or F % 8),
    }
    features = frozenset([*names, dtype, *(name for name, here in present.items() if here)])
    unseen = tuple(hidden) if "unseen NaN" in names else ()
    return Problem(features, inputs, {"expert_ids": np.int32(ids)}, {}, dtype, unseen)


_NAMES = [(), ("one expert takes all",), ("experts without tokens",), ("ids of no expert",)]
_NAMES += [("experts without tokens", "ids of no expert"), ("one expert takes all", "ids of no expert")]
MOE_MLP = [
    *(moe_mlp(N, k, *names) for names in _NAMES for N in (2, 40, 129, 300) for k in (1, 2)),
    *(moe_mlp(N, 2, *names, E=3, M=7, F=33) for names in _NAMES for N in (7, 150)),
    moe_mlp(1040, 2, M=64, F=64),
    moe_mlp(100, 2, M=520, F=600),
    *(moe_mlp(N, k, *names, "unseen NaN") for names in _NAMES[2:5] for N in (40, 150) for k in (1, 2)),
    *(
        moe_mlp(N, k, *names, M=M, dtype=dtype)
        for dtype in ("bfloat16", "float16")
        for names in _NAMES[:4]
        for N, k, M in ((7, 1, 5), (150, 2, 64))
    ),
]


def decode_attention(
    lengths: list[int],
    C: int,
    *names: str,
    H: int = 2,
    K: int = 2,
    D: int = 16,
    dtype: str = "float32",
    **options: Any,
) -> Problem:
    """`names` may be "gate per head", "gate per element" and "unseen NaN"; slots without a token are unseen."""
    B = len(lengths)
    rng = np.random.default_rng(C + sum(lengths))
    shapes = {"q": (B, H, D), "k": (B, K, D), "v": (B, K, D), "cache_k": (B, K, C, D), "cache_v": (B, K, C, D)}
    if gates := {"gate per head", "gate per element"}.intersection(names):
        shapes["gate"] = (B, H, 1 if gates == {"gate per head"} else D)
    inputs = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    hidden = tuple((f"cache_{name}", np.s_[b, :, n:]) for name in "kv" for b, n in enumerate(lengths))
    present = {
        "append": True,
        "empty ring": 0 in lengths,
        "part-filled ring": any(0 < n < C - 1 for n in lengths),
        "full ring": any(n in (C - 1, C) for n in lengths),
        "wrapped ring": any(n > C for n in lengths),
        "ragged lengths": len(set(lengths)) > 1,
        "one block": C <= 128,
        "several blocks": C > 128,
        "window": "window" in options,
        "GQA": H != K,
        "soft cap": "softcap" in options,
        "scale": "scale" in options,
        "odd sizes": bool(C % 8 or D % 8),
    }
    features = frozenset([*names, dtype, *(name for name, here in present.items() if here)])
    unseen = hidden if "unseen NaN" in names else ()
    return Problem(features, inputs, {"length": np.int32(lengths)}, options, dtype, unseen)


_RINGS = [(7, [0, 3, 6, 7, 20]), (64, [10, 63]), (128, [0, 127, 300]), (300, [5, 200, 299, 300, 370, 1000])]
_RINGS += [(1040, [0, 500, 1039, 1041, 3000]), (129, [128, 128]), (256, [130]), (256, [700])]
DECODE_ATTENTION = [
    *(decode_attention(lengths, C) for C, lengths in _RINGS),
    *(decode_attention([n], C) for C, n in ((7, 0), (300, 0), (7, 3), (300, 150), (7, 7), (300, 300), (300, 450))),
    *(decode_attention(lengths, C, window=window) for C, lengths in _RINGS for window in (1, 5, 100, 130, 299)),
    *(decode_attention(lengths, C, H=4, K=K, D=24) for C, lengths in _RINGS for K in (1, 2)),
    *(decode_attention(lengths, C, gate) for C, lengths in _RINGS for gate in ("gate per head", "gate per element")),
    *(decode_attention(lengths, C, softcap=0.7) for C, lengths in _RINGS),
    *(decode_attention(lengths, C, scale=0.9) for C, lengths in _RINGS),
    *(decode_attention(lengths, C, "gate per head", H=6, D=7, **_ALL) for C, lengths in _RINGS),
    *(decode_attention(lengths, C, "unseen NaN", H=4) for C, lengths in _RINGS),
    *(decode_attention(lengths, C, "unseen NaN", window=100) for C, lengths in _RINGS),
    *(
        decode_attention(lengths, C, *names, H=4, dtype=dtype, **options)
        for dtype in ("bfloat16", "float16")
        for C, lengths in _RINGS[:5]
        for names, options in (((), {}), (("gate per element",), _ALL))
    ),
]
PROBLEMS = {
    "attention": ATTENTION,
    "grouped_matmul": GROUPED_MATMUL,
    "moe_mlp": MOE_MLP,
    "decode_attention": DECODE_ATTENTION,
}
