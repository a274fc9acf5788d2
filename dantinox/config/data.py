"""Settings of the training text."""

from dataclasses import dataclass
from typing import Literal

from dantinox.config.validation import check, check_fields


@dataclass(frozen=True)
class DataConfig:
    """Settings of the training text."""

    data: str = "stdlib"
    """A text, .jsonl or .parquet file, also .gz or .zst; a folder or glob of them; a folder with train.bin and val.bin;
    or stdlib (the source of the Python standard library)."""
    tokenizer: str = "char"
    """char or bpe (byte-level), trained on the training split; or the path of a tokenizer.json or of its folder."""
    data_format: Literal["text", "examples"] = "text"
    """text: documents in a row; examples: each line of .jsonl and row of .parquet is an example of its own, a chat
    (messages, of which the answers are learned) or a text."""
    bpe_vocab_size: int = 2048
    """Vocabulary size of the BPE tokenizer."""
    val_fraction: float = 0.1
    """Fraction of the text held out for validation."""

    def __post_init__(self) -> None:
        check_fields(self)
        check(self.data != "", "data is empty; give a file, a folder, a glob or stdlib")
        check(self.tokenizer != "", "tokenizer is empty; allowed: char, bpe, or a tokenizer.json or its folder")
        check(
            300 <= self.bpe_vocab_size <= 1_000_000,
            f"bpe_vocab_size is {self.bpe_vocab_size}; allowed: 300 to 1000000 (256 bytes, one special token, merges)",
        )
        check(
            0 < self.val_fraction < 1,
            f"val_fraction is {self.val_fraction}; allowed: between 0 and 1, exclusive",
        )

    @property
    def arrays_per_batch(self) -> int:
        """Inputs and targets, and with examples their segments."""
        return 3 if self.has_segments else 2

    @property
    def has_segments(self) -> bool:
        """Whether batches have a third array: which example each token belongs to."""
        return self.data_format == "examples"
