"""Corpora: reading, splits without leakage, caches with content keys, and reproducible batches."""

import errno
import json
import logging
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dantinox.data import corpus as data
from dantinox.data import documents
from dantinox.data.corpus import (
    Document,
    cached_corpus,
    eval_batches,
    find_documents,
    get_batch,
    load_corpus,
    train_val_split,
)
from dantinox.data.tokenizer import CharTokenizer, train_tokenizer
from dantinox.system import atomic_io
from dantinox.system.progress import Progress

TOKENS = np.arange(1000, dtype=np.uint16)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return path


@pytest.fixture
def folder(tmp_path):
    """40 small distinct documents, and a copy of each of the first ten."""
    for i in range(40):
        write(tmp_path / "docs" / f"{i:02}.txt", f"document number {i}, {i * i} words long\n" * 5)
    for i in range(10):
        write(tmp_path / "docs" / "copies" / f"{i:02}.md", f"document number {i}, {i * i} words long\n" * 5)
    return tmp_path / "docs"


@pytest.fixture
def make(tmp_path):
    """prepare() with a cache of the test's own."""
    return lambda spec, **options: load_corpus(spec, cache_dir=tmp_path / "cache", **options)


def documents_of(corpus, tokens) -> list[str]:
    ends = np.flatnonzero(tokens == corpus.tokenizer.eos_id) + 1
    assert ends[-1] == len(tokens)
    return [corpus.tokenizer.decode(part) for part in np.split(tokens, ends[:-1])]


# Finding


def test_file_folder_and_glob_are_read(folder):
    assert [d.text for d in find_documents(folder / "03.txt")] == [(folder / "03.txt").read_text()]
    names = [d.name for d in find_documents(folder)]
    assert len(names) == 50 and names[0] == "00.txt" and names[-1] == os.path.join("copies", "09.md")
    assert len(find_documents(f"{folder}/*.txt")) == 40
    assert len(find_documents(f"{folder}/**/0?.*")) == 20


def test_line_endings_are_kept_and_hidden_files_are_skipped(tmp_path):
    write(tmp_path / "a.txt", "one\r\ntwo\rthree\n")
    write(tmp_path / ".git" / "config", "hidden")
    write(tmp_path / ".env", "hidden")
    assert [d.text for d in find_documents(tmp_path)] == ["one\r\ntwo\rthree\n"]


def test_binary_files_are_skipped_and_counted(folder, make, caplog):
    (folder / "image.png").write_bytes(b"\x89PNG\xff\xfe")
    (folder / "zeros.bin").write_bytes(b"text\0")
    write(folder / "empty.txt", "")
    with caplog.at_level(logging.WARNING):
        assert len(find_documents(folder)) == 50
    assert "skipped 2 file(s)" in caplog.text
    assert make(folder).stats.skipped == 2


def test_missing_or_empty_data_raises_one_line(tmp_path, make):
    """Fault 2: a path that is not there trains on what a cache holds."""
    for spec in ("missing.txt", "no/*.txt"):
        with pytest.raises(FileNotFoundError, match="no file, folder or match"):
            make(tmp_path / spec)
    (tmp_path / "empty").mkdir()
    (tmp_path / "only.bin").write_bytes(b"\xff\xfe\0")
    for spec in ("empty", "only.bin"):
        with pytest.raises(ValueError, match="no text in") as error:
            make(tmp_path / spec)
        assert "\n" not in str(error.value)


def test_unreadable_folder_raises(folder, make, monkeypatch):
    closed, scan = folder / "closed", os.scandir
    closed.mkdir()

    def scandir(path):
        if Path(path) == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError, match="closed"):
        make(folder)


def test_stdlib_is_source_without_tests():
    names = [d.name for d in find_documents("stdlib")]
    assert len(names) > 300 and "argparse.py" in names and os.path.join("json", "decoder.py") in names
    parts = {part for name in names for part in Path(name).parts}
    assert not parts & {"site-packages", "test", "tests", "idle_test", "__pycache__"}
    assert all(name.endswith(".py") for name in names)
    assert names == [d.name for d in find_documents("stdlib")]


# Splitting


def test_train_and_validation_share_no_document(folder, make):
    corpus = make(folder)
    train, val = documents_of(corpus, corpus.train), documents_of(corpus, corpus.val)
    originals = {path.read_text() for path in folder.glob("*.txt")}
    assert set(train) | set(val) == originals and len(train) + len(val) == len(originals) == 40
    assert 2 <= len(val) <= 6
    assert (corpus.stats.duplicates, corpus.stats.train_docs, corpus.stats.val_docs) == (
        10,
        len(train),
        len(val),
    )


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_validation_of_a_single_file_is_its_tail(tmp_path, make, kind):
    text = "".join(f"line {i} é\n" for i in range(500))
    corpus = make(write(tmp_path / "a.txt", text), tokenizer=kind, bpe_vocab_size=300, val_fraction=0.2)
    [train], [val] = documents_of(corpus, corpus.train), documents_of(corpus, corpus.val)
    assert train + val == text and len(val) == round(0.2 * len(text))


def test_tokenizer_is_trained_on_the_train_split_only(tmp_path, make):
    path = write(tmp_path / "a.txt", "é" * 900 + "ü" * 100)
    assert make(path, val_fraction=0.1).tokenizer.chars == "é"
    bpe = make(write(tmp_path / "b.txt", "ab " * 300 + "xy " * 33), tokenizer="bpe", val_fraction=0.1).tokenizer
    assert bpe.encode("ab").size == 1 and bpe.encode("xy").size == 2


def test_one_large_document_stays_in_train():
    small = [Document(f"{i}", f"{i:04}" * 25) for i in range(100)]
    large = Document("large", "x" * 900)
    assert all(d.name != "large" for d in train_val_split([*small, large], 0.1)[1])


@settings(deadline=None)
@given(st.lists(st.text("ab é", min_size=1), min_size=1, max_size=30, unique=True), st.floats(0.01, 0.99))
def test_split_partitions_random_documents(texts, fraction):
    documents = [Document(str(i), text) for i, text in enumerate(texts)]
    if sum(map(len, texts)) < 2:
        with pytest.raises(ValueError, match="allowed: at least 2"):
            train_val_split(documents, fraction)
        return
    train, val = train_val_split(documents, fraction)
    assert train and val
    cut = {d.name for d in train} & {d.name for d in val}
    assert len(cut) <= 1
    pieces = [d.text for d in train if d.name in cut] + [d.text for d in val if d.name in cut]
    assert not cut or "".join(pieces) == documents[int(cut.pop())].text
    assert sum(d.size for d in train + val) == sum(d.size for d in documents)
    assert train_val_split(documents, fraction) == (train, val)


def test_invalid_options_and_too_little_text_raise(folder, tmp_path, make):
    for fraction in (0, 1, -0.1, 2, math.nan):
        with pytest.raises(ValueError, match="val_fraction is"):
            make(folder, val_fraction=fraction)
    with pytest.raises(ValueError, match="allowed: char, bpe"):
        make(folder, tokenizer="word")
    with pytest.raises(ValueError, match="allowed: at least 2"):
        make(write(tmp_path / "one.txt", "x"))
    with pytest.raises(ValueError, match=r"validation split of .* has 11 tokens, but seq_len 64 needs at least 65"):
        make(write(tmp_path / "short.txt", "0123456789" * 10), seq_len=64)


# The cache


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
    monkeypatch.setattr(data, "open", full, raising=False)
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


def test_long_preparation_shows_what_it_does(folder, make, monkeypatch, capsys):
    """And nothing is printed where the corpus is small or cached."""
    monkeypatch.setattr(Progress, "quiet_seconds", 30)
    make(folder, tokenizer="bpe", bpe_vocab_size=300)
    assert capsys.readouterr().err == ""
    for name in ("quiet_seconds", "line_seconds"):
        monkeypatch.setattr(Progress, name, 0.01)
    for module, name in ((data, "train_tokenizer"), (documents, "read_text"), (CharTokenizer, "encode")):
        real = getattr(module, name)
        slow = lambda *arguments, real=real: (time.sleep(0.02), real(*arguments))[1]
        monkeypatch.setattr(module, name, slow)
    make(folder)
    err = capsys.readouterr().err
    for line in (r"reading 50 file\(s\): [1-9]\d*%, \d+ s", r"training a tokenizer \(char\) on 0.0 MB: \d+ s"):
        assert re.search(f"^{line}$", err, re.MULTILINE)
    assert re.search(r"^tokenizing 0.0 MB: [1-9]\d*%, \d+ s$", err, re.MULTILINE) and "done in" in err


def test_existing_tokenizer_is_used(folder, make):
    tokenizer = train_tokenizer("bpe", ["something else " * 9], 300)
    corpus = make(folder, existing_tokenizer=tokenizer)
    assert corpus.tokenizer == tokenizer
    assert set(documents_of(corpus, corpus.val)) <= {path.read_text() for path in folder.glob("*.txt")}


def test_ids_use_two_bytes_until_they_need_four(folder, make):
    assert make(folder).train.dtype == np.uint16
    wide = CharTokenizer("".join(map(chr, range(0x10000, 0x20100))))
    assert wide.vocab_size > 1 << 16
    path = write(folder / "wide.txt", "\U000200ff" * 50)
    corpus = make(path, existing_tokenizer=wide)
    assert corpus.train.dtype == np.uint32
    assert corpus.train.max() == wide.vocab_size - 1
    assert corpus.tokenizer.decode(corpus.train) == "\U000200ff" * 45


def test_stats_match_the_corpus(tmp_path, make):
    corpus = make(write(tmp_path / "a.txt", "aaab" * 100 + "é"), val_fraction=0.25)
    stats, v = corpus.stats, corpus.tokenizer.vocab_size
    counts = np.bincount(corpus.train, minlength=v) + 1
    want = -np.log(counts[corpus.val] / counts.sum()).mean()
    assert stats.unigram_entropy == pytest.approx(want, rel=1e-12)
    assert stats.train_bytes + stats.val_bytes == 402
    assert (stats.train_tokens, stats.val_tokens) == (len(corpus.train), len(corpus.val))
    assert stats.bytes_per_token == stats.val_bytes / stats.val_tokens


# Batches


@settings(deadline=None)
@given(st.integers(0, 2**63), st.integers(0, 2**40), st.integers(1, 9), st.integers(1, 999))
def test_batch_depends_only_on_seed_and_step(seed, step, size, seq_len):
    inputs, targets = get_batch(TOKENS, seed=seed, step=step, batch_size=size, seq_len=seq_len)
    assert inputs.shape == targets.shape == (size, seq_len) and inputs.dtype == targets.dtype == np.int32
    assert np.array_equal(targets, inputs + 1)  # the tokens count up, so the next one is one more
    np.random.random()
    again, _ = get_batch(TOKENS, seed=seed, step=step, batch_size=size + 3, seq_len=seq_len)
    assert np.array_equal(again[:size], inputs)


def test_batches_differ_by_step_and_seed_and_cover_every_start():
    def starts(seed, step):
        return tuple(get_batch(TOKENS, seed=seed, step=step, batch_size=64, seq_len=8)[0][:, 0])

    assert len({starts(seed, step) for seed in range(8) for step in range(8)}) == 64
    seen = get_batch(TOKENS[:20], seed=0, step=0, batch_size=1000, seq_len=8)[0][:, 0]
    assert set(seen) == set(range(12))


def test_batches_are_the_same_on_every_machine():
    assert get_batch(TOKENS, seed=1, step=2, batch_size=4, seq_len=1)[0][:, 0].tolist() == [64, 610, 468, 65]


@settings(deadline=None)
@given(st.integers(2, 1000), st.integers(1, 9), st.integers(1, 200), st.integers(1, 30))
def test_eval_batches_cover_evenly_without_overlap(length, batch_size, seq_len, n):
    tokens = TOKENS[:length]
    if length < seq_len + 1:
        with pytest.raises(ValueError, match=f"seq_len {seq_len} needs at least {seq_len + 1}"):
            eval_batches(tokens, batch_size=batch_size, seq_len=seq_len, n=n)
        return
    batches = eval_batches(tokens, batch_size=batch_size, seq_len=seq_len, n=n)
    assert 1 <= len(batches) <= n
    assert len({inputs.shape for inputs, _ in batches}) == 1 and len(batches[0][0]) <= batch_size
    predicted = np.concatenate([targets.ravel() for _, targets in batches])
    assert len(set(predicted)) == len(predicted)
    assert all(np.array_equal(targets, inputs + 1) for inputs, targets in batches)
    if (length - 1) // seq_len >= n * batch_size:
        assert len(batches) == n and len(batches[0][0]) == batch_size
    first = np.concatenate([inputs[:, 0] for inputs, _ in batches])
    assert len(first) == 1 or len(set(np.diff(first))) == 1


def test_invalid_batch_arguments_raise():
    for bad in ({"seq_len": 1000}, {"seq_len": 0}, {"step": -1}, {"seed": -1}, {"batch_size": 0}):
        with pytest.raises(ValueError):
            get_batch(TOKENS, **{"seed": 0, "step": 0, "batch_size": 2, "seq_len": 8, **bad})
    for bad in ({"seq_len": 1000}, {"seq_len": 0}, {"n": 0}, {"batch_size": 0}):
        with pytest.raises(ValueError):
            eval_batches(TOKENS, **{"batch_size": 2, "seq_len": 8, "n": 2, **bad})
