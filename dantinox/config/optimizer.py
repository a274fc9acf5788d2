"""Settings of the optimizer."""

from dataclasses import dataclass
from typing import Literal

from dantinox.config.validation import check, check_fields, check_fraction, check_positive


@dataclass(frozen=True)
class OptimConfig:
    """Settings of the optimizer and its schedule."""

    optimizer: Literal["adamw", "lion", "adafactor", "muon"] = "adamw"
    """Optimizer; muon updates embeddings and 1-D parameters with Adam."""
    lr: float = 3e-4
    """Peak learning rate."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """After the warm-up: cosine decay, constant with a linear decay over the last fifth (wsd), or constant."""
    warmup_ratio: float = 0.05
    """Fraction of the steps in the warm-up."""
    min_lr_ratio: float = 0.1
    """Final learning rate over the peak."""
    weight_decay: float = 0.1
    """Weight decay, of matrices only."""
    beta1: float = 0.9
    """Decay of the first moment (muon: of the momentum; adafactor: unused)."""
    beta2: float = 0.95
    """Decay of the second moment (lion: of the momentum; adafactor: unused)."""
    grad_clip: float = 1.0
    """Largest global gradient norm; 0: no clipping."""
    ema_decay: float = 0.0
    """Decay per step of the moving average of the weights, which is evaluated, sampled and loaded; 0: no average."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_positive(self, "lr")
        check_fraction(self, "warmup_ratio", "beta1", "beta2", "ema_decay")
        check(0 <= self.min_lr_ratio <= 1, f"min_lr_ratio is {self.min_lr_ratio}; allowed: 0 to 1 (a fraction of lr)")
        check(self.weight_decay >= 0, f"weight_decay is {self.weight_decay}; allowed: 0 or more")
        check(self.grad_clip >= 0, f"grad_clip is {self.grad_clip}; allowed: 0 (off) or more")
