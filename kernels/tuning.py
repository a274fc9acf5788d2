"""Block sizes and implementations that `make tune` measured, by device: kernels/tuned/<device>.json.

A function that chooses block sizes is `tunable`: for arguments that were measured on a device of this kind it returns
the measured choice, for all others its own. "auto" takes the implementation that was fastest in a call of the same
shapes. Without a file, the heuristics decide everything.
"""

import functools
import inspect
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import numpy as np

from dantinox.kernels.dispatch import Device, current_device

log = logging.getLogger("dantinox.kernels")
FOLDER = Path(__file__).parent / "tuned"
Size = int | None | list[int] | dict[str, int | None]  # as JSON
Choices = Mapping[str, Size]  # by function and arguments


class Table(NamedTuple):
    """What was measured on a kind of device.

    Attributes:
        block_sizes: choices by function and arguments, as `choice_name` makes them.
        implementations: names by operation and inputs, as `call_name` makes them.
    """

    block_sizes: Choices
    implementations: Mapping[str, str]


class Record(NamedTuple):
    """What `recording` has seen: the choices that were made, by name, and the calls for which "auto" chose."""

    choices: dict[str, Size]
    calls: list[str]


# A user context is part of jit's cache key. () switches the tables off; pairs of a name and JSON replace them.
_forced = jax.make_user_context(default_value=None)
_records: list[Record] = []


def table_path(device: Device) -> Path:
    """Return the file of a kind of device."""
    return FOLDER / f"{re.sub('[^a-z0-9]+', '-', device.kind.lower()).strip('-')}.json"


@functools.cache
def table(device: Device) -> Table:
    """Return what was measured on a kind of device; empty without a file, or with a damaged one."""
    path = table_path(device)
    try:
        content = json.loads(path.read_text("utf-8"))
        rows = {name: row["choice"] for name, row in content["block_sizes"].items()}
        return Table(rows, {name: row["fastest"] for name, row in content["implementations"].items()})
    except FileNotFoundError:
        return Table({}, {})
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        log.warning("%s is damaged (%s: %s); heuristics choose the block sizes", path, type(error).__name__, error)
        return Table({}, {})


@contextmanager
def forcing(choices: Choices) -> Iterator[None]:
    """Within this context, functions return these choices and else their own, whatever was measured."""
    with _forced(tuple((name, json.dumps(size)) for name, size in choices.items())):
        yield


@contextmanager
def recording() -> Iterator[Record]:
    """Within this context, record what is chosen; a call whose trace is cached chooses nothing."""
    _records.append(Record({}, []))
    try:
        yield _records[-1]
    finally:
        _records.pop()


def tunable[**P, R](choose: Callable[P, R]) -> Callable[P, R]:
    """Let a measurement replace what a function chooses: an integer, a tuple of them, or a NamedTuple of them."""
    module = choose.__module__.removeprefix("dantinox.kernels.ops.").removesuffix(".block_sizes")
    name, signature = f"{module}.{choose.__name__}", inspect.signature(choose)

    @functools.wraps(choose)
    def choose_measured(*args: P.args, **options: P.kwargs) -> R:
        own = choose(*args, **options)
        key = choice_name(name, signature.bind(*args, **options).arguments)
        forced = _forced.value
        measured = table(current_device()).block_sizes if forced is None else {n: json.loads(s) for n, s in forced}
        result = _restore(measured[key], own) if key in measured else own
        for record in _records:
            record.choices[key] = _store(result)
        if result != own:
            _log_choice(key, str(result), str(own))
        return result

    return choose_measured


def choice_name(function: str, arguments: Mapping[str, Any]) -> str:
    """Return the name of a choice: a function with its arguments, but the device."""
    given = [f"{name}={_describe(x)}" for name, x in arguments.items() if not isinstance(x, Device)]
    return f"{function}({', '.join(given)})"


def call_name(op: str, inputs: Sequence[Any]) -> str:
    """Return the name of a call of an operation: its shapes, dtypes and options."""
    return f"{op}({', '.join(map(_describe, inputs))})"


def measured_implementation(op: str, inputs: Sequence[Any]) -> str | None:
    """Return the implementation that was fastest in a call of the same shapes on this kind of device, or None."""
    fastest = table(current_device()).implementations if _forced.value is None else {}
    if not fastest and not _records:
        return None
    name = call_name(op, inputs)
    for record in _records:
        record.calls.append(name)
    return fastest.get(name)


@functools.cache
def _log_choice(key: str, result: str, own: str) -> None:
    log.info("%s: measured %s, not %s", key, result, own)


def _describe(x: Any) -> str:
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return f"{np.dtype(x.dtype).name}[{','.join(map(str, x.shape))}]"
    if isinstance(x, tuple):
        return f"({', '.join(map(_describe, x))})"
    return np.dtype(x).name if isinstance(x, np.dtype | type) else str(x)


def _store(size: Any) -> Size:
    """Return a choice as JSON."""
    if hasattr(size, "_asdict"):
        return size._asdict()
    return list(size) if isinstance(size, tuple) else size


def _restore[R](size: Size, own: R) -> R:
    """Return a choice of the type of a function's own one."""
    if isinstance(size, dict):
        return cast(Any, own)._replace(**size)
    return cast(R, tuple(size) if isinstance(size, list) else size)
