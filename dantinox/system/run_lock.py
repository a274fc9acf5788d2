"""A lock of a run's folder, across processes and across machines that share a disk.

The lock is a file in the folder, created with O_EXCL, which needs neither `flock` nor hard links. The file names its
owner, which touches it every `HEARTBEAT_S` seconds. A lock is stale if its owner is a process of this machine that is
gone, or if its last heartbeat is older than `STALE_S` by the clock of the file system.
"""

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import signal
import socket
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

NAME = ".run.lock"
HEARTBEAT_S = 10.0
STALE_S = 60.0
_held: set["RunLock"] = set()


class RunLockedError(ValueError):
    """Another process writes the folder; the message is one line."""


class LockLostError(OSError):
    """The folder is no longer this process's to write: it was moved or deleted, or another process took the lock."""


@dataclass(frozen=True)
class Owner:
    """The process that holds a lock.

    Attributes:
        host, boot, pid_namespace: where `pid` and `start` are valid; empty where the system does not tell.
        start: start time of the process, in clock ticks since the boot; tells it from a later one with its id.
        token: a random number, different for each lock.
    """

    host: str
    boot: str
    pid_namespace: str
    pid: int
    start: str
    token: str

    @classmethod
    def current(cls) -> "Owner":
        """Return this process with a new token."""
        boot, namespace = "", ""
        with contextlib.suppress(OSError):
            boot = Path("/proc/sys/kernel/random/boot_id").read_text("utf-8").strip()
            namespace = os.readlink("/proc/self/ns/pid")
        pid = os.getpid()
        return cls(socket.gethostname(), boot, namespace, pid, _start_time(pid) or "", secrets.token_hex(8))

    @classmethod
    def from_bytes(cls, content: bytes) -> "Owner | None":
        """Return the owner that a lock file names; None if the file is incomplete or not a lock."""
        try:
            owner = cls(**json.loads(content))
        except (ValueError, TypeError, RecursionError):
            return None
        is_valid = all(isinstance(value, int if name == "pid" else str) for name, value in asdict(owner).items())
        return owner if is_valid and 0 < owner.pid < 1 << 31 else None

    def to_bytes(self) -> bytes:
        """Return the content of the lock file."""
        return json.dumps(asdict(self)).encode()


@dataclass(frozen=True)
class _LockFile:
    """A lock file as it was read; equal objects are one lock without a heartbeat in between."""

    content: bytes
    inode: int
    mtime_ns: int

    @classmethod
    def read(cls, path: Path) -> "_LockFile | None":
        try:
            with path.open("rb") as file:
                content, status = file.read(4096), os.fstat(file.fileno())
        except FileNotFoundError:
            return None
        return cls(content, status.st_ino, status.st_mtime_ns)

    def describe_owner(self, folder: Path) -> str | None:
        """Return who writes the folder, for a message; None if the lock is stale."""
        owner, here = Owner.from_bytes(self.content), Owner.current()
        if owner is None:
            age = abs(_clock_of(folder) - self.mtime_ns / 1e9)
            return f"a process that {NAME} does not name (heartbeat {age:.0f} s ago)" if age <= STALE_S else None
        same_host = owner.host == here.host
        if same_host and (owner.boot, owner.pid_namespace) == (here.boot, here.pid_namespace):
            running = _is_running(owner)
            if running is not None:
                return f"process {owner.pid}" if running else None
        now = _clock_of(folder)
        age = abs(now - self.mtime_ns / 1e9)
        # A heartbeat since this machine started comes from another machine of the same name.
        if same_host and owner.boot != here.boot and self.mtime_ns / 1e9 < now - _uptime():
            return None
        return f"process {owner.pid} on {owner.host} (heartbeat {age:.0f} s ago)" if age <= STALE_S else None


class RunLock:
    """The lock of one folder: within `with`, no other process that uses `RunLock` writes the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._owner = Owner.current()
        self._content = self._owner.to_bytes()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._lost: str | None = None

    @property
    def path(self) -> Path:
        """The lock file."""
        return self.folder / NAME

    def acquire(self) -> "RunLock":
        """Take the lock of an existing folder; `with` keeps it alive and `release` gives it back.

        Raises:
            RunLockedError: another process writes the folder.
            OSError: the folder does not exist or is read-only.
        """
        stale = self._take(self.path)
        if stale is not None:
            owner = Owner.from_bytes(stale.content)
            left_by = f"process {owner.pid} on {owner.host}" if owner else "an unknown process"
            print(f"{self.folder} was locked by {left_by}, which is gone; took over the lock")
        self._inode = os.stat(self.folder).st_ino
        _held.add(self)
        return self

    @classmethod
    def create(cls, folder: Path) -> "RunLock":
        """Create a folder, in an existing one, that is locked from the start.

        Raises:
            FileExistsError: the folder exists.
        """
        lock = cls(folder)
        temporary = folder.with_name(f".{folder.name}.{lock._owner.token}")
        temporary.mkdir()
        try:
            lock._create(temporary / NAME)
            os.rename(temporary, folder)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(folder)) from None
            raise
        lock._inode = os.stat(folder).st_ino
        _held.add(lock)
        return lock

    def _take(self, path: Path) -> _LockFile | None:
        """Create the lock file and return the stale one that it replaces, if there was one.

        Who finds a stale lock first locks the right to replace it, so two processes cannot both take it over.
        """
        while True:
            try:
                self._create(path)
                return None
            except FileExistsError:
                stale = _LockFile.read(path)
            if stale is None:  # released in between
                if path.is_symlink():
                    raise FileExistsError(errno.EEXIST, "is a link to nothing, not a lock", str(path))
                continue
            if (owner := stale.describe_owner(self.folder)) is not None:
                raise RunLockedError(f"{self.folder} is in use by {owner}; wait for it, stop it, or use another name")
            digest = hashlib.sha256(repr(stale).encode()).hexdigest()[:12]
            claim = path.with_name(f"{path.name}.{digest}")
            self._take(claim)
            if _LockFile.read(path) == stale:
                os.replace(claim, path)
                return stale
            claim.unlink()

    def _create(self, path: Path) -> None:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        try:
            try:
                os.write(handle, self._content)
            finally:
                os.close(handle)
        except BaseException:
            path.unlink(missing_ok=True)
            raise

    def _is_own(self) -> bool:
        found = _LockFile.read(self.path)
        return found is not None and found.content == self._content

    def move_folder(self, target: Path) -> None:
        """Rename the folder, with the lock in it."""
        self.folder.rename(target)
        self.folder = target

    def check(self) -> None:
        """Check that the folder is still locked by this process; a lock file that was deleted is created again.

        Raises:
            LockLostError: it is not.
        """
        if self._lost is None:
            with contextlib.suppress(OSError):  # the disk may be away for a while
                self._lost = self._refresh()
        if self._lost is not None:
            raise LockLostError(self._lost)

    def _refresh(self) -> str | None:
        """Touch the lock file; return why the lock is lost, if it is."""
        try:
            inode = os.stat(self.folder).st_ino
        except FileNotFoundError:
            inode = None
        if inode != self._inode:
            return f"{self.folder} was moved or deleted while it was written; stopped"
        found = _LockFile.read(self.path)
        if found is None:
            with contextlib.suppress(FileExistsError):  # another process was faster; seen at the next heartbeat
                self._create(self.path)
        elif found.content == self._content:
            os.utime(self.path)  # the time of the file server, not of this machine
        else:
            return f"{self.folder} is in use by another process, which took over the lock; stopped"
        return None

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            try:
                self.check()
            except LockLostError:
                if self._in_main_thread and callable(signal.getsignal(signal.SIGINT)):
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)  # ends a wait, too
                return

    def release(self) -> None:
        """Delete the lock file, unless it is another process's by now."""
        _held.discard(self)
        self._stop.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(1.0)
        with contextlib.suppress(OSError):  # on a disk that is away, the lock becomes stale
            if self._is_own():
                self.path.unlink()

    def __enter__(self) -> "RunLock":
        if self not in _held:
            self.acquire()
        self._in_main_thread = threading.current_thread() is threading.main_thread()
        self._thread = threading.Thread(target=self._beat, name="run lock", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.release()
        # A heartbeat that lost the lock interrupts the main thread.
        if self._lost is not None and isinstance(error, KeyboardInterrupt):
            raise LockLostError(self._lost) from None


def require_unlocked(folder: Path) -> None:
    """Check that no process writes a folder or a folder in it, as the runs of a sweep are; nothing is written.

    Raises:
        RunLockedError: one does.
    """
    for path in (folder / NAME, *sorted(folder.glob(f"*/{NAME}"))):
        found = _LockFile.read(path) if path.is_file() else None
        owner = found and found.describe_owner(path.parent)
        if owner:
            raise RunLockedError(f"{path.parent} is in use by {owner}; wait for it, stop it, or use another name")


def release_all() -> None:
    """Release the locks of this process, before it ends without unwinding the stack."""
    for lock in list(_held):
        lock.release()


def _start_time(pid: int) -> str | None:
    """Return the start time of a running process; None if there is none, or it waits only to be reaped."""
    try:
        # The second field, the name, may contain spaces and parentheses.
        fields = Path(f"/proc/{pid}/stat").read_text("utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return fields[19] if fields[0] not in "ZX" else None


def _is_running(owner: Owner) -> bool | None:
    """Return whether a process of this machine runs; None if only its heartbeat can tell."""
    start = _start_time(owner.pid)
    if start and owner.start:
        return start == owner.start
    try:
        os.kill(owner.pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user, whose processes may be hidden
        return None
    return False if owner.start else None


def _uptime() -> float:
    """Return the seconds since this machine was started."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _clock_of(folder: Path) -> float:
    """Return the time of the file system of a folder, which may be that of another machine."""
    path = folder / f"{NAME}.{secrets.token_hex(8)}.now"
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except OSError:  # read-only or full
        return time.time()
    try:
        return os.fstat(handle).st_mtime
    finally:
        os.close(handle)
        path.unlink()
