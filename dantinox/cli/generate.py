"""Generate text from a trained model: `python -m dantinox.generate --run runs/NAME --prompt "..."`.

`--from DIR` takes a folder of weights in the format of Hugging Face instead of a run.

Only the text is written to stdout; the speed is written to stderr. The function
`dantinox.generate(model, prompts, ...)` is defined in `dantinox.inference.generate`.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NoReturn

import tyro

from dantinox import cli
from dantinox.cli.model_source import ParamDtype, SourceArguments, check_source, load_model
from dantinox.cli.stream_printer import StreamPrinter, prompt_headers
from dantinox.config import Implementation, KVDtype, ModelConfig
from dantinox.config.validation import check_int
from dantinox.data.tokenizer_protocol import prompt_ids
from dantinox.inference import generate
from dantinox.inference.detokenizer import IncrementalDetokenizer
from dantinox.inference.sampling import Sampling
from dantinox.system import streams

PROG = "dantinox-generate"
MAX_NEW_TOKENS = 256

Texts = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]


@dataclass(frozen=True)
class Arguments(SourceArguments):
    """Generate text from a trained model."""

    tokenizer: str | None = None
    """A tokenizer.json or its folder, for a --from without its own."""
    prompt: Texts = ()
    """Text to continue; several --prompt are one batch. Without any, start a document."""
    prompt_file: str | None = None
    """File with the text to continue; -: standard input."""
    prompt_per_line: bool = False
    """Take each line of --prompt-file as a prompt."""
    max_new_tokens: int | None = None
    """Maximum number of new tokens; a text may end earlier. None: 256, or what fits in max_context."""
    stop: Texts = ()
    """String that ends a text and is not shown; may be repeated."""
    temperature: float = 0.8
    """Divisor of the logits; 0: greedy."""
    top_k: int | None = None
    """Sample from the k likeliest tokens."""
    top_p: float = 1.0
    """Sample from the likeliest tokens with this total probability; 1: off."""
    min_p: float = 0.0
    """Sample from tokens at least this likely, relative to the likeliest; 0: off."""
    repetition_penalty: float = 1.0
    """Above 1: make tokens of the prompt and of the text so far less likely."""
    seed: int = 0
    """Seed of all draws."""
    n: int = 1
    """Samples per prompt, which is prefilled once."""
    stream: bool = False
    """Print the text while it is generated; several texts are printed in order."""
    prefill_chunk: int | None = None
    """Tokens per prompt and prefill step; fewer take less memory. None: 2048."""
    speculate: int = 0
    """Tokens that each step drafts from what the text repeats, and verifies; the text stays the same. 0: none."""
    attn: Implementation | None = None
    """Implementation of attention, in prompts; None: that of the run."""
    moe: Implementation | None = None
    """Implementation of the mixture of experts; None: that of the run."""
    decode: Implementation | None = None
    """Implementation of cached decoding; None: that of the run."""
    kv_cache_dtype: KVDtype | None = None
    """Storage of the KV cache: the model's dtype (auto), or 8 bits per value; None: that of the run."""
    param_dtype: ParamDtype | None = None
    """Dtype of the weights in memory; None: float32 for a run, for --from that of the file if matmuls are bfloat16."""
    mesh: str | None = None
    """Devices to lay the model and its cache over, such as data=2,tensor=4; None: one device."""
    verbose: bool = False
    """Log the chosen implementations and show tracebacks."""


def parse(argv: Sequence[str] | None) -> Arguments:
    """Parse the command line; the first argument may be the run. Exits with 2 if a flag is invalid."""
    return cli.parse(
        Arguments,
        cli.positional_run(argv, "--run", "--prompt"),
        default=Arguments(),
        prog=PROG,
        description="Generate text from a trained model.",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code; invalid input exits with 2. An interrupt prints the text so far."""
    arguments = parse(argv)
    if arguments.verbose:
        cli.log_choices()
    with cli.one_line_errors(PROG, arguments.verbose, cli.IMPLEMENTATION_FLAGS):
        generate_text(arguments)
    return 0


def generate_text(arguments: Arguments) -> None:
    """Load the run and print the prompts and their continuations.

    Raises:
        ValueError, NotImplementedError, OSError: the input is invalid; the message is one line.
    """
    sampling = Sampling.create(
        arguments.temperature, arguments.top_k, arguments.top_p, arguments.min_p, arguments.repetition_penalty
    )
    count = check_int("n", arguments.n, 1)
    stop = [argument_text("stop", text) for text in arguments.stop]
    if "" in stop:
        raise ValueError("stop is ''; allowed: text that is not empty")
    prompts = read_prompts(arguments)
    check_source(arguments)
    names = ("attn", "moe", "decode", "kv_cache_dtype")
    model, tokenizer = load_model(arguments, **{name: getattr(arguments, name) for name in names})
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    max_new_tokens, is_capped = new_token_limit(arguments.max_new_tokens, model.config, max(map(len, ids)))
    request = generate.Request(
        prompts=ids,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        seed=arguments.seed,
        stop_tokens=tokenizer.stop_ids,
        samples=range(count),
        prefill_chunk=arguments.prefill_chunk,
        speculate=arguments.speculate,
    )
    texts = [IncrementalDetokenizer(tokenizer, header, stop) for header in prompt_headers(prompts, count)]
    printer = StreamPrinter(texts, arguments.stream)
    start, first_seconds, first_tokens, steps, drawn = time.perf_counter(), 0.0, 0, 0, 0
    chunks = generate.generate_chunks(model, request, latency=generate.STREAM_LATENCY_S if arguments.stream else None)
    try:
        for chunk in chunks:
            printer.add(chunk.ids, chunk.done)
            steps, drawn = steps + sum(chunk.steps), drawn + sum(map(len, chunk.ids))
            if not first_seconds:
                first_seconds, first_tokens = time.perf_counter() - start, sum(text.num_tokens for text in texts)
            if printer.done:
                break
    finally:
        printer.finish()
    seconds, tokens = time.perf_counter() - start, sum(text.num_tokens for text in texts)
    line = f"{tokens} tokens in {seconds:.2f} s, {tokens / seconds:.0f} tokens/s, including compilation"
    if tokens > first_tokens:
        rate = (tokens - first_tokens) / (seconds - first_seconds)
        line += f"; {rate:.0f} tokens/s after the first {first_tokens} in {first_seconds:.2f} s"
    if arguments.speculate and steps:
        line += f"; {drawn / steps:.2f} tokens per step"
    streams.report(line)
    if is_capped and any(text.num_tokens == max_new_tokens for text in texts):
        limit = generate.context_limit(model.config)
        streams.report(f"stopped at max_context {limit}: {generate.why_context_limited(model.config)}")


def read_prompts(arguments: Arguments) -> list[str]:
    """Return the texts to continue; one empty text if none was given.

    Raises:
        ValueError, OSError: a prompt is empty or not UTF-8, the file cannot be read, or flags conflict.
    """
    if arguments.prompt_file is None:
        if arguments.prompt_per_line:
            raise ValueError("prompt_per_line needs prompt_file")
        if "" in arguments.prompt:
            raise ValueError("prompt is ''; allowed: text that is not empty, or no prompt to start a document")
        return [argument_text("prompt", prompt) for prompt in arguments.prompt] or [""]
    if arguments.prompt:
        raise ValueError("prompt and prompt_file are both given; allowed: one of them")
    from_stdin = arguments.prompt_file == "-"
    name = "standard input" if from_stdin else arguments.prompt_file
    raw = sys.stdin.buffer.read() if from_stdin else Path(arguments.prompt_file).read_bytes()
    text = utf8_text(name, raw)
    if not text:
        raise ValueError(f"{name} is empty; allowed: text to continue")
    if not arguments.prompt_per_line:
        return [text]
    lines = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    if "" in lines:
        raise ValueError(f"{name}: line {lines.index('') + 1} is empty; allowed: a prompt on each line")
    return lines


def argument_text(name: str, text: str) -> str:
    """Return an argument of the command line, in which Python stands for bytes it could not decode by surrogates.

    Raises:
        ValueError: the bytes are not UTF-8 either.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        is_escaped = all(not "\ud800" <= letter <= "\udfff" or "\udc80" <= letter <= "\udcff" for letter in text)
        raw = text.encode(errors="surrogateescape" if is_escaped else "surrogatepass")
        return utf8_text(name, raw, ", a surrogate in the argument")
    return text


def utf8_text(name: str, raw: bytes, note: str = "") -> str:
    """Return the text of UTF-8 bytes; `name` is that of the text in the message, which ends with `note`.

    Raises:
        ValueError: the bytes are not UTF-8.
    """
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text: byte {error.start} is {raw[error.start]:#04x}{note}") from None


def new_token_limit(requested: int | None, config: ModelConfig, longest: int) -> tuple[int, bool]:
    """Return (maximum number of new tokens after a prompt of `longest` tokens, whether max_context determines it).

    Raises:
        ValueError: the prompt fills max_context.
    """
    limit = generate.context_limit(config)
    if limit is not None and longest >= limit:
        reason = generate.why_context_limited(config)
        raise ValueError(f"the prompt is {longest} tokens long; allowed: fewer than max_context {limit} ({reason})")
    if requested is not None or limit is None:
        return MAX_NEW_TOKENS if requested is None else requested, False
    return min(MAX_NEW_TOKENS, limit - longest), limit - longest < MAX_NEW_TOKENS


def program() -> NoReturn:
    """Run `main` as a console script."""
    cli.run_main(main)


if __name__ == "__main__":
    program()
