"""Examples to fine-tune on: what is learned, splits, packing, and errors that name the line."""

import gzip
import json
import re

import numpy as np
import pytest
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers

from dantinox.data.chat_template import chat_format
from dantinox.data.examples import Record, load_examples, make_example, read_records
from dantinox.data.hf_tokenizer import load_hf_tokenizer
from dantinox.data.tokenizer import train_tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% if m.role == 'assistant' %}<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<s>", "</s>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]


def chat(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]


def make_tokenizer(folder, template=TEMPLATE):
    """A byte-level tokenizer without merges, with special tokens and a template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    library = Library(models.BPE(vocab, []))
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    library.add_special_tokens(SPECIAL)
    folder.mkdir(exist_ok=True)
    library.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>"} | ({"chat_template": template} if template else {})
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}), "utf-8")
    return load_hf_tokenizer(folder)


@pytest.fixture
def tokenizer(tmp_path):
    return make_tokenizer(tmp_path / "tokenizer")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def learned_text(example, tokenizer):
    return tokenizer.library.decode(example.ids[example.learned].tolist(), skip_special_tokens=False)


def test_answers_alone_are_learned_up_to_the_end_of_their_turn(tokenizer):
    record = Record("x", chat("2 + 2?", "4", "sure?", "Yes, è 4."))
    example = make_example(record, tokenizer, chat_format(tokenizer))
    whole = "<s><|user|>2 + 2?<|assistant|>4<|end|><|user|>sure?<|assistant|>Yes, è 4.<|end|>"
    np.testing.assert_array_equal(example.ids, tokenizer.encode(whole))
    assert learned_text(example, tokenizer) == "4<|end|>Yes, è 4.<|end|>"


def test_answer_without_an_end_gets_the_end_of_document(tmp_path):
    tokenizer = make_tokenizer(tmp_path / "t", TEMPLATE.replace("<|end|>", ""))
    example = make_example(Record("x", chat("a", "b")), tokenizer, chat_format(tokenizer))
    assert learned_text(example, tokenizer) == "b</s>"
    char = train_tokenizer("char", "abc")
    example = make_example(Record("x", chat("a", "b")), char, chat_format(char))
    assert char.decode(example.ids) == "a\nb\n" and example.ids[-1] == char.eos_id
    assert char.decode(example.ids[example.learned]) == "b\n"


def test_all_of_a_text_is_learned(tokenizer):
    example = make_example(Record("x", "ab"), tokenizer, chat_format(tokenizer))
    assert learned_text(example, tokenizer).endswith("ab</s>") and example.learned.all()


def test_template_that_rewrites_earlier_messages_is_refused(tmp_path):
    template = "{% for m in messages %}{% if loop.last or m.role == 'user' %}[{{ m.content }}]{% endif %}{% endfor %}"
    tokenizer = make_tokenizer(tmp_path / "t", template)
    with pytest.raises(ValueError, match=r"^a\.jsonl: line 3: the chat template writes earlier messages"):
        make_example(Record("a.jsonl: line 3", chat("a", "b", "c", "d")), tokenizer, chat_format(tokenizer))


def test_examples_are_split_and_packed(tokenizer, tmp_path):
    rows = [{"messages": chat(f"question {n}", f"answer {n}" * (n % 5 + 1))} for n in range(40)]
    data = write(tmp_path / "a.jsonl", [*rows, rows[3]])
    corpus = load_examples(data, tokenizer, val_fraction=0.2, seq_len=160)
    assert (corpus.stats.train_docs, corpus.stats.val_docs) == (32, 8)
    for part, tokens in ((corpus.train, corpus.stats.train_tokens), (corpus.val, corpus.stats.val_tokens)):
        assert part.inputs.shape[1] == 160 and (part.targets >= 0).sum() == tokens
    assert len(corpus.train.inputs) < 32, "examples share rows"
    again = load_examples(data, tokenizer, val_fraction=0.2, seq_len=99)
    other = load_examples(data, tokenizer, val_fraction=0.1, seq_len=99)
    assert again.content_id == corpus.content_id != other.content_id
    texts = [tokenizer.decode(part.targets[part.targets >= 0]) for part in (corpus.train, corpus.val)]
    train, val = (re.findall(r"answer (\d+)", text) for text in texts)
    assert set(train) | set(val) == {str(n) for n in range(40)} and not set(train) & set(val)
    assert len(set(val)) == 8


def test_compressed_files_and_parquet_hold_the_same_examples(tmp_path):
    rows = [{"messages": chat("q", f"a{n}")} for n in range(3)] + [{"text": "plain"}]
    plain = [record.content for record in read_records(write(tmp_path / "a.jsonl", rows))]
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    assert [record.content for record in read_records(str(tmp_path / "b.jsonl.gz"))] == plain
    assert plain[:3] == [row["messages"] for row in rows[:3]] and plain[3] == "plain"
    pa = pytest.importorskip("pyarrow")
    table = [{"messages": None, "text": None} | row for row in rows]
    pytest.importorskip("pyarrow.parquet").write_table(pa.Table.from_pylist(table), tmp_path / "c.parquet")
    assert [record.content for record in read_records(str(tmp_path / "c.parquet"))] == plain


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2 is not JSON"),
        ("[]", "line 2 has no field messages or text"),
        ('{"prompt": "a"}', "line 2 has no field messages or text"),
        ('{"text": 1}', "line 2: text is int; allowed: a string"),
        ('{"messages": []}', r"line 2: messages is \[\]; allowed: a list"),
        ('{"messages": [{"role": "user"}]}', "line 2: message 1 has no content of text"),
        ('{"messages": [{"role": "bot", "content": "x"}]}', "line 2: message 1 has role 'bot'; allowed: system, user"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "line 2 has no answer"),
    ],
)
def test_damaged_line_is_named(line, said, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n", "utf-8")
    with pytest.raises(ValueError, match=rf"^a\.jsonl: {said}"):
        list(read_records(str(tmp_path / "a.jsonl")))


def test_what_holds_no_examples_is_named(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("text", "utf-8")
    with pytest.raises(ValueError, match=r"no examples in .*a\.txt; allowed: \.jsonl or \.parquet files"):
        list(read_records(str(tmp_path / "a.txt")))
    one = write(tmp_path / "a.jsonl", [{"text": "x"}] * 3)
    with pytest.raises(ValueError, match=r"has 1 distinct example\(s\); allowed: 2 or more"):
        load_examples(one, tokenizer, val_fraction=0.1, seq_len=8)
