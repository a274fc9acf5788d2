"""The results of a benchmark run: one small JSON file per operation, under profiles/<device>/."""

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np

from bench.report import cpu
from dantinox import kernels

ROOT = Path(__file__).parents[2]


class Row(TypedDict):
    """Result of one implementation on one workload in one direction.

    `seconds` is the median over the turns and `spread` the interquartile range over it. FLOP/s and bytes/s count what
    `dantinox.kernels.cost` says must be done and moved. `roofline` is the least time that the measured ceilings allow
    over the median. A row that an earlier run measured under other ceilings than those of the file's head has its own.
    """

    spec: str
    sizes: str
    dtype: str
    direction: str
    implementation: str
    sweep: dict[str, float]
    seconds: float
    spread: float
    turns: int
    flops_per_second: float
    bytes_per_second: float
    intensity: float
    roofline: float
    temp_bytes: int
    error: float | None
    ceilings: NotRequired[dict[str, float]]


class SkippedRow(TypedDict):
    """An implementation that has no times for a workload, and why."""

    spec: str
    direction: str
    implementation: str
    why: str


class Document(TypedDict):
    """All results of one operation; files of earlier versions have no `cpu`.

    `date`, `cpu` and `ceilings` are those of the newest run that wrote the file.
    """

    date: str
    device: str
    platform: str
    cpu: NotRequired[cpu.CPU]
    timer: str
    versions: dict[str, str]
    ceilings: dict[str, float]
    rows: list[Row]
    refused: list[SkippedRow]


def custom_implementations(ops: Sequence[str], chosen: Sequence[str] = ()) -> list[str]:
    """List the implementations of these operations that are not built in; only those in `chosen`, unless it is empty.

    Their results are the reader's own: by default programs write them below runs/, not into the committed profiles/.
    """
    names = kernels.implementation_names(*ops)
    return [name for name in names if name not in kernels.IMPLEMENTATION_NAMES and (not chosen or name in chosen)]


def device_folder(platform: str, device: str) -> str:
    """Name a device's folder in profiles/: "cpu" for any CPU, else the device's own name."""
    return "cpu" if platform == "cpu" else re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def from_pytest(raw: Mapping[str, Any], date: datetime.date | None = None) -> dict[str, Document]:
    """Convert the content of a `--benchmark-json` file; see `documents`."""
    return documents(raw["bench"], [(bench["extra_info"], bench["stats"]["data"]) for bench in raw["benchmarks"]], date)


def documents(
    run: Mapping[str, Any],
    measured: Sequence[tuple[Mapping[str, Any], Sequence[float]]],
    date: datetime.date | None = None,
) -> dict[str, Document]:
    """Make the document of each operation.

    Args:
        run: facts about the run (`bench.operations.record.run_facts`).
        measured: facts about each entry (`bench.operations.record.entry_facts`) and its times in seconds.
        date: the day of the run (default: today).

    Returns:
        The documents by operation, for `write`.
    """
    head = {
        "date": str(date or datetime.date.today()),
        "device": run["device"],
        "platform": run["platform"],
        **({"cpu": run["cpu"]} if "cpu" in run else {}),
        "timer": run["timer"],
        "versions": {"jax": run["jax"]},
        "ceilings": {name: _round(value) for name, value in run["ceilings"].items()},
    }
    by_op: dict[str, Document] = {}

    def document(op: str) -> Document:
        return by_op.setdefault(op, head | {"rows": [], "refused": []})

    for facts, seconds in measured:
        document(facts["op"])["rows"].append(_row(facts, seconds))
    for skipped in run["refused"]:
        document(skipped["op"])["refused"].append({name: skipped[name] for name in skipped if name != "op"})
    return by_op


def _row(facts: Mapping[str, Any], seconds: Sequence[float]) -> Row:
    low, middle, high = np.percentile(seconds, [25, 50, 75])
    names = ("spec", "sizes", "dtype", "direction", "implementation", "sweep")
    return {name: facts[name] for name in names} | {
        "seconds": _round(middle),
        "spread": _round((high - low) / middle),
        "turns": len(seconds),
        "flops_per_second": _round(facts["flops"] / middle),
        "bytes_per_second": _round(facts["bytes"] / middle),
        "intensity": _round(facts["flops"] / facts["bytes"]),
        "roofline": _round(facts["roofline_seconds"] / middle),
        "temp_bytes": facts["temp_bytes"],
        "error": None if facts["error"] is None else _round(facts["error"]),
    }


def _round(value: float) -> float:
    return float(f"{value:.4g}")


def write(documents: Mapping[str, Document], profiles: Path) -> list[Path]:
    """Save each operation's document as profiles/<device>/<date>-<op>.json.

    If the file exists and has the same device, CPU, versions and timer, its rows that were not measured again stay,
    with the ceilings that they were measured under.

    Returns:
        The paths of the files.
    """
    paths = []
    for op, document in documents.items():
        folder = profiles / device_folder(document["platform"], document["device"])
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{document['date']}-{op}.json"
        path.write_text(dumps(_merge(path, document)), "utf-8")
        paths.append(path)
    return paths


def _row_key(row: Row | SkippedRow) -> tuple[str, str, str]:
    return row["spec"], row["direction"], row["implementation"]


def _merge(path: Path, document: Document) -> Document:
    """Add the rows of an existing file that the document does not have."""
    existing = json.loads(path.read_text("utf-8")) if path.exists() else {}
    if any(existing.get(name) != document[name] for name in ("device", "platform", "versions", "timer")):
        return document
    if not cpu.same(existing, document):
        return document
    measured = {_row_key(row) for name in ("rows", "refused") for row in document[name]}
    earlier = {name: [row for row in existing[name] if _row_key(row) not in measured] for name in ("rows", "refused")}
    if existing.get("ceilings") != document.get("ceilings"):
        earlier["rows"] = [{"ceilings": existing["ceilings"], **row} for row in earlier["rows"]]
    return {**document, **{name: earlier[name] + document[name] for name in earlier}}


def dumps(document: Document) -> str:
    """Format a document as JSON with one row per line, so that a diff shows which row changed."""
    head = {name: value for name, value in document.items() if name not in ("rows", "refused")}
    lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in head.items()]
    for name in ("rows", "refused"):
        rows = ",\n".join(f"  {json.dumps(row)}" for row in document[name])
        lines.append(f' "{name}": [\n{rows}\n ]' if rows else f' "{name}": []')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def by_case(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """Group rows by (workload, direction), in order."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["spec"], row["direction"]), []).append(row)
    return groups


# Relative errors that no rounding explains: of sums in float32, or of operands and results in 16 bits.
MAX_ERRORS = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.01}
MAX_XLA_ERROR = 0.1


def is_wrong(row: Row, rows: Sequence[Row]) -> bool:
    """Whether a row computes something wrong.

    Its error is then above `MAX_ERRORS` and eight times that of xla, if xla is among the rows of the case: a TPU
    multiplies float32 in bfloat16 by default. `python -m bench.judge` says where it is wrong.
    """
    if row["error"] is None:
        return False
    peers = [8 * other["error"] for other in rows if other["implementation"] == "xla" and other["error"] is not None]
    allowed = max(MAX_ERRORS[row["dtype"]], *peers, 0.0) if row["implementation"] != "xla" else MAX_XLA_ERROR
    return not row["error"] <= allowed  # NaN too


def fastest(rows: Sequence[Row]) -> float:
    """Seconds of the fastest right implementation; rows without an error compute something else and do not count."""
    return min(row["seconds"] for row in _rivals(rows))


def leaders(rows: Sequence[Row]) -> list[str]:
    """Implementations that share the best time.

    One is the best alone if its distance to every other one exceeds both spreads together (half an interquartile range
    each). Empty if there is nothing to compare.
    """
    rivals = [row for row in _rivals(rows) if not is_wrong(row, rows)]
    if len(rivals) < 2:
        return []
    best = min(rivals, key=_seconds)
    return [row["implementation"] for row in rivals if row["seconds"] - best["seconds"] <= _noise(row) + _noise(best)]


def _rivals(rows: Sequence[Row]) -> Sequence[Row]:
    rivals = [row for row in rows if row["error"] is not None]
    return [row for row in rivals if not is_wrong(row, rows)] or rivals or rows


def _seconds(row: Row) -> float:
    return row["seconds"]


def _noise(row: Row) -> float:
    return row["seconds"] * row["spread"] / 2
