"""Tile sizes of the attention kernels."""

from kernels.attention.mosaic_tpu import Tiles


def choose(*, heads: int, G: int, T: int, S: int, D: int, window: int | None, interpret: bool) -> Tiles:
    """Tiles for these sizes."""
    up = lambda n: 1 << max(0, n - 1).bit_length()
    if interpret:
        q = min(up(T), max(16, 512 // up(G)))
        k = min(up(S), 256)
        per = max(1, min(heads, (2048 * 128) // (G * q * k) if G * q * k < 2048 * 128 else 1))
        while heads % per:
            per -= 1
        return Tiles(per, q, k)
    q = min(max(128, up(T)), max(128, 1024 // up(G)))
    return Tiles(1, q, min(max(128, up(S)), 1024))
