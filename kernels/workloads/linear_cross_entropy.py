"""The workloads of linear cross-entropy."""

from dantinox.kernels.workloads.common import AOT, BIG, BOTH, CPU
from dantinox.kernels.workloads.types import LinearCrossEntropy


def _loss(name: str, N: int, M: int, V: int, **kind) -> LinearCrossEntropy:
    return LinearCrossEntropy(name=name, N=N, M=M, V=V, **kind)


PARITY = {"suites": ("parity",), "devices": ("small",)}
LINEAR_CROSS_ENTROPY = (
    _loss("129 of 127", 129, 24, 127, absent="some", dtypes=BOTH, **PARITY),
    _loss("7 of 129, soft cap", 7, 40, 129, softcap=3.0, dtypes=BOTH, **PARITY),
    _loss("300 of 517, z-loss", 300, 16, 517, z_loss=0.1, absent="some", dtypes=BOTH, **PARITY),
    _loss("soft cap, z-loss", 65, 130, 300, softcap=2.0, z_loss=1e-2, absent="some", dtypes=BOTH, **PARITY),
    _loss("no row takes part", 9, 8, 20, absent="all", **PARITY),
    _loss("one row", 1, 7, 33, **PARITY),
    _loss("one word", 9, 8, 1, **PARITY),
    _loss("one column", 9, 1, 12, **PARITY),
    _loss("nano", 2048, 128, 512, **CPU),
    *(_loss(f"V={V}", 1024, 512, V, sweep=("V",), **CPU) for V in (4096, 32768)),
    _loss("tutorial", 2048, 512, 4000, absent="some", suites=("tutorial",), devices=("cpu",), dtypes=BOTH),
    _loss("8k tokens, V=32768", 8192, 1024, 32768, **BIG),
    _loss("8k tokens, V=151936", 8192, 1024, 151936, **BIG),
    _loss("aot V=32000", 1024, 512, 32000, **AOT),
    _loss("aot V=2100, soft cap, z-loss", 500, 384, 2100, softcap=30.0, z_loss=1e-4, **AOT),
)
