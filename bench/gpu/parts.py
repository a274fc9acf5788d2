"""The parts of the GPU suite, most important first."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.gpu.process import TEST_SECONDS
from bench.gpu.runner import Part, installed

ATTENTION = {  # part -> workload of attention
    "time-attention-d128-causal": "16k d128 causal",
    "time-attention-window": "H100 S=16384",
    "time-attention-window-gate": "16k d128 window 1024, gate",
    "time-attention-d64-causal": "16k d64 causal",
    "time-attention-d256-causal": "16k d256 causal",
    "time-attention-d128-causal-gate": "16k d128 causal, gate",
}
GROUPED = {  # part -> (operation, workload) of grouped matmul and experts
    "time-grouped-mixtral": ("grouped_matmul", "Mixtral-8x7B uniform"),
    "time-moe-mixtral": ("moe_mlp", "Mixtral-8x7B uniform"),
    "time-grouped-256-experts": ("grouped_matmul", "256 experts, narrow"),
    "time-grouped-128-groups": ("grouped_matmul", "128 groups"),
}
DECODE = {"time-decode": ("decode_attention", "Mixtral-8x7B 8k, B=32")}
LOSS = {"time-linear-cross-entropy": ("linear_cross_entropy", "8k tokens, V=32768")}
ATTENTION_CANDIDATES = ("pallas", "triton", "jax.nn cudnn", "tokamax", "xla")
# With hundreds of groups, plain XLA would take all the time or all the memory, so it runs in the last parts only.
GROUPED_CANDIDATES = ("pallas", "one dense matmul", "tokamax")
FEW_GROUPS_CANDIDATES = ("lax.ragged_dot", "triton", "xla")
PARITY = {  # part -> (test file, flags of pytest, share of the time)
    "parity-attention": ("attention/test_tensor_core_shapes.py", (), 0.18),
    "parity-grouped": ("grouped_matmul/test_tensor_core_shapes.py", ("-k", "not experts"), 0.1),
    "parity-decode": ("decode_attention/test_tensor_core_shapes.py", (), 0.1),
    "parity-experts": ("grouped_matmul/test_tensor_core_shapes.py", ("-k", "experts"), 0.12),
}
OTHER_PARITY = ("-k", "matches_reference", *(f"--ignore=tests/kernels/{file}" for file, _, _ in PARITY.values()))
TINY_WORKLOADS = {
    "attention": "nano",
    "grouped_matmul": "E=8",
    "moe_mlp": "nano-moe",
    "decode_attention": "C=512, full",
    "linear_cross_entropy": "nano",
}


# A rehearsal compiles more than it computes. The GPU interpreter waits for barriers in threads of XLA's pool, which has
# one thread per core.
TINY_ENV = {"XLA_FLAGS": "--xla_backend_optimization_level=0", "NPROC": str(max(8, os.cpu_count() or 1))}


def child_command(module: str, **arguments: Any) -> list[str]:
    """Return the command that runs a program of `bench` with the given arguments, without its command line."""
    return [sys.executable, "-m", "bench.gpu.child", module, json.dumps(arguments)]


def suite(out: Path, tiny: bool, seconds: float, smoke_cases: Sequence[str]) -> list[Part]:
    """List all parts in order.

    Args:
        out: folder of the results.
        tiny: the smallest version of each part, for a rehearsal on a CPU.
        seconds: the time limit of all parts together.
        smoke_cases: names of `bench.gpu.smoke.CASES`, in order.
    """
    repeats = 3 if tiny else 50
    smoke = [
        Part(f"smoke-{name}", child_command("bench.gpu.smoke", case=name, tiny=tiny, repeats=repeats), 0.14, "smoke")
        for name in smoke_cases
    ]
    attention = [
        _timing(out, name, "attention", workload, ATTENTION_CANDIDATES, 0.1, seconds, tiny)
        for name, workload in ATTENTION.items()
    ]
    grouped = [
        # The gradients of a mixture compile seven kernels, those of a grouped matmul three.
        _timing(out, name, op, workload, _candidates(op, name), 0.13 if op == "moe_mlp" else 0.08, seconds, tiny)
        for name, (op, workload) in (GROUPED | DECODE | LOSS).items()
    ]
    if tiny:  # one of each suffices for a rehearsal
        attention, grouped = attention[:1], grouped[:1]
    first, rest = attention[:1] + grouped[:2], attention[1:3] + grouped[2:]
    environment = Part("environment", child_command("bench.gpu.environment", out=str(out / "environment.json")), 0.1)
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
        *_final_parts(out, tiny, seconds),
    ]
    return [part._replace(env=TINY_ENV) for part in parts] if tiny else parts


def _candidates(op: str, name: str) -> tuple[str, ...]:
    if op == "decode_attention":
        return ("pallas", "triton", "xla", "jax.nn xla")
    if op == "linear_cross_entropy":
        return ("pallas", "triton", "xla", "all logits")
    return (*GROUPED_CANDIDATES, *(FEW_GROUPS_CANDIDATES if name.endswith("mixtral") else ()))


def _timing(
    out: Path, name: str, op: str, workload: str, candidates: tuple[str, ...], share: float, seconds: float, tiny: bool
) -> Part:
    arguments: dict[str, Any] = {"op": op, "spec": [workload], "implementation": candidates, "budget": 0.6}
    if tiny:
        arguments |= {"spec": [TINY_WORKLOADS[op]], "implementation": ["xla", "lax.ragged_dot"], "budget": 0.05}
    # It stops by itself after three quarters of its time, so that it can write its results.
    limits = {"seconds": round(0.75 * share * seconds), "out": str(out), "lines": str(out / f"{name}.jsonl")}
    return Part(name, child_command("bench.gpu.timing", **arguments, **limits), share)


def _pytest(*tests: str, tiny: bool) -> list[str]:
    command = [sys.executable, "-m", "pytest", "-v", "-x" if tiny else "--maxfail=40", "-p", "no:cacheprovider"]
    command += ["-p", "bench.gpu.pytest_plugin", "--tb=short"]
    if not tiny and installed("xdist"):
        # Compiling takes most of a test's time. A kernel that never ends loses one test, not the part.
        command += ["-n", "4"]
    if installed("pytest_timeout"):
        # The plugin attaches a debugger before the timeout. Only the thread method ends a test that waits for a GPU.
        command += [f"--timeout={TEST_SECONDS:.0f}", "--timeout-method=thread"]
    elif not tiny:
        command += ["-o", f"faulthandler_timeout={TEST_SECONDS:.0f}", "-o", "faulthandler_exit_on_timeout=true"]
    return [*command, *tests]


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
    return Part("block-sizes", child_command("bench.tune_block_sizes", **limits, **files), 0.15)


def _kernel_times(out: Path, name: str, op: str, workload: str, tiny: bool) -> Part:
    workload = TINY_WORKLOADS[op] if tiny else workload
    arguments = {"op": op, "spec": workload, "implementation": "pallas", "backward": True}
    files = {"out": str(out / name), "json": str(out / f"{name}.json")}
    return Part(name, child_command("bench.profile", settings={"steps": 1 if tiny else 3}, **arguments, **files), 0.1)


def _trace(out: Path, tiny: bool) -> Part:
    settings = {"steps": 2} | ({"n_layers": 1, "seq_len": 32} if tiny else {"attn": "pallas"})
    files = {"out": str(out / "trace"), "json": str(out / "trace.json")}
    preset = "nano" if tiny else "h100"
    return Part("trace", child_command("bench.profile", preset=preset, settings=settings, **files), 0.15)


def _final_parts(out: Path, tiny: bool, seconds: float) -> list[Part]:
    """List the last parts: the model, all parity tests, all benchmark cases, the ablations."""
    model = child_command("bench.end_to_end", rounds=1 if tiny else 5, tiny=tiny, out=str(out / "model.json"))
    only = ["no gate"] if tiny else []
    ablations = child_command(
        "bench.ablations", preset="nano" if tiny else "dante", rounds=1 if tiny else 10, out=str(out), only=only
    )
    all_cases = [
        # A file that needs a missing package is a collection error, and the others still run.
        Part("parity-all", _pytest("--continue-on-collection-errors", *OTHER_PARITY, "tests/kernels", tiny=False), 0.2),
        *(
            Part(
                f"bench-{op}",
                child_command(
                    "bench.gpu.timing",
                    op=op,
                    seconds=round(0.75 * share * seconds),
                    out=str(out),
                    lines=str(out / f"bench-{op}.jsonl"),
                ),
                share,
            )
            for op, share in zip(TINY_WORKLOADS, (0.3, 0.2, 0.15, 0.1, 0.1), strict=True)
        ),
    ]
    return [Part("model", model, 0.15), *([] if tiny else all_cases), Part("ablations", ablations, 0.15)]
