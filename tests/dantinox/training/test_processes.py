"""Training by two processes of two simulated devices each: equal losses, resuming, stopping together, dead peers."""

import os
import re
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest

from dantinox.checkpoint.manager import Checkpoints
from dantinox.cli import train as cli_train
from dantinox.distributed import processes
from dantinox.metrics.logger import read_metrics
from tests.helpers.process_group import Program, Starter, free_port

MANY = 1_000_000
FLAGS = """--data text.txt --tokenizer char --n-layers 1 --dim 16 --n-heads 2 --n-kv-heads 1 --window 8 --max-context 32
--seq-len 16 --batch-size 16 --grad-accum 2 --ema-decay 0.9 --warmup-ratio 0 --schedule constant --dtype float32
--log-every 1 --eval-every 4 --eval-batches 2 --sample-tokens 0 --save-every 5 --max-checkpoints 2""".split()
MESH = ["--mesh", "data=2,fsdp=2"]
# Times that a test can wait for.
QUICK = """
from dantinox.distributed import watch
watch.DEAD_S, watch.BEAT_S = 4.0, 0.5
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path, before = tmp_path_factory.mktemp("processes"), Path.cwd()
    (path / "text.txt").write_text("".join(f"{i} Nel mezzo del cammin di nostra vita\n" for i in range(300)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DANTINOX_CACHE", str(path / "cache"))
        os.chdir(path)
        yield path
        os.chdir(before)


@pytest.fixture(scope="module")
def starter(folder):
    starter = Starter(folder)
    yield starter
    starter.close()


def ended(programs: list[Program], limit: float = 90) -> list[int]:
    deadline = time.monotonic() + limit
    try:
        return [program.code(max(1.0, deadline - time.monotonic())) for program in programs]
    finally:
        for program in programs:
            if not program.place.with_suffix(".code").exists():
                os.kill(program.pid, signal.SIGKILL)


def said(programs: list[Program]) -> str:
    return "\n".join(f"{program.out()[-2000:]}\n{program.err()[-3000:]}" for program in programs)


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
def test_two_starts_at_once_on_one_name(starter):
    runs = [starter.group(*FLAGS, "--run", "race", *MESH, "--steps", 200) for _ in (0, 1)]
    codes = sorted(tuple(ended(programs)) for programs in runs)
    assert codes == [(0, 0), (2, 2)], [said(programs) for programs in runs]
    (loser,) = [programs for programs in runs if programs[0].code() == 2]
    assert re.search(r"error: runs/race is in use by process \d+", loser[0].err()) and loser[1].err() == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    "words, message",
    [
        (["--mesh", ""], "mesh is over 1 of the 4 devices of 2 processes; allowed: all of them, such as data=4"),
        (["--mesh", "data=2"], "mesh is over 2 of the 4 devices"),
        (["--windw", "3", *MESH], "Unrecognized options: --windw; did you mean --window?"),
        (["--data", "absent.txt", *MESH], "no file, folder or match of a pattern at absent.txt"),
    ],
)
def test_mistake_in_all_processes_is_one_line(words, message, starter):
    programs = starter.group(*FLAGS, "--run", "mistake", "--steps", 2, *words)
    assert ended(programs) == [2, 2], said(programs)
    assert programs[1].err() == "" and programs[0].err().count("\n") == 1 and message in programs[0].err()
    assert not Path("runs/mistake").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "words, code, message",
    [
        (["--lr", "0.5"], "", r"process 1 on \S+ differs from process 0: lr 0.5, not 0.003"),
        (["--data", "other.txt"], "", r"process 1 on \S+ differs from process 0: data 'other.txt', not 'text.txt'"),
        ([], "import os; os.chdir('elsewhere')", r"process 1 on \S+: .*elsewhere/runs/differs is not the folder"),
        (
            [],
            "from dantinox.distributed import startup_check as s; s._hash_of_sources = lambda: 'x'",
            "code '.* x', not ",
        ),
    ],
)
def test_process_that_differs_is_named(words, code, message, starter, folder):
    (folder / "other.txt").write_text("Nel mezzo " * 500)
    (folder / "elsewhere").mkdir(exist_ok=True)
    shutil.copy(folder / "text.txt", folder / "elsewhere")
    quick = "from dantinox.distributed import startup_check; startup_check.VISIBLE_S = 1.0\n"
    place = [*FLAGS, "--run", "differs", *MESH, "--steps", 2]
    place += ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", 2]
    programs = [
        starter.start([*place, "--process", 0], quick),
        starter.start([*place, "--process", 1, *words], quick + code),
    ]
    assert ended(programs) == [2, 2], said(programs)
    assert re.search(message, programs[0].err()) and programs[0].err().count("\n") == 1


def test_cluster_of_one_process_and_other_pods_are_no_group(monkeypatch):
    monkeypatch.setattr(processes, "_joined", None)
    assert not processes.join(None, None, None)
    for name, value in {
        "JOB_ID": "7",
        "STEP_NODELIST": "localhost",
        "NTASKS": "1",
        "PROCID": "0",
        "LOCALID": "0",
    }.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert not processes.join(None, None, None)
    for name in ("JOB_ID", "NTASKS"):
        monkeypatch.delenv(f"SLURM_{name}")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert not processes.join(None, None, None)
    assert not processes.join("10.0.0.1:7654", "1", "0")
    assert processes.count() == 1 and processes.is_first()


@pytest.mark.slow
def test_profile_of_each_process_is_written(starter):
    words = ["--run", "profiled", *MESH, "--steps", 4, "--profile-steps", "2:3", "--verbose"]
    programs = starter.group(*FLAGS, *words)
    assert ended(programs) == [0, 0], said(programs)
    assert "traced steps 2 to 3" in programs[0].out() and programs[1].out() == ""
    folder = Path("runs/profiled/tensorboard")
    assert len(list(folder.glob("plugins/profile/*/*.xplane.pb"))) == 1
    assert len(list(folder.glob("process-1/plugins/profile/*/*.xplane.pb"))) == 1


@pytest.mark.slow
def test_dry_run_of_two_processes_writes_nothing(starter):
    programs = starter.group(*FLAGS, "--run", "dry", *MESH, "--dry-run")
    assert ended(programs) == [0, 0], said(programs)
    assert "MiB per device at the peak of a step" in programs[0].out() and programs[1].out() == ""
    assert not Path("runs/dry").exists()


@pytest.mark.slow
def test_slurm_starts_several_processes_without_flags(starter):
    variables = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    variables["JAX_COORDINATOR_PORT"] = str(free_port())
    programs = [
        starter.start(
            [*FLAGS, "--run", "slurm", *MESH, "--steps", 2], **variables, SLURM_PROCID=str(i), SLURM_LOCALID=str(i)
        )
        for i in (0, 1)
    ]
    assert ended(programs) == [0, 0], said(programs)
    assert "step 2/2" in programs[0].out() and programs[1].out() == ""


@pytest.mark.slow
def test_coordinator_that_cannot_be_reached_is_one_line(starter):
    quick = "from dantinox.distributed import processes; processes.JOIN_S = 3"
    port = free_port()
    alone = [*FLAGS, *MESH, "--run", "alone", "--coordinator", f"localhost:{port}", "--processes", 2, "--process"]
    program = starter.start([*alone, 1], quick)
    assert ended([program]) == [1]
    assert program.err().splitlines()[-1] == f"error: not all processes of the run joined at localhost:{port} in 3 s"
    with socket.create_server(("", port)):
        program = starter.start([*alone, 0])
        assert ended([program]) == [1]
        assert f"port {port} cannot be used: Address already in use" in program.err()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--coordinator a:1", "--processes and --process missing; several processes need --coordinator HOST:PORT"),
        ("--processes 2 --process 0", "--coordinator missing"),
        ("--coordinator a --processes 2 --process 1", "coordinator is 'a'; allowed: HOST:PORT of process 0"),
        ("--coordinator a:1 --processes 2 --process 2", "process is 2; allowed: 0 to 1, for --processes 2"),
        ("--coordinator a:1 --processes 0 --process 0", "processes is '0'; allowed: an integer, 1 or more"),
    ],
)
def test_flags_that_do_not_fit_are_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli_train.main(words.split())
    assert stop.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith(f"dantinox-train: error: {message}") and line.count("\n") == 1
