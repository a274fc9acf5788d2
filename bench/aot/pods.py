"""Compile whole training steps for pods: do they fit, what do they exchange, and how long does compiling take?

    python -m bench.aot.pods [CASE...] [--check]

Each case is compiled twice in processes of their own: whole, and with the layers of one period of its window pattern.
Writes profiles/pods.json; with --check compares with it instead and exits with 1 if a case got worse.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.aot import hardware
from bench.aot.gpu import compiler as gpu_compiler
from bench.aot.tpu import compiler as tpu_compiler

PROFILE = Path("profiles/pods.json")
TOLERANCE = 1.05  # of bytes, against the committed ones
MISTRAL_7B = {
    "vocab_size": 32768,
    "dim": 4096,
    "n_layers": 32,
    "n_heads": 32,
    "n_kv_heads": 8,
    "head_dim": 128,
    "mlp_ratio": 3.5,
    "window": 4096,
    "tie_embeddings": False,
}
QWEN3_30B_A3B = {
    "vocab_size": 151936,
    "dim": 2048,
    "n_layers": 48,
    "n_heads": 32,
    "n_kv_heads": 4,
    "head_dim": 128,
    "qk_norm": True,
    "n_experts": 128,
    "experts_per_token": 8,
    "mlp_ratio": 0.375,
    "tie_embeddings": False,
}
LARGE = {"dtype": "bfloat16", "remat": "block", "max_context": 131072, "seq_len": 4096}


@dataclass(frozen=True)
class Pod:
    """A training step on many chips.

    Attributes:
        target: name of the chip.
        topology: chips of a slice, as libtpu or XLA name it.
        mesh: the mesh, as for training.
        settings: of the run; `preset` names a preset.
        slices: slices of that topology.
    """

    target: str
    topology: str
    mesh: str
    settings: dict[str, Any]
    slices: int = 1


H100_PRESET = {"preset": "h100", "vocab_size": 32768, "grad_accum": 1}
CASES = {
    "h100 on v5e:16x16": Pod("v5e", "16x16", "data=16,fsdp=16", H100_PRESET | {"batch_size": 256}),
    "h100 on v6e:16x16": Pod("v6e", "16x16", "data=16,fsdp=16", H100_PRESET | {"batch_size": 256}),
    "h100 on 2 slices of v5e:16x16": Pod(
        "v5e", "16x16", "slices=2,data=16,fsdp=16", H100_PRESET | {"batch_size": 512}, 2
    ),
    "h100 on 2 x 8 H100": Pod(
        "h100", "1x2x8", "slices=2,fsdp=8", H100_PRESET | {"batch_size": 64, "grad_accum": 4, "attn": "triton"}
    ),
    "mistral-7b on v5e:16x16": Pod("v5e", "16x16", "data=4,fsdp=16,tensor=4", MISTRAL_7B | LARGE | {"batch_size": 64}),
    "mistral-7b, 131072 tokens on v6e:4x4": Pod(
        "v6e", "4x4", "context=16", MISTRAL_7B | LARGE | {"batch_size": 1, "seq_len": 131072}
    ),
    "qwen3-30b-a3b on v6e:16x16": Pod("v6e", "16x16", "fsdp=16,expert=16", QWEN3_30B_A3B | LARGE | {"batch_size": 256}),
}


def compile_pod(pod: Pod, one_period: bool) -> dict[str, Any]:
    """Compile the step of a pod in this process; return its figures per device.

    Args:
        pod: the case.
        one_period: with the layers of one period only.
    """
    target = hardware.get(pod.target)
    folder = tempfile.TemporaryDirectory()
    if isinstance(target, hardware.Tpu):
        os.environ |= tpu_compiler.environment(target, None)
        count = math.prod(int(size) for size in pod.topology.split("x"))
        kind = {"v5e": "v5litepod"}.get(pod.target, pod.target)
        os.environ["TPU_ACCELERATOR_TYPE"] = f"{kind}-{count}"
    else:
        Path(folder.name, "triton").mkdir()
        os.environ |= gpu_compiler.environment(Path(folder.name))
        for name in ("MOSAIC_GPU_DUMP_PTX", "MOSAIC_GPU_DUMP_RESOURCES", "XLA_FLAGS"):
            os.environ.pop(name)
    import jax

    from bench.mesh.collectives import collectives, totals
    from bench.mesh.steps import lower_train_step
    from dantinox.config import Config
    from dantinox.kernels.dispatch import target_device

    devices = _devices(pod, target)
    settings = dict(pod.settings)
    preset = settings.pop("preset", None)
    with target_device(target.platform, target.kind), jax.default_device(devices[0]):
        config = Config() if preset is None else Config.from_preset(preset)
        config = config.replace(**settings, mesh=pod.mesh)
        if one_period:
            config = config.replace(n_layers=config.model.period)
        start = time.process_time()
        lowered = lower_train_step(config, devices)
        traced = time.process_time()
        compiled = lowered.compile()
        seconds = {"trace_cpu_s": traced - start, "compile_cpu_s": time.process_time() - traced}
    memory, found = compiled.memory_analysis(), collectives(compiled.as_text())
    folder.cleanup()
    return {
        "devices": len(devices),
        "layers": config.model.n_layers,
        "temporary_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "device_bytes": target.memory_bytes,
        "exchanged": {kind: {"count": count, "bytes": size} for kind, (count, size) in sorted(totals(found).items())},
        "largest_bytes": {kind: max(x.largest for x in found if x.kind == kind) for kind in sorted(totals(found))},
        **{name: round(value, 1) for name, value in seconds.items()},
    }


def _devices(pod: Pod, target: hardware.Target) -> list[Any]:
    """Return the devices of all slices, which need not exist."""
    from jax.experimental import topologies

    if isinstance(target, hardware.Tpu):
        options = {"num_slices": pod.slices} if pod.slices > 1 else {}
        name = f"{pod.target}:{pod.topology}"
        return topologies.get_topology_desc(name, "tpu", chips_per_host_bounds=(2, 2, 1), **options).devices
    assert isinstance(target, hardware.Gpu)
    config = gpu_compiler.target_config(target)
    return topologies.get_topology_desc(platform="cuda", topology=pod.topology, target_config=config).devices


def run_case(name: str, one_period: bool) -> dict[str, Any]:
    """Compile a case in a process of its own, as libtpu compiles for one kind of machine per process."""
    words = [sys.executable, "-m", "bench.aot.pods", "--worker", name, *(["--one-period"] if one_period else [])]
    done = subprocess.run(words, capture_output=True, encoding="utf-8", errors="replace", check=False)
    if done.returncode:
        raise RuntimeError(f"{name}: {' '.join(done.stderr.strip().splitlines()[-1:])[:500]}")
    return json.loads(done.stdout.splitlines()[-1])


def row_text(name: str, row: dict[str, Any]) -> str:
    """Return a case as lines of text."""
    needed, limit = row["temporary_bytes"] + row["argument_bytes"], row["device_bytes"]
    exchanged = "; ".join(f"{kind} {x['count']}, {x['bytes'] / 2**20:.0f} MiB" for kind, x in row["exchanged"].items())
    period = row["one_period"]
    return (
        f"{name}: {row['devices']} devices, {row['layers']} layers: {row['temporary_bytes'] / 2**20:.0f} MiB of "
        f"temporaries and {row['argument_bytes'] / 2**20:.0f} of arguments, {needed / limit:.0%} of a device\n"
        f"  exchanged per step and device: {exchanged}\n"
        f"  compiling: {row['compile_cpu_s']:.0f} CPU seconds; with the {period['layers']} layers of one period "
        f"{period['compile_cpu_s']:.0f}"
    )


def worse(name: str, row: dict[str, Any], committed: dict[str, Any] | None) -> list[str]:
    """Return what is wrong with a case, or worse than in the committed profile, one line each."""
    lines = []
    if row["temporary_bytes"] + row["argument_bytes"] > row["device_bytes"]:
        lines.append(f"{name}: does not fit the device")
    if committed is None:
        return lines
    pairs = [("temporary bytes", row["temporary_bytes"], committed["temporary_bytes"])]
    kinds = row["exchanged"].keys() | committed["exchanged"].keys()
    sizes = lambda from_, kind: from_["exchanged"].get(kind, {"bytes": 0})["bytes"]
    pairs += [(f"bytes of {kind}", sizes(row, kind), sizes(committed, kind)) for kind in sorted(kinds)]
    for what, now, before in pairs:
        if now > TOLERANCE * before + 2**20:
            lines.append(f"{name}: {what} {now} instead of {before}")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Compile the cases and write or check the profile; returns 1 if a case fails or is worse."""
    parser = argparse.ArgumentParser(prog="bench.aot.pods", description=__doc__.split("\n")[0])
    parser.add_argument("case", nargs="*", help=f"default: all of {'; '.join(CASES)}")
    parser.add_argument("--check", action="store_true", help="compare with the profile and write nothing")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--one-period", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.worker:
        print(json.dumps(compile_pod(CASES[arguments.worker], arguments.one_period)))
        return 0
    if unknown := [name for name in arguments.case if name not in CASES]:
        parser.error(f"case is {unknown[0]!r}; allowed: {', '.join(map(repr, CASES))}")
    profile = json.loads(PROFILE.read_text("utf-8")) if PROFILE.is_file() else {}
    problems = []
    for name in arguments.case or CASES:
        try:
            row = run_case(name, False) | {"one_period": run_case(name, True)}
        except RuntimeError as error:
            problems.append(str(error))
            print(error, flush=True)
            continue
        print(row_text(name, row), flush=True)
        problems += worse(name, row, profile.get(name) if arguments.check else None)
        if not arguments.check:
            profile = {
                case: row if case == name else profile[case] for case in CASES if case == name or case in profile
            }
            PROFILE.write_text(json.dumps(profile, indent=1) + "\n", "utf-8")
    for line in problems:
        print(f"worse: {line}", file=sys.stderr)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
