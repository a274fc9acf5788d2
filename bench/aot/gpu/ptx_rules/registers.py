"""The rule on registers: what the warpgroups take by setmaxnreg is there."""

from collections.abc import Iterable, Iterator

from bench.aot.gpu.ptx_rules.finding import Finding
from bench.aot.gpu.ptx_rules.program import Instruction

PER_BLOCK = 65_536  # registers of an SM, which one block may have
UNIT = 8  # registers per thread come in multiples of it
LEAST, MOST = 24, 256  # that setmaxnreg takes


def check(
    threads: int, at_launch: int | None, warpgroups: Iterable[tuple[int, Instruction | None]]
) -> Iterator[Finding]:
    """Yield what is wrong with the registers of a block.

    Args:
        threads: per block.
        at_launch: registers per thread that the block starts with; None: as many as it can have.
        warpgroups: the threads of each and its setmaxnreg, or None.
    """
    start = min(PER_BLOCK // threads, 255) if at_launch is None else at_launch + UNIT - 1
    start = start // UNIT * UNIT
    if start * threads > PER_BLOCK:
        yield Finding("registers", 0, f"{threads} threads start with {start} registers each, of {PER_BLOCK}")
    total, last_line = 0, 0
    for group_threads, setting in warpgroups:
        value = int(setting.operands[0]) if setting else start
        total += value * group_threads
        if setting is None:
            continue
        line, increases = setting.line, ".inc." in setting.opcode
        if value % UNIT or not LEAST <= value <= MOST:
            yield Finding("registers", line, f"setmaxnreg {value}; allowed: multiples of {UNIT} from {LEAST} to {MOST}")
        if value < start if increases else value > start:
            yield Finding("registers", line, f"{setting.opcode} to {value}, from {start} registers")
        last_line = line if increases else last_line
    if last_line and total > start * threads:
        text = f"the warpgroups take {total} registers by setmaxnreg, and the block starts with {start * threads}"
        yield Finding("registers", last_line, text)
