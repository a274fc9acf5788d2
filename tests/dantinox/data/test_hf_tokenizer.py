"""Tokenizers of Hugging Face have the ids and texts of the `tokenizers` library, and ours export to it."""

import json
import random
import unicodedata

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from dantinox.data.corpus import load_corpus
from dantinox.data.hf_tokenizer import HFTokenizer
from dantinox.data.hf_tokenizer_export import to_hf_tokenizer
from dantinox.data.tokenizer import load_tokenizer, train_tokenizer
from dantinox.data.tokenizer_protocol import prompt_ids
from dantinox.inference.detokenizer import IncrementalDetokenizer
from tests.dantinox.data.test_tokenizer import TEXTS, TRICKY

CHATTY = "<|im_start|>user\nthe cat, isn't it?<|im_end|> </s> é漢字😀 <think>  two \n\n"


def byte_level() -> Tokenizer:
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    special, alphabet = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=350, special_tokens=special, initial_alphabet=alphabet)
    library.train_from_iterator(TEXTS, trainer)
    library.add_tokens(["<think>"])
    return library


def byte_fallback() -> Tokenizer:
    """As SentencePiece makes for Llama: a space before the first word, and bytes for unknown characters."""
    special = ["<unk>", "<s>", "</s>"]
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *"▁thecaso. ", "th", "▁th", "▁the"]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    merges = [("t", "h"), ("▁", "th"), ("▁th", "e")]
    library = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    library.add_special_tokens(special)
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return library


def unigram() -> Tokenizer:
    library = Tokenizer(models.Unigram())
    library.pre_tokenizer, library.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    library.train_from_iterator(
        TEXTS, trainers.UnigramTrainer(vocab_size=80, special_tokens=special, unk_token="<unk>")
    )
    return library


def word_piece() -> Tokenizer:
    library = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    library.normalizer, library.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece()
    special = ["[UNK]", "[CLS]", "[SEP]"]
    library.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=120, special_tokens=special))
    library.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return library


KINDS = {kind.__name__: kind for kind in (byte_level, byte_fallback, unigram, word_piece)}
PREFIX = {"byte_level": (), "byte_fallback": (1,), "unigram": (), "word_piece": (1,)}


@pytest.fixture(scope="module")
def library_of():
    return {name: make() for name, make in KINDS.items()}


@pytest.fixture(params=KINDS)
def pair(request, library_of, tmp_path):
    """(tokenizer of the library, ours)."""
    library_of[request.param].save(str(tmp_path / "tokenizer.json"))
    return library_of[request.param], load_tokenizer(tmp_path)


def test_ids_and_texts_are_those_of_the_library(pair):
    library, tokenizer = pair
    for text in [*TRICKY, *TEXTS, CHATTY]:
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32 and ids.tolist() == library.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == library.decode(ids.tolist())
        assert ids.size == 0 or ids.max() < tokenizer.vocab_size


def test_ids_decoded_one_by_one_join_to_the_text(pair):
    library, tokenizer = pair
    for text in [*TRICKY, CHATTY, "the cat 漢字 sat"]:
        ids, detokenizer = tokenizer.encode(text).tolist(), IncrementalDetokenizer(tokenizer, "")
        for i in ids:
            detokenizer.add([i])
        detokenizer.add([], done=True)
        # A space before the first word belongs to the text if another text comes before.
        assert detokenizer.pop_ready()[:-1] in (library.decode(ids), " " + library.decode(ids))


@pytest.mark.parametrize("name", KINDS)
def test_beginning_and_end_of_a_document(name, library_of, tmp_path):
    library_of[name].save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.prefix == PREFIX[name] and tokenizer.eos_id == (0 if name == "byte_level" else 2)
    assert prompt_ids(tokenizer, "the") == [*PREFIX[name], *tokenizer.encode("the")]
    assert prompt_ids(tokenizer, "") == ([*PREFIX[name]] or [tokenizer.eos_id])


def test_special_tokens_come_from_the_files_beside_it(library_of, tmp_path):
    library_of["byte_level"].save(str(tmp_path / "tokenizer.json"))

    def write(name, content):
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")

    write("special_tokens_map.json", {"eos_token": "<|endoftext|>", "bos_token": {"content": "<|im_start|>"}})
    plain = load_tokenizer(tmp_path)
    assert (plain.stop_ids, plain.prefix, plain.chat_template) == ((0,), (), None)
    assert plain.special_tokens == {"eos_token": "<|endoftext|>", "bos_token": "<|im_start|>"}
    size = library_of["byte_level"].get_vocab_size()
    added = {str(size): {"content": "<|more|>", "special": True}}
    write("tokenizer_config.json", {"eos_token": "<|im_end|>", "chat_template": "a", "added_tokens_decoder": added})
    write("generation_config.json", {"eos_token_id": [2, 0]})
    write("config.json", {"eos_token_id": 9})
    chat = load_tokenizer(tmp_path)
    assert (chat.stop_ids, chat.chat_template) == ((2, 0), "a") and chat.fingerprint != plain.fingerprint
    assert chat.encode("<|more|>").tolist() == [size] and plain.encode("<|more|>").size > 1
    write("chat_template.jinja", "{{ 'é' }}")
    write("generation_config.json", {})
    write("tokenizer_config.json", {"eos_token": "<|im_end|>", "add_bos_token": True, "chat_template": "a"})
    newer = load_tokenizer(tmp_path)
    assert (newer.stop_ids, newer.prefix, newer.chat_template) == ((2, 9), (1,), "{{ 'é' }}")
    newer.save(tmp_path / "copy")
    copy = load_tokenizer(tmp_path / "copy" / "tokenizer.json")
    assert (copy.stop_ids, copy.prefix, copy.chat_template) == ((2, 9), (1,), "{{ 'é' }}")
    assert copy.fingerprint == newer.fingerprint


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer.json": "{"}, "tokenizer.json is damaged or not a tokenizer: "),
        ({"tokenizer.json": "[]"}, "tokenizer.json is damaged or not a DantinoX tokenizer"),
        ({"tokenizer.json": '{"model": 3}'}, "tokenizer.json is damaged or not a tokenizer of Hugging Face"),
        ({"tokenizer_config.json": "{"}, "tokenizer_config.json is damaged: expected a JSON object"),
        (
            {"tokenizer_config.json": '{"eos_token": "<none>"}'},
            "no token ends a document: eos_token '<none>' is not in",
        ),
        (
            {"tokenizer_config.json": '{"added_tokens_decoder": {"x": 1}}'},
            "is damaged: added_tokens_decoder: ValueError",
        ),
        (
            {"tokenizer_config.json": '{"added_tokens_decoder": {"999": {}}}'},
            "is damaged: added_tokens_decoder: KeyError",
        ),
        (
            {"tokenizer_config.json": '{"added_tokens_decoder": [1]}'},
            "is damaged: added_tokens_decoder: AttributeError",
        ),
        ({"chat_template.jinja": b"\xe9"}, "chat_template.jinja is damaged: byte 0 is not UTF-8"),
    ],
)
def test_damaged_files_are_named_in_one_line(files, message, library_of, tmp_path):
    library_of["byte_level"].save(str(tmp_path / "tokenizer.json"))
    for name, content in files.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.model alone is not supported"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="tokenizer is 'bep'; allowed: char, bpe, or a "):
        load_corpus("stdlib", tokenizer="bep")


def test_corpus_is_encoded_document_by_document(library_of, tmp_path, monkeypatch):
    """With a space before the first word, the ids of parts are not those of the whole."""
    monkeypatch.setattr("dantinox.data.tokenizer.PIECE", 10)
    library, texts = library_of["byte_fallback"], ["the cat sat on the mat. " * 9, "so  the end\n\n" * 9]
    library.save(str(tmp_path / "tokenizer.json"))
    for i, text in enumerate([*texts, "the last"]):
        (tmp_path / f"{i}.txt").write_text(text, "utf-8")
    corpus = load_corpus(tmp_path / "*.txt", tokenizer=str(tmp_path), val_fraction=0.02, cache_dir=tmp_path / "cache")
    want = [i for text in texts for i in [*library.encode(text).ids, 2]]
    assert corpus.train.tolist() == want and corpus.stats.train_tokens == len(want)
    again = load_corpus(
        tmp_path / "*.txt", tokenizer=str(tmp_path / "tokenizer.json"), val_fraction=0.02, cache_dir=tmp_path / "cache"
    )
    assert again.path == corpus.path and again.tokenizer.fingerprint == corpus.tokenizer.fingerprint


# --- export ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "size"), [("char", 400), ("bpe", 400), ("bpe", 2000)])
def test_exported_tokenizers_give_our_ids(kind, size, tmp_path):
    random_texts, draw = [], random.Random(0)
    for _ in range(500):
        codepoints = (draw.randrange(draw.choice([0x80, 0x300, 0x3000, 0xD800])) for _ in range(60))
        # A newer Unicode may know more characters than this Python.
        random_texts.append("".join(c for c in map(chr, codepoints) if unicodedata.category(c) != "Cn"))
    with open(random.__file__, encoding="utf-8") as file:
        source = file.read()
    tokenizer = train_tokenizer(kind, [*TEXTS, source[: len(source) // 2]], size)
    to_hf_tokenizer(tokenizer).save(tmp_path)
    library, exported = Tokenizer.from_file(str(tmp_path / "tokenizer.json")), load_tokenizer(tmp_path)
    assert isinstance(exported, HFTokenizer) and exported.vocab_size == tokenizer.vocab_size
    odd = ["<0x80> <0x41>", "a" * 500, "½ⅷ٣ ‿_ a\u0300b \u2028x İŉﬁ", "\x1c\x1d  \x1e\x1fx  y", "é" * 300]
    for text in [*(text for text in TRICKY if text != "<|endoftext|>"), *odd, *random_texts, *TEXTS, source]:
        ids = tokenizer.encode(text).tolist()
        assert library.encode(text).ids == exported.encode(text).tolist() == ids
        assert library.decode(ids) == text and exported.decode_bytes(ids) == text.encode()
    assert library.encode("<|endoftext|>").ids == [tokenizer.eos_id] == [library.token_to_id("<|endoftext|>")]
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text("utf-8"))
    assert settings["eos_token"] == "<|endoftext|>" and exported.stop_ids == (0,)
