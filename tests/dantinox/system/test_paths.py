"""Folders of the user: homes that are unknown, caches that cannot be written."""

import logging
import os
import pwd
import tempfile
from pathlib import Path

import pytest

from dantinox.system import paths
from dantinox.system.paths import cache_roots, expand_user, make_cache_folder


@pytest.fixture
def container(tmp_path, monkeypatch):
    """A user without a home, a passwd entry or settings; temporary files go to a folder of the test's own."""

    def unknown(user):
        raise KeyError(f"uid not found: {user}")

    for name in ("HOME", "XDG_CACHE_HOME", "DANTINOX_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return tmp_path


@pytest.mark.parametrize("home", [None, "", "relative", "~", "~nosuchuser"])
def test_cache_without_a_home_folder_is_a_private_temporary_one(container, monkeypatch, home):
    if home is not None:
        monkeypatch.setenv("HOME", home)
    folder = make_cache_folder("corpus/x")
    assert folder == container / "temporary" / f"dantinox-{os.getuid()}" / "corpus" / "x" and folder.is_dir()
    assert folder.parents[1].stat().st_mode & 0o777 == 0o700
    assert make_cache_folder("corpus/y").parent == folder.parent


@pytest.mark.parametrize(
    ("environment", "want"),
    [
        ({"HOME": "/h"}, "/h/.cache/dantinox"),
        ({"HOME": "/h", "XDG_CACHE_HOME": "/x"}, "/x/dantinox"),
        ({"HOME": "/h", "XDG_CACHE_HOME": ""}, "/h/.cache/dantinox"),
        ({"HOME": "/h", "XDG_CACHE_HOME": "relative/x"}, "/h/.cache/dantinox"),
        ({"HOME": "/h", "XDG_CACHE_HOME": "~/x"}, "/h/.cache/dantinox"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/dantinox"),
        ({"HOME": "/h", "XDG_CACHE_HOME": "/x", "DANTINOX_CACHE": "/d"}, "/d"),
        ({"HOME": "/h", "DANTINOX_CACHE": "~/d"}, "/h/d"),
        ({"HOME": "/h", "DANTINOX_CACHE": "d"}, "d"),
    ],
)
def test_cache_follows_the_environment(container, monkeypatch, environment, want):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache_roots()[0] == Path(want)
    assert cache_roots("/given") == [Path("/given")]
    assert len(cache_roots()) == (1 if "DANTINOX_CACHE" in environment else 2)


def test_passwd_entry_serves_where_home_is_not_set(container, monkeypatch):
    entry = pwd.struct_passwd(("me", "x", os.getuid(), 0, "", "/home/me", "/bin/sh"))
    monkeypatch.setattr(pwd, "getpwuid", lambda user: entry)
    assert cache_roots()[0] == Path("/home/me/.cache/dantinox")


def test_default_cache_that_cannot_be_written_is_replaced_with_a_warning(container, monkeypatch, caplog):
    (container / "file").write_text("not a folder")
    monkeypatch.setenv("HOME", str(container / "file"))
    with caplog.at_level(logging.WARNING):
        assert container / "temporary" in make_cache_folder("corpus/x").parents
    assert "cannot be written (Not a directory); using" in caplog.text and "\n" not in caplog.text.strip()


def test_named_cache_that_cannot_be_written_is_refused(container, monkeypatch):
    (container / "file").write_text("not a folder")
    with pytest.raises(OSError, match="set DANTINOX_CACHE to another folder"):
        make_cache_folder("corpus/x", container / "file" / "cache")
    monkeypatch.setenv("DANTINOX_CACHE", str(container / "file"))
    with pytest.raises(OSError, match="the cache cannot be written") as error:
        make_cache_folder("corpus/x")
    assert error.value.filename == str(container / "file")
    assert not list((container / "temporary").iterdir())


@pytest.mark.parametrize("taken", ["writable by others", "a link", "a file"])
def test_temporary_cache_of_somebody_else_is_not_used(container, taken):
    root = container / "temporary" / f"dantinox-{os.getuid()}"
    if taken == "writable by others":
        root.mkdir()
        root.chmod(0o777)
    elif taken == "a link":
        (container / "elsewhere").mkdir()
        root.symlink_to(container / "elsewhere")
    else:
        root.write_text("")
    assert cache_roots() == []
    with pytest.raises(OSError, match="no home folder"):
        make_cache_folder("corpus/x")


def test_no_folder_for_temporary_files_is_one_line(container, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/nonexistent"])
    with pytest.raises(OSError, match="set DANTINOX_CACHE") as error:
        make_cache_folder("corpus/x")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", ["~nosuchuser/x", "~nosuchuser", "~/x", "~"])
def test_unknown_home_folder_is_one_line(container, monkeypatch, path):
    with pytest.raises(FileNotFoundError, match=rf"{path}: the home folder ~\w* is unknown") as error:
        expand_user(path)
    assert "\n" not in str(error.value)
    assert paths.expand_user("a/~/b") == Path("a/~/b")
