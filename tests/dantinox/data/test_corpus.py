"""Corpora: reading, splits without leakage, caches with content keys, and reproducible batches."""

import logging
import math
import os
import re
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dantinox.data import blocks
from dantinox.data import corpus as data
from dantinox.data.corpus import (
    eval_batches,
    find_documents,
    get_batch,
)
from dantinox.data.tokenizer import CharTokenizer, train_tokenizer
from dantinox.system.progress import Progress
from tests.helpers.text_files import write

TOKENS = np.arange(1000, dtype=np.uint16)


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


def test_long_preparation_shows_what_it_does(folder, make, monkeypatch, capsys):
    """And nothing is printed where the corpus is small or cached."""
    monkeypatch.setattr(Progress, "quiet_seconds", 30)
    make(folder, tokenizer="bpe", bpe_vocab_size=300)
    assert capsys.readouterr().err == ""
    for name in ("quiet_seconds", "line_seconds"):
        monkeypatch.setattr(Progress, name, 0.01)
    monkeypatch.setattr(blocks, "BLOCK", 2000)
    for module, name in ((data, "train_tokenizer"), (blocks, "decode"), (CharTokenizer, "encode")):
        real = getattr(module, name)
        slow = lambda *arguments, real=real: (time.sleep(0.01), real(*arguments))[1]
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
    rows = np.arange(size)[::-2]
    part = get_batch(TOKENS, seed=seed, step=step, batch_size=size, seq_len=seq_len, rows=rows)
    assert np.array_equal(part[0], inputs[rows]) and np.array_equal(part[1], targets[rows])


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
