"""The plots of the report, as SVG text: time against the axis of each sweep, and the roofline."""

import html
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

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
LABEL_SIZE = 8.5
SMALL = {"textcoords": "offset points", "fontsize": 9}
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
    axes.xaxis.set_major_formatter(_plain)
    axes.yaxis.set_major_formatter(_plain)
    axes.yaxis.set_minor_formatter(_plain_2_and_5)
    axes.set(xlabel=AXES.get(axis, axis), ylabel="ms")
    _name_lines(axes, {name: sorted(line)[-1][:2] for name, line in points.items()})
    return svg(figure)


def roofline(rows: Sequence[Row], ceilings: Mapping[str, float], direction: str) -> str | None:
    """Plot each row under the roofline of this machine's own matmul and copy; None without ceilings or rows.

    Rows of an earlier run, which have ceilings of their own, are left out: they belong under another roofline. Every
    dot has a title, which a browser shows under the pointer; the dots of a workload have its name below them.
    """
    chosen = [row for row in rows if row["direction"] == direction and "ceilings" not in row]
    matmul = [value for name, value in ceilings.items() if name.startswith("matmul")]
    if not chosen or not matmul or "copy GB/s" not in ceilings:
        return None
    top, slope = max(matmul) * 1e3, ceilings["copy GB/s"]  # GFLOP/s, GB/s
    lowest: dict[str, tuple[float, float]] = {}  # workload -> its lowest dot
    for row in chosen:
        point = (row["intensity"], row["flops_per_second"] / 1e9)
        lowest[row["spec"]] = min(lowest.get(row["spec"], point), point, key=lambda point: point[1])
    label_inches = max(map(len, lowest)) * LABEL_SIZE * 0.6 / 72 + 0.25
    height = 2.6 + label_inches
    figure, axes = _figure(f"roofline, {direction}", height + 0.9)
    axes.set_xscale("log")
    axes.set_yscale("log")
    x = [row["intensity"] for row in chosen]
    left, right = min([*x, top / slope]) / 1.6, max([*x, top / slope]) * 1.6
    axes.plot([left, top / slope, right], [left * slope, top, top], color="black", lw=1.2)
    axes.annotate(f"{top / 1e3:.3g} TFLOP/s", (right, top), (0, 2), ha="right", va="bottom", **SMALL)
    axes.annotate(f"{slope:.3g} GB/s", (left, left * slope), (8, -3), va="top", **SMALL)
    titles = {}
    for i, row in enumerate(chosen):
        (dot,) = axes.plot(row["intensity"], row["flops_per_second"] / 1e9, "o", ms=5, alpha=0.85)
        dot.set(color=color(row["implementation"]), gid=f"dot-{i}")
        titles[f"dot-{i}"] = _dot_title(row)
    # The names stand between the lowest dot and the axis.
    floor, roof = min(y for _, y in lowest.values()), top * 1.6
    share = label_inches / height
    axes.set(xlim=(left, right), ylim=((floor / roof**share) ** (1 / (1 - share)), roof))
    axes.set(xlabel="FLOPs per byte that must be moved", ylabel="GFLOP/s")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(_plain)
        axis.set_minor_formatter("")
    if right / left < 30:
        axes.xaxis.set_minor_formatter(_plain_2_and_5)
    _name_columns(axes, lowest)
    names = dict.fromkeys(row["implementation"] for row in chosen)
    handles = [Line2D([], [], marker="o", ls="", ms=5, color=color(name), label=name) for name in names]
    figure.legend(handles=handles, frameon=False, fontsize=9, loc="outside lower center", ncols=3, handletextpad=0.1)
    return with_titles(svg(figure), titles)


def _dot_title(row: Row) -> str:
    return (
        f"{row['implementation']}, {row['spec']}, {row['direction']}: {row['flops_per_second'] / 1e9:.3g} GFLOP/s at "
        f"{row['intensity']:.3g} FLOPs per byte, {row['roofline']:.1%} of the roofline"
    )


def _name_columns(axes: Axes, lowest: Mapping[str, tuple[float, float]]) -> None:
    """Write the names of the workloads upright above the x axis, spread apart, each with a line to its lowest dot."""
    left, right = axes.get_xlim()
    order = sorted(lowest, key=lambda name: lowest[name])
    wanted = [math.log(lowest[name][0] / left) / math.log(right / left) for name in order]
    for name, x in zip(order, spread_apart(wanted, gap=0.042, low=0.03, high=0.97), strict=True):
        axes.annotate(
            name,
            lowest[name],
            (x, 0.015),
            textcoords="axes fraction",
            rotation=90,
            ha="center",
            va="bottom",
            fontsize=LABEL_SIZE,
            color="#444444",
            arrowprops={
                "arrowstyle": "-",
                "color": "#bbbbbb",
                "lw": 0.7,
                "relpos": (0.5, 1),
                "shrinkA": 1,
                "shrinkB": 4,
            },
        )


def spread_apart(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move sorted positions as little as needed to be `gap` apart, and between low and high if they fit."""
    groups: list[list[float]] = []  # [mean of the wanted middle, number of positions]
    for x in wanted:
        groups.append([x, 1])
        while len(groups) > 1 and groups[-1][0] - groups[-2][0] < gap * (groups[-1][1] + groups[-2][1]) / 2:
            (b, n), (a, m) = groups.pop(), groups.pop()
            groups.append([(a * m + b * n) / (m + n), m + n])
    placed = [middle + (i - (n - 1) / 2) * gap for middle, n in groups for i in range(int(n))]
    for i in range(len(placed)):
        placed[i] = max(placed[i], low + i * gap)
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], high - (len(placed) - 1 - i) * gap)
    return placed


def with_titles(svg_text: str, titles: Mapping[str, str]) -> str:
    """Give the groups with these ids a <title> in place of the id, which would have to be unique in the page."""
    for gid, title in titles.items():
        svg_text = svg_text.replace(f'<g id="{gid}">', f'<g class="dot"><title>{html.escape(title)}</title>', 1)
    return svg_text


def sparkline(values: Sequence[float], titles: Sequence[str], stroke: str) -> str:
    """Draw values over time as a small line, with a titled dot each; "" for fewer than two.

    The height is at least 20% of the values, so that noise looks like noise.
    """
    if len(values) < 2:
        return ""
    width, height, margin = 96, 24, 4
    middle = (min(values) + max(values)) / 2
    span = max(max(values) - min(values), 0.2 * middle) or 1.0
    x = [margin + (width - 2 * margin) * i / (len(values) - 1) for i in range(len(values))]
    y = [height / 2 - (height - 2 * margin) * (value - middle) / span for value in values]
    line = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    dots = "".join(
        f'<circle cx="{a:.1f}" cy="{b:.1f}" r="{3 if i == len(x) - 1 else 2}"><title>{html.escape(title)}</title>'
        "</circle>"
        for i, (a, b, title) in enumerate(zip(x, y, titles, strict=True))
    )
    return (
        f'<svg class="spark" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{html.escape(f"{titles[0]} to {titles[-1]}")}" fill="{stroke}">'
        f'<polyline points="{line}" fill="none" stroke="{stroke}"/>{dots}</svg>'
    )


def _plain(x: float, _: int) -> str:
    return f"{x:g}"


def _plain_2_and_5(x: float, _: int) -> str:
    return f"{x:g}" if f"{x:e}"[0] in "25" else ""


def _figure(title: str, height: float = 3.6) -> tuple[Figure, Axes]:
    # Five inches are 360 points: the text stays legible where a page is as narrow as a phone.
    figure = Figure(figsize=(5.0, height), layout="constrained")
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
            name, (x, y), xytext=(6, 0), textcoords="offset points", va="center", fontsize=9, color=color(name)
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
