"""Settings that every test needs before JAX starts, and readable ids for parameters."""

import gc
import os
import shutil
import signal
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import own_warnings

try:
    from hypothesis import settings
except ModuleNotFoundError:  # a machine with a GPU may have pytest alone, enough for the tests of its kernels
    settings = None

# Where a CUDA or TPU plugin is installed but no device is there, JAX would complain and try it first.
ACCELERATORS = ("/dev/nvidiactl", "/dev/accel0", "/dev/vfio/0")
if not any(Path(device).exists() for device in ACCELERATORS):
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile more than they compute, and a file that does little else takes half the time without LLVM's
# optimizations. What users run is compiled in full by `make test-long`, and by every command of the README but `test`.
QUICK = "--xla_backend_optimization_level=0"
if not os.environ.get("FULL_XLA"):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}".strip()
# The tests run on all cores already: where each product in NumPy has threads of its own, they wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# A compiled program kept from another version of the code must never be what is tested.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
# A simulated GPU waits for its barriers in threads of XLA's pool, which has one a core: on two cores none may be left
# to run the warpgroup that is waited for.
os.environ.setdefault("NPROC", str(max(8, os.cpu_count() or 1)))
import jax  # noqa: E402, F401 - it reads the lines above; those below are for the programs that tests start

# Those repeat each other's work (the same small model, trained, resumed, stopped): what one of them compiles serves
# the others, for as long as this run lasts.
STARTED_PROGRAMS = {"JAX_ENABLE_COMPILATION_CACHE": "true", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3"}
os.environ.update(STARTED_PROGRAMS)

# Traces are many small objects: collecting them less often saves a few per cent.
gc.set_threshold(20_000, 20, 50)

if settings is not None:
    # The same examples every time, so that a red run can be repeated; `--hypothesis-profile=explore` looks for new
    # ones.
    settings.register_profile("repeat", derandomize=True, deadline=None, max_examples=40, database=None)
    settings.register_profile("explore", deadline=None, max_examples=1000)
    # Of the random shapes of the four operations, 120 with "repeat", this makes 4000.
    settings.register_profile("long", settings.get_profile("repeat"), max_examples=1334)
    # With -k "random_shapes_match_python_loops and pallas", 10^4 shapes of one implementation of attention.
    settings.register_profile("thorough", settings.get_profile("repeat"), max_examples=33334)
    settings.load_profile("repeat")


@pytest.fixture(autouse=True)
def fresh_traces() -> Iterator[None]:
    """Trace implementations again in every test, since a test may patch block sizes that a trace depends on."""
    clear_traces()
    yield
    clear_traces()


def clear_traces() -> None:
    if call := sys.modules.get("dantinox.kernels.call"):
        call._jitted.cache_clear()


def pytest_make_parametrize_id(config: pytest.Config, val: Any, argname: str) -> str | None:
    """Make a readable id for a value that pytest itself would call `gate0`, `True` or `2`."""
    if isinstance(val, signal.Signals):
        return val.name
    if val is None or isinstance(val, bool | int | float):
        return f"{argname}={val}"
    if isinstance(val, dict) and val:
        text = ", ".join(f"{name}={value}" for name, value in val.items())
    elif isinstance(val, list | tuple) and val and all(isinstance(item, str) for item in val):
        text = " ".join(val)
    elif isinstance(val, dict | list | tuple | range):
        text = str(val)
    else:
        return None
    return text.encode("unicode_escape").decode("ascii") if len(text) <= 80 else None


@pytest.hookimpl(tryfirst=True)  # before pytest deselects the slow tests
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the cases that a `sampled` test leaves to the long run as slow.

    The hash of its id decides about a case, so that a choice depends neither on the order of the cases nor on which of
    them are selected.
    """
    for item in items:
        sampled = item.get_closest_marker("sampled")
        if sampled and zlib.crc32(item.name.encode()) % sampled.args[0]:
            item.add_marker(pytest.mark.slow)


def pytest_configure(config: pytest.Config) -> None:
    own_warnings.attribute_to_caller()
    # What runs in the background ignores Ctrl-C and hands that on; tests send it, and expect it to be heard.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # under nohup
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if not hasattr(config, "workerinput"):  # processes of pytest-xdist inherit the folder
        os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="dantinox-tests-")


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
