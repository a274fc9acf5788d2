"""The cases of an operation: workloads, the features that each has, and its arrays."""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from dantinox.kernels import workloads
from dantinox.kernels.ops.decode_attention.kv_cache import KVCache, quantize

TILE = 512  # sizes above it have several tiles, whatever the tile size
UNSEEN_NAN = "unseen NaN"
Arrays = dict[str, Any]
# The letters of the axes of each result; a gradient has those of its input.
AXES = {
    "attention": {"o": "BTHD", "dq": "BTHD", "dk": "BSKD", "dv": "BSKD", "dgate": "BTHD", "dsinks": "H"},
    "grouped_matmul": {"o": "NF", "dx": "NM", "dw": "EMF"},
    "moe_mlp": {
        **{"o": "NM", "dx": "NM", "dw_gate": "EMF", "dw_up": "EMF", "dw_down": "EFM", "dexpert_weights": "Nk"},
        **{"db_gate": "EF", "db_up": "EF", "db_down": "EM"},
    },
    "linear_cross_entropy": {"o": "N", "dh": "NM", "dw": "VM"},
    "decode_attention": {
        "o": "BHD",
        "cache k": "BKCD",
        "cache v": "BKCD",
        "cache k_scale": "BKC",
        "cache v_scale": "BKC",
        "length": "B",
    },
}
# In the order of the report; an operation's cases have those that apply.
FEATURES = {
    "attention": (
        *("one tile", "several tiles", "causal", "full", "window", "GQA", "gate per head", "gate per element"),
        *("soft cap", "segments", "T < S", "T > S", "scale", "batch", "sinks", "other width of values", "odd sizes"),
        UNSEEN_NAN,
    ),
    "grouped_matmul": (
        *("one tile", "several tiles", "several tiles of M", "several tiles of F", "uniform groups", "uneven groups"),
        *("empty groups", "one group", "rows past the sum", "odd sizes", UNSEEN_NAN),
    ),
    "moe_mlp": (
        *("one tile", "several tiles", "several tiles of M", "several tiles of F", "top 1", "top 2"),
        *("uneven groups", "one expert takes all", "experts without tokens", "ids of no expert", "odd sizes"),
        *("biases", "clamped activation", UNSEEN_NAN),
    ),
    "linear_cross_entropy": (
        *("one tile", "several tiles of N", "several tiles of V", "several tiles of M", "soft cap", "z-loss"),
        *("rows without part", "no row takes part", "odd sizes", UNSEEN_NAN),
    ),
    "decode_attention": (
        *("one block", "several blocks", "empty ring", "part-filled ring", "full ring", "wrapped ring"),
        *("ragged lengths", "window", "GQA", "gate per head", "gate per element", "soft cap", "scale", "odd sizes"),
        *("sinks", "several tokens", "int8", "float8_e4m3fn", UNSEEN_NAN),
    ),
}
DTYPES = ("float32", "bfloat16", "float16")


def axes_of(op: str, name: str, ndim: int) -> str:
    """Return the letters of the axes of a result; the output of several new tokens has their axis too."""
    axes = AXES[op].get(name) or AXES[op].get(name.removeprefix("d"), "")
    return "BTHD" if op == "decode_attention" and name == "o" and ndim == 4 else axes


class Case(NamedTuple):
    """One problem.

    Attributes:
        workload: its sizes and options.
        dtype: dtype of the arrays.
        poisoned: what no result may depend on holds NaN.
        without_expert: some ids of the mixture of experts name no expert.
    """

    workload: workloads.Workload
    dtype: str
    poisoned: bool = False
    without_expert: bool = False

    @property
    def id(self) -> str:
        """A name that selects the case on the command line."""
        extra = [UNSEEN_NAN] * self.poisoned + ["ids of no expert"] * self.without_expert
        return ", ".join([self.workload.name, *extra, self.dtype])

    @property
    def is_pair(self) -> bool:
        """Whether it combines features that have cases of their own."""
        special = self.poisoned or self.without_expert
        return "features" in self.workload.suites and "," in self.workload.name and not special

    def features(self) -> frozenset[str]:
        """The features of `FEATURES`, and the dtype, that the case has."""
        found = {self.dtype} | _features(self.workload)
        found |= {UNSEEN_NAN} if self.poisoned else set()
        return frozenset(found | ({"ids of no expert"} if self.without_expert else set()))


def cases(op: str) -> list[Case]:
    """List the cases of an operation, the most telling first: single features, odd sizes, 16 bits, then pairs."""
    features = workloads.select(op, "features")
    alone = [row for row in features if "," not in row.name]
    pairs = [row for row in features if "," in row.name]
    odd = workloads.select(op, "parity")
    found = [Case(row, "float32") for row in alone]
    found += _special_cases(op)
    found += [Case(row, "float32") for row in odd]
    for dtype in DTYPES[1:]:  # in a small problem too: the error of a mean of many values is below their unit
        found += [Case(row, dtype) for row in odd if dtype in row.dtypes][:1]
        found += [Case(row, dtype) for row in features if dtype in row.dtypes]
    found += [Case(row, "float32") for row in pairs]
    return found


def _special_cases(op: str) -> list[Case]:
    def row(name: str, **sizes: Any) -> workloads.Workload:
        return dataclasses.replace(workloads.get(op, f"features: {name}"), **sizes)

    if op == "attention":  # the first 210 keys lie before every window; a segment of the keys has no queries
        window, segments = row("window", T=530), row("segments", T=530, segments="unmatched", causal=False)
        return [Case(each, "float32", poisoned=True) for each in (window, segments)]
    if op == "grouped_matmul":
        return [Case(row("empty groups, rows past the sum"), "float32", poisoned=True)]
    if op == "moe_mlp":
        return [
            Case(row("experts without tokens"), "float32", poisoned=True),
            # The first and the last expert have no tokens: an id that is clamped or wrapped to them finds NaN.
            Case(row("experts without tokens", E=5), "float32", poisoned=True, without_expert=True),
            Case(row("biases", E=5, skew="empty"), "float32", poisoned=True, without_expert=True),
            *(Case(row(name), "float32", without_expert=True) for name in ("top 2", "top 1", "uneven groups")),
        ]
    if op == "linear_cross_entropy":
        return [Case(row(name), "float32", poisoned=True) for name in ("rows without part", "no row takes part")]
    names = ("part-filled ring", "empty ring", "ragged lengths", "window", "wrapped ring, window")
    names = (*names, "window, several tokens", "ragged lengths, several tokens")
    return [Case(row(name), "float32", poisoned=True) for name in names]


def _features(row: workloads.Workload) -> set[str]:
    if isinstance(row, workloads.Attention):
        return set(_attention_features(row))
    if isinstance(row, workloads.GroupedMatmul):
        return set(_grouped_matmul_features(row))
    if isinstance(row, workloads.MoE):
        return set(_moe_features(row))
    if isinstance(row, workloads.LinearCrossEntropy):
        return set(_linear_cross_entropy_features(row))
    assert isinstance(row, workloads.Decode)
    return set(_decode_attention_features(row))


def _attention_features(row: workloads.Attention) -> Iterator[str]:
    yield "several tiles" if max(row.T, row.S) > TILE else "one tile"
    yield "window" if row.window is not None else "causal" if row.causal else "full"
    yield from _head_features(row)
    if row.segments:
        yield "segments"
    if row.T != row.S:
        yield "T < S" if row.T < row.S else "T > S"
    if row.B > 1:
        yield "batch"
    if row.sinks:
        yield "sinks"
    if row.Dv not in (None, row.D):
        yield "other width of values"
    if {row.T % 8, row.S % 8, row.D % 8} != {0} and max(row.T, row.S) <= TILE:
        yield "odd sizes"


def _head_features(row: workloads.Attention | workloads.Decode) -> Iterator[str]:
    if row.H != row.K:
        yield "GQA"
    if row.gate != "none":
        yield "gate per head" if row.gate == "head" else "gate per element"
    if row.softcap is not None:
        yield "soft cap"
    if row.scale is not None:
        yield "scale"


def _grouped_matmul_features(row: workloads.GroupedMatmul) -> Iterator[str]:
    sizes = row.integer_inputs()["group_sizes"]
    yield "several tiles" if row.N > TILE else "one tile"
    yield from _width_features(row)
    if len(sizes) == 1:
        yield "one group"
    elif len(set(sizes.tolist())) == 1 and sizes[0]:
        yield "uniform groups"
    else:
        yield "uneven groups"
    if 0 in sizes:
        yield "empty groups"
    if sizes.sum() < row.N:
        yield "rows past the sum"


def _moe_features(row: workloads.MoE) -> Iterator[str]:
    yield "several tiles" if row.N * row.k > TILE else "one tile"
    yield from _width_features(row)
    if row.k <= 2:
        yield f"top {row.k}"
    tokens = np.bincount(row.integer_inputs()["expert_ids"].reshape(-1), minlength=row.E)
    if tokens.max() == row.N * row.k:
        yield "one expert takes all"
    if tokens.min() == 0:
        yield "experts without tokens"
    if row.skew != "uniform":
        yield "uneven groups"
    if row.biases:
        yield "biases"
    if row.activation != "swiglu":
        yield "clamped activation"


def _linear_cross_entropy_features(row: workloads.LinearCrossEntropy) -> Iterator[str]:
    if max(row.N, row.V) <= TILE:
        yield "one tile"
    for axis in "NVM":
        if getattr(row, axis) > TILE:
            yield f"several tiles of {axis}"
    if row.softcap is not None:
        yield "soft cap"
    if row.z_loss:
        yield "z-loss"
    if row.absent != "none":
        yield "no row takes part" if row.absent == "all" else "rows without part"
    if row.N % 8 or row.M % 8 or row.V % 8:
        yield "odd sizes"


def _width_features(row: workloads.GroupedMatmul | workloads.MoE) -> Iterator[str]:
    if row.M > TILE:
        yield "several tiles of M"
    if row.F > TILE:
        yield "several tiles of F"
    if row.M % 8 or row.F % 8:
        yield "odd sizes"


def _decode_attention_features(row: workloads.Decode) -> Iterator[str]:
    yield "several blocks" if row.C > TILE else "one block"
    filled = {_filling(length, row.C) for length in row.lengths}
    if len(filled) > 1:
        yield "ragged lengths"
    yield from filled
    if row.window is not None:
        yield "window"
    yield from _head_features(row)
    if row.sinks:
        yield "sinks"
    if row.new_tokens > 1:
        yield "several tokens"
    if row.kv_dtype is not None:
        yield row.kv_dtype
    if row.C <= TILE and (row.C % 8 or row.D % 8):
        yield "odd sizes"


def _filling(length: int, C: int) -> str:
    if length == 0:
        return "empty ring"
    return "part-filled ring" if length < C - 1 else "full ring" if length <= C else "wrapped ring"


class Problem(NamedTuple):
    """The arrays of a case: what a kernel gets, and what the reference gets, which cannot bear NaN.

    Attributes:
        inputs, clean: differentiable inputs by name.
        aux: integer inputs, and the cache of decoding in both forms ("cache", "clean cache").
        cotangent: of the output.
    """

    inputs: Arrays
    clean: Arrays
    aux: Arrays
    cotangent: Any


def draw(case: Case, seed: int = 0) -> Problem:
    """Draw the arrays of a case, rounded to its dtype."""
    row, rng = case.workload, np.random.default_rng(seed)
    dtype = jnp.dtype(case.dtype)
    aux = row.integer_inputs(seed)
    if case.without_expert:
        assert isinstance(row, workloads.MoE)
        aux["expert_ids"][::5, 0] = row.E
        aux["expert_ids"][::10] = row.E  # tokens without any expert
    clean = {name: rng.standard_normal(shape).astype(dtype) for name, shape in row.shapes().items()}
    inputs = dict(clean)
    if case.poisoned:
        for name, unseen in _unseen(row, aux).items():
            inputs[name] = np.where(unseen, np.asarray(np.nan, dtype), clean[name])
    if isinstance(row, workloads.Decode):
        aux = _draw_cache(row, case, rng)
    return Problem(inputs, clean, aux, rng.standard_normal(row.out_shape()).astype(dtype))


def _unseen(row: workloads.Workload, aux: Arrays) -> dict[str, np.ndarray]:
    """Masks of the inputs' elements that no result depends on, by name."""
    if isinstance(row, workloads.Attention):
        unseen = np.zeros((row.B, row.S, 1, 1), bool)
        if row.window is not None:
            unseen[:, : max(0, row.S - row.T - row.window + 1)] = True
        if row.segments == "unmatched":
            unseen |= (aux["segment_ids"][1] == 99)[:, :, None, None]
        return {"k": unseen, "v": unseen}
    if isinstance(row, workloads.GroupedMatmul):
        sizes = aux["group_sizes"]
        return {"x": (np.arange(row.N) >= sizes.sum())[:, None], "w": (sizes == 0)[:, None, None]}
    if isinstance(row, workloads.LinearCrossEntropy):
        return {"h": (aux["targets"] < 0)[:, None]}
    if isinstance(row, workloads.MoE):
        idle = np.bincount(aux["expert_ids"].reshape(-1), minlength=row.E)[: row.E] == 0
        alone = (aux["expert_ids"] == row.E).all(axis=1, keepdims=True)
        unseen = {"x": alone} | dict.fromkeys(("w_gate", "w_up", "w_down"), idle[:, None, None])
        return unseen | {name: idle[:, None] for name in row.shapes() if name.startswith("b_")}
    return {}


def _draw_cache(row: workloads.Decode, case: Case, rng: np.random.Generator) -> Arrays:
    """The cache of a step: unseen slots hold numbers, or NaN where the case is poisoned; zeros in the clean cache."""
    lengths = np.asarray(row.lengths)[:, None]
    newest = lengths + row.new_tokens - 1
    age = (newest - np.arange(row.C)[None]) % row.C  # once the new tokens are appended; 0: the newest
    held = (age >= row.new_tokens) & (age <= newest)
    seen = held & (age < min(row.C, row.window or row.C) + row.new_tokens - 1)
    kv_dtype = jnp.dtype(row.kv_dtype or case.dtype)
    arrays: Arrays = {"clean": {}, "given": {}}
    for name in ("k", "v"):
        x = rng.standard_normal(row.cache_shape())
        if row.kv_dtype is None:
            stored = {name: x.astype(kv_dtype)}
        else:
            values, scale = quantize(jnp.asarray(x, jnp.float32), kv_dtype)
            stored = {name: np.asarray(values), f"{name}_scale": np.asarray(scale)}
        for part, value in stored.items():
            mask = seen[:, None, :, None] if value.ndim == 4 else seen[:, None, :]
            arrays["clean"][part] = np.where(mask, value, np.zeros((), value.dtype))
            poison = case.poisoned and value.dtype.kind != "i"
            arrays["given"][part] = np.where(mask, value, np.asarray(np.nan, value.dtype)) if poison else value
    length = np.int32(row.lengths)
    return {
        "cache": KVCache(length=length, **arrays["given"]),
        "clean cache": KVCache(length=length, **arrays["clean"]),
    }
