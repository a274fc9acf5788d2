"""How well a trained model predicts a text: `python -m dantinox.evaluate --run runs/NAME --data FILE`."""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from dantinox import cli
from dantinox.config import Implementation
from dantinox.data.corpus import find_documents
from dantinox.inference.scoring import evaluate
from dantinox.system import malloc

PROG = "dantinox-evaluate"


@dataclass(frozen=True)
class Args:
    """How well a trained model predicts a text."""

    run: str = "nano"
    """The run: runs/NAME or NAME."""
    data: str | None = None
    """A text file, a folder, a glob, or stdlib: the Python standard library's own source."""
    context: int | None = None
    """Tokens read at once; None: the model's max_context."""
    stride: int | None = None
    """Tokens that a window moves on; fewer give each token more context and take longer. None: half of context."""
    batch_size: int = 8
    """Windows read at once."""
    attn: Implementation | None = None
    """Implementation of attention; None: what the run was trained with."""
    moe: Implementation | None = None
    """Implementation of the mixture of experts; None: what the run was trained with."""
    json: bool = False
    """Print one line of JSON instead of a table."""
    verbose: bool = False
    """Show tracebacks."""


def main(argv: Sequence[str] | None = None) -> int:
    """The program; 0, or SystemExit with 2 for bad input."""
    malloc.tune_glibc_malloc()
    args = cli.parse(
        Args,
        cli.positional_run(argv),
        default=Args(),
        prog=PROG,
        description=__doc__.splitlines()[0].split(":")[0] + ".",
    )
    with cli.one_line_errors(PROG, args.verbose):
        report(args)
    return 0


def report(args: Args) -> None:
    """Load the run, score the data, print what came out.

    Raises:
        ValueError, NotImplementedError, OSError: bad input; the message is one line.
    """
    from dantinox.checkpoint.load import find_run, load

    if args.data is None:
        raise ValueError("data is missing; give --data a text file, a folder, a glob or stdlib")
    chosen = {name: value for name in ("attn", "moe") if (value := getattr(args, name)) is not None}
    model, tokenizer = load(find_run(args.run), **chosen)
    documents = find_documents(args.data)
    began = time.perf_counter()
    score = evaluate(model, tokenizer, documents, context=args.context, stride=args.stride, batch_size=args.batch_size)
    seconds = time.perf_counter() - began
    numbers = {name: getattr(score, name) for name in ("loss", "perplexity", "bits_per_byte")}
    if args.json:
        print(json.dumps({"run": str(find_run(args.run)), "data": args.data} | score._asdict() | numbers))
    else:
        print(f"{'data':14} {args.data}: {score.documents:,} documents, {score.bytes:,} bytes")
        print(f"{'tokens':14} {score.tokens:,}, each scored once; context {score.context}, stride {score.stride}")
        print(f"{'loss':14} {score.loss:.4f} nats a token")
        print(f"{'perplexity':14} {score.perplexity:.4f}")
        print(f"{'bits per byte':14} {score.bits_per_byte:.4f}")
    print(f"{seconds:.2f} s, {score.tokens / seconds:.0f} tokens/s, compilation included", file=sys.stderr)


def program() -> NoReturn:
    """`main` as a console script."""
    cli.run_main(main)


if __name__ == "__main__":
    program()
