"""Results of a sweep, one row per run, as a table, a CSV file and a plot."""

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
from dantinox.system.json_text import json_text

RESULT_FILE = "result.json"  # written last to the folder of a run, which is then done
COSTS = ("parameters", "active", "cache_bytes")
MAX_PANELS = 8  # of the plot


@dataclass(frozen=True)
class Outcome:
    """Outcome of a run.

    Attributes:
        state: waiting, done, interrupted, failed or refused.
        reason: why a run failed or was refused, in one line.
        metrics: of a finished run: its last metrics, the median tokens_per_s, and the cost of the model.
    """

    run: Run
    state: str
    reason: str = ""
    metrics: dict[str, float] = field(default_factory=dict)

    def one_line(self, metric: str) -> str:
        """Describe the outcome in one line."""
        if self.state != "done":
            return self.state + (f": {self.reason}" if self.reason else "")
        value = self.metrics.get(metric)
        text = _format_number(value) or ("not finite" if metric in self.metrics else "missing")
        return f"{metric} {text}, {self.metrics['tokens_per_s']:,.0f} tokens/s"


def load_outcome(run: Run, folder: Path) -> Outcome:
    """Load the outcome of a run from the folder of the sweep."""
    if run.refused is not None:
        return Outcome(run, "refused", reason=run.refused)
    path = folder / run.name
    try:
        result = json.loads((path / RESULT_FILE).read_text("utf-8"))
        if result["values"] == run.values and (path / "config.yaml").is_file():
            return Outcome(run, "done", metrics=result["figures"])
    except (OSError, ValueError, KeyError, TypeError):  # missing or damaged: the run is trained again
        pass
    return Outcome(run, "interrupted" if (path / "config.yaml").is_file() else "waiting")


def collect_result(run: Run, folder: Path) -> Outcome:
    """Collect the metrics of a finished run and mark it as done."""
    path = folder / run.name
    rows, config = read_metrics(path / "metrics.jsonl"), read_config(path)
    if not rows:
        return Outcome(run, "failed", reason=f"{path / 'metrics.jsonl'} is missing or empty")
    metrics = {name: value for row in rows for name, value in row.items()}  # the last value of each, as in W&B
    rates = [row["tokens_per_s"] for row in rows[1:] or rows]  # the first step is mostly compilation
    model = config.model
    costs = (
        flops.total_parameters(model),
        flops.active_parameters(model),
        flops.kv_cache_bytes(model, model.max_context),
    )
    metrics |= {"tokens_per_s": median(rates)} | dict(zip(COSTS, costs))
    with open_atomic(path / RESULT_FILE) as file:
        file.write(json_text({"values": run.values, "figures": metrics}, indent=1).encode())
    return Outcome(run, "done", metrics=metrics)


def rank_outcomes(sweep: Sweep, outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Sort the outcomes: finished runs from best to worst, then the others in their order."""

    def sort_key(outcome: Outcome) -> tuple[bool, float]:
        value = _finite_metric(outcome, sweep.metric)
        if value is None:
            return True, 0.0
        return False, -value if sweep.maximize else value

    return sorted(outcomes, key=sort_key)


def results_table(sweep: Sweep, outcomes: Sequence[Outcome]) -> str:
    """Return an aligned Markdown table of the varied parameters and the results."""
    extra = [name for name in ("val_loss", "loss") if name != sweep.metric]
    columns = [*sweep.varied, sweep.metric, *extra, "tokens/s", "parameters", "active", "cache bytes", ""]
    lines = [columns, ["---"] * len(sweep.varied) + ["---:"] * (len(columns) - len(sweep.varied) - 1) + ["---"]]
    for outcome in rank_outcomes(sweep, outcomes):
        metrics = outcome.metrics
        line = [str(outcome.run.values[name]) for name in sweep.varied]
        line += [_format_number(metrics.get(name)) for name in (sweep.metric, *extra)]
        line += [_format_integer(metrics.get(name)) for name in ("tokens_per_s", *COSTS)]
        lines.append([*line, "" if outcome.state == "done" else outcome.one_line(sweep.metric).replace("|", "/")])
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    lines[1] = [word.replace("---", "-" * (width - word.count(":"))) for word, width in zip(lines[1], widths)]
    first_numeric = len(sweep.varied)

    def pad(i: int, word: str) -> str:
        return word.rjust(widths[i]) if first_numeric <= i < len(columns) - 1 else word.ljust(widths[i])

    return "\n".join("| " + " | ".join(pad(i, word) for i, word in enumerate(line)) + " |" for line in lines)


def write_results(sweep: Sweep, outcomes: Sequence[Outcome], folder: Path) -> None:
    """Write results.md, results.csv and, if two runs are done, results.png."""
    names = [p.name for p in sweep.parameters]
    # The columns of parameters have their settings, not metrics of the same name, such as lr.
    metric_names = {name: None for outcome in outcomes for name in outcome.metrics if name not in ("step", *names)}
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["run", "state", *names, *metric_names, "why"])
    for outcome in rank_outcomes(sweep, outcomes):
        values = [outcome.run.values[name] for name in names]
        metrics = [outcome.metrics.get(name) for name in metric_names]
        writer.writerow([outcome.run.name, outcome.state, *values, *metrics, outcome.reason])
    text = results_table(sweep, outcomes) + "\n"
    for name, content in (("results.md", text), ("results.csv", buffer.getvalue())):
        with open_atomic(folder / name) as file:
            file.write(content.encode())
    if sum(_finite_metric(outcome, sweep.metric) is not None for outcome in outcomes) > 1 and sweep.varied:
        plot_results(sweep, outcomes, folder / "results.png")


def plot_results(sweep: Sweep, outcomes: Sequence[Outcome], path: Path) -> None:
    """Plot the metric against each varied parameter: one dot per run, and the mean of runs with equal values."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    points = [(o.run.values, value) for o in outcomes if (value := _finite_metric(o, sweep.metric)) is not None]
    names = sweep.varied[:MAX_PANELS]
    figure = Figure(figsize=(1 + 2.6 * len(names), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for name, axes in zip(names, panels):
        values = list(dict.fromkeys(settings[name] for settings, _ in points))
        is_few = len(values) <= 8
        if is_few or not all(map(_is_real, values)):
            values.sort(key=lambda value: (not _is_real(value), value if _is_real(value) else 0, str(value)))
            x_of = {value: i for i, value in enumerate(values)}
            axes.set_xticks(range(len(values)), [str(value) for value in values])
            axes.set_xlim(-0.5, len(values) - 0.5)
        else:
            x_of = {value: value for value in values}
            if min(values) > 0 and max(values) > 20 * min(values):
                axes.set_xscale("log")
        axes.plot([x_of[settings[name]] for settings, _ in points], [y for _, y in points], "o", color="#b8b8b8", ms=5)
        if is_few:
            means = [fmean(y for settings, y in points if settings[name] == value) for value in values]
            axes.plot([x_of[value] for value in values], means, color="#a01c20", lw=2, marker="o", ms=4)
        axes.set_xlabel(name)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, axis="y", color="#e6e6e6", lw=0.6)
        axes.set_axisbelow(True)
    panels[0].set_ylabel(sweep.metric)
    figure.suptitle(f"{sweep.name}: {len(points)} runs", fontsize=10)
    figure.savefig(path, dpi=130)


def _finite_metric(outcome: Outcome, name: str) -> float | None:
    """Return a metric of a run; None if it is missing or not finite."""
    value = outcome.metrics.get(name)
    return value if value is not None and math.isfinite(value) else None


def _is_real(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _format_number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}" if abs(value) < 1000 else f"{value:,.0f}"


def _format_integer(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"
