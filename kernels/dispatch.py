"""Which implementation serves, and why each other one cannot.

An operation hands `choose` the table of what it has for this call: a function, or the reason why there is none. A name
that the caller gave is obeyed or refused; only "auto" chooses, in the order of `PREFERENCE`.
"""

import contextlib
import contextvars
import functools
import importlib.util
import logging
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax

log = logging.getLogger("kernels")

IMPLEMENTATION_NAMES = (
    "auto",
    "reference",
    "xla",
    "pallas",
    "triton",
)  # what every operation has; its own table may hold more
PREFERENCE = ("pallas", "triton", "xla", "reference")
OPERATIONS = ("attention", "grouped_matmul", "moe_mlp", "decode_attention")
SM90_DEVICE_KINDS = (
    "H100",
    "H200",
    "GH200",
    "H800",
    "H20",
)  # what kinds of device with compute capability 9.0 are called

NO_REASONS: Mapping[str, str] = MappingProxyType({})
Choice = Callable[..., Any] | str  # an implementation, or the reason it is unavailable


class Device(NamedTuple):
    """What a call is compiled for: `platform` cpu, gpu or tpu, and what JAX calls the device."""

    platform: str
    kind: str


_target_device: contextvars.ContextVar[Device | None] = contextvars.ContextVar("device", default=None)


def current_device() -> Device:
    """The announced device, or else JAX's default one."""
    return _target_device.get() or Device(jax.default_backend(), jax.devices()[0].device_kind)


def on_gpu() -> bool:
    """Whether that device is a GPU."""
    return current_device().platform == "gpu"


@contextlib.contextmanager
def target_device(platform: str, kind: str) -> Iterator[None]:
    """Inside, implementations are chosen for a device that need not be here; "cuda" is another name for "gpu"."""
    token = _target_device.set(Device("gpu" if platform == "cuda" else platform, kind))
    try:
        yield
    finally:
        _target_device.reset(token)


def select_implementation(
    op: str, implementation: str, table: Mapping[str, Choice], not_auto: Mapping[str, str] = NO_REASONS
) -> Callable[..., Any]:
    """The function that serves this call.

    Args:
        not_auto: names that "auto" takes only where nothing else runs, each with the reason.

    Raises:
        ValueError: `implementation` is no implementation's name.
        NotImplementedError: the named implementation cannot serve this call; the message says why.
    """
    if implementation not in ("auto", *table):
        raise ValueError(f"implementation is {implementation!r}; allowed: {', '.join(('auto', *table))}")
    if implementation != "auto":
        choice = table[implementation]
        if isinstance(choice, str):
            raise NotImplementedError(f"{op}: implementation={implementation!r} cannot run here: {choice}")
        return choice
    for name in sorted(PREFERENCE, key=lambda name: name in not_auto):
        choice = table[name]
        if not isinstance(choice, str):
            better = PREFERENCE[: PREFERENCE.index(name)]
            why = {each: not_auto[each] if callable(table[each]) else table[each] for each in better}
            _log_choice(
                op, name, current_device().platform, "".join(f"; not {each}: {said}" for each, said in why.items())
            )
            return choice
    raise NotImplementedError(f"{op}: no implementation can run here")


def unsupported_reason(op: str, name: str) -> str | None:
    """Why this device cannot run the named implementation, whatever the shapes; None where it can."""
    if name in ("reference", "xla"):
        return None
    if name == "pallas" and current_device().platform in ("cpu", "tpu"):
        return None
    if name == "pallas" and on_gpu():
        if any(chip in current_device().kind for chip in SM90_DEVICE_KINDS):
            return None
        kind = current_device().kind
        return (
            f"its Pallas GPU kernel requires Hopper (sm_90) and this device is {kind!r}; implementation='xla' runs here"
        )
    if name == "pallas":
        return f"{op} has no Pallas kernel for {current_device().platform} yet"
    if name == "triton" and op == "moe_mlp":
        if not on_gpu() or any(name in current_device().kind for name in ("AMD", "Instinct")):
            return f"its Triton kernels are for NVIDIA GPUs and this is {current_device().kind!r}"
        if importlib.util.find_spec("jax_triton") is None:
            return "jax-triton is not installed: EXTRAS=triton brings it"
        return None
    if name == "triton":
        return f"{op} has no Triton kernel yet"
    raise ValueError(f"implementation is {name!r}; allowed: {', '.join(IMPLEMENTATION_NAMES[1:])}")


@functools.cache
def _log_choice(op: str, name: str, platform: str, instead: str) -> None:
    log.info("%s: auto chose %s on %s%s", op, name, platform, instead)
