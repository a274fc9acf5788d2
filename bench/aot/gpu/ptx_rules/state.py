"""The state of a dry run: warpgroups and mbarriers."""

from dataclasses import dataclass, field

import numpy as np

from bench.aot.gpu.ptx_rules.program import Instruction
from bench.aot.gpu.ptx_rules.values import Value

WARPGROUP = 128  # threads


class UnresolvedError(Exception):
    """The text does not say what happens at a line: (line, reason)."""


@dataclass
class Barrier:
    """An mbarrier.

    Attributes:
        count: arrivals per phase.
        pending: arrivals that are missing in this phase.
        bytes: expected and not arrived yet; negative where more arrived than was expected.
        phase: number of complete phases.
        visible: whether a barrier of the block has followed its initialization.
        line, arrival_line, expect_line: of its initialization, and of the last arrival and expected bytes.
    """

    count: int
    pending: int
    line: int
    bytes: int = 0
    phase: int = 0
    visible: bool = False
    arrival_line: int = 0
    expect_line: int = 0

    def complete(self) -> None:
        """Begin the next phase if nothing is missing in this one."""
        if self.pending == 0 and self.bytes == 0:
            self.phase += 1
            self.pending = self.count


@dataclass
class Warpgroup:
    """A warpgroup.

    Attributes:
        index: its number.
        thread: index in the block of each of its threads.
        registers: values by name.
        next: the instruction that it runs next.
        steps: how many it has run.
        barrier_wait: the address and parity of the mbarrier that it waits for, and the line.
        named_wait: the number of the bar.sync that it waits at, and the line.
        done: whether it has ended.
        max_registers: its last setmaxnreg.
    """

    index: int
    thread: np.ndarray
    registers: dict[str, Value] = field(default_factory=dict)
    next: int = 0
    steps: int = 0
    barrier_wait: tuple[int, int, int] | None = None
    named_wait: tuple[int, int] | None = None
    done: bool = False
    max_registers: Instruction | None = None
