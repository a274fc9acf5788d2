"""Chat with a model: `python -m dantinox.chat --run NAME` or `--from DIR`.

Answers are written to stdout while they are generated, everything else to stderr. Without a terminal, each line of
standard input is a message.
"""

import contextlib
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn

from dantinox import cli
from dantinox.cli.generate import argument_text, utf8_text
from dantinox.cli.model_source import ParamDtype, SourceArguments, check_source, load_model
from dantinox.config import Implementation, KVDtype
from dantinox.config.validation import check_int
from dantinox.inference.chat import Chat
from dantinox.inference.conversation import ContextFullError
from dantinox.inference.sampling import Sampling
from dantinox.system import streams

PROG = "dantinox-chat"
HELP = """/reset  start a new conversation
/help   show these lines
/quit   end, as Ctrl-D does
Ctrl-C stops an answer."""
RESET = "/reset starts a new conversation"


@dataclass(frozen=True)
class Arguments(SourceArguments):
    """Chat with a model."""

    tokenizer: str | None = None
    """A tokenizer.json or its folder, for a --from without its own."""
    system: str | None = None
    """The system message, which says how to answer; None: that of the chat template, or none."""
    max_new_tokens: int = 1024
    """Maximum number of tokens of an answer."""
    temperature: float = 0.8
    """Divisor of the logits; 0: greedy."""
    top_k: int | None = None
    """Sample from the k likeliest tokens."""
    top_p: float = 1.0
    """Sample from the likeliest tokens with this total probability; 1: off."""
    min_p: float = 0.0
    """Sample from tokens at least this likely, relative to the likeliest; 0: off."""
    repetition_penalty: float = 1.0
    """Above 1: make tokens of the conversation so far less likely."""
    seed: int = 0
    """Seed of all draws."""
    prefill_chunk: int | None = None
    """Tokens per prefill step; fewer take less memory. None: 2048."""
    attn: Implementation | None = None
    """Implementation of attention, in messages; None: that of the run."""
    moe: Implementation | None = None
    """Implementation of the mixture of experts; None: that of the run."""
    decode: Implementation | None = None
    """Implementation of cached decoding; None: that of the run."""
    kv_cache_dtype: KVDtype | None = None
    """Storage of the KV cache: the model's dtype (auto), or 8 bits per value; None: that of the run."""
    param_dtype: ParamDtype | None = None
    """Dtype of the weights in memory; None: float32 for a run, for --from that of the file if matmuls are bfloat16."""
    mesh: str | None = None
    """Devices to lay the model and its cache over, such as tensor=4; None: one device."""
    verbose: bool = False
    """Log the chosen implementations and show tracebacks."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code; invalid input exits with 2."""
    arguments = cli.parse(
        Arguments, cli.positional_run(argv), default=Arguments(), prog=PROG, description="Chat with a model."
    )
    if arguments.verbose:
        cli.log_choices()
    with cli.one_line_errors(PROG, arguments.verbose, cli.IMPLEMENTATION_FLAGS):
        max_new_tokens = check_int("max_new_tokens", arguments.max_new_tokens, 1)
        converse(start_chat(arguments), max_new_tokens)
    return 0


def start_chat(arguments: Arguments) -> Chat:
    """Load the model and start a chat with it.

    Raises:
        ValueError, NotImplementedError, OSError: the input is invalid; the message is one line.
    """
    check_source(arguments)
    sampling = Sampling.create(
        arguments.temperature, arguments.top_k, arguments.top_p, arguments.min_p, arguments.repetition_penalty
    )
    system = None if arguments.system is None else argument_text("system", arguments.system)
    names = ("attn", "moe", "decode", "kv_cache_dtype")
    model, tokenizer = load_model(arguments, **{name: getattr(arguments, name) for name in names})
    chat = Chat(model, tokenizer, sampling, system=system, seed=arguments.seed, prefill_chunk=arguments.prefill_chunk)
    if chat.format.note:
        streams.report(chat.format.note)
    return chat


def converse(chat: Chat, max_new_tokens: int) -> None:
    """Answer the messages of standard input until it ends or says /quit.

    Raises:
        ValueError: a message cannot be answered, where no terminal could give another one.
    """
    at_terminal = sys.stdin.isatty()
    if at_terminal:
        streams.report("/help shows the commands")
    for message in terminal_messages() if at_terminal else piped_messages():
        if re.fullmatch(r"/\w+", command := message.strip()):
            if command == "/quit":
                return
            if command == "/reset":
                chat.reset()
            streams.report(
                {"/reset": "a new conversation", "/help": HELP}.get(command, f"no command {command}\n{HELP}")
            )
        elif command:
            try:
                answer(chat, message, max_new_tokens, at_terminal)
            except ContextFullError as error:
                streams.report(f"{error}; {RESET}")
            except ValueError as error:  # the template refuses it
                if not at_terminal:
                    raise
                streams.report(f"{error}; {RESET}")


def answer(chat: Chat, message: str, max_new_tokens: int, at_terminal: bool) -> None:
    """Print the answer to a message; at a terminal, Ctrl-C stops it."""
    with stoppable() if at_terminal else contextlib.nullcontext(lambda: False) as stopped:
        for piece in chat.ask(message, max_new_tokens, stopped):
            print(piece, end="", flush=True)
        print(flush=True)
    if chat.ended == "context":
        limit = chat.conversation.limit
        streams.report(f"the answer ends here, for the context of {limit} tokens is full; {RESET}")
    elif chat.ended == "count":
        streams.report(f"the answer ends here, after --max-new-tokens {max_new_tokens}")


@contextlib.contextmanager
def stoppable() -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether Ctrl-C was pressed, which does nothing else meanwhile."""
    presses: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: presses.append(number))
    try:
        yield lambda: bool(presses)
    finally:
        signal.signal(signal.SIGINT, before)


def terminal_messages() -> Iterator[str]:
    """Yield the lines typed at a terminal until Ctrl-D; Ctrl-C drops the line."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - input() then edits lines and remembers them
    while True:
        try:
            yield argument_text("the message", input("> "))
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            streams.report("/quit or Ctrl-D ends")
        except (UnicodeDecodeError, ValueError) as error:
            streams.report(str(error))


def piped_messages() -> Iterator[str]:
    """Yield the lines of standard input.

    Raises:
        ValueError: a line is not UTF-8.
    """
    for number, raw in enumerate(sys.stdin.buffer, 1):
        yield utf8_text(f"line {number} of standard input", raw).rstrip("\r\n")


def program() -> NoReturn:
    """Run `main` as a console script."""
    cli.run_main(main)


if __name__ == "__main__":
    program()
