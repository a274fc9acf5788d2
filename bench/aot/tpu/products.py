"""What the tables of the AOT profiles share: targets, products of the grouped kernels, the bytes they must move."""

import dataclasses
from typing import Any

import numpy as np

TPUS = ("v6e", "v5e", "tpu7x")
# Of each operation its kernels, by a word of their names, the first that fits; what each must move: arrays as wide as
# M, arrays as wide as F, matrices of busy groups, matrices of all groups, float32 numbers a row.
PRODUCTS = {
    "grouped_matmul": {
        "dw": (("_dw", "tgmm"), (1, 1, 0, 1, 0)),
        "dx": (("_dx", "transpose"), (1, 1, 1, 0, 0)),
        "y": (("",), (1, 1, 1, 0, 0)),
    },
    "moe_mlp": {
        "up": (("experts_up",), (1, 1, 2, 0, 0)),
        "down": (("experts_down",), (1, 1, 1, 0, 1)),
        "dh": (("experts_dh",), (1, 5, 1, 0, 2)),
        "dx": (("experts_dx",), (1, 2, 2, 0, 0)),
        "dw_up": (("experts_dw_up",), (1, 2, 0, 2, 0)),
        "dw_down": (("experts_dw_down",), (1, 1, 0, 1, 0)),
    },
    "decode_attention": {"o": (("",), ())},
}
SKEWS = ("uniform", "zipf")


def spreads(spec: Any) -> dict[str, Any]:
    """The row with its rows spread over groups evenly and by Zipf's law; of decoding as it is."""
    if spec.op == "decode_attention":
        return {"lengths": spec}
    return {skew: dataclasses.replace(spec, skew=skew) for skew in SKEWS}


def product_of(op: str, kernel: str) -> str:
    """Which product of an operation a kernel computes, by its name."""
    return next((name for name, (words, _) in PRODUCTS[op].items() if any(word in kernel for word in words)), "")


def floor(spec: Any, product: str) -> int:
    """Bytes that a kernel must move: each operand and result once, of the matrices those of groups with rows.

    Of a mixture's `up` without a backward pass, for which it keeps g and u.
    """
    if spec.op == "decode_attention":
        return spec.cost().bytes
    N, sizes = spec.N, spec.integer_inputs().get("group_sizes")
    if sizes is None:
        N, sizes = spec.N * spec.k, np.bincount(spec.integer_inputs()["expert_ids"].ravel(), minlength=spec.E)
    of_M, of_F, busy, every, thin = PRODUCTS[spec.op][product][1]
    matrices = busy * int(np.count_nonzero(sizes)) + every * spec.E
    return spec.itemsize * (N * (of_M * spec.M + of_F * spec.F) + matrices * spec.M * spec.F) + 4 * thin * N
