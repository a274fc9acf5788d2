"""A chat: messages, the chat template that makes a text of them, and the conversation that holds this text."""

import itertools
from collections.abc import Callable, Iterator

from dantinox.data.chat_template import Message, chat_format, render
from dantinox.data.tokenizer_protocol import Tokenizer
from dantinox.inference.conversation import Conversation
from dantinox.inference.detokenizer import IncrementalDetokenizer
from dantinox.inference.sampling import Sampling
from dantinox.model.transformer import Transformer


class Chat:
    """A chat with a model.

    Attributes:
        format: how the tokenizer writes chats.
        messages: the messages so far.
        ended: why the last answer ended, as in `Conversation`.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        sampling: Sampling,
        *,
        system: str | None = None,
        seed: int = 0,
        prefill_chunk: int | None = None,
    ) -> None:
        """Start a chat.

        Args:
            model: the model.
            tokenizer: its tokenizer, with the chat template if it has one.
            sampling: how answers are drawn.
            system: the system message; None: none.
            seed: seed of all draws.
            prefill_chunk: tokens per prefill step; None: 2048.
        """
        self.tokenizer, self.system = tokenizer, system
        self.format = chat_format(tokenizer)
        stop_tokens = [i for i in self.format.stop_ids if i < model.config.vocab_size]
        self.conversation = Conversation(
            model, sampling, seed=seed, stop_tokens=stop_tokens, prefill_chunk=prefill_chunk
        )
        self.reset()

    @property
    def ended(self) -> str:
        """Why the last answer ended, as in `Conversation`."""
        return self.conversation.ended

    def reset(self) -> None:
        """Forget all messages but the system message."""
        self.messages: list[Message] = [] if self.system is None else [{"role": "system", "content": self.system}]
        self.text = ""  # what the conversation holds, as the template writes it
        self.conversation.reset()

    def ask(self, message: str, max_new_tokens: int, interrupted: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """Yield the answer to a message of the user, in pieces of complete characters.

        Args:
            message: what the user says.
            max_new_tokens: maximum number of tokens of the answer.
            interrupted: asked again and again; True ends the answer.

        Raises:
            ContextFullError: the message leaves no place for an answer; the chat is as it was.
            ValueError: the template refuses the messages, or the message has a lone surrogate.
        """
        messages = [*self.messages, {"role": "user", "content": message}]
        text = render(self.format.text, messages, self.format.special_tokens)
        chunks = self.conversation.reply(self._new_tokens(text), max_new_tokens, interrupted)
        return self._answer(messages, text, chunks)

    def _answer(self, messages: list[Message], text: str, chunks: Iterator[list[int]]) -> Iterator[str]:
        detokenizer, pieces = IncrementalDetokenizer(self.tokenizer, ""), []
        self.messages, self.text = [*messages, {"role": "assistant", "content": ""}], text
        for ids, is_last in itertools.chain(((ids, False) for ids in chunks), [([], True)]):
            detokenizer.add(ids, is_last)
            piece = detokenizer.pop_ready().removesuffix("\n") if is_last else detokenizer.pop_ready()
            pieces.append(piece)
            answer = "".join(pieces)
            self.messages[-1], self.text = {"role": "assistant", "content": answer}, text + answer
            if piece:
                yield piece

    def _new_tokens(self, text: str) -> list[int]:
        """Return the ids of `text` that are not in the conversation; what differs from it is taken back."""
        held = self.conversation.tokens
        if held and self.text and text.startswith(self.text):
            return self.tokenizer.encode(text[len(self.text) :]).tolist()
        self.text = ""  # until the message is answered
        ids = [*self.format.prefix, *self.tokenizer.encode(text).tolist()]
        pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(held, ids[:-1]))
        self.conversation.keep(sum(1 for _ in pairs))
        return ids[len(self.conversation.tokens) :]
