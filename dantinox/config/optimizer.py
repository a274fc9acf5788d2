"""The settings of the optimizer."""

from dataclasses import dataclass
from typing import Literal

from dantinox.config.validation import check, check_fields, check_fraction, check_positive


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule."""

    optimizer: Literal["adamw", "lion", "adafactor", "muon"] = "adamw"
    """Rule of the update; with muon, embeddings and vectors go by Adam."""
    lr: float = 3e-4
    """Peak learning rate."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """After the warm-up: cosine decay, flat then a linear decay over the last fifth (wsd), or flat."""
    warmup_ratio: float = 0.05
    """Share of the steps spent warming up."""
    min_lr_ratio: float = 0.1
    """Final learning rate over the peak."""
    weight_decay: float = 0.1
    """Decay of the weights, on matrices only."""
    beta1: float = 0.9
    """Decay of the first moment (muon: of the momentum; adafactor has none)."""
    beta2: float = 0.95
    """Decay of the second moment (lion: of its momentum; adafactor has its own)."""
    grad_clip: float = 1.0
    """Largest global gradient norm; 0: no clipping."""
    ema_decay: float = 0.0
    """Decay a step of the running average of the weights that is evaluated, sampled and loaded; 0: none is kept."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_positive(self, "lr")
        check_fraction(self, "warmup_ratio", "beta1", "beta2", "ema_decay")
        check(0 <= self.min_lr_ratio <= 1, f"min_lr_ratio is {self.min_lr_ratio}; allowed: 0 to 1 (a share of lr)")
        check(self.weight_decay >= 0, f"weight_decay is {self.weight_decay}; allowed: 0 or more")
        check(self.grad_clip >= 0, f"grad_clip is {self.grad_clip}; allowed: 0 (off) or more")
