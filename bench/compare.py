"""Did it get slower? `python -m bench.compare`: the newest measurement of a device against the last committed one.

Kernel times of a GPU are compared as they are. Wall clock on a shared machine drifts, so there the fraction of the
roofline is compared: both of its terms were taken in the same minute. A change counts beyond 5% and the spread of both.
Measurements of different CPUs are not compared.
"""

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
from rich.table import Table

from bench.report import cpu
from bench.report.results import ROOT, Document, Row, device_folder
from dantinox import cli, kernels
from dantinox.system.console import Console

PROG = "bench.compare"
TOLERANCE = 0.05
OTHER_FILES = ("ablations", "toggles")  # what else is in a device's folder; the second name is the old one


@dataclass(frozen=True)
class Arguments:
    """What to compare."""

    op: tuple[str, ...] = ()
    """Operations (default: all that were measured)."""
    device: str | None = None
    """A folder of profiles/ (default: this device's)."""
    new: str = "profiles"
    """Folder of the new measurements, <device>/<date>-<op>.json."""
    commit: str = "HEAD"
    """The commit of the old measurements."""


class Change(NamedTuple):
    """One implementation of one row in two measurements.

    Attributes:
        row: workload and direction.
        implementation: its name.
        ratio: new time over old time.
        allowed: the relative change that does not count.
    """

    row: str
    implementation: str
    ratio: float
    allowed: float

    @property
    def verdict(self) -> str:
        """Whether the implementation got "slower", "faster" or stayed the "same"."""
        if self.ratio > 1 + self.allowed:
            return "slower"
        return "faster" if self.ratio < 1 / (1 + self.allowed) else "same"


def changes(old: Document, new: Document) -> list[Change]:
    """Compare every implementation that both documents measured at the same sizes."""
    wall = "wall" in old["timer"] or "wall" in new["timer"]

    def key(row: Row) -> tuple[str, ...]:
        return row["spec"], row["direction"], row["dtype"], row["implementation"]

    old_rows = {key(row): row for row in old["rows"]}
    compared = []
    for row in new["rows"]:
        old_row = old_rows.get(key(row))
        if old_row is None or old_row["sizes"] != row["sizes"]:
            continue
        ratio = old_row["roofline"] / row["roofline"] if wall else row["seconds"] / old_row["seconds"]
        allowed = TOLERANCE + (old_row["spread"] + row["spread"]) / 2
        compared.append(Change(f"{row['spec']}, {row['direction']}", row["implementation"], ratio, allowed))
    return compared


def latest(folder: Path) -> dict[str, Path]:
    """Find the newest file of each operation in a device's folder."""
    newest: dict[str, Path] = {}
    for path in sorted(folder.glob("????-??-??-*.json")):
        newest[path.stem[11:]] = path  # dates sort as text
    return {op: path for op, path in newest.items() if op not in OTHER_FILES}


def committed(commit: str, device: str) -> dict[str, list[tuple[str, Document]]]:
    """Read (file name, document) of every committed file of each operation of a device, newest first."""
    listing = _git("ls-tree", "--name-only", commit, f"profiles/{device}/")
    names = sorted((Path(line).name for line in listing.splitlines() if line[-5:] == ".json"), reverse=True)
    found: dict[str, list[tuple[str, Document]]] = {}
    for name in names:
        if name[:4].isdigit() and name[11:-5] not in OTHER_FILES:
            document = json.loads(_git("show", f"{commit}:profiles/{device}/{name}"))
            found.setdefault(name[11:-5], []).append((name, document))
    return found


def newest_of_same_cpu(candidates: Sequence[tuple[str, Document]], new: Document) -> tuple[str, Document] | None:
    """Return the first of (file name, document) that was measured on the CPU of a new document."""
    return next(((name, document) for name, document in candidates if cpu.same(document, new)), None)


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        raise ValueError(f"git {arguments[0]}: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout


def main(argv: Sequence[str] | None = None) -> int:
    """Print what changed; exit with 1 if one of our implementations got slower."""
    arguments = cli.parse(
        Arguments,
        argv,
        default=Arguments(),
        prog=PROG,
        description=__doc__.split("\n")[0],
    )
    console = Console(width=max(100, Console().width))
    with cli.one_line_errors(PROG):
        device = arguments.device or device_folder(jax.default_backend(), jax.devices()[0].device_kind)
        old, new = committed(arguments.commit, device), latest(Path(arguments.new) / device)
        if not old:
            raise ValueError(f"{arguments.commit} has no measurement of {device!r} in profiles/; commit one first")
        ops = arguments.op or tuple(op for op in new if op in old)
        both = sorted(set(old) & set(new))
        for op in ops:
            if op not in both:
                raise ValueError(f"--op {op!r} is not in both measurements; allowed: {', '.join(both) or 'none'}")
        regressed, compared, other_cpus = False, 0, []
        for op in ops:
            now = json.loads(new[op].read_text("utf-8"))
            found = newest_of_same_cpu(old[op], now)
            if found is None:
                other_cpus.append(_other_cpu(op, old[op][0], now))
                continue
            name, before = found
            if now == before:
                console.print(f"{op}: {new[op]} is the committed measurement; `make bench` makes a new one")
                continue
            if now["platform"] == "cpu" and not cpu.name(now):
                console.print(f"{op}: neither file names its CPU; the comparison holds only on the same one")
            compared_rows = changes(before, now)
            compared += len(compared_rows)
            regressed |= _show(op, f"{name} ({arguments.commit}) -> {new[op].name}", compared_rows, console)
        if not compared:
            raise ValueError(other_cpus[0] if other_cpus else "nothing new to compare; `make bench` measures")
        for line in other_cpus:
            console.print(line, highlight=False, soft_wrap=True)
    return 1 if regressed else 0


def _other_cpu(op: str, old: tuple[str, Document], new: Document) -> str:
    then, now = (cpu.name(document) or "a CPU without a name" for document in (old[1], new))
    return f"{op} is not compared: {old[0]} was measured on {then}, this one on {now}; commit one of this CPU first"


def _show(op: str, title: str, compared: Sequence[Change], console: Console) -> bool:
    """Print the changes that count; return whether one of our own implementations got slower."""
    table = Table(title=f"{op}: {title}", title_justify="left")
    for column in ("row", "implementation", "time, new / old", "allowed", ""):
        table.add_column(column, justify="right" if "o" in column[:1] or column == "allowed" else "left")
    shown = [change for change in compared if change.verdict != "same"]
    for change in sorted(shown, key=lambda change: -change.ratio):
        figures = f"{change.ratio:.2f}", f"±{change.allowed:.0%}"
        style = {"slower": "red", "faster": "green"}[change.verdict]
        table.add_row(change.row, change.implementation, *figures, change.verdict, style=style)
    if shown:
        console.print(table)
    console.print(f"{op}: {len(compared)} compared, {len(shown)} changed beyond their spread", highlight=False)
    ours = set(kernels.implementation_names(op)) - {"reference"}
    return any(change.verdict == "slower" and change.implementation in ours for change in compared)


if __name__ == "__main__":
    cli.run_main(main)
