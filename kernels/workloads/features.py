"""A workload for each feature of an operation, alone and with each other one, over at least three tiles of 512.

So no refusal of one feature hides another, and no kernel passes because its tiles are larger than the problem.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

from dantinox.kernels.workloads.common import ALL, BOTH
from dantinox.kernels.workloads.types import Attention, Decode, GroupedMatmul, LinearCrossEntropy, MoE, Workload

KIND: dict[str, Any] = {"suites": ("features",), "devices": ("small",)}
LONG, SHORT = 1040, 530  # three tiles of 512 and two, with a partial one
Sizes = Mapping[str, Any]


def _rows[Kind: Workload](base: Kind, alone: Mapping[str, Sizes], paired: tuple[str, ...]) -> tuple[Kind, ...]:
    """Make the workload of each feature and of each pair of features that change different arguments."""
    rows = [
        base,
        *(dataclasses.replace(base, name=name, dtypes=("float32",), **sizes) for name, sizes in alone.items()),
    ]
    for first, second in itertools.combinations(paired, 2):
        a, b = alone[first], alone[second]
        if not a.keys() & b.keys():
            rows.append(dataclasses.replace(base, name=f"{first}, {second}", dtypes=("float32",), **a, **b))
    return tuple(rows)


def _attention() -> tuple[Workload, ...]:
    base = Attention(name="several tiles", T=LONG, S=LONG, H=2, K=2, D=32, dtypes=ALL, **KIND)
    alone: dict[str, Sizes] = {
        "window": {"window": 300, "causal": True},
        "full": {"causal": False},
        "GQA": {"H": 4},
        "gate per head": {"gate": "head"},
        "gate per element": {"gate": "elementwise"},
        "soft cap": {"softcap": 2.0},
        "segments": {"segments": "packed"},
        "T < S": {"T": SHORT},
        "T > S": {"S": SHORT, "T": LONG},
        "scale": {"scale": 0.5},
        "batch": {"B": 2},
        "sinks": {"sinks": True},
        "other width of values": {"Dv": 64},
    }
    paired = ("window", "full", "GQA", "gate per head", "soft cap", "segments", "T < S", "T > S")
    rows = []
    for row in _rows(base, alone, paired):
        if row.segments and row.T != row.S:
            row = dataclasses.replace(row, segments="separate")
        if "," in row.name:  # there are many pairs: half of the heads
            row = dataclasses.replace(row, H=row.H // 2, K=1)
        rows.append(row)
    row = dataclasses.replace(base, H=4, window=300, gate="head", name="window, GQA, gate per head", dtypes=ALL)
    return (*rows, row)


def _grouped_matmul() -> tuple[Workload, ...]:
    base = GroupedMatmul(name="uniform groups", N=1100, M=80, F=72, E=4, dtypes=ALL, **KIND)
    sizes: dict[str, tuple[int, ...]] = {
        "uneven groups": (700, 1, 300, 99),
        "empty groups": (0, 512, 0, 588),
        "rows past the sum": (300, 212, 1, 388),
        "empty groups, rows past the sum": (512, 0, 3, 0),
        "no rows in a group": (0, 0, 0, 0),
    }
    alone: dict[str, Sizes] = {name: {"sizes": each} for name, each in sizes.items()}
    alone |= {
        "one group": {"E": 1, "sizes": None},
        "several tiles of M": {"M": LONG},
        "several tiles of F": {"F": LONG},
        "odd sizes": {"M": 77, "F": 131},
    }
    paired = (*list(sizes)[:4], "several tiles of M", "several tiles of F", "odd sizes")
    row = dataclasses.replace(base, name="uneven groups", sizes=sizes["uneven groups"], dtypes=BOTH)
    return tuple(row if each.name == row.name else each for each in _rows(base, alone, paired))


def _moe() -> tuple[Workload, ...]:
    base = MoE(name="top 2", N=600, M=40, F=56, E=4, dtypes=ALL, **KIND)
    alone: dict[str, Sizes] = {
        "top 1": {"k": 1},
        "uneven groups": {"skew": "zipf"},
        "one expert takes all": {"skew": "one", "k": 1, "N": 1200},
        "experts without tokens": {"skew": "empty"},
        "several tiles of M": {"M": LONG},
        "several tiles of F": {"F": LONG},
        "odd sizes": {"M": 77, "F": 131},
        "biases": {"biases": True},
        "clamped activation": {"activation": ("swiglu_clamped", 7.0, 1.702)},
        "biases, clamped activation": {"biases": True, "activation": ("swiglu_clamped", 7.0, 1.702)},
    }
    paired = (
        "top 1",
        "uneven groups",
        "experts without tokens",
        "several tiles of M",
        "several tiles of F",
        "odd sizes",
    )
    return _rows(base, alone, paired)


def _decode_attention() -> tuple[Workload, ...]:
    C = LONG
    base = Decode(name="part-filled ring", lengths=(500, 700, 1030), C=C, H=2, K=2, D=32, dtypes=ALL, **KIND)
    alone: dict[str, Sizes] = {
        "empty ring": {"lengths": (0, 0)},
        "full ring": {"lengths": (C - 1, C, C)},
        "wrapped ring": {"lengths": (C + 1, 1500, 2 * C - 1, 7777)},
        "ragged lengths": {"lengths": (0, 511, 512, C, 5000)},
        "window": {"window": 300},
        "GQA": {"H": 4},
        "gate per head": {"gate": "head"},
        "gate per element": {"gate": "elementwise"},
        "soft cap": {"softcap": 2.0},
        "scale": {"scale": 0.5},
        "sinks": {"sinks": True},
        "several tokens": {"new_tokens": 5},
        "int8": {"kv_dtype": "int8"},
        "float8_e4m3fn": {"kv_dtype": "float8_e4m3fn"},
    }
    paired = ("full ring", "wrapped ring", "ragged lengths", "window", "GQA", "gate per head", "soft cap", "int8")
    paired = (*paired, "sinks", "several tokens")
    return _rows(base, alone, paired)


def _linear_cross_entropy() -> tuple[Workload, ...]:
    base = LinearCrossEntropy(name="several tiles of V", N=72, M=48, V=LONG, dtypes=ALL, **KIND)
    alone: dict[str, Sizes] = {
        "several tiles of N": {"N": LONG},
        "several tiles of M": {"M": LONG},
        "odd sizes": {"N": 67, "M": 77, "V": 1031},
        "soft cap": {"softcap": 2.0},
        "z-loss": {"z_loss": 0.05},
        "rows without part": {"absent": "some"},
        "no row takes part": {"absent": "all"},
    }
    return _rows(base, alone, tuple(alone)[:-1])


FEATURES: tuple[Workload, ...] = tuple(
    dataclasses.replace(row, name=f"features: {row.name}")
    for row in (*_attention(), *_grouped_matmul(), *_moe(), *_decode_attention(), *_linear_cross_entropy())
)
