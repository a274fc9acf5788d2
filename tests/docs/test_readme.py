"""README: its commands work, its tables are current, and its pictures and folders exist."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.readme_messages import documented_messages

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
SHELL = [line for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines() if line]
PROGRAMS = [line.removeprefix(".venv/bin/python ") for line in SHELL if line.startswith(".venv/bin/python")]
SMALL = "--steps 2 --batch-size 2 --sample-tokens 4 --eval-batches 1"


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    """A folder with a tiny runs/nano, in which the commands are run."""
    folder = tmp_path_factory.mktemp("readme")
    done = run(f"-m dantinox.train --run nano {SMALL}", folder)
    assert done.returncode == 0, done.stderr
    (folder / "sweeps").symlink_to(ROOT / "sweeps")
    return folder


def run(command, folder):
    words = [sys.executable, *shlex.split(command)]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=900)


def test_every_readme_command_is_tested():
    tools = ("make ", ".venv/bin/python -m dantinox.", ".venv/bin/tensorboard --logdir runs")
    assert SHELL and all(line.startswith(tools) for line in SHELL)


@pytest.mark.parametrize("command", PROGRAMS)
def test_readme_program_runs(command, where):
    # The flags stay as README has them; what would take minutes is made small by more flags.
    if "dantinox.train" in command and "--help" not in command:
        command += " --steps 3 --sample-tokens 4 --eval-batches 1" if "--resume" in command else ""
        # With nano's vocabulary the text is read and cut once for all of them.
        little = f" {SMALL} --n-layers 1 --dim 64 --n-heads 2 --n-kv-heads 1 --bpe-vocab-size 1024"
        command += little if "--dry-run" in command else ""
    if "dantinox.sweep" in command and "--dry-run" not in command:
        command += " --dry-run"  # minutes; what it does is tested in test_sweep.py
    done = run(command, where)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_readme_python_example_runs(where):
    code = re.search(r"```python\n(.*?)```", README, re.S).group(1)
    done = subprocess.run(
        [sys.executable, "-c", code + "\nprint(ids)"], cwd=where, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"\[\[\d+(, \d+)*\]\]", done.stdout.strip())


@pytest.mark.parametrize("line", [line for line in SHELL if line.startswith("make ")])
def test_readme_make_target_exists(line):
    """The Makefile has the target and passes README's variables on; the targets themselves run in .ci/run."""
    done = subprocess.run(["make", "-n", *shlex.split(line)[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for word in shlex.split(line)[2:]:
        assert word.partition("=")[2] in done.stdout


def test_presets_named_in_readme_exist():
    from dantinox.config import presets

    assert set(re.findall(r"PRESET=([\w-]+)", README)) <= set(presets())
    listed = re.search(r"Presets: (.*?)\.", README).group(1)
    assert re.findall(r"`([\w-]+)`", listed) == ["nano", "nano-moe", "dante", "dante-moe", "h100"]
    assert sorted(re.findall(r"`([\w-]+)`", listed)) == presets()


def test_settings_table_is_current():
    done = subprocess.run([sys.executable, "scripts/config_table.py"], cwd=ROOT, capture_output=True, text=True)
    held = re.search(r"<!-- settings.*?-->\n(.*?)<!-- end of settings -->", README, re.S).group(1)
    assert held.strip() == done.stdout.strip()


def test_every_promised_message_is_compared_with_the_real_one():
    tests = [path.read_text() for path in (ROOT / "tests" / "dantinox").rglob("test_*.py")]
    compared = {name for text in tests for name in re.findall(r'message_pattern\("(.*?)"\)', text)}
    assert compared == set(documented_messages())


def test_each_common_fault_names_existing_tests():
    """tests/README.md, with the docstrings of the tests that it names."""
    rows = re.findall(r"^\| (\d+) \| (.*?) \| (.*?) \|$", (ROOT / "tests" / "README.md").read_text(), re.M)
    assert [int(number) for number, _, _ in rows] == list(range(1, 19))
    named = {}
    for number, _, cell in rows:
        for file, name in re.findall(r"`(\S+)` `(\w+)`", cell):
            named.setdefault(file, {})[name] = number
    assert {number for names in named.values() for number in names.values()} == {number for number, _, _ in rows}
    for file, names in named.items():
        tree = ast.parse((ROOT / "tests" / file).read_text())
        told = {node.name: ast.get_docstring(node) for node in tree.body if isinstance(node, ast.FunctionDef)}
        for name, number in names.items():
            assert (told.get(name) or "").startswith(f"Fault {number}: "), f"{file} {name}"


def test_tutorial_tables_match_the_measurements():
    from bench.tutorial import __main__ as program
    from bench.tutorial import common
    from dantinox.kernels import tutorial

    for name in tutorial.TUTORIALS:
        module, document = program.load(name), common.load_committed(name)
        text = (ROOT / module.README).read_text()
        assert common.update_readme(text, module, document) == text, f"{name}: `make tutorial` writes it"
        assert {*tutorial.steps(name)} <= {*document["rows"]} and not module.wrong(document), name


def test_readme_pictures_and_folders_exist():
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README) + re.findall(r"^\| `([a-z]+/)` \|", README, re.M):
        assert (ROOT / path).exists(), path
