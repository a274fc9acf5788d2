"""Text from token ids as they arrive: whole characters, stop strings."""

import codecs
from collections.abc import Sequence

from dantinox.data.tokenizer import Tokenizer


class Text:
    """One text as it grows.

    Attributes:
        tokens: ids taken so far, those that made a stop string included.
        done: it has come to its end; more ids are dropped.
    """

    def __init__(self, tokenizer: Tokenizer, head: str, stops: Sequence[str] = ()) -> None:
        """`head` is shown before the text; the first of `stops` to be complete ends the text and is not shown."""
        self.tokenizer, self.stops = tokenizer, stops
        self.bytes = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.ready = head
        self.held = ""  # may become a stop string
        self.tokens, self.done = 0, False

    def add(self, ids: Sequence[int], done: bool = False) -> None:
        """More token ids; the last ones if `done`."""
        if self.done:
            return
        self.tokens += len(ids)
        self.held += self.bytes.decode(self.tokenizer.decode_bytes(ids), final=done)
        found = [(at + len(stop), at) for stop in self.stops if (at := self.held.find(stop)) >= 0]
        if found:
            self.ready, self.held, done = self.ready + self.held[: min(found)[1]], "", True
        keep = 0 if done else max((_overlap(self.held, stop) for stop in self.stops), default=0)
        cut = len(self.held) - keep
        self.ready, self.held = self.ready + self.held[:cut], self.held[cut:]
        if done:
            self.ready, self.done = self.ready + "\n", True

    def take(self) -> str:
        """What can be shown and was not yet."""
        ready, self.ready = self.ready, ""
        return ready


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins, without being whole."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
