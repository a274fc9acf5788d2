"""The file of `bench.tune`: what was measured on a device, as `dantinox.kernels.tuning` reads it."""

import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from statistics import geometric_mean
from typing import Any, NamedTuple

from dantinox.kernels.tuning import Size
from dantinox.system.atomic_io import open_atomic

MIN_GAIN = 0.03  # of the time, in three of four turns: less is noise
PACKAGES = ("jax", "jaxlib", "jax-triton", "triton", "libtpu")
Document = dict[str, Any]


class Choice(NamedTuple):
    """A choice of block sizes that was measured.

    Attributes:
        choice: the sizes.
        heuristic: those of the heuristic.
        ratio: of their times, in the median.
        spread: quartiles of the ratio.
        workload: where it was measured.
    """

    choice: Size
    heuristic: Size
    ratio: float
    spread: tuple[float, float]
    workload: str

    def is_faster(self) -> bool:
        """Return whether it is faster by more than the noise."""
        return self.spread[1] < 1 - MIN_GAIN


def fastest(result: Mapping[str, Any], workload: str) -> dict[str, Any]:
    """Return the fastest implementation of each call of a measurement, if it is by more than the noise."""
    others = {name: spread for name, spread in result["spread"].items() if result["ratios"][name] > 1}
    if not others or any(low <= 1 + MIN_GAIN for low, _ in others.values()):
        return {}
    name = min(result["ratios"], key=result["ratios"].__getitem__)
    row = {"fastest": name, "ratios": result["ratios"], "spread": result["spread"], "workload": workload}
    return dict.fromkeys(result["calls"], row)


def read(path: Path, kind: str) -> Document:
    """Return the results in a file, or none.

    Args:
        path: the file.
        kind: of the device, as JAX names it.

    Raises:
        ValueError: the file is of another device, or damaged.
    """
    if not path.exists():
        return {"device": kind, "versions": versions(), "block_sizes": {}, "implementations": {}}
    try:
        document = json.loads(path.read_text("utf-8"))
        device = document["device"], document["block_sizes"], document["implementations"]
    except (ValueError, LookupError, TypeError):
        raise ValueError(f"{path} is damaged; move it away") from None
    if device[0] != kind:
        raise ValueError(f"{path} is of {device[0]!r} and this device is {kind!r}; --out names another file")
    return document


def merge(document: Document, choices: Mapping[str, Choice], winners: Mapping[str, Any], workload: str) -> Document:
    """Return the results with those of a workload replaced."""
    kept = {
        part: {key: row for key, row in document[part].items() if row["workload"] != workload}
        for part in ("block_sizes", "implementations")
    }
    sizes = kept["block_sizes"] | {key: row._asdict() for key, row in choices.items()}
    return document | {
        "versions": versions(),
        "block_sizes": dict(sorted(sizes.items())),
        "implementations": dict(sorted((kept["implementations"] | dict(winners)).items())),
    }


def write(path: Path, document: Document) -> None:
    """Write the results at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_atomic(path) as file:
        file.write((json.dumps(document, indent=1) + "\n").encode())


def summary(document: Document) -> str:
    """Return the number of results and the gain in one line."""
    rows, winners = document["block_sizes"].values(), document["implementations"]
    gain = f", {geometric_mean(row['ratio'] for row in rows):.2f} of the time in the mean" if rows else ""
    return f"{len(rows)} choices of block sizes beat the heuristics{gain}; {len(winners)} calls have a winner"


def versions() -> dict[str, str]:
    """Return the versions of the packages that compile kernels."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
