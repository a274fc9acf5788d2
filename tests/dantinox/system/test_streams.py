"""Standard output and error: any encoding, closed streams, readers that go away, a full disk."""

import ast
import io
import json
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dantinox.system import streams
from dantinox.system.json_text import json_text

ROOT = Path(__file__).parents[3]
ENCODINGS = "ascii cp1252 latin-1 cp437 shift_jis big5 koi8-r utf-16 utf-32 utf-8".split()
PROGRAM = """
    import os, sys
    sys.path.insert(0, sys.argv[1])
    from dantinox.system import streams

    def main(argv):
        {body}

    streams.run_main(main)
"""
PRINTS = "print(chr(233) * 70_000)"
FLUSHES = "print(chr(233), flush=True)"


def start(body: str, redirection: str = "", **variables: str) -> subprocess.CompletedProcess[bytes]:
    """Run a program whose main function is `body` in a shell, as `PROGRAM REDIRECTION`; the exit code is its own."""
    code = textwrap.dedent(PROGRAM).format(body=body)
    pipefail = f'"$0" -S -c "$1" "$2" {redirection}' + ("; exit ${PIPESTATUS[0]}" if "|" in redirection else "")
    command = ["bash", "-c", pipefail, sys.executable, code, str(ROOT)]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(command, capture_output=True, env=inherited | variables, timeout=60)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_text_outside_the_encoding_is_printed_as_escapes(encoding, monkeypatch):
    text = "né 学 \u2588 \udce9\n"
    output = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, encoding, errors="strict", newline="\n"))
    streams.prepare()
    print(text, end="", flush=True)
    assert output.getvalue().decode(encoding) == text.encode(encoding, "backslashreplace").decode(encoding)


@pytest.mark.parametrize("encoding", ["ascii", "ascii:strict", "cp1252", "utf-16", "utf-8"])
def test_program_prints_in_the_encoding_of_the_environment(encoding):
    done = start(FLUSHES, PYTHONIOENCODING=encoding)
    codec = encoding.partition(":")[0]
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode(codec) == "é\n".encode(codec, "backslashreplace").decode(codec)


def test_program_prints_where_the_locale_is_c():
    done = start(FLUSHES, LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"\\xe9\n", b"")


@pytest.mark.parametrize("body", [PRINTS, FLUSHES, "raise SystemExit(0)", "print('x', file=sys.stderr)"])
@pytest.mark.parametrize("redirection", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_error(body, redirection):
    assert (done := start(body, redirection)).returncode == 0 and b"Traceback" not in done.stdout + done.stderr


def test_file_never_takes_the_place_of_a_closed_stream(tmp_path):
    path = tmp_path / "file"
    done = start(
        f"file = open({str(path)!r}, 'wb'); os.write(1, b'noise'); os.write(2, b'noise'); file.write(b'kept')",
        ">&- 2>&-",
    )
    assert done.returncode == 0 and path.read_bytes() == b"kept"


@pytest.mark.parametrize(
    ("body", "redirection", "code"),
    [
        (PRINTS, "| true", 141),
        (f"import time; time.sleep(0.2); {FLUSHES}", "| true", 141),
        ("import time; time.sleep(0.2); print('x')", "| true", 141),  # in the buffer when main returns
        ("import time; time.sleep(0.2); print('x'); raise SystemExit(2)", "| true", 2),
        ("import time; time.sleep(0.2); streams.report('x')", "2>&1 | true", 0),
        ("print('x')", "> /dev/full", 1),
        (FLUSHES, "> /dev/full", 1),
        ("print('x'); return 3", "> /dev/full", 3),
        ("streams.report('x')", "2> /dev/full", 0),
        ("raise KeyboardInterrupt", "", 130),
    ],
)
def test_lost_output_ends_without_traceback(body, redirection, code):
    done = start(body, redirection)
    assert done.returncode == code
    assert not done.stdout and len(done.stderr.splitlines()) == (code == 1)


def text_accesses(tree: ast.AST):
    """The calls that read or write a file as text without naming its encoding."""
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = getattr(call.func, "attr", getattr(call.func, "id", ""))
        names = {keyword.arg for keyword in call.keywords}
        owner = getattr(getattr(call.func, "value", None), "id", "")
        if name == "fdopen" or (name == "open" and owner not in ("os", "tarfile")):
            modes = [arg.value for arg in call.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
            is_text = not any(set(mode) <= set("rwxab+") and "b" in mode for mode in modes)
        elif name in ("read_text", "write_text"):
            is_text = len(call.args) < (2 if name == "write_text" else 1) and owner != "self"
        else:
            is_text = bool(names & {"text", "universal_newlines"}) and name in ("run", "Popen", "check_output")
        if is_text and "encoding" not in names:
            yield call.lineno


@pytest.mark.parametrize("package", ["dantinox", "kernels", "reference", "bench", "scripts"])
def test_every_text_file_has_an_encoding(package):
    files = [path for path in (ROOT / package).rglob("*.py") if path.resolve() == path]
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in files
        for line in text_accesses(ast.parse(path.read_text("utf-8")))
    ]
    assert files and found == []


NUMBERS = st.floats() | st.integers() | st.none() | st.booleans() | st.text()


@settings(max_examples=40)
@given(st.recursive(NUMBERS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=5))
def test_json_has_no_value_outside_the_standard(value):
    def refuse(constant):
        raise AssertionError(constant)

    expected = json.loads(json.dumps(value), parse_constant=lambda constant: None)
    assert json.loads(json_text(value), parse_constant=refuse) == expected
    assert json_text(math.nan) == json_text(-math.inf) == "null"
