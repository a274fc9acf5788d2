"""The cache of prepared text: its key, damage, concurrent builds, full disks."""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from dantinox.data import cache
from dantinox.data import corpus as data
from dantinox.data.corpus import (
    cached_corpus,
    load_corpus,
)
from dantinox.data.tokenizer import CharTokenizer
from dantinox.system import atomic_io
from tests.helpers.text_files import write

TOKENS = np.arange(1000, dtype=np.uint16)


def test_second_call_reuses_the_cache_files(folder, make, monkeypatch):
    first = make(folder)
    monkeypatch.setattr(data, "_write_cache", lambda *_: pytest.fail("built again"))
    second = make(folder)
    assert second.path == first.path and second.stats == first.stats and second.tokenizer == first.tokenizer
    assert isinstance(second.train, np.memmap) and not second.train.flags.writeable
    assert np.array_equal(first.train, second.train) and np.array_equal(first.val, second.val)


def test_different_text_or_option_uses_a_different_cache(folder, tmp_path, make):
    """Fault 2: the cache ignores the text, and the first corpus silently replaces a second one."""
    a = write(tmp_path / "a" / "text.txt", "abcd" * 100)
    b = write(tmp_path / "b" / "text.txt", "abce" * 100)
    os.utime(a, (0, 0)), os.utime(b, (0, 0))
    corpora = [make(a), make(b), make(a, val_fraction=0.2), make(a, tokenizer="bpe")]
    corpora += [make(a, tokenizer="bpe", bpe_vocab_size=258), make(a, existing_tokenizer=CharTokenizer("é"))]
    assert len({corpus.path for corpus in corpora}) == len(corpora)
    assert make(a).tokenizer.decode(make(a).train) == "abcd" * 90
    write(a, "abcf" * 100)
    os.utime(a, (0, 0))
    assert make(a).tokenizer.decode(make(a).train) == "abcf" * 90


def test_cache_key_includes_document_boundaries(tmp_path, make):
    one = write(tmp_path / "x" / "1", "ab" * 50).parent
    write(one / "2", "cd" * 50)
    two = write(tmp_path / "y" / "1", "ab" * 50 + "c").parent
    write(two / "2", "d" + "cd" * 49)
    assert make(one).path != make(two).path


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "meta.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["truncate", "empty", "flip", "remove"])
def test_damaged_cache_is_rebuilt(folder, make, name, damage):
    first = make(folder)
    want, path = (first.train.tolist(), first.val.tolist()), first.path / name
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes({"truncate": raw[: len(raw) // 2], "empty": b"", "flip": raw}[damage])
    again = make(folder)
    assert (again.train.tolist(), again.val.tolist()) == want and again.tokenizer == first.tokenizer


def test_interrupted_build_leaves_no_valid_cache(folder, make, monkeypatch):
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(CharTokenizer, "encode", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        make(folder)
    corpus = make(folder)
    assert sorted(p.name for p in corpus.path.iterdir()) == [
        "meta.json",
        "tokenizer.json",
        "train.bin",
        "val.bin",
    ]


def test_concurrent_builds_succeed(folder, make):
    results, start = [], threading.Barrier(4)

    def build():
        start.wait()
        results.append(make(folder, tokenizer="bpe", bpe_vocab_size=300))

    threads = [threading.Thread(target=build) for _ in range(4)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert len(results) == 4
    assert all(np.array_equal(r.train, results[0].train) and r.stats == results[0].stats for r in results)
    assert len(list(results[0].path.iterdir())) == 4


def test_cache_folder_comes_from_the_environment(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("DANTINOX_CACHE", str(tmp_path / "elsewhere"))
    assert (tmp_path / "elsewhere") in load_corpus(folder).path.parents


def test_content_id_depends_on_the_text_and_not_on_its_place(folder, tmp_path, make):
    first = make(folder)
    assert first.content_id == first.path.name
    moved = folder.rename(tmp_path / "moved")
    (tmp_path / "link").symlink_to(moved)
    write(moved / "again.txt", (moved / "03.txt").read_text())  # a duplicate of a document that copies/ repeats, too
    places = [moved, tmp_path / "link", f"{moved}/*", f"{moved}/../moved"]
    assert {make(spec).content_id for spec in (moved, tmp_path / "link", f"{moved}/../moved")} == {first.content_id}
    assert load_corpus(moved, cache_dir=tmp_path / "another").content_id == first.content_id
    assert {make(spec, val_fraction=0.2).content_id for spec in places[:2]} != {first.content_id}
    write(moved / "05.txt", "other text\n")
    assert make(moved).content_id != first.content_id


def test_content_ids_are_those_of_earlier_versions(tmp_path, make):
    """Checkpoints hold them: a change would end every run."""
    path = write(tmp_path / "a.txt", "".join(f"line {i} é\n" for i in range(500)))
    assert make(path).content_id == "4f29feb91046cb15e99490b7d6d792eb"
    assert make(path, tokenizer="bpe", bpe_vocab_size=300).content_id == "5a9183820894235ddf38bfdf60843bbd"


def test_damaged_cache_is_replaced_for_good(folder, make, monkeypatch, caplog):
    first = make(folder)
    (first.path / "val.bin").write_bytes(b"")
    assert make(folder).path == first.path and "rebuilding the cache" in caplog.text
    monkeypatch.setattr(data, "_write_cache", lambda *_: pytest.fail("built again"))
    assert make(folder).content_id == first.content_id
    assert [entry.name for entry in first.path.parent.iterdir()] == [first.content_id]


def test_cached_corpus_is_found_by_its_id_without_its_text(folder, tmp_path, make):
    first = make(folder, tokenizer="bpe", bpe_vocab_size=300)
    write(folder / "00.txt", "other text")
    found = cached_corpus(first.content_id, tmp_path / "cache")
    assert found.tokenizer == first.tokenizer and np.array_equal(found.train, first.train)
    assert found.content_id == first.content_id and np.array_equal(found.val, first.val)
    for name in ("0" * 32, "..", "", f"../corpus/{first.content_id}"):
        assert cached_corpus(name, tmp_path / "cache") is None


def test_cache_is_renamed_into_place_when_it_is_complete(folder, tmp_path, make, monkeypatch):
    """A process that is killed leaves nothing that another one reads, and its files are removed in time."""
    partials, write_cache = [], data._write_cache

    def killed(partial, *arguments):
        write_cache(partial, *arguments)
        assert not partial.with_name(make.content_id).exists()
        shutil.copytree(partial, tmp_path / "left")
        partials.append(partial)
        raise KeyboardInterrupt

    make.content_id = make(folder).content_id
    shutil.rmtree(tmp_path / "cache")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(data, "_write_cache", killed)
        make(folder)
    [partial] = partials
    assert not list(partial.parent.iterdir())
    for age in (0, 10**6):
        shutil.copytree(tmp_path / "left", partial.with_name(f".{age}.partial"))
        os.utime(partial.with_name(f".{age}.partial"), (time.time() - age,) * 2)
    corpus = make(folder)
    assert {p.name for p in partial.parent.iterdir()} == {corpus.content_id, ".0.partial"}


def test_processes_that_prepare_one_text_all_succeed(folder, tmp_path, make):
    """Also in place of a damaged cache, which each of them removes."""
    code = (
        "import sys, hashlib; from dantinox.data.corpus import load_corpus; "
        "c = load_corpus(sys.argv[1], cache_dir=sys.argv[2], tokenizer='bpe', bpe_vocab_size=300); "
        "print(hashlib.sha256(c.train).hexdigest(), c.path)"
    )
    command = [sys.executable, "-c", code, str(folder), str(tmp_path / "cache")]
    outputs = []
    for _ in range(2):
        processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(3)]
        outputs += [process.communicate() for process in processes]
        assert not any(process.returncode for process in processes), outputs
        [entry] = (tmp_path / "cache" / "corpus").iterdir()
        (entry / "val.bin").write_bytes(b"")
    assert len({output for output, _ in outputs}) == 1


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("name", ["tokenizer.json", "train.bin", "meta.json"])
def test_full_disk_is_one_line_and_leaves_nothing(folder, tmp_path, make, monkeypatch, number, name):
    def full(path, *_, **__):
        if Path(path).name.startswith(name):
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *_, **__)

    real, write_text = open, Path.write_text
    monkeypatch.setattr(cache, "open", full, raising=False)
    monkeypatch.setattr(atomic_io, "open", full, raising=False)
    monkeypatch.setattr(
        Path, "write_text", lambda path, *options: full(path) if path.name == name else write_text(path, *options)
    )
    with pytest.raises(OSError, match=rf"{os.strerror(number)}\); set DANTINOX_CACHE to another folder") as error:
        make(folder)
    assert error.value.errno == number and "\n" not in str(error.value)
    assert not list((tmp_path / "cache" / "corpus").iterdir())


def test_limit_of_a_process_is_reported_like_a_full_disk(folder, tmp_path):
    """A real failure of writing, in a process of its own."""
    code = (
        "import resource, sys; from dantinox.data.corpus import load_corpus; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000)); load_corpus(sys.argv[1], cache_dir=sys.argv[2])"
    )
    run = [sys.executable, "-c", code, str(folder), str(tmp_path / "cache")]
    done = subprocess.run(run, capture_output=True, text=True)
    assert "OSError: [Errno 27] the cache cannot be written (File too large); set DANTINOX_CACHE" in done.stderr
    assert not list((tmp_path / "cache" / "corpus").iterdir())


def test_caches_of_earlier_versions_are_used(folder, make, monkeypatch):
    """They have a tokenizer that cuts no words, and files that were written in place."""
    first = make(folder, tokenizer="bpe", bpe_vocab_size=300)
    record = json.loads((first.path / "tokenizer.json").read_text())
    del record["max_word"]
    (first.path / "tokenizer.json").write_text(json.dumps(record))
    monkeypatch.setattr(data, "_write_cache", lambda *_: pytest.fail("built again"))
    again = make(folder, tokenizer="bpe", bpe_vocab_size=300)
    assert again.tokenizer.max_word is None and np.array_equal(again.train, first.train)
