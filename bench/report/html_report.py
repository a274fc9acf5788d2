"""The report as one self-contained HTML page: no script, font or picture from elsewhere."""

import html
from collections.abc import Mapping, Sequence

from bench.report import console_table, cpu, plots
from bench.report.history import History, key
from bench.report.results import Document, Row, by_case, fastest, is_wrong, leaders

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1b1b; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; }
.note { color: #595959; font-size: .85rem; overflow-wrap: anywhere; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1rem; } nav a { color: #1f3a5f; padding: .2rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: right; font-weight: 600; border-bottom: 1px solid #999; padding: .2rem .5rem; white-space: nowrap; }
td { text-align: right; padding: .12rem .5rem; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
tr.row td { padding-top: .8rem; border-top: 1px solid #ddd; }
tr.row div { position: sticky; left: .5rem; width: max-content; max-width: calc(100vw - 3rem); white-space: normal; }
tr.best td { font-weight: 600; }
.mark { font-size: .75rem; font-weight: 600; border-radius: .6rem; padding: .05rem .45rem; margin-left: .3rem; }
tr.wrong td { color: #a4161a; font-weight: 600; } .wrong .mark { background: #a4161a; color: #fff; }
.best .mark { background: #dcefdc; color: #1e5b1e; } .tied .mark { background: #ececec; color: #444; }
.slower { color: #a01c20; font-weight: 600; } .faster { color: #1e6b1e; font-weight: 600; } .same { color: #595959; }
.bar { display: inline-block; width: 6rem; height: .65rem; background: #eee; margin-right: .5rem; }
.bar i { display: block; height: 100%; }
.share { display: inline-block; min-width: 3.4em; }
.spark { vertical-align: middle; } .dot:hover { opacity: .6; }
table.model td { text-align: left; white-space: normal; padding: .2rem .5rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 1rem; }
.plots { align-items: start; margin-bottom: 1rem; } .plots svg { width: 100%; height: auto; }
@media (max-width: 40rem) {
  body { margin: 1rem auto; padding: 0 .75rem; font-size: 14px; }
  th, td { padding-left: .35rem; padding-right: .35rem; } .bar { width: 3.5rem; }
  td:first-child { max-width: 9.5rem; white-space: normal; } tr.row td:first-child { max-width: none; }
}
"""
HEADS = ("implementation", "median", "spread", "of best", "GFLOP/s", "GB/s", "of the roofline", "temp", "error")
NO_HISTORY = History()


def render(
    documents: Mapping[str, Document],
    model: Mapping[str, Mapping[str, float]] | None = None,
    histories: Mapping[str, History] | None = None,
) -> str:
    """Render the page.

    Args:
        documents: the results by operation, all of one run.
        model: the rows of `bench.end_to_end`, or None.
        histories: what was measured before, by operation.

    Raises:
        ValueError: the documents are of different CPUs.
    """
    ops = list(documents)
    cpus = {cpu.name(document) for document in documents.values() if document["platform"] == "cpu"}
    if len(cpus) > 1:
        raise ValueError(f"the results are of different CPUs ({'; '.join(sorted(cpus))}); one page shows one")
    links = "".join(f'<a href="#{op}">{op}</a>' for op in [*ops, *(["model"] if model else [])])
    note = console_table.head(documents[ops[0]]) if ops else ""
    sections = (_operation(op, documents[op], (histories or {}).get(op, NO_HISTORY)) for op in ops)
    body = "".join(sections) + (_model(model) if model else "")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>DantinoX bench</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body><h1>DantinoX bench</h1>"
        f'<p class="note">{html.escape(note)}</p><nav>{links}</nav>{body}'
        "<h2>How to read it</h2><p>The implementations of a workload take turns. The time is the median over the "
        "turns, the spread half the interquartile range. An implementation is the best if it is ahead of every other "
        "one by more than both spreads together; otherwise those within the spreads are tied. GFLOP/s and GB/s count "
        "what the operation must do and move, not what an implementation did. The roofline is the least time that the "
        "rates of a matmul and of a copy allow, measured between the turns. Temp is what the compiled program "
        "allocates beside arguments and results. The error is the largest difference from the float32 reference over "
        "the largest value, gradients included. The change is that of the time since the last committed file of the "
        "same device and CPU, gray within 5% and the spreads; the history shows all files of that device and CPU. On "
        "wall clock both take the time relative to the roofline, because the speed of a shared machine drifts.</p>"
        "</body></html>\n"
    )


def _operation(op: str, document: Document, history: History) -> str:
    rows = document["rows"]
    directions = list(dict.fromkeys(row["direction"] for row in rows))
    axes = list(dict.fromkeys(axis for row in rows for axis in row["sweep"]))
    pictures = [plots.sweep(rows, axis, direction) for axis in axes for direction in directions]
    pictures += [plots.roofline(rows, document["ceilings"], direction) for direction in directions]
    shown = "".join(f"<div>{picture}</div>" for picture in pictures if picture)
    columns = [*HEADS, *(["change"] if history.changes else [])]
    columns += ["history"] if any(len(points) > 1 for points in history.points.values()) else []
    heads = "".join(f"<th>{name}</th>" for name in columns)
    lines = "".join(_case(*key, group, history, columns) for key, group in by_case(rows).items())
    reasons = dict.fromkeys(f"{r['implementation']}: {r['why']}" for r in document["refused"])
    refused = "".join(f"<li>{html.escape(reason)}</li>" for reason in reasons)
    machine = cpu.name(document) or "a CPU without a name" if document["platform"] == "cpu" else document["device"]
    since = f"Change since {history.name}." if history.name else f"No earlier measurement of {machine} is committed."
    return (
        f'<h2 id="{op}">{op}</h2><div class="plots">{shown}</div><p class="note">{html.escape(since)}</p>'
        f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table></div>'
        + (f'<p class="note">Not measured in some rows:</p><ul class="note">{refused}</ul>' if refused else "")
    )


def _case(workload: str, direction: str, rows: list[Row], history: History, columns: Sequence[str]) -> str:
    best, leading = fastest(rows), leaders(rows)
    title = f"<b>{html.escape(workload)}</b>, {direction} "
    sizes = f'<span class="note">{html.escape(rows[0]["dtype"])} {html.escape(rows[0]["sizes"])}</span>'
    lines = [f'<tr class="row"><td colspan="{len(columns)}"><div>{title}{sizes}</div></td></tr>']
    for row in rows:
        width = max(0.0, min(1.0, row["roofline"]))
        fill = f"width:{width:.1%};background:{plots.color(row['implementation'])}"
        bar = f'<span class="bar"><i style="{fill}"></i></span>'
        kind = "" if row["implementation"] not in leading else "best" if len(leading) == 1 else "tied"
        kind = "wrong" if is_wrong(row, rows) else kind
        mark = f'<span class="mark">{kind}</span>' if kind else ""
        cells = [
            html.escape(row["implementation"]) + mark,
            console_table.duration(row["seconds"]),
            f"±{row['spread'] / 2:.0%}",
            f"{row['seconds'] / best:.2f}×",
            f"{row['flops_per_second'] / 1e9:.3g}",
            f"{row['bytes_per_second'] / 1e9:.3g}",
            f'{bar}<span class="share">{row["roofline"]:.1%}</span>',
            console_table.size(row["temp_bytes"]),
            "" if row["error"] is None else f"{row['error']:.1e}",
        ]
        cells += [_change(row, history)] if "change" in columns else []
        cells += [_sparkline(row, history)] if "history" in columns else []
        lines.append(
            (f'<tr class="{kind}">' if kind else "<tr>") + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
        )
    return "".join(lines)


def _change(row: Row, history: History) -> str:
    change = history.changes.get(key(row))
    if change is None:
        return '<span class="same">new</span>'
    arrow = {"slower": "▲ ", "faster": "▼ ", "same": ""}[change.verdict]
    percent = f"{change.ratio - 1:+.0%}".replace("-", "−")
    title = f"{change.verdict}; ±{change.allowed:.0%} does not count"
    return f'<span class="{change.verdict}" title="{title}">{arrow}{percent}</span>'


def _sparkline(row: Row, history: History) -> str:
    points = history.points.get(key(row), ())
    wall = any(point.relative for point in points)
    texts = [f"{p.value:.3g} times the roofline's time" if wall else console_table.duration(p.value) for p in points]
    titles = [f"{point.date}: {text}" for point, text in zip(points, texts, strict=True)]
    return plots.sparkline([point.value for point in points], titles, plots.color(row["implementation"]))


def _model(rows: Mapping[str, Mapping[str, float]]) -> str:
    lines = "".join(
        f"<tr><td>{html.escape(name)}</td><td>"
        + ", ".join(f"{html.escape(quantity)} {value:.3g}" for quantity, value in row.items())
        + "</td></tr>"
        for name, row in rows.items()
    )
    return (
        f'<h2 id="model">Whole model</h2><div class="scroll"><table class="model"><tbody>{lines}</tbody></table></div>'
    )
