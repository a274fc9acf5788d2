"""What came out of a sweep: a row a run, as a table, a CSV file and a picture."""

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

from dantinox.checkpoint.load import read_config
from dantinox.metrics.logger import read_metrics
from dantinox.model import flops
from dantinox.sweep.search_space import Run, Sweep
from dantinox.system.atomic_io import open_atomic

RESULT = "result.json"  # in a run's folder, written last: with it the run is done
COSTS = ("parameters", "active", "cache_bytes")
PANELS = 8  # of the picture


@dataclass(frozen=True)
class Outcome:
    """What became of a run.

    Attributes:
        state: waiting, done, interrupted, failed or refused.
        why: of the last two, in one line.
        figures: of a run that is done: its last metrics, median tokens_per_s, and what the model costs.
    """

    run: Run
    state: str
    why: str = ""
    figures: dict[str, float] = field(default_factory=dict)

    def told(self, metric: str) -> str:
        """In one line."""
        if self.state != "done":
            return self.state + (f": {self.why}" if self.why else "")
        return f"{metric} {_number(self.figures.get(metric))}, {self.figures['tokens_per_s']:,.0f} tokens/s"


def known(run: Run, folder: Path) -> Outcome:
    """What the folder of a sweep tells about a run."""
    if run.refused is not None:
        return Outcome(run, "refused", why=run.refused)
    path = folder / run.name
    try:
        found = json.loads((path / RESULT).read_text())
        if found["values"] == run.values and (path / "config.yaml").is_file():
            return Outcome(run, "done", figures=found["figures"])
    except (OSError, ValueError, KeyError, TypeError):  # not written, or not by us: the run is asked again
        pass
    return Outcome(run, "interrupted" if (path / "config.yaml").is_file() else "waiting")


def finish(run: Run, folder: Path) -> Outcome:
    """Gather the figures of a run that has come to its end, and mark it as done."""
    path = folder / run.name
    rows, config = read_metrics(path / "metrics.jsonl"), read_config(path)
    if not rows:
        return Outcome(run, "failed", why=f"{path / 'metrics.jsonl'} is missing or empty")
    figures = {name: value for row in rows for name, value in row.items()}  # the last of each, as W&B sums up
    timed = [row["tokens_per_s"] for row in rows[1:] or rows]  # the first compiles
    model = config.model
    costs = (
        flops.total_parameters(model),
        flops.active_parameters(model),
        flops.kv_cache_bytes(model, model.max_context),
    )
    figures |= {"tokens_per_s": median(timed)} | dict(zip(COSTS, costs))
    with open_atomic(path / RESULT) as file:
        file.write(json.dumps({"values": run.values, "figures": figures}, indent=1).encode())
    return Outcome(run, "done", figures=figures)


def ranked(sweep: Sweep, outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The best first, and after those that are done the others in their order."""

    def key(outcome: Outcome) -> tuple[bool, float]:
        value = _value(outcome, sweep.metric)
        if value is None:
            return True, 0.0
        return False, -value if sweep.maximize else value

    return sorted(outcomes, key=key)


def table(sweep: Sweep, outcomes: Sequence[Outcome]) -> str:
    """Markdown, aligned: what was varied, what came out."""
    extra = [name for name in ("val_loss", "loss") if name != sweep.metric]
    columns = [*sweep.varied, sweep.metric, *extra, "tokens/s", "parameters", "active", "cache bytes", ""]
    lines = [columns, ["---"] * len(sweep.varied) + ["---:"] * (len(columns) - len(sweep.varied) - 1) + ["---"]]
    for outcome in ranked(sweep, outcomes):
        figures = outcome.figures
        line = [str(outcome.run.values[name]) for name in sweep.varied]
        line += [_number(figures.get(name)) for name in (sweep.metric, *extra)]
        line += [_whole(figures.get(name)) for name in ("tokens_per_s", *COSTS)]
        lines.append([*line, "" if outcome.state == "done" else outcome.told(sweep.metric).replace("|", "/")])
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    lines[1] = [word.replace("---", "-" * (width - word.count(":"))) for word, width in zip(lines[1], widths)]
    right = len(sweep.varied)
    pad = lambda i, word: word.rjust(widths[i]) if right <= i < len(columns) - 1 else word.ljust(widths[i])
    return "\n".join("| " + " | ".join(pad(i, word) for i, word in enumerate(line)) + " |" for line in lines)


def write(sweep: Sweep, outcomes: Sequence[Outcome], folder: Path) -> None:
    """results.md, results.csv and, where two runs are done, results.png."""
    names = [p.name for p in sweep.parameters]
    # A parameter is what was asked for, not where the schedule left it.
    seen = {name: None for outcome in outcomes for name in outcome.figures if name not in ("step", *names)}
    buffer = io.StringIO()
    out = csv.writer(buffer, lineterminator="\n")
    out.writerow(["run", "state", *names, *seen, "why"])
    for outcome in ranked(sweep, outcomes):
        values = [outcome.run.values[name] for name in names]
        figures = [outcome.figures.get(name) for name in seen]
        out.writerow([outcome.run.name, outcome.state, *values, *figures, outcome.why])
    text = table(sweep, outcomes) + "\n"
    for name, content in (("results.md", text), ("results.csv", buffer.getvalue())):
        with open_atomic(folder / name) as file:
            file.write(content.encode())
    if sum(_value(outcome, sweep.metric) is not None for outcome in outcomes) > 1 and sweep.varied:
        plot(sweep, outcomes, folder / "results.png")


def plot(sweep: Sweep, outcomes: Sequence[Outcome], path: Path) -> None:
    """The metric against each parameter that was varied: a dot a run, and the mean where runs share a value."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    done = [(o.run.values, value) for o in outcomes if (value := _value(o, sweep.metric)) is not None]
    names = sweep.varied[:PANELS]
    figure = Figure(figsize=(1 + 2.6 * len(names), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for name, axes in zip(names, panels):
        values = list(dict.fromkeys(at[name] for at, _ in done))
        few = len(values) <= 8
        if few or not all(map(_real, values)):
            values.sort(key=lambda value: (not _real(value), value if _real(value) else 0, str(value)))
            place = {value: i for i, value in enumerate(values)}
            axes.set_xticks(range(len(values)), [str(value) for value in values])
            axes.set_xlim(-0.5, len(values) - 0.5)
        else:
            place = {value: value for value in values}
            if min(values) > 0 and max(values) > 20 * min(values):
                axes.set_xscale("log")
        axes.plot([place[at[name]] for at, _ in done], [y for _, y in done], "o", color="#b8b8b8", ms=5)
        if few:
            means = [fmean(y for at, y in done if at[name] == value) for value in values]
            axes.plot([place[value] for value in values], means, color="#a01c20", lw=2, marker="o", ms=4)
        axes.set_xlabel(name)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, axis="y", color="#e6e6e6", lw=0.6)
        axes.set_axisbelow(True)
    panels[0].set_ylabel(sweep.metric)
    figure.suptitle(f"{sweep.name}: {len(done)} runs", fontsize=10)
    figure.savefig(path, dpi=130)


def _value(outcome: Outcome, name: str) -> float | None:
    """A figure that can be compared; None where the run has none, or one that is not finite."""
    value = outcome.figures.get(name)
    return value if value is not None and math.isfinite(value) else None


def _real(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}" if abs(value) < 1000 else f"{value:,.0f}"


def _whole(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"
