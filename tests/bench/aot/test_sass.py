"""The steady state of a kernel, read from machine code as cuobjdump prints it."""

import pytest

from bench.aot.gpu import sass
from bench.aot.report import sm90_tables


def code(*lines: str) -> str:
    """A function of these instructions, 16 bytes apart."""
    text = "".join(f"        /*{16 * i:04x}*/                   {line} ;   /* 0x0 */\n" for i, line in enumerate(lines))
    return "\n\t\tFunction : kernel\n" + text


MASKED_AND_NOT = code(
    "S2R R0, SR_TID.X",  # 0x00
    "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24",  # 0x10: the first loop masks
    "ISETP.GE.AND P1, PT, R2, R3, PT",
    "FSEL R4, R4, RZ, P1",
    "@P1 BRA 0x10",
    "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24",  # 0x50: the second does where it must
    "@!P2 BRA 0xd0",  # 0x60: waits out of line
    "@P3 BRA 0xa0",
    "FSEL R4, R4, RZ, P1",
    "FSEL R5, R5, RZ, P1",
    "MUFU.EX2 R4, R4",  # 0xa0
    "@P1 BRA 0x50",
    "EXIT",
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P2, [R3+URZ], R10",  # 0xd0
    "@!P2 BRA 0xd0",
    "BRA 0x70",  # 0xf0: back, and no loop
)


def test_cheapest_path_through_a_loop_is_found():
    (instructions,) = sass.functions(MASKED_AND_NOT).values()
    assert len(instructions) == 16
    assert sorted(sass._innermost_loops(instructions)) == [(1, 4), (5, 11)]
    steady = sass.steady_state(instructions)
    # The masking loop issues 4 for as many products; the other 5 with its jumps, and 7 where it masks.
    assert steady == {
        "instructions": 4,
        "multiply_adds": 64 * 64 * 16,
        "wgmma": 1,
        "exponential": 0,
        "float": 1,
        "memory": 0,
        "shape": "64x64x16",
        "transposed": "",
    }
    path = sass._best_path(instructions, 5, 11)
    assert [hex(instruction.address) for instruction in path] == ["0x50", "0x60", "0x70", "0xa0", "0xb0"]


def test_kernel_without_wgmma_loop_has_no_steady_state():
    straight = code("HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24", "EXIT")
    other = code("HMMA.16816.F32.BF16 R4, R8, R12, R4", "@P1 BRA 0x00", "EXIT")
    for text in (straight, other):
        (instructions,) = sass.functions(text).values()
        assert sass.steady_state(instructions) is None


@pytest.mark.parametrize(
    ("name", "products", "exponentials", "part"),
    [
        ("attention_forward_mosaic_gpu_kernel", 2, 34, "forward"),
        ("attention_dkv_mosaic_gpu_kernel", 3, 32, "dkv"),
        ("attention_dq_mosaic_gpu_kernel", 3, 32, "dq"),
        ("anonymous_mosaic_gpu_kernel", 3, 32, "dq"),
        ("anonymous_mosaic_gpu_kernel", 4, 48, "dkv"),
        ("anonymous_mosaic_gpu_kernel", 9, 32, None),
        ("anonymous_mosaic_gpu_kernel", 9, 0, None),
    ],
)
def test_part_is_identified_by_name_or_wgmma_count(name, products, exponentials, part):
    steady = {"multiply_adds": products * 64 * 64 * 128, "exponential": exponentials}
    assert sm90_tables.attention_kernel_kind({"name": name, "steady": steady}, 128) == part


LOOP = """
\t\tFunction : dw_kernel
        /*0000*/                   S2R R1, SR_TID.X ;                  /* 0x0 */
        /*0010*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P3, [UR16], R5 ;         /* 0x0 */
                                                                       /* 0x000fe20000000800 */
        /*0020*/              @!P3 BRA 0x00c0 ;                        /* 0x0 */
        /*0030*/               @P1 BRA 0x0060 ;                        /* 0x0 */
        /*0040*/                   LDS R4, [R2] ;                      /* 0x0 */
        /*0050*/                   STS [R2], R3 ;                      /* 0x0 */
        /*0060*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR16].tnspA.tnspB, R24 ;  /* 0x0 */
        /*0070*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR20].tnspA.tnspB, R24, gsb0 ;  /* 0x0 */
        /*0080*/             @!UP0 UIADD3 UR16, UR16, 0x1, URZ ;       /* 0x0 */
        /*0090*/               @P2 BRA 0x0010 ;                        /* 0x0 */
        /*00a0*/               @P4 BRA 0x0000 ;                        /* 0x0 */
        /*00b0*/                   EXIT ;                              /* 0x0 */
        /*00c0*/                   BRA 0x0020 ;                        /* 0x0 */
\t\tFunction : no_loop
        /*0000*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR16], R24 ;         /* 0x0 */
        /*0010*/                   BRA 0x0010 ;                        /* 0x0 */
"""


def test_loop_is_counted_along_its_shortest_path():
    """Wait, two branches, past the mask, two products, a step on, and back; with what the tensor cores are given."""
    by_name = {name: sass.steady_state(code) for name, code in sass.functions(LOOP).items()}
    assert by_name["no_loop"] is None
    steady = by_name["dw_kernel"]
    assert (steady["instructions"], steady["wgmma"], steady["shape"], steady["transposed"]) == (7, 2, "64x256x16", "AB")
