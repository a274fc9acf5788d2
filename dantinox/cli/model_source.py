"""Where the programs get a model from: a run of DantinoX, or a folder of weights in the format of Hugging Face."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from dantinox.data.tokenizer_protocol import Tokenizer
from dantinox.model.transformer import Transformer

DEFAULT_RUN = "nano"
ParamDtype = Literal["float32", "bfloat16"]
Folder = Annotated[str | None, tyro.conf.arg(name="from")]


@dataclass(frozen=True)
class SourceArguments:
    """The first flags of a program that loads a model."""

    run: str | None = None
    """The run: runs/NAME or NAME; None: nano."""
    from_: Folder = None
    """Instead of a run: a folder with config.json and safetensors, in the format of Hugging Face."""
    checkpoint: str | None = None
    """Checkpoint of the run: last, best (the lowest validation loss) or a step; None: last."""


def load_model(arguments: SourceArguments, **overrides: Any) -> tuple[Transformer, Tokenizer]:
    """Load the model and the tokenizer that the flags name; arguments and errors as those of `load_weights`.

    Raises:
        FileNotFoundError: there is no tokenizer.
    """
    check_source(arguments)
    if arguments.from_ is not None and _tokenizer_of(arguments) is None:
        advice = "give --tokenizer a tokenizer.json or its folder"
        raise FileNotFoundError(f"{arguments.from_} has no tokenizer.json; {advice}")
    model, tokenizer = load_weights(arguments, **overrides)
    assert tokenizer is not None
    return model, tokenizer


def load_weights(arguments: SourceArguments, **overrides: Any) -> tuple[Transformer, Tokenizer | None]:
    """Load the model and, if there is one, the tokenizer that the flags name.

    Args:
        arguments: the flags; --tokenizer, --param-dtype and --mesh only count if the program has them.
        overrides: model settings to change by name; those that are None stay as they are.

    Raises:
        ValueError, OSError: flags conflict, or files are missing or damaged; the message is one line.
    """
    overrides = {name: value for name, value in overrides.items() if value is not None}
    options = {name: value for name in ("mesh", "param_dtype") if (value := getattr(arguments, name, None)) is not None}
    check_source(arguments)
    if arguments.from_ is None:
        from dantinox.checkpoint.load import find_run, load

        if getattr(arguments, "tokenizer", None) is not None:
            raise ValueError("tokenizer is given, and a run has its own; allowed: with --from")
        if arguments.checkpoint is not None:
            options["checkpoint"] = arguments.checkpoint
        return load(find_run(arguments.run or DEFAULT_RUN), **options, **overrides)
    from dantinox.hf.weights import load_hf

    tokenizer = _tokenizer_of(arguments)
    return load_hf(arguments.from_, **{"param_dtype": "auto"} | options, **overrides), tokenizer


def _tokenizer_of(arguments: SourceArguments) -> Tokenizer | None:
    """Return the tokenizer of --from, or the one that --tokenizer names instead."""
    from dantinox.hf.folder import find_tokenizer
    from dantinox.hf.weights import local_folder

    assert arguments.from_ is not None
    folder, given = local_folder(arguments.from_), getattr(arguments, "tokenizer", None)
    tokenizer = find_tokenizer(folder if given is None else Path(given))
    if given is not None and tokenizer is None:
        raise ValueError(f"tokenizer is {given!r}; allowed: a tokenizer.json or its folder")
    return tokenizer


def check_source(arguments: SourceArguments) -> None:
    """Check the flags that say which model to load.

    Raises:
        ValueError: two of them conflict.
    """
    if arguments.from_ is not None and arguments.run is not None:
        raise ValueError("run and from are both given; allowed: one of them")
    if arguments.from_ is not None and arguments.checkpoint is not None:
        raise ValueError("checkpoint is given with from, and only runs have checkpoints; allowed: with --run")


def name_of_source(arguments: SourceArguments) -> dict[str, str]:
    """Return {"run": the run} or {"from": the folder}, for a record of results."""
    from dantinox.checkpoint.load import find_run

    if arguments.from_ is not None:
        return {"from": arguments.from_}
    return {"run": str(find_run(arguments.run or DEFAULT_RUN))}
