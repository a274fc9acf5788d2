"""Read what libtpu dumps: VLIW bundles, slots that each unit uses, VMEM."""

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

_UTILISATION = re.compile(r"^\d+-(.+)-\d+-final_hlo-static-per-bundle-utilization\.txt$")
_SCHEDULE = re.compile(r"^\d+-(.+)-\d+-schedule-analysis_final_bundles\.txt$")
_BUNDLE = re.compile(r"\s*(0x[0-9a-f]+|0)\s")
_REGION = re.compile(r"Start(/End empty)? region (\d+)")
_JUMP = re.compile(r"sbr\.rel \(.*?\) target = \$region(\d+)")
_TRANSFER = re.compile(r" = dma\.(?!done|vmem_to_smem|hbm_to_smem)\w+ (?:\[[^]]*\] *)?(\(!?%p)?")
_OPERAND = re.compile(r"inlined_call_operand\.[^\[]*\[shape: ([^,]+(?:,\d+)*\]), index: (\d+), kind: (\w+)")
_EMPTY = re.compile(r"empty scheduled bundles:\s+(\d+)")


@dataclass(frozen=True)
class Schedule:
    """One kernel's static schedule; a core issues one bundle per cycle. A loop counts once."""

    bundles: int
    mxu: int
    mxu_slots: int
    """Slots of all bundles; a bundle has several where the core has several units."""
    spills: int
    fills: int

    @property
    def mxu_share(self) -> float:
        """Fraction of the slots that are used."""
        return self.mxu / self.mxu_slots if self.mxu_slots else 0.0


def usage_by_unit(text: str) -> tuple[dict[str, int], dict[str, list[int]]]:
    """Read the per-bundle table, which has a row per bundle and a column per unit.

    Args:
        text: the table.

    Returns:
        The slots of each unit in a bundle, and the slots that each bundle uses.

    Raises:
        ValueError: the text is not a table in this format.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    heads = [i for i, line in enumerate(lines) if line.startswith("==")]
    if len(heads) != 2 or heads[1] != heads[0] + 3:
        raise ValueError("libtpu's utilisation table has an unknown format")
    names = [name.strip() for name in lines[heads[0] + 1].split(",")]
    capacity = dict(zip(names, map(int, lines[heads[0] + 2].split())))
    rows = [list(map(int, line.split())) for line in lines[heads[1] + 1 :]]
    if any(len(row) != len(names) for row in rows):
        raise ValueError(f"libtpu's utilisation table has rows with more or fewer than its {len(names)} columns")
    columns = list(zip(*rows)) if rows else [()] * len(names)
    return capacity, {name: list(column) for name, column in zip(names, columns)}


def matrix_unit(names: Collection[str]) -> str:
    """The matrix unit's column: newer generations list its halves, and pushing weights is not multiplying."""
    return "MATMUL" if "MATMUL" in names else "MXU"


def utilisation(text: str) -> Schedule:
    """Sum the per-bundle table.

    Raises:
        ValueError: the text is not a table in this format.
    """
    capacity, used = usage_by_unit(text)
    sums = {name: sum(column) for name, column in used.items()}
    num_bundles = max(map(len, used.values()), default=0)
    unit = matrix_unit(used)
    slots = num_bundles * capacity.get(unit, 0)
    return Schedule(num_bundles, sums.get(unit, 0), slots, sums.get("VSTORE:SPILL", 0), sums.get("VLOAD:FILL", 0))


def empty_bundles(text: str) -> int | None:
    """Read the number of bundles without an instruction from the head of the schedule analysis."""
    count = _EMPTY.search(text[:2000])  # further down, the file repeats the kernel's payload
    return int(count[1]) if count else None


def read_final_bundles(dumps: Path, kernel: str) -> str:
    """Read the final bundles of a kernel, as text."""
    (path,) = [path for path in dumps.glob(f"*-{kernel}-*-final_bundles.txt") if "schedule" not in path.name]
    return path.read_text("utf-8")


def read_usage(dumps: Path, kernel: str) -> dict[str, list[int]]:
    """Read the slots that each bundle of a kernel uses, by unit."""
    paths = [path for path in dumps.iterdir() if kernel_of(path.name) == ("utilisation", kernel)]
    return usage_by_unit(paths[0].read_text("utf-8"))[1] if paths else {}


class Region(NamedTuple):
    """Bundles from `start` to before `stop` that a jump skips or, if `loop`, repeats."""

    start: int
    stop: int
    loop: bool

    def size(self) -> int:
        """Number of bundles."""
        return self.stop - self.start

    def bundles(self) -> range:
        """Addresses of the bundles."""
        return range(self.start, self.stop)

    def inside(self, other: "Region") -> bool:
        """Whether the other region contains this one."""
        return other.start <= self.start and self.stop <= other.stop


def regions(text: str) -> tuple[int, list[Region]]:
    """Find the regions of one kernel.

    Args:
        text: its final bundles.

    Returns:
        The number of all bundles, and the regions in order.
    """
    addresses: dict[str, int] = {}  # libtpu's region -> its first bundle
    jumps: list[tuple[int, str]] = []
    address = -1
    for line in text.splitlines():
        if not (bundle := _BUNDLE.match(line)):
            continue
        address = int(bundle[1], 16)
        for empty, label in _REGION.findall(line):
            if empty or label not in addresses:
                addresses[label] = address
        jumps += [(address, label) for label in _JUMP.findall(line)]
    spans = [(source, addresses[label]) for source, label in jumps if label in addresses]
    return address + 1, sorted(Region(a + 1, b, False) if a < b else Region(b, a + 1, True) for a, b in spans)


def is_pipelined(text: str) -> bool:
    """Whether a grid loads the blocks of the next step. Its steps then have a region, because the first only loads."""
    return "iteration index, stage = 1" in text


def transfer_starts(text: str) -> dict[int, bool]:
    """Find the bundles of a kernel that start a transfer between HBM and VMEM, given its final bundles.

    Returns:
        Address of a bundle -> whether a predicate decides if it starts the transfer.
    """
    found, address = {}, -1
    for line in text.splitlines():
        if bundle := _BUNDLE.match(line):
            address = int(bundle[1], 16)
        if transfer := _TRANSFER.search(line):
            found[address] = bool(transfer[1])
    return found


def operand_shapes(text: str) -> tuple[list[str], list[str]]:
    """List the shapes of a kernel's operands and of its results, in order, given its final bundles: "bf16[8,128]"."""
    found = sorted({(int(number), shape, kind) for shape, number, kind in _OPERAND.findall(text)})
    inputs, outputs = ([shape for _, shape, kind in found if kind == each] for each in ("input", "output"))
    return inputs, outputs


def strided_transfers(text: str) -> list[int]:
    """Find the bundles of a kernel that start a transfer of a block in several pieces, given its final bundles."""
    found, address = [], -1
    for line in text.splitlines():
        if bundle := _BUNDLE.match(line):
            address = int(bundle[1], 16)
        if " = dma.general " in line:
            found.append(address)
    return found


def branch_sizes(text: str) -> list[int]:
    """Count the bundles of each part of a kernel's body that a step may skip, in order: one entry per `pl.when`.

    The longest region that can be skipped is the body itself; the code around it copies blocks in and out.

    Args:
        text: the final bundles of one kernel.
    """
    branches = [region for region in regions(text)[1] if not region.loop]
    body = max(branches, key=Region.size, default=Region(0, 0, False))
    return [branch.size() for branch in branches if body.start < branch.start and branch.stop <= body.stop]


def first_table_length(text: str) -> int | None:
    """Length of the first table that a kernel has in scalar memory; None without one."""
    shape = re.search(r"shape: s32\[(\d+)\], index: 0\b", text)
    return int(shape[1]) if shape else None


def kernel_of(filename: str) -> tuple[str, str] | None:
    """("utilisation" or "schedule", kernel) of a dump file; None for other files and for the program's own frame."""
    for kind, pattern in (("utilisation", _UTILISATION), ("schedule", _SCHEDULE)):
        match = pattern.match(filename)
        if match and match[1] != "TLP" and not match[1].startswith("<"):
            return kind, match[1]
    return None


def vmem_bytes(report: str) -> dict[str, int]:
    """Read the bytes of VMEM of each kernel from the data inside libtpu's report page."""
    start = re.search(r"DATA\s*=\s*(?=\{)", report)
    if not start:
        return {}
    data, _ = json.JSONDecoder().raw_decode(report, start.end())
    sizes: dict[str, int] = {}

    def walk(node: object) -> None:
        if isinstance(node, dict):
            for name, value in node.items():
                if isinstance(value, dict) and isinstance(value.get("total_size"), int):
                    sizes[name] = value["total_size"]
                walk(value)

    walk(data)
    return sizes


def custom_calls(hlo: str) -> set[str]:
    """Find the instructions of an HLO module that call hand-written kernels."""
    pattern = r'(?m)^\s*(?:ROOT )?%?([\w.-]+) = .*custom_call_target="tpu_custom_call"'
    return set(re.findall(pattern, hlo))
