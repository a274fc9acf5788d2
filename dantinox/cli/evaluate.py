"""Score a text with a trained model: `python -m dantinox.evaluate --run runs/NAME --data FILE`.

`--choices FILE` scores questions with several choices instead, and `--from DIR` takes a folder of weights.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from dantinox import cli
from dantinox.cli.model_source import (
    ParamDtype,
    SourceArguments,
    check_source,
    load_model,
    name_of_source,
)
from dantinox.config import Implementation
from dantinox.data.corpus import find_documents
from dantinox.inference.choices import read_questions, score_choices
from dantinox.inference.scoring import score_documents
from dantinox.system import malloc, streams
from dantinox.system.json_text import json_text

PROG = "dantinox-evaluate"


@dataclass(frozen=True)
class Arguments(SourceArguments):
    """Score a text with a trained model."""

    tokenizer: str | None = None
    """A tokenizer.json or its folder, for a --from without its own."""
    data: str | None = None
    """A text, .jsonl or .parquet file, also .gz or .zst; a folder or glob of them; or stdlib (Python's own source)."""
    choices: str | None = None
    """Instead of --data: a file of questions, {"question": ..., "choices": [...], "answer": 0} per line."""
    context: int | None = None
    """Tokens per window; None: max_context of the model."""
    stride: int | None = None
    """Tokens between the starts of two windows; fewer give more context and take longer. None: half of context."""
    batch_size: int = 8
    """Windows per batch."""
    attn: Implementation | None = None
    """Implementation of attention; None: that of the run."""
    moe: Implementation | None = None
    """Implementation of the mixture of experts; None: that of the run."""
    loss: Implementation | None = None
    """Implementation of the loss; None: that of the run."""
    param_dtype: ParamDtype | None = None
    """Dtype of the weights in memory; None: float32 for a run, for --from that of the file if matmuls are bfloat16."""
    mesh: str | None = None
    """Devices to lay the model over, such as data=2,tensor=4; None: one device."""
    json: bool = False
    """Print one line of JSON instead of a table."""
    verbose: bool = False
    """Show tracebacks."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code; invalid input exits with 2."""
    malloc.tune_glibc_malloc()
    arguments = cli.parse(
        Arguments,
        cli.positional_run(argv, "--run", "--data"),
        default=Arguments(),
        prog=PROG,
        description=__doc__.splitlines()[0].split(":")[0] + ".",
    )
    with cli.one_line_errors(PROG, arguments.verbose, cli.IMPLEMENTATION_FLAGS):
        report(arguments)
    return 0


def report(arguments: Arguments) -> None:
    """Load the run, score the data and print the result.

    Raises:
        ValueError, NotImplementedError, OSError: the input is invalid; the message is one line.
    """
    check_source(arguments)
    if arguments.choices is not None:
        report_choices(arguments)
        return
    if arguments.data is None:
        raise ValueError("data is missing; give --data a text file, a folder, a glob or stdlib, or --choices a file")
    documents = find_documents(arguments.data)
    model, tokenizer = load_model(arguments, **{name: getattr(arguments, name) for name in ("attn", "moe", "loss")})
    start = time.perf_counter()
    score = score_documents(
        model, tokenizer, documents, context=arguments.context, stride=arguments.stride, batch_size=arguments.batch_size
    )
    seconds = time.perf_counter() - start
    numbers = {name: getattr(score, name) for name in ("loss", "perplexity", "bits_per_byte")}
    if arguments.json:
        record = name_of_source(arguments) | {"data": arguments.data} | score._asdict() | numbers
        print(json_text(record))
    else:
        print(f"{'data':14} {arguments.data}: {score.documents:,} documents, {score.bytes:,} bytes")
        print(f"{'tokens':14} {score.tokens:,}, context {score.context}, stride {score.stride}")
        print(f"{'loss':14} {score.loss:.4f} nats per token")
        print(f"{'perplexity':14} {score.perplexity:.4f}")
        print(f"{'bits per byte':14} {score.bits_per_byte:.4f}")
    streams.report(f"{seconds:.2f} s, {score.tokens / seconds:.0f} tokens/s, including compilation")


def report_choices(arguments: Arguments) -> None:
    """Load the model, score the questions and print the result.

    Raises:
        ValueError, NotImplementedError, OSError: the input is invalid; the message is one line.
    """
    for name in ("data", "context", "stride"):
        if getattr(arguments, name) is not None:
            raise ValueError(f"{name} and choices are both given; allowed: one of them")
    assert arguments.choices is not None
    questions = read_questions(arguments.choices)
    model, tokenizer = load_model(arguments, **{name: getattr(arguments, name) for name in ("attn", "moe", "loss")})
    start = time.perf_counter()
    score = score_choices(model, tokenizer, questions, batch_size=arguments.batch_size)
    seconds = time.perf_counter() - start
    shares = {"accuracy": score.accuracy, "accuracy_normalised": score.normalised}
    if arguments.json:
        record = name_of_source(arguments) | {"choices": arguments.choices, "questions": score.questions} | shares
        print(json_text(record | {"chance": score.chance, "log_likelihoods": score.log_likelihoods}))
    else:
        print(f"{'questions':20} {arguments.choices}: {score.questions:,}, {score.chance:.4f} right by chance")
        for name, share in shares.items():
            print(f"{name.replace('_', ', '):20} {share:.4f} ± {score.error(share):.4f}")
    streams.report(f"{seconds:.2f} s, including compilation")


def program() -> NoReturn:
    """Run `main` as a console script."""
    cli.run_main(main)


if __name__ == "__main__":
    program()
