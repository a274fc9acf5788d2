"""What the processes of a run compare before they train: code, settings and the folder of the run."""

import contextlib
import hashlib
import importlib.metadata
import time
from pathlib import Path

import jax

import dantinox
from dantinox.config import Config
from dantinox.distributed import processes
from dantinox.distributed.agreement import ask_first, check_same, together
from dantinox.system.run_lock import NAME
from dantinox.version import __version__

PACKAGES = ("jaxlib", "jax-triton", "triton", "libtpu")  # "auto" chooses by what is installed
VISIBLE_S = 60.0  # in which a new file is to be seen by all; file servers cache that there is none


def check_code_and_settings(config: Config) -> None:
    """Check that all processes have the same code, JAX, kind of device and settings.

    Raises:
        ValueError: the message names the first difference and its process.
    """
    if processes.count() > 1:
        facts = {"code": f"{__version__} {_hash_of_sources()}", "jax": jax.__version__}
        facts |= {"device": jax.local_devices()[0].device_kind}
        facts |= {package: _version(package) for package in PACKAGES}
        check_same(facts | config.flat())


def check_folder(folder: Path) -> None:
    """Check that all processes see the folder of the run, which process 0 has locked.

    Raises:
        FileNotFoundError: one does not.
    """
    if processes.count() == 1:
        return
    lock = ask_first("the lock", lambda: (folder / NAME).read_text("utf-8"))
    together("the run's folder in all processes", lambda: _wait_for(folder, lock))


def _wait_for(folder: Path, lock: str) -> None:
    deadline = time.monotonic() + VISIBLE_S
    while not ((folder / NAME).is_file() and (folder / NAME).read_text("utf-8") == lock):
        if time.monotonic() > deadline:
            raise FileNotFoundError(
                f"{folder.absolute()} is not the folder that process 0 writes; all processes of a run need one that "
                "they share, such as --runs-dir on a file server"
            )
        time.sleep(0.2)


def _version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def _hash_of_sources() -> str:
    root, digest = Path(dantinox.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]
