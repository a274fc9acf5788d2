"""The workloads of the mixture of experts."""

from dantinox.kernels.workloads.common import AOT, BIG, BOTH, CPU, H100
from dantinox.kernels.workloads.types import MoE


def _experts(name: str, N: int, M: int, F: int, E: int, k: int = 2, skew: str = "uniform", **kind) -> MoE:
    return MoE(name=name, N=N, M=M, F=F, E=E, k=k, skew=skew, **kind)


CLAMPED = ("swiglu_clamped", 1.25, 1.702)  # the limit is low, so that it clamps gates near 1
PARITY = {"suites": ("parity",), "devices": ("small",)}
EXPERTS = (
    _experts("top 1", 65, 16, 24, 4, 1, dtypes=BOTH, **PARITY),
    _experts("top 2", 300, 16, 24, 4, dtypes=BOTH, **PARITY),
    _experts("top 2, zipf", 300, 16, 24, 4, skew="zipf", dtypes=BOTH, **PARITY),
    _experts("top 2, one expert takes one slot of all", 300, 16, 24, 4, skew="one", dtypes=BOTH, **PARITY),
    _experts("all experts", 64, 8, 24, 3, 3, **PARITY),
    _experts("one expert", 257, 8, 24, 1, 1, **PARITY),
    _experts("one token", 1, 8, 16, 4, 3, **PARITY),
    _experts("biases", 127, 16, 24, 4, skew="empty", biases=True, dtypes=BOTH, **PARITY),
    _experts("clamped SwiGLU", 129, 8, 24, 3, activation=CLAMPED, dtypes=BOTH, **PARITY),
    _experts("biases, clamped SwiGLU", 300, 17, 33, 5, skew="zipf", biases=True, activation=CLAMPED, **PARITY),
    # The shapes of decoding.
    _experts("top 2, few rows of wide matrices", 4, 200, 300, 4, dtypes=BOTH, **PARITY),
    _experts("nano-moe", 2048, 128, 192, 8, skew="zipf", **CPU),
    *(_experts(f"E={E}", 2048, 256, 512, E, sweep=("E",), **CPU) for E in (4, 32)),
    _experts("one token, E=8", 1, 256, 1024, 8, **CPU),
    *(_experts(f"Mixtral-8x7B {s}", 4096, 4096, 14336, 8, skew=s, **H100) for s in ("uniform", "zipf")),
    *(_experts(f"Qwen3-30B-A3B {s}", 8192, 2048, 768, 128, 8, s, **BIG) for s in ("uniform", "zipf")),
    _experts("Qwen3-30B-A3B decode", 32, 2048, 768, 128, 8, "zipf", **BIG),
    _experts("aot top 2 of 8", 1024, 512, 1024, 8, skew="zipf", **AOT),
    _experts("aot multiples of 16", 1024, 176, 400, 8, skew="zipf", **H100),
    _experts("aot multiples of 32", 1024, 160, 1376, 8, skew="zipf", **H100),
)
