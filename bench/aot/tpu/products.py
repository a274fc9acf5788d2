"""The products that grouped kernels compute on TPUs: their names, and the bytes that each must move."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

TPUS = ("v6e", "v5e", "tpu7x")


class Product(NamedTuple):
    """One product of an operation.

    Attributes:
        kernel_words: words in a kernel's name that tell it; the first product with a match counts.
        arrays_of_M, arrays_of_F: operands and results that are as wide as M, as F.
        matrices_with_rows, all_matrices: matrices of the groups that have rows, of all groups.
        float32_per_row: float32 numbers per row.
    """

    kernel_words: tuple[str, ...]
    arrays_of_M: int = 0
    arrays_of_F: int = 0
    matrices_with_rows: int = 0
    all_matrices: int = 0
    float32_per_row: int = 0


PRODUCTS = {
    "grouped_matmul": {
        "dw": Product(("_dw", "tgmm"), 1, 1, 0, 1),
        "dx": Product(("_dx", "transpose"), 1, 1, 1),
        "y": Product(("",), 1, 1, 1),
    },
    "moe_mlp": {
        "up": Product(("experts_up",), 1, 1, 2),
        "down": Product(("experts_down",), 1, 1, 1, 0, 1),
        "dh": Product(("experts_dh",), 1, 5, 1, 0, 2),
        "dx": Product(("experts_dx",), 1, 2, 2),
        "dw_up": Product(("experts_dw_up",), 1, 2, 0, 2),
        "dw_down": Product(("experts_dw_down",), 1, 1, 0, 1),
    },
    "decode_attention": {"o": Product(("",))},
}
SKEWS = ("uniform", "zipf")


def with_skews(workload: Any) -> dict[str, Any]:
    """The workload with its rows spread over groups evenly and by Zipf's law; one without groups as it is."""
    if workload.op == "decode_attention":
        return {"lengths": workload}
    if workload.op in ("attention", "linear_cross_entropy"):
        return {"all": workload}
    return {skew: dataclasses.replace(workload, skew=skew) for skew in SKEWS}


def product_of(op: str, kernel: str) -> str:
    """Name the product of an operation that a kernel computes, or "" for none."""
    products = PRODUCTS[op].items()
    return next((name for name, product in products if any(word in kernel for word in product.kernel_words)), "")


def min_bytes(workload: Any, product: str) -> int:
    """Count the bytes that a kernel must move: each operand and result once, only the matrices of groups with rows.

    The count of a mixture's `up` is that of inference; before a backward pass it also writes gate and up.
    """
    if workload.op == "decode_attention":
        return workload.cost().bytes
    N, sizes = workload.N, workload.integer_inputs().get("group_sizes")
    if sizes is None:
        N = workload.N * workload.k
        sizes = np.bincount(workload.integer_inputs()["expert_ids"].ravel(), minlength=workload.E)
    counts = PRODUCTS[workload.op][product]
    num_matrices = counts.matrices_with_rows * int(np.count_nonzero(sizes)) + counts.all_matrices * workload.E
    elements = N * (counts.arrays_of_M * workload.M + counts.arrays_of_F * workload.F)
    elements += num_matrices * workload.M * workload.F
    return workload.itemsize * elements + 4 * counts.float32_per_row * N
