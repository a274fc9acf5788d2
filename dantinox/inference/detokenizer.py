"""Incremental detokenization: text from token ids as they arrive, in complete characters and up to a stop string."""

import codecs
from collections.abc import Sequence

from dantinox.data.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """Decodes the token ids of one text as they arrive.

    Attributes:
        ready: text that `pop_ready` returns next.
        pending: decoded text that may become part of a stop string.
        num_tokens: number of ids decoded so far, those of a stop string included.
        done: whether the text has ended; later ids are dropped.
    """

    def __init__(self, tokenizer: Tokenizer, header: str, stop: Sequence[str] = ()) -> None:
        """Start a text.

        Args:
            tokenizer: decodes the ids.
            header: shown before the text.
            stop: the first of these strings to be complete ends the text; it is not shown.
        """
        self.tokenizer, self.stop = tokenizer, stop
        self.utf8_decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.ready = header
        self.pending = ""
        self.num_tokens, self.done = 0, False

    def add(self, ids: Sequence[int], done: bool = False) -> None:
        """Decode more token ids; `done` marks the last ones."""
        if self.done:
            return
        self.num_tokens += len(ids)
        self.pending += self.utf8_decoder.decode(self.tokenizer.decode_bytes(ids), final=done)
        starts = {stop: self.pending.find(stop) for stop in self.stop}
        matches = [(start + len(stop), start) for stop, start in starts.items() if start >= 0]
        if matches:
            _, start = min(matches)  # the stop string that is complete first
            self.ready, self.pending, done = self.ready + self.pending[:start], "", True
        overlap = 0 if done else max((_stop_prefix_length(self.pending, stop) for stop in self.stop), default=0)
        cut = len(self.pending) - overlap
        self.ready, self.pending = self.ready + self.pending[:cut], self.pending[cut:]
        if done:
            self.ready, self.done = self.ready + "\n", True

    def pop_ready(self) -> str:
        """Return the text that can be shown and was not returned before."""
        ready, self.ready = self.ready, ""
        return ready


def _stop_prefix_length(text: str, stop: str) -> int:
    """Return the length of the longest proper prefix of `stop` that `text` ends with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
