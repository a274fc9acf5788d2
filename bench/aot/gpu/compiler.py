"""Compile for an NVIDIA GPU on a machine without one, and read registers, spills, shared memory and SASS."""

import os
import re
import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.aot.gpu import ptx, ptx_rules, sass
from bench.aot.gpu.ptx_rules import launch, program
from bench.aot.hardware import Gpu

SITE = Path(sysconfig.get_paths()["platlib"])
PTXAS = SITE / "nvidia/cu13/bin/ptxas"  # Triton's own is too old for Mosaic's PTX
CUOBJDUMP = SITE / "triton/backends/nvidia/bin/cuobjdump"
NVDISASM = CUOBJDUMP.with_name("nvdisasm")
MODULES = ("jax_cuda13_plugin",)


def environment(dumps: Path) -> dict[str, str]:
    """The environment variables that the worker's process needs before it imports jax; `dumps` must exist.

    Mosaic GPU prints its PTX instead of writing files: with MOSAIC_GPU_DUMP_TO it would also write 80 MB of compiler
    passes per kernel and take twice as long. XLA dumps only the PTX of its own kernels for the same reason.
    """
    return {
        "JAX_PLATFORMS": "cpu",  # the plugin only compiles; JAX asking it for a device would print a traceback
        "CUDA_VISIBLE_DEVICES": "",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "XLA_FLAGS": f"--xla_dump_to={dumps} --xla_dump_hlo_as_text --xla_dump_emitter_re=ptx",
        "MOSAIC_GPU_DUMP_PTX": "1",
        "MOSAIC_GPU_DUMP_RESOURCES": "1",
        "JAX_TRITON_DUMP_DIR": str(dumps / "triton"),
        "PATH": os.pathsep.join([str(PTXAS.parent), os.environ.get("PATH", "")]),
    }


def target_config(target: Gpu) -> str:
    """Describe the target to XLA: a GpuTargetConfigProto in text form."""
    major, minor = target.capability
    extension = "feature_extension: ACCELERATED_FEATURES" if target.arch.endswith("a") else ""
    return f"""
gpu_device_info {{
  name: "{target.kind}"
  device_vendor: "NVIDIA Corporation"
  platform_version: "Compute Capability {major}.{minor}"
  cuda_compute_capability {{ major: {major} minor: {minor} {extension} }}
  core_count: {target.num_sms} fpus_per_core: 128 clock_rate_ghz: {target.clock_ghz}
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: {target.threads_per_sm}
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: {target.registers_per_sm} registers_per_block_limit: 65536
  shared_memory_per_core: {target.smem_per_sm} shared_memory_per_block: 49152
  shared_memory_per_block_optin: {target.smem_per_block}
  l2_cache_size: {target.l2_bytes} device_memory_size: {target.memory_bytes} device_address_bits: 64
  memory_bandwidth: {int(target.bytes_per_second)}
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{target.kind}"
"""


def make_compiler(target: Gpu) -> Callable[[Any, tuple, tuple[int, ...]], Any]:
    """Return compile(function, shapes, donate) for the target."""
    import jax
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=target_config(target))
    mesh = topologies.make_mesh(topology, (1,), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    # Pallas reads the GPU that a kernel is for from the abstract mesh, tokamax from the default device.
    device = jax.sharding.AbstractDevice(target.kind, target.num_sms, "cuda")
    abstract = mesh.abstract_mesh.update(abstract_device=device)

    def compile_function(function: Any, shapes: tuple, donate: tuple[int, ...]) -> Any:
        arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype in shapes]
        with jax.sharding.use_abstract_mesh(abstract), jax.default_device(topology.devices[0]):
            return jax.jit(function, donate_argnums=donate).lower(*arguments).compile()

    return compile_function


def version() -> str:
    """The assembler's version."""
    output = subprocess.run(
        [str(PTXAS), "--version"], capture_output=True, text=True, check=False, encoding="utf-8"
    ).stdout
    number = re.search(r"V(\d+\.\d+\.\d+)", output)
    return f"ptxas {number[1]}" if number else "ptxas ?"


def read(
    target: Gpu, dumps: Path, printed: str, *, apply_rules: bool = False
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Read the hand-written kernels, and totals over all kernels, of the program that was compiled into `dumps`.

    Args:
        target: the GPU.
        dumps: folder of the dumps.
        printed: what the compiler printed.
        apply_rules: whether the kernels of Mosaic GPU have to satisfy `ptx_rules`.

    Raises:
        ValueError: ptxas refuses a kernel, or a rule finds something.
    """
    mosaic = ptx.split_modules(printed)
    smem = ptx.match_smem(mosaic, ptx.mosaic_smem(printed))
    launches: dict[str, tuple[int | None, int]] = {}
    for path in sorted(dumps.glob("*.thunk_sequence.txt")):
        launches |= ptx.thunks(path.read_text("utf-8"))
    for path in sorted(dumps.rglob("*.compile_info")):
        launches |= ptx.triton_smem(path.read_text("utf-8"))
    triton_kernels = _pallas_triton_kernels(dumps)

    kernels = []
    mosaic_launches = launch.read_all(dumps) if mosaic and apply_rules else []
    for module, size in zip(mosaic, smem):
        of_module = _read_kernels(target, module, dumps, {}, size, True)
        kernels += [{**kernel, "hand": True} for kernel in of_module]
        if apply_rules:
            check_rules(module, mosaic_launches, {kernel["name"]: kernel["registers"] for kernel in of_module})
    for path in sorted(dumps.rglob("*.ptx")):
        module = path.read_text("utf-8")
        hand = path.is_relative_to(dumps / "triton") or not triton_kernels.isdisjoint(ptx.entry_threads(module))
        kernels += [{**k, "hand": hand} for k in _read_kernels(target, module, dumps, launches, None, hand)]

    totals = {"kernels": len(kernels)}
    for name in ("spill_bytes", "wgmma", "tcgen05", "mma"):
        totals[name] = sum(kernel[name] for kernel in kernels)
    chosen = [{k: v for k, v in kernel.items() if k != "hand"} for kernel in kernels if kernel["hand"]]
    return sorted(chosen, key=lambda kernel: (kernel["name"], str(kernel))), totals


def check_rules(module: str, launches: list[launch.Launch], registers: dict[str, int]) -> None:
    """Check the kernels of a module of Mosaic GPU.

    Raises:
        ValueError: a rule finds something.
    """
    for kernel in program.parse(module):
        report = ptx_rules.check_launched(kernel, launches, registers[kernel.name])
        if report.findings:
            raise ValueError(report.first_finding())


def _pallas_triton_kernels(dumps: Path) -> set[str]:
    """Find the names that XLA gives to the kernels of Pallas's Triton lowering."""
    names = set()
    for path in dumps.glob("*after_optimizations.txt"):
        calls = re.findall(r'%?([\w.-]+) = .*custom_call_target="__gpu\$xla\.gpu\.triton"(.*)', path.read_text("utf-8"))
        for name, rest in calls:
            kernel_name = re.search(r'name = "(\w+)"', rest)
            names |= {re.sub(r"\W", "_", name), *([kernel_name[1]] if kernel_name else [])}
    return names


def assemble(target: Gpu, source: Path, cubin: str | Path, *flags: str) -> dict[str, ptx.Usage]:
    """Assemble a file of PTX; return what each entry function uses.

    Raises:
        ValueError: the assembler refuses it.
    """
    command = [str(PTXAS), f"-arch={target.arch}", "-v", *flags, str(source), "-o", str(cubin)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, encoding="utf-8")
    if done.returncode:
        raise ValueError(f"ptxas: {(done.stderr.strip().splitlines() or ['failed'])[0]}")
    return ptx.ptxas_usage(done.stderr + done.stdout)


def _read_kernels(
    target: Gpu,
    module: str,
    dumps: Path,
    launches: dict[str, tuple[int | None, int]],
    smem: int | None,
    hand_written: bool,
) -> list[dict[str, Any]]:
    """Assemble one PTX module and read the figures of each entry function."""
    source, cubin = dumps / "kernel.ptxas-input", dumps / "kernel.cubin"
    source.write_text(module, "utf-8")
    usage_by_name = assemble(target, source, cubin, "-lineinfo")
    counts: dict[str, dict[str, int]] = {}
    code: dict[str, list[sass.Instruction]] = {}
    if hand_written or "mma" in module:  # disassembling XLA's many small fusions would take longer than compiling them
        dumped = subprocess.run(
            [CUOBJDUMP, "--dump-sass", cubin], capture_output=True, text=True, check=False, encoding="utf-8"
        ).stdout
        counts, code = ptx.sass_counts(dumped), sass.functions(dumped) if hand_written else {}
    if hand_written:  # bench.aot.locate reads it from the folder that --keep names
        with_lines = subprocess.run(
            [NVDISASM, "-g", "-c", cubin], capture_output=True, text=True, check=False, encoding="utf-8"
        ).stdout
        for name in code:
            (dumps / f"{name}.sass").write_text(with_lines, "utf-8")
    kernels = []
    for name, usage in usage_by_name.items():
        launch_threads, launch_smem = launches.get(name, (None, 0))
        threads = launch_threads or ptx.entry_threads(module).get(name)
        # Mosaic declares one byte of static memory in order to address the dynamic part.
        size = smem if smem is not None else max(launch_smem, usage.static_smem)
        steady = sass.steady_state(code.get(name, []))
        kernels.append(
            {
                "name": name,
                "registers": usage.registers,
                "spill_bytes": usage.spill_bytes,
                "smem_bytes": size,
                "threads": threads,
                "blocks": ptx.blocks_per_sm(target, usage.registers, threads, size) if threads else None,
                "occupancy": round(ptx.occupancy(target, usage.registers, threads, size), 4) if threads else None,
                **{kind: counts.get(name, {}).get(kind, 0) for kind in ("wgmma", "tcgen05", "mma", "local")},
                **({"steady": steady} if steady else {}),
            }
        )
    return kernels
