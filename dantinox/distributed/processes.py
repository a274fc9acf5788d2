"""The processes of one run: how they join, how many they are, and which one speaks.

A run of one process never joins: `count` is 1 and nothing below costs anything.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from dantinox.config import ConfigError
from dantinox.system import streams
from dantinox.system.progress import Progress

JOIN_S = 300  # seconds in which all processes have to start
SHUTDOWN_S = 60  # that they wait for each other at the end
FLAGS = "--coordinator HOST:PORT, --processes N and --process I"


class _Joined(NamedTuple):
    client: Any  # of the coordination service: a store of keys, which process 0 serves
    count: int
    index: int


_joined: _Joined | None = None


def count() -> int:
    """Return the number of processes of the run."""
    return 1 if _joined is None else _joined.count


def index() -> int:
    """Return the number of this process, from 0."""
    return 0 if _joined is None else _joined.index


def is_first() -> bool:
    """Return whether this is process 0, which speaks and writes what is written once."""
    return index() == 0


def client() -> Any:
    """Return the client of the coordination service.

    Raises:
        RuntimeError: the run has one process.
    """
    if _joined is None:
        raise RuntimeError("the run has one process")
    return _joined.client


def join(coordinator: str | None, processes: str | None, process: str | None) -> bool:
    """Join the other processes of the run; return whether there are any.

    JAX itself finds those of SLURM, Open MPI, Kubernetes and Cloud TPU. Output of all but process 0 is discarded.

    Args:
        coordinator: HOST:PORT at which process 0 listens; None, as for the other two: what the cluster says.
        processes: their number.
        process: the number of this one.

    Raises:
        ConfigError: the three values do not fit each other.
        ConnectionError: the others were not reached in time.
    """
    global _joined
    named = _named_place(coordinator, processes, process)
    if named is None and not _in_cluster():
        return False
    if named is not None and named[1] == 1:
        return False
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # It would listen to SIGTERM instead of Python.
    jax.config.update("jax_enable_preemption_service", False)
    where = f" at {named[0]}" if named is not None else ""
    if named is not None and named[2] == 0:
        _check_port(named[0])
    try:
        with Progress(f"waiting for the other processes of the run{where}"), _deadline(where):
            jax.distributed.initialize(
                *(named or ()),
                cluster_detection_method=None if named is None else "deactivate",
                initialization_timeout=JOIN_S + SHUTDOWN_S,
                shutdown_timeout_seconds=SHUTDOWN_S,
            )
            jax.devices()  # exchanges the devices of all processes, so all must ask at the same time
    except (RuntimeError, ValueError, OSError) as error:
        raise ConnectionError(f"the processes of the run did not join{where}: {_first_sentence(error)}") from None
    # JAX has no public name for them.
    from jax._src import distributed

    _joined = _Joined(distributed.global_state.client, jax.process_count(), jax.process_index())
    if not is_first():
        _silence()
    return True


def check_mesh(mesh: jax.sharding.Mesh | None) -> None:
    """Check that the mesh of several processes is over all of their devices.

    Raises:
        ConfigError: it is not.
    """
    size, available = 1 if mesh is None else mesh.size, jax.device_count() if count() > 1 else 1
    if count() > 1 and size != available:
        raise ConfigError(
            f"mesh is over {size} of the {available} devices of {count()} processes; allowed: all of them, "
            f"such as data={available}"
        )


def _check_port(coordinator: str) -> None:
    """Check that the port of process 0 is free: JAX would end with a segmentation fault.

    Raises:
        ConnectionError: it is not.
    """
    port = int(coordinator.rpartition(":")[2])
    dual = socket.has_dualstack_ipv6()
    try:
        family = socket.AF_INET6 if dual else socket.AF_INET
        socket.create_server(("", port), family=family, dualstack_ipv6=dual).close()
    except OSError as error:
        raise ConnectionError(
            f"coordinator is {coordinator!r}, and port {port} cannot be used: {error.strerror}"
        ) from None


@contextlib.contextmanager
def _deadline(where: str) -> Iterator[None]:
    """End this process with one line after `JOIN_S` seconds, before JAX aborts it with many, and at once by Ctrl-C."""

    def end() -> None:
        streams.report(f"error: not all processes of the run joined{where} in {JOIN_S} s")
        os._exit(1)

    timer = threading.Timer(JOIN_S, end)
    timer.daemon = True
    timer.start()
    # Python would hear it only once all have joined.
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        timer.cancel()


def _named_place(coordinator: str | None, processes: str | None, process: str | None) -> tuple[str, int, int] | None:
    """Return (coordinator, processes, process) of the flags; None if none is given."""
    if coordinator is None and processes is None and process is None:
        return None
    if coordinator is None or processes is None or process is None:
        given = [("--coordinator", coordinator), ("--processes", processes), ("--process", process)]
        missing = " and ".join(flag for flag, value in given if value is None)
        raise ConfigError(f"{missing} missing; several processes need {FLAGS}")
    host, _, port = coordinator.rpartition(":")
    if not (host and port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16):
        raise ConfigError(f"coordinator is {coordinator!r}; allowed: HOST:PORT of process 0, such as 10.0.0.1:7654")
    for name, text, least in (("processes", processes, 1), ("process", process, 0)):
        if not (text.isascii() and text.isdigit() and int(text) >= least):
            raise ConfigError(f"{name} is {text!r}; allowed: an integer, {least} or more")
    if int(process) >= int(processes):
        raise ConfigError(f"process is {process}; allowed: 0 to {int(processes) - 1}, for --processes {processes}")
    return coordinator, int(processes), int(process)


def _in_cluster() -> bool:
    """Return whether a cluster that JAX knows has started several processes.

    Raises:
        ConnectionError: the cluster does not say how many.
    """
    from jax._src.clusters import ClusterEnv

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a cluster whose package is not installed
        try:
            known = [kind for kind in ClusterEnv._cluster_types if not kind.opt_in_only_method]
            if "JOB_COMPLETION_INDEX" not in os.environ:  # maybe a pod, but not one of an indexed Job
                known = [kind for kind in known if kind.__name__ != "K8sCluster"]
            cluster = next((kind for kind in known if kind.is_env_present()), None)
            return cluster is not None and cluster.get_process_count() > 1
        except Exception as error:  # of a request to the cluster
            raise ConnectionError(
                f"the cluster does not say which processes there are ({_first_sentence(error)}); give {FLAGS}"
            ) from None


def _first_sentence(error: Exception) -> str:
    return " ".join(str(error).split("\n")[0].split())[:300]


def _silence() -> None:
    """Discard the output of this process and its display of progress; errors remain."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        with open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), 1)  # that of libraries, too
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - as long as the program
    Progress.terminal_seconds = Progress.quiet_seconds = threading.TIMEOUT_MAX
