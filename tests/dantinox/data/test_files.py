"""Files of a corpus: each is read once or named as skipped; links, special files and odd names never hang or crash."""

import logging
import os
import socket
from pathlib import Path

import pytest

from dantinox.data import files as data_files
from dantinox.data.corpus import find_documents, load_corpus
from dantinox.data.files import Skipped, find_files


def write(path: Path, text: str = "some text\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def names(spec, skipped=None) -> list[str]:
    return [name for name, _ in find_files(spec, skipped)]


@pytest.fixture
def root(tmp_path):
    write(tmp_path / "root" / "a.txt", "a")
    return tmp_path / "root"


# Links


def test_linked_folder_is_read(root, tmp_path):
    write(tmp_path / "elsewhere" / "deep" / "b.txt", "b")
    (root / "link").symlink_to(tmp_path / "elsewhere")
    assert names(root) == ["a.txt", os.path.join("link", "deep", "b.txt")]
    assert {d.text for d in find_documents(root)} == {"a", "b"}
    (root / "lino").symlink_to(write(tmp_path / "other" / "c.txt", "c").parent)
    assert names(root)[1:] == [os.path.join("link", "deep", "b.txt"), os.path.join("lino", "c.txt")]
    (root / "lino").unlink()
    assert {d.text for d in find_documents(f"{root}/**/*.txt")} == {"a", "b"}


def test_links_inside_linked_folders_are_read(root, tmp_path):
    write(tmp_path / "x" / "x.txt", "x")
    write(tmp_path / "y" / "y.txt", "y")
    (tmp_path / "x" / "more").symlink_to("../y")
    (root / "link").symlink_to(tmp_path / "x")
    assert names(root) == ["a.txt", os.path.join("link", "x.txt"), os.path.join("link", "more", "y.txt")]


def test_each_file_is_read_once_at_its_own_place(root, tmp_path):
    """Links before and after a folder, a link to a link, a link to a file, a hard link."""
    write(root / "m" / "b.txt", "b")
    for name in ("a_before", "z_after"):
        (root / name).symlink_to("m")
    (root / "m2").symlink_to("a_before")
    (root / "b2.txt").symlink_to("m/b.txt")
    os.link(root / "a.txt", root / "c.txt")
    write(root / "b.txt")
    assert names(root) == ["b.txt", "c.txt", os.path.join("m", "b.txt")]  # under the last of its names
    assert len(names(f"{root}/**")) == len(names(f"{root}/**/*.txt")) == 3
    assert len(names(f"{root}/*/*.txt")) == 1


@pytest.mark.parametrize("target", [".", "..", "../root", "sub", "sub/..", "/"])
def test_links_in_a_circle_end(root, target):
    (root / "sub").mkdir()
    for name in ("one", "two", "sub/three"):  # two links to their own folder make 2^40 paths
        (root / name).symlink_to(root / target if target != "/" else "/")
    for spec in (root, f"{root}/**/*.txt"):
        assert [path.name for _, path in find_files(spec)] == ["a.txt"]


def test_link_to_a_folder_around_it_is_reported(root, caplog):
    (root / "up").symlink_to("..")
    (root / "self").symlink_to(".")
    with caplog.at_level(logging.WARNING):
        find_documents(root)
    assert "skipped 1 link(s) to a folder around them: up" in caplog.text


def test_two_folders_that_link_to_each_other(root):
    write(root / "x" / "x.txt")
    write(root / "y" / "y.txt")
    (root / "x" / "to_y").symlink_to("../y")
    (root / "y" / "to_x").symlink_to("../x")
    assert len(names(root)) == 3
    assert names(root / "x") == ["x.txt", os.path.join("to_y", "y.txt")]


def test_links_that_lead_nowhere_are_counted(root, caplog):
    (root / "broken").symlink_to("missing")
    (root / "itself").symlink_to("itself")
    (root / "ping").symlink_to("pong")
    (root / "pong").symlink_to("ping")
    with caplog.at_level(logging.WARNING):
        assert [d.text for d in find_documents(root)] == ["a"]
    assert "4 broken link(s): broken, itself (Too many levels of symbolic links), " in caplog.text
    assert "and 1 more" in caplog.text
    for name in ("broken", "itself"):
        with pytest.raises(FileNotFoundError, match=f"{name} is a broken link; allowed: a text file"):
            find_documents(root / name)


def test_hidden_links_and_folders_are_left_out(root, tmp_path):
    write(tmp_path / "elsewhere" / "b.txt")
    write(root / ".git" / "config")
    (root / ".link").symlink_to(tmp_path / "elsewhere")
    assert names(root) == ["a.txt"]
    assert [name.rpartition(os.sep)[2] for name in names(f"{root}/**/.git/*")] == ["config"]


# Special files and odd names


def test_special_files_never_block(root, caplog, monkeypatch):
    os.mkfifo(root / "fifo")
    monkeypatch.chdir(root)  # the name of a socket is at most 108 bytes long
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        (root / "device").symlink_to("/dev/zero")
        with caplog.at_level(logging.WARNING):
            assert [d.text for d in find_documents(root)] == ["a"]
        assert "3 FIFO(s), socket(s) or device(s): device, fifo, socket" in caplog.text
        for name, kind in (("fifo", "a FIFO"), ("socket", "a socket"), ("device", "a character device")):
            with pytest.raises(FileNotFoundError, match=f"{name} is {kind}; allowed: a text file"):
                find_documents(root / name)


def test_file_that_becomes_a_fifo_never_blocks(root, monkeypatch, caplog):
    write(root / "b.txt")
    found = list(find_files(root))
    (root / "b.txt").unlink()
    os.mkfifo(root / "b.txt")
    monkeypatch.setattr("dantinox.data.documents.find_files", lambda *_: iter(found))
    with caplog.at_level(logging.WARNING):
        assert [d.text for d in find_documents(root)] == ["a"]
    assert "b.txt (not a regular file)" in caplog.text


def test_file_that_vanishes_is_counted(root, monkeypatch, caplog):
    write(root / "b.txt")
    found = list(find_files(root))
    (root / "b.txt").unlink()
    monkeypatch.setattr("dantinox.data.documents.find_files", lambda *_: iter(found))
    with caplog.at_level(logging.WARNING):
        assert [d.text for d in find_documents(root)] == ["a"]
    assert "1 file(s) that cannot be read: b.txt (No such file or directory)" in caplog.text


def test_unreadable_file_is_named(root, tmp_path, monkeypatch, caplog):
    closed, real = write(root / "closed.txt"), os.open

    def refuse(path, *arguments, **options):
        if Path(path) == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse)
    with caplog.at_level(logging.WARNING):
        assert load_corpus(root, cache_dir=write(root / "b.txt", "abcd").parent / ".cache").stats.skipped == 1
    assert "1 file(s) that cannot be read: closed.txt (Permission denied)" in caplog.text
    with pytest.raises(PermissionError):
        find_documents(closed)


def test_names_that_are_not_utf8_or_not_printable(root, caplog):
    write(Path(os.fsdecode(os.fsencode(root) + b"/\xe9.txt")), "b")
    write(root / "two\nlines.txt", "c")
    write(root / "é ✓.txt", "d")
    Path(os.fsdecode(os.fsencode(root) + b"/\xff.bin")).write_bytes(b"\xff")
    with caplog.at_level(logging.WARNING):
        assert sorted(d.text for d in find_documents(root)) == ["a", "b", "c", "d"]
    assert r"'\udcff.bin' (not UTF-8: byte 0xff at offset 0)" in caplog.text
    assert caplog.text.isascii() and caplog.text.count("\n") == 1
    assert len(names(f"{root}/*")) == 5


def test_very_deep_tree(root):
    folder = root
    for _ in range(400):
        folder = folder / "d"
    write(folder / "b.txt", "b")
    assert len(names(root)) == 2 and len(names(f"{root}/**/*.txt")) == 2


@pytest.mark.parametrize("spec", ["", "missing", "missing/*", "a\0b", "~nosuchuser/x", "x" * 5000, "/" + "d/" * 3000])
def test_what_is_not_there_is_one_line(root, monkeypatch, spec):
    monkeypatch.chdir(root)
    with pytest.raises(OSError) as error:
        find_documents(spec)
    assert "\n" not in str(error.value)


def test_number_of_names_shown_is_limited():
    skipped = Skipped()
    for i in range(1000):
        skipped.add(Skipped.NOT_TEXT, f"{i}.bin", "UTF-16 text")
    skipped.add(Skipped.EMPTY, "empty")
    assert len(skipped) == 1000
    assert str(skipped) == (
        "1000 file(s) that are not UTF-8 text: 0.bin (UTF-16 text), 1.bin (UTF-16 text), 2.bin (UTF-16 text) "
        "and 997 more; 1 empty file(s): empty"
    )


# Globs, against those of the standard library where these end


@pytest.mark.parametrize(
    "pattern",
    ["*", "*.txt", "**", "**/*", "**/*.txt", "*/*", "**/b*", "b/**", "b/**/*.txt", "**/c/*", "**/[ab]*", "?/**/?.txt"]
    + ["**/c/**", "b/**/c/*.md", ".h/*", "**/.h/*", "**/.*", "[ab].txt", "nothing*", "**/nothing", "b//*.txt", "./**"],
)
def test_glob_matches_what_the_standard_library_matches(root, monkeypatch, pattern):
    import glob

    for name in (
        "b/a.txt",
        "b/c/x.txt",
        "b/c/y.md",
        "c/b.txt",
        "b.txt",
        ".h/z.txt",
        "b/.h/z.txt",
        ".d",
        "b/c/.e",
        ".q/.h/n.txt",
        ".h/.s",
    ):
        write(root / name, name)
    monkeypatch.chdir(root)
    want = {os.path.normpath(match) for match in glob.glob(pattern, recursive=True) if os.path.isfile(match)}
    if not want:
        with pytest.raises(FileNotFoundError):
            names(pattern)
    else:
        assert {os.path.normpath(name) for name in names(pattern)} == want


def test_file_whose_name_is_a_pattern(root):
    write(root / "data[1]*.txt", "b")
    assert [d.text for d in find_documents(root / "data[1]*.txt")] == ["b"]


def test_order_of_files_is_that_of_walking(root):
    """Caches and runs depend on it: files of a folder before its subfolders, both sorted."""
    for name in ("b/z.txt", "b/a/y.txt", "B.txt", "c.txt"):
        write(root / name, name)
    want = [str(Path(top, n).relative_to(root)) for top, _, found in sorted(os.walk(root)) for n in sorted(found)]
    assert names(root) == want
    assert data_files.STDLIB == "stdlib"
