"""Reads what libtpu dumps: VLIW bundles, slots used of each unit, VMEM."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

_UTILISATION = re.compile(r"^\d+-(.+)-\d+-final_hlo-static-per-bundle-utilization\.txt$")
_SCHEDULE = re.compile(r"^\d+-(.+)-\d+-schedule-analysis_final_bundles\.txt$")
_BUNDLE = re.compile(r"\s*(0x[0-9a-f]+|0)\s")
_REGION = re.compile(r"Start(/End empty)? region (\d+)")
_JUMP = re.compile(r"sbr\.rel \(.*?\) target = \$region(\d+)")
_EMPTY = re.compile(r"empty scheduled bundles:\s+(\d+)")


@dataclass(frozen=True)
class Schedule:
    """One kernel's static schedule: a bundle is issued a cycle, loops count once."""

    bundles: int
    mxu: int
    mxu_slots: int
    """How many the bundles had: a bundle has several where the core has several units."""
    spills: int
    fills: int

    @property
    def mxu_share(self) -> float:
        """Slots used over slots there."""
        return self.mxu / self.mxu_slots if self.mxu_slots else 0.0


def utilisation(text: str) -> Schedule:
    """Sums of the per-bundle table: a row a bundle, a column a unit.

    Raises:
        ValueError: the text is not such a table.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    heads = [i for i, line in enumerate(lines) if line.startswith("==")]
    if len(heads) != 2 or heads[1] != heads[0] + 3:
        raise ValueError("libtpu's utilisation table has another form than this reader knows")
    names = [name.strip() for name in lines[heads[0] + 1].split(",")]
    capacity = dict(zip(names, map(int, lines[heads[0] + 2].split())))
    rows = [list(map(int, line.split())) for line in lines[heads[1] + 1 :]]
    if any(len(row) != len(names) for row in rows):
        raise ValueError(f"libtpu's utilisation table has rows of other lengths than its {len(names)} names")
    sums = dict(zip(names, map(sum, zip(*rows)))) if rows else {}
    # Newer generations list the two halves of the unit: pushing weights is not multiplying.
    unit = "MATMUL" if "MATMUL" in names else "MXU"
    slots = len(rows) * capacity.get(unit, 0)
    return Schedule(len(rows), sums.get(unit, 0), slots, sums.get("VSTORE:SPILL", 0), sums.get("VLOAD:FILL", 0))


def empty_bundles(text: str) -> int | None:
    """Bundles without an instruction, from the head of the schedule analysis."""
    found = _EMPTY.search(text[:2000])  # further down the file repeats the kernel's whole payload
    return int(found[1]) if found else None


def final(dumps: Path, kernel: str) -> str:
    """The final bundles of a kernel, as text."""
    (path,) = [path for path in dumps.glob(f"*-{kernel}-*-final_bundles.txt") if "schedule" not in path.name]
    return path.read_text()


class Part(NamedTuple):
    """Bundles from start to before stop that a jump leaves out, or, a loop, that it goes back over."""

    start: int
    stop: int
    loop: bool

    def inside(self, other: "Part") -> bool:
        """Whether all of it is in the other."""
        return other.start <= self.start and self.stop <= other.stop


def parts(text: str) -> tuple[int, list[Part]]:
    """(all bundles, the parts in order) of one kernel's final bundles."""
    where: dict[str, int] = {}  # regions
    jumps: list[tuple[int, str]] = []
    address = -1
    for line in text.splitlines():
        if not (found := _BUNDLE.match(line)):
            continue
        address = int(found[1], 16)
        for empty, region in _REGION.findall(line):
            if empty or region not in where:
                where[region] = address
        jumps += [(address, region) for region in _JUMP.findall(line)]
    spans = [(source, where[region]) for source, region in jumps if region in where]
    found = [Part(a + 1, b, False) if a < b else Part(b, a + 1, True) for a, b in spans]
    return address + 1, sorted(found)


def branches(text: str) -> list[int]:
    """Bundles of each part of a kernel's body that a step may jump over, in order: what each `pl.when` became.

    The longest part that can be jumped over is the body itself; what lies outside copies blocks in and out.

    Args:
        text: the final bundles of one kernel.
    """
    found = [part for part in parts(text)[1] if not part.loop]
    body = max(found, key=lambda part: part.stop - part.start, default=Part(0, 0, False))
    return [stop - start for start, stop, _ in found if body.start < start and stop <= body.stop]


def first_operand(text: str) -> int | None:
    """Length of the first of the tables that a kernel has in scalar memory."""
    found = re.search(r"shape: s32\[(\d+)\], index: 0\b", text)
    return int(found[1]) if found else None


def kernel_of(filename: str) -> tuple[str, str] | None:
    """("utilisation" or "schedule", kernel) of a dump file; None for other files and for the program's own frame."""
    for kind, pattern in (("utilisation", _UTILISATION), ("schedule", _SCHEDULE)):
        found = pattern.match(filename)
        if found and found[1] != "TLP" and not found[1].startswith("<"):
            return kind, found[1]
    return None


def vmem(report: str) -> dict[str, int]:
    """Kernel -> bytes of VMEM, from the data inside libtpu's report page."""
    start = re.search(r"DATA\s*=\s*(?=\{)", report)
    if not start:
        return {}
    data, _ = json.JSONDecoder().raw_decode(report, start.end())
    found: dict[str, int] = {}

    def walk(node: object) -> None:
        if isinstance(node, dict):
            for name, value in node.items():
                if isinstance(value, dict) and isinstance(value.get("total_size"), int):
                    found[name] = value["total_size"]
                walk(value)

    walk(data)
    return found


def custom_calls(hlo: str) -> set[str]:
    """Names of the instructions that are kernels written by hand."""
    pattern = r'(?m)^\s*(?:ROOT )?%?([\w.-]+) = .*custom_call_target="tpu_custom_call"'
    return set(re.findall(pattern, hlo))
