"""Compile the kernels, and a training step, for a TPU host of four chips.

    python -m bench.aot.tpu.mesh_cases

Every Pallas kernel runs under `shard_map` with its default check, forward and with gradients, and a model with
attention and experts trains on meshes. Mosaic kernels cannot be partitioned automatically; the
interpreter on a CPU can.
"""

import os
import sys
from collections.abc import Callable
from typing import Any

from bench.aot import hardware
from bench.aot.tpu import compiler
from bench.aot.tpu.edge_cases import first_line

TOPOLOGY = "v6e:2x2"


def main() -> int:
    """Compile all programs and print one line for each; returns 1 if one fails."""
    target = hardware.get("v6e")
    assert isinstance(target, hardware.Tpu)
    os.environ |= compiler.environment(target, None)
    os.environ["TPU_ACCELERATOR_TYPE"] = "v6e-4"
    import jax
    from jax.experimental import topologies

    from dantinox.kernels import dispatch

    devices = topologies.get_topology_desc(TOPOLOGY, "tpu", chips_per_host_bounds=(2, 2, 1)).devices
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 2), ("data", "fsdp"), auto, devices=devices)
    failed = False
    with dispatch.target_device(target.platform, target.kind), jax.default_device(devices[0]):
        for name, lower in (kernel_programs(mesh) | training_programs(devices)).items():
            try:
                lower().compile()
                print(f"{TOPOLOGY}: {name}: compiled", flush=True)
            except Exception as error:  # a compiler may raise anything
                failed = True
                print(f"{TOPOLOGY}: {name}: {first_line(error)}", flush=True)
    return int(failed)


def kernel_programs(mesh: Any) -> dict[str, Callable[[], Any]]:
    """Return functions that lower each operation under `shard_map`, its inputs sharded over their first axis."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from dantinox import kernels

    batch, replicated = PartitionSpec(("data", "fsdp")), PartitionSpec()

    def array(shape: tuple[int, ...], dtype: Any = jnp.bfloat16, spec: Any = batch) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    def attention(q: Any, k: Any, v: Any, ids: Any) -> Any:
        return kernels.attention(q, k, v, window=64, segment_ids=ids, implementation="pallas")

    def grouped_matmul(x: Any, w: Any, sizes: Any) -> Any:
        return kernels.grouped_matmul(x, w, sizes, implementation="pallas")

    def moe_mlp(x: Any, w: Any, w_down: Any, ids: Any, weights: Any) -> Any:
        return kernels.moe_mlp(x, w, w, w_down, ids, weights, implementation="pallas")

    def decode_attention(q: Any, k: Any, v: Any, *cache: Any) -> Any:
        return kernels.decode_attention(q, k, v, kernels.KVCache(*cache), window=100, implementation="pallas")

    kv, w = array((8, 256, 2, 128)), array((4, 256, 384), spec=replicated)
    calls: dict[str, tuple[Any, tuple[Any, ...], int]] = {  # function, arguments, how many are differentiated
        "attention": (attention, (array((8, 256, 4, 128)), kv, kv, array((8, 256), jnp.int32)), 3),
        "grouped_matmul": (grouped_matmul, (array((2048, 256)), w, array((16,), jnp.int32)), 2),
        "moe_mlp": (
            moe_mlp,
            (
                array((2048, 256)),
                w,
                array((4, 384, 256), spec=replicated),
                array((2048, 2), jnp.int32),
                array((2048, 2), jnp.float32),
            ),
            3,
        ),
    }
    programs: dict[str, Callable[[], Any]] = {}
    for name, (function, arguments, count) in calls.items():
        specs = tuple(x.sharding.spec for x in arguments)

        def gradients(*args: Any, function: Any = function, count: int = count) -> Any:
            loss = lambda *inputs: function(*inputs, *args[count:]).astype(jnp.float32).sum()
            return jax.grad(loss, tuple(range(count)))(*args[:count])

        for label, run, out_specs in ((name, function, batch), (f"{name}, gradients", gradients, specs[:count])):
            sharded = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=out_specs)
            programs[label] = lambda sharded=sharded, arguments=arguments: jax.jit(sharded).lower(*arguments)
    for dtype in (jnp.bfloat16, jnp.int8):
        for D in (64, 128):
            ring = array((8, 2, 256, D), dtype)
            scales = [array((8, 2, 256), jnp.float32)] * 2 if dtype == jnp.int8 else []
            arguments = (array((8, 4, D)), *[array((8, 2, D))] * 2, ring, ring, array((8,), jnp.int32), *scales)
            sharded = jax.shard_map(decode_attention, mesh=mesh, in_specs=batch, out_specs=batch)
            label = f"decode_attention, {jnp.dtype(dtype).name} cache, heads of {D}"
            programs[label] = lambda sharded=sharded, arguments=arguments: jax.jit(sharded).lower(*arguments)
    return programs


def training_programs(devices: Any) -> dict[str, Callable[[], Any]]:
    """Return functions that lower training steps of a dense model and of a mixture of experts."""
    from bench.mesh.steps import lower_train_step
    from dantinox.config import Config

    sizes = {"vocab_size": 512, "dim": 256, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "window": 64}
    run = {"max_context": 256, "seq_len": 256, "batch_size": 16, "attn": "pallas"}
    experts = {"dtype": "float32", "n_experts": 4, "moe": "pallas", "grad_accum": 2, "remat": "block"}

    def lower(**settings: Any) -> Any:
        return lower_train_step(Config().replace(**sizes, **run, **settings), devices)

    return {
        "training step": lambda: lower(mesh="data=2,fsdp=2", dtype="bfloat16"),
        "training step, experts": lambda: lower(mesh="data=2,fsdp=2", **experts),
        "training step, context and tensor": lambda: lower(mesh="context=2,tensor=2", dtype="bfloat16"),
        "training step, experts over devices": lambda: lower(mesh="expert=2,tensor=2", **experts),
        "training step, ragged exchange": lambda: lower(mesh="expert=4", expert_exchange="ragged", **experts),
    }


if __name__ == "__main__":
    sys.exit(main())
