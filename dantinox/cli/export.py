"""Export a trained model: `python -m dantinox.export --run runs/NAME --out DIR`.

The program writes config.json and safetensors to DIR in the Hugging Face layout of a family of open models, with
tokenizer.json, tokenizer_config.json and generation_config.json, and the tokenizer in the format of DantinoX to
DIR/dantinox. `dantinox.load_hf(DIR)` and transformers load them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from dantinox import cli
from dantinox.cli.model_source import DEFAULT_RUN, SourceArguments, check_source, load_weights
from dantinox.config.validation import check_int
from dantinox.hf.config import layout_of, to_hf
from dantinox.hf.families import Layout
from dantinox.hf.folder import OWN_FOLDER

PROG = "dantinox-export"


@dataclass(frozen=True)
class Arguments(SourceArguments):
    """Export a trained model in a Hugging Face layout."""

    out: str | None = None
    """Folder to write; it must not exist, or be empty."""
    layout: Layout | None = None
    """Layout to write; None: the first that can represent the model."""
    shard_mb: int = 5000
    """Maximum size of a file of weights, in megabytes."""
    verbose: bool = False
    """Show tracebacks."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code; invalid input exits with 2."""
    arguments = cli.parse(
        Arguments,
        cli.positional_run(argv, "--run", "--out"),
        default=Arguments(),
        prog=PROG,
        description=Arguments.__doc__,
    )
    with cli.one_line_errors(PROG, arguments.verbose):
        export(arguments)
    return 0


def export(arguments: Arguments) -> None:
    """Load the run, write the folder and print its contents.

    Raises:
        ValueError, OSError: the input is invalid; the message is one line, and nothing was written.
    """
    from dantinox.checkpoint.load import find_run, read_config
    from dantinox.hf.weights import read_model_config, read_model_type, save_hf

    if arguments.out is None:
        raise ValueError("out is missing; give --out a folder")
    size = check_int("shard_mb", arguments.shard_mb, 1) * 10**6
    check_source(arguments)
    layout = arguments.layout
    if arguments.from_ is None:
        config = read_config(find_run(arguments.run or DEFAULT_RUN)).model
    else:
        config, layout = read_model_config(arguments.from_), layout or read_model_type(arguments.from_)
    to_hf(config, layout)  # before the weights are read
    model, tokenizer = load_weights(arguments)
    files = save_hf(model, arguments.out, layout, size, tokenizer)
    if tokenizer is not None and tokenizer.kind != "hf":
        tokenizer.save(Path(arguments.out) / OWN_FOLDER)
    total = sum(file.stat().st_size for file in files)
    print(f"{arguments.out}: {layout or layout_of(model.config)}, {total:,} bytes in {len(files)} file(s)")


def program() -> NoReturn:
    """Run `main` as a console script."""
    cli.run_main(main)


if __name__ == "__main__":
    program()
