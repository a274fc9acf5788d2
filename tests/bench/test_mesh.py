"""What meshes cost: the reader of compiled programs, and bounds on the memory and the exchanges of training steps."""

import json
import textwrap

import pytest

from bench.aot import pods
from bench.mesh import collectives
from tests.helpers.simulated_devices import run_with_devices

HLO = """
    %add (x: f32[], y: f32[]) -> f32[] {
      ROOT %sum = f32[] add(%x, %y)
    }

    %body (state: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
      %shift = bf16[4,8]{1,0} collective-permute(%x), channel_id=1, source_target_pairs={{0,1}}
      %gather = (f32[1,8]{1,0}, f32[4,8]{1,0}) all-gather-start(%y), channel_id=2, replica_groups=[2,4]<=[8]
      %done = f32[4,8]{1,0} all-gather-done(%gather)
    }

    %below.9 (state: (s32[], f32[2])) -> pred[] {
      %bound = s32[]{:T(128)} constant(7), metadata={op_name="step"}
      ROOT %lt = pred[]{:T(512)} compare(%i, %bound), direction=LT
    }

    %other (state: (s32[], f32[2])) -> (s32[], f32[2]) {
      %halo = (f32[4]{0}, f32[4]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=3
    }

    ENTRY %main (p: f32[4,8]) -> f32[4,8] {
      %tpu = (s32[], f32[2]) while(%state), condition=%below.9, body=%other
      %loop = (s32[], f32[4,8]) while(%init), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"5"}}
      %reduce = (f32[16]{0}, f32[2,2]{1,0}) all-reduce(%a, %b), replica_groups={{0,1,2,3}}, to_apply=%add
      %scatter = f32[2,8]{1,0} reduce-scatter(%c), replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}, to_apply=%add
      ROOT %swap = s8[64]{0} all-to-all(%d), replica_groups={{0,1}}
    }
"""


def test_collectives_are_read_with_their_loops_and_groups():
    found = collectives.collectives(textwrap.dedent(HLO))
    assert collectives.totals(found) == {
        "collective-permute": (5 + 7, 5 * 4 * 8 * 2 + 7 * 16),
        "all-gather": (5, 5 * 4 * 8 * 4),
        "all-reduce": (1, 16 * 4 + 2 * 2 * 4),
        "reduce-scatter": (1, 4 * 2 * 8 * 4),
        "all-to-all": (1, 64),
    }
    assert {one.kind: one.largest for one in found}["all-reduce"] == 64


PROGRAM = """
    import json
    from bench.mesh.__main__ import SMALL
    from bench.mesh.steps import step_cost
    from dantinox.config import Config, coerce_numbers

    def cost(mesh, **more):
        settings = coerce_numbers(dict(pair.split("=") for pair in SMALL), "test")
        found = step_cost(Config().replace(**(settings | more), mesh=mesh))
        return [found.temporary, {one.kind: one.largest for one in sorted(found.exchanged, key=lambda x: x.largest)}]

    experts = {"n_experts": 8, "mlp_ratio": 1.0}
    dense = {mesh: cost(mesh) for mesh in ("data=8", "fsdp=8", "data=2,fsdp=4", "context=8")}
    print(json.dumps([dense, {mesh: cost(mesh, **experts) for mesh in ("", "data=8", "fsdp=8", "expert=8")}]))
"""


@pytest.mark.slow
def test_memory_and_exchanges_of_meshes_are_bounded():
    """A device keeps no more under fsdp than under data, and exchanges nothing as large as the activation."""
    dense, experts = json.loads(run_with_devices("-c", textwrap.dedent(PROGRAM)).splitlines()[-1])
    activation, table = 16 * 128 * 256 * 4, 1024 * 256 * 4
    for mesh in ("fsdp=8", "data=2,fsdp=4"):
        assert dense[mesh][0] <= 1.02 * dense["data=8"][0]
        assert max(dense[mesh][1].values()) <= table < activation  # a gathered matrix
        assert dense[mesh][1]["all-to-all"] <= activation / 8 * 2
        assert dense[mesh][1]["reduce-scatter"] == table
    assert dense["context=8"][1]["collective-permute"] <= activation / 8 * 2
    assert experts["data=8"][0] < 0.4 * experts[""][0]  # each device computes its own rows
    assert experts["fsdp=8"][0] <= experts["data=8"][0]
    assert experts["expert=8"][0] <= 0.6 * experts["data=8"][0]
    assert max(experts["expert=8"][1].values()) < activation


def test_committed_pods_fit_and_exchange_by_reduce_scatter():
    profile = json.loads(pods.PROFILE.read_text("utf-8"))
    assert profile and list(profile) == [name for name in pods.CASES if name in profile]
    for name, row in profile.items():
        assert not pods.worse(name, row, row)
        assert row["compile_cpu_s"] <= max(60, 2 * row["one_period"]["compile_cpu_s"])
        if "fsdp" in pods.CASES[name].mesh:
            assert row["exchanged"]["reduce-scatter"]["bytes"] > 0


HALO = """
    import json
    import jax, jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec as P
    from bench.mesh.collectives import collectives
    from dantinox import kernels
    from dantinox.distributed.collectives import per_device
    from dantinox.distributed.context import attend_over_context
    from dantinox.distributed.mesh import make_mesh

    mesh, cut = make_mesh({"context": 16}), P(None, "context")

    def exchanged(window):
        def attend(sinks, q, k, v, gate, segment_ids=None):
            return kernels.attention(q, k, v, window=window, segment_ids=segment_ids, implementation="xla")

        def share(q, k, v):
            with per_device(mesh):
                f = lambda *x: attend_over_context(attend, None, *x, None, window)
                o, pull = jax.vjp(f, q, k, v)
                return pull(o)

        laid = NamedSharding(mesh, cut)
        shape = lambda heads: jax.ShapeDtypeStruct((1, 131072, heads, 128), jnp.float32, sharding=laid)
        on_mesh = jax.jit(jax.shard_map(share, mesh=mesh, in_specs=(cut,) * 3, out_specs=(cut,) * 3))
        text = on_mesh.lower(shape(32), shape(8), shape(8)).compile().as_text()
        return sum(one.count * one.bytes for one in collectives(text))

    print(json.dumps([exchanged(1024), exchanged(None)]))
"""


@pytest.mark.slow
def test_halo_exchanges_a_hundredth_of_a_ring():
    """A layer of window 1024 over 131,072 tokens on 16 devices, forward and backward, from the compiled programs."""
    text = run_with_devices("-c", textwrap.dedent(HALO), devices=16)
    halo, gathered = json.loads(text.splitlines()[-1])
    row, devices, T, W = 8 * 128 * 4, 16, 131072, 1024
    ring = 6 * (devices - 1) * T // devices * row  # k and v forward; k, v, dk and dv backward
    assert halo == 4 * (W - 1) * row
    assert halo <= ring / 100 and halo <= gathered / 100, (halo, ring, gathered)
