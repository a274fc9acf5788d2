"""Count the cycles of XLA's own operations around hand-written kernels, as libtpu estimates them.

libtpu writes an estimate into the backend configuration of each instruction that it schedules. It is static and knows
no contention. Instructions without an estimate count nothing: some transfers between HBM and VMEM that run beside other
operations, and those where libtpu writes -1, as an unsigned number, or the largest signed number. A loop counts once.
"""

import re

_ESTIMATE = re.compile(r'"estimated_cycles":"?(\d+)')
UNKNOWN = 2**63 - 1
_KERNEL = 'custom_call_target="tpu_custom_call"'


def count(hlo: str) -> int:
    """Sum the estimates of all instructions but those that call a hand-written kernel.

    Args:
        hlo: the optimized module of a compiled program, as text.
    """
    instructions = (line for line in hlo.splitlines() if _KERNEL not in line)
    estimates = (int(match[1]) for line in instructions if (match := _ESTIMATE.search(line)))
    return sum(cycles for cycles in estimates if cycles < UNKNOWN)
