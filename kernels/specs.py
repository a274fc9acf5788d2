"""The one table of shapes: parity tests, benchmarks, ahead-of-time compilation and tuning all read it.

A row is an operation at one set of sizes, with the purposes it serves and the machines it is for:

    purposes    parity  every run of the tests     long  the long run only
                bench   timed                      aot   compiled for machines that are not there
                tune    tile sizes are measured on it
    ladder  the kernels of kernels/attention/ladder are compared on it
    machines    small (any, interpreted too), cpu, h100, tpu

Real rows carry the sizes of published models; the others are there because they hurt: 1, 7, 127, 129, T != S, windows
of one and past the end, groups without rows. `sweep` names the axes over which
a row belongs to a plot.
"""

from kernels.shapes import Attention, Decode, GroupedMatmul, MoE, Spec

__all__ = ["MACHINES", "PURPOSES", "ROWS", "Attention", "Decode", "GroupedMatmul", "MoE", "Spec", "find", "rows"]

PURPOSES = ("parity", "long", "bench", "aot", "tune", "ladder")
MACHINES = ("small", "cpu", "h100", "tpu")

ALL = ("float32", "bfloat16", "float16")
BOTH = ("float32", "bfloat16")
BF16 = ("bfloat16",)
GPU = ("bfloat16", "float16")


def _small(kind: type[Spec], purpose: str, name: str, **sizes) -> Spec:
    return kind(name=name, purposes=(purpose,), machines=("small",), **sizes)


def _parity(name: str, T: int, S: int, **sizes) -> Spec:
    return _small(Attention, "parity", name, T=T, S=S, **sizes)


def _long(name: str, T: int, S: int, **sizes) -> Spec:
    return _small(Attention, "long", name, T=T, S=S, **sizes)


NASTY_ATTENTION = (
    _long("1", 1, 1, gate="elementwise"),
    _parity("7", 7, 7, B=2, D=5),
    _parity("127 grouped, gate, window", 127, 127, H=4, B=2, gate="elementwise", window=16, dtypes=ALL),
    _parity("129 multi-query, head gate, cap", 129, 129, H=4, K=1, gate="head", softcap=2.0, D=64, dtypes=BOTH),
    _long("7 of 129", 7, 129, H=4, scale=0.5),
    _parity("7 of 129, window", 7, 129, window=16, gate="head"),
    _long("1 of 127", 1, 127, H=4),
    _long("129 on 7", 129, 7, gate="elementwise"),
    _parity("129 on 7, window", 129, 7, window=3, gate="head", dtypes=BOTH),
    _long("300 on 200, window", 300, 200, H=4, window=20),
    _parity("window 1", 127, 127, window=1),
    _long("window S", 129, 129, window=129),
    _parity("window past S", 7, 7, window=1000),
    _long("window just banded", 140, 140, window=75),
    _parity("full, cap", 7, 129, H=4, causal=False, softcap=1.5, gate="head"),
    _long("full, T > S", 129, 7, causal=False),
    _parity("packed", 129, 129, H=4, B=2, segments="packed"),
    _parity("packed, window", 200, 200, B=2, segments="packed", window=16, gate="elementwise", dtypes=BOTH),
    _parity("pair", 33, 129, B=2, segments="pair", window=70),
    _long("nobody", 129, 129, B=2, segments="nobody", causal=False, dtypes=ALL),
    _parity("nobody, small", 33, 33, B=2, segments="nobody", causal=False, dtypes=ALL),
    _parity("nobody, banded", 127, 300, B=2, segments="nobody", window=20),
    _parity("banded 600", 600, 600, H=4, window=64, softcap=3.0, dtypes=BOTH),
    _long("banded 127 of 700", 127, 700, window=41),
    _parity("chunked causal", 1100, 1100, K=1, gate="head", dtypes=BOTH),
    _long("chunked full", 300, 4000, causal=False, H=1, K=1, dtypes=("float32", "float16")),
    _long("chunked window", 1100, 1100, H=1, K=1, window=1000),
    _long("chunked packed", 1030, 1030, H=1, K=1, segments="packed", softcap=2.0),
    _long("chunked 257 of 4100", 257, 4100, H=1, K=1),
    _long("chunked 4100 on 257", 4100, 257, H=1, K=1),
)

CPU = {"purposes": ("bench",), "machines": ("cpu",)}
H100 = {"purposes": ("bench", "aot", "tune"), "machines": ("h100",), "dtypes": BF16}
BIG = {"purposes": ("bench", "aot", "tune"), "machines": ("h100", "tpu"), "dtypes": BF16}
AOT = {"purposes": ("aot",), "machines": ("h100", "tpu"), "dtypes": GPU}
TPU = {"purposes": ("bench", "aot", "tune"), "machines": ("tpu",), "dtypes": BF16}
REGISTERS = {"purposes": ("aot",), "machines": ("h100",), "dtypes": GPU}
FEATURES = {"segments": "packed", "window": 256, "softcap": 50.0, "gate": "elementwise"}
BUNDLES = {"purposes": ("aot",), "machines": ("tpu",), "dtypes": BF16}


def _square(name: str, S: int, **sizes) -> Attention:
    return Attention(name=name, T=S, S=S, **sizes)


REAL_ATTENTION = (
    # What a CPU can time: the presets, then the two shapes that peers are known by.
    _square("nano", 128, B=16, H=4, K=2, D=32, window=64, gate="head", **CPU),
    _square("dante", 512, H=16, K=4, D=32, window=64, gate="elementwise", **CPU),
    _square("window 256 of 2048", 2048, H=8, K=8, D=64, window=256, **CPU),
    _square("causal 1024", 1024, H=8, K=8, D=64, **CPU),
    *(
        _square(f"S={S}", S, H=4, K=2, D=64, window=256, gate="head", sweep=("S", "W")[: 1 + (S == 2048)], **CPU)
        for S in (512, 1024, 2048)
    ),
    *(_square(f"W={W}", 2048, H=4, K=2, D=64, window=W, gate="head", sweep=("W",), **CPU) for W in (64, 512)),
    # The most telling first: time may run out on a rented machine.
    _square("h100 preset", 4096, B=8, H=12, K=4, D=128, window=1024, gate="head", **H100),
    _square("16k d128 window 1024, gate", 16384, H=16, K=4, D=128, window=1024, gate="elementwise", **BIG),
    # The peers' table of figures: 16k tokens, heads of 64, 128 and 256, full and causal.
    *(
        _square(f"16k d{D} {'causal' if c else 'full'}", 16384, H=H, K=H, D=D, causal=c, **BIG)
        for D, H in ((128, 16), (64, 32), (256, 8))
        for c in (False, True)
    ),
    _square("16k d128 causal, gate", 16384, H=16, K=16, D=128, gate="elementwise", **H100),
    _square("Mistral-7B 16k", 16384, H=32, K=8, D=128, window=4096, **BIG),
    _square("Mixtral-8x7B 8k", 8192, B=2, H=32, K=8, D=128, **BIG),
    _square("Qwen3-30B-A3B 8k", 8192, B=2, H=32, K=4, D=128, **BIG),
    _square("Gemma-3-27B 16k local", 16384, H=32, K=16, D=128, window=1024, **BIG),
    _square("Gemma-3-12B 16k local", 16384, H=16, K=8, D=256, window=1024, **BIG),
    _square("H100 S=16384", 16384, H=16, K=4, D=128, window=1024, sweep=("S", "W"), **H100),
    _square("packed 8k d128", 8192, B=2, H=16, K=4, D=128, segments="packed", **BIG),
    *(
        _square(f"H100 S={S}", S, H=16, K=4, D=128, window=1024, sweep=("S",), **H100)
        for S in (2048, 4096, 8192, 32768)
    ),
    *(_square(f"H100 W={W}", 16384, H=16, K=4, D=128, window=W, sweep=("W",), **H100) for W in (128, 512, 4096)),
    _square("ladder", 2048, H=8, K=2, D=64, window=256, purposes=("ladder",), machines=("cpu",), dtypes=BOTH),
    # Compiled only: the features, at the smallest size that still has every kind of tile.
    *(_square(f"aot d{D} causal", 1024, H=4, K=2, D=D, **AOT) for D in (64, 128, 256)),
    *(_square(f"aot d{D} window, gate", 1024, H=4, K=2, D=D, window=256, gate="head", **AOT) for D in (64, 128, 256)),
    # Cycles a visible pair on a TPU: profiles/aot/README.md.
    *(
        _square(f"aot tpu d{D} {S // 1024}k {f'window {W}' if W else 'causal'}", S, H=8, K=2, D=D, window=W, **BUNDLES)
        for S in (4096, 32768)
        for D in (128, 64, 256)
        for W in (None, 1024)
    ),
    # What fills Hopper's registers most.
    *(
        _square(f"aot d{D} {', '.join(having)}", 1000, H=4, K=2, D=D, **{x: FEATURES[x] for x in having}, **REGISTERS)
        for D, having in (
            (128, ("segments",)),
            (128, ("segments", "softcap")),
            (128, ("window", "softcap")),
            (256, ("softcap",)),
            (256, ("segments", "gate")),
            (256, ("segments", "window", "softcap")),
        )
    ),
    _square("aot d128 full, segments", 1000, H=4, K=2, D=128, causal=False, segments="packed", **REGISTERS),
    _square("aot odd lengths", 1000, H=4, K=2, D=128, window=300, softcap=50.0, segments="packed", **AOT),
)


def _groups(name: str, *sizes: int, N: int = 0) -> GroupedMatmul:
    kind = {"purposes": ("parity",), "machines": ("small",), "dtypes": BOTH}
    return GroupedMatmul(name=name, N=N or sum(sizes), M=24, F=40, E=len(sizes), sizes=sizes, **kind)


NASTY_GROUPS = (  # around the edges of tiles of 64, 128 and 256 rows
    _groups("all to the first", 580, 0, 0, 0),
    _groups("all to the last", 0, 0, 0, 580),
    _groups("all to nobody", 0, 0, 0, 0, N=580),
    _groups("63 64 65", 63, 64, 65, 1, N=580),
    _groups("255 256", 255, 256, 0, 69),
    _groups("257 and a hole", 257, 0, 1, 129, N=580),
    _groups("four rows", 1, 1, 1, 1, N=580),
    _groups("127 320 133", 127, 320, 133, 0),
    _groups("one group of all", 65),
    _groups("one group of some", 64, N=65),
    _groups("one row", 0, 1),
    _groups("one row of nobody", 0, 0, N=1),
)


def _gmm(name: str, N: int, M: int, F: int, E: int, *, skew: str = "uniform", **kind) -> GroupedMatmul:
    return GroupedMatmul(name=name, N=N, M=M, F=F, E=E, skew=skew, **kind)


REAL_GROUPS = (
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
    _gmm("aot odd sizes", 1000, 384, 640, 5, skew="zipf", **AOT),
)


def _experts(name: str, N: int, M: int, F: int, E: int, k: int = 2, skew: str = "uniform", **kind) -> MoE:
    return MoE(name=name, N=N, M=M, F=F, E=E, k=k, skew=skew, **kind)


TESTED = {"purposes": ("parity",), "machines": ("small",)}
EXPERTS = (
    _experts("top 1", 65, 16, 24, 4, 1, dtypes=BOTH, **TESTED),
    _experts("top 2", 300, 16, 24, 4, dtypes=BOTH, **TESTED),
    _experts("top 2, zipf", 300, 16, 24, 4, skew="zipf", dtypes=BOTH, **TESTED),
    _experts("top 2, one expert takes one slot of all", 300, 16, 24, 4, skew="one", dtypes=BOTH, **TESTED),
    _experts("all experts", 64, 8, 24, 3, 3, **TESTED),
    _experts("one expert", 257, 8, 24, 1, 1, **TESTED),
    _experts("one token", 1, 8, 16, 4, 3, **TESTED),
    # As in decoding.
    _experts("top 2, few rows of wide matrices", 4, 200, 300, 4, dtypes=BOTH, **TESTED),
    _experts("nano-moe", 2048, 128, 192, 8, skew="zipf", **CPU),
    *(_experts(f"E={E}", 2048, 256, 512, E, sweep=("E",), **CPU) for E in (4, 32)),
    _experts("one token, E=8", 1, 256, 1024, 8, **CPU),
    *(_experts(f"Mixtral-8x7B {s}", 4096, 4096, 14336, 8, skew=s, **H100) for s in ("uniform", "zipf")),
    *(_experts(f"Qwen3-30B-A3B {s}", 8192, 2048, 768, 128, 8, s, **BIG) for s in ("uniform", "zipf")),
    _experts("Qwen3-30B-A3B decode", 32, 2048, 768, 128, 8, "zipf", **BIG),
    _experts("aot top 2 of 8", 1024, 512, 1024, 8, skew="zipf", **AOT),
)


def _ages(C: int) -> tuple[int, ...]:
    """Empty, one token, one before the ring is full, full, wrapped, wrapped ten times."""
    return (0, 1, C - 1, C, C + 1, 2 * C - 1, 10 * C)


RING = {"purposes": ("parity",), "machines": ("small",), "dtypes": ALL}


def _ring(name: str, C: int = 8, **sizes) -> Decode:
    return Decode(name=name, C=C, lengths=_ages(C), **RING, **sizes)


def _step(name: str, C: int, *lengths: int, H: int, K: int, D: int = 128, **kind) -> Decode:
    return Decode(name=name, C=C, lengths=lengths, H=H, K=K, D=D, **kind)


RINGS = (
    _ring("grouped"),
    _ring("multi-head, elementwise gate", H=2, gate="elementwise"),
    _ring("multi-query, head gate, cap", H=3, K=1, gate="head", softcap=1.5),
    _ring("window", window=3, scale=0.3),
    _ring("window of one", window=1, gate="head"),
    _ring("window past C", window=100),
    _ring("one slot", 1, gate="elementwise"),
    _ring("129 slots", 129, D=16, window=70),
    # What a tensor core takes, in blocks of 64 slots and a part of one.
    _ring("72 slots, heads of 64", 72, H=4, K=1, D=64, gate="head"),
    _ring("136 slots, heads of 128", 136, H=2, D=128, window=70, gate="elementwise", softcap=2.0),
    # A large ring that is nearly empty, the same tokens in a small one, and a sweep over the position.
    *(_step(f"512 in C={C}", C, 512, H=8, K=2, D=64, **CPU) for C in (1024, 32768)),
    *(_step(f"C={C}, full", C, C, H=8, K=2, D=64, sweep=("C",), **CPU) for C in (512, 2048, 8192)),
    *(
        _step(f"C=8192, full, {dtype}", 8192, 8192, H=8, K=2, D=64, kv_dtype=dtype, **CPU)
        for dtype in ("int8", "float8_e4m3fn")
    ),
    _step("W=256 at 100000", 4096, 100_000, H=8, K=2, D=64, window=256, **CPU),
    _step("ragged batch", 2048, 0, 100, 2047, 30_000, H=8, K=2, D=64, **CPU),
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
)

ROWS: tuple[Spec, ...] = (*NASTY_ATTENTION, *REAL_ATTENTION, *NASTY_GROUPS, *REAL_GROUPS, *EXPERTS, *RINGS)


def rows(op: str, purpose: str, machine: str | None = None) -> list[Spec]:
    """The rows of an operation for a purpose, and for a machine where one is named.

    Raises:
        ValueError: no such operation, purpose or machine.
    """
    for what, value, allowed in (
        ("op", op, sorted({row.op for row in ROWS})),
        ("purpose", purpose, PURPOSES),
        ("machine", machine, (*MACHINES, None)),
    ):
        if value not in allowed:
            raise ValueError(f"{what} is {value!r}; allowed: {', '.join(map(str, allowed))}")
    chosen = [row for row in ROWS if row.op == op and purpose in row.purposes]
    return [row for row in chosen if machine is None or machine in row.machines]


def find(op: str, name: str) -> Spec:
    """The row of that name.

    Raises:
        ValueError: there is none; the message lists the names.
    """
    mine = {row.name: row for row in ROWS if row.op == op}
    if name not in mine:
        raise ValueError(f"{op} has no spec {name!r}; allowed: {', '.join(mine)}")
    return mine[name]
