"""One row of `dantinox.kernels.workloads`, a class an operation: its sizes, what it is for, its arguments and their
cost."""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from dantinox.kernels import cost

SKEWS = ("uniform", "zipf", "one", "empty")
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What every row has; the subclasses add the sizes, by the letters of the axes."""

    op: ClassVar[str]
    name: str
    suites: tuple[str, ...]
    devices: tuple[str, ...]
    dtypes: tuple[str, ...] = ("float32",)
    sweep: tuple[str, ...] = ()

    @property
    def itemsize(self) -> int:
        """Bytes an element of the first dtype."""
        return {"float32": 4, "bfloat16": 2, "float16": 2}[self.dtypes[0]]

    def label(self) -> str:
        """The sizes that matter, in one line."""
        skip = {field.name for field in dataclasses.fields(Workload)}
        shown = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in skip}
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        return " ".join(f"{n}={_short(v)}" for n, v in shown.items() if n.isupper() or v != defaults[n])


def _short(value: Any) -> str:
    if not isinstance(value, tuple):
        return str(value)
    return ",".join(map(str, value)) if len(value) <= 8 else f"{','.join(map(str, value[:6]))}..{value[-1]}"


@dataclass(frozen=True, kw_only=True)
class Attention(Workload):
    """One attention call.

    Attributes:
        segments: None, "packed" (one array), "separate" (query and key ids) or "unmatched" (a segment without queries).
    """

    op: ClassVar[str] = "attention"
    B: int = 1
    T: int
    S: int
    H: int = 2
    K: int = 2
    D: int = 8
    causal: bool = True
    window: int | None = None
    gate: str = "none"
    softcap: float | None = None
    scale: float | None = None
    segments: str | None = None

    def shapes(self) -> Shapes:
        """The differentiable arguments."""
        B, T, S, H, K, D = self.B, self.T, self.S, self.H, self.K, self.D
        shapes: Shapes = {"q": (B, T, H, D), "k": (B, S, K, D), "v": (B, S, K, D)}
        if self.gate != "none":
            shapes["gate"] = (B, T, H, D if self.gate == "elementwise" else 1)
        return shapes

    def out_shape(self) -> tuple[int, ...]:
        return (self.B, self.T, self.H, self.D)

    def options(self) -> dict[str, Any]:
        """The static arguments."""
        return {name: getattr(self, name) for name in ("causal", "window", "scale", "softcap")}

    def integer_inputs(self, seed: int = 0) -> dict[str, Any]:
        """The integer arguments: documents packed one after the other; queries are the last T of the S positions."""
        if self.segments is None:
            return {}
        rng = np.random.default_rng(seed)
        n = max(self.S, self.T)
        cuts = np.sort(rng.integers(0, n, (self.B, 3)), axis=1)
        # In no order: rising ids would let a comparison with < pass for one with ==.
        ids = np.array([2, 0, 3, 1], np.int32)[np.sum(np.arange(n)[None, :, None] >= cuts[:, None], axis=-1)]
        if self.segments == "packed":
            return {"segment_ids": ids}
        q_ids, kv_ids = ids[:, n - self.T :], ids[:, n - self.S :].copy()
        if self.segments == "unmatched":
            kv_ids[:, self.S // 3 : self.S // 2] = 99
        return {"segment_ids": (q_ids, kv_ids)}

    def cost(self, backward: bool = False) -> cost.Cost:
        """FLOPs and bytes of one pass."""
        names = ("B", "T", "S", "H", "K", "D", "causal", "window", "gate", "itemsize")
        ids = self.integer_inputs().get("segment_ids")
        ids = (ids, ids) if isinstance(ids, np.ndarray) else ids
        return cost.attention(**{n: getattr(self, n) for n in names}, segment_ids=ids, backward=backward)


@dataclass(frozen=True, kw_only=True)
class GroupedMatmul(Workload):
    """`sizes`: rows of each group; None: N rows spread over E groups by `skew`."""

    op: ClassVar[str] = "grouped_matmul"
    N: int
    M: int
    F: int
    E: int
    skew: str = "uniform"
    sizes: tuple[int, ...] | None = None

    def shapes(self) -> Shapes:
        """The differentiable arguments."""
        return {"x": (self.N, self.M), "w": (self.E, self.M, self.F)}

    def out_shape(self) -> tuple[int, ...]:
        return (self.N, self.F)

    def options(self) -> dict[str, Any]:
        return {}

    def integer_inputs(self, seed: int = 0) -> dict[str, Any]:
        """The integer arguments."""
        return {"group_sizes": spread(self.N, self.E, self.skew) if self.sizes is None else np.int32(self.sizes)}

    def cost(self, backward: bool = False) -> cost.Cost:
        """FLOPs and bytes of one pass."""
        return cost.grouped_matmul(
            N=self.N, M=self.M, F=self.F, **self.integer_inputs(), itemsize=self.itemsize, backward=backward
        )


@dataclass(frozen=True, kw_only=True)
class MoE(Workload):
    """N tokens, each to k of E experts; `skew` says how they are spread."""

    op: ClassVar[str] = "moe_mlp"
    N: int
    M: int
    F: int
    E: int
    k: int = 2
    skew: str = "uniform"

    def shapes(self) -> Shapes:
        """The differentiable arguments."""
        N, M, F, E, k = self.N, self.M, self.F, self.E, self.k
        return {"x": (N, M), "w_gate": (E, M, F), "w_up": (E, M, F), "w_down": (E, F, M), "expert_weights": (N, k)}

    def out_shape(self) -> tuple[int, ...]:
        return (self.N, self.M)

    def options(self) -> dict[str, Any]:
        return {}

    def integer_inputs(self, seed: int = 0) -> dict[str, Any]:
        """The integer arguments."""
        return {"expert_ids": route(self.N, self.E, self.k, self.skew, seed)}

    def cost(self, backward: bool = False) -> cost.Cost:
        """FLOPs and bytes of one pass."""
        num_active_experts = len(np.unique(self.integer_inputs()["expert_ids"]))
        names = ("N", "M", "F", "E", "k", "itemsize")
        return cost.moe_mlp(
            **{n: getattr(self, n) for n in names}, num_active_experts=num_active_experts, backward=backward
        )


@dataclass(frozen=True, kw_only=True)
class Decode(Workload):
    """One step for sequences that hold `lengths` tokens in rings of C slots, of `kv_dtype` where it is another."""

    op: ClassVar[str] = "decode_attention"
    lengths: tuple[int, ...]
    C: int = 8
    H: int = 4
    K: int = 2
    D: int = 6
    window: int | None = None
    gate: str = "none"
    softcap: float | None = None
    scale: float | None = None
    kv_dtype: str | None = None

    @property
    def B(self) -> int:
        return len(self.lengths)

    def shapes(self) -> Shapes:
        """q, k, v and the gate; the cache is apart (`cache`)."""
        B, H, K, D = self.B, self.H, self.K, self.D
        shapes: Shapes = {"q": (B, H, D), "k": (B, K, D), "v": (B, K, D)}
        if self.gate != "none":
            shapes["gate"] = (B, H, D if self.gate == "elementwise" else 1)
        return shapes

    def cache_shape(self) -> tuple[int, ...]:
        return (self.B, self.K, self.C, self.D)

    def cache(self, dtype: str) -> dict[str, tuple[tuple[int, ...], str]]:
        """(shape, dtype) of the rings and, in 8 bits, of their factors, where the model has `dtype`."""
        arrays = {name: (self.cache_shape(), self.kv_dtype or dtype) for name in ("k", "v")}
        if self.kv_dtype is not None:
            arrays |= {f"{name}_scale": (self.cache_shape()[:3], "float32") for name in ("k", "v")}
        return arrays

    def out_shape(self) -> tuple[int, ...]:
        return (self.B, self.H, self.D)

    def options(self) -> dict[str, Any]:
        """The static arguments."""
        return {name: getattr(self, name) for name in ("window", "scale", "softcap")}

    def integer_inputs(self, seed: int = 0) -> dict[str, Any]:
        """The cache's length."""
        return {"length": np.int32(self.lengths)}

    def cost(self, backward: bool = False) -> cost.Cost:
        """FLOPs and bytes of a step; it has no backward pass."""
        if backward:
            raise ValueError("decode_attention has no backward pass")
        names = ("H", "K", "D", "C", "window", "gate", "itemsize")
        kept = None if self.kv_dtype is None else 1 + 4 / self.D
        sizes = {name: getattr(self, name) for name in names}
        return cost.decode_attention(**sizes, lengths=np.array(self.lengths), kv_itemsize=kept)


def spread(N: int, E: int, skew: str) -> np.ndarray:
    """Group sizes [E] int32 that sum to N.

    uniform: as even as can be. zipf: the e-th largest has a share of 1 / e, in no order. one: all rows in one group.
    empty: every other group has none.
    """
    if skew not in SKEWS:
        raise ValueError(f"skew is {skew!r}; allowed: {', '.join(SKEWS)}")
    share = np.ones(E)
    if skew == "zipf":
        share = np.random.default_rng(0).permutation(1 / np.arange(1, E + 1))
    elif skew == "one":
        share = (np.arange(E) == E // 2).astype(float)
    elif skew == "empty":
        share = (np.arange(E) % 2 == (E > 1)).astype(float)
    ends = np.round(np.cumsum(share / share.sum()) * N).astype(np.int64)
    ends[-1] = N
    return np.diff(ends, prepend=0).astype(np.int32)


def route(N: int, E: int, k: int, skew: str, seed: int = 0) -> np.ndarray:
    """Expert ids [N, k] int32, no token twice at one expert: drawn with the shares of `spread`.

    With "one" every token's first choice is one expert, with "empty" as many experts as can be get nothing.
    """
    share = spread(1_000_000, E, skew) / 1e6
    noise = np.random.default_rng(seed).gumbel(size=(N, E))
    # The k largest of log-share plus Gumbel noise are k draws without replacement.
    score = np.log(np.maximum(share, 1e-30)) + noise
    return np.argsort(-score, axis=1)[:, :k].astype(np.int32)
