"""How several processes join, agree on what they run, and refuse what does not fit."""

import re
import shutil
import socket
from pathlib import Path

import pytest

from dantinox.cli import train as cli_train
from dantinox.distributed import processes
from tests.helpers.process_group import FLAGS, MESH, ended, free_port, said


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
def test_process_that_differs_is_named(words, code, message, starter, process_folder):
    (process_folder / "other.txt").write_text("Nel mezzo " * 500)
    (process_folder / "elsewhere").mkdir(exist_ok=True)
    shutil.copy(process_folder / "text.txt", process_folder / "elsewhere")
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


@pytest.mark.slow
def test_dry_run_of_two_processes_writes_nothing(starter):
    programs = starter.group(*FLAGS, "--run", "dry", *MESH, "--dry-run")
    assert ended(programs) == [0, 0], said(programs)
    assert "MiB per device at the peak of a step" in programs[0].out() and programs[1].out() == ""
    assert not Path("runs/dry").exists()
