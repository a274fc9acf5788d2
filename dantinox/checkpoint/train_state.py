"""The state of a training run, which a checkpoint holds."""

from typing import Any, NamedTuple

from dantinox.model.params import Params


class TrainState(NamedTuple):
    """Everything that a training step updates.

    Attributes:
        params: float32 arrays by name.
        opt_state: state of the optimizer.
        ema: moving average of params; None if `config.optim.ema_decay` is 0.
    """

    params: Params
    opt_state: Any
    ema: Params | None = None

    @property
    def weights(self) -> Params:
        """The parameters to evaluate, sample and load: the average if there is one."""
        return self.params if self.ema is None else self.ema
