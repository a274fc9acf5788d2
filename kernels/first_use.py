"""The check that "auto" makes on a device before it first chooses a kernel there.

A kernel that compiles may still be wrong on a chip that it has never run on. So "auto" compares it with the
reference on a few small problems and takes another implementation if they disagree. A file in the cache folder
remembers that they agreed, for this kind of device, these sources and these versions.

Several processes that run one program must choose the same kernels: within `verdicts_by`, a kernel that fails its check
in one of them is taken by none.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.extend.backend
import jax.numpy as jnp
import numpy as np

from dantinox.kernels.dispatch import Device, announced_device, current_device

log = logging.getLogger("dantinox.kernels")
Array = jax.Array
TF32_TOLERANCE = 2.0**-8


class Result(NamedTuple):
    """An array that two implementations compute, and how far they may differ.

    Attributes:
        value: the array.
        tolerance: largest difference, relative to the largest absolute value of the reference.
    """

    value: Array
    tolerance: float


Probe = Callable[[str], Mapping[str, Result]]
Vote = Callable[[str, str | None], str | None]
_vote: Vote | None = None


@contextlib.contextmanager
def verdicts_by(vote: Vote | None) -> Iterator[None]:
    """Within this context, "auto" follows the verdict that the processes of a run make of their own ones.

    Args:
        vote: takes the name of a check and why it failed here, or None, and returns why it failed anywhere; every
            process calls it. None: this process traces a program that the others do not.
    """
    global _vote
    before, _vote = _vote, vote
    try:
        yield
    finally:
        _vote = before


def output_and_gradients(
    f: Callable[..., Array],
    inputs: Mapping[str, np.ndarray],
    dout: np.ndarray,
    tolerances: Mapping[str, float],
    *,
    tf32: bool = False,
) -> dict[str, Result]:
    """Return the output "o" of f and the gradients "d<name>" of its inputs, for each dtype.

    Args:
        f: takes the inputs as keyword arguments.
        inputs: the differentiable inputs by name.
        dout: cotangent of the output.
        tolerances: tolerance by dtype.
        tf32: whether to compute float32 results by the default matmul precision too, which is TF32 on a GPU.
    """

    @jax.jit
    def run(inputs: dict[str, Array], dout: Array) -> tuple[Array, dict[str, Array]]:
        o, vjp = jax.vjp(lambda inputs: f(**inputs), inputs)
        return o, *vjp(dout.astype(o.dtype))

    results: dict[str, Result] = {}
    for dtype, tolerance in tolerances.items():
        o, gradients = run(*jax.tree.map(lambda x, dtype=dtype: jnp.asarray(x, dtype), (dict(inputs), dout)))
        arrays = {"o": o} | {f"d{name}": gradients[name] for name in inputs}
        results |= {f"{name} ({dtype})": Result(x, tolerance) for name, x in arrays.items()}
    if tf32 and "float32" in tolerances:
        with jax.default_matmul_precision("default"):
            rounded = output_and_gradients(f, inputs, dout, {"float32": TF32_TOLERANCE})
        results |= {f"{name} in TF32": result for name, result in rounded.items()}
    return results


def disagreement(op: str, probe: Probe, implementation: str = "pallas", subject: str = "") -> str | None:
    """Return why "auto" must not choose an implementation of an operation here, or None.

    Args:
        op: the operation.
        probe: runs small problems with the named implementation; returns the results by name.
        implementation: the implementation that is checked.
        subject: what the probe checks of it, such as a dtype; with the arguments before, it identifies the probe.
    """
    if announced_device() is not None:  # the device is not here
        return None
    device = current_device()
    reason = _check_once(op, probe, implementation, subject, device)
    if _vote is None:
        return reason
    return _verdict(_vote, ", ".join(filter(None, (op, implementation, subject))), device, reason)


@functools.cache
def _verdict(vote: Vote, check: str, device: Device, reason: str | None) -> str | None:
    """Return the verdict of all processes, which vote once."""
    verdict = vote(check, reason)
    if verdict is not None and reason is None:
        log.warning("%s is not used: %s", check, verdict)
    return verdict


@functools.cache
def _check_once(op: str, probe: Probe, implementation: str, subject: str, device: Device) -> str | None:
    """Check, unless the same kernel agreed on such a device before; a disagreement is not remembered."""
    file = _record(op, implementation, subject, device)
    if file and file.exists():
        return None
    reason = _check(op, probe, device, implementation)
    if reason is None and file:
        with contextlib.suppress(OSError):  # it is checked again
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
    return reason


def _record(op: str, implementation: str, subject: str, device: Device) -> Path | None:
    """Return the file that exists if the check has passed: its name is a hash of all that the result depends on."""
    settings = [f"{name}={os.environ.get(name, '')}" for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
    versions = [f"{name} {_version(name)}" for name in ("jax", "jaxlib", "libtpu", "jax-triton", "triton")]
    backend = jax.extend.backend.get_backend().platform_version
    parts = (op, implementation, subject, *device, backend, _source_hash(), *versions, *settings)
    folder = _cache_folder()
    return folder and folder / "first_use" / hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _cache_folder() -> Path | None:
    """Return $DANTINOX_CACHE, or dantinox in $XDG_CACHE_HOME or ~/.cache; None where a container has no home."""
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    default = os.path.join(xdg if os.path.isabs(xdg) else "~/.cache", "dantinox")
    with contextlib.suppress(RuntimeError):
        return Path(os.environ.get("DANTINOX_CACHE") or default).expanduser()
    return None


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


@functools.cache
def _source_hash() -> str:
    found = hashlib.sha256()
    folder = Path(__file__).parent
    for path in (*sorted(folder.rglob("*.py")), *sorted(folder.glob("tuned/*.json"))):  # block sizes count, too
        found.update(path.read_bytes())
    return found.hexdigest()


@functools.cache
def _check(op: str, probe: Probe, device: Device, implementation: str = "pallas") -> str | None:
    found: list[str | None] = []

    def compare() -> None:
        try:
            with jax.default_device(jax.local_devices()[0]), jax.default_matmul_precision("highest"):
                found.append(_first_difference(probe(implementation), probe("reference")))
        except Exception as error:  # a compiler may raise anything
            found.append(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")

    # The caller may be tracing a function, under a mesh or with other settings. A new thread has none of that.
    thread = threading.Thread(target=compare, name=f"first use of {op}")
    thread.start()
    thread.join()
    if found[0] is None:
        return None
    reason = f"it failed its check on {device.kind}: {found[0]}"
    log.warning("%s: implementation=%r is not used: %s", op, implementation, reason)
    return reason


def _first_difference(results: Mapping[str, Result], references: Mapping[str, Result]) -> str | None:
    """Return a sentence about the first result that differs from its reference, or None."""
    for name, (reference, tolerance) in references.items():
        actual, expected = (np.asarray(x, np.float64) for x in (results[name].value, reference))
        error = np.max(np.abs(actual - expected)) / max(float(np.max(np.abs(expected))), 1e-30)
        if not error <= tolerance:  # NaN too
            return f"{name} differs from the reference by {error:.2g} of its largest value; allowed: {tolerance:.2g}"
    return None
