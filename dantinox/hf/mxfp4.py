"""Unpack weights in mxfp4: blocks of 32 values of 4 bits (e2m1) that share a scale, a power of two (e8m0).

Source: OCP Microscaling Formats (MX) Specification 1.0; the order of the values in a byte is that of gpt-oss.
"""

import numpy as np

BLOCK = 32
"""Values per block: 16 bytes, each with one value in its low half and the next in its high half."""
_SCALE_BIAS, _SCALE_NAN = 127, 255
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_CODES = np.array([*_MAGNITUDES, *(-x for x in _MAGNITUDES)], np.float32)  # by code: the highest bit is the sign
_BYTES = np.stack([_CODES[np.arange(256) % 16], _CODES[np.arange(256) // 16]], axis=-1)
_PAIRS = _BYTES.view(np.uint64)[:, 0]  # both values of a byte as one item, which NumPy looks up ten times as fast
_SCALES = np.append(np.ldexp(np.float32(1), np.arange(_SCALE_NAN) - _SCALE_BIAS), np.nan).astype(np.float32)


def packed_names(name: str) -> tuple[str, str]:
    """Return the names of the two tensors that hold a tensor in mxfp4: its blocks and its scales."""
    return f"{name}_blocks", f"{name}_scales"


def packed_shapes(shape: tuple[int, int, int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of blocks and scales of a tensor [E, in, out]: [E, out, in / 32, 16] and [E, out, in / 32]."""
    E, in_features, out_features = shape
    scales = (E, out_features, in_features // BLOCK)
    return (*scales, BLOCK // 2), scales


def unpack(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Return the tensor [E, in, out] float32 of blocks [E, out, in / 32, 16] and scales [E, out, in / 32], both uint8.

    The values are exact, except that float32 makes infinities of those from 2^128 on; a scale of 255 gives NaN.
    """
    values = _PAIRS[blocks].view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        values *= _SCALES[scales][..., None]
    return values.reshape(*values.shape[:2], -1).swapaxes(1, 2)
