"""The workloads of decoding attention."""

from dantinox.kernels.workloads.common import ALL, AOT, BF16, BIG, BOTH, BUNDLES, CPU, REGISTERS, TPU
from dantinox.kernels.workloads.types import Decode


def _cache_lengths(C: int) -> tuple[int, ...]:
    """Lengths of an empty cache, with one token, one token before it is full, full, wrapped, wrapped ten times."""
    return (0, 1, C - 1, C, C + 1, 2 * C - 1, 10 * C)


PARITY = {"suites": ("parity",), "devices": ("small",), "dtypes": ALL}


def _parity(name: str, C: int = 8, **sizes) -> Decode:
    return Decode(name=name, C=C, lengths=_cache_lengths(C), **PARITY, **sizes)


def _step(name: str, C: int, *lengths: int, H: int, K: int, D: int = 128, **kind) -> Decode:
    return Decode(name=name, C=C, lengths=lengths, H=H, K=K, D=D, **kind)


TUTORIAL = {"suites": ("tutorial",), "devices": ("cpu",), "dtypes": BOTH}

DRAFTS = AOT | {"dtypes": BF16}

KV_CACHES = (
    _parity("grouped"),
    _parity("multi-head, elementwise gate", H=2, gate="elementwise"),
    _parity("multi-query, head gate, cap", H=3, K=1, gate="head", softcap=1.5),
    _parity("window", window=3, scale=0.3),
    _parity("window of one", window=1, gate="head"),
    _parity("window past C", window=100),
    _parity("one slot", 1, gate="elementwise"),
    _parity("129 slots", 129, D=16, window=70),
    _parity("sinks", H=3, K=1, gate="head", window=3, softcap=1.5, sinks=True),
    _parity("two tokens, sinks", new_tokens=2, window=4, sinks=True),
    _parity("five tokens", 21, new_tokens=5, window=17, gate="elementwise", scale=0.3),
    _parity("129 slots, seven tokens", 129, D=16, H=2, K=1, new_tokens=7, window=70, gate="head"),
    # For tensor cores: blocks of 64 slots and a partial one.
    _parity("72 slots, heads of 64", 72, H=4, K=1, D=64, gate="head"),
    _parity("136 slots, heads of 128", 136, H=2, D=128, window=70, gate="elementwise", softcap=2.0),
    # A large cache that is nearly empty, the same tokens in a small one, and a sweep over the position.
    *(_step(f"512 in C={C}", C, 512, H=8, K=2, D=64, **CPU) for C in (1024, 32768)),
    *(_step(f"C={C}, full", C, C, H=8, K=2, D=64, sweep=("C",), **CPU) for C in (512, 2048, 8192)),
    *(
        _step(f"C=8192, full, {dtype}", 8192, 8192, H=8, K=2, D=64, kv_dtype=dtype, **CPU)
        for dtype in ("int8", "float8_e4m3fn")
    ),
    _step("W=256 at 100000", 4096, 100_000, H=8, K=2, D=64, window=256, **CPU),
    _step("ragged batch", 2048, 0, 100, 2047, 30_000, H=8, K=2, D=64, **CPU),
    # Short, not yet wrapped, nearly full, and with a window that wraps around the end of the ring buffer.
    *(
        _step(name, 4096, 100, 1000, 4000, 8500, H=8, K=2, window=1024, kv_dtype=dtype, **TUTORIAL)
        for name, dtype in (("tutorial", None), ("tutorial, int8", "int8"))
    ),
    _step("Mixtral-8x7B 32k, B=1", 32768, 32767, H=32, K=8, **BIG),
    _step("Mixtral-8x7B 8k, B=32", 8192, *([8191] * 32), H=32, K=8, **BIG),
    _step("Mixtral-8x7B 8k, B=32, int8", 8192, *([8191] * 32), H=32, K=8, kv_dtype="int8", **TPU),
    _step("Mistral-7B window, B=32", 16384, *([100_000] * 32), H=32, K=8, window=4096, **BIG),
    _step("ragged 0..32k, B=16", 32768, *range(0, 32768, 2048), H=32, K=4, **BIG),
    _step("nearly empty, B=8", 65536, *([512] * 8), H=32, K=8, **BIG),
    _step("aot ring", 2048, 5000, 100, H=8, K=2, window=1024, gate="head", **AOT),
    *(
        _step(f"aot ring, {dtype}", 2048, 5000, 100, H=8, K=2, window=1024, gate="head", kv_dtype=dtype, **BUNDLES)
        for dtype in ("int8", "float8_e4m3fn")
    ),
    _step(
        "aot ring, 5 tokens, sinks",
        *(2048, 5000, 100),
        **{"H": 8, "K": 2, "window": 1024, "gate": "head", "new_tokens": 5, "sinks": True},
        **DRAFTS,
    ),
    # The last of these spills registers.
    *(
        _step(
            f"aot d{D} 8 tokens, window, softcap",
            *(1000, 2000, 100),
            **{"H": 8, "K": 2, "D": D, "window": 256, "softcap": 50.0, "new_tokens": 8},
            **(REGISTERS | {"dtypes": BF16}),
        )
        for D in (64, 80, 128, 256)
    ),
)
