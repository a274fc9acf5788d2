"""The tokenizer of a folder of Hugging Face."""

from pathlib import Path

from dantinox.data.tokenizer import FILE_NAME, load_tokenizer
from dantinox.data.tokenizer_protocol import Tokenizer

OWN_FOLDER = "dantinox"
"""Where an exported folder has the tokenizer in the format of DantinoX."""


def find_tokenizer(path: Path) -> Tokenizer | None:
    """Return the tokenizer of a folder or of a tokenizer.json; None if there is none.

    Raises:
        ValueError: a file is damaged, or the tokenizer is in a format that is not supported.
    """
    for place in (path, path / FILE_NAME, path / OWN_FOLDER / FILE_NAME):
        if place.is_file():
            return load_tokenizer(place)
    if (path / "tokenizer.model").is_file():
        raise ValueError(f"{path} has tokenizer.model but no {FILE_NAME}, which transformers writes: save_pretrained")
    return None
