"""Files that have not changed are not read again."""

import json
import logging
import os

import numpy as np
import pytest

from dantinox.data import blocks, cache, corpus
from dantinox.data.corpus import load_corpus
from dantinox.data.tokenizer import CharTokenizer
from tests.helpers.text_files import write


@pytest.fixture(autouse=True)
def settled(monkeypatch):
    """Files that were just written count as settled."""
    monkeypatch.setattr(cache, "SETTLED_NS", 0)


@pytest.fixture
def unread(monkeypatch):
    """Reading the text fails the test."""

    def forbid() -> None:
        monkeypatch.setattr(blocks, "read_chunks", lambda *_, **__: pytest.fail("read again"))

    return forbid


def test_files_that_are_known_are_not_read(folder, make, unread, caplog):
    write(folder / "binary", "a\0")
    first = make(folder)
    unread()
    with caplog.at_level(logging.WARNING):
        again = make(folder)
    assert again.stats == first.stats and again.content_id == first.content_id
    assert (again.stats.skipped, again.stats.duplicates) == (1, 10)
    assert caplog.text.count("skipped 1 file(s) that are not UTF-8 text: binary") == 2
    assert np.array_equal(first.train, again.train)
    for options in ({"val_fraction": 0.2}, {"tokenizer": "bpe"}, {"existing_tokenizer": CharTokenizer("é")}):
        with pytest.raises(pytest.fail.Exception, match="read again"):
            make(folder, **options)


@pytest.mark.parametrize("change", ["content", "name", "new", "gone", "linked"])
def test_files_that_changed_are_read(folder, make, change):
    first = make(folder)
    path = folder / "33.txt"
    status = path.stat()
    if change == "content":  # of the same length, and with the time that it had
        path.write_text(path.read_text().replace("document", "DOCUMENT"))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    elif change == "name":
        path.rename(folder / "99.txt")
    elif change == "new":
        write(folder / "new.txt", "new\n")
    elif change == "gone":
        path.unlink()
    else:  # to a file with the same size and time
        other = write(folder.parent / "other.txt", path.read_text().replace("document", "DOCUMENT"))
        os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
        path.unlink()
        path.symlink_to(other)
    assert make(folder).content_id != first.content_id


def test_files_that_may_still_change_are_not_remembered(folder, make, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "SETTLED_NS", 10**12)
    make(folder)
    assert not (tmp_path / "cache" / "sources").exists()


def test_text_that_changes_while_it_is_read_is_one_line(folder, make, tmp_path, monkeypatch):
    split = corpus.Index.split

    def change(index, fraction) -> None:
        write(folder / "35.txt", "other\n")
        split(index, fraction)

    monkeypatch.setattr(corpus.Index, "split", change)
    with pytest.raises(ValueError, match=r"35.txt changed while it was read; start again$"):
        make(folder)
    assert not list((tmp_path / "cache" / "corpus").iterdir())


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"content_id": 1}', "null"])
def test_damaged_memory_is_ignored(folder, make, tmp_path, content):
    first = make(folder)
    [path] = (tmp_path / "cache" / "sources").iterdir()
    want = json.loads(path.read_text())
    assert want["content_id"] == first.content_id
    path.write_text(content)
    assert make(folder).stats == first.stats
    assert json.loads(path.read_text()) == want


def test_corpus_that_was_deleted_is_made_again(folder, make, tmp_path):
    first = make(folder)
    for path in first.path.iterdir():
        path.unlink()
    first.path.rmdir()
    assert np.array_equal(make(folder).train, first.train)


def test_large_files_are_known_by_their_sizes(folder, make, monkeypatch, caplog):
    """Not by checksums, which would read them; one that is too short or too long is made again."""
    first = make(folder)
    want, path = first.train.tolist(), first.path / "train.bin"
    monkeypatch.setattr(cache, "CHECKSUM_BYTES", 100)
    flipped = bytearray(path.read_bytes())
    flipped[50] ^= 1
    path.write_bytes(flipped)
    assert cache.load_cache(first.path).train.tolist() != want
    for raw in (path.read_bytes()[:-2], path.read_bytes() + b"ab", path.read_bytes()[:-1]):
        path.write_bytes(raw)
        assert make(folder).train.tolist() == want
    assert "train.bin has" in caplog.text


def test_cache_that_cannot_be_written_is_read(folder, make, tmp_path, monkeypatch):
    first = make(folder)
    (tmp_path / "cache" / "sources").rename(tmp_path / "gone")
    monkeypatch.setattr(corpus, "make_cache_folder", lambda *_: (_ for _ in ()).throw(PermissionError(13, "no", "x")))
    assert load_corpus(folder, cache_dir=tmp_path / "cache").content_id == first.content_id
    with pytest.raises(PermissionError):
        load_corpus(folder, cache_dir=tmp_path / "cache", val_fraction=0.2)
