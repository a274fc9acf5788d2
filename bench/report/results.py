"""What a bench run leaves behind: one small JSON file an operation, under profiles/<device>/."""

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
Row = dict[str, Any]


def device_folder(platform: str, device: str) -> str:
    """The name of a device's folder in profiles/: "cpu" for any CPU, else the device's own name."""
    return "cpu" if platform == "cpu" else re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def from_pytest(raw: Mapping[str, Any], date: datetime.date | None = None) -> dict[str, dict[str, Any]]:
    """What is kept of a `--benchmark-json` file: operation -> the document that `write` saves."""
    return documents(raw["bench"], [(bench["extra_info"], bench["stats"]["data"]) for bench in raw["benchmarks"]], date)


def documents(
    run: Mapping[str, Any],
    measured: Sequence[tuple[Mapping[str, Any], Sequence[float]]],
    date: datetime.date | None = None,
) -> dict[str, dict[str, Any]]:
    """Operation -> the document that `write` saves.

    Args:
        run: what belongs to all rows: device, platform, timer, jax, ceilings, and the rows that were refused.
        measured: facts about each row (`bench.record.facts_of`) and its times in seconds.

    Times are medians in seconds with the interquartile range; FLOP/s and bytes/s count what `dantinox.kernels.cost`
    says must be done and moved; `roofline` is the least time that the measured ceilings allow over the median.
    """
    head = {
        "date": str(date or datetime.date.today()),
        "device": run["device"],
        "platform": run["platform"],
        "timer": run["timer"],
        "versions": {"jax": run["jax"]},
        "ceilings": {name: _short(value) for name, value in run["ceilings"].items()},
    }
    found: dict[str, dict[str, Any]] = {}
    for facts, seconds in measured:
        row = _row(facts, seconds)
        found.setdefault(row.pop("op"), head | {"rows": [], "refused": []})["rows"].append(row)
    for refused in run["refused"]:
        op = refused["op"]
        kept = {name: value for name, value in refused.items() if name != "op"}
        found.setdefault(op, head | {"rows": [], "refused": []})["refused"].append(kept)
    return found


def _row(facts: Mapping[str, Any], seconds: Sequence[float]) -> Row:
    low, middle, high = np.percentile(seconds, [25, 50, 75])
    names = ("op", "spec", "sizes", "dtype", "direction", "implementation", "sweep")
    return {name: facts[name] for name in names} | {
        "seconds": _short(middle),
        "spread": _short((high - low) / middle),
        "turns": len(seconds),
        "flops_per_second": _short(facts["flops"] / middle),
        "bytes_per_second": _short(facts["bytes"] / middle),
        "intensity": _short(facts["flops"] / facts["bytes"]),
        "roofline": _short(facts["roofline_seconds"] / middle),
        "temp_bytes": facts["temp_bytes"],
        "error": None if facts["error"] is None else _short(facts["error"]),
    }


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def write(documents: Mapping[str, Mapping[str, Any]], profiles: Path) -> list[Path]:
    """Save each operation's document as profiles/<device>/<date>-<op>.json; returns the paths.

    What a file of that name has of the same versions and timer and was not measured anew stays in it.
    """
    paths = []
    for op, document in documents.items():
        folder = profiles / device_folder(document["platform"], document["device"])
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{document['date']}-{op}.json"
        path.write_text(dumps(_merged(path, document)))
        paths.append(path)
    return paths


def _merged(path: Path, document: Mapping[str, Any]) -> Mapping[str, Any]:
    """The document, after the rows of the file that it does not have."""
    before = json.loads(path.read_text()) if path.exists() else {}
    if any(before.get(name) != document[name] for name in ("device", "versions", "timer")):
        return document
    key = lambda row: (row["spec"], row["direction"], row["implementation"])
    new = {key(row) for name in ("rows", "refused") for row in document[name]}
    kept = {name: [row for row in before[name] if key(row) not in new] for name in ("rows", "refused")}
    return {**document, **{name: kept[name] + document[name] for name in kept}}


def dumps(document: Mapping[str, Any]) -> str:
    """JSON with one row a line: small, and a diff shows which row moved."""
    head = {name: value for name, value in document.items() if name not in ("rows", "refused")}
    lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in head.items()]
    for name in ("rows", "refused"):
        rows = ",\n".join(f"  {json.dumps(row)}" for row in document[name])
        lines.append(f' "{name}": [\n{rows}\n ]' if rows else f' "{name}": []')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def by_contest(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """(spec, direction) -> its rows, in order."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["spec"], row["direction"]), []).append(row)
    return groups


def fastest(rows: Sequence[Row]) -> float:
    """Seconds of the fastest implementation; a yardstick computes something else, has no error, and does not count."""
    return min(row["seconds"] for row in ([row for row in rows if row["error"] is not None] or rows))
