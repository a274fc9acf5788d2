"""Tile sizes of the grouped matmuls.

On a TPU every step of the grid should have the whole contraction: then a group's matrix is read once, and no sum
waits in memory. The model counts the bytes that tiles make a kernel move. On a CPU a step copies the matrix that it
uses, so its tile should have about as many rows as a group.
"""

from typing import NamedTuple

from kernels.dispatch import Device

VMEM_BYTES = 56 * 2**20  # of the smallest chip's 64
BLOCK_BYTES = 36 * 2**20  # of them for blocks, each twice; what is left serves sums and the compiler
CPU_ROWS = 16, 512  # at least, at most
UNROLLED = 2**30  # multiplications that are written out, what is more in a loop: code is read from memory too


class Tiles(NamedTuple):
    """What one step takes.

    Attributes:
        rows: rows of x, and of these as many at once as `chunk`: what of a tile a group does not touch is skipped.
        copies: chunks that have code of their own.
        inner: of the contraction; in a sum over rows, columns of x.
        columns: of the output, and of these as many at once as `strip`.
        height, width: of the output of one product.
        part: of the contraction of one product; smaller than `inner`, its sums wait in memory.
    """

    rows: int
    chunk: int
    inner: int
    columns: int
    strip: int
    copies: int = 1
    height: int = 128
    width: int = 256
    part: int | None = None


def piece(here: Device, chunk: int, inner: int, *, transposed: bool) -> tuple[int, int, int | None]:
    """(height, width, part) of what libtpu multiplies at once, by its schedules.

    A product is as wide as the matrix unit. v5e's unit is 128 wide; the results of newer ones are 256 wide, and v6e
    adds them up in its 64 registers: 128 rows leave half of them free. A matrix that is transposed on its way into the
    unit takes twice as long to load, which only 256 rows pay for. A contraction that two parts make needs no register
    to wait in. TPU7x adds up in the unit.
    """
    if "v5" in here.kind:
        return min(chunk, 256), 128, None
    if "v6" not in here.kind:
        return min(chunk, 256), 256, None
    part = 256 if 256 < inner <= 512 else 512 if transposed and 512 < inner <= 1024 else None
    return min(chunk, 256 if transposed else 128), 256, part


def rows(here: Device, N: int, E: int) -> tuple[int, int]:
    """(rows of a tile, rows at once) for N rows in E groups."""
    each = max(1, N // E)
    if here.platform == "cpu":
        nearest = 1 << max(0, round(each * 2 / 3) - 1).bit_length()
        return (min(N, max(CPU_ROWS[0], min(nearest, CPU_ROWS[1]))),) * 2
    tile = 512 if each >= 256 else 256 if each >= 128 else 128
    return tile, min(tile, 256)


def product(
    here: Device, N: int, E: int, K: int, J: int, *, xs: int, ws: int, wide: int, transposed: bool, itemsize: int
) -> Tiles:
    """For [N, K] times [E, K, J]: `xs` and `ws` such operands, `wide` arrays [N, J] read or written."""
    tile, chunk = rows(here, N, E)
    if here.platform == "cpu":
        return Tiles(tile, chunk, K, J, J)
    visits = -(-N // tile) + E - 1
    best: tuple[float, int, int] | None = None
    for inner in _sides(K, 8192):
        for columns in _sides(J, 2048):
            blocks = xs * tile * inner + ws * inner * columns + wide * tile * columns
            sums = 4 * ws * (chunk if inner >= K else tile) * columns
            if 2 * itemsize * blocks + sums > BLOCK_BYTES:
                continue
            again = visits if inner < K else min(visits, E)  # times that a column of a matrix is read
            moved = xs * visits * tile * K * -(-J // columns) + ws * again * K * J
            best = min(best or (moved, -inner, columns), (moved, -inner, columns))
    inner, columns = (min(K, 512), min(J, 512)) if best is None else (-best[1], best[2])
    products = ws * chunk * min(inner, K)
    strips = [side for side in _sides(columns, 2048) if columns % side == 0 and side * products <= UNROLLED]
    strip = max(strips, default=columns)
    copies = next(
        n for n in (4, 2, 1) if tile // chunk % n == 0 and n * strip * products <= max(UNROLLED, strip * products)
    )
    return Tiles(tile, chunk, inner, columns, strip, copies, *piece(here, chunk, inner, transposed=transposed))


def summed(here: Device, N: int, E: int, M: int, F: int, *, dys: int, itemsize: int) -> Tiles:
    """For the sums over rows [N, M]^T [N, F]: [E, M, F], `dys` of them at once."""
    tile, _ = rows(here, N, E)
    if here.platform == "cpu":
        return Tiles(tile, tile, M, F, F)
    best: tuple[float, int, int] | None = None
    for inner in _sides(M, 2048):
        for columns in _sides(F, 2048):
            blocks = tile * inner + dys * tile * columns + dys * inner * columns
            if 2 * itemsize * blocks + 4 * dys * inner * columns > BLOCK_BYTES:
                continue
            moved = M * -(-F // columns) + dys * F * -(-M // inner)
            best = min(best or (moved, inner, columns), (moved, inner, columns))
    inner, columns = (min(M, 512), min(F, 512)) if best is None else best[1:]
    return Tiles(tile, tile, inner, columns, columns, 1, *piece(here, 256, inner, transposed=False))


def _sides(size: int, most: int) -> list[int]:
    """The whole side where it is at most so long, and multiples of 128 that divide it; 512 where there are none."""
    found = [size] if size <= most else []
    found += [side for side in range(128, min(size - 1, most) + 1, 128) if size % side == 0]
    return found or [512]
