"""The plots of the report, as SVG text: time against the axis of each sweep, and the roofline."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

Row = Mapping[str, Any]
COLORS = {
    "reference": "#8a8a8a",
    "xla": "#1f3a5f",
    "pallas": "#a01c20",
    "triton": "#c46a12",
    "jax.nn xla": "#4f8fc0",
    "jax.nn cudnn": "#3b7d3b",
    "splash": "#7a4fa3",
    "tokamax": "#b0559a",
    "lax.ragged_dot": "#4f8fc0",
    "megablox": "#7a4fa3",
    "one dense matmul": "#3b7d3b",
}
AXES = {"S": "sequence length S", "W": "window W", "E": "experts E", "C": "cache slots C"}


def color(implementation: str) -> str:
    """The colour of an implementation, the same in every plot."""
    return COLORS.get(implementation, "#444444")


def sweep(rows: Sequence[Row], axis: str, direction: str) -> str | None:
    """Plot time against one axis, a line per implementation; None if there are fewer than two points."""
    points: dict[str, list[tuple[float, float, float]]] = {}
    for row in rows:
        if axis in row["sweep"] and row["direction"] == direction:
            point = (row["sweep"][axis], row["seconds"] * 1e3, row["spread"] / 2)
            points.setdefault(row["implementation"], []).append(point)
    if max((len(p) for p in points.values()), default=0) < 2:
        return None
    figure, axes = _figure(f"time against {AXES.get(axis, axis)}, {direction}")
    for implementation, line in points.items():
        x, y, spread = zip(*sorted(line), strict=True)
        error = [t * s for t, s in zip(y, spread, strict=True)]
        axes.errorbar(x, y, error, color=color(implementation), marker="o", ms=4, lw=1.8, capsize=2)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sorted({p[0] for line in points.values() for p in line}))
    for axis_ in (axes.xaxis, axes.yaxis):
        axis_.set_major_formatter(lambda x, _: f"{x:g}")
    axes.yaxis.set_minor_formatter(lambda y, _: f"{y:g}" if f"{y:e}"[0] in "25" else "")
    axes.set(xlabel=AXES.get(axis, axis), ylabel="ms")
    _name_lines(axes, {name: sorted(line)[-1][:2] for name, line in points.items()})
    return svg(figure)


def roofline(rows: Sequence[Row], ceilings: Mapping[str, float], direction: str) -> str | None:
    """Plot each row under the roofline of this machine's own matmul and copy; None without ceilings or rows."""
    chosen = [row for row in rows if row["direction"] == direction]
    matmul = [value for name, value in ceilings.items() if name.startswith("matmul")]
    if not chosen or not matmul or "copy GB/s" not in ceilings:
        return None
    top, slope = max(matmul) * 1e3, ceilings["copy GB/s"]  # GFLOP/s, GB/s
    figure, axes = _figure(f"roofline, {direction}")
    axes.set_xscale("log")
    axes.set_yscale("log")
    x = [row["intensity"] for row in chosen]
    left, right = min([*x, top / slope]) / 2, max([*x, top / slope]) * 2
    axes.plot([left, top / slope, right], [left * slope, top, top], color="black", lw=1.2)
    axes.annotate(f"{top / 1e3:.3g} TFLOP/s", (right, top), ha="right", va="bottom", fontsize=8)
    style = {"textcoords": "offset points", "fontsize": 8}
    axes.annotate(f"{slope:.3g} GB/s", (left, left * slope), xytext=(6, -8), **style)
    labelled: dict[str, None] = {}
    for row in chosen:
        name = row["implementation"]
        label = None if name in labelled else name
        labelled[name] = None
        axes.plot(
            row["intensity"], row["flops_per_second"] / 1e9, "o", ms=5, alpha=0.85, color=color(name), label=label
        )
    axes.set(xlabel="FLOPs per byte that must be moved", ylabel="GFLOP/s")
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    return svg(figure)


def _figure(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, which="major", color="#e6e6e6", lw=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _name_lines(axes: Axes, ends: Mapping[str, tuple[float, float]]) -> None:
    """Write names at the ends of the lines, shifted where they would overlap."""
    low, high = axes.get_ylim()
    step, last = (high / low) ** 0.055, 0.0
    for name, (x, y) in sorted(ends.items(), key=lambda item: item[1][1]):
        y = max(y, last * step)
        axes.annotate(
            name, (x, y), xytext=(6, 0), textcoords="offset points", va="center", fontsize=8, color=color(name)
        )
        last = y
    axes.margins(x=0.05)
    axes.set_xlim(right=axes.get_xlim()[1] * 2.2)


def svg(figure: Figure) -> str:
    """Render a figure as SVG text for embedding in a page; the same figure gives the same text."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "dantinox"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
