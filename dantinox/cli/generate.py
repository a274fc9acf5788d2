"""Let a trained model write: `python -m dantinox.generate --run runs/NAME --prompt "..."`.

The text goes to stdout and nothing else does; the speed goes to stderr. The function of the same name,
`dantinox.generate(model, prompts, ...)`, lives in `dantinox.inference.generate`.
"""

import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NoReturn

import tyro

from dantinox import cli
from dantinox.cli.stream_printer import Screen, heads
from dantinox.config import Implementation, KVDtype, ModelConfig
from dantinox.config.validation import check_int
from dantinox.inference import generate
from dantinox.inference.detokenizer import Text
from dantinox.inference.sampling import Sampling

PROG = "dantinox-generate"
MAX_NEW_TOKENS = 256

Texts = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]


@dataclass(frozen=True)
class Args:
    """Let a trained model write."""

    run: str = "nano"
    """The run: runs/NAME or NAME."""
    prompt: Texts = ()
    """Text to continue; more than one --prompt: all at once; none: the start of a document."""
    prompt_file: str | None = None
    """A file whose text is to be continued, as it stands; -: standard input."""
    prompt_per_line: bool = False
    """Each line of --prompt-file is a prompt."""
    max_new_tokens: int | None = None
    """Most tokens to write; the end of the document ends it earlier. None: 256, or what fits in max_context."""
    stop: Texts = ()
    """Text that ends the writing and is not shown; may be given more than once."""
    temperature: float = 0.8
    """Divides the logits; 0: always the likeliest token."""
    top_k: int | None = None
    """Draw from the k likeliest tokens."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that hold this much probability; 1: off."""
    min_p: float = 0.0
    """Draw from tokens at least this likely, relative to the likeliest; 0: off."""
    repetition_penalty: float = 1.0
    """Above 1: tokens of the prompt and of the text so far become less likely."""
    seed: int = 0
    """Seed of all draws."""
    n: int = 1
    """Samples of each prompt, which is read once."""
    stream: bool = False
    """Print the text as it is written; of several texts the first, and the next when that is done."""
    prefill_chunk: int = generate.PREFILL_CHUNK
    """Tokens of the prompt read at once; less takes less memory."""
    decode: Implementation | None = None
    """Implementation of cached decoding; None: what the run was trained with."""
    kv_cache_dtype: KVDtype | None = None
    """Storage of the KV cache: the model's dtype (auto), or 8 bits per value; None: as trained."""
    verbose: bool = False
    """Say which implementations were chosen, and show tracebacks."""


def parse(argv: Sequence[str] | None) -> Args:
    """The command line; the run may stand first, without its flag. Exits with 2 where a flag is wrong."""
    return cli.parse(
        Args, cli.positional_run(argv), default=Args(), prog=PROG, description="Let a trained model write."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The program; 0, or SystemExit with 2 for bad input. When interrupted the text so far is printed."""
    args = parse(argv)
    if args.verbose:
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
        logging.getLogger("jax").setLevel(logging.WARNING)
    with cli.one_line_errors(PROG, args.verbose):
        write(args)
    return 0


def write(args: Args) -> None:
    """Load the run and print prompt and continuation.

    Raises:
        ValueError, NotImplementedError, OSError: bad input; the message is one line.
    """
    from dantinox.checkpoint.load import find_run, load

    sampling = Sampling.checked(args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty)
    count = check_int("n", args.n, 1)
    if "" in args.stop:
        raise ValueError("stop is empty; allowed: text")
    prompts = read_prompts(args)
    chosen = {"decode": args.decode, "kv_cache_dtype": args.kv_cache_dtype}
    model, tokenizer = load(find_run(args.run), **{name: value for name, value in chosen.items() if value is not None})
    ids = [tokenizer.encode(prompt) if prompt else [tokenizer.eos_id] for prompt in prompts]
    new, cut = room(args.max_new_tokens, model.config, max(map(len, ids)))
    request = generate.Request(
        prompts=ids,
        max_new_tokens=new,
        sampling=sampling,
        seed=args.seed,
        stop_tokens=(tokenizer.eos_id,),
        samples=range(count),
        prefill_chunk=args.prefill_chunk,
    )
    texts = [Text(tokenizer, head, args.stop) for head in heads(prompts, count)]
    screen = Screen(texts, args.stream)
    began, first, early = time.perf_counter(), 0.0, 0
    chunks = generate.run(model, request, lag=generate.STREAM_LATENCY_S if args.stream else None)
    try:
        for chunk in chunks:
            screen.add(*chunk)
            if not first:
                first, early = time.perf_counter() - began, sum(text.tokens for text in texts)
            if screen.done:
                break
    finally:
        screen.end()
    seconds, tokens = time.perf_counter() - began, sum(text.tokens for text in texts)
    line = f"{tokens} tokens in {seconds:.2f} s, {tokens / seconds:.0f} tokens/s, compilation included"
    if tokens > early:
        line += f"; {(tokens - early) / (seconds - first):.0f} tokens/s after the first {early} in {first:.2f} s"
    print(line, file=sys.stderr)
    if cut and any(text.tokens == new for text in texts):
        limit = generate.context_limit(model.config)
        print(f"stopped at max_context {limit}, as {generate.why_context_limited(model.config)}", file=sys.stderr)


def read_prompts(args: Args) -> list[str]:
    """The texts to continue; one empty one where none was given.

    Raises:
        ValueError, OSError: a prompt is empty or no UTF-8 text, the file cannot be read, or flags contradict.
    """
    if args.prompt_file is None:
        if args.prompt_per_line:
            raise ValueError("prompt_per_line needs prompt_file")
        if "" in args.prompt:
            raise ValueError("prompt is empty; allowed: text, or no prompt for the start of a document")
        return list(args.prompt) or [""]
    if args.prompt:
        raise ValueError("prompt and prompt_file are both given; allowed: one of them")
    piped = args.prompt_file == "-"
    name = "standard input" if piped else args.prompt_file
    raw = sys.stdin.buffer.read() if piped else Path(args.prompt_file).read_bytes()
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text: byte {error.start} is {raw[error.start]:#04x}") from None
    if not text:
        raise ValueError(f"{name} is empty; allowed: text to continue")
    if not args.prompt_per_line:
        return [text]
    lines = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    if "" in lines:
        raise ValueError(f"{name}: line {lines.index('') + 1} is empty; allowed: a prompt on each line")
    return lines


def room(asked: int | None, config: ModelConfig, longest: int) -> tuple[int, bool]:
    """(most new tokens after a prompt of `longest`, whether it is the context that ends them).

    Raises:
        ValueError: the prompt alone fills the context.
    """
    limit = generate.context_limit(config)
    if limit is not None and longest >= limit:
        why = generate.why_context_limited(config)
        raise ValueError(f"the prompt is {longest} tokens long; allowed: fewer than max_context {limit}, as {why}")
    if asked is not None or limit is None:
        return MAX_NEW_TOKENS if asked is None else asked, False
    return min(MAX_NEW_TOKENS, limit - longest), limit - longest < MAX_NEW_TOKENS


def program() -> NoReturn:
    """`main` as a console script."""
    cli.run_main(main)


if __name__ == "__main__":
    program()
