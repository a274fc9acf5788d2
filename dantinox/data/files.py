"""The files of a corpus: a file, a folder with what its links lead to, a glob, or the standard library."""

import errno
import fnmatch
import glob
import os
import stat
import sysconfig
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from pathlib import Path

from dantinox.system.paths import expand_user

STDLIB = "stdlib"
STDLIB_EXCLUDED = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
NOT_REGULAR = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}
NAMES_SHOWN = 3
Found = tuple[str, Path]


class Skipped:
    """Tally of what was not read, by kind."""

    NOT_TEXT = "file(s) that are not UTF-8 text"
    UNREADABLE = "file(s) that cannot be read"
    SPECIAL = "FIFO(s), socket(s) or device(s)"
    BROKEN = "broken link(s)"
    LOOP = "link(s) to a folder around them"
    EMPTY = "empty file(s)"
    NOT_TEXT_DOCUMENT = "document(s) that are not text"
    BLANK = "document(s) without text"
    KINDS = (NOT_TEXT, NOT_TEXT_DOCUMENT, UNREADABLE, SPECIAL, BROKEN, LOOP, EMPTY, BLANK)

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._names: dict[str, list[str]] = {}  # the first of each kind

    def add(self, kind: str, name: str, reason: str = "") -> None:
        """Count a file or document; the reason is shown after its name."""
        self._counts[kind] += 1
        if len(names := self._names.setdefault(kind, [])) < NAMES_SHOWN:
            names.append(f"{printable(name)}{reason and f' ({reason})'}")

    def __len__(self) -> int:
        """Number of all but those without text, of which there is none to miss."""
        return self._counts.total() - self._counts[self.EMPTY] - self._counts[self.BLANK]

    @property
    def has_empty_files(self) -> bool:
        """Whether there are empty files."""
        return self._counts[self.EMPTY] > 0

    def __str__(self) -> str:
        """Each kind with its number and the first names, in one line."""
        parts = []
        for kind in self.KINDS:
            if count := self._counts[kind]:
                more = f" and {count - NAMES_SHOWN} more" if count > NAMES_SHOWN else ""
                parts.append(f"{count} {kind}: {', '.join(self._names[kind])}{more}")
        return "; ".join(parts)


def printable(name: str | os.PathLike[str]) -> str:
    """Return a name that any console can print on one line: escaped if it is not UTF-8 or has control characters."""
    text = os.fspath(name)
    return text if text.isprintable() else ascii(text)


def find_files(spec: str | os.PathLike[str], skipped: Skipped | None = None) -> Iterator[Found]:
    """Return an iterator over (name, path) of each file of `spec`: a file, a folder, a glob or "stdlib".

    Links to folders are followed. A folder is searched once, at its own place rather than a link's, and a file with
    several names is returned once, under the last of them. Hidden names are left out.

    Args:
        spec: what to search.
        skipped: tally of the special files and of the links that lead nowhere or in a circle.

    Raises:
        FileNotFoundError: no file matches.
        PermissionError: a folder cannot be read.
    """
    skipped = Skipped() if skipped is None else skipped
    if spec == STDLIB:
        return _unique(_walk(Path(sysconfig.get_path("stdlib")), skipped, STDLIB_EXCLUDED, ".py"), skipped)
    path = expand_user(spec)
    missing = f'no file, folder or match of a pattern at {printable(spec) or repr("")} ("{STDLIB}" needs no file)'
    if not os.fspath(spec):
        raise FileNotFoundError(missing)
    if path.is_dir():
        return _unique(_walk(path, skipped), skipped)
    if path.is_file():
        return iter([(path.name, path)])
    files = [] if os.path.lexists(path) else list(_unique(_glob(str(path)), skipped))
    if not files:
        kind = "a broken link" if path.is_symlink() else None
        if path.exists():
            kind = NOT_REGULAR.get(stat.S_IFMT(path.stat().st_mode), "a special file")
        raise FileNotFoundError(
            f"{printable(spec)} is {kind}; allowed: a text file, a folder, a glob" if kind else missing
        )
    return iter(files)


def _unique(files: Iterator[Found], skipped: Skipped) -> Iterator[Found]:
    """Yield each regular file once, at the last of its names.

    The last, because that is the place of the last of equal documents in a corpus.
    """
    found: dict[tuple[int, int], Found] = {}
    for name, path in files:
        try:
            status = path.stat()
        except OSError as error:
            is_broken = path.is_symlink() and error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
            reason = "" if error.errno == errno.ENOENT else str(error.strerror)
            skipped.add(Skipped.BROKEN if is_broken else Skipped.UNREADABLE, name, reason)
            continue
        if not stat.S_ISREG(status.st_mode):
            if not stat.S_ISDIR(status.st_mode):
                skipped.add(Skipped.SPECIAL, name)
            continue
        key = (status.st_dev, status.st_ino)
        found.pop(key, None)
        found[key] = (name, path)
    yield from found.values()


def _walk(
    root: Path, skipped: Skipped, excluded: frozenset[str] = frozenset(), suffix: str = "", hidden: bool = False
) -> Iterator[Found]:
    """Yield (name, path) below `root`: first what is really there, in the order of os.walk, then what links add."""

    def raise_error(error: OSError) -> None:  # by default os.walk skips unreadable folders silently
        if not isinstance(error, FileNotFoundError):  # one that vanished
            raise error

    def is_wanted(name: str) -> bool:
        return name not in excluded and (hidden or not name.startswith("."))

    searched: set[tuple[int, int]] = set()
    starts = deque([root])
    while starts:
        for folder, subfolders, names in os.walk(starts.popleft(), onerror=raise_error):
            identity = _identity(folder)
            if identity is None or identity in searched:
                subfolders.clear()
                continue
            searched.add(identity)
            subfolders[:] = sorted(filter(is_wanted, subfolders))
            for link in (path for name in subfolders if (path := Path(folder, name)).is_symlink()):
                if not Path(folder).resolve().is_relative_to(link.resolve()):
                    starts.append(link)
                elif _identity(link) not in searched:
                    skipped.add(Skipped.LOOP, str(link.relative_to(root)))
            inside = Path(folder).relative_to(root)
            for name in sorted(names):
                if name.endswith(suffix) and is_wanted(name):
                    yield os.path.join(inside, name) if inside.parts else name, Path(folder, name)


def _identity(path: str | Path) -> tuple[int, int] | None:
    """Return what tells a file or folder from all others; None if it has vanished."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _glob(pattern: str) -> Iterator[Found]:
    """Yield the matches of a glob in the order of their names.

    `glob` itself would follow links below `**` in circles: two links to their own folder make 2^40 paths.
    """
    parts = Path(pattern).parts
    if "**" not in parts:
        matches = glob.glob(pattern)
    else:
        depth = parts.index("**")
        rest, hidden = parts[depth:], any(part.startswith(".") for part in parts[depth:])
        matches = [
            os.path.join(base, name) if depth else name
            for base in glob.glob(str(Path(*parts[:depth])))
            if os.path.isdir(base)
            for name, _ in _walk(Path(base), Skipped(), hidden=hidden)
            if _matches(Path(name).parts, rest)
        ]
    return ((match, Path(match)) for match in sorted(set(matches)))


def _matches(names: Sequence[str], pattern: Sequence[str]) -> bool:
    """Return whether a path matches a pattern, part by part; only a part with a leading dot matches a hidden name."""
    if not pattern or not names:
        return not names and all(part == "**" for part in pattern)
    is_hidden = names[0].startswith(".")
    if pattern[0] == "**":
        return _matches(names, pattern[1:]) or (not is_hidden and _matches(names[1:], pattern))
    if is_hidden and not pattern[0].startswith("."):
        return False
    return fnmatch.fnmatchcase(names[0], pattern[0]) and _matches(names[1:], pattern[1:])
