"""A compiler that crashes, hangs or does not start."""

import subprocess
import sys

import pytest

from bench.aot import hardware, worker_pool
from bench.aot.cases import Case

WORKER = """
import json, os, sys, time
print(json.dumps({"versions": {"jax": "1"}}), flush=True)
for line in sys.stdin:
    spec = json.loads(line)["case"]["spec"]
    if spec == "crash":
        os._exit(139)
    if spec == "again" and not os.path.exists(sys.argv[1]):
        open(sys.argv[1], "w").close()
        print(json.dumps({"status": "again"}), flush=True)
        continue
    if spec == "hang":
        time.sleep(60)
    print(json.dumps({"status": "compiled", "reason": spec}), flush=True)
"""


def test_crashed_or_hung_worker_loses_one_row(monkeypatch, tmp_path):
    start = subprocess.Popen
    replace = lambda command, **kwargs: start([sys.executable, "-c", WORKER, str(tmp_path / "asked")], **kwargs)
    monkeypatch.setattr(worker_pool.subprocess, "Popen", replace)
    case = lambda name: Case("attention", name, "xla", "bfloat16", "forward")
    with worker_pool.Worker(hardware.get("v6e"), timeout=2) as worker:
        assert worker.ask(case("one")) == {"status": "compiled", "reason": "one"}
        assert worker.versions == {"jax": "1"}
        assert worker.ask(case("crash")) == {"status": "failed", "reason": "the compiler's process ended with code 139"}
        assert worker.ask(case("hang")) == {"status": "failed", "reason": "took more than 2 s"}
        assert worker.ask(case("two"))["status"] == "compiled"
        first = worker._process.pid
        assert worker.ask(case("again"))["status"] == "compiled"
        assert worker._process.pid != first
        folder = worker._folder
        assert folder.exists()
    assert not folder.exists()
    with pytest.raises(worker_pool.WorkerClosedError):
        worker.ask(case("three"))


def test_compiler_that_fails_to_start_is_one_error(monkeypatch):
    start = subprocess.Popen
    monkeypatch.setattr(
        worker_pool.subprocess, "Popen", lambda _, **kwargs: start([sys.executable, "-c", ""], **kwargs)
    )
    worker = worker_pool.Worker(hardware.get("v6e"), timeout=2)
    with worker, pytest.raises(ValueError, match="compiler for v6e does not start"):
        worker.ask(Case("attention", "one", "xla", "bfloat16", "forward"))
