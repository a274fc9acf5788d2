"""From a program counter of a hung kernel to the source line of its barrier."""

import subprocess
import sys
from pathlib import Path

import pytest

from bench.aot import locate

ROOT = Path(__file__).parents[3]
# As nvdisasm -g -c writes it: a wait that tries once in line and then, out of line, sleeps and tries again.
LISTING = """
\t.section\t.text.attention_forward,"ax",@progbits
.text.attention_forward:
\t//## File "/somewhere/ops/attention/fwd.py", line 399
        /*0000*/                   @UP1 SYNCS.EXCH.64 URZ, [UR6+0x28800], UR12 ;
        /*0010*/                   @UP1 SYNCS.EXCH.64 URZ, [UR6+0x28808], UR24 ;
\t//## File "/somewhere/ops/attention/fwd.py", line 234
        /*0020*/                   IMAD R0, R1, R2, R3 ;
\t//## File "/somewhere/ops/attention/fwd.py", line 172
        /*0030*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR8], R4 ;
        /*0040*/              @!P1 BRA `(.L_x_26) ;
.L_x_2:
        /*0050*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR16], RZ, !UPT ;
        /*0060*/                   EXIT ;
\t//## File "/somewhere/ops/attention/fwd.py", line 399
.L_x_26:
        /*0070*/                   IMAD.U32 R5, RZ, RZ, UR8 ;
        /*0080*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R5+URZ], R4 ;
        /*0090*/              @!P1 NANOSLEEP.SYNCS 0x989680 ;
        /*00a0*/              @!P1 BRA `(.L_x_26) ;
        /*00b0*/                   BRA `(.L_x_2) ;
"""
LOG = """
Device 0 SM 0
*   0  0xffffffff 0x00000000 0x00007fffd8fa1090    0   (0,0,0)    (0,0,0)
    4  0xffffffff 0x00000000 0x00007fffd8fa1050    0   (0,0,0)    (128,0,0)
=> 0x7fffd8fa1090 <attention_forward+144>:\tNANOSLEEP.SYNCS 0x989680
"""


def test_listing_is_parsed_with_instruction_sources():
    (code,) = locate.parse_listing(LISTING).values()
    assert [instruction.offset for instruction in code] == list(range(0, 0xC0, 16))
    assert code[3].source[:2] == ("ops/attention/fwd.py:172", "ops/attention/fwd.py:234")
    assert [instruction.label for instruction in code if instruction.label] == [".L_x_2", ".L_x_26"]
    assert locate.barriers(code) == ["[UR6+0x28800]", "[UR6+0x28808]"]


def test_program_counters_are_found_relative_to_their_kernel():
    assert list(locate.program_counters(LOG)) == [("attention_forward", 0x90), ("attention_forward", 0x50)]
    assert not list(locate.program_counters("no kernels are running at 0x00007fffd8fa1090"))


def test_out_of_line_sleep_maps_to_its_barrier_wait():
    (code,) = locate.parse_listing(LISTING).values()
    first, wait, source = locate.describe("attention_forward", 0x90, code)
    assert "NANOSLEEP" in first and "[UR8]" in wait
    assert source.startswith("  source: ops/attention/fwd.py:172, after ops/attention/fwd.py:234")


def test_program_prints_counters_barriers_and_sources(tmp_path, capsys):
    (tmp_path / "attention_forward.sass").write_text(LISTING)
    (tmp_path / "log").write_text(LOG)
    assert locate.main([str(tmp_path / "log"), str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "barriers at [UR6+0x28800], [UR6+0x28808]" in printed
    assert "attention_forward+0x50: HGMMA" in printed and "fwd.py:172" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("log", "."), "log is not a file"),
        (("only one",), "give LOG and the FOLDER"),
        ((__file__, "bench/gpu"), "no .sass file"),
    ],
    ids=["no log", "one argument", "no listing"],
)
def test_invalid_input_prints_one_line(arguments, message):
    command = [sys.executable, "-m", "bench.aot.locate", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1 and not done.stdout
