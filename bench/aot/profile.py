"""profiles/aot/<target>.json: what the compilers made of every program, and whether a new run is worse.

A row a line, in sorted order and without times, so that two runs are one text and a change is a small diff.
"""

import json
import math
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Profile = dict[str, Any]

TEMP_GROWTH = 1.05
MXU_FALL = 0.005  # of a share: less is the last digit
BUNDLE_GROWTH = 1.01
STEADY_GROWTH = 1.03
MOVED_GROWTH = 1.001  # counted, not measured


def path(folder: Path, target: str) -> Path:
    """Where a target's profile lies."""
    return folder / f"{target}.json"


def load(file: Path) -> Profile | None:
    """The profile in a file, None where there is no file.

    Raises:
        ValueError: the file is no profile.
    """
    if not file.exists():
        return None
    try:
        profile = json.loads(file.read_text())
        profile["rows"].items()
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{file.name} is no profile of bench.aot") from None
    return profile


def merged(before: Profile | None, target: str, versions: dict[str, str], rows: dict[str, Row]) -> Profile:
    """A profile with the new rows in place of the old ones of the same key; other compilers' rows are dropped."""
    old = before["rows"] if before and before.get("versions") == versions else {}
    return {"target": target, "versions": versions, "rows": old | rows}


def dump(profile: Profile) -> str:
    """The file's text."""
    compact = lambda value: json.dumps(value, sort_keys=True, ensure_ascii=False)
    rows = [f"  {compact(key)}: {compact(row)}" for key, row in sorted(profile["rows"].items())]
    return (
        f'{{\n "target": {compact(profile["target"])},\n "versions": {compact(profile["versions"])},\n'
        + ' "rows": {\n'
        + ",\n".join(rows)
        + "\n }\n}\n"
    )


def save(file: Path, profile: Profile) -> None:
    """Write it, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(dump(profile))
    partial.replace(file)


def regressions(committed: dict[str, Row], now: dict[str, Row]) -> list[str]:
    """One line for each way in which a row that both have is worse now."""
    found = []
    for key in sorted(now.keys() & committed.keys()):
        found += [f"{key}: {what}" for what in _worse(committed[key], now[key])]
    return found


def _worse(old: Row, new: Row) -> list[str]:
    if old["status"] != "compiled":
        return []
    if new["status"] != "compiled":
        return [f"compiled before, now {new['status']}: {new.get('reason', '')}"]
    found = []
    if new["temp_bytes"] > old["temp_bytes"] * TEMP_GROWTH:
        found.append(f"temp bytes {old['temp_bytes']:,} -> {new['temp_bytes']:,}")
    found += _spills("", old["totals"], new["totals"])
    before, after = (row.get("bundles_per_pair", {}) for row in (old, new))
    for direction in sorted(before.keys() & after.keys()):
        if after[direction] > before[direction] * BUNDLE_GROWTH:
            found.append(f"{direction}: bundles per pair {before[direction]:g} -> {after[direction]:g}")
    same = _numbered(old["kernels"])
    for name, kernel in _numbered(new["kernels"]).items():
        if name in same:
            found += _worse_kernel(name, same[name], kernel)
    return found


def _worse_kernel(name: str, old: Row, new: Row) -> list[str]:
    found = _spills(f"{name}: ", old, new)
    if (old.get("blocks") or 0) > (new.get("blocks") or 0):
        was, now = (f"{k['blocks']} blocks an SM ({k['registers']} registers)" for k in (old, new))
        found.append(f"{name}: {was} -> {now}")
    before, after = (each.get("steady", {}).get("instructions", 0) for each in (old, new))
    if before and after > before * STEADY_GROWTH:
        found.append(f"{name}: {before} -> {after} instructions a tile")
    before, after = (each.get("moved", {}) for each in (old, new))
    for how in sorted(before.keys() & after.keys()):
        if after[how] > before[how] * MOVED_GROWTH:
            found.append(f"{name}: {before[how]:,} -> {after[how]:,} bytes moved, {how}")
    for unit in ("wgmma", "tcgen05"):
        if old.get(unit) and not new.get(unit):
            found.append(f"{name}: {unit} is gone")
    # Where the bundles executed are known, a longer program or a lower share of fewer slots is not worse.
    if not ("bundles_per_pair" in old and "bundles_per_pair" in new):
        if new.get("bundles", 0) > old.get("bundles", math.inf) * BUNDLE_GROWTH:
            found.append(f"{name}: bundles {old['bundles']} -> {new['bundles']}")
        if old.get("mxu_share", 0) - new.get("mxu_share", 0) > MXU_FALL:
            found.append(f"{name}: MXU share {old['mxu_share']:.1%} -> {new['mxu_share']:.1%}")
    return found


def _spills(prefix: str, old: Row, new: Row) -> list[str]:
    """Spills that came, or grew."""
    names = {"spill_bytes": "spill bytes", "spills": "spill slots", "fills": "fill slots"}
    return [
        f"{prefix}{text} {old[name]} -> {new[name]}"
        for name, text in names.items()
        if name in old and name in new and new[name] > old[name]
    ]


def _numbered(kernels: list[Row]) -> dict[str, Row]:
    """Kernels by name; those of one name, in the order of their figures, by name and number."""
    found: dict[str, Row] = {}
    for kernel in sorted(kernels, key=lambda k: json.dumps(k, sort_keys=True)):
        same = sum(name.split(" #")[0] == kernel["name"] for name in found)
        found[kernel["name"] if not same else f"{kernel['name']} #{same + 1}"] = kernel
    return found
