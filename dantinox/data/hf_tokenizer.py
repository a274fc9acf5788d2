"""Tokenizers in the format of Hugging Face: a tokenizer.json of the `tokenizers` library and the files beside it.

tokenizer.json           vocabulary, rules and added tokens
tokenizer_config.json    bos_token, eos_token, chat_template; special_tokens_map.json in older folders
chat_template.jinja      the chat template in newer folders
generation_config.json   the ids that end a text; without it, those of config.json

`encode` gives the ids of the library, which turns the text of an added token, such as `<|im_end|>`, into its id.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from tokenizers import AddedToken
from tokenizers import Tokenizer as Library

from dantinox.data.tokenizer import BYTE_CHARS, FILE_NAME, Ids, check_ids, utf8
from dantinox.system.atomic_io import open_atomic

CONFIG_FILE, MAP_FILE, TEMPLATE_FILE = "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"
GENERATION_FILE, MODEL_FILE = "generation_config.json", "config.json"
USUAL_EOS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
_BYTES = {char: byte for byte, char in BYTE_CHARS.items()}
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, eq=False)
class HFTokenizer:
    """A tokenizer of the `tokenizers` library.

    Special tokens are decoded to nothing, as are ids without a token: models may have more ids than their tokenizer.

    Attributes:
        content: text of tokenizer.json.
        settings: content of tokenizer_config.json, with the chat template.
        stop_ids: ids that end a text, the end of document first.
    """

    content: str
    settings: Mapping[str, Any]
    stop_ids: tuple[int, ...]
    kind: ClassVar[str] = "hf"

    @property
    def eos_id(self) -> int:
        """The id that ends a document."""
        return self.stop_ids[0]

    @property
    def vocab_size(self) -> int:
        """Number of ids, up to the largest one that has a token."""
        return len(self._token_bytes)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of a hash of the content; equal if the ids have the same meaning."""
        record = {name: value for name, value in json.loads(self.content).items() if name not in _WITHOUT_MEANING}
        text = json.dumps([self.kind, record, self.eos_id, self.prefix], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @cached_property
    def library(self) -> Library:
        """The tokenizer of the library, which neither truncates nor pads."""
        library = Library.from_str(self.content)
        library.no_truncation()
        library.no_padding()
        return library

    @cached_property
    def prefix(self) -> tuple[int, ...]:
        """The ids that begin a document, such as the beginning of sequence; often none."""
        plain = self.library.encode("a", add_special_tokens=False).ids
        full = self.library.encode("a").ids
        starts = range(len(full) - len(plain) + 1)
        start = next((i for i in starts if plain and full[i : i + len(plain)] == plain), 0)
        bos = self.token_id("bos_token")
        if bos is not None and isinstance(adds := self.settings.get("add_bos_token"), bool):
            return (bos,) if adds else tuple(i for i in full[:start] if i != bos)
        return tuple(full[:start])

    def token_id(self, name: str) -> int | None:
        """Return the id of a token of the settings, such as "bos_token"; None if there is none."""
        text = self.special_tokens.get(name)
        return None if text is None else self.library.token_to_id(text)

    @cached_property
    def special_tokens(self) -> dict[str, str]:
        """The tokens of the settings, such as eos_token, by name."""
        texts = {name: _text_of(value) for name, value in self.settings.items() if name.endswith("_token")}
        return {name: text for name, text in texts.items() if text is not None}

    @property
    def chat_template(self) -> str | None:
        """The Jinja template of chats; of several the default."""
        template = self.settings.get("chat_template")
        if isinstance(template, list):
            template = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        if isinstance(template, Mapping):
            template = template.get("default")
        return template if isinstance(template, str) else None

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of `text`, int32 [N], without those that begin or end a document.

        Raises:
            ValueError: the text has a lone surrogate.
        """
        utf8(text)
        return np.asarray(self.library.encode_batch_fast([text], add_special_tokens=False)[0].ids, np.int32)

    def decode(self, ids: Ids) -> str:
        """Return the text of `ids` [N] as the library does; bytes that are not UTF-8 become U+FFFD.

        Raises:
            ValueError: an id is negative.
        """
        return self.library.decode(self._known(ids), skip_special_tokens=True)

    def decode_bytes(self, ids: Ids) -> bytes:
        """Return the UTF-8 of `ids` [N], which may end inside a character; a space before the first word stays.

        Raises:
            ValueError: an id is negative.
        """
        return b"".join(self._token_bytes[i] for i in self._known(ids))

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write tokenizer.json and what is beside it to `directory`, and return the path of the former."""
        path = Path(directory) / FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        generation: dict[str, Any] = {"eos_token_id": list(self.stop_ids)}
        if (bos := self.token_id("bos_token")) is not None:
            generation["bos_token_id"] = bos
        for name, content in (
            (CONFIG_FILE, json.dumps(self.settings, indent=2, ensure_ascii=False)),
            (GENERATION_FILE, json.dumps(generation, indent=2)),
            (FILE_NAME, self.content),
        ):
            with open_atomic(path.with_name(name)) as file:
                file.write(content.encode())
        return path

    def _known(self, ids: Ids) -> list[int]:
        largest = self.vocab_size
        return [i for i in check_ids(ids, None).tolist() if i < largest]

    @cached_property
    def _token_bytes(self) -> list[bytes]:
        """The bytes of each token."""
        added = self.library.get_added_tokens_decoder()
        steps = _decoder_steps(json.loads(self.content).get("decoder"))
        vocab = self.library.get_vocab(with_added_tokens=True)
        tokens = [b""] * (max(vocab.values(), default=-1) + 1)
        for text, i in vocab.items():
            if i in added:
                tokens[i] = b"" if added[i].special else added[i].content.encode()
            else:
                tokens[i] = _bytes_of(text, steps) if steps else b" " + text.encode()
        return tokens


def load_hf_tokenizer(folder: str | os.PathLike[str], file_name: str = FILE_NAME) -> HFTokenizer:
    """Load the tokenizer of a folder in the format of Hugging Face.

    Raises:
        FileNotFoundError: there is no tokenizer.json.
        ValueError: a file is damaged, or no token ends a document.
    """
    folder = Path(folder)
    path = folder / file_name
    if not path.is_file():
        raise FileNotFoundError(f"no tokenizer at {path}")
    settings = {**_read_json(folder / MAP_FILE), **_read_json(folder / CONFIG_FILE)}
    if (folder / TEMPLATE_FILE).is_file():
        settings["chat_template"] = _read_text(folder / TEMPLATE_FILE)
    content = _read_text(path)
    try:
        library = Library.from_str(content)
    except Exception as error:  # the library raises nothing more specific
        raise ValueError(f"{path} is damaged or not a tokenizer of Hugging Face: {error}") from None
    try:
        if _add_tokens(library, settings.pop("added_tokens_decoder", None)):
            content = library.to_str()
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG_FILE} is damaged: added_tokens_decoder: {error!r}") from None
    eos = _text_of(settings.get("eos_token"))
    if eos is None:
        eos = next((text for text in USUAL_EOS if library.token_to_id(text) is not None), None)
        settings |= {} if eos is None else {"eos_token": eos}
    eos_id = None if eos is None else library.token_to_id(eos)
    stop_ids = [] if eos_id is None else [eos_id]
    generation = _read_json(folder / GENERATION_FILE) or _read_json(folder / MODEL_FILE)
    given = generation.get("eos_token_id")
    stop_ids += [i for i in (given if isinstance(given, list) else [given]) if type(i) is int and i >= 0]
    if not stop_ids:
        reason = f"eos_token {eos!r} is not in {path}" if eos else f"{folder / CONFIG_FILE} names no eos_token"
        raise ValueError(f"no token ends a document: {reason}")
    tokenizer = HFTokenizer(content, settings, tuple(dict.fromkeys(stop_ids)))
    tokenizer.__dict__["library"] = library  # which takes seconds to read for a large vocabulary
    library.no_truncation()
    library.no_padding()
    return tokenizer


_WITHOUT_MEANING = ("version", "truncation", "padding", "decoder")


def _add_tokens(library: Library, tokens: Any) -> bool:
    """Add the tokens of tokenizer_config.json that tokenizer.json lacks; return whether there are any."""
    count = library.get_vocab_size()
    for i, token in sorted((tokens or {}).items(), key=lambda item: int(item[0])):
        if library.token_to_id(token["content"]) is None and int(i) == library.get_vocab_size():
            options = {name: token[name] for name in ("lstrip", "rstrip", "single_word", "normalized") if name in token}
            added = AddedToken(token["content"], special=token.get("special", False), **options)
            library.add_special_tokens([added]) if added.special else library.add_tokens([added])
    return library.get_vocab_size() > count


def _text_of(token: Any) -> str | None:
    """Return the text of a token of tokenizer_config.json, which may be a table."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) and text else None


def _decoder_steps(decoder: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """Return the decoders that a decoder consists of, in order."""
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [step for inner in decoder["decoders"] for step in _decoder_steps(inner)]
    return [decoder]


def _bytes_of(text: str, steps: list[Mapping[str, Any]]) -> bytes:
    """Return the bytes of a token inside a text, as its decoders make them."""
    for step in steps:
        match step["type"]:
            case "ByteLevel" if all(char in _BYTES for char in text):
                return bytes(_BYTES[char] for char in text)
            case "ByteFallback" if match := _BYTE_TOKEN.fullmatch(text):
                return bytes([int(match[1], 16)])
            case "Replace":
                pattern, content = step["pattern"], step["content"]
                if "String" in pattern:
                    text = text.replace(pattern["String"], content)
                else:
                    text = re.sub(pattern["Regex"], lambda _, content=content: content, text)
            case "Metaspace":
                text = text.replace(step["replacement"], " ")
            case "WordPiece":
                text = text[len(step["prefix"]) :] if text.startswith(step["prefix"]) else f" {text}"
            case "BPEDecoder":
                text = text.replace(step["suffix"], " ")
            case _:  # Fuse and Strip change no token inside a text
                pass
    return text.encode()


def _read_json(path: Path) -> dict[str, Any]:
    """Return the content of a file; {} without the file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(_read_text(path))
    except json.JSONDecodeError:
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: expected a JSON object")
    return content


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged: byte {error.start} is not UTF-8") from None
