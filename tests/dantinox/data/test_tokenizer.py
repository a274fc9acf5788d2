"""Both tokenizers round-trip any text exactly and reject what they cannot encode."""

import itertools
import json
import random
import re
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dantinox.data import tokenizer as tokenizers
from dantinox.data.tokenizer import (
    MAX_WORD,
    BPETokenizer,
    CharTokenizer,
    load_tokenizer,
    split_text,
    train_tokenizer,
)

TEXTS = ["the cat sat on the mat. é é é 漢漢漢字\n" * 20, "def f(x):\n    return x  # the end\r\n" * 20]
TOKENIZERS = {kind: train_tokenizer(kind, TEXTS, 400) for kind in ("char", "bpe")}
TRICKY = [
    "",
    "\0",
    "\n\n  \t x",
    "\r\n",
    "e\u0301",
    "\ufeffa",
    "😀👩‍👩‍👧",
    "\U0010ffff",
    "<|endoftext|>",
    " ' 's  _1²",
    "\x85\x1c",
]
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@pytest.fixture(params=["char", "bpe"])
def tokenizer(request):
    return TOKENIZERS[request.param]


@pytest.mark.parametrize("kind", ["char", "bpe"])
@settings(deadline=None, max_examples=200)
@given(text=any_text)
def test_random_text_round_trips(kind, text):
    """Fault 16: text does not survive a round trip, and bytes not seen before are dropped."""
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.eos_id not in ids


@pytest.mark.parametrize("text", [*TRICKY, *TEXTS])
def test_special_text_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_unseen_characters_are_encoded_as_bytes():
    """Fault 16: a character that was not in the training text is an error."""
    tokenizer = TOKENIZERS["char"]
    assert tokenizer.encode("Ω").tolist() == [byte + 1 for byte in "Ω".encode()]
    assert tokenizer.encode("a漢Ω😀é").size == 1 + 1 + 2 + 4 + 1


def test_char_vocabulary_keeps_the_most_frequent_characters():
    text = "ééé" + "üüüü" + "ßß"
    assert train_tokenizer("char", [text]).chars == "éü"
    assert train_tokenizer("char", [text], 258).chars == "ü"
    assert train_tokenizer("char", [], 257).vocab_size == 257


def test_bpe_merges_repeated_pairs_up_to_its_size():
    text = "hello world " * 50
    assert train_tokenizer("bpe", [text], 257).encode("hello").size == 5
    tokenizer = train_tokenizer("bpe", [text], 300)
    assert tokenizer.encode("hello").size == 1 and tokenizer.vocab_size <= 300
    assert TOKENIZERS["bpe"].vocab_size <= 400


def test_bpe_merges_match_hugging_face():
    merges = [["a", "b"], ["b", "c"], ["ab", "c"], ["a", "bc"]]  # two ways to spell "abc": one id
    id_of = {"a": 98, "b": 99, "c": 100, "ab": 257, "bc": 258, "abc": 259}
    tokenizer = BPETokenizer(tuple((id_of[left], id_of[right]) for left, right in merges))
    assert tokenizer.vocab_size == 260
    assert [tokenizer.encode(word).tolist() for word in ("abc", "bc", "cab")] == [[259], [258], [100, 257]]


def test_end_of_document_text_is_encoded_as_plain_text(tokenizer):
    for text in ("<|endoftext|>", "a<|endoftext|>b"):
        assert tokenizer.eos_id not in tokenizer.encode(text)
    many = train_tokenizer(tokenizer.kind, ["<|endoftext|>" * 100], 400)
    assert many.eos_id not in many.encode("<|endoftext|>" * 3)


def test_end_of_document_decodes_to_empty_text(tokenizer):
    ids = [*tokenizer.encode("a").tolist(), tokenizer.eos_id, *tokenizer.encode("b").tolist()]
    assert tokenizer.decode(ids) == "ab"


def test_valid_ids_decode_and_others_raise(tokenizer):
    ids = np.arange(tokenizer.vocab_size)
    assert isinstance(tokenizer.decode(ids), str)
    assert tokenizer.decode(jnp.asarray(ids)) == tokenizer.decode(ids.tolist())
    for bad in (-1, tokenizer.vocab_size, 10**9):
        with pytest.raises(ValueError, match=f"token id is {bad}; allowed"):
            tokenizer.decode([5, bad])
    for bad in ([0.5], [[1, 2]], ["a"]):
        with pytest.raises(ValueError, match="1-D array of integers"):
            tokenizer.decode(bad)
    assert tokenizer.decode([]) == "" and tokenizer.decode_bytes(np.array([], np.int32)) == b""


def test_partial_characters_decode_byte_by_byte(tokenizer):
    ids = [byte + 1 for byte in "😀".encode()]
    assert tokenizer.decode(ids[:2]) == "\ufffd"
    assert b"".join(tokenizer.decode_bytes([i]) for i in ids).decode() == "😀"


# Words without end: DNA, base64, scripts without spaces, minified programs, one letter


def without_spaces(kind: str, length: int) -> str:
    alphabets = {
        "dna": "ACGT",
        "base64": "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/",
        "chinese": "".join(map(chr, range(0x4E00, 0x5600))),
        "digits": "0123456789",
        "one letter": "a",
        "one sign": "-",
        "one space": " ",
    }
    return "".join(random.Random(0).choices(alphabets[kind], k=length))


def char_class(char: str) -> str:
    if char.isspace():
        return "space"
    return "letter" if re.match(r"[^\W\d_]", char) else "digit" if re.match(r"\d", char) else "sign"


@pytest.mark.parametrize("kind", ["dna", "base64", "chinese", "digits", "one letter", "one sign", "one space"])
@pytest.mark.sampled(2)
def test_cost_of_text_without_spaces_is_linear(kind):
    """200 kB of DNA took 22 s, 3 MB of one letter more than 270 s. Processor time, so other programs do not count."""
    text = without_spaces(kind, 400_000 if kind.startswith("one") else 200_000)
    start = time.process_time()
    tokenizer = train_tokenizer("bpe", [text], 2048)
    ids = tokenizer.encode(text)
    assert time.process_time() - start < 4
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("kind", ["dna", "base64", "chinese", "digits", "one letter", "one sign"])
def test_long_words_are_encoded_in_the_parts_that_training_saw(kind):
    text = without_spaces(kind, 3 * MAX_WORD + 17)
    tokenizer = train_tokenizer("bpe", [text * 3], 400)
    runs = ["".join(run) for _, run in itertools.groupby(text, char_class)]
    parts = [run[i : i + MAX_WORD] for run in runs for i in range(0, len(run), MAX_WORD)]
    want = np.concatenate([tokenizer.encode(part) for part in parts])
    assert np.array_equal(tokenizer.encode(text), want)
    assert tokenizer.decode(tokenizer.encode(" " + text)) == " " + text
    assert len(tokenizer.decode(tokenizer.encode("x" * 10**5))) == 10**5


def test_training_cuts_words_where_encoding_does():
    """A pair that only exists across a cut is no merge: the two letters meet at the cut alone."""
    text = (("a" * (MAX_WORD - 1) + "x") + ("y" + "b" * (MAX_WORD - 1))) * 9
    tokenizer = train_tokenizer("bpe", [text], 2000)
    assert b"xy" not in b"|".join(tokenizer._tokens)
    assert tokenizer.encode("xy").size == 2 and tokenizer.decode(tokenizer.encode(text)) == text


def test_ordinary_text_is_tokenized_as_before(monkeypatch):
    text = [*TEXTS, "-" * 79 + "\n" + " " * 60 + "x = 'it''s'\n" + "#" * 110 + "é" * 100]
    cut = train_tokenizer("bpe", text, 500)
    monkeypatch.setattr(tokenizers, "MAX_WORD", None)
    whole = train_tokenizer("bpe", text, 500)
    assert cut.merges == whole.merges and cut.fingerprint == whole.fingerprint
    assert all(np.array_equal(cut.encode(part), whole.encode(part)) for part in [*text, *TRICKY])


long_runs = st.lists(st.tuples(st.sampled_from("aé漢1_-' \n\t's"), st.integers(1, 40)), max_size=8).map(
    lambda runs: "".join(char * count for char, count in runs)
)


@pytest.mark.parametrize("max_word", [None, 1, 2, 7])
@settings(deadline=None, max_examples=100)
@given(text=st.one_of(any_text, long_runs), size=st.integers(1, 20))
def test_parts_of_a_text_have_the_ids_of_the_whole(max_word, text, size):
    bpe = BPETokenizer(TOKENIZERS["bpe"].merges, max_word)
    for tokenizer in (bpe, TOKENIZERS["char"]):
        parts = list(split_text(text, size))
        assert "".join(parts) == text and all(len(part) >= size for part in parts[:-1])
        ids = [i for part in parts for i in tokenizer.encode(part).tolist()]
        assert ids == tokenizer.encode(text).tolist() and tokenizer.decode(ids) == text


@settings(deadline=None, max_examples=100)
@given(text=long_runs, max_word=st.integers(1, 9))
def test_words_are_cut_at_the_limit(text, max_word):
    """Against the words of the pattern without a limit: every end of theirs is one, and only longer ones are cut."""
    words = tokenizers._word_pattern(max_word).findall(text)
    assert "".join(words) == text
    assert all(len(word.removeprefix(" ") or word) <= max(max_word, 3) for word in words)
    whole = tokenizers._word_pattern(None).findall(text)
    if max(map(len, whole), default=0) <= max_word:
        assert words == whole
    if "'" not in text:  # elsewhere a cut may begin a word with 's
        ends = [set(itertools.accumulate(map(len, parts))) for parts in (words, whole)]
        assert ends[0] >= ends[1]


def test_tokenizer_of_an_earlier_version_encodes_words_as_a_whole(tmp_path):
    """Its file, written by that version, has no limit."""
    record = {"format": 1, "kind": "bpe", "merges": [[98, 98], [257, 257]], "fingerprint": "1f05c357b50b7365"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(record))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.max_word is None and tokenizer.encode("a" * 398).tolist() == [258] * 99 + [257]
    assert BPETokenizer(tokenizer.merges, 3).encode("a" * 6).tolist() == [257, 98] * 2
    tokenizer.save(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "tokenizer.json").read_text()) == record


def test_limit_of_words_is_saved_and_checked(tmp_path):
    path = BPETokenizer(((98, 98),), 3).save(tmp_path)
    assert load_tokenizer(tmp_path) == BPETokenizer(((98, 98),), 3)
    record = json.loads(path.read_text())
    for bad in (0, -1, 1.5, True, "3", [3]):
        path.write_text(json.dumps({**record, "max_word": bad}))
        with pytest.raises(ValueError, match=r"tokenizer\.json is damaged.*max_word is .*; allowed: 1 or more"):
            load_tokenizer(tmp_path)


def test_lone_surrogate_raises(tokenizer):
    with pytest.raises(ValueError, match=r"U\+D800 at index 2"):
        tokenizer.encode("ab\ud800c")
    with pytest.raises(ValueError, match="lone surrogate"):
        train_tokenizer(tokenizer.kind, ["\udfff"])


def test_invalid_options_raise():
    with pytest.raises(ValueError, match="tokenizer is 'word'; allowed: char, bpe"):
        train_tokenizer("word", TEXTS)
    with pytest.raises(ValueError, match="at least 257"):
        train_tokenizer("bpe", TEXTS, 256)
    with pytest.raises(ValueError, match="allowed: two of the ids"):
        BPETokenizer(((1, 257),))
    for chars in ("b", "üé", "éé"):
        with pytest.raises(ValueError, match="distinct non-ASCII"):
            CharTokenizer(chars)


def test_saved_tokenizer_loads_identically(tokenizer, tmp_path):
    path = tokenizer.save(tmp_path / "new" / "folder")
    loaded = load_tokenizer(path.parent)
    assert loaded == tokenizer and loaded.fingerprint == tokenizer.fingerprint
    assert loaded.encode("the 漢 😀").tolist() == tokenizer.encode("the 漢 😀").tolist()
    assert [file.name for file in path.parent.iterdir()] == ["tokenizer.json"]


def test_fingerprint_depends_on_content():
    assert TOKENIZERS["char"].fingerprint != TOKENIZERS["bpe"].fingerprint
    assert CharTokenizer("é").fingerprint != CharTokenizer("ü").fingerprint
    assert CharTokenizer("").fingerprint != BPETokenizer(()).fingerprint


def test_missing_or_damaged_file_raises_one_line(tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        load_tokenizer(tmp_path)
    path = tokenizer.save(tmp_path)
    whole = path.read_text()
    record = json.loads(whole)
    changed = {"chars": "é"} if tokenizer.kind == "char" else {"merges": record.get("merges", [])[:-1]}
    damaged = [whole[:40], "", "[]", "{}", "null", '"a"', json.dumps({**record, "kind": "word"})]
    damaged += [json.dumps({**record, **changed}), json.dumps({**record, "merges": [[1, None]], "chars": 3})]
    damaged += [json.dumps({**record, "format": 99})]
    for text in damaged:
        path.write_text(text)
        with pytest.raises(ValueError, match=r"tokenizer\.json is damaged") as error:
            load_tokenizer(tmp_path)
        assert "\n" not in str(error.value)


def test_training_is_deterministic_across_processes_and_threads(tokenizer):
    code = (
        "import sys, json; from dantinox.data.tokenizer import train_tokenizer as t; "
        "print(t(sys.argv[1], json.loads(sys.argv[2]), 400).fingerprint)"
    )
    env = {"PYTHONPATH": ":".join(sys.path), "RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "7"}
    run = [sys.executable, "-c", code, tokenizer.kind, json.dumps(TEXTS)]
    assert subprocess.run(run, env=env, capture_output=True, text=True).stdout.strip() == tokenizer.fingerprint
