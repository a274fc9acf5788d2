"""Report devices, implementations and packages of this machine: `python -m dantinox.doctor`."""

import importlib.metadata
import logging
import os
import platform
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

# A plugin without its device logs long errors when JAX starts; `devices` reports what matters.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
logging.getLogger("jax").setLevel(logging.CRITICAL)

import jax  # noqa: E402

from dantinox import cli, kernels  # noqa: E402
from dantinox.config import ModelConfig  # noqa: E402
from dantinox.kernels.dispatch import OPERATIONS, PREFERENCE  # noqa: E402

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tokenizers", "safetensors", "numpy")
EXTRAS = {
    "cuda": ("jax-cuda13-plugin", "jax-cuda12-plugin"),
    "tpu": ("libtpu",),
    "triton": ("jax-triton",),
    "peers": ("tokamax",),
    "aot": ("nvidia-cuda-nvcc",),
    "trace viewer": ("tensorboard-plugin-profile", "xprof"),
}
Row = tuple[str, str]


@dataclass(frozen=True)
class Arguments:
    """No flags."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report and return 0."""
    cli.parse(Arguments, argv, default=Arguments(), prog="dantinox-doctor", description=__doc__)
    with cli.one_line_errors("dantinox-doctor"):
        for title, rows in (
            ("machine", machine()),
            ("devices", devices()),
            ("implementations", implementations()),
            ("packages", [(name, version(name) or "missing") for name in PACKAGES]),
            ("extras", extras()),
            ("runs", runs_folder(Path("runs"))),
        ):
            print(title)
            for name, text in rows:
                print(f"  {name:28} {text}")
    return 0


def machine() -> Iterator[Row]:
    """Yield Python, the system and its memory."""
    yield "Python", f"{platform.python_version()} ({sys.executable})"
    yield "system", f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores"
    try:
        yield "memory", gigabytes(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        yield "memory", "not reported by this system"


def devices() -> Iterator[Row]:
    """Yield JAX's backend, the dtype that models have here by default, and the devices, or the error."""
    platforms = os.environ.get("JAX_PLATFORMS")
    try:
        available = jax.devices()
    except RuntimeError as error:
        yield "backend", f"none{f' (JAX_PLATFORMS={platforms})' if platforms else ''}: {str(error).partition('\n')[0]}"
        return
    yield "backend", jax.default_backend() + (f" (JAX_PLATFORMS={platforms})" if platforms else "")
    yield "--dtype auto", ModelConfig().resolved_dtype
    for device in available:
        try:
            memory = (device.memory_stats() or {}).get("bytes_limit")
        except Exception:  # not supported by every backend
            memory = None
        yield str(device), device.device_kind + (f", {gigabytes(memory)} for JAX" if memory else "")


def implementations() -> Iterator[Row]:
    """Yield each implementation of each operation, and why it cannot run; auto takes the first that can."""
    for op in OPERATIONS:
        try:
            table = kernels.implementations(op)
        except RuntimeError as error:  # no backend
            yield op, str(error).partition("\n")[0]
            continue
        for name in [*PREFERENCE, *(name for name in table if name not in PREFERENCE)]:
            yield f"{op} {name}", "can run" if table[name] is None else f"no: {table[name]}"


def extras() -> Iterator[Row]:
    """Yield the optional dependencies: `pip install -e '.[NAME]'`, or EXTRAS=NAME for make."""
    for name, packages in EXTRAS.items():
        installed = [f"{package} {version(package)}" for package in packages if version(package)]
        yield name, ", ".join(installed) or "not installed"


def runs_folder(folder: Path) -> Iterator[Row]:
    """Yield whether the folder of runs is writable."""
    parent = folder if folder.exists() else folder.absolute().parent
    try:
        with tempfile.TemporaryFile(dir=parent):
            yield str(folder.absolute()), "writable"
    except OSError as error:
        yield str(folder.absolute()), f"not writable: {error.strerror}"


def version(package: str) -> str | None:
    """Return the installed version of a distribution; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def gigabytes(size: int) -> str:
    """Format a number of bytes."""
    return f"{size / 2**30:.1f} GiB"


def program() -> NoReturn:
    """Run `main` as a console script."""
    cli.run_main(main)


if __name__ == "__main__":
    program()
