"""The report as one self-contained HTML page: no script, font or picture from elsewhere."""

import html
from collections.abc import Mapping

from bench.report import console_table, plots
from bench.report.results import Document, Row, by_case, fastest

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1b1b; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
.note { color: #666; font-size: .85rem; }
nav a { margin-right: 1rem; color: #1f3a5f; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: right; font-weight: 600; border-bottom: 1px solid #999; padding: .2rem .5rem; white-space: nowrap; }
td { text-align: right; padding: .12rem .5rem; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
tr.row td { text-align: left; padding-top: .8rem; border-top: 1px solid #ddd; white-space: normal; }
tr.best td { font-weight: 600; }
.bar { display: inline-block; width: 7rem; height: .65rem; background: #eee; margin-right: .5rem; }
.bar i { display: block; height: 100%; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(26rem, 1fr)); gap: 1rem; }
.plots svg { width: 100%; height: auto; } .scroll { overflow-x: auto; }
@media (max-width: 40rem) { .plots { grid-template-columns: 1fr; } }
"""
HEADS = ("implementation", "median", "spread", "of best", "GFLOP/s", "GB/s", "of the roofline", "temp", "error")


def render(documents: Mapping[str, Document], model: Mapping[str, Mapping[str, float]] | None = None) -> str:
    """Render the page.

    Args:
        documents: the results by operation.
        model: the rows of `bench.end_to_end`, or None.
    """
    ops = list(documents)
    links = "".join(f'<a href="#{op}">{op}</a>' for op in [*ops, *(["model"] if model else [])])
    note = console_table.head(documents[ops[0]]) if ops else ""
    body = "".join(_operation(op, documents[op]) for op in ops) + (_model(model) if model else "")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>DantinoX bench</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body><h1>DantinoX bench</h1>"
        f'<p class="note">{html.escape(note)}</p><nav>{links}</nav>{body}'
        "<h2>How to read it</h2><p>The implementations of a workload take turns. The time is the median over the "
        "turns, the spread half the interquartile range. GFLOP/s and GB/s count what the operation must do and move, "
        "not what an implementation did. The roofline is the least time that the rates of a matmul and of a copy "
        "allow, measured between the turns. Temp is what the compiled program allocates beside arguments and results. "
        "The error is the largest difference from the float32 reference over the largest value, gradients included."
        "</p>"
        "</body></html>\n"
    )


def _operation(op: str, document: Document) -> str:
    rows = document["rows"]
    directions = list(dict.fromkeys(row["direction"] for row in rows))
    axes = list(dict.fromkeys(axis for row in rows for axis in row["sweep"]))
    pictures = [plots.sweep(rows, axis, direction) for axis in axes for direction in directions]
    pictures += [plots.roofline(rows, document["ceilings"], direction) for direction in directions]
    shown = "".join(f"<div>{picture}</div>" for picture in pictures if picture)
    heads = "".join(f"<th>{name}</th>" for name in HEADS)
    lines = "".join(_case(*key, group) for key, group in by_case(rows).items())
    reasons = dict.fromkeys(f"{r['implementation']}: {r['why']}" for r in document["refused"])
    refused = "".join(f"<li>{html.escape(reason)}</li>" for reason in reasons)
    return (
        f'<h2 id="{op}">{op}</h2><div class="plots">{shown}</div>'
        f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table></div>'
        + (f'<p class="note">Not measured in some rows:</p><ul class="note">{refused}</ul>' if refused else "")
    )


def _case(workload: str, direction: str, rows: list[Row]) -> str:
    best = fastest(rows)
    title = f"<b>{html.escape(workload)}</b>, {direction} "
    sizes = f'<span class="note">{html.escape(rows[0]["dtype"])} {html.escape(rows[0]["sizes"])}</span>'
    lines = [f'<tr class="row"><td colspan="{len(HEADS)}">{title}{sizes}</td></tr>']
    for row in rows:
        width = max(0.0, min(1.0, row["roofline"]))
        fill = f"width:{width:.1%};background:{plots.color(row['implementation'])}"
        bar = f'<span class="bar"><i style="{fill}"></i></span>'
        cells = (
            html.escape(row["implementation"]),
            console_table.duration(row["seconds"]),
            f"±{row['spread'] / 2:.0%}",
            f"{row['seconds'] / best:.2f}×",
            f"{row['flops_per_second'] / 1e9:.3g}",
            f"{row['bytes_per_second'] / 1e9:.3g}",
            f"{bar}{row['roofline']:.1%}",
            console_table.size(row["temp_bytes"]),
            "" if row["error"] is None else f"{row['error']:.1e}",
        )
        kind = ' class="best"' if row["seconds"] == best else ""
        lines.append(f"<tr{kind}>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return "".join(lines)


def _model(rows: Mapping[str, Mapping[str, float]]) -> str:
    lines = "".join(
        f"<tr><td>{html.escape(name)}</td><td>"
        + ", ".join(f"{html.escape(quantity)} {value:.3g}" for quantity, value in row.items())
        + "</td></tr>"
        for name, row in rows.items()
    )
    return f'<h2 id="model">Whole model</h2><table><tbody>{lines}</tbody></table>'
