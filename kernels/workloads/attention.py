"""The workloads of attention."""

from dantinox.kernels.workloads.common import ALL, AOT, BF16, BIG, BOTH, BUNDLES, CPU, FEATURES, H100, REGISTERS, small
from dantinox.kernels.workloads.types import Attention, Workload


def _parity(name: str, T: int, S: int, **sizes) -> Workload:
    return small(Attention, "parity", name, T=T, S=S, **sizes)


def _long(name: str, T: int, S: int, **sizes) -> Workload:
    return small(Attention, "long", name, T=T, S=S, **sizes)


EDGE_CASES_ATTENTION = (
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
    _parity("separate", 33, 129, B=2, segments="separate", window=70),
    _long("unmatched", 129, 129, B=2, segments="unmatched", causal=False, dtypes=ALL),
    _parity("unmatched, small", 33, 33, B=2, segments="unmatched", causal=False, dtypes=ALL),
    _parity("unmatched, banded", 127, 300, B=2, segments="unmatched", window=20),
    _parity("banded 600", 600, 600, H=4, window=64, softcap=3.0, dtypes=BOTH),
    _long("banded 127 of 700", 127, 700, window=41),
    _parity("chunked causal", 1100, 1100, K=1, gate="head", dtypes=BOTH),
    _long("chunked full", 300, 4000, causal=False, H=1, K=1, dtypes=("float32", "float16")),
    _long("chunked window", 1100, 1100, H=1, K=1, window=1000),
    _long("chunked packed", 1030, 1030, H=1, K=1, segments="packed", softcap=2.0),
    _long("chunked 257 of 4100", 257, 4100, H=1, K=1),
    _long("chunked 4100 on 257", 4100, 257, H=1, K=1),
    _parity("sinks, window, gate", 129, 127, H=4, window=16, gate="head", sinks=True, dtypes=ALL),
    _parity("narrow values, sinks, packed", 127, 127, D=24, Dv=16, gate="elementwise", segments="packed", sinks=True),
    _long("wide values", 129, 200, H=4, D=8, Dv=24, softcap=2.0, dtypes=ALL),
    _long("banded, sinks", 600, 600, H=4, window=64, sinks=True, dtypes=BOTH),
    _long("chunked, sinks, wide values", 1100, 1100, H=1, K=1, Dv=16, sinks=True),
)


def _square(name: str, S: int, **sizes) -> Attention:
    return Attention(name=name, T=S, S=S, **sizes)


MODEL_ATTENTION = (
    # For a CPU: the presets, then the two shapes that other libraries publish.
    _square("nano", 128, B=16, H=4, K=2, D=32, window=64, gate="head", **CPU),
    _square("dante", 512, H=16, K=4, D=32, window=64, gate="elementwise", **CPU),
    _square("window 256 of 2048", 2048, H=8, K=8, D=64, window=256, **CPU),
    _square("causal 1024", 1024, H=8, K=8, D=64, **CPU),
    *(
        _square(f"S={S}", S, H=4, K=2, D=64, window=256, gate="head", sweep=("S", "W")[: 1 + (S == 2048)], **CPU)
        for S in (512, 1024, 2048)
    ),
    *(_square(f"W={W}", 2048, H=4, K=2, D=64, window=W, gate="head", sweep=("W",), **CPU) for W in (64, 512)),
    # The most important first: time may run out on a rented machine.
    _square("h100 preset", 4096, B=8, H=12, K=4, D=128, window=1024, gate="head", **H100),
    _square("16k d128 window 1024, gate", 16384, H=16, K=4, D=128, window=1024, gate="elementwise", **BIG),
    # The sizes of flash-attention's table: 16k tokens, heads of 64, 128 and 256, full and causal.
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
    _square("tutorial", 2048, H=8, K=2, D=64, window=256, suites=("tutorial",), devices=("cpu",), dtypes=BOTH),
    # Only compiled: every feature, at the smallest size that has every kind of tile.
    *(_square(f"aot d{D} causal", 1024, H=4, K=2, D=D, **AOT) for D in (64, 128, 256)),
    *(_square(f"aot d{D} window, gate", 1024, H=4, K=2, D=D, window=256, gate="head", **AOT) for D in (64, 128, 256)),
    # For bundles per visible pair on a TPU, in profiles/aot/README.md.
    *(
        _square(f"aot tpu d{D} {S // 1024}k {f'window {W}' if W else 'causal'}", S, H=8, K=2, D=D, window=W, **BUNDLES)
        for S in (4096, 32768)
        for D in (128, 64, 256)
        for W in (None, 1024)
    ),
    # The combinations of features that use most of Hopper's registers.
    *(
        _square(f"aot d{D} {', '.join(on)}", 1000, H=4, K=2, D=D, **{name: FEATURES[name] for name in on}, **REGISTERS)
        for D, on in (
            (128, ("segments",)),
            (128, ("segments", "softcap")),
            (128, ("window", "softcap")),
            (256, ("softcap",)),
            (256, ("segments", "gate")),
            (256, ("segments", "window", "softcap")),
        )
    ),
    _square("aot d128 full, segments", 1000, H=4, K=2, D=128, causal=False, segments="packed", **REGISTERS),
    _square("aot d128 window, sinks", 1024, H=4, K=2, D=128, window=256, sinks=True, **(AOT | {"dtypes": BF16})),
    _square("aot odd lengths", 1000, H=4, K=2, D=128, window=300, softcap=50.0, segments="packed", **AOT),
)
