"""Folders with train.bin and val.bin are used as they are."""

import os
import pickle

import numpy as np
import pytest

from dantinox.data import token_folder
from dantinox.data.corpus import load_corpus
from dantinox.data.tokenizer import CharTokenizer

SMALL = CharTokenizer("é")
WIDE = CharTokenizer("".join(map(chr, range(0x10000, 0x20100))))


@pytest.fixture
def tokens(tmp_path):
    """A function that writes a folder of ids, as nanoGPT does."""

    def make(dtype=np.uint16, tokenizer=SMALL, largest=257):
        rng = np.random.default_rng(0)
        for split, size in (("train", 5000), ("val", 600)):
            ids = rng.integers(0, largest + 1, size)
            ids[-1] = largest
            ids.astype(dtype).tofile(tmp_path / f"{split}.bin")
        if tokenizer:
            tokenizer.save(tmp_path)
        return tmp_path

    return make


def test_ids_are_mapped_as_they_are(tokens):
    folder = tokens()
    corpus = load_corpus(folder, seq_len=64)
    for split in ("train", "val"):
        ids = getattr(corpus, split)
        assert isinstance(ids, np.memmap) and not ids.flags.writeable and ids.dtype == np.uint16
        assert np.array_equal(ids, np.fromfile(folder / f"{split}.bin", np.uint16))
    counts = np.bincount(corpus.train, minlength=258) + 1
    assert corpus.stats.unigram_entropy == pytest.approx(-np.log(counts[corpus.val] / counts.sum()).mean())
    assert corpus.stats.val_bytes == len(corpus.tokenizer.decode_bytes(corpus.val))
    assert corpus.stats.train_docs == (corpus.train == 0).sum()
    with pytest.raises(ValueError, match=r"validation split of .* has 600 tokens, but seq_len 600"):
        load_corpus(folder, seq_len=600)


def test_four_byte_ids(tokens):
    """Of a large vocabulary, or by meta.json, or by a header."""
    folder = tokens(np.uint32, WIDE, 66_000)
    assert load_corpus(folder).train.max() == 66_000
    tokens(np.uint32)
    (folder / "meta.json").write_text('{"dtype": "uint32"}')
    want = load_corpus(folder).train
    assert want.dtype == np.uint32 and len(want) == 5000 and want.max() == 257
    (folder / "meta.json").unlink()
    for magic, version, dtype in ((20240520, 1, np.uint16), (20240801, 7, np.uint32)):
        for name in ("train.bin", "val.bin"):
            ids = np.arange(100, dtype=dtype)
            header = np.zeros(256, np.int32)
            header[:3] = magic, version, len(ids)
            (folder / name).write_bytes(header.tobytes() + ids.tobytes())
        assert np.array_equal(load_corpus(folder).train, np.arange(100))
    (folder / "val.bin").write_bytes((folder / "val.bin").read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"val.bin has 99 ids; its header says 100"):
        load_corpus(folder)


def test_missing_vocabulary_is_one_line_and_nothing_is_unpickled(tokens):
    folder = tokens(tokenizer=None)
    with pytest.raises(ValueError, match=r"has token ids without their vocabulary; put the tokenizer.json"):
        load_corpus(folder)

    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(folder / "trapped"),)

    (folder / "meta.pkl").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match=r"vocabulary \(meta.pkl is not read: .*\); put the tokenizer.json") as error:
        load_corpus(folder)
    assert "\n" not in str(error.value) and not (folder / "trapped").exists()
    assert load_corpus(folder, existing_tokenizer=CharTokenizer("é")).tokenizer == CharTokenizer("é")


def test_wrong_ids_and_files_are_named(tokens):
    folder = tokens(largest=300)
    with pytest.raises(ValueError, match=r"train.bin has the id 300; allowed: 0 to 257, .* as uint16"):
        load_corpus(folder)
    for raw in (b"", b"abc"):
        (folder / "train.bin").write_bytes(raw)
        with pytest.raises(ValueError, match=rf"train.bin has {len(raw)} bytes of ids; allowed: a multiple of 2"):
            load_corpus(folder)
    for text, message in (("{", "not a JSON object"), ("[]", "not a JSON object"), ('{"dtype": "int8"}', "allowed: u")):
        (folder / "meta.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_corpus(folder)


def test_large_files_are_sampled(tokens, monkeypatch):
    folder = tokens()
    want = load_corpus(folder)
    for name, size in (("COUNTED", 640), ("HASHED", 64)):
        monkeypatch.setattr(token_folder, name, size)
    stats = load_corpus(folder).stats
    assert stats.unigram_entropy == pytest.approx(want.stats.unigram_entropy, rel=0.1)
    assert stats.train_bytes == pytest.approx(want.stats.train_bytes, rel=0.1)
    assert sum(map(len, token_folder._runs(want.train, 640))) == 640
    assert token_folder._runs(want.train, 640).__next__()[0] == want.train[0]


def test_content_id_depends_on_ids_and_tokenizer(tokens, tmp_path):
    folder = tokens()
    first = load_corpus(folder).content_id
    assert len(first) == 32 and load_corpus(folder).content_id == first
    assert load_corpus(folder, existing_tokenizer=CharTokenizer("éü")).content_id != first
    ids = np.fromfile(folder / "val.bin", np.uint16)
    ids[5] ^= 1
    ids.tofile(folder / "val.bin")
    assert load_corpus(folder).content_id != first


def test_folder_in_the_cache_is_such_a_folder(folder, make):
    made = make(folder)
    assert np.array_equal(load_corpus(made.path).train, made.train)
    assert load_corpus(made.path).stats.unigram_entropy == pytest.approx(made.stats.unigram_entropy)
