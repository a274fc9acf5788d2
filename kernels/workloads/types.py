"""The workloads of each operation: sizes, suites and devices, arguments and cost."""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from dantinox.kernels import cost

SKEWS = ("uniform", "zipf", "one", "empty")
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """An operation at one set of sizes. Subclasses add the sizes, named by the letters of the axes.

    Attributes:
        op: the operation.
        name: unique among the workloads of the operation.
        suites, devices: see `dantinox.kernels.workloads`.
        dtypes: dtypes to run; the first is the one to time.
        sweep: axes of the plots that the workload belongs to.
    """

    op: ClassVar[str]
    name: str
    suites: tuple[str, ...]
    devices: tuple[str, ...]
    dtypes: tuple[str, ...] = ("float32",)
    sweep: tuple[str, ...] = ()

    @property
    def itemsize(self) -> int:
        """Bytes per element of the first dtype."""
        return {"float32": 4, "bfloat16": 2, "float16": 2}[self.dtypes[0]]

    def label(self) -> str:
        """Format the sizes, and the options that differ from the defaults, in one line."""
        common = {field.name for field in dataclasses.fields(Workload)}
        shown = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in common}
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        return " ".join(f"{n}={_shorten(v)}" for n, v in shown.items() if n.isupper() or v != defaults[n])


def _shorten(value: Any) -> str:
    if not isinstance(value, tuple):
        return str(value)
    return ",".join(map(str, value)) if len(value) <= 8 else f"{','.join(map(str, value[:6]))}..{value[-1]}"


@dataclass(frozen=True, kw_only=True)
class Attention(Workload):
    """One attention call.

    Attributes:
        Dv: head dim of the values; None: D.
        segments: None, "packed" (one array), "separate" (query and key ids) or "unmatched" (a segment without queries).
        sinks: whether each head has a sink.
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
    Dv: int | None = None
    sinks: bool = False

    def shapes(self) -> Shapes:
        """The differentiable arguments."""
        B, T, S, H, K, D = self.B, self.T, self.S, self.H, self.K, self.D
        Dv = self.Dv or D
        shapes: Shapes = {"q": (B, T, H, D), "k": (B, S, K, D), "v": (B, S, K, Dv)}
        if self.gate != "none":
            shapes["gate"] = (B, T, H, Dv if self.gate == "elementwise" else 1)
        if self.sinks:
            shapes["sinks"] = (H,)
        return shapes

    def out_shape(self) -> tuple[int, ...]:
        """The shape of the output."""
        return (self.B, self.T, self.H, self.Dv or self.D)

    def options(self) -> dict[str, Any]:
        """The static arguments."""
        return {name: getattr(self, name) for name in ("causal", "window", "scale", "softcap")}

    def integer_inputs(self, seed: int = 0) -> dict[str, Any]:
        """The integer arguments: segment ids of consecutive documents; queries are the last T of the S positions."""
        if self.segments is None:
            return {}
        rng = np.random.default_rng(seed)
        n = max(self.S, self.T)
        boundaries = np.sort(rng.integers(0, n, (self.B, 3)), axis=1)
        # Not in order: with rising ids, a kernel that compares with < instead of == would pass.
        ids = np.array([2, 0, 3, 1], np.int32)[np.sum(np.arange(n)[None, :, None] >= boundaries[:, None], axis=-1)]
        if self.segments == "packed":
            return {"segment_ids": ids}
        q_ids, kv_ids = ids[:, n - self.T :], ids[:, n - self.S :].copy()
        if self.segments == "unmatched":
            kv_ids[:, self.S // 3 : self.S // 2] = 99
        return {"segment_ids": (q_ids, kv_ids)}

    def cost(self, backward: bool = False) -> cost.Cost:
        """FLOPs and bytes of one pass."""
        names = ("B", "T", "S", "H", "K", "D", "Dv", "causal", "window", "gate", "itemsize")
        ids = self.integer_inputs().get("segment_ids")
        ids = (ids, ids) if isinstance(ids, np.ndarray) else ids
        return cost.attention(**{n: getattr(self, n) for n in names}, segment_ids=ids, backward=backward)


@dataclass(frozen=True, kw_only=True)
class GroupedMatmul(Workload):
    """One grouped matmul.

    Attributes:
        skew: how N rows are spread over E groups (see `spread`).
        sizes: the rows of each group, instead of `skew`.
    """

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
        """The shape of the output."""
        return (self.N, self.F)

    def options(self) -> dict[str, Any]:
        """The static arguments: none."""
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
    """One mixture of experts: N tokens, k of E experts per token.

    Attributes:
        skew: how the tokens are spread over the experts (see `spread`).
        biases: whether the three projections have biases.
        activation: that of `moe_mlp`.
    """

    op: ClassVar[str] = "moe_mlp"
    N: int
    M: int
    F: int
    E: int
    k: int = 2
    skew: str = "uniform"
    biases: bool = False
    activation: str | tuple[str, float, float] = "swiglu"

    def shapes(self) -> Shapes:
        """The differentiable arguments."""
        N, M, F, E, k = self.N, self.M, self.F, self.E, self.k
        shapes: Shapes = {"x": (N, M), "w_gate": (E, M, F), "w_up": (E, M, F), "w_down": (E, F, M)}
        shapes["expert_weights"] = (N, k)
        if self.biases:
            shapes |= {"b_gate": (E, F), "b_up": (E, F), "b_down": (E, M)}
        return shapes

    def out_shape(self) -> tuple[int, ...]:
        """The shape of the output."""
        return (self.N, self.M)

    def options(self) -> dict[str, Any]:
        """The static arguments: the activation, unless it is the default."""
        return {} if self.activation == "swiglu" else {"activation": self.activation}

    def integer_inputs(self, seed: int = 0) -> dict[str, Any]:
        """The integer arguments."""
        return {"expert_ids": route(self.N, self.E, self.k, self.skew, seed)}

    def cost(self, backward: bool = False) -> cost.Cost:
        """FLOPs and bytes of one pass."""
        num_active_experts = len(np.unique(self.integer_inputs()["expert_ids"]))
        names = ("N", "M", "F", "E", "k", "biases", "itemsize")
        return cost.moe_mlp(
            **{n: getattr(self, n) for n in names}, num_active_experts=num_active_experts, backward=backward
        )


@dataclass(frozen=True, kw_only=True)
class Decode(Workload):
    """One decoding step.

    Attributes:
        lengths: the tokens that each sequence has seen.
        C: slots of the ring buffer of each sequence.
        new_tokens: tokens that are appended to each sequence; more than one are an axis T of the arrays.
        sinks: whether each head has a sink.
        kv_dtype: dtype of the cache; None: that of the model.
    """

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
    new_tokens: int = 1
    sinks: bool = False

    @property
    def B(self) -> int:
        """Number of sequences."""
        return len(self.lengths)

    def shapes(self) -> Shapes:
        """The arguments q, k, v, gate and sinks; `cache` has the shapes of the cache."""
        H, K, D = self.H, self.K, self.D
        tokens = (self.B,) if self.new_tokens == 1 else (self.B, self.new_tokens)
        shapes: Shapes = {"q": (*tokens, H, D), "k": (*tokens, K, D), "v": (*tokens, K, D)}
        if self.gate != "none":
            shapes["gate"] = (*tokens, H, D if self.gate == "elementwise" else 1)
        if self.sinks:
            shapes["sinks"] = (H,)
        return shapes

    def cache_shape(self) -> tuple[int, ...]:
        """The shape of the cache's keys, and of its values: [B, K, C, D]."""
        return (self.B, self.K, self.C, self.D)

    def cache(self, dtype: str) -> dict[str, tuple[tuple[int, ...], str]]:
        """(shape, dtype) of the arrays of the cache, with the scales of an 8-bit cache, for a model in `dtype`."""
        arrays = {name: (self.cache_shape(), self.kv_dtype or dtype) for name in ("k", "v")}
        if self.kv_dtype is not None:
            arrays |= {f"{name}_scale": (self.cache_shape()[:3], "float32") for name in ("k", "v")}
        return arrays

    def out_shape(self) -> tuple[int, ...]:
        """The shape of the output."""
        return self.shapes()["q"]

    def options(self) -> dict[str, Any]:
        """The static arguments."""
        return {name: getattr(self, name) for name in ("window", "scale", "softcap")}

    def integer_inputs(self, seed: int = 0) -> dict[str, Any]:
        """The cache's length."""
        return {"length": np.int32(self.lengths)}

    def cost(self, backward: bool = False) -> cost.Cost:
        """FLOPs and bytes of a step. Decoding has no backward pass."""
        if backward:
            raise ValueError("decode_attention has no backward pass")
        names = ("H", "K", "D", "C", "window", "gate", "itemsize")
        kv_itemsize = None if self.kv_dtype is None else 1 + 4 / self.D
        sizes = {name: getattr(self, name) for name in names}
        return cost.decode_attention(
            **sizes, lengths=np.array(self.lengths), kv_itemsize=kv_itemsize, T=self.new_tokens, sinks=self.sinks
        )


@dataclass(frozen=True, kw_only=True)
class LinearCrossEntropy(Workload):
    """One linear cross-entropy.

    Attributes:
        absent: which rows take no part: "none", "some" (every third, and the last quarter) or "all".
    """

    op: ClassVar[str] = "linear_cross_entropy"
    N: int
    M: int
    V: int
    softcap: float | None = None
    z_loss: float = 0.0
    absent: str = "none"

    def shapes(self) -> Shapes:
        """The differentiable arguments."""
        return {"h": (self.N, self.M), "w": (self.V, self.M)}

    def out_shape(self) -> tuple[int, ...]:
        """The shape of the output."""
        return (self.N,)

    def options(self) -> dict[str, Any]:
        """The static arguments."""
        return {name: getattr(self, name) for name in ("softcap", "z_loss")}

    def integer_inputs(self, seed: int = 0) -> dict[str, Any]:
        """The targets; -1 in rows that take no part."""
        targets = np.random.default_rng(seed).integers(0, self.V, self.N).astype(np.int32)
        targets[: min(2, self.N)] = (0, self.V - 1)[: min(2, self.N)]
        row = np.arange(self.N)
        absent = {"none": row < 0, "some": (row % 3 == 2) | (row > 3 * self.N // 4), "all": row >= 0}[self.absent]
        return {"targets": np.where(absent, np.int32(-1), targets)}

    def cost(self, backward: bool = False) -> cost.Cost:
        """FLOPs and bytes of one pass."""
        num_targets = int(np.count_nonzero(self.integer_inputs()["targets"] >= 0))
        return cost.linear_cross_entropy(
            N=self.N, M=self.M, V=self.V, num_targets=num_targets, itemsize=self.itemsize, backward=backward
        )


def spread(N: int, E: int, skew: str) -> np.ndarray:
    """Spread N rows over E groups; returns group sizes [E] int32 that sum to N.

    Args:
        N: rows.
        E: groups.
        skew: "uniform": as evenly as possible. "zipf": the e-th largest group has a share of 1 / e, and groups are not
            in order of size. "one": all rows in one group. "empty": every other group is empty.
    """
    if skew not in SKEWS:
        raise ValueError(f"skew is {skew!r}; allowed: {', '.join(SKEWS)}")
    shares = np.ones(E)
    if skew == "zipf":
        shares = np.random.default_rng(0).permutation(1 / np.arange(1, E + 1))
    elif skew == "one":
        shares = (np.arange(E) == E // 2).astype(float)
    elif skew == "empty":
        shares = (np.arange(E) % 2 == (E > 1)).astype(float)
    ends = np.round(np.cumsum(shares / shares.sum()) * N).astype(np.int64)
    ends[-1] = N
    return np.diff(ends, prepend=0).astype(np.int32)


def route(N: int, E: int, k: int, skew: str, seed: int = 0) -> np.ndarray:
    """Draw expert ids [N, k] int32 with the shares of `spread`; the ids of a token differ.

    With "one", one expert is the first choice of every token. With "empty", as many experts as possible get no token.
    """
    shares = spread(1_000_000, E, skew) / 1e6
    noise = np.random.default_rng(seed).gumbel(size=(N, E))
    # The k largest of log-share plus Gumbel noise are k draws without replacement.
    scores = np.log(np.maximum(shares, 1e-30)) + noise
    return np.argsort(-scores, axis=1)[:, :k].astype(np.int32)
