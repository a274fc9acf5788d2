"""The stream of a corpus over processes equals a simple way in memory, for documents that hurt, in every format."""

import contextlib
import dataclasses
import gzip
import importlib.util
import json
import logging
import sys

import numpy as np
import pytest

from dantinox.data import blocks, corpus, encoding, formats, indexing, pool
from dantinox.data.corpus import find_documents, load_corpus
from dantinox.data.tokenizer import CharTokenizer, train_tokenizer
from tests.helpers import corpus_in_memory

LONG = "".join(f"word{i * i} é漢😀 {'x' * (i % 40)}\r\n" for i in range(300))  # many times the size of a block
HARD = [
    "",
    "a",
    "no newline at the end",
    "one\r\ntwo\rthree\n\n",
    "\ufeffin the middle \ufeff of it",
    LONG,
    "漢字😀" * 60 + "\n",  # no space for longer than a block
    " \t \n " * 80,
    "the same\n",
    "z" * 500,
    "the same\n",
    LONG + "more",
    "<|endoftext|> as text",
    "\u2028 \x85 \u3000 spaces of other scripts\n",
]


@pytest.fixture
def small(monkeypatch):
    """Blocks of a few hundred bytes, so that documents and characters cross their borders."""
    monkeypatch.setattr(blocks, "BLOCK", 200)
    monkeypatch.setattr(formats, "CHUNK", 67)


@pytest.fixture
def use_processes(monkeypatch):
    """A function that sets the number of processes."""

    def use(count: int) -> None:
        for module in (corpus, indexing):
            monkeypatch.setattr(module, "process_count", lambda _: count)

    return use


def write_all(folder, texts, kind: str) -> None:
    """Write texts as files, or as records of two files."""
    folder.mkdir()
    if kind in ("txt", "txt.gz", "txt.zst"):
        for i, text in enumerate(texts):
            (folder / f"{i:03}.{kind}").write_bytes(packed(text.encode(), kind))
        return
    for i, part in enumerate((texts[: len(texts) // 2], texts[len(texts) // 2 :])):
        if kind == "parquet":
            pa = pytest.importorskip("pyarrow")
            rows = pa.table({"id": range(len(part)), "text": pa.array(part, pa.large_string() if i else None)})
            importlib.import_module("pyarrow.parquet").write_table(rows, folder / f"{i}.parquet", row_group_size=3)
        else:
            lines = [json.dumps({"text": text}, ensure_ascii=bool(n % 2)) for n, text in enumerate(part)]
            raw = ("\ufeff" + "\r\n".join([*lines[:2], "", "  ", *lines[2:]])).encode()
            (folder / f"{i}.{kind}").write_bytes(packed(raw, kind))


def packed(raw: bytes, kind: str) -> bytes:
    if kind.endswith(".gz"):
        return gzip.compress(raw[: len(raw) // 2]) + gzip.compress(raw[len(raw) // 2 :])
    return zstd(raw[: len(raw) // 2]) + zstd(raw[len(raw) // 2 :]) if kind.endswith(".zst") else raw


def zstd(raw: bytes) -> bytes:
    with contextlib.suppress(ImportError):
        return importlib.import_module("compression.zstd").compress(raw)
    return pytest.importorskip("zstandard").ZstdCompressor().compress(raw)


KINDS = ["txt", "txt.gz", "txt.zst", "jsonl", "jsonl.gz", "jsonl.zst", "parquet"]


def check(folder, cache, texts, **options) -> None:
    made = load_corpus(folder, cache_dir=cache, **options)
    kind, vocab = options.get("tokenizer", "char"), options.get("bpe_vocab_size", 4096)
    want, tokenizer, duplicates = corpus_in_memory.prepare(
        texts, options.get("val_fraction", 0.1), kind, vocab, options.get("existing_tokenizer")
    )
    assert made.tokenizer == tokenizer and made.stats.duplicates == duplicates
    assert np.array_equal(made.train, want[0]) and np.array_equal(made.val, want[1])
    assert made.stats.train_docs == (want[0] == 0).sum() and made.stats.val_docs == (want[1] == 0).sum()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.sampled(2)
def test_hard_documents_are_those_in_memory(tmp_path, small, kind):
    write_all(tmp_path / "in", HARD, kind)
    texts = [text.removeprefix("\ufeff") for text in HARD] if kind.startswith("txt") else HARD
    assert [d.text for d in find_documents(tmp_path / "in")] == [text for text in texts if text]
    for fraction in (0.1, 0.4):
        check(tmp_path / "in", tmp_path / "cache", texts, val_fraction=fraction)
    check(tmp_path / "in", tmp_path / "cache", texts, tokenizer="bpe", bpe_vocab_size=300)


def test_processes_give_the_same(tmp_path, small, use_processes):
    texts = [text.removeprefix("\ufeff") for text in HARD]
    write_all(tmp_path / "in", texts, "txt")
    write_all(tmp_path / "lines", texts, "jsonl.gz")
    (tmp_path / "lines").rename(tmp_path / "in" / "lines")
    use_processes(2)
    check(tmp_path / "in", tmp_path / "cache", texts * 2, tokenizer="bpe", bpe_vocab_size=300)


def test_there_may_be_more_processes_than_documents(tmp_path, use_processes):
    write_all(tmp_path / "in", ["only one é"], "txt")
    use_processes(3)
    check(tmp_path / "in", tmp_path / "cache", ["only one é"])


@pytest.mark.parametrize("text", [LONG, "a" * 999, "漢" * 999, "ab", " " * 900 + "x"])
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
@pytest.mark.sampled(2)
def test_single_long_document_is_divided_anywhere(tmp_path, small, text, kind):
    write_all(tmp_path / "in", [text], kind)
    for fraction in (0.1, 0.333, 0.97):
        check(tmp_path / "in", tmp_path / "cache", [text], val_fraction=fraction)
    check(tmp_path / "in", tmp_path / "cache", [text], existing_tokenizer=train_tokenizer("bpe", [LONG], 300))


def test_tokenizer_that_needs_whole_documents_gets_them(tmp_path, small, monkeypatch):
    write_all(tmp_path / "in", [LONG], "txt")
    monkeypatch.setattr(CharTokenizer, "kind", "another")
    encoder, seen = encoding.Encoder(CharTokenizer("é")), []
    monkeypatch.setattr(CharTokenizer, "encode", lambda _, text: (seen.append(text), np.zeros(1, np.int32))[1])
    assert not encoder.takes_parts
    for block in blocks.read_blocks([formats.Source.at("", tmp_path / "in" / "000.txt")], in_parts=False):
        encoder(dataclasses.replace(block, plan=np.array([len(LONG)])))
    assert [text for text in seen if text] == [LONG]


def test_formats_may_be_mixed_and_come_in_sorted_order(tmp_path, small):
    for i, kind in enumerate(["jsonl", "txt.gz", "jsonl.gz", "txt"]):
        write_all(tmp_path / f"{i}", [f"{kind} {j}\n" * 9 for j in range(5)], kind)
        for path in (tmp_path / f"{i}").iterdir():
            path.rename(tmp_path / f"{i}-{path.name}")
        (tmp_path / f"{i}").rmdir()
    assert [d.text.split()[0] for d in find_documents(f"{tmp_path}/*")] == ["jsonl"] * 5 + ["txt.gz"] * 5 + [
        "jsonl.gz"
    ] * 5 + ["txt"] * 5
    assert find_documents(tmp_path / "0-0.jsonl")[1].name == "0-0.jsonl: line 2"


def test_tokenizer_is_trained_on_a_sample_of_a_large_text(tmp_path, monkeypatch):
    write_all(tmp_path / "in", [f"{i} " * 1000 + "é" * 3 for i in range(200)], "jsonl")
    taken, train = [], corpus.train_tokenizer
    monkeypatch.setattr(corpus, "SAMPLE", 100_000)
    monkeypatch.setattr(encoding, "SAMPLE_PIECE", 100)
    monkeypatch.setattr(
        corpus, "train_tokenizer", lambda kind, texts, v: (taken.extend(texts), train(kind, taken, v))[1]
    )
    load_corpus(tmp_path / "in", cache_dir=tmp_path / "cache", val_fraction=0.3)
    assert 90_000 <= sum(map(len, taken)) <= 120_000
    assert len({text.split()[0] for text in taken}) > 20


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_small_whatever_the_compression(tmp_path, small, kind):
    write_all(tmp_path / "in", [f"{i} " + "word " * 25 for i in range(50)], kind)
    paths = sorted((tmp_path / "in").iterdir())
    found = list(blocks.read_blocks([formats.Source.at(path.name, path) for path in paths]))
    assert len(found) > 9 or kind == "parquet"
    for block in found:
        content = block.content if isinstance(block, blocks.Lines) else b"".join(block.contents)
        assert len(content) < 1000 or kind == "parquet"  # of which several rows are decoded at once


# What is refused


@pytest.mark.parametrize(
    "line, message",
    [
        (b'{"text": "a"', r"is not JSON \(Expecting ',' delimiter at column 13\)"),
        (b"plain", "is not JSON"),
        (b'["text"]', "is not a JSON object"),
        (b'{"content": "a"}', "is refused: it has no 'text'"),
        (b'{"text": 3}', "is refused: its 'text' is not a string"),
        (b'{"text": "\xff"}', "is not UTF-8: byte 0xff at offset 10 of the line"),
        (b"[" * 100_000, "is not JSON that can be read"),
        (b'{"text": "a", "n": ' + b"1" * 5000 + b"}", "is not JSON that can be read"),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz"])
def test_bad_line_is_named(tmp_path, small, line, message, kind, use_processes):
    use_processes(2 if line == b"plain" else 0)
    good = b'{"text": "some good text"}\n'
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / f"a.{kind}").write_bytes(packed(good * 50, kind))
    (tmp_path / "in" / f"b.{kind}").write_bytes(packed(good * 30 + line + b"\n" + good, kind))
    with pytest.raises(ValueError, match=f"^b.{kind}: line 31 {message}") as error:
        load_corpus(tmp_path / "in", cache_dir=tmp_path / "cache")
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "cache" / "corpus").iterdir())


@pytest.mark.parametrize("text", ["a\0b", "a\ud800b"])
def test_records_that_are_not_text_are_skipped_and_counted(tmp_path, text, caplog):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in ["good", text, "", "well"] * 5))
    with caplog.at_level(logging.WARNING):
        stats = load_corpus(path, cache_dir=tmp_path / "cache").stats
    assert (stats.skipped, stats.duplicates) == (5, 8)
    assert "5 document(s) that are not text: a.jsonl: line 2 (a " in caplog.text and "and 2 more" in caplog.text


@pytest.mark.parametrize("kind", ["jsonl.gz", "txt.gz", "jsonl.zst", "txt.zst"])
@pytest.mark.parametrize("size", [0.3, 0.8, -1])
@pytest.mark.sampled(2)
def test_compressed_file_that_ends_early_is_named(tmp_path, kind, size):
    rng = np.random.default_rng(0)
    texts = "".join(json.dumps({"text": rng.bytes(99).hex()}) + "\n" for _ in range(5000))
    raw = gzip.compress(texts.encode()) if kind.endswith("gz") else zstd(texts.encode())
    (tmp_path / f"a.{kind}").write_bytes(raw[: int(size * len(raw)) if size > 0 else size])
    line = r": line \d+" if kind.startswith("jsonl") else ""
    with pytest.raises(ValueError, match=rf"a.{kind}{line}: its compressed data ends early$"):
        load_corpus(tmp_path, cache_dir=tmp_path / ".cache")


def test_damaged_compressed_file_is_named(tmp_path):
    raw = bytearray(gzip.compress(LONG.encode()))
    raw[-8] ^= 1  # the checksum
    (tmp_path / "a.txt.gz").write_bytes(raw)
    with pytest.raises(ValueError, match=r"a.txt.gz: its compressed data is damaged \(CRC check failed"):
        find_documents(tmp_path)


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_file_that_is_not_compressed_is_skipped(tmp_path, kind, caplog):
    zstd(b"")  # skips without the package
    (tmp_path / f"a.txt.{kind}").write_text("plain text " * 9)
    (tmp_path / "b.txt").write_text("plain text " * 9)
    name = {"gz": "gzip", "zst": "zstd"}[kind]
    with caplog.at_level(logging.WARNING):
        assert len(find_documents(tmp_path)) == 1
    assert f"1 file(s) that are not UTF-8 text: a.txt.{kind} (not {name} data)" in caplog.text
    with pytest.raises(ValueError, match=f"no text in .*a.txt.{kind}: it is not {name} data"):
        find_documents(tmp_path / f"a.txt.{kind}")


def test_tables_without_text_are_refused(tmp_path):
    pa = pytest.importorskip("pyarrow")
    write_table = importlib.import_module("pyarrow.parquet").write_table
    path = tmp_path / "a.parquet"
    for table, message in (
        ({"body": ["a"], "id": [1]}, "a.parquet has no column 'text'; it has body, id"),
        ({"text": [1]}, "a.parquet: column 'text' is int64; allowed: string"),
    ):
        write_table(pa.table(table), path)
        with pytest.raises(ValueError, match=message):
            find_documents(path)
    write_table(pa.table({"text": pa.array(["a", None, "b"]).dictionary_encode()}), path)
    assert [d.name for d in find_documents(path)] == ["a.parquet: row 1", "a.parquet: row 3"]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"^a.parquet is damaged or no Parquet file: .*[^\n]*$"):
        find_documents(path)


@pytest.mark.parametrize("name, package", [("a.parquet", "pyarrow"), ("a.jsonl.zst", "zstandard")])
def test_missing_package_is_one_line(tmp_path, monkeypatch, name, package):
    (tmp_path / name).write_bytes(b"x")
    for absent in (package, "compression.zstd"):
        monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises(ValueError, match=rf"^{name} needs the package {package}: run pip install .*\[data\]'$"):
        find_documents(tmp_path)


def test_line_without_end_is_refused(tmp_path, small, monkeypatch):
    monkeypatch.setattr(blocks, "MAX_LINE", 300)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "' + "a" * 1000)
    with pytest.raises(ValueError, match=r"a.jsonl: line 2: it is longer than 0 MB; allowed: one JSON object per line"):
        find_documents(tmp_path)


def test_process_count_follows_cores_and_size(monkeypatch):
    monkeypatch.setattr(pool.os, "sched_getaffinity", lambda _: range(8), raising=False)
    assert [pool.process_count(size) for size in (0, 10**6, 2 * 10**7, 10**12)] == [0, 0, 4, 8]
