"""A custom kernel: the file and the line that the guides show, in a copy of DantinoX."""

import inspect
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from importlib import util
from pathlib import Path

import jax
import pytest
from jax.sharding import PartitionSpec as P

from bench.judge import cases, forms, presence
from dantinox import kernels
from dantinox.kernels import registry
from dantinox.kernels.dispatch import target_device

ROOT = Path(__file__).parents[2]
GUIDES = ROOT / "docs" / "guides"
GUIDE = (GUIDES / "index.md").read_text()
FILE = (GUIDES / "my_attention.py").read_text()
LINE = re.findall(r"```text\n(.*?)```", GUIDE, re.S)[0]
(COMMANDS,) = (block.splitlines() for block in re.findall(r"```sh\n(.*?)```", GUIDE, re.S) if "dantinox.train" in block)
OTHER = ROOT / ".venv-aot" / "bin" / "python"
GUIDED = ("attention", "grouped_matmul", "moe_mlp", "decode_attention", "linear_cross_entropy")
COMPILER = sys.executable if util.find_spec("libtpu") else str(OTHER) if OTHER.exists() else None
TOPS = (
    "reference",
    "kernels",
    "dantinox",
    "bench",
    "tests",
    "scripts",
    "docs",
    "pyproject.toml",
    "README.md",
    "profiles",
)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """DantinoX with the file and the line."""
    folder = tmp_path_factory.mktemp("mine")
    for name in TOPS:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    (folder / "kernels" / "ops" / "attention" / "mine.py").write_text(FILE)
    table = folder / "kernels" / "ops" / "attention" / "api.py"
    head, triton, tail = re.split(
        r"(^ {8}dispatch.Implementation\(\n {12}\"triton\".*?^ {8}\),\n)", table.read_text(), flags=re.M | re.S
    )
    assert LINE.count("\n") == 1
    table.write_text(head + triton + LINE + tail)
    return folder


def run(folder, *words, python=sys.executable):
    done = subprocess.run(
        [python, "-m", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def words(program):
    """The words after -m of the guide's command for a program."""
    (line,) = [line for line in COMMANDS if f"-m {program} " in line]
    return line.partition("-m ")[2].split()


@pytest.mark.parametrize("op", GUIDED)
def test_guide_shows_file_of_operation(op):
    text = (GUIDES / f"{op}.md").read_text()
    assert f"literalinclude}} my_{op}.py" in text and f"make judge OP={op} FILE=docs/guides/my_{op}.py" in text
    function = runpy.run_path(str(GUIDES / f"my_{op}.py"))[op]
    signature = str(inspect.signature(function)).replace("'", "")
    assert f"`{op}{signature}`" in GUIDE


DEVICES = {"": ("cpu", "cpu"), "_hopper": ("gpu", "NVIDIA H100 80GB HBM3"), "_triton": ("gpu", "NVIDIA H100 80GB HBM3")}


@pytest.mark.parametrize("form", DEVICES)
@pytest.mark.parametrize("op", GUIDED)
@pytest.mark.sampled(2)
def test_files_of_the_guides_support_shard_map(monkeypatch, op, form):
    """Traced forward and backward, with arrays that vary over an axis of a mesh."""
    path = GUIDES / f"my_{op}{form}.py"
    if form == "_triton":
        pytest.importorskip("jax_triton")
    if not path.exists():
        pytest.skip("it has a file for TPUs only")
    monkeypatch.setattr(registry, "_registered", {})
    kernels.register(op, "mine", runpy.run_path(str(path))[op])
    case = presence.simulated_cases(op)[0]
    function = forms.program(op, "mine", case.workload, gradients=op != "decode_attention")
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.shard_map(lambda *args: function(*args), mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    with target_device(*DEVICES[form]):
        jax.make_jaxpr(lambda *args: sharded(*args))(*forms.arguments(case, cases.draw(case)))


@pytest.mark.slow
def test_parity_tests_run_custom_kernel(copy):
    chosen = ["-q", "-p", "no:cacheprovider", "-rs", "--import-mode=importlib"]
    said = run(copy, *words("pytest"), *chosen)
    assert int(re.search(r"(\d+) passed", said)[1]) >= 15, said[-3000:]
    assert "failed" not in said and "skipped" not in said
    # Nothing else minds the new name.
    more = ["tests/kernels/test_dispatch.py", "tests/docs/test_readme.py::test_settings_table_is_current"]
    said = run(copy, "pytest", *more, *chosen)
    assert " passed" in said and "failed" not in said


@pytest.mark.slow
def test_benchmark_times_custom_kernel(copy):
    quick = ["--direction", "forward+backward", "--budget", "0.05", "--out", "out", "--html", "out/page.html"]
    run(copy, *words("bench"), *quick)
    (path,) = (copy / "out" / "cpu").glob("*-attention.json")
    rows = {row["implementation"]: row for row in json.loads(path.read_text())["rows"]}
    assert rows.keys() == {"mine", "xla"} and rows["mine"]["error"] < 1e-5


@pytest.mark.slow
def test_model_trains_with_custom_kernel(copy):
    (copy / "text.txt").write_text("to be or not to be, that is the question. " * 200)
    tiny = "--data text.txt --tokenizer char --steps 2 --batch-size 2 --seq-len 32 --n-layers 1 --dim 32 --n-heads 2"
    tiny += " --n-kv-heads 1 --sample-tokens 4 --eval-batches 1"
    losses = {}
    for name, command in (("mine", words("dantinox.train")), ("xla", ["dantinox.train", "--attn", "xla"])):
        run(copy, *command, "--run", name, *tiny.split())
        log = [json.loads(line) for line in (copy / "runs" / name / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [row["loss"] for row in log]
    assert losses["mine"] == pytest.approx(losses["xla"], abs=1e-5)
    assert "attention mine" in " ".join(run(copy, "dantinox.doctor").split())


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="no Python here has libtpu; make aot builds one")
def test_aot_compiles_custom_kernel(copy):
    chosen = ["--spec", "aot d64 window, gate", "--out", "aot"]
    run(copy, *words("bench.aot"), *chosen, python=COMPILER)
    rows = json.loads((copy / "aot" / "v6e.json").read_text())["rows"]
    assert rows and all("/ mine /" in key for key in rows)
    row = rows["attention / aot d64 window, gate / mine / bfloat16 / forward"]
    assert row["status"] == "compiled" and row["kernels"][0]["name"].startswith("my_attention")
