"""Write device, driver and versions before anything is measured."""

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGES = (
    "jax jaxlib jax-cuda13-plugin jax-cuda13-pjrt jax-cuda12-plugin flax optax orbax-checkpoint numpy tokenizers torch "
    "triton jax-triton tokamax nvidia-cudnn-cu13 nvidia-cudnn-cu12 nvidia-cuda-nvcc pytest pytest-timeout pytest-xdist "
    "pytest-benchmark hypothesis tyro"
).split()
GPU_FIELDS = (
    "name,compute_cap,driver_version,memory.total,clocks.max.sm,clocks.max.memory,clocks.sm,power.limit,"
    "temperature.gpu,ecc.mode.current,mig.mode.current"
)


@dataclass(frozen=True)
class Arguments:
    """Where to write."""

    out: str


def run(arguments: Arguments) -> int:
    """Write the file twice: without JAX, then with JAX's devices, because JAX may hang if the driver does."""
    path = Path(arguments.out)
    facts = system()
    path.write_text(json.dumps(facts, indent=1) + "\n", "utf-8")
    facts |= jax_devices()
    path.write_text(json.dumps(facts, indent=1) + "\n", "utf-8")
    print(f"{facts['device']}, driver {facts['nvidia-smi'].get('driver_version', 'none')}, jax {facts['jax']}")
    return 0


def system() -> dict[str, Any]:
    """Describe the system without JAX: GPU, driver, assembler, debugger, packages, processor."""
    return {
        "nvidia-smi": _nvidia_smi(),
        "ptxas": _version(_ptxas(), r"V(\d+[\d.]*)"),
        "cuda-gdb": _version(shutil.which("cuda-gdb"), r"(\d+\.\d+[\d.]*)"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "processors": os.cpu_count(),
        "versions": {name: version for name in PACKAGES if (version := _installed(name))},
        "flags": {name: value for name, value in os.environ.items() if name.startswith(("XLA_", "JAX_", "CUDA_"))},
    }


def jax_devices() -> dict[str, Any]:
    """Describe JAX's devices."""
    import jax

    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "devices": len(jax.devices()),
        "compute_capability": getattr(device, "compute_capability", None),
        "cores": getattr(device, "core_count", None),
        "jax": jax.__version__,
    }


def _nvidia_smi() -> dict[str, str]:
    output = _output(["nvidia-smi", f"--query-gpu={GPU_FIELDS}", "--format=csv,noheader"])
    values = [value.strip() for value in output.splitlines()[0].split(",")] if output else []
    names = GPU_FIELDS.split(",")
    if len(values) == len(names):
        return dict(zip(names, values, strict=True))
    return {"output": output} if output else {}


def _ptxas() -> str | None:
    """Find the assembler that XLA uses: that of its own package, else the one on PATH."""
    try:
        from nvidia import cu13

        for folder in cu13.__path__:
            if (path := Path(folder) / "bin/ptxas").exists():
                return str(path)
    except ImportError:
        pass
    return shutil.which("ptxas")


def _version(program: str | None, pattern: str) -> str | None:
    if program is None:
        return None
    match = re.search(pattern, _output([program, "--version"]))
    return f"{match[1] if match else '?'} ({program})"


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, encoding="utf-8").stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
