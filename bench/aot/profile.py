"""Read and write profiles/aot/<target>.json, what the compiler made of every program, and compare two of them.

The file has one row per line, in sorted order and without times, so that two equal runs give the same text and a change
is a small diff.
"""

import json
import math
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Profile = dict[str, Any]

TEMP_GROWTH = 1.05
MXU_LOSS = 0.005  # of a fraction: less is rounding
BUNDLE_GROWTH = 1.01
XLA_GROWTH = 1.05  # of cycles that are estimates
STEADY_GROWTH = 1.03
BYTES_MOVED_GROWTH = 1.001  # counted, not measured


def path(folder: Path, target: str) -> Path:
    """The path of a target's profile."""
    return folder / f"{target}.json"


def load(file: Path) -> Profile | None:
    """Load a profile; None if there is no such file.

    Raises:
        ValueError: the file is not a profile.
    """
    if not file.exists():
        return None
    try:
        profile = json.loads(file.read_text("utf-8"))
        profile["rows"].items()
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{file.name} is not a profile of bench.aot") from None
    return profile


def merge(before: Profile | None, target: str, versions: dict[str, str], rows: dict[str, Row]) -> Profile:
    """Replace rows of a profile by new rows with the same key; drop rows of other compiler versions."""
    old = before["rows"] if before and before.get("versions") == versions else {}
    return {"target": target, "versions": versions, "rows": old | rows}


def dump(profile: Profile) -> str:
    """Format a profile as the text of its file."""

    def compact(value: Any) -> str:
        return json.dumps(value, sort_keys=True, ensure_ascii=False)

    rows = [f"  {compact(key)}: {compact(row)}" for key, row in sorted(profile["rows"].items())]
    return (
        f'{{\n "target": {compact(profile["target"])},\n "versions": {compact(profile["versions"])},\n'
        + ' "rows": {\n'
        + ",\n".join(rows)
        + "\n }\n}\n"
    )


def save(file: Path, profile: Profile) -> None:
    """Write a profile atomically."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(dump(profile), "utf-8")
    partial.replace(file)


def regressions(committed: dict[str, Row], new: dict[str, Row]) -> list[str]:
    """Return a line for each way in which a row that both profiles have got worse."""
    lines = []
    for key in sorted(new.keys() & committed.keys()):
        lines += [f"{key}: {line}" for line in _row_regressions(committed[key], new[key])]
    return lines


def _row_regressions(old: Row, new: Row) -> list[str]:
    if old["status"] != "compiled":
        return []
    if new["status"] != "compiled":
        return [f"compiled before, now {new['status']}: {new.get('reason', '')}"]
    lines = []
    if new["temp_bytes"] > old["temp_bytes"] * TEMP_GROWTH:
        lines.append(f"temp bytes {old['temp_bytes']:,} -> {new['temp_bytes']:,}")
    lines += _spill_regressions("", old["totals"], new["totals"])
    before, after = (row.get("bundles_per_pair", {}) for row in (old, new))
    for direction in sorted(before.keys() & after.keys()):
        if after[direction] > before[direction] * BUNDLE_GROWTH:
            lines.append(f"{direction}: bundles per pair {before[direction]:g} -> {after[direction]:g}")
    before, after = (row.get("xla_cycles", 0) for row in (old, new))
    if before and after > before * XLA_GROWTH:
        lines.append(f"cycles of XLA {before:,} -> {after:,}")
    old_kernels = _number_kernels(old["kernels"])
    for name, kernel in _number_kernels(new["kernels"]).items():
        if name in old_kernels:
            lines += _kernel_regressions(name, old_kernels[name], kernel)
    return lines


def _kernel_regressions(name: str, old: Row, new: Row) -> list[str]:
    lines = _spill_regressions(f"{name}: ", old, new)
    if (old.get("blocks") or 0) > (new.get("blocks") or 0):
        before, after = (f"{k['blocks']} blocks per SM ({k['registers']} registers)" for k in (old, new))
        lines.append(f"{name}: {before} -> {after}")
    before, after = (kernel.get("steady", {}).get("instructions", 0) for kernel in (old, new))
    if before and after > before * STEADY_GROWTH:
        lines.append(f"{name}: {before} -> {after} instructions per tile")
    before, after = (kernel.get("moved", {}) for kernel in (old, new))
    for skew in sorted(before.keys() & after.keys()):
        if after[skew] > before[skew] * BYTES_MOVED_GROWTH:
            lines.append(f"{name}: {before[skew]:,} -> {after[skew]:,} bytes moved, {skew}")
    for unit in ("wgmma", "tcgen05"):
        if old.get(unit) and not new.get(unit):
            lines.append(f"{name}: {unit} is gone")
    # If the executed bundles are known, neither a longer program nor a lower share of fewer slots is worse.
    if not ("bundles_per_pair" in old and "bundles_per_pair" in new):
        if new.get("bundles", 0) > old.get("bundles", math.inf) * BUNDLE_GROWTH:
            lines.append(f"{name}: bundles {old['bundles']} -> {new['bundles']}")
        if old.get("mxu_share", 0) - new.get("mxu_share", 0) > MXU_LOSS:
            lines.append(f"{name}: MXU share {old['mxu_share']:.1%} -> {new['mxu_share']:.1%}")
    return lines


def _spill_regressions(prefix: str, old: Row, new: Row) -> list[str]:
    """Return a line for each kind of spill that grew."""
    names = {"spill_bytes": "spill bytes", "spills": "spill slots", "fills": "fill slots"}
    return [
        f"{prefix}{text} {old[name]} -> {new[name]}"
        for name, text in names.items()
        if name in old and name in new and new[name] > old[name]
    ]


def _number_kernels(kernels: list[Row]) -> dict[str, Row]:
    """Map names to kernels; kernels of the same name get numbers, in the order of their figures."""
    numbered: dict[str, Row] = {}
    for kernel in sorted(kernels, key=lambda k: json.dumps(k, sort_keys=True)):
        count = sum(name.split(" #")[0] == kernel["name"] for name in numbered)
        numbered[kernel["name"] if not count else f"{kernel['name']} #{count + 1}"] = kernel
    return numbered
