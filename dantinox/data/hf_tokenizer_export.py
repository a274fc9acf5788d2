"""The tokenizers of DantinoX in the format of Hugging Face.

The ids are equal, with two exceptions: the text `<|endoftext|>` is the end of document in the format of Hugging Face,
and characters that are newer than the Unicode of this Python may belong to other words in BPE.
"""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import ByteLevel

from dantinox.data.hf_tokenizer import HFTokenizer
from dantinox.data.tokenizer import BPETokenizer, CharTokenizer
from dantinox.data.tokenizer_protocol import Tokenizer as DantinoXTokenizer

EOS = "<|endoftext|>"


def to_hf_tokenizer(tokenizer: DantinoXTokenizer) -> HFTokenizer:
    """Return a tokenizer in the format of Hugging Face."""
    if isinstance(tokenizer, HFTokenizer):
        return tokenizer
    if isinstance(tokenizer, CharTokenizer):
        library = _char_library(tokenizer)
    elif isinstance(tokenizer, BPETokenizer):
        library = _bpe_library(tokenizer)
    else:
        raise ValueError(f"the tokenizer is of kind {tokenizer.kind!r}; allowed: char, bpe, hf")
    library.add_special_tokens([AddedToken(EOS, special=True, normalized=False)])
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": EOS,
        "eos_token": EOS,
        "clean_up_tokenization_spaces": False,
    }
    return HFTokenizer(library.to_str(), settings, (tokenizer.eos_id,))


def _char_library(tokenizer: CharTokenizer) -> Tokenizer:
    """Return a BPE without merges, which takes characters one by one and others as their bytes."""
    vocab = {EOS: 0, **{chr(byte): byte + 1 for byte in range(128)}}
    vocab |= {f"<0x{byte:02X}>": byte + 1 for byte in range(128, 256)}
    vocab |= {char: i for i, char in enumerate(tokenizer.chars, len(vocab))}
    library = Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    library.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return library


def _bpe_library(tokenizer: BPETokenizer) -> Tokenizer:
    tokens = tokenizer.token_strings
    vocab = {EOS: 0, **{token: i for i, token in enumerate(tokens) if i}}
    library = Tokenizer(models.BPE(vocab, [(tokens[left], tokens[right]) for left, right in tokenizer.merges]))
    words = pre_tokenizers.Split(Regex(_word_pattern(tokenizer.max_word)), "isolated")
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    library.decoder = decoders.ByteLevel()
    library.post_processor = ByteLevel(trim_offsets=False)
    return library


def _word_pattern(max_word: int | None) -> str:
    r"""Return the pattern of a word for the library, whose \w and \s are not those of Python."""
    n = "+" if max_word is None else f"{{1,{max_word}}}"
    space = r"\s\x{1c}-\x{1f}"
    letter, sign = r"[\p{L}\p{Nl}\p{No}]", rf"[^\p{{L}}\p{{N}}{space}]"
    return (
        rf"'(?:s|t|re|ve|m|ll|d)| ?{letter}{n}| ?\d{n}| ?{sign}{n}"
        rf"|[{space}]{n}(?![^{space}])|[{space}]{n}"
    )
