"""The parts of the GPU suite, most important first."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.gpu.process import TEST_SECONDS
from bench.gpu.runner import Part, installed

ATTENTION = {  # attention is judged by these rows: part -> row
    "time-attention-d128-causal": "16k d128 causal",
    "time-attention-window": "H100 S=16384",
    "time-attention-window-gate": "16k d128 window 1024, gate",
    "time-attention-d64-causal": "16k d64 causal",
    "time-attention-d256-causal": "16k d256 causal",
    "time-attention-d128-causal-gate": "16k d128 causal, gate",
}
GROUPED = {  # grouped matmul and experts: part -> operation, row
    "time-grouped-mixtral": ("grouped_matmul", "Mixtral-8x7B uniform"),
    "time-moe-mixtral": ("moe_mlp", "Mixtral-8x7B uniform"),
    "time-grouped-256-experts": ("grouped_matmul", "256 experts, narrow"),
    "time-grouped-128-groups": ("grouped_matmul", "128 groups"),
}
DECODE = {"time-decode": ("decode_attention", "Mixtral-8x7B 8k, B=32")}
BESIDE_ATTENTION = ("pallas", "jax.nn cudnn", "tokamax", "xla")
# With hundreds of groups plain XLA would take all the time or all the memory: its turn comes in the last parts.
BESIDE_GROUPED = ("pallas", "one dense matmul", "tokamax")
BESIDE_FEW_GROUPS = ("lax.ragged_dot", "triton", "xla")
PARITY = {  # part -> test file, share of the time
    "parity-attention": ("attention/test_tensor_core_shapes.py", (), 0.18),
    "parity-grouped": ("grouped_matmul/test_tensor_core_shapes.py", ("-k", "not experts"), 0.1),
    "parity-decode": ("decode_attention/test_tensor_core_shapes.py", (), 0.1),
    "parity-experts": ("grouped_matmul/test_tensor_core_shapes.py", ("-k", "experts"), 0.12),
}
OTHER_PARITY = ("-k", "matches_reference", *(f"--ignore=tests/kernels/{file}" for file, _, _ in PARITY.values()))
TINY_ROWS = {
    "attention": "nano",
    "grouped_matmul": "E=8",
    "moe_mlp": "nano-moe",
    "decode_attention": "C=512, full",
}


# A rehearsal compiles more than it computes; and the GPU interpreter waits for barriers in threads of XLA's pool, which
# has one per core.
TINY_ENV = {"XLA_FLAGS": "--xla_backend_optimization_level=0", "NPROC": str(max(8, os.cpu_count() or 1))}


def call(module: str, **arguments: Any) -> list[str]:
    """The command of a program of `bench` that is started without a command line."""
    return [sys.executable, "-m", "bench.gpu.child", module, json.dumps(arguments)]


def suite(out: Path, tiny: bool, seconds: float, smoke_cases: Sequence[str]) -> list[Part]:
    """All parts in order.

    Args:
        out: folder of the results.
        tiny: the smallest version of each part, for a rehearsal on a CPU.
        seconds: the whole time.
        smoke_cases: names of `bench.gpu.smoke.CASES`, in order.
    """
    smoke = [
        Part(f"smoke-{name}", call("bench.gpu.smoke", case=name, tiny=tiny, repeats=3 if tiny else 50), 0.14, "smoke")
        for name in smoke_cases
    ]
    attention = [
        _timing(out, name, "attention", row, BESIDE_ATTENTION, 0.1, seconds, tiny) for name, row in ATTENTION.items()
    ]
    grouped = [
        # Seven kernels are compiled for the gradients of a mixture, three for those of a grouped matmul.
        _timing(out, name, op, row, _beside(op, name), 0.13 if op == "moe_mlp" else 0.08, seconds, tiny)
        for name, (op, row) in (GROUPED | DECODE).items()
    ]
    if tiny:  # one is as good as six
        attention, grouped = attention[:1], grouped[:1]
    first, rest = attention[:1] + grouped[:2], attention[1:3] + grouped[2:]
    environment = Part("environment", call("bench.gpu.environment", out=str(out / "environment.json")), 0.1)
    parts = [
        environment,
        *smoke,
        *_parity(tiny),
        *first,
        *rest,
        *attention[3:],
        _block_sizes(out, tiny, seconds),
        _kernel_times(out, "moe-kernel-times", *GROUPED["time-moe-mixtral"], tiny),
        _kernel_times(out, "attention-kernel-times", "attention", ATTENTION["time-attention-window-gate"], tiny),
        _trace(out, tiny),
        *_last(out, tiny, seconds),
    ]
    return [part._replace(env=TINY_ENV) for part in parts] if tiny else parts


def _beside(op: str, name: str) -> tuple[str, ...]:
    if op == "decode_attention":
        return ("pallas", "xla", "jax.nn xla")
    return (*BESIDE_GROUPED, *(BESIDE_FEW_GROUPS if name.endswith("mixtral") else ()))


def _timing(
    out: Path, name: str, op: str, row: str, beside: tuple[str, ...], share: float, seconds: float, tiny: bool
) -> Part:
    arguments: dict[str, Any] = {"op": op, "spec": [row], "implementation": beside, "budget": 0.6}
    if tiny:
        arguments |= {"spec": [TINY_ROWS[op]], "implementation": ["xla", "lax.ragged_dot"], "budget": 0.05}
    # It stops by itself at three quarters of its time, and so writes what it has.
    limits = {"seconds": round(0.75 * share * seconds), "out": str(out), "lines": str(out / f"{name}.jsonl")}
    return Part(name, call("bench.gpu.timing", **arguments, **limits), share)


def _pytest(*chosen: str, tiny: bool) -> list[str]:
    command = [sys.executable, "-m", "pytest", "-v", "-x" if tiny else "--maxfail=40", "-p", "no:cacheprovider"]
    command += ["-p", "bench.gpu.pytest_plugin", "--tb=short"]
    if not tiny and installed("xdist"):
        # Compiling is most of a test. A kernel that never ends takes one test with it, not the part.
        command += ["-n", "4"]
    if installed("pytest_timeout"):
        # The plugin attaches a debugger before; the thread method ends what waits for a GPU.
        command += [f"--timeout={TEST_SECONDS:.0f}", "--timeout-method=thread"]
    elif not tiny:
        command += ["-o", f"faulthandler_timeout={TEST_SECONDS:.0f}", "-o", "faulthandler_exit_on_timeout=true"]
    return [*command, *chosen]


def _parity(tiny: bool) -> list[Part]:
    if tiny:
        files = (
            "tests/kernels/attention/test_tensor_core_shapes.py",
            "tests/kernels/decode_attention/test_tensor_core_shapes.py",
        )
        return [Part("parity-attention", _pytest(*files, tiny=True), 0.4)]
    return [
        Part(name, _pytest(*flags, f"tests/kernels/{file}", tiny=False), share)
        for name, (file, flags, share) in PARITY.items()
    ]


def _block_sizes(out: Path, tiny: bool, seconds: float) -> Part:
    files = {"json": str(out / "block-sizes.json"), "lines": str(out / "block-sizes.jsonl")}
    limits = {"tiny": True, "rounds": 1, "seconds": 20} if tiny else {"seconds": round(0.09 * seconds)}
    return Part("block-sizes", call("bench.tune_block_sizes", **limits, **files), 0.15)


def _kernel_times(out: Path, name: str, op: str, row: str, tiny: bool) -> Part:
    arguments = {"op": op, "spec": TINY_ROWS[op] if tiny else row, "implementation": "pallas", "backward": True}
    files = {"out": str(out / name), "json": str(out / f"{name}.json")}
    return Part(name, call("bench.profile", settings={"steps": 1 if tiny else 3}, **arguments, **files), 0.1)


def _trace(out: Path, tiny: bool) -> Part:
    settings = {"steps": 2} | ({"n_layers": 1, "seq_len": 32} if tiny else {"attn": "pallas"})
    files = {"out": str(out / "trace"), "json": str(out / "trace.json")}
    return Part("trace", call("bench.profile", preset="nano" if tiny else "h100", settings=settings, **files), 0.15)


def _last(out: Path, tiny: bool, seconds: float) -> list[Part]:
    """The model, then whatever time is left: every row of parity and bench, and the ablations."""
    model = call("bench.end_to_end", rounds=1 if tiny else 5, tiny=tiny, out=str(out / "model.json"))
    only = ["no gate"] if tiny else []
    ablations = call(
        "bench.ablations", preset="nano" if tiny else "dante", rounds=1 if tiny else 10, out=str(out), only=only
    )
    everything = [
        # Files that need a package which is not here are errors of their own.
        Part("parity-all", _pytest("--continue-on-collection-errors", *OTHER_PARITY, "tests/kernels", tiny=False), 0.2),
        *(
            Part(
                f"bench-{op}",
                call(
                    "bench.gpu.timing",
                    op=op,
                    seconds=round(0.75 * share * seconds),
                    out=str(out),
                    lines=str(out / f"bench-{op}.jsonl"),
                ),
                share,
            )
            for op, share in zip(TINY_ROWS, (0.3, 0.2, 0.15, 0.1), strict=True)
        ),
    ]
    return [Part("model", model, 0.15), *([] if tiny else everything), Part("ablations", ablations, 0.15)]
