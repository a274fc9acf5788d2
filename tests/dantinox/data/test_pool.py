"""Processes that work on blocks: order, errors, deaths, Ctrl-C; none of them outlives its parent."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dantinox.data import corpus, indexing
from dantinox.data.corpus import load_corpus
from dantinox.data.pool import Pool, WorkerLostError, process_count
from dantinox.data.tokenizer import BPETokenizer
from tests.helpers.text_files import write


def is_alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    return False


def test_results_come_in_order_and_processes_end():
    """Few blocks are held at a time."""
    taken = []
    with Pool(divmod_by_7, 2) as pool:
        pids = [process.pid for process in pool._processes]
        assert all(map(is_alive, pids))
        for i, (block, result) in enumerate(pool.map(i for i in range(50) if not taken.append(i))):
            assert (block, result) == (i, divmod(i, 7)) and len(taken) <= block + 6
        assert len(taken) == 50
    assert not any(map(is_alive, pids))


def divmod_by_7(number: int) -> tuple[int, int]:
    time.sleep(0.002 * (number % 3))
    if number == 1000:
        os.kill(os.getpid(), signal.SIGKILL)
    return divmod(number, 7)


def test_errors_are_those_of_the_work():
    with Pool(root, 1) as pool:
        with pytest.raises(ChildProcessError, match=r"^TypeError: must be real number, not str$"):
            pool.call("text")
        with pytest.raises(ValueError, match=r"math domain error|expected a"):
            pool.call(-1)
        assert pool.call(4) == 2
        assert "dantinox.data.worker" in pool.call(loaded) and not {"jax", "flax", "tyro"} & set(pool.call(loaded))


def root(number: object) -> object:
    return number() if callable(number) else __import__("math").sqrt(number)


def loaded() -> list[str]:
    __import__("dantinox.data.corpus")
    return [*sys.modules, sys.modules["__main__"].__spec__.name]


def test_process_that_is_killed_is_one_line():
    message = r"has ended: signal 9 \(memory may be full\)$"
    with pytest.raises(WorkerLostError, match=message), Pool(divmod_by_7, 2) as pool:
        list(pool.map([1, 2, 1000, *range(20)]))


@pytest.mark.parametrize("count", [0, 2])
def test_error_of_the_tokenizer_names_file_and_line(tmp_path, monkeypatch, count):
    for module in (corpus, indexing):
        monkeypatch.setattr(module, "process_count", lambda _: count)
    write(tmp_path / "a.jsonl", '{"text": "some text é"}\n' * 2 + '{"text": "more text"}\n' * 2)
    broken = BPETokenizer((), max_word=1 << 40)  # no regular expression counts that far
    with pytest.raises(ValueError, match=r"^a.jsonl: line 2 cannot be tokenized \((OverflowError|error): .*\)$"):
        load_corpus(tmp_path / "a.jsonl", cache_dir=tmp_path / "cache", existing_tokenizer=broken)


@pytest.mark.skipif(process_count(1 << 30) < 2, reason="with one core there are no other processes")
@pytest.mark.parametrize(
    "number", [signal.SIGINT, *(pytest.param(s, marks=pytest.mark.slow) for s in (signal.SIGTERM, signal.SIGKILL))]
)
def test_signal_ends_all_processes(tmp_path, number):
    """With one line and without a cache that is half written."""
    for i in range(12):
        write(tmp_path / "in" / f"{i}.txt", "".join(f"{i} words {j * j} and {j} more\n" for j in range(60_000)))
    command = [sys.executable, "-m", "dantinox.train", "--data", str(tmp_path / "in"), "--tokenizer", "bpe"]
    environment = os.environ | {"DANTINOX_CACHE": str(tmp_path / "cache"), "PYTHONPATH": os.getcwd()}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    children: list[int] = []
    while len(children) < 2 and process.poll() is None:
        time.sleep(0.05)
        tasks = Path(f"/proc/{process.pid}/task").glob("*/children")
        with contextlib.suppress(OSError):
            children = [int(pid) for path in tasks for pid in path.read_text().split()]
    time.sleep(0.3)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[number]
    for _ in range(100):
        if not any(map(is_alive, children)):
            break
        time.sleep(0.1)
    assert not any(map(is_alive, children))
    if number != signal.SIGKILL:
        lines = [line for line in err.splitlines() if not line.startswith(("reading", "training", "tokenizing"))]
        assert lines == [f"interrupted while preparing the text of {tmp_path / 'in'}; nothing of it is kept"]
        assert not list((tmp_path / "cache" / "corpus").iterdir())
