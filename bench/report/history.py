"""Earlier measurements of the rows of a document: the change since the last commit, and all files of the folder."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench import compare
from bench.report import cpu
from bench.report.results import Document, Row, device_folder

Key = tuple[str, ...]


@dataclass(frozen=True)
class Point:
    """One measurement of a row: its seconds, or, if `relative`, its time over that of the roofline."""

    date: str
    value: float
    relative: bool


@dataclass(frozen=True)
class History:
    """What was measured before, on this device and this CPU.

    Attributes:
        name: the committed file that `changes` compares with; "" if there is none.
        changes: the change of each row since that file, by `key`.
        points: every measurement of each row, oldest first, by `key`.
    """

    name: str = ""
    changes: Mapping[Key, compare.Change] = field(default_factory=dict)
    points: Mapping[Key, Sequence[Point]] = field(default_factory=dict)


def key(row: Row) -> Key:
    """Identify a row across measurements."""
    return row["spec"], row["direction"], row["dtype"], row["sizes"], row["implementation"]


def collect(documents: Mapping[str, Document], profiles: Path, commit: str = "HEAD") -> dict[str, History]:
    """Find what was measured before.

    Args:
        documents: the results by operation.
        profiles: the folder whose <device>/<date>-<op>.json are the history.
        commit: the commit to compare with; without git or a repository nothing is compared.

    Returns:
        The history by operation.
    """
    found = {}
    for op, document in documents.items():
        device = device_folder(document["platform"], document["device"])
        old = None
        with contextlib.suppress(ValueError, OSError):
            old = compare.newest_of_same_cpu(compare.committed(commit, device).get(op, ()), document)
        paths = sorted((profiles / device).glob(f"????-??-??-{op}.json"))  # dates sort as text
        files = [json.loads(path.read_text("utf-8")) for path in paths]
        found[op] = make(document, files, *(old or ("", None)))
    return found


def make(document: Document, files: Sequence[Document], name: str = "", old: Document | None = None) -> History:
    """Make the history of one operation.

    Args:
        document: the new results.
        files: the documents of the folder, oldest first; those of another CPU, device or timer do not count.
        name: the name of the committed file.
        old: its content.
    """
    if old is None or old == document or not cpu.same(old, document):
        name, old = "", None
    changes = {} if old is None else dict(zip(*_changes(old, document), strict=True))
    wall = "wall" in document["timer"]
    points: dict[Key, list[Point]] = {}
    for file in files:
        if cpu.same(file, document) and all(file[name] == document[name] for name in ("device", "timer")):
            for row in file["rows"]:
                value = 1 / row["roofline"] if wall else row["seconds"]
                points.setdefault(key(row), []).append(Point(file["date"], value, wall))
    return History(name, changes, points)


def _changes(old: Document, new: Document) -> tuple[list[Key], list[compare.Change]]:
    compared = compare.changes(old, new)
    keys = {(f"{row['spec']}, {row['direction']}", row["implementation"]): key(row) for row in new["rows"]}
    return [keys[change.row, change.implementation] for change in compared], compared
