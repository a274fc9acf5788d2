"""The workloads of grouped matmul."""

from dantinox.kernels.workloads.common import AOT, BIG, BOTH, CPU, H100
from dantinox.kernels.workloads.types import GroupedMatmul


def _groups(name: str, *sizes: int, N: int = 0) -> GroupedMatmul:
    kind = {"suites": ("parity",), "devices": ("small",), "dtypes": BOTH}
    return GroupedMatmul(name=name, N=N or sum(sizes), M=24, F=40, E=len(sizes), sizes=sizes, **kind)


EDGE_CASES_GROUPED_MATMUL = (  # around the edges of tiles of 64, 128 and 256 rows
    _groups("all to the first", 580, 0, 0, 0),
    _groups("all to the last", 0, 0, 0, 580),
    _groups("all unassigned", 0, 0, 0, 0, N=580),
    _groups("63 64 65", 63, 64, 65, 1, N=580),
    _groups("255 256", 255, 256, 0, 69),
    _groups("257 and a hole", 257, 0, 1, 129, N=580),
    _groups("four rows", 1, 1, 1, 1, N=580),
    _groups("127 320 133", 127, 320, 133, 0),
    _groups("one group of all", 65),
    _groups("one group of some", 64, N=65),
    _groups("one row", 0, 1),
    _groups("one unassigned row", 0, 0, N=1),
)


def _gmm(name: str, N: int, M: int, F: int, E: int, *, skew: str = "uniform", **kind) -> GroupedMatmul:
    return GroupedMatmul(name=name, N=N, M=M, F=F, E=E, skew=skew, **kind)


MODEL_GROUPED_MATMUL = (
    *(_gmm(f"E={E}", 4096, 256, 1024, E, sweep=("E",), **CPU) for E in (1, 8, 32, 64)),
    _gmm("E=8 zipf", 4096, 256, 1024, 8, skew="zipf", **CPU),
    *(_gmm(f"Mixtral-8x7B {s}", 8192, 4096, 14336, 8, skew=s, **BIG) for s in ("uniform", "zipf")),
    _gmm("Mixtral-8x7B down", 8192, 14336, 4096, 8, **BIG),
    _gmm("256 experts, narrow", 131072, 7168, 1024, 256, **H100),
    _gmm("256 experts, wide", 131072, 1024, 7168, 256, **H100),
    _gmm("128 groups", 262144, 4096, 1536, 128, **H100),
    *(_gmm(f"Qwen3-30B-A3B {s}", 65536, 2048, 768, 128, skew=s, **BIG) for s in ("uniform", "zipf", "empty")),
    _gmm("dante-moe", 8192, 512, 2048, 4, **BIG),
    _gmm("decode, 128 experts", 256, 2048, 768, 128, skew="zipf", **BIG),
    *(_gmm(f"aot E=8 {s}", 2048, 512, 1024, 8, skew=s, **AOT) for s in ("uniform", "zipf")),
    # Uneven, as a router's groups are, with an empty one; N is their sum.
    GroupedMatmul(
        name="tutorial",
        N=2048,
        M=512,
        F=1024,
        E=8,
        sizes=(700, 300, 0, 417, 65, 256, 250, 60),
        suites=("tutorial",),
        devices=("cpu",),
        dtypes=BOTH,
    ),
    _gmm("aot odd sizes", 1000, 384, 640, 5, skew="zipf", **AOT),
    _gmm("aot multiples of 16", 1000, 176, 400, 5, skew="zipf", **H100),
    _gmm("aot multiples of 32", 1000, 160, 1376, 5, skew="zipf", **H100),
)
