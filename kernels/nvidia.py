"""Compute capabilities of NVIDIA GPUs: of the one at hand, and by name of those that a program is compiled for."""

import functools
import re
from typing import Any

import jax

# JAX's device kinds are NVIDIA's names of the products, such as "NVIDIA A100-SXM4-80GB" and "NVIDIA GeForce RTX 4090".
_PRODUCTS = {
    (7, 0): r"V100",
    (7, 5): r"T4|RTX (20[5-8]0|[4568]000)|GTX 16\d\d",
    (8, 0): r"A100|A800|A30",
    (8, 6): r"A10|A10G|A10M|A16|A2|A40|RTX (30[5-9]0|A\d+)",
    (8, 7): r"Orin",
    (8, 9): r"L4|L20|L40S?|RTX 40[5-9]0D?|RTX \d+ Ada",
    (9, 0): r"H100|H200|GH200|H800|H20",
    (10, 0): r"G?B[12]00",
    (10, 3): r"G?B300",
    (12, 0): r"RTX 50[5-9]0D?|RTX PRO \d+",
    (12, 1): r"GB10",
}


@functools.cache
def capability_of_kind(kind: str) -> tuple[int, int] | None:
    """Return the compute capability (major, minor) of a device kind, or None if it is not a known NVIDIA GPU."""
    found = [capability for capability, names in _PRODUCTS.items() if re.search(rf"\b({names})\b", kind)]
    return max(found) if found else None  # "RTX 6000 Ada" is newer than "RTX 6000"


@functools.cache
def capability_of_device(device: jax.Device) -> tuple[int, int] | None:
    """Return the compute capability (major, minor) of a device, or None if it is not an NVIDIA GPU."""
    capability: Any = getattr(device, "compute_capability", None)
    match = re.fullmatch(r"(\d+)\.(\d+)", str(capability))
    return (int(match[1]), int(match[2])) if match else None
