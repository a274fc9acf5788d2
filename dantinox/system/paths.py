"""Folders of the user: the home folder and the cache."""

import contextlib
import logging
import os
import stat
import tempfile
from pathlib import Path

CACHE_VARIABLE = "DANTINOX_CACHE"

log = logging.getLogger(__name__)


def expand_user(path: str | os.PathLike[str]) -> Path:
    """Return `path` with a leading ~ or ~USER replaced.

    Raises:
        FileNotFoundError: that home folder is unknown; the message is one line.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        user = Path(path).parts[0]
        raise FileNotFoundError(
            f"{os.fspath(path)}: the home folder {user} is unknown; write the path in full"
        ) from None


def cache_roots(cache_dir: str | os.PathLike[str] | None = None) -> list[Path]:
    """Return the folders that the cache may be in, the preferred one first.

    A folder that the caller or $DANTINOX_CACHE names is the only one. Otherwise it is `dantinox` in $XDG_CACHE_HOME (if
    that is absolute, as its specification demands) or in ~/.cache, and then a private folder for temporary files: a
    container may have no home folder, or one that cannot be written.
    """
    if named := cache_dir or os.environ.get(CACHE_VARIABLE):
        return [expand_user(named)]
    xdg, home = os.environ.get("XDG_CACHE_HOME", ""), _home()
    roots = [Path(xdg, "dantinox")] if os.path.isabs(xdg) else [home / ".cache" / "dantinox"] if home else []
    return [*roots, *_temporary_root()]


def make_cache_folder(name: str, cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Create the folder `name` in the first of `cache_roots` that can be written, and return it.

    Raises:
        OSError: none can be written.
    """
    roots = cache_roots(cache_dir)
    mode = 0o777 if cache_dir or os.environ.get(CACHE_VARIABLE) else 0o700  # one that users name may be shared
    failure = OSError(f"there is no home folder and none for temporary files; set {CACHE_VARIABLE} to a folder")
    for i, root in enumerate(roots):
        folder = root / name
        try:
            root.parent.mkdir(parents=True, exist_ok=True)
            root.mkdir(mode, exist_ok=True)
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
        except OSError as error:
            failure = explain_cache_error(error, root)
            if i + 1 < len(roots):
                log.warning("the cache %s cannot be written (%s); using %s", root, error.strerror, roots[i + 1])
            continue
        return folder
    raise failure


def explain_cache_error(error: OSError, root: Path) -> OSError:
    """Return the error of the same number that says that the cache cannot be written, and what to change."""
    reason = f"the cache cannot be written ({error.strerror or error}); set {CACHE_VARIABLE} to another folder"
    return OSError(error.errno, reason, str(root))


def _home() -> Path | None:
    """Return the home folder; None if neither $HOME nor the user database names one."""
    home = os.environ.get("HOME")
    if not home:
        with contextlib.suppress(ImportError, KeyError):
            import pwd

            home = pwd.getpwuid(os.getuid()).pw_dir
    return Path(home) if home and os.path.isabs(home) else None


def _temporary_root() -> list[Path]:
    """Return the private folder for temporary files, unless another user has taken its name."""
    user = os.getuid() if hasattr(os, "getuid") else 0
    try:
        root = Path(tempfile.gettempdir(), f"dantinox-{user}")
    except FileNotFoundError:
        return []
    try:
        status = root.lstat()
    except FileNotFoundError:
        return [root]
    is_private = stat.S_ISDIR(status.st_mode) and status.st_uid == user and not status.st_mode & 0o022
    return [root] if is_private else []
