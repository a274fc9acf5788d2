"""The lock of a run's folder: one owner, whoever else starts, dies, sleeps or writes to it."""

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dantinox.system import run_lock
from dantinox.system.run_lock import NAME, STALE_S, LockLostError, Owner, RunLock, RunLockedError, require_unlocked

# Takes the lock of argv[1] when the file argv[2] appears, says so, and keeps it until its standard input is closed.
HOLDER = """
import os, sys, time
from pathlib import Path
from dantinox.system.run_lock import RunLock, RunLockedError
print("ready", flush=True)
while not os.path.exists(sys.argv[2]):
    time.sleep(0.001)
try:
    with (RunLock.create(Path(sys.argv[1])) if sys.argv[3:] else RunLock(Path(sys.argv[1]))):
        print("locked", flush=True)
        sys.stdin.read()
except RunLockedError as error:
    print(error, flush=True)
except FileExistsError:
    print("exists", flush=True)
"""


def start(folder: Path, go: Path, *words: str) -> subprocess.Popen:
    command = [sys.executable, "-c", HOLDER, str(folder), str(go), *words]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}, **pipes)
    assert process.stdout.readline() == "ready\n"
    return process


def answers(processes: list[subprocess.Popen]) -> list[str]:
    found = [last_line(process) for process in processes]
    for process in processes:
        process.stdin.close()
    for process in processes:
        process.wait(30)
    return found


def last_line(process: subprocess.Popen) -> str:
    line = process.stdout.readline().strip()
    return process.stdout.readline().strip() if "took over the lock" in line else line


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    return path


def forge(folder: Path, age: float = 0.0, content: bytes | None = None, **changes) -> Path:
    """Write the lock of another process, with a heartbeat some seconds ago."""
    owner = dataclasses.replace(Owner.current(), **changes)
    path = folder / NAME
    path.write_bytes(owner.to_bytes() if content is None else content)
    os.utime(path, (time.time() - age,) * 2)
    return path


def gone_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize("before", ["free", "killed"])
@pytest.mark.sampled(2)
def test_of_many_starts_at_once_exactly_one_takes_the_lock(folder, tmp_path, before):
    if before == "killed":
        forge(folder, pid=gone_pid(), start="1")
    processes = [start(folder, tmp_path / "go") for _ in range(10)]
    (tmp_path / "go").touch()
    found = answers(processes)
    assert found.count("locked") == 1, found
    assert all(f"{folder} is in use by " in text for text in found if text != "locked")
    assert os.listdir(folder) == []  # released, and nothing of the race is left


def test_of_many_folders_created_at_once_exactly_one_is_kept(tmp_path):
    processes = [start(tmp_path / "run", tmp_path / "go", "create") for _ in range(8)]
    (tmp_path / "go").touch()
    found = answers(processes)
    assert sorted(found) == ["exists"] * 7 + ["locked"]
    assert sorted(os.listdir(tmp_path)) == ["go", "run"] and os.listdir(tmp_path / "run") == []


def test_lock_of_a_killed_process_is_taken_over_at_once(folder, tmp_path, capsys):
    (tmp_path / "go").touch()
    process = start(folder, tmp_path / "go")
    assert last_line(process) == "locked"
    before = sorted(os.listdir(folder)), (folder / NAME).read_bytes()
    with pytest.raises(RunLockedError, match=f"is in use by process {process.pid}; wait for it, stop it, or"):
        RunLock(folder).acquire()
    assert (sorted(os.listdir(folder)), (folder / NAME).read_bytes()) == before  # nothing was touched
    process.send_signal(signal.SIGKILL)
    while Path(f"/proc/{process.pid}/stat").read_text().split()[2] != "Z":  # a zombie, for this test does not wait
        time.sleep(0.01)
    with RunLock(folder):
        assert (folder / NAME).is_file()
    assert f"was locked by process {process.pid} on " in capsys.readouterr().out
    assert os.listdir(folder) == []
    process.wait()


HERE = Owner.current()
FORGED = {
    "a process that runs": ({"pid": os.getppid(), "start": run_lock._start_time(os.getppid())}, 9999, True),
    "a process id that another process has now": ({"start": "1"}, 0, False),
    "another machine, fresh": ({"host": "elsewhere", "pid": 1}, 5, True),
    "another machine, silent": ({"host": "elsewhere", "pid": 1}, STALE_S + 5, False),
    "another machine, clock ahead": ({"host": "elsewhere", "pid": 1}, -STALE_S - 5, False),
    "another container, fresh": ({"pid_namespace": "pid:[1]", "pid": 2**22 + 1}, 5, True),
    "another container, silent": ({"pid_namespace": "pid:[1]", "pid": 2**22 + 1}, STALE_S + 5, False),
    "before this machine was restarted": ({"boot": "earlier", "pid": 1}, time.clock_gettime(7) + 5, False),
    "a machine of the same name, fresh": ({"boot": "other", "pid": 1}, 0, True),
    "a system without start times, gone": ({"boot": HERE.boot, "start": "", "pid": 2**22 + 1}, 0, False),
    "an empty file, fresh": ({"content": b""}, 5, True),
    "an empty file, old": ({"content": b""}, STALE_S + 5, False),
    "garbage, fresh": ({"content": b"\xff\x00{"}, 5, True),
    "garbage, old": ({"content": b"[1, 2]"}, STALE_S + 5, False),
    "an impossible process id, old": ({"pid": 2**70}, STALE_S + 5, False),
    "half a file, old": ({"content": HERE.to_bytes()[:40]}, STALE_S + 5, False),
    "wrong types, old": ({"content": b'{"host": 1, "boot": 2, "pid": "x"}'}, STALE_S + 5, False),
}


@pytest.mark.parametrize("case", FORGED)
def test_lock_is_stale_only_if_its_owner_cannot_be_alive(case, folder, capsys):
    changes, age, is_alive = FORGED[case]
    path = forge(folder, age, **changes)
    before = path.read_bytes()
    if is_alive:
        for attempt in (
            RunLock(folder).acquire,
            lambda: require_unlocked(folder),
            lambda: require_unlocked(folder.parent),
        ):
            with pytest.raises(RunLockedError, match=f"{folder} is in use by .*; wait for it, stop it"):
                attempt()
        assert path.read_bytes() == before and os.listdir(folder) == [NAME]
        return
    require_unlocked(folder)
    with RunLock(folder) as lock:
        lock.check()
        assert path.read_bytes() != before and os.listdir(folder) == [NAME]
    assert os.listdir(folder) == []
    assert capsys.readouterr().out.count("which is gone; took over the lock\n") == 1


def test_takeover_that_was_killed_midway_does_not_block(folder):
    """Kill a process between its claim of a stale lock and the takeover: the next one claims the claim."""
    forge(folder, pid=gone_pid(), start="1")
    replace, claims = os.replace, []

    class Killed(BaseException):
        pass

    def kill(source, target):
        claims.append(Path(source))
        raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "replace", kill)
        RunLock(folder).acquire()
    (claim,) = claims
    dead = dataclasses.replace(Owner.current(), pid=gone_pid(), start="1")
    claim.write_bytes(dead.to_bytes())
    assert os.replace is replace
    RunLock(folder).acquire().release()
    assert os.listdir(folder) == []


def test_lock_removed_by_hand_is_created_again(folder):
    with RunLock(folder) as lock:
        (folder / NAME).unlink()
        lock.check()
        with pytest.raises(RunLockedError):
            RunLock(folder).acquire()
    assert os.listdir(folder) == []


@pytest.mark.parametrize("loss", ["taken", "moved", "deleted", "replaced"])
def test_lost_lock_stops_its_owner_before_it_writes(loss, folder, monkeypatch):
    monkeypatch.setattr(run_lock, "HEARTBEAT_S", 0.05)
    with (
        pytest.raises(LockLostError, match=r"run (is in use by another|was moved or deleted)") as stop,
        RunLock(folder),
    ):
        if loss == "taken":
            forge(folder, token="another")
        else:
            folder.rename(folder.with_name("away"))
        if loss == "deleted":
            (folder.with_name("away") / NAME).unlink()
        if loss == "replaced":
            folder.mkdir()
        time.sleep(30)  # the heartbeat interrupts it
    assert "\n" not in str(stop.value)
    if loss == "taken":
        assert b"another" in (folder / NAME).read_bytes()  # not deleted on the way out


def test_heartbeat_keeps_the_lock_fresh(folder, monkeypatch):
    monkeypatch.setattr(run_lock, "HEARTBEAT_S", 0.05)
    with RunLock(folder):
        os.utime(folder / NAME, (0, 0))
        deadline = time.monotonic() + 10
        while (folder / NAME).stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert abs((folder / NAME).stat().st_mtime - time.time()) < 5
    assert not [thread for thread in threading.enumerate() if thread.name == "run lock"]


def test_error_in_the_block_releases_the_lock(folder):
    for error in (KeyError, KeyboardInterrupt, SystemExit):
        with pytest.raises(error), RunLock(folder):
            raise error
        assert os.listdir(folder) == []
    lock = RunLock(folder).acquire()
    run_lock.release_all()
    assert os.listdir(folder) == [] and lock not in run_lock._held


def test_link_in_place_of_the_lock_is_refused(folder):
    (folder / NAME).symlink_to("nowhere")
    with pytest.raises(FileExistsError, match="is a link to nothing"):
        RunLock(folder).acquire()


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_folder_without_write_permission_is_refused(folder):
    folder.chmod(0o555)
    with pytest.raises(PermissionError):
        RunLock(folder).acquire()
    folder.chmod(0o755)


def test_full_disk_leaves_no_lock(folder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(os, "write", full)
        RunLock(folder).acquire()
    assert os.listdir(folder) == []
