"""Both tokenizers round-trip any text exactly and reject what they cannot encode."""

import json
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dantinox.data.tokenizer import BPETokenizer, CharTokenizer, load_tokenizer, train_tokenizer

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
