"""Optimizers of optax with a schedule, gradient clipping, and weight decay on matrices only."""

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

from dantinox.config import OptimConfig

_VECTORS = ("_bias", "_scale")  # ends of names of parameters that are vectors per head or expert
Tree = dict[str, jax.Array]  # by parameter name, such as blocks.0.attention.q


def make_schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Return the learning rate schedule: linear warm-up, then cosine, warm-up-stable-decay (wsd) or constant."""
    warmup = min(round(config.warmup_ratio * steps), steps - 1)
    rest, floor = max(1, steps - warmup), config.lr * config.min_lr_ratio
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(config.lr, rest, alpha=config.min_lr_ratio)
    elif config.schedule == "wsd":
        decay = max(1, rest // 5)
        after = optax.join_schedules(
            [optax.constant_schedule(config.lr), optax.linear_schedule(config.lr, floor, decay)],
            [rest - decay],
        )
    else:
        after = optax.constant_schedule(config.lr)
    if warmup == 0:
        return after
    ramp = optax.linear_schedule(config.lr / warmup, config.lr, warmup - 1) if warmup > 1 else after
    return optax.join_schedules([ramp, after], [warmup])


def make_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Return gradient clipping by global norm followed by the optimizer; biases and 1-D parameters are not decayed."""
    return optax.chain(
        optax.clip_by_global_norm(config.grad_clip) if config.grad_clip else optax.identity(),
        update_rule(config, make_schedule(config, steps)),
    )


def update_rule(config: OptimConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    """Return the optimizer `config.optimizer` with the learning rate schedule `rate`."""
    decay = {"weight_decay": config.weight_decay, "mask": is_matrix}
    if config.optimizer == "lion":
        return optax.lion(rate, b1=config.beta1, b2=config.beta2, **decay)
    if config.optimizer == "muon":
        # optax.contrib.muon has a weight decay of its own for the parameters that Adam updates. As in "Muon is scalable
        # for LLM training", all matrices are decayed alike here.
        direction = muon(
            1.0,
            beta=config.beta1,
            adam_b1=config.beta1,
            adam_b2=config.beta2,
            muon_weight_dimension_numbers=muon_dimension_numbers,
            consistent_rms=0.2,  # RMS of the updates as with AdamW, so that learning rates transfer
        )
        return optax.chain(
            direction,
            optax.scale(-1.0),
            optax.add_decayed_weights(**decay),
            optax.scale_by_learning_rate(rate),
        )
    if config.optimizer == "adafactor":
        # optax.adafactor decays the weights by weight_decay per step, not by its product with the learning rate.
        return optax.chain(
            optax.scale_by_factored_rms(),
            optax.clip_by_block_rms(1.0),
            optax.add_decayed_weights(**decay),
            optax.scale_by_learning_rate(rate),
        )
    return optax.adamw(rate, b1=config.beta1, b2=config.beta2, **decay)


def is_matrix(params: Tree) -> dict[str, bool]:
    """Return which parameters are matrices, or stacks of them; biases and scales of heads or experts are not."""
    return {name: getattr(p, "ndim", 0) > 1 and not name.endswith(_VECTORS) for name, p in params.items()}


def muon_dimension_numbers(params: Tree) -> dict[str, MuonDimensionNumbers | None]:
    """Return how Muon views each parameter as a matrix: its reduction axes and its output axes.

    None, for an update by Adam, for 1-D parameters, biases, scales, embeddings and the output projection.
    """
    # optax calls this again with the parameters of Adam masked out.
    return {name: _muon_dimension_numbers(name, getattr(p, "ndim", 0)) for name, p in params.items()}


def _muon_dimension_numbers(name: str, ndim: int) -> MuonDimensionNumbers | None:
    if ndim < 2 or not name.startswith("blocks.") or name.endswith(_VECTORS):
        return None
    if ".attention." in name:
        *_, last = name.split(".")
        return MuonDimensionNumbers((0, 1), 2) if last == "o" else MuonDimensionNumbers(0, (1, 2))
    return MuonDimensionNumbers(ndim - 2, ndim - 1)  # [E, ...]: one matrix per expert
