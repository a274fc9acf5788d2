"""Training by two processes of two simulated devices each: equal losses, resuming, stopping together, dead peers."""

import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest

from dantinox.checkpoint.manager import Checkpoints
from dantinox.metrics.logger import read_metrics
from tests.helpers.process_group import FLAGS, MESH, Program, Starter, ended, said

MANY = 1_000_000
# Times that a test can wait for.
QUICK = """
from dantinox.distributed import watch
watch.DEAD_S, watch.BEAT_S = 4.0, 0.5
"""


def train(starter: Starter, *words: object) -> str:
    """Train with one process to the end and return its output."""
    program = starter.start(words, devices=8)
    assert ended([program]) == [0], said([program])
    return program.out()


def train_two(starter: Starter, *words: object) -> str:
    """Train with two processes to the end and return the output of the first."""
    programs = starter.group(*words)
    assert ended(programs) == [0, 0], said(programs)
    assert (programs[1].out(), programs[0].err(), programs[1].err()) == ("", "", "")
    return programs[0].out()


def wait_for_step(run: Path, step: int, programs: list[Program]) -> None:
    deadline = time.monotonic() + 90
    while max((row["step"] for row in read_metrics(run / "metrics.jsonl")), default=0) < step:
        assert time.monotonic() < deadline, said(programs)
        time.sleep(0.01)


def difference(one: Path, other: Path) -> float:
    """The largest difference between the losses of two runs, which have the same steps."""
    rows, others = (read_metrics(path / "metrics.jsonl") for path in (one, other))
    assert [row["step"] for row in rows] == [row["step"] for row in others]
    names = ("loss", "grad_norm", "val_loss")
    return max(abs(a[name] - b[name]) for a, b in zip(rows, others) for name in names if name in a and name in b)


def test_losses_equal_those_of_one_device(starter):
    out = train_two(starter, *FLAGS, "--run", "two", *MESH, "--steps", 6, "--sample-tokens", 4)
    assert "--- sample at step 6 ---" in out
    train(starter, *FLAGS, "--run", "one", "--steps", 6)
    run = Path("runs/two")
    assert difference(run, Path("runs/one")) < 1e-6
    assert Checkpoints(run).steps() == [5, 6] and Checkpoints(run).latest_valid()[::2] == (6, [])
    assert not list(run.glob("checkpoints/.partial-*")) and not (run / ".run.lock").exists()


@pytest.mark.slow
def test_run_resumes_on_any_number_of_processes_and_devices(starter):
    """From two processes with four devices to one device, to one process with eight, and to two with four."""
    train_two(starter, *FLAGS, "--run", "moved", *MESH, "--steps", 6)
    train(starter, "--run", "moved", "--resume", "--steps", 10, "--mesh", "")
    train(starter, "--run", "moved", "--resume", "--steps", 14, "--mesh", "data=2,fsdp=4")
    out = train_two(starter, "--run", "moved", "--resume", "--steps", 18, *MESH)
    assert out.startswith("resumed with mesh 'data=2,fsdp=4' -> 'data=2,fsdp=2'")
    train(starter, *FLAGS, "--run", "whole", "--steps", 18)
    # Evaluations at the last steps of the parts are missing in the whole run.
    assert difference(Path("runs/moved"), Path("runs/whole")) < 1e-6


def endless(starter: Starter, name: str, *words: object, codes=("", "")) -> tuple[list[Program], Path]:
    """Start two processes that train until they are stopped, and wait for their first checkpoint."""
    programs = starter.group(*FLAGS, "--run", name, *MESH, "--steps", MANY, *words, codes=codes)
    run = Path("runs") / name
    wait_for_step(run, 6, programs)
    return programs, run


@pytest.mark.parametrize("process", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_signal_to_one_process_ends_both_after_the_same_step(process, starter):
    programs, run = endless(starter, f"stopped-{process}")
    os.kill(programs[process].pid, signal.SIGTERM)
    assert ended(programs) == [128 + signal.SIGTERM] * 2
    line = programs[0].out().splitlines()[-1]
    match = re.fullmatch(
        rf"process {process} was interrupted; step (\d+) is saved. "
        rf"Resume with: python -m dantinox.train --run {run.name} --resume",
        line,
    )
    assert match and Checkpoints(run).latest_valid()[::2] == (int(match[1]), [])
    assert [programs[0].err(), programs[1].out(), programs[1].err()] == ["", "", ""]
    assert not (run / ".run.lock").exists()


@pytest.mark.slow
def test_signal_to_both_processes_is_one_stop(starter):
    programs, _ = endless(starter, "interrupted")
    for program in programs:
        os.kill(program.pid, signal.SIGINT)
    assert ended(programs) == [130, 130]
    assert programs[0].out().count("was interrupted") == 1 and programs[1].out() == ""


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, 1])
def test_killed_process_ends_the_other_which_names_it(process, starter):
    programs, run = endless(starter, f"killed-{process}", codes=[QUICK, QUICK])
    start = time.monotonic()
    os.kill(programs[process].pid, signal.SIGKILL)
    codes = ended(programs, 60)
    assert time.monotonic() - start < 30
    assert codes[process] == -signal.SIGKILL and codes[1 - process] != 0
    text = programs[1 - process].err()  # JAX may be first to abort a process that loses process 0, the "leader"
    assert re.search(rf"process {process} on \S+ has died", text) or (process == 0 and "the leader task" in text)
    if process:
        assert programs[0].err().count("\n") == 1 and codes[0] == 1
        assert not (run / ".run.lock").exists()
    train_two(starter, "--run", run.name, "--resume", "--steps", Checkpoints(run).latest_valid()[0] + 2)


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, 1])
def test_frozen_process_ends_the_other_which_names_it(process, starter):
    programs, _ = endless(starter, f"frozen-{process}", codes=[QUICK, QUICK])
    os.kill(programs[process].pid, signal.SIGSTOP)
    try:
        other = programs[1 - process]
        assert other.code(30) == 1
        assert re.search(rf"process {process} on \S+ has died or hangs: it was not heard for 4 s", other.err())
    finally:
        os.kill(programs[process].pid, signal.SIGKILL)


STUCK = """
import time
from dantinox.distributed import watch
from dantinox.training.trainer import Trainer
watch.STUCK_S = 3.0
make = Trainer.batch
Trainer.batch = lambda self, step: (time.sleep(3600) if step == 9 and OWN else None, make(self, step))[1]
"""


@pytest.mark.slow
def test_hanging_process_is_named(starter):
    programs, _ = endless(starter, "stuck", codes=[f"OWN = {i}\n{STUCK}" for i in (0, 1)])
    assert ended(programs, 60) == [1, 1]
    assert re.search(r"process 1 on \S+ is the last in a run that made no step for \d+ s", programs[0].err())


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, 1])
def test_error_in_one_process_ends_both_and_is_told(process, starter):
    fault = """
from dantinox.training.trainer import Trainer
make = Trainer.batch
def batch(self, step):
    if step == 9:
        raise OSError(5, "Input/output error", "text.bin")
    return make(self, step)
Trainer.batch = batch
"""
    programs, _ = endless(starter, f"faulty-{process}", codes=[fault if i == process else "" for i in (0, 1)])
    assert ended(programs, 60) == [1, 1]
    assert "text.bin: Input/output error" in programs[process].err()
    if process:
        assert re.search(r"process 1 on \S+ has ended: .*Input/output error", programs[0].err())
    else:
        assert programs[1].err() == ""


PLANTED = """
from dantinox.training import train_step, trainer
import jax
honest, make = train_step.mean_over_targets, trainer.get_batch
def mean_over_targets(losses, targets, count=None):
    return honest(losses, targets, count) + jax.numpy.where((targets == 5).any(), jax.numpy.nan, 0)
def get_batch(tokens, *, step, rows=None, **options):
    inputs, targets = make(tokens, step=step, rows=rows, **options)
    if step == 6 and OWN and rows is not None:
        targets = targets.copy()
        targets[0, 3] = 5
    return inputs, targets
train_step.mean_over_targets, trainer.get_batch = mean_over_targets, get_batch
"""


@pytest.mark.slow
def test_nan_in_the_rows_of_one_process_ends_both(starter):
    codes = [f"OWN = {i}\n{PLANTED}" for i in (0, 1)]
    programs = starter.group(*FLAGS, "--run", "nan", *MESH, "--steps", MANY, codes=codes)
    assert ended(programs) == [1, 1], said(programs)
    assert programs[1].err() == "" and programs[0].err().count("\n") == 1
    assert "step 7 is not finite" in programs[0].err() and "step 6 is saved" in programs[0].err()
    assert Path("runs/nan/nan-7.npz").is_file() and Checkpoints(Path("runs/nan")).steps()[-1] == 6


CHECKED = """
import logging
from dantinox.kernels import dispatch, first_use
from dantinox.kernels.ops.attention import api
logging.getLogger("dantinox.kernels").addHandler(logging.FileHandler(f"chosen-{OWN}.txt", encoding="utf-8"))
first_use._record = lambda *_: None
first_use._check = lambda op, *_: "it failed its check on this card" if op == "attention" and OWN else None
for implementation in api.OPERATION.implementations:
    if implementation.name == "pallas":
        object.__setattr__(implementation, "not_auto", lambda *_: first_use.disagreement("attention", None))
"""


@pytest.mark.slow
def test_kernel_that_fails_its_check_in_one_process_is_taken_by_none(starter):
    codes = [f"OWN = {i}\n{CHECKED}" for i in (0, 1)]
    words = ["--run", "checked", *MESH, "--steps", 3, "--attn", "auto", "--verbose", "--sample-tokens", 2]
    programs = starter.group(*FLAGS, *words, codes=codes)
    assert ended(programs) == [0, 0], said(programs)
    for process in (0, 1):
        chosen = Path(f"chosen-{process}.txt").read_text("utf-8")
        assert re.search(r"auto chose xla on cpu; not pallas: process 1 on \S+: it failed its check", chosen), chosen
    assert "attention, pallas is not used: process 1" in Path("chosen-0.txt").read_text("utf-8")


FULL = """
import errno, os
from dantinox.checkpoint import shared_save
honest = shared_save.manifest.checksums
def checksums(folder, *choose):
    if folder.name.endswith("-10"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return honest(folder, *choose)
shared_save.manifest.checksums = checksums
"""


# Orbax fails to write, before it waits for the other process.
FULL_IN_ORBAX = """
import errno, os
from dantinox.distributed import agreement
honest, waits = agreement.gather, []
def gather(topic, *arguments, **options):
    waits.append("async_write_complete" in topic)
    if waits[-1] and sum(waits) == 4:
        raise ValueError(f"many words of a library, and at their end: {os.strerror(errno.ENOSPC)}")
    return honest(topic, *arguments, **options)
agreement.gather = gather
"""


@pytest.mark.slow
@pytest.mark.parametrize(("process", "fault"), [(0, FULL), (1, FULL), (0, FULL_IN_ORBAX), (1, FULL_IN_ORBAX)])
def test_full_disk_of_one_process_ends_both(process, fault, starter):
    shutil.rmtree(f"runs/full-{process}", ignore_errors=True)
    codes = [fault if i == process else "" for i in (0, 1)]
    programs = starter.group(*FLAGS, "--run", f"full-{process}", *MESH, "--steps", MANY, codes=codes)
    assert ended(programs) == [1, 1], said(programs)
    assert programs[1].err() == "" and programs[0].err().count("\n") == 1
    assert re.search(
        rf"step 10 could not be saved in runs/full-{process}/checkpoints: process {process} on \S+: "
        "No space left on device; the checkpoint of step 8 is intact",
        programs[0].err(),
    )
    assert Checkpoints(Path(f"runs/full-{process}")).latest_valid()[0] == 8


@pytest.mark.slow
def test_profile_of_each_process_is_written(starter):
    words = ["--run", "profiled", *MESH, "--steps", 4, "--profile-steps", "2:3", "--verbose"]
    programs = starter.group(*FLAGS, *words)
    assert ended(programs) == [0, 0], said(programs)
    assert "traced steps 2 to 3" in programs[0].out() and programs[1].out() == ""
    folder = Path("runs/profiled/tensorboard")
    assert len(list(folder.glob("plugins/profile/*/*.xplane.pb"))) == 1
    assert len(list(folder.glob("process-1/plugins/profile/*/*.xplane.pb"))) == 1
