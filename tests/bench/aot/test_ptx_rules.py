"""The rules on PTX: a small kernel passes, and each planted fault is found by its rule."""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench.aot.gpu import compiler, ptx, ptx_rules
from bench.aot.gpu.ptx_rules import __main__ as ptx_rules_program
from bench.aot.gpu.ptx_rules import flow, launch, program, values
from bench.aot.gpu.ptx_rules.launch import Launch, TensorMap

ROOT = Path(__file__).parents[3]
OTHER = ROOT / ".venv-aot" / "bin" / "python"
COMPILER = sys.executable if importlib.util.find_spec("jax_cuda13_plugin") else str(OTHER) if OTHER.exists() else None

BOX = TensorMap(bytes=8192, swizzle=128)  # 64 rows of 64 16-bit values
LAUNCH = Launch("ring_kernel", (3, 1, 1), 256, 24608, {0: BOX, 128: BOX})
REGISTERS = 128  # per thread at launch
DESCRIPTOR = 1 << 62 | (1024 >> 4) << 32  # swizzle 128, 1024 bytes from 8 rows to the next

PTX = Path(__file__).with_name("ring_kernel.ptx").read_text("utf-8")
STORE = "\t@%p4 cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd8, {%r28, %r28} ], [%r27];\n"
WGMMA_END = "\twgmma.commit_group.sync.aligned;\n\twgmma.wait_group.sync.aligned 0;\n"

# rule, what is wrong, text, its replacement
FAULTS = [
    (
        "barriers",
        "a count is too large",
        "mbarrier.init.shared::cta.b64 [%r8], %r9",
        "mbarrier.init.shared::cta.b64 [%r8], 256",
    ),
    (
        "barriers",
        "a count is too small",
        "mbarrier.init.shared::cta.b64 [%r8], %r9",
        "mbarrier.init.shared::cta.b64 [%r8], 64",
    ),
    (
        "barriers",
        "all threads initialize",
        "@%p3 mbarrier.init.shared::cta.b64 [%r8+8]",
        "mbarrier.init.shared::cta.b64 [%r8+8]",
    ),
    ("barriers", "one is initialized twice", "[%r8+8], %r9", "[%r8], %r9"),
    ("barriers", "the initialization is not fenced", "fence.mbarrier_init.release.cluster;", ""),
    ("barriers", "no barrier after the initialization", "bar.sync \t0;", ""),
    ("barriers", "arrives on the wrong barrier", "_, [%r17], 1;", "_, [%r16], 1;"),
    ("barriers", "arrives twice", "_, [%r17], 1;", "_, [%r17], 2;"),
    ("barriers", "does not arrive", "mbarrier.arrive.release.cta.shared::cta.b64 _, [%r17], 1;", ""),
    ("barriers", "waits for the wrong phase", "P1, [%r16], %r14", "P1, [%r16], %r13"),
    ("expect_tx", "a copy completes on the wrong barrier", "{%r12, %r12} ], [%r16];", "{%r12, %r12} ], [%r17];"),
    ("barriers", "a named barrier expects more threads", "bar.sync \t2, 128;", "bar.sync \t2, 256;"),
    ("expect_tx", "too few bytes", "mov.b32 \t%r30, 64;", "mov.b32 \t%r30, 32;"),
    ("expect_tx", "too many bytes", "mov.b32 \t%r30, 64;", "mov.b32 \t%r30, 128;"),
    ("registers", "more than the block has", "u32 216;", "u32 224;"),
    ("registers", "no multiple of 8", "u32 40;", "u32 36;"),
    ("registers", "a decrease that increases", "dec.sync.aligned.u32 40;", "dec.sync.aligned.u32 136;"),
    ("wgmma", "no wait", "\twgmma.wait_group.sync.aligned 0;\n", ""),
    ("wgmma", "the wait leaves a group", "wgmma.wait_group.sync.aligned 0;", "wgmma.wait_group.sync.aligned 1;"),
    ("wgmma", "no commit", "\twgmma.commit_group.sync.aligned;\n", ""),
    ("wgmma", "commit after the wait", WGMMA_END, "\n".join(reversed(WGMMA_END.splitlines()))),
    ("wgmma", "no fence", "wgmma.fence.sync.aligned;", ""),
    (
        "wgmma",
        "an accumulator is written after the fence",
        "wgmma.fence.sync.aligned;",
        "wgmma.fence.sync.aligned;\n\tmov.b32 \t%r22, %r20;",
    ),
    ("proxy_fence", "no fence", "fence.proxy.async.shared::cta;", ""),
    ("proxy_fence", "no barrier", "bar.sync \t1, 128;", ""),
    (
        "proxy_fence",
        "the fence comes first",
        "\tst.shared.b32 \t[%rd7+16384], %r24;\n\tfence.proxy.async.shared::cta;",
        "\tfence.proxy.async.shared::cta;\n\tst.shared.b32 \t[%rd7+16384], %r24;",
    ),
    ("descriptors", "no swizzle", str(DESCRIPTOR), str(DESCRIPTOR & ~(3 << 62))),
    ("descriptors", "another swizzle", str(DESCRIPTOR), str(DESCRIPTOR | 2 << 62)),
    (
        "descriptors",
        "a box begins within the pattern",
        "shl.b32 \t%r31, %r13, 13;",
        "shl.b32 \t%r31, %r13, 13;\n\tadd.s32 \t%r31, %r31, 128;",
    ),
    ("bulk_stores", "no commit", "cp.async.bulk.commit_group;", ""),
    ("bulk_stores", "no wait", "cp.async.bulk.wait_group \t0;", ""),
    ("bulk_stores", "the wait leaves a group", "cp.async.bulk.wait_group \t0;", "cp.async.bulk.wait_group \t1;"),
    (
        "bulk_stores",
        "its bytes are written before the wait",
        "\tcp.async.bulk.commit_group;\n",
        "\tcp.async.bulk.commit_group;\n\tst.shared.b32 \t[%rd7+16384], %r24;\n",
    ),
    ("smem", "loads into a stage in use", "@%p7 bra \t$L__free;", "bra \t$L__free;"),
    (
        "smem",
        "multiplies before the data arrive",
        "mbarrier.try_wait.parity.shared.b64 P1, [%r16], %r14, %r29;",
        "setp.eq.b32 P1, 0, 0;",
    ),
]


REAL_FAULTS = [
    ("barriers", "a count is too small", r"(mbarrier\.init\S+ \[%\w+\]), %\w+;", r"\1, 64;"),
    ("barriers", "no thread arrives", r"mbarrier\.arrive\.release\S+ _, \[%\w+\], 1;", ""),
    ("barriers", "arrivals go to the next barrier", r"(mbarrier\.arrive\.release\S+ _, \[%\w+)\], 1;", r"\1+8], 1;"),
    ("expect_tx", "too few bytes", r"(mbarrier\.arrive\.expect_tx\S+ %\w+, \[[^]]+\]), %\w+;", r"\1, 16;"),
    ("expect_tx", "too many bytes", r"(mbarrier\.arrive\.expect_tx\S+ %\w+, \[[^]]+\]), %\w+;", r"\1, 1024;"),
    ("registers", "consumers take too many", r"(setmaxnreg\.inc\S+) 240;", r"\1 248;"),
    ("registers", "the producer keeps too many", r"(setmaxnreg\.dec\S+) 24;", r"\1 40;"),
    ("wgmma", "no wait", r"wgmma\.wait_group\S+ 0;", ""),
    ("wgmma", "no commit", r"wgmma\.commit_group\S+;", ""),
    ("wgmma", "no fence", r"wgmma\.fence\S+;", ""),
    ("proxy_fence", "no fence", r"fence\.proxy\.async\S*;", ""),
    ("proxy_fence", "no barrier", r"(fence\.proxy\.async\S*;(?:\s|//.*)*)bar\.sync[^;]*;", r"\1"),
    ("descriptors", "swizzle 64 for 128", r"\b4611686\d{12}\b", lambda m: str(int(m[0]) + (1 << 62))),
    ("descriptors", "swizzle 32 for 128", r"\b4611686\d{12}\b", lambda m: str(int(m[0]) + (2 << 62))),
    ("bulk_stores", "no commit", r"cp\.async\.bulk\.commit_group;", ""),
    ("bulk_stores", "no wait", r"cp\.async\.bulk\.wait_group\s+0;", ""),
]
ROWS = {"attention": "aot d64 causal", "grouped_matmul": "aot odd sizes"}


def check(text: str, launched: Launch = LAUNCH) -> ptx_rules.Report:
    (kernel,) = program.parse(text)
    return ptx_rules.check_launched(kernel, [launched], REGISTERS)


def test_a_kernel_without_faults_passes():
    report = check(PTX)
    assert report.findings == ()
    assert report.runs == (4, 4)
    assert report.synchronizing == (23, 23)
    assert report.phases == 4 * 2 * 4  # runs, phases of a stage, stages


@pytest.mark.parametrize(("rule", "what", "text", "replacement"), FAULTS, ids=[f"{f[0]}: {f[1]}" for f in FAULTS])
@pytest.mark.sampled(2)
def test_a_fault_is_found_by_its_rule(rule, what, text, replacement):
    assert PTX.count(text) == 1, what
    report = check(PTX.replace(text, replacement))
    assert rule in {finding.rule for finding in report.findings}
    assert re.match(r"ring_kernel: \w+: line \d+ of the PTX: [^\n]+$", report.first_finding())


def test_a_finding_names_the_line():
    report = check(PTX.replace("\tfence.proxy.async.shared::cta;\n", ""))
    line = PTX.replace("\tfence.proxy.async.shared::cta;\n", "").split("\n").index(STORE.rstrip()) + 1
    assert {finding.line for finding in report.findings} == {line}


@pytest.mark.parametrize("rule", ["expect_tx", "descriptors"])
def test_the_tensor_map_is_part_of_the_check(rule):
    wrong = {"expect_tx": dataclasses.replace(BOX, bytes=4096), "descriptors": dataclasses.replace(BOX, swizzle=64)}
    launched = dataclasses.replace(LAUNCH, tensor_maps={0: wrong[rule], 128: BOX})
    assert rule in {finding.rule for finding in check(PTX, launched).findings}


def test_a_program_without_a_fitting_launch_is_refused():
    with pytest.raises(ValueError, match="ring_kernel: the dump of the program has no launch of it"):
        check(PTX, dataclasses.replace(LAUNCH, tensor_maps={0: BOX}))


def test_what_the_text_does_not_say_is_a_finding():
    unknown = "ex2.approx.ftz.f32 \t%r30, %r12;"
    report = check(PTX.replace("mov.b32 \t%r30, 64;", unknown))
    assert {finding.rule for finding in report.findings} == {"unresolved"}
    diverging = PTX.replace("@%p5 bra", "@%p1 bra")
    assert {finding.rule for finding in check(diverging).findings} >= {"unresolved"}


def test_rules_hold_on_every_path():
    """A wait on one of two paths is no wait, and paths that no run takes count."""
    skipping = PTX.replace(
        "\twgmma.wait_group.sync.aligned 0;\n",
        "\t@%p8 bra \t$L__skip;\n\twgmma.wait_group.sync.aligned 0;\n$L__skip:\n",
    )
    (kernel,) = program.parse(skipping)
    assert {finding.rule for finding in flow.check(kernel)} == {"wgmma"}
    late = PTX.replace("bra.uni \t$L__end;", "ret;\n\tst.shared.b32 \t[%rd7], %r24;\n" + STORE + "\tret;")
    assert check(late).findings == ()  # nothing jumps there
    reached = late.replace(
        "cp.async.bulk.wait_group \t0;", "cp.async.bulk.wait_group \t0;\n\t@%p8 bra \t$L__late;"
    ).replace("ret;\n\tst", "ret;\n$L__late:\n\tst")
    (kernel,) = program.parse(reached)
    assert {finding.rule for finding in flow.check(kernel)} == {"proxy_fence", "bulk_stores"}


def test_instructions_are_parsed():
    (kernel,) = program.parse(PTX)
    assert (kernel.name, kernel.threads, kernel.params) == ("ring_kernel", 256, {"ring_kernel_param_0": 256})
    lines = PTX.split("\n")
    assert all(instruction.opcode in lines[instruction.line - 1] for instruction in kernel.instructions)
    multiply = next(x for x in kernel.instructions if x.opcode.startswith("wgmma.mma_async"))
    assert multiply.writes == ("%r20", "%r21", "%r22", "%r23")
    assert multiply.reads == (*multiply.writes, "%rd5", "%rd5", "p")
    waits = [i for i, x in enumerate(kernel.instructions) if x.opcode.startswith("mbarrier.try_wait")]
    assert [kernel.successors[i + 2] for i in waits] == [(i,) for i in waits]  # each label in its own scope


@pytest.mark.parametrize(
    ("opcode", "sources", "result"),
    [
        ("add.s32", (2**32 - 1, 2), 1),
        ("sub.s64", (1, 2), 2**64 - 1),
        ("setp.lt.s32", (2**32 - 1, 0), 1),
        ("setp.lt.u32", (2**32 - 1, 0), 0),
        ("max.s32", (2**32 - 200, -127), 2**32 - 127),
        ("max.relu.s32", (2**32 - 200, -127), 0),
        ("shr.s32", (2**32 - 8, 1), 2**32 - 4),
        ("shr.u32", (2**32 - 8, 1), 2**31 - 4),
        ("div.s32", (2**32 - 7, 2), 2**32 - 3),
        ("rem.s32", (2**32 - 7, 2), 2**32 - 1),
        ("mul.hi.u32", (2**31, 6), 3),
        ("mul.wide.s32", (2**32 - 1, 8), 2**64 - 8),
        ("mad.lo.s32", (3, 4, 5), 17),
        ("bfe.u64", (0x12345, 4, 8), 0x34),
        ("cvt.s64.s32", (2**32 - 1,), 2**64 - 1),
        ("cvt.u64.u32", (2**32 - 1,), 2**32 - 1),
        ("selp.b32", (1, None, 1), 1),
        ("and.pred", (None, 0), 0),
        ("and.b32", (None, 0), None),
        ("div.u32", (1, 0), None),
    ],
)
def test_integer_instructions(opcode, sources, result):
    assert values.operation(opcode)(*sources) == result


def test_floating_point_is_not_known():
    assert all(
        values.operation(opcode) is None for opcode in ("add.f32", "cvt.rn.bf16x2.f32", "setp.eq.f32", "selp.f32")
    )


MODULE = """
"stable_mosaic_gpu.func.func"() ({
^bb0(%token: i64):
  %c1 = "stable_mosaic_gpu.arith.constant"() {value = 1 : index} : () -> index
  %c3 = "stable_mosaic_gpu.arith.constant"() {value = 3 : index} : () -> index
  %c256 = "stable_mosaic_gpu.arith.constant"() {value = 256 : index} : () -> index
  %smem = "stable_mosaic_gpu.arith.constant"() {value = 24608 : i32} : () -> i32
  %c7 = "stable_mosaic_gpu.arith.constant"() {value = 7 : i64} : () -> i64
  %c2 = "stable_mosaic_gpu.arith.constant"() {value = 2 : i64} : () -> i64
  %c64 = "stable_mosaic_gpu.arith.constant"() {value = 64 : i64} : () -> i64
  %c128 = "stable_mosaic_gpu.arith.constant"() {value = SWIZZLE : i64} : () -> i64
  %maps = "stable_mosaic_gpu.llvm.alloca"() : () -> i64
  %map = "stable_mosaic_gpu.llvm.getelementptr"(%maps) {rawConstantIndices = array<i32: 128>} : (i64) -> i64
  %box = "stable_mosaic_gpu.llvm.alloca"() : () -> i64
  %box0 = "stable_mosaic_gpu.llvm.getelementptr"(%box) {rawConstantIndices = array<i32: 0>} : (i64) -> i64
  "stable_mosaic_gpu.llvm.store"(%c64, %box0) : (i64, i64) -> ()
  %box1 = "stable_mosaic_gpu.llvm.getelementptr"(%box) {rawConstantIndices = array<i32: 1>} : (i64) -> i64
  "stable_mosaic_gpu.llvm.store"(%c64, %box1) : (i64, i64) -> ()
  "stable_mosaic_gpu.func.call"(%map, %maps, %c7, %c2, %maps, %maps, %c128, %box)
      {callee = @mosaic_gpu_init_tma_desc} : (i64, i64, i64, i64, i64, i64, i64, i64) -> ()
  %end = "stable_mosaic_gpu.gpu.launch"(%token, %c3, %c1, %c1, %c256, %c1, %c1, %smem)
      : (i64, index, index, index, index, index, index, i32) -> i64
}) {sym_name = "ring"} : () -> ()
"""


@pytest.mark.parametrize(("code", "swizzle"), [(128, 128), (16, 0)])
def test_a_launch_is_read_from_the_dump_of_the_program(tmp_path, code, swizzle):
    module = MODULE.replace("SWIZZLE", str(code)).replace('"', "\\22").replace("\n", "\\0A")
    call = f'  %a = f32[] custom-call(), custom_call_target="mosaic_gpu_v2", backend_config={{module = "{module}"}}\n'
    tmp_path.joinpath("m.sm_9.0a_gpu_after_optimizations.txt").write_text(call * 2, "utf-8")
    expected = Launch("ring_kernel", (3, 1, 1), 256, 24608, {128: TensorMap(8192, swizzle)})
    assert launch.read_all(tmp_path) == [expected]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Kernels compiled for an H100: their PTX by name, their launches, and the folder of their dumps."""
    if COMPILER is None:
        pytest.skip("needs the compilers of `make aot`")
    folder = tmp_path_factory.mktemp("aot")
    texts: dict[str, str] = {}
    launches: list[Launch] = []
    for op, spec in ROWS.items():
        command = [COMPILER, "-m", "bench.aot", "--target", "h100", "--op", op, "--spec", spec]
        command += ["--implementation", "pallas", "--keep", str(folder), "--out", str(folder)]
        subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True)
        rows = json.loads((folder / "h100.json").read_text("utf-8"))["rows"]
        assert {row["status"] for row in rows.values()} == {"compiled"}  # a finding would fail a row
        (row,) = (folder / "h100").glob(f"{op}-*-bfloat16-both")
        texts |= {
            program.parse(text)[0].name: text for text in ptx.split_modules((row / "printed.txt").read_text("utf-8"))
        }
        launches += launch.read_all(row)
    return texts, launches, folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["attention_forward", "attention_dkv", "grouped_matmul_dw"])
def test_faults_in_compiled_kernels_are_found(compiled, name):
    texts, launches, _ = compiled
    text = texts[f"{name}_mosaic_gpu_kernel"]

    def rules(text: str) -> set[str]:
        (kernel,) = program.parse(text)
        return {finding.rule for finding in ptx_rules.check_launched(kernel, launches, 168).findings}

    assert rules(text) == set()
    for rule, what, pattern, replacement in REAL_FAULTS:
        faulty, count = re.subn(pattern, replacement, text)
        assert count, what
        assert rule in rules(faulty), what


@pytest.mark.slow
def test_the_program_checks_what_was_kept(compiled, capsys):
    *_, folder = compiled
    assert ptx_rules_program.main([str(folder)]) == 0
    assert re.search(r"(\d+) kernels checked, 0 with findings", capsys.readouterr().out)


def test_the_program_needs_what_was_kept(tmp_path, capsys):
    assert ptx_rules_program.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"bench.aot.gpu.ptx_rules: error: no printed.txt in {tmp_path}\n"


def test_a_finding_fails_the_row():
    registers = {"ring_kernel": REGISTERS}
    compiler.check_rules(PTX, [LAUNCH], registers)
    with pytest.raises(ValueError, match=r"^ring_kernel: barriers: line \d+ of the PTX: [^\n]+$"):
        compiler.check_rules(PTX.replace("_, [%r17], 1;", "_, [%r17], 2;"), [LAUNCH], registers)
