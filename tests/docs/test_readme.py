"""README and docs/: commands and examples run, tables are current, links lead somewhere."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.documented_messages import documented_messages

ROOT = Path(__file__).parents[2]
PAGES = {
    "README.md": (ROOT / "README.md").read_text(),
    **{f"docs/{path.name}": path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))},
}
SMALL = "--steps 2 --batch-size 2 --sample-tokens 4 --eval-batches 1"
# With nano's vocabulary the text is read and tokenized once for all of them.
TINY_MODEL = f"{SMALL} --n-layers 1 --dim 64 --n-heads 2 --n-kv-heads 1 --bpe-vocab-size 1024"
TOOLS = (
    "git clone ",
    "make ",
    ".venv/bin/python -m dantinox.",
    ".venv/bin/tensorboard --logdir runs",
)


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def shell_lines(text):
    """The commands of a page, without comments."""
    lines = [line.partition(" #")[0].strip() for block in blocks(text, "sh") for line in block.splitlines()]
    return [line for line in lines if line]


COMMANDS = list(dict.fromkeys(line for text in PAGES.values() for line in shell_lines(text)))
PROGRAMS = [line.removeprefix(".venv/bin/python ") for line in COMMANDS if line.startswith(".venv/bin/python")]


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


def small(command):
    """A documented command with flags that make minutes seconds."""
    if "dantinox.train" in command and "--help" not in command:
        if "--resume" in command:
            return f"{command} --steps 3 --sample-tokens 4 --eval-batches 1"
        return f"{command} {TINY_MODEL}" + (" --steps 4 --profile-steps 2:3" if "--profile-steps" in command else "")
    if "dantinox.sweep" in command and "--dry-run" not in command:
        return f"{command} --dry-run"
    return command


def test_every_documented_command_is_tested():
    assert len(COMMANDS) > 20
    assert [line for line in COMMANDS if not line.startswith(TOOLS)] == []


@pytest.mark.parametrize("command", PROGRAMS)
@pytest.mark.slow
def test_documented_program_runs(command, where):
    done = run(small(command), where)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if blocks(text, "python")])
@pytest.mark.slow
def test_documented_python_runs(page, where):
    code = "\n".join(block for block in blocks(PAGES[page], "python") if "dispatch.Implementation(" not in block)
    done = subprocess.run([sys.executable, "-c", code], cwd=where, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("make ")])
def test_documented_make_target_exists(line):
    """The Makefile has the target and passes the variables on; the targets themselves run in .ci/run."""
    done = subprocess.run(["make", "-n", *shlex.split(line)[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for word in shlex.split(line)[2:]:
        assert word.partition("=")[2] in done.stdout


def test_documented_presets_exist():
    from dantinox.config import presets

    named = {name for text in PAGES.values() for name in re.findall(r"PRESET=([\w-]+)", text)}
    listed = re.findall(r"`([\w-]+)`", re.search(r"Presets: (.*?)\.", PAGES["docs/settings.md"])[1])
    assert named <= set(presets()) and sorted(listed) == presets()


def test_readme_fits_on_few_screens():
    assert len(PAGES["README.md"].splitlines()) <= 150


def test_links_of_readme_and_contributing_lead_somewhere():
    for page in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / page).read_text()):
            assert target.startswith("https://") or (ROOT / target).exists(), f"{page}: {target}"


def test_settings_table_is_current():
    done = subprocess.run([sys.executable, "scripts/config_table.py"], cwd=ROOT, capture_output=True, text=True)
    held = re.search(r"<!-- settings.*?-->\n(.*?)<!-- end of settings -->", PAGES["docs/settings.md"], re.S).group(1)
    assert held.strip() == done.stdout.strip()


def test_table_of_attention_by_card_is_current():
    done = subprocess.run([sys.executable, "scripts/attention_table.py"], cwd=ROOT, capture_output=True, text=True)
    held = re.search(r"<!-- attention: .*?-->\n(.*?)<!-- end of attention -->", PAGES["README.md"], re.S).group(1)
    assert done.stdout and held == done.stdout, done.stderr


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
