"""Did it get slower? `python -m bench.compare`: the newest measurement of a device against the last committed one.

Kernel times of a GPU are compared as they are. Wall clock on a shared machine drifts, so there the fraction of the
roofline is compared: both of its terms were taken in the same minute. A change counts beyond 5% and the spread of both.
"""

import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.console import Console
from rich.table import Table

from bench.report.results import ROOT, device_folder
from dantinox import cli, kernels

PROG = "bench.compare"
TOLERANCE = 0.05


@dataclass(frozen=True)
class Arguments:
    """What to compare."""

    op: tuple[str, ...] = ()
    """Operations; none: all that were measured."""
    device: str | None = None
    """A folder of profiles/; default: this device's."""
    new: str = "profiles"
    """Where the new measurements lie: <device>/<date>-<op>.json."""
    commit: str = "HEAD"
    """The commit that holds the old ones."""


class Change(NamedTuple):
    """One implementation of one row, before and now; `ratio` is the time now over the time before."""

    row: str
    implementation: str
    ratio: float
    allowed: float

    @property
    def verdict(self) -> str:
        """slower, faster or same."""
        if self.ratio > 1 + self.allowed:
            return "slower"
        return "faster" if self.ratio < 1 / (1 + self.allowed) else "same"


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """Every implementation that both documents measured."""
    wall = "wall" in old["timer"] or "wall" in new["timer"]
    key = lambda row: (row["spec"], row["direction"], row["dtype"], row["implementation"])
    before = {key(row): row for row in old["rows"]}
    found = []
    for row in new["rows"]:
        was = before.get(key(row))
        if was is None or was["sizes"] != row["sizes"]:
            continue
        ratio = was["roofline"] / row["roofline"] if wall else row["seconds"] / was["seconds"]
        allowed = TOLERANCE + (was["spread"] + row["spread"]) / 2
        found.append(Change(f"{row['spec']}, {row['direction']}", row["implementation"], ratio, allowed))
    return found


def latest(folder: Path) -> dict[str, Path]:
    """operation -> its newest file in a device's folder; dates sort as text."""
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("????-??-??-*.json")):
        found[path.stem[11:]] = path
    return {op: path for op, path in found.items() if op != "toggles"}


def committed(commit: str, device: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """operation -> (file name, document) of the newest committed file of a device."""
    listed = _git("ls-tree", "--name-only", commit, f"profiles/{device}/")
    names = sorted(Path(line).name for line in listed.splitlines() if line[-5:] == ".json")
    newest = {name[11:-5]: name for name in names if name[:4].isdigit() and not name.endswith("-toggles.json")}
    return {op: (name, json.loads(_git("show", f"{commit}:profiles/{device}/{name}"))) for op, name in newest.items()}


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"git {arguments[0]}: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout


def main(argv: Sequence[str] | None = None) -> int:
    """Print what changed; exit code 1 where one of ours got slower."""
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
                raise ValueError(f"--op {op!r} was not measured on both sides; allowed: {', '.join(both) or 'none'}")
        worse, compared = False, 0
        for op in ops:
            name, before = old[op]
            now = json.loads(new[op].read_text())
            if now == before:
                console.print(f"{op}: {new[op]} is the committed measurement itself; `make bench` makes a new one")
                continue
            found = changes(before, now)
            compared += len(found)
            worse |= _show(op, f"{name} ({arguments.commit}) -> {new[op].name}", found, console)
        if not compared:
            raise ValueError("nothing new to compare; `make bench` measures")
    return 1 if worse else 0


def _show(op: str, title: str, found: Sequence[Change], console: Console) -> bool:
    """Print the changes that count; whether one of our own implementations got slower."""
    table = Table(title=f"{op}: {title}", title_justify="left")
    for column in ("row", "implementation", "time, new / old", "allowed", ""):
        table.add_column(column, justify="right" if "o" in column[:1] or column == "allowed" else "left")
    told = [change for change in found if change.verdict != "same"]
    for change in sorted(told, key=lambda change: -change.ratio):
        figures = f"{change.ratio:.2f}", f"±{change.allowed:.0%}"
        style = {"slower": "red", "faster": "green"}[change.verdict]
        table.add_row(change.row, change.implementation, *figures, change.verdict, style=style)
    if told:
        console.print(table)
    console.print(f"{op}: {len(found)} compared, {len(told)} changed beyond their spread", highlight=False)
    ours = set(kernels.implementation_names(op)) - {"reference"}
    return any(change.verdict == "slower" and change.implementation in ours for change in found)


if __name__ == "__main__":
    cli.run_main(main)
