"""Benchmark results over time and between machines: the CPU in the head, changes, history, best or tied."""

import html
import itertools
import json
import re
import subprocess

import pytest

from bench import compare
from bench.operations import record
from bench.report import console_table, cpu, history, html_report, plots, results
from tests.bench.test_report import raw

XEON = {"model": "Xeon <8>", "cores": 2, "load_average": [0.5, 1.25, 2.0]}
EPYC = {"model": "AMD EPYC", "cores": 2, "load_average": [3.0, 3.0, 3.0]}


def document(date: str = "2026-01-02", on: dict | None = XEON, slower: float = 1.0) -> dict:
    """The results of a day, on a CPU; None: a file of an earlier version, without a CPU in its head."""
    measured = raw()
    measured["bench"] |= {"cpu": on} if on else {}
    made = results.from_pytest(measured)["attention"] | {"date": date}
    for row in made["rows"]:
        row["seconds"] *= slower
        row["roofline"] /= slower
    return made


def row(implementation: str, seconds: float, spread: float = 0.0, error: float | None = 1e-7) -> dict:
    numbers = {"seconds": seconds, "spread": spread, "error": error}
    return {"implementation": implementation, "dtype": "float32", **numbers}


# --- the CPU ---


def test_run_records_model_cores_and_load_of_the_cpu():
    facts = record.run_facts(None, [])["cpu"]
    assert facts["model"] and facts["cores"] >= 1 and len(facts["load_average"]) == 3
    assert cpu.this_cpu() == facts  # the load is that of the first call


def test_model_name_is_read_from_cpuinfo(tmp_path):
    path = tmp_path / "cpuinfo"
    path.write_text("processor\t: 0\nmodel name\t: Some  CPU @ 2.80GHz\nprocessor\t: 1\nmodel name\t: Some  CPU\n")
    assert cpu._model(path) == "Some CPU @ 2.80GHz"
    path.write_text("processor : 0\nBogoMIPS : 50\n")  # ARM names none
    assert cpu._model(path)
    assert cpu._model(tmp_path / "missing")


def test_head_names_the_cpu_and_its_load():
    line = console_table.head(document())
    assert "Any CPU · Xeon <8>, 2 cores, load average 0.5, 1.25, 2 · 2026-01-02" in line
    assert html.escape(line) in html_report.render({"attention": document()})
    assert cpu.describe({"cpu": XEON | {"cores": 1, "load_average": []}}) == "Xeon <8>, 1 core"


def test_only_equal_cpus_are_the_same():
    busy = document(on=XEON | {"load_average": [9.0, 9.0, 9.0]})
    assert cpu.same(document(), busy)
    for other in (EPYC, XEON | {"cores": 4}, None):
        assert not cpu.same(document(), document(on=other)) and not cpu.same(document(on=other), document())
    assert cpu.same(document(on=None), document(on=None))
    gpu = [document(on=on) | {"platform": "gpu"} for on in (XEON, EPYC, None)]
    assert all(cpu.same(gpu[0], other) for other in gpu)  # the GPU was measured


def test_files_without_a_cpu_still_load():
    for path in (results.ROOT / "profiles" / "cpu").glob("????-??-??-decode_attention.json"):
        assert cpu.describe(json.loads(path.read_text())) is not None
    page = html_report.render({"attention": document(on=None)})
    assert "Any CPU · 2026-01-02" in page
    assert "No earlier measurement of a CPU without a name is committed." in page


def test_rows_of_another_cpu_are_not_merged_into_a_file(tmp_path):
    half = document()
    half["rows"] = half["rows"][:2]
    for on in (EPYC, None):
        results.write({"attention": document(on=on)}, tmp_path)
        (path,) = results.write({"attention": half}, tmp_path)
        assert json.loads(path.read_text()) == half
    results.write({"attention": document(on=XEON | {"load_average": [7.0, 7.0, 7.0]})}, tmp_path)
    (path,) = results.write({"attention": half}, tmp_path)
    assert len(json.loads(path.read_text())["rows"]) == 6  # the same CPU, with another load


def test_page_refuses_results_of_two_cpus():
    with pytest.raises(ValueError, match=r"different CPUs \(AMD EPYC, 2 cores; Xeon <8>, 2 cores\)"):
        html_report.render({"attention": document(), "moe_mlp": document(on=EPYC)})


# --- comparison ---


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A function that commits documents to a repository of its own and writes new ones beside."""
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]

    def make(*committed: dict, new: dict) -> list[str]:
        for made in committed:
            results.write({"attention": made}, tmp_path / "profiles")
        for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "measured"]):
            subprocess.run([*git, *words], cwd=tmp_path, check=True)
        results.write({"attention": new}, tmp_path / "new")
        return ["--device", "cpu", "--new", str(tmp_path / "new")]

    return make


def test_other_cpu_is_refused_in_one_line(repository, capsys):
    words = repository(document(on=XEON, date="2026-01-01"), new=document(on=EPYC))
    with pytest.raises(SystemExit) as stop:
        compare.main(words)
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        "bench.compare: error: attention is not compared: 2026-01-01-attention.json was measured on Xeon <8>, 2 cores, "
        "this one on AMD EPYC, 2 cores; commit one of this CPU first\n"
    )


def test_file_without_a_cpu_is_not_compared_with_one_that_names_it(repository, capsys):
    words = repository(document(on=None, date="2026-01-01"), new=document())
    with pytest.raises(SystemExit):
        compare.main(words)
    assert "was measured on a CPU without a name, this one on Xeon <8>" in capsys.readouterr().err


def test_two_files_without_a_cpu_are_compared_with_a_warning(repository, capsys):
    words = repository(document(on=None, date="2026-01-01"), new=document(on=None, slower=1.5))
    assert compare.main(words) == 1
    out = capsys.readouterr().out
    assert "neither file names its CPU; the comparison holds only on the same one" in out and "slower" in out


def test_newest_committed_file_of_the_same_cpu_is_compared(repository, capsys):
    old, newer = document(date="2026-01-01", slower=2.0), document(date="2026-01-03", on=EPYC)
    words = repository(document(date="2025-01-01"), old, newer, new=document(date="2026-01-04"))
    assert compare.main(words) == 0
    out = capsys.readouterr().out
    assert "2026-01-01-attention.json (HEAD)" in out and "faster" in out


# --- the page ---


def cells(page: str, implementation: str) -> list[str]:
    """The first row of an implementation, as text."""
    (first, *_) = re.findall(rf"<tr[^>]*><td>{implementation}\b.*?</tr>", page)
    return [re.sub(r"<(?!svg|circle|title)[^>]*>", "", cell) for cell in re.findall(r"<td>(.*?)</td>", first)]


def test_page_shows_the_change_since_the_committed_file_and_the_history(repository, tmp_path):
    new = document(date="2026-01-04", slower=1.5)
    new["rows"][0] |= {"roofline": document()["rows"][0]["roofline"] / 1.03}  # within 5%
    repository(document("2026-01-01"), document("2026-01-02"), document("2026-01-03", on=EPYC), new=new)
    results.write({"attention": new}, tmp_path / "profiles")
    found = history.collect({"attention": new}, tmp_path / "profiles")
    page = html_report.render({"attention": new}, histories=found)
    assert "Change since 2026-01-02-attention.json." in page
    assert "<th>change</th><th>history</th>" in page
    *_, reference_change, reference_history = cells(page, "reference")
    *_, xla_change, xla_history = cells(page, "xla")
    assert (reference_change, xla_change) == ("+3%", "▲ +50%")
    assert 'class="same" title="same; ±7% does not count"' in page and 'class="slower"' in page
    dates = [re.findall(r"<title>(\S+):", text) for text in (reference_history, xla_history)]
    assert dates == [["2026-01-01", "2026-01-02", "2026-01-04"]] * 2  # not the day of the other CPU


def test_page_without_a_committed_file_has_no_change(repository, tmp_path):
    new = document()
    repository(document(on=EPYC), new=new)
    page = html_report.render({"attention": new}, histories=history.collect({"attention": new}, tmp_path / "profiles"))
    assert "<th>change</th>" not in page and "<th>history</th>" not in page
    assert "No earlier measurement of Xeon &lt;8&gt;, 2 cores is committed." in page


def test_history_works_without_a_repository(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    found = history.collect({"attention": document()}, tmp_path)["attention"]
    assert (found.name, found.changes, found.points) == ("", {}, {})


def test_history_of_a_device_clock_is_in_seconds():
    files = [document(day) | {"timer": "kernel time", "platform": "gpu"} for day in ("2026-01-01", "2026-01-02")]
    page = html_report.render({"attention": files[1]}, histories={"attention": history.make(files[1], files)})
    assert "2026-01-01: 26.1 ms" in cells(page, "reference")[-1]


def test_sparkline_draws_noise_flat_and_needs_two_points():
    assert plots.sparkline([1.0], ["a"], "red") == ""

    def heights(values):
        text = plots.sparkline(values, [str(v) for v in values], "red")
        return [float(y) for y in re.findall(r'cy="([\d.]+)"', text)]

    assert max(heights([1.0, 1.01, 1.0])) - min(heights([1.0, 1.01, 1.0])) < 1.5
    low, high = heights([1.0, 5.0])
    assert low - high > 12  # larger is higher
    assert heights([0.0, 0.0]) == [12.0, 12.0]


# --- best or tied ---


def test_best_needs_a_distance_beyond_both_spreads():
    assert results.leaders([row("a", 1.0, 0.1), row("b", 1.2, 0.1), row("c", 2.0)]) == ["a"]  # 0.2 > 0.05 + 0.06
    assert results.leaders([row("a", 1.0, 0.1), row("b", 1.1, 0.1), row("c", 2.0)]) == ["a", "b"]
    assert results.leaders([row("a", 1.0), row("b", 1.0)]) == ["a", "b"]
    assert results.leaders([row("a", 1.0), row("b", 0.5, error=None), row("c", 2.0)]) == ["a"]
    assert results.leaders([row("a", 1.0), row("b", 0.5, error=None)]) == []  # nothing to compare with


def test_page_marks_one_best_or_several_tied():
    made = document()
    assert made["rows"][1]["implementation"] == "xla"
    page = html_report.render({"attention": made})
    assert page.count('<span class="mark">best</span>') == 3 and "tied</span>" not in page
    for one in made["rows"]:
        one["spread"] = 2.0
    page = html_report.render({"attention": made})
    assert page.count('<span class="mark">tied</span>') == 6 and "best</span>" not in page


# --- the plots, the width ---


def test_every_dot_of_the_roofline_has_a_title_and_every_workload_a_label():
    made = document()
    text = plots.roofline(made["rows"], made["ceilings"], "forward")
    titles = re.findall(r'<g class="dot"><title>(.*?)</title>', text)
    assert len(titles) == len(made["rows"]) and 'id="dot-' not in text
    assert titles[1].startswith("xla, S=256, forward: ") and "of the roofline" in titles[1]
    for name in ("S=256", "S=512", "S=1024", "reference", "xla"):
        assert f"<!-- {name} -->" in text, name  # matplotlib's comment before the outlines of a text


def test_labels_are_spread_apart():
    placed = plots.spread_apart([0.1, 0.5, 0.5, 0.51, 0.99], gap=0.05, low=0.0, high=0.95)
    assert placed == sorted(placed) and placed[0] == 0.1 and placed[-1] == 0.95
    assert all(b - a >= 0.05 - 1e-9 for a, b in itertools.pairwise(placed))
    assert plots.spread_apart([], 0.1, 0, 1) == []


def test_page_fits_a_narrow_screen():
    page = html_report.render({"attention": document()}, {"train": {"tokens/s": 1.0}})
    assert page.count('<div class="scroll"><table') == page.count("<table") == 2
    assert "width=device-width" in page and "@media (max-width: 40rem)" in page and "min(26rem, 100%)" in page
