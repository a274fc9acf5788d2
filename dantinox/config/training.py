"""Settings of a training run."""

import math
from dataclasses import dataclass
from typing import Literal

from dantinox.config.validation import ConfigError, check, check_fields, check_positive

ROWS = ("slices", "data", "fsdp", "expert")  # what the sequences of a micro-batch are dealt over


def parse_mesh(text: str) -> dict[str, int]:
    """Return the number of devices along each mesh axis, and of slices, 1 by default.

    Args:
        text: such as data=2,fsdp=4; empty for one device.

    Raises:
        ConfigError: it is not of this form.
    """
    axes = dict.fromkeys(("slices", "data", "fsdp", "tensor", "context", "expert"), 1)
    for part in filter(None, text.split(",")):
        name, _, size = part.strip().partition("=")
        if name not in axes or not size.isdigit() or int(size) < 1:
            raise ConfigError(f"mesh is {text!r}; allowed: NAME=N,... with N at least 1 and {', '.join(axes)}")
        axes[name] = int(size)
    return axes


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run."""

    run: str = "nano"
    """Name of the run, which writes its files to runs/NAME."""
    runs_dir: str = "runs"
    """Folder of the runs."""
    steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 32
    """Sequences per step, over all micro-batches and devices."""
    seq_len: int = 256
    """Tokens per sequence."""
    grad_accum: int = 1
    """Micro-batches per step."""
    init_from: str = ""
    """Folder of Hugging Face weights to begin with, in its shape and with its tokenizer; empty: random weights."""
    seed: int = 0
    """Seed of the initial weights, the data order and dropout."""
    mesh: str = ""
    """Device mesh such as data=2,fsdp=4, of data, fsdp, tensor, context, expert and slices; empty: one device."""
    expert_exchange: Literal["padded", "ragged"] = "padded"
    """What travels along the mesh axis expert: equally many rows to each device, or only those that exist (TPU)."""
    eval_every: int = 100
    """Steps between evaluations; 0: only after the last step."""
    eval_batches: int = 8
    """Batches in the evaluation set."""
    patience: int = 0
    """Stop early after this many evaluations without improvement; 0: never."""
    save_every: int = 500
    """Steps between checkpoints; 0: only after the last step, which is always saved."""
    max_checkpoints: int = 3
    """Newest checkpoints to keep; the one with the best validation loss is kept too."""
    on_nan: Literal["stop", "skip"] = "stop"
    """If the loss or a gradient is not finite: stop before the update, or skip the batch."""
    sample_every: int = 500
    """Steps between text samples; 0: only after the last step."""
    sample_tokens: int = 200
    """Tokens per sample."""
    log_every: int = 10
    """Steps between rows of metrics."""
    profile_steps: str = ""
    """Steps to trace with the JAX profiler, as FIRST:LAST."""
    wandb: bool = False
    """Log to Weights & Biases too (needs the extra wandb); WANDB_MODE=offline writes to the folder of the run only."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_positive(
            self, "steps", "batch_size", "seq_len", "grad_accum", "eval_batches", "max_checkpoints", "log_every"
        )
        for name in ("eval_every", "patience", "save_every", "sample_every", "sample_tokens", "seed"):
            check(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}; allowed: 0 or more")
        check(self.seed < 2**32, f"seed is {self.seed}; allowed: below 2**32")
        check(
            self.run not in ("", ".", "..") and "/" not in self.run and "\\" not in self.run,
            f"run is {self.run!r}; allowed: a plain folder name",
        )
        check(self.run.encode(errors="replace").decode() == self.run, f"run is {self.run!r}; allowed: text of UTF-8")
        size = len(self.run.encode())  # file systems allow 255, and an older run of this name gets a number appended
        check(size <= 200, f"run is a name of {size} bytes; allowed: up to 200")
        check(
            self.batch_size % self.grad_accum == 0,
            f"batch_size is {self.batch_size} and grad_accum is {self.grad_accum}; "
            "batch_size must be a multiple of grad_accum",
        )
        self.mesh_axes()
        self.profile_range()

    def mesh_axes(self) -> dict[str, int]:
        """Return the number of devices along each mesh axis, and of slices; 1 each without a mesh."""
        axes = parse_mesh(self.mesh)
        rows, devices = self.batch_size // self.grad_accum, math.prod(axes[name] for name in axes if name in ROWS)
        check(
            rows % devices == 0,
            f"mesh is {self.mesh!r} but a micro-batch holds {rows} sequences; "
            f"it must be a multiple of the {devices} devices along {', '.join(ROWS)}",
        )
        check(
            self.seq_len % axes["context"] == 0,
            f"mesh is {self.mesh!r} but seq_len is {self.seq_len}; it must be a multiple of context",
        )
        return axes

    def profile_range(self) -> tuple[int, int] | None:
        """Return (first, last) step to trace, both included; None without a trace."""
        if not self.profile_steps:
            return None
        first, _, last = self.profile_steps.partition(":")
        if not (first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
            raise ConfigError(f"profile_steps is {self.profile_steps!r}; allowed: FIRST:LAST with 1 <= FIRST <= LAST")
        return int(first), int(last)
