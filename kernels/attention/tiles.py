"""Tile sizes of the attention kernels."""

from kernels.attention.scores import Tiles
from kernels.dispatch import Device


def choose(device: Device, *, heads: int, G: int, T: int, S: int, D: int, window: int | None, itemsize: int) -> Tiles:
    """Tiles for these sizes."""
    up = lambda n: 1 << max(0, n - 1).bit_length()
    if device.platform == "cpu":
        q = min(up(T), max(16, 512 // up(G)))
        k = min(up(S), 256)
        per = max(1, min(heads, (2048 * 128) // (G * q * k) if G * q * k < 2048 * 128 else 1))
        while heads % per:
            per -= 1
        return Tiles(per, q, k, G * q, k, 2**31 // k * k)
    wide = 128 if "v5" in device.kind else 256
    q = min(max(128, up(T)), max(128, 1024 // up(G)))
    k = min(max(128, up(S)), 1024)
    rows = wide if G * q % wide == 0 else 128
    return Tiles(1, q, k, rows, min(256, k), 2**20 // D)
