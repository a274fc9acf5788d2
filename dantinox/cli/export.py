"""Give a trained model away: `python -m dantinox.export --run runs/NAME --out DIR`.

DIR then holds config.json and safetensors as Hugging Face has them for Llama, Mistral or Mixtral, and the tokenizer in
our own form below DIR/dantinox. `dantinox.load_hf(DIR)` is the way back.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from dantinox import cli
from dantinox.config.validation import check_int
from dantinox.hf.config import Layout, layout_of, to_hf

PROG = "dantinox-export"


@dataclass(frozen=True)
class Args:
    """Give a trained model away, as Hugging Face has it."""

    run: str = "nano"
    """The run: runs/NAME or NAME."""
    out: str | None = None
    """Folder to write; it must not be there, or be empty."""
    layout: Layout | None = None
    """Names and settings of which model; None: mixtral with experts, mistral with a window, llama else."""
    shard_mb: int = 5000
    """Most megabytes a file of weights."""
    verbose: bool = False
    """Show tracebacks."""


def main(argv: Sequence[str] | None = None) -> int:
    """The program; 0, or SystemExit with 2 for bad input."""
    args = cli.parse(Args, cli.positional_run(argv), default=Args(), prog=PROG, description=Args.__doc__)
    with cli.one_line_errors(PROG, args.verbose):
        export(args)
    return 0


def export(args: Args) -> None:
    """Load the run, write the folder, say what it holds.

    Raises:
        ValueError, OSError: bad input; the message is one line, and nothing has been written.
    """
    from dantinox.checkpoint.load import find_run, load, read_config
    from dantinox.hf.weights import save_hf

    if args.out is None:
        raise ValueError("out is missing; give --out a folder")
    size = check_int("shard_mb", args.shard_mb, 1) * 10**6
    run = find_run(args.run)
    to_hf(read_config(run).model, args.layout)  # before the weights are read
    model, tokenizer = load(run)
    files = save_hf(model, args.out, args.layout, size)
    tokenizer.save(Path(args.out) / "dantinox")
    total = sum(file.stat().st_size for file in files)
    print(f"{args.out}: {args.layout or layout_of(model.config)}, {total:,} bytes in {len(files)} file(s)")


def program() -> NoReturn:
    """`main` as a console script."""
    cli.run_main(main)


if __name__ == "__main__":
    program()
