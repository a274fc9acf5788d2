"""Examples to fine-tune on: chats, whose answers are learned, or texts, from .jsonl or .parquet files.

    {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}
    {"text": "Of a text every token is learned."}

The tokenizer's chat template makes a text of a chat; what it adds for an answer, up to the end of the turn, is learned.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dantinox.data.cache import Corpus, Stats, cross_entropy
from dantinox.data.chat_template import ChatFormat, Message, chat_format, render
from dantinox.data.files import find_files, printable
from dantinox.data.formats import INSTALL, Source, read_chunks
from dantinox.data.packing import Example, PackedRows, pack
from dantinox.data.tokenizer_protocol import Tokenizer

FIELDS = ("messages", "text")
ROLES = ("system", "user", "assistant", "tool")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """One line or row.

    Attributes:
        place: file and line, for messages.
        content: its messages, or its text.
    """

    place: str
    content: list[Message] | str

    @property
    def digest(self) -> bytes:
        """A hash of the content."""
        return hashlib.sha256(json.dumps(self.content, ensure_ascii=False, sort_keys=True).encode()).digest()


def load_examples(data: str, tokenizer: Tokenizer, *, val_fraction: float, seq_len: int) -> Corpus:
    """Read, split, tokenize and pack the examples of some files.

    Args:
        data: a .jsonl or .parquet file, also .gz or .zst, or a folder or glob of them.
        tokenizer: of the ids, with the chat template.
        val_fraction: fraction of the examples held out for validation.
        seq_len: tokens per row.

    Returns:
        The corpus, with rows of examples instead of runs of ids.

    Raises:
        ValueError: a line is no example, or there are fewer than two; the message names file and line.
        FileNotFoundError: no file matches.
    """
    records = {record.digest: record for record in read_records(data)}
    if len(records) < 2:
        raise ValueError(f"{printable(data)} has {len(records)} distinct example(s); allowed: 2 or more")
    num_val = min(max(1, round(val_fraction * len(records))), len(records) - 1)
    held_out = set(sorted(records)[:num_val])
    splits = [[r for d, r in records.items() if (d in held_out) == is_val] for is_val in (False, True)]
    template = chat_format(tokenizer)
    examples = [[make_example(record, tokenizer, template) for record in split] for split in splits]
    (train, cut), (val, val_cut) = (pack(split, seq_len, tokenizer.eos_id) for split in examples)
    if cut + val_cut:
        log.warning("%d example(s) are longer than %d tokens and lost their end", cut + val_cut, seq_len + 1)
    key = [tokenizer.fingerprint, template.text, val_fraction, [digest.hex() for digest in records]]
    content_id = hashlib.sha256(json.dumps(["examples", 1, *key]).encode()).hexdigest()[:32]
    return Corpus(train, val, tokenizer, _stats(splits, train, val, tokenizer), Path(data), content_id)


def read_records(data: str) -> Iterator[Record]:
    """Yield the examples of the .jsonl and .parquet files of `data`, in order.

    Raises:
        ValueError: a line or row is no example; the message names it.
        FileNotFoundError: no file matches.
    """
    sources = [Source.at(name, path) for name, path in find_files(data)]
    sources = [source for source in sources if source.kind != "text"]
    if not sources:
        raise ValueError(f"no examples in {printable(data)}; allowed: .jsonl or .parquet files, .gz or .zst too")
    for source in sources:
        for place, row in _rows(source) if source.kind == "rows" else _lines(source):
            yield Record(place, _content(place, row))


def _lines(source: Source) -> Iterator[tuple[str, Any]]:
    rest, number = b"", 0
    for chunk in read_chunks(source):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            number += 1
            if line.strip():
                yield _parsed(source, number, line)
    if rest.strip():
        yield _parsed(source, number + 1, rest)


def _parsed(source: Source, number: int, line: bytes) -> tuple[str, Any]:
    place = f"{printable(source.name)}: line {number}"
    try:
        return place, json.loads(line)
    except ValueError as error:
        raise ValueError(f"{place} is not JSON ({error})") from None


def _rows(source: Source) -> Iterator[tuple[str, Any]]:
    name = printable(source.name)
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ValueError(f"{name} needs the package pyarrow: {INSTALL}") from None
    try:
        table = pq.ParquetFile(source.path)
        columns = [field for field in FIELDS if field in table.schema_arrow.names]
        rows = (row for batch in table.iter_batches(columns=columns) for row in batch.to_pylist())
        for number, row in enumerate(rows, 1):
            yield f"{name}: row {number}", {field: value for field, value in row.items() if value is not None}
    except pa.ArrowException as error:
        raise ValueError(f"{name} is damaged or no Parquet file: {' '.join(str(error).split())[:200]}") from None


def _content(place: str, row: Any) -> list[Message] | str:
    """Return the messages or the text of a line."""
    if not isinstance(row, dict) or not any(field in row for field in FIELDS):
        raise ValueError(f"{place} has no field {' or '.join(FIELDS)}")
    if "messages" not in row:
        if not isinstance(row["text"], str):
            raise ValueError(f"{place}: text is {type(row['text']).__name__}; allowed: a string")
        return row["text"]
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{place}: messages is {messages!r:.60}; allowed: a list of one message or more")
    for n, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ValueError(f"{place}: message {n} has no content of text")
        if message.get("role") not in ROLES:
            raise ValueError(f"{place}: message {n} has role {message.get('role')!r}; allowed: {', '.join(ROLES)}")
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"{place} has no answer; allowed: one message or more with role 'assistant'")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def make_example(record: Record, tokenizer: Tokenizer, template: ChatFormat) -> Example:
    """Tokenize a record; an answer is encoded by itself, as it is when the model writes it.

    Raises:
        ValueError: the template refuses the messages, or changes earlier ones; the message names the place.
    """
    if isinstance(record.content, str):
        ids = [*tokenizer.prefix, *tokenizer.encode(record.content).tolist(), tokenizer.eos_id]
        return Example(np.array(ids, np.int32), np.ones(len(ids), bool))
    ids, learned = [], []
    for text, is_answer in answer_parts(record, template):
        part = tokenizer.encode(text).tolist()
        ids += part
        learned += [is_answer] * len(part)
        if is_answer and not set(part) & set(template.stop_ids):  # so that answers end
            ids.append(tokenizer.eos_id)
            learned.append(True)
    ids = [*template.prefix, *ids]
    return Example(np.array(ids, np.int32), np.array([False] * len(template.prefix) + learned))


def answer_parts(record: Record, template: ChatFormat) -> list[tuple[str, bool]]:
    """Return the text of a chat in parts, each with whether it is an answer."""
    messages: Sequence[Message] = record.content  # type: ignore[assignment]
    try:
        whole = render(template.text, messages, template.special_tokens, add_generation_prompt=False)
        parts, done = [], 0
        for n, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            question = render(template.text, messages[:n], template.special_tokens) if n else ""
            answered = render(template.text, messages[: n + 1], template.special_tokens, add_generation_prompt=False)
            if not (whole.startswith(answered) and answered.startswith(question)) or len(question) < done:
                raise ValueError("the chat template writes earlier messages in another way when others follow")
            parts += [(whole[done : len(question)], False), (whole[len(question) : len(answered)], True)]
            done = len(answered)
    except ValueError as error:
        raise ValueError(f"{record.place}: {error}") from None
    return [(text, is_answer) for text, is_answer in [*parts, (whole[done:], False)] if text]


def _stats(splits: list[list[Record]], train: PackedRows, val: PackedRows, tokenizer: Tokenizer) -> Stats:
    """Return the statistics; tokens are those with a loss."""
    counts = [np.bincount(x.targets[x.targets >= 0], minlength=tokenizer.vocab_size) for x in (train, val)]
    sizes = [len(tokenizer.decode_bytes(x.targets[x.targets >= 0])) for x in (train, val)]
    num_train, num_val = (int(count.sum()) for count in counts)
    return Stats(
        train_docs=len(splits[0]),
        val_docs=len(splits[1]),
        train_bytes=sizes[0],
        val_bytes=sizes[1],
        train_tokens=num_train,
        val_tokens=num_val,
        unigram_entropy=cross_entropy(*counts),
        bytes_per_token=sizes[1] / num_val,
    )
