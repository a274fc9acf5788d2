"""Compile for a TPU on a machine without one, and read the schedule that libtpu made."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.aot.hardware import Tpu
from bench.aot.tpu import vliw_schedule

MODULES = ("libtpu",)
_ACCELERATOR = {"v5e": "v5litepod-1", "v6e": "v6e-1", "tpu7x": "tpu7x-2"}


def environment(target: Tpu, dumps: Path | None) -> dict[str, str]:
    """The environment variables that the worker's process needs before it imports jax.

    libtpu dumps only the tables of the final schedule into `dumps`: all of its passes take 280 MB for one attention
    program. None: it dumps nothing.
    """
    flags = (
        f"--xla_jf_dump_to={dumps}",
        "--xla_jf_dump_llo_text=true",
        "--xla_jf_emit_annotations=true",
        "--xla_jf_dump_llo_pass_label_regex=final_hlo|final_bundles",
    )
    return {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # libtpu would lock a TPU that does not exist
        "TPU_ACCELERATOR_TYPE": _ACCELERATOR[target.name],
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "LIBTPU_INIT_ARGS": " ".join(flags) if dumps else "",
    }


def make_compiler(target: Tpu) -> Callable[[Any, tuple, tuple[int, ...]], Any]:
    """Return compile(function, shapes, donate) for the target."""
    import jax
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(target.topology, "tpu", chips_per_host_bounds=(1, 1, 1))
    device = topology.devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)

    def compile_(function: Any, shapes: tuple, donate: tuple[int, ...]) -> Any:
        arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype in shapes]
        with jax.default_device(device):
            return jax.jit(function, donate_argnums=donate).lower(*arguments).compile()

    return compile_


def version() -> str:
    """The compiler's version."""
    from importlib import metadata

    return f"libtpu {metadata.version('libtpu')}"


def read(dumps: Path) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Read the hand-written kernels, and totals over all kernels, of the program that was compiled into `dumps`."""
    by_hand: set[str] = set()
    for path in dumps.glob("*-TLP-hlo.txt"):
        by_hand |= vliw_schedule.custom_calls(path.read_text("utf-8"))
    memory: dict[str, int] = {}
    for path in sorted(dumps.glob("*vmem_report.html")):
        memory |= vliw_schedule.vmem_bytes(path.read_text("utf-8"))

    schedules: dict[str, vliw_schedule.Schedule] = {}
    empty: dict[str, int | None] = {}
    for path in sorted(dumps.iterdir()):
        match vliw_schedule.kernel_of(path.name):
            case ("utilisation", name):
                schedules[name] = vliw_schedule.utilisation(path.read_text("utf-8"))
            case ("schedule", name):
                with path.open(encoding="utf-8") as file:
                    empty[name] = vliw_schedule.empty_bundles(file.read(2000))

    kernels = [
        {
            "name": name,
            "bundles": schedule.bundles,
            "empty": empty.get(name),
            "mxu": schedule.mxu,
            "mxu_slots": schedule.mxu_slots,
            "mxu_share": round(schedule.mxu_share, 4),
            "spills": schedule.spills,
            "fills": schedule.fills,
            "vmem_bytes": memory.get(name),
        }
        for name, schedule in sorted(schedules.items())
    ]
    totals = {"kernels": len(kernels)}
    for name in ("bundles", "empty", "mxu", "mxu_slots", "spills", "fills"):
        totals[name] = sum(kernel[name] or 0 for kernel in kernels)
    return [kernel for kernel in kernels if kernel["name"] in by_hand], totals
