"""What does this machine offer, and does the installation work? `python -m dantinox.doctor`."""

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

# A plugin for a device that is not here complains at length when JAX starts; what matters of it is said below.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
logging.getLogger("jax").setLevel(logging.CRITICAL)

import jax  # noqa: E402

from dantinox import cli, kernels  # noqa: E402
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
    """There are no flags."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report; 0 whatever it says, for it is a report and not a test."""
    cli.parse(Arguments, argv, default=Arguments(), prog="dantinox-doctor", description=__doc__)
    for title, rows in (
        ("machine", machine()),
        ("devices", devices()),
        ("implementations", implementations()),
        ("packages", [(name, version(name) or "missing") for name in PACKAGES]),
        ("extras", extras()),
        ("runs", runs(Path("runs"))),
    ):
        print(title)
        for name, text in rows:
            print(f"  {name:28} {text}")
    return 0


def machine() -> Iterator[Row]:
    """Python, the system and its memory."""
    yield "Python", f"{platform.python_version()} ({sys.executable})"
    yield "system", f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores"
    try:
        yield "memory", gigabytes(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        yield "memory", "this system does not tell"


def devices() -> Iterator[Row]:
    """JAX's backend and its devices, or why there are none."""
    asked = os.environ.get("JAX_PLATFORMS")
    try:
        found = jax.devices()
    except RuntimeError as error:
        yield "backend", f"none{f' (JAX_PLATFORMS={asked})' if asked else ''}: {str(error).partition('\n')[0]}"
        return
    yield "backend", jax.default_backend() + (f" (JAX_PLATFORMS={asked})" if asked else "")
    for device in found:
        try:
            memory = (device.memory_stats() or {}).get("bytes_limit")
        except Exception:  # not every backend knows
            memory = None
        yield str(device), device.device_kind + (f", {gigabytes(memory)} for JAX" if memory else "")


def implementations() -> Iterator[Row]:
    """For each operation what can run here, and the reason for what cannot; auto takes the first that can."""
    for op in OPERATIONS:
        try:
            table = kernels.implementations(op)
        except RuntimeError as error:  # no backend
            yield op, str(error).partition("\n")[0]
            continue
        for name in [*PREFERENCE, *(name for name in table if name not in PREFERENCE)]:
            yield f"{op} {name}", "can run" if table[name] is None else f"no: {table[name]}"


def extras() -> Iterator[Row]:
    """The optional installs: `pip install -e '.[NAME]'`, or EXTRAS=NAME for make."""
    for name, packages in EXTRAS.items():
        here = [f"{package} {version(package)}" for package in packages if version(package)]
        yield name, ", ".join(here) or "not installed"


def runs(folder: Path) -> Iterator[Row]:
    """Can a run be written here?"""
    parent = folder if folder.exists() else folder.absolute().parent
    try:
        with tempfile.TemporaryFile(dir=parent):
            yield str(folder.absolute()), "writable"
    except OSError as error:
        yield str(folder.absolute()), f"not writable: {error.strerror}"


def version(package: str) -> str | None:
    """Installed version of a distribution; None where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def gigabytes(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def program() -> NoReturn:
    """`main` as a console script."""
    cli.run_main(main)


if __name__ == "__main__":
    program()
