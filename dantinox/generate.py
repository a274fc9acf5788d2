"""Let a trained model write: `python -m dantinox.generate --run runs/NAME --prompt "..."`.

The text goes to stdout and nothing else does; the speed goes to stderr. The function of the same name,
`dantinox.generate(model, prompts, ...)`, lives in `dantinox.generation`.
"""

import codecs
import dataclasses
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from dantinox import cli, generation
from dantinox.config import Decode, KVDtype
from dantinox.sampling import Sampling, integer
from dantinox.tokenizer import Tokenizer

PROG = "dantinox-generate"


@dataclass(frozen=True)
class Args:
    """Let a trained model write."""

    run: str = "nano"
    """The run: runs/NAME or NAME."""
    prompt: str = ""
    """Text to continue; empty: the start of a document."""
    max_new_tokens: int = 256
    """Most tokens to write; the end of the document ends it earlier."""
    temperature: float = 0.8
    """Divides the logits; 0: always the likeliest token."""
    top_k: int = 0
    """Draw from the k likeliest tokens; 0: off."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that hold this much probability; 1: off."""
    min_p: float = 0.0
    """Draw from tokens at least this likely, relative to the likeliest; 0: off."""
    seed: int = 0
    """Seed of all draws."""
    n: int = 1
    """Samples, each headed by its number when there are more than one."""
    stream: bool = False
    """Print the text as it is written, one sample after the other."""
    prefill_chunk: int = generation.PREFILL_CHUNK
    """Tokens of the prompt read at once; less takes less memory."""
    decode: Decode | None = None
    """Implementation of cached decoding; None: what the run was trained with."""
    kv_dtype: KVDtype | None = None
    """What the key/value cache keeps: the model's dtype, or 8 bits a number; None: what the run was trained with."""
    verbose: bool = False
    """Say which implementations were chosen, and show tracebacks."""


def parse(argv: Sequence[str]) -> Args:
    """The command line; the run may stand first, without its flag. Exits with 2 where a flag is wrong."""
    if argv and not argv[0].startswith("-"):
        argv = ["--run", *argv]
    return cli.parse(Args, argv, default=Args(), prog=PROG, description="Let a trained model write.")


def main(argv: Sequence[str] | None = None) -> int:
    """The program; 0, or SystemExit with 2 for bad input. When interrupted the text so far is printed."""
    args = parse(sys.argv[1:] if argv is None else argv)
    if args.verbose:
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
        logging.getLogger("jax").setLevel(logging.WARNING)
    with cli.user_errors(PROG, args.verbose):
        write(args)
    return 0


def write(args: Args) -> None:
    """Load the run and print prompt and continuation.

    Raises:
        ValueError, NotImplementedError, OSError: bad input; the message is one line.
    """
    from dantinox.checkpoint import load

    count = integer("n", args.n, 1)
    chosen = {"decode": args.decode, "kv_dtype": args.kv_dtype}
    model, tokenizer = load(find(args.run), **{name: value for name, value in chosen.items() if value is not None})
    prompt = tokenizer.encode(args.prompt) if args.prompt else [tokenizer.eos_id]
    request = generation.Request(
        prompts=[prompt],
        max_new_tokens=args.max_new_tokens,
        sampling=Sampling.checked(args.temperature, args.top_k, args.top_p, args.min_p),
        seed=args.seed,
        stop_tokens=(tokenizer.eos_id,),
        samples=range(count),
        prefill_chunk=args.prefill_chunk,
    )
    requests = [request]
    if args.stream:  # stdout shows one sample after the other
        requests = [dataclasses.replace(request, samples=(sample,)) for sample in range(count)]
    began, tokens, first = time.perf_counter(), 0, 0.0
    for request in requests:
        chunks = generation.run(model, request, lag=generation.LAG if args.stream else None)
        printers = [Printer(tokenizer, args.prompt, sample, count, args.stream) for sample in request.samples]
        try:
            for ids in chunks:
                first = first or time.perf_counter() - began
                tokens += sum(map(len, ids))
                for printer, new in zip(printers, ids, strict=True):
                    printer.add(new)
        finally:
            for printer in printers:
                printer.end()
    seconds = time.perf_counter() - began
    print(
        f"{tokens} tokens in {seconds:.2f} s, {tokens / seconds:.0f} tokens/s, the first after {first:.2f} s "
        "(compilation included)",
        file=sys.stderr,
    )


class Printer:
    """One sample on its way to stdout, in whole characters: at once when streaming, else when it ends."""

    def __init__(self, tokenizer: Tokenizer, prompt: str, number: int, count: int, stream: bool) -> None:
        self.tokenizer, self.stream = tokenizer, stream
        self.text = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.waiting = (f"--- sample {number + 1} of {count} ---\n" if count > 1 else "") + prompt

    def add(self, ids: list[int]) -> None:
        self.waiting += self.text.decode(self.tokenizer.decode_bytes(ids))
        if self.stream:
            self.flush()

    def end(self) -> None:
        self.waiting += self.text.decode(b"", final=True) + "\n"
        self.flush()

    def flush(self) -> None:
        print(self.waiting, end="", flush=True)
        self.waiting = ""


def find(run: str) -> Path:
    """The folder of a run given as a path or as a bare name."""
    path = Path(run)
    return path if path.is_dir() or len(path.parts) != 1 else Path("runs") / run


class _Module(ModuleType):
    """Importing this module binds `dantinox.generate` to it, in the function's place: so it can be called."""

    __call__ = staticmethod(generation.generate)


def program() -> NoReturn:
    """`main` as a console script."""
    cli.console(main)


if __name__ == "__main__":
    program()
else:
    sys.modules[__name__].__class__ = _Module
