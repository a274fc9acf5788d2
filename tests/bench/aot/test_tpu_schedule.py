"""TPU schedules: parsers of libtpu's output, the steps of each attention kernel, and the tables made from them."""

from pathlib import Path

import numpy as np
import pytest

from bench import hardware
from bench.aot import attention_bundles, profile, readme_tables, tpu_schedule, worker_pool
from bench.aot.cases import Case
from dantinox.kernels import workloads
from dantinox.kernels.ops.attention.pallas_tpu import common

ROOT = Path(__file__).parents[3]
PYTHON = ROOT / ".venv-aot/bin/python"
V6E = hardware.get("v6e")

UTILISATION = """\
== CAPACTIY:
MATPUSH, MATMUL, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU
    2     2     2     4     2     1     3     3     2     2     2
== UTILIZATION:
0 0 0 0 0 0 0 0 0 0 2
1 2 0 3 0 0 1 1 0 0 1
2 1 0 0 0 0 2 2 1 1 0
0 0 0 0 0 0 0 0 0 0 0
"""

VMEM = """<html><script>
        // --- 1. THE DATA SOURCE ---
        const DATA ={"global_info": {"module_name": "jit_f", "vmem_capacity": 134217728},
  "instructions": {"splash.1": {"blocks": [{"allocations": [{"size": 4, "tag": "a {b}"}], "block_size": 7}],
     "total_size": 983040}, "copy": {"blocks": [], "total_size": 4096}}};
        const other = {};
</script></html>"""

FINAL = """\
= control target key end
     0   :  { %s0 = inlined_call_operand.vmem [shape: s32[36], index: 0, kind: input] ;; [shape: s32[7], index: 1] }
   0x1 LB: > { %s1 = sadd.s32 1, %s0 } /* Start region 9 */
   0x2   : > { %5 = sbr.rel (%p1) target = $region8 }
   0x3   : > { %6 = sbr.rel (%p2) target = $region1 }
   0x6 PF: > { %s2 = sadd.s32 1, %s1 } /* Start/End empty region 1 :: Start region 12 */
   0x7   : > { %7 = sbr.rel (%p3) target = $region2 }
   0x9 LB: >> { %s3 = sadd.s32 1, %s2 } /* Start region 3 :: Start region 4 */
   0xb   : >> { %8 = sbr.rel (!%p4) target = $region3 }
   0xd PF: > { %s4 = sadd.s32 1, %s1 } /* Start/End empty region 2 */
  0x10 PF: > { %s5 = sadd.s32 1, %s1 } /* Start/End empty region 8 */
  0x12   :  { %9 = sbr.rel (!%p5) target = $region9 }
  0x14   :  { %s6 = smov 0 }
"""


def test_utilization_table_is_parsed():
    found = tpu_schedule.utilisation(UTILISATION)
    assert found == tpu_schedule.Schedule(bundles=4, mxu=3, mxu_slots=8, spills=1, fills=3)
    assert found.mxu_share == 3 / 8
    older = UTILISATION.replace("MATPUSH, MATMUL", "MXU, OTHER")
    assert tpu_schedule.utilisation(older).mxu == 3  # the first column now
    with pytest.raises(ValueError, match="another form"):
        tpu_schedule.utilisation("nothing of the kind")
    with pytest.raises(ValueError, match="other lengths"):
        tpu_schedule.utilisation(UTILISATION + "0 0\n")


def test_schedule_header_and_file_names_are_parsed():
    head = "Schedule analysis:\n\ttotal scheduled bundles:    615\n\tempty scheduled bundles:    13\n"
    assert tpu_schedule.empty_bundles(head) == 13
    assert tpu_schedule.empty_bundles("") is None
    name = "1795354836-splash_mha_fwd.1-70-final_hlo-static-per-bundle-utilization.txt"
    assert tpu_schedule.kernel_of(name) == ("utilisation", "splash_mha_fwd.1")
    assert tpu_schedule.kernel_of("17-a-b-71-schedule-analysis_final_bundles.txt") == ("schedule", "a-b")
    assert tpu_schedule.kernel_of("17-TLP-70-final_hlo-static-per-bundle-utilization.txt") is None
    assert tpu_schedule.kernel_of("17-<late-x>-70-final_hlo-static-per-bundle-utilization.txt") is None
    assert tpu_schedule.kernel_of("17-a-72-final_bundles.txt") is None


def test_vmem_report_and_custom_calls_are_parsed():
    assert tpu_schedule.vmem(VMEM) == {"splash.1": 983040, "copy": 4096}
    assert tpu_schedule.vmem("<html></html>") == {}
    hlo = (
        '  %splash.1 = (f32[8]) custom-call(%q), custom_call_target="tpu_custom_call"\n'
        '  ROOT %other = f32[8] custom-call(%q), custom_call_target="Sharding"\n'
    )
    assert tpu_schedule.custom_calls(hlo) == {"splash.1"}


def test_kernel_parts_and_executed_bundles_are_counted():
    assert tpu_schedule.parts(FINAL) == (
        0x15,
        [
            tpu_schedule.Part(0x1, 0x13, True),
            tpu_schedule.Part(0x3, 0x10, False),
            tpu_schedule.Part(0x4, 0x6, False),
            tpu_schedule.Part(0x8, 0xD, False),
            tpu_schedule.Part(0x9, 0xC, True),
        ],
    )
    assert tpu_schedule.branches(FINAL) == [2, 5]
    assert (tpu_schedule.first_operand(FINAL), tpu_schedule.first_operand("")) == (36, None)
    work = attention_bundles.Work(steps=10, taken=(2, 4), interior=(), masked=(1,), tile=(8, 8), trips=3)
    # 3 outside of the grid's loop; 18 in it, 7 of them in the two parts, 3 of these in a loop that runs three times.
    always, second = 18 - 7, 5 + 2 * 3
    assert attention_bundles.count(FINAL, work) == {
        "executed": 3 + 10 * always + 2 * 2 + 4 * second,
        "tile_bundles": [always, always + second],
    }
    other = attention_bundles.Work(steps=10, taken=(2, 4, 1), interior=(), masked=(1,), tile=(8, 8), trips=3)
    bound = attention_bundles.count(FINAL, other)
    assert bound == {"executed": 3 + 10 * (18 + 6), "tile_bundles": [24, 24], "upper_bound": True}


@pytest.mark.parametrize(("name", "block"), [("causal", 1024), ("window 1024", 1024), ("window 1024", 512)])
def test_splash_steps_match_its_mask(name, block):
    info = pytest.importorskip("jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info")
    masks = pytest.importorskip("jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask")
    spec = workloads.get("attention", f"aot tpu d128 4k {name}")
    shape = (spec.T, spec.S)
    one = masks.LocalMask(shape, (spec.window - 1, 0), 0) if spec.window else masks.CausalMask(shape, 0)
    mask, shards = masks.MultiHeadMask([one] * 4), {"head_shards": 1, "q_seq_shards": 1}
    for kernel, process in (("splash_mqa_dq", info.process_mask), ("splash_mqa_dkv", info.process_mask_dkv)):
        found, _ = process(mask, (block, block), **shards)
        work = attention_bundles.splash(spec, kernel, "splash" if block == 1024 else "splash_512")
        assert work.steps == 8 * found.data_next.size
        assert work.taken[1] == 8 * np.count_nonzero(found.block_mask)
        assert work.taken[0] == work.taken[2] == (2 if "dkv" in kernel else 8) * (spec.S // block)


def test_fused_backward_grid_has_every_block():
    spec = workloads.get("attention", "aot tpu d128 4k window 1024")
    work = attention_bundles.splash(spec, "splash_mqa_dkv", "splash_fused")
    assert (work.steps, work.taken, work.tile) == (8 * 8 * 8, (2 * 8, 8 * (8 + 7 + 6), 2 * 8), (512, 512))
    causal = workloads.get("attention", "aot tpu d128 4k causal")
    assert attention_bundles.splash(causal, "splash_mqa_dkv", "splash_fused").tile == (1024, 1024)


def test_tokamax_and_dantinox_steps_match_the_visible_blocks():
    spec = workloads.get("attention", "aot tpu d128 4k causal")
    run, all_ = 8 * 32 * 33 // 2, 8 * 32 * 32
    assert attention_bundles.tokamax(spec, "splash_mha_fwd").taken == (8 * 32, run - 8 * 32, 8 * 32, 8 * 32)
    assert attention_bundles.tokamax(spec, "splash_mha_fwd").steps == run
    dkv = attention_bundles.tokamax(spec, "splash_mha_dkv")
    assert (dkv.steps, dkv.taken) == (all_, (2 * 32, run - 8 * 32, 8 * 32, 2 * 32))

    config, heads = attention_bundles.ours(spec, V6E)
    n = spec.T // config.block_sizes.block_q
    assert heads == 2 and config.block_sizes.block_q == config.block_sizes.block_kv
    work = attention_bundles.forward(config.block_schedule(), config, heads)
    steps = 2 * n * (n + 1) // 2
    assert (work.steps, work.taken) == (steps, (2 * n, steps, 2 * n, steps, steps, 2 * n))
    assert (
        work.trips * config.block_sizes.block_q_compute * config.block_sizes.block_kv_compute
        == work.tile[0] * work.tile[1]
    )
    work = attention_bundles.backward(config.block_schedule(), config, heads)
    assert work.taken == (2, 2 * n, steps, 2 * n, steps, steps, steps, steps, 2 * n, 2)


def test_kernel_of_a_span_is_identified_by_its_steps():
    spec = workloads.get("attention", "aot tpu d256 32k causal")
    case = Case("attention", spec.name, "pallas", "bfloat16", "both")
    config, heads = attention_bundles.ours(spec, V6E)
    lengths = [len(config.block_schedule(span)) for span in common.kv_spans(config)]
    assert len(lengths) == len(set(lengths)) > 1
    found = [
        attention_bundles.of_kernel(spec, case, V6E, "t_backward.1", f"[shape: s32[{n}], index: 0]") for n in lengths
    ]
    assert [work.steps for work in found] == [heads * n for n in lengths]
    assert attention_bundles.of_kernel(spec, case, V6E, "t_backward.1", "[shape: s32[1], index: 0]") is None
    assert (
        attention_bundles.of_kernel(spec, Case("attention", spec.name, "mine", "bfloat16", "both"), V6E, "k", "")
        is None
    )


def test_compiled_row_gets_its_bundles(tmp_path):
    (tmp_path / "17-attention_forward.1-02-final_bundles.txt").write_text(FINAL)
    spec = workloads.get("attention", "aot tpu d128 4k causal")
    case = Case("attention", spec.name, "pallas", "bfloat16", "forward")
    kernel = {"name": "attention_forward.1", "mxu": 100}
    row = {"kernels": [dict(kernel)]}
    attention_bundles.add(row, case, V6E, tmp_path)
    config, _ = attention_bundles.ours(spec, V6E)
    (found,) = row["kernels"]
    pairs = 8 * 4096 * 4097 // 2
    assert found["upper_bound"] and found["steps"] == 2 * len(config.block_schedule())
    assert row["bundles_per_pair"] == {"forward": round(found["executed"] / pairs, 6)}
    assert found["mxu_per_1024x1024"] == round(
        100 * 2**20 / (4 * config.block_sizes.block_q * config.block_sizes.block_kv)
    )
    for other in (hardware.get("h100"), None):  # a GPU, and a row with segments
        row = {"kernels": [dict(kernel)]}
        odd = Case("attention", "aot odd lengths", "pallas", "bfloat16", "forward")
        attention_bundles.add(row, case if other else odd, other or V6E, tmp_path)
        assert row == {"kernels": [kernel]}


def test_tables_match_the_committed_profiles():
    folder = ROOT / "profiles/aot"
    text = (folder / readme_tables.FILE).read_text()
    assert readme_tables.rewritten(text, readme_tables.load(folder)) == text, "`make aot` writes it anew"
    assert readme_tables.on_hopper(text, readme_tables.load_hopper(folder)) == text, "`make aot` writes it anew"
    with pytest.raises(ValueError, match="has not one"):
        readme_tables.rewritten("nothing", {})


def test_table_cell_shows_best_block_spills_or_reason():
    def row(value, spills, **kernel):
        kernels = [{"name": "fwd", "spills": spills, "tile": [512, 512]} | kernel]
        return {"status": "compiled", "kernels": kernels, "bundles_per_pair": {"forward": value}}

    held = {
        "attention / x / splash / bfloat16 / forward": row(0.004, 7, tile=[1024, 1024]),
        "attention / x / splash_512 / bfloat16 / forward": row(0.003, 5),
        "attention / x / pallas / bfloat16 / forward": row(0.002, 0, upper_bound=True),
        "attention / x / tokamax / bfloat16 / forward": {"status": "refused", "reason": "no window"},
    }
    cells = [readme_tables.cell(held, "x", names, "forward") for names in readme_tables.COLUMNS.values()]
    assert cells == ["≤ 2.00 (0)", "3.00 (5, 512)", "refused"]
    assert readme_tables.cell(held, "x", ("pallas",), "backward") == ""


@pytest.mark.skipif(not PYTHON.exists(), reason="needs the aot extra: make aot")
def test_tpu_attention_compiles_without_spills():
    case = Case("attention", "aot d128 causal", "pallas", "bfloat16", "both")
    with worker_pool.Worker(V6E, 240, python=str(PYTHON)) as worker:
        row = worker.ask(case)
    assert row["status"] == "compiled", row["reason"]
    assert [attention_bundles.direction_of(kernel["name"]) for kernel in row["kernels"]] == ["forward", "backward"]
    assert not any(kernel["spills"] or kernel["fills"] or "upper_bound" in kernel for kernel in row["kernels"])
    held = profile.load(profile.path(ROOT / "profiles/aot", "v6e"))
    if held["versions"] == worker.versions:
        before = held["rows"][case.key]["bundles_per_pair"]
        assert all(row["bundles_per_pair"][way] <= before[way] * profile.BUNDLE_GROWTH for way in before)


def test_each_moe_kernel_has_a_line():
    kernel = {"mxu_share": 0.5, "bundles": 700, "spills": 3}
    kernels = [
        kernel | {"name": "experts_dw_up.1"},
        kernel | {"name": "experts_up.1", "executed": {"uniform": 1 << 30}},
    ]
    held = {"v6e": {"moe_mlp / aot top 2 of 8 / pallas / bfloat16 / both": {"kernels": kernels}}}
    lines = readme_tables.mixture(held).splitlines()[2:]
    # 2048 rows, 512 x 1024, two matrices: 2^31 multiply-adds.
    assert lines == [
        "| v6e | aot top 2 of 8 | up | 50% | 700 | 536870912 | 3 |",
        "| v6e | aot top 2 of 8 | dw_up | 50% | 700 | ? | 3 |",
    ]
