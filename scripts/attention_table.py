"""Print the table of README.md: which implementation of attention `auto` takes, by card and dtype.

It asks the operation itself, for devices that this machine need not have, as if jax-triton were installed.
"""

import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax

from dantinox.kernels.dispatch import target_device
from dantinox.kernels.ops.attention.api import OPERATION

CARDS = {
    "H100, H200": ("NVIDIA H100 80GB HBM3", "NVIDIA H200"),
    "B200": ("NVIDIA B200",),
    "A100": ("NVIDIA A100-SXM4-80GB",),
    "RTX 30, 40 and 50, L4": (
        "NVIDIA GeForce RTX 3090",
        "NVIDIA GeForce RTX 4090",
        "NVIDIA GeForce RTX 5090",
        "NVIDIA L4",
    ),
    "older NVIDIA, AMD": ("Tesla T4", "Tesla V100-SXM2-16GB", "AMD Instinct MI300X"),
}
DTYPES = (("bfloat16", "float16"), ("float32",))
MAX_D = 256  # XLA serves every larger head dim
PALLAS_STEP = 16
NAMES = {"pallas": "Pallas", "triton": "Triton", "xla": "XLA"}


def chosen(kind: str, dtype: str, D: int) -> str:
    """Return the name of the implementation that `auto` takes."""
    x = jax.ShapeDtypeStruct((1, 1024, 8, D), dtype)
    with target_device("gpu", kind), mock.patch("importlib.util.find_spec", lambda name: name):
        function = OPERATION.select("auto", x, x, x, None, True, False, None)
    return NAMES[next(i.name for i in OPERATION.implementations if i.function is function)]


def cell(kinds: tuple[str, ...], dtypes: tuple[str, ...]) -> str:
    """Describe the choices for some devices and dtypes, which must agree.

    Raises:
        ValueError: they do not agree, or the table has no words for the choice.
    """
    by_D = {D: {chosen(kind, dtype, D) for kind in kinds for dtype in dtypes} for D in range(1, MAX_D + 65)}
    aligned = set().union(*(names for D, names in by_D.items() if D <= MAX_D and D % PALLAS_STEP == 0))
    others = set().union(*(names for D, names in by_D.items() if D <= MAX_D and D % PALLAS_STEP))
    larger = set().union(*(names for D, names in by_D.items() if D > MAX_D))
    if len(aligned) != 1 or len(others) != 1 or larger != {"XLA"}:
        raise ValueError(f"{kinds} in {dtypes}: {aligned}, {others} and {larger}; allowed: one each, the last XLA")
    (first,), (second,) = aligned, others
    return first if first == second else f"{first}; {second} if D is no multiple of {PALLAS_STEP}"


def table() -> str:
    """Format the choices as Markdown."""
    rows = [f"| `attention` on | {' | '.join(', '.join(dtypes) for dtypes in DTYPES)} |", "|---|---|---|"]
    rows += [f"| {card} | {' | '.join(cell(kinds, dtypes) for dtypes in DTYPES)} |" for card, kinds in CARDS.items()]
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
