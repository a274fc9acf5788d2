"""Benchmark results: JSON documents, the HTML page, the console table, and the comparison of two documents."""

import copy
import datetime
import html.parser
import io
import json

import pytest
from rich.console import Console

from bench import ablations, compare
from bench.report import console_table, html_report, plots, results
from dantinox.model import flops


def raw(platform: str = "cpu", **changes) -> dict:
    """A pytest-benchmark document of two implementations at three points of a sweep, one refused."""
    rows = []
    for S in (256, 512, 1024):
        for name, milliseconds in (("reference", S / 10), ("xla", S / 100)):
            info = {
                "op": "attention",
                "spec": f"S={S}",
                "sizes": f"B=1 S={S} <&>",
                "dtype": "float32",
                "direction": "forward",
                "implementation": name,
                "sweep": {"S": float(S)},
                "flops": S * 10**6,
                "bytes": S * 10**4,
                "roofline_seconds": S / 1e6,
                "temp_bytes": S * 1000,
                "error": 1.5e-7,
            }
            seconds = [milliseconds / 1e3 * (1 + 0.01 * i) for i in range(5)]
            rows.append({"extra_info": info | changes, "stats": {"data": seconds, "rounds": 5}})
    why = {"op": "attention", "spec": "S=256", "direction": "forward", "implementation": "triton", "why": "no <kernel>"}
    ceilings = {"matmul float32 TFLOP/s": 0.15, "copy GB/s": 9.87654321}
    run = {"timer": "wall clock", "ceilings": ceilings, "refused": [why], "device": "Any CPU"}
    return {"bench": run | {"platform": platform, "jax": "0.11.2"}, "benchmarks": rows}


@pytest.fixture
def document() -> dict:
    return results.from_pytest(raw(), datetime.date(2026, 1, 2))["attention"]


def test_document_contains_medians_rates_and_roofline(document):
    row = document["rows"][1]
    assert (row["spec"], row["implementation"]) == ("S=256", "xla")
    assert row["seconds"] == pytest.approx(2.56e-3 * 1.02, rel=1e-3)
    assert row["flops_per_second"] == pytest.approx(256e6 / row["seconds"], rel=1e-3)
    assert row["roofline"] == pytest.approx(256e-6 / row["seconds"], rel=1e-3)
    assert row["spread"] == pytest.approx(0.02 / 1.02, rel=1e-2)
    assert document["ceilings"]["copy GB/s"] == 9.877 and document["date"] == "2026-01-02"
    assert document["refused"][0]["why"] == "no <kernel>"


def test_files_are_json_with_one_row_per_line(document, tmp_path):
    (path,) = results.write({"attention": document}, tmp_path)
    assert path == tmp_path / "cpu" / "2026-01-02-attention.json"
    assert json.loads(path.read_text()) == document
    assert sum('"implementation": "xla"' in line for line in path.read_text().splitlines()) == 3


def test_device_names_map_to_folders():
    assert results.device_folder("cpu", "whatever") == "cpu"
    assert results.device_folder("gpu", "NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def test_row_without_error_is_never_fastest(document):
    rows = copy.deepcopy(document["rows"][:2])
    rows[0] |= {"error": None, "seconds": 1e-9}
    assert results.fastest(rows) == rows[1]["seconds"]


class References(html.parser.HTMLParser):
    """Collects what a page would load or link to, and the text it shows."""

    def __init__(self) -> None:
        super().__init__()
        self.links, self.tags, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_data(self, data):
        self.text.append(data)


def test_html_page_is_self_contained_and_shows_every_row(document):
    text = html_report.render({"attention": document}, {"train dense": {"tokens/s": 3000.0}})
    page = References()
    page.feed(text)
    assert all(link.startswith("#") for link in page.links), page.links
    assert "script" not in page.tags and "img" not in page.tags and "@import" not in text
    shown = " ".join(page.text)
    for words in ("S=1024", "reference", "B=1 S=256 <&>", "no <kernel>", "train dense", "±1%", "wall clock"):
        assert words in shown, words
    assert page.tags.count("svg") >= 2  # the sweep and the roofline


def test_plots_are_deterministic_and_need_two_points(document):
    rows = document["rows"]
    assert plots.sweep(rows, "S", "forward") == plots.sweep(rows, "S", "forward")
    assert plots.sweep(rows[:2], "S", "forward") is None
    assert plots.sweep(rows, "W", "forward") is None
    assert plots.roofline(rows, {}, "forward") is None


def test_table_shows_every_row_on_one_line(document):
    console = Console(width=100, record=True, file=io.StringIO())
    console_table.show("attention", document, console)
    lines = [line for line in console.export_text().splitlines() if line.strip().startswith("xla")]
    assert len(lines) == 3 and all("1.00x" in line and "1.5e-07" in line for line in lines)


@pytest.mark.parametrize(
    ("seconds", "text"), [(2.5, "2.5 s"), (0.0123, "12.3 ms"), (4.56e-6, "4.56 µs"), (3e-9, "0.003 µs")]
)
def test_durations_are_formatted_with_units(seconds, text):
    assert console_table.duration(seconds) == text


# --- comparison ---


def verdicts(old: dict, new: dict) -> dict[tuple[str, str], str]:
    return {(c.row, c.implementation): c.verdict for c in compare.changes(old, new)}


def test_equal_measurements_report_no_change(document):
    assert set(verdicts(document, document).values()) == {"same"}


def test_on_wall_clock_the_roofline_fraction_is_compared(document):
    """Everything twice as slow, the ceilings too: a neighbour, not a regression."""
    new = copy.deepcopy(document)
    for row in new["rows"]:
        row["seconds"] *= 2
    assert set(verdicts(document, new).values()) == {"same"}
    new["rows"][1]["roofline"] /= 1.3
    assert verdicts(document, new)["S=256, forward", "xla"] == "slower"
    assert verdicts(new, document)["S=256, forward", "xla"] == "faster"


def test_on_a_device_clock_times_are_compared(document):
    old, new = (copy.deepcopy(document) | {"timer": "kernel time"} for _ in range(2))
    new["rows"][0]["seconds"] *= 1.2
    by_entry = verdicts(old, new)
    assert by_entry.pop(("S=256, forward", "reference")) == "slower" and set(by_entry.values()) == {"same"}


def test_change_within_the_spread_is_ignored(document):
    new = copy.deepcopy(document)
    new["rows"][1] |= {"roofline": document["rows"][1]["roofline"] / 1.2, "spread": 0.5}
    assert set(verdicts(document, new).values()) == {"same"}


def test_new_rows_and_changed_sizes_are_not_compared(document):
    new = copy.deepcopy(document)
    new["rows"][0]["sizes"] = "B=2"
    new["rows"][1]["spec"] = "new"
    assert len(compare.changes(document, new)) == len(document["rows"]) - 2


def test_newest_file_of_each_operation_is_used(tmp_path):
    operations = ("2026-01-02-attention", "2025-12-31-attention", "2026-01-01-moe_mlp")
    for name in (*operations, "2026-01-03-toggles", "2026-01-03-ablations"):
        (tmp_path / f"{name}.json").touch()
    assert {op: path.name[:10] for op, path in compare.latest(tmp_path).items()} == {
        "attention": "2026-01-02",
        "moe_mlp": "2026-01-01",
    }


# --- ablations ---


def test_every_ablation_is_a_valid_changed_config():
    for preset in ("nano", "nano-moe", "dante"):
        base = ablations.base_config(preset)
        for name, change in ablations.make_variants(base).items():
            changed = base.replace(**change)
            assert (changed == base) == (name == "base"), name


@pytest.mark.parametrize("preset", ["nano", "nano-moe", "dante"])
def test_dense_and_expert_ablations_match_active_parameters(preset):
    base = ablations.base_config(preset)
    (change,) = (change for name, change in ablations.make_variants(base).items() if "as many active" in name)
    base_model, changed_model = base.model, base.replace(**change).model
    assert bool(base_model.n_experts) != bool(changed_model.n_experts)
    per_expert = base_model.dim + base_model.selection_bias
    router = base_model.n_layers * per_expert * (base_model.n_experts - changed_model.n_experts)
    assert flops.active_parameters(base_model) - flops.active_parameters(changed_model) == router


@pytest.mark.slow
def test_ablations_measure_the_changed_config():
    tiny = {"dim": 32, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 64}
    base = ablations.base_config("nano").replace(**tiny, batch_size=2, seq_len=16, max_context=16, window=8)
    changes = {"base": {}, "untied": {"tie_embeddings": False}}
    rows = ablations.measure(base, changes, rounds=1)
    assert rows["untied"]["parameters"] - rows["base"]["parameters"] == 64 * 32
    assert rows["untied"]["peak_bytes"] > rows["base"]["peak_bytes"] > 0
    assert rows["base"]["tokens_per_second"] > 0
    assert ablations.plot(rows, "two").startswith("<svg")


def test_wrong_rows_are_marked_and_never_the_best(document):
    for row in document["rows"]:
        if row["implementation"] == "xla":
            row |= {"implementation": "mine", "error": 1.6}  # the fastest in every case
    rows = results.by_case(document["rows"])["S=256", "forward"]
    assert [results.is_wrong(row, rows) for row in rows] == [False, True]
    assert results.leaders(rows) == [] and results.fastest(rows) == rows[0]["seconds"]
    page = html_report.render({"attention": document}, None)
    assert page.count('<tr class="wrong">') == 3 and '<tr class="best">' not in page
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    console_table.show("attention", document, console)
    assert console.file.getvalue().count("WRONG 1.6e+00") == 3


@pytest.mark.parametrize(
    ("error", "xla_error", "wrong"),
    [(float("nan"), 1e-7, True), (2e-4, 1e-7, True), (5e-5, 1e-7, False), (2e-3, 1e-3, False), (None, 1e-7, False)],
)
def test_rounding_as_large_as_that_of_xla_is_not_wrong(error, xla_error, wrong):
    rows = [
        {"implementation": "mine", "error": error, "dtype": "float32"},
        {"implementation": "xla", "error": xla_error, "dtype": "float32"},
    ]
    assert [results.is_wrong(row, rows) for row in rows] == [wrong, False]
