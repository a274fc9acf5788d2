"""Which implementation serves a call, and why each other one cannot.

Every operation has an `Operation`: its implementations, each with its function and the reasons that can rule it out. A
caller who names an implementation gets it or an error with the reason; only "auto" chooses, in the order of
`PREFERENCE`.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import logging
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from dantinox.kernels import mosaic_tpu, nvidia, registry
from dantinox.kernels.registry import Implementation, lazy

__all__ = ["Device", "Implementation", "Operation", "current_device", "lazy", "target_device"]
log = logging.getLogger("dantinox.kernels")

IMPLEMENTATION_NAMES = ("auto", "reference", "xla", "pallas", "triton")  # of every operation; one may have more
PREFERENCE = ("pallas", "triton", "xla", "reference")
OPERATIONS = ("attention", "grouped_matmul", "moe_mlp", "decode_attention", "linear_cross_entropy")
SM90 = (9, 0)  # Hopper
MIN_TRITON_CAPABILITY = (8, 0)
MIN_BFLOAT16_CAPABILITY = (8, 0)  # Ampere, whose tensor cores multiply bfloat16


class Device(NamedTuple):
    """The device that a call is compiled for.

    Attributes:
        platform: cpu, gpu or tpu.
        kind: JAX's name of the device, such as "TPU v6 lite".
    """

    platform: str
    kind: str


# A user context is part of jit's cache key: a function traced for one device is traced again for another.
_target_device = jax.make_user_context(default_value=None)


def announced_device() -> Device | None:
    """Return the device of `target_device`, or None outside it."""
    return _target_device.value


def current_device() -> Device:
    """Return the target device, or else JAX's default one."""
    return announced_device() or Device(jax.default_backend(), jax.devices()[0].device_kind)


def on_gpu() -> bool:
    """Return whether the current device is a GPU."""
    return current_device().platform == "gpu"


def on_tpu() -> bool:
    """Return whether the current device is a TPU."""
    return current_device().platform == "tpu"


def compute_capability() -> tuple[int, int] | None:
    """Return the compute capability (major, minor) of the current device, or None if it is not an NVIDIA GPU."""
    announced = announced_device()
    if announced is None:
        return nvidia.capability_of_device(jax.devices()[0])
    return nvidia.capability_of_kind(announced.kind) if announced.platform == "gpu" else None


def has_fast_bfloat16() -> bool:
    """Return whether the matmul units of the current device take bfloat16; False for a device that is not known."""
    platform, kind = current_device()
    capability = compute_capability()
    if capability is not None:
        return capability >= MIN_BFLOAT16_CAPABILITY
    return platform == "tpu" or (platform == "gpu" and re.search(r"\bInstinct MI[1-9]\d\d", kind) is not None)


@contextlib.contextmanager
def target_device(platform: str, kind: str) -> Iterator[None]:
    """Choose implementations for a device that this machine need not have.

    Args:
        platform: cpu, gpu (or cuda) or tpu.
        kind: JAX's name of the device, such as "NVIDIA H100 80GB HBM3".
    """
    with _target_device(Device("gpu" if platform == "cuda" else platform, kind)):
        yield


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation and its implementations.

    Attributes:
        name: one of `OPERATIONS`.
        implementations: the built-in ones, in the order in which messages list them; those of other packages come
            after them.
    """

    name: str
    implementations: tuple[Implementation, ...]

    def __post_init__(self) -> None:
        """Check that no name occurs twice."""
        names = ("auto", *self.built_in_names())
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"{self.name} has two implementations of the name {name!r}; allowed: one")

    def built_in_names(self) -> tuple[str, ...]:
        """Return the names of `implementations`."""
        return tuple(i.name for i in self.implementations)

    def names(self) -> tuple[str, ...]:
        """Return the allowed values of `implementation`."""
        return ("auto", *(i.name for i in self._all()))

    def unsupported_reasons(self) -> dict[str, str | None]:
        """Return, by implementation, why the current device cannot run it, or None; imports those of other packages."""
        return {i.name: i.unsupported_device() for i in self._all()}

    def unsupported_reason(self, implementation: str) -> str | None:
        """Return why the current device cannot run one implementation, or None; imports no other one.

        Raises:
            ValueError: no implementation has this name.
        """
        return None if implementation == "auto" else self._get(implementation).unsupported_device()

    def select(self, implementation: str, *inputs: Any) -> Callable[..., Any]:
        """Return the function that serves a call.

        Args:
            implementation: "auto" or the name of an implementation.
            inputs: arguments of the implementations' checks of a call.

        Raises:
            ValueError: no implementation has this name.
            NotImplementedError: the named implementation cannot serve this call; the message says why.
        """
        if implementation == "auto":
            return self._select_automatically(*inputs)
        chosen = self._get(implementation)
        reason = chosen.unsupported_device() or chosen.unsupported_inputs(*inputs)
        if reason:
            if "implementation=" not in reason:
                reason += f"; implementation={self._first_that_runs(*inputs)!r} runs here"
            raise NotImplementedError(f"{self.name}: implementation={implementation!r} cannot run here: {reason}")
        return chosen.function

    def _first_that_runs(self, *inputs: Any) -> str:
        """Return the preferred implementation that takes a call; the reference takes them all."""
        by_name = {i.name: i for i in self.implementations}
        able = (i for i in map(by_name.__getitem__, PREFERENCE) if not i.unsupported_device())
        return next((i.name for i in able if not i.unsupported_inputs(*inputs)), "reference")

    def _all(self) -> tuple[Implementation, ...]:
        return (*self.implementations, *registry.custom_implementations(self.name, self.built_in_names()))

    def _get(self, implementation: str) -> Implementation:
        for candidate in self._all():
            if candidate.name == implementation:
                return candidate
        raise ValueError(f"implementation is {implementation!r}; allowed: {', '.join(self.names())}")

    def _select_automatically(self, *inputs: Any) -> Callable[..., Any]:
        from dantinox.kernels import tuning  # it imports this module

        by_name = {i.name: i for i in self.implementations}
        skipped: dict[str, str] = {}
        measured, platform = tuning.measured_implementation(self.name, inputs), current_device().platform
        for name in sorted(PREFERENCE, key=lambda name: name != measured):
            candidate = by_name[name]
            reason = candidate.unsupported_device() or candidate.unsupported_inputs(*inputs)
            # On a CPU, whose kernels are interpreted, the reasons against a kernel are of speed only.
            if reason is None and not (name == measured and platform == "cpu"):
                reason = candidate.not_auto(*inputs)
            if reason is None:
                label = f"{name}, the fastest when measured," if name == measured else name
                _log_choice(self.name, label, platform, tuple(skipped.items()))
                return candidate.function
            skipped[name] = reason
        raise NotImplementedError(f"{self.name}: no implementation can run here")


def on_hopper() -> bool:
    """Return whether the current device is a Hopper GPU."""
    return compute_capability() == SM90


def pallas_unsupported_device(op: str) -> str | None:
    """Return why the current device has no Pallas kernel of an operation, or None."""
    platform, kind = current_device()
    if platform == "cpu":
        return None
    if platform == "tpu":
        return mosaic_tpu.chip_unsupported(kind)
    if platform != "gpu":
        return f"{op} has no Pallas kernel for {platform} yet"
    if on_hopper():
        return None
    return f"its Pallas GPU kernel requires Hopper (compute capability 9.0) and this is {_describe(kind)}"


def triton_unsupported_device() -> str | None:
    """Return why the current device cannot run a Triton kernel, or None."""
    platform, kind = current_device()
    capability = compute_capability()
    if capability is None and platform == "gpu" and announced_device() is not None and "NVIDIA" in kind:
        return f"the compute capability of {kind!r} is not known here"
    if capability is None:
        return f"its Triton kernels are for NVIDIA GPUs and this is {kind!r}"
    if capability < MIN_TRITON_CAPABILITY:
        return f"its Triton kernels require compute capability 8.0 and this is {_describe(kind)}"
    if importlib.util.find_spec("jax_triton") is None:
        return "jax-triton is not installed: EXTRAS=triton brings it"
    return None


def _describe(kind: str) -> str:
    capability = compute_capability()
    return repr(kind) if capability is None else f"{kind!r} ({capability[0]}.{capability[1]})"


def symbolic_unsupported(*arrays: Any) -> str | None:
    """Return why a kernel whose grid follows from the sizes does not take these arrays, or None."""
    if all(isinstance(size, int) for x in arrays for size in x.shape):
        return None
    shapes = ", ".join(str(x.shape) for x in arrays)
    return f"its grid needs the sizes and the shapes are {shapes}; implementation='xla' takes symbolic sizes"


def float32_accumulation_unsupported(dtype: Any) -> str | None:
    """Return why a kernel that accumulates in float32 does not take a dtype, or None."""
    if dtype == "float64":
        return "float64 is not supported: the kernel accumulates in float32"
    return None


@functools.cache
def _log_choice(op: str, name: str, platform: str, skipped: tuple[tuple[str, str], ...]) -> None:
    reasons = "".join(f"; not {skipped_name}: {reason}" for skipped_name, reason in skipped)
    log.info("%s: auto chose %s on %s%s", op, name, platform, reasons)
