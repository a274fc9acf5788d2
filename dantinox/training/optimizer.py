"""Optimizers with a schedule, clipping and decay on matrices only, from optax."""

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

from dantinox.config import OptimConfig

Tree = dict[str, jax.Array]  # by dotted path, such as blocks.0.attention.q


def make_schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate of each step: a linear warm-up, then cosine, warm-up-stable-decay or constant."""
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
    """Clip by global norm, then the rule of `config.optimizer`; vectors (norm scales) are not decayed."""
    return optax.chain(
        optax.clip_by_global_norm(config.grad_clip) if config.grad_clip else optax.identity(),
        rule(config, make_schedule(config, steps)),
    )


def rule(config: OptimConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    """The update of the named optimizer at the learning rates of `rate`."""
    decay = {"weight_decay": config.weight_decay, "mask": matrices}
    if config.optimizer == "lion":
        return optax.lion(rate, b1=config.beta1, b2=config.beta2, **decay)
    if config.optimizer == "muon":
        # optax.contrib.muon decays what goes by Adam, vectors too, by a figure of its own: 0. "Muon is scalable
        # for LLM training" decays everything alike: so here, but for vectors, as with every optimizer.
        direction = muon(
            1.0,
            beta=config.beta1,
            adam_b1=config.beta1,
            adam_b2=config.beta2,
            muon_weight_dimension_numbers=contracted,
            consistent_rms=0.2,  # updates as large as AdamW's, so that learning rates carry over
        )
        return optax.chain(
            direction,
            optax.scale(-1.0),
            optax.add_decayed_weights(**decay),
            optax.scale_by_learning_rate(rate),
        )
    if config.optimizer == "adafactor":
        # optax.adafactor decays the weights by the whole of weight_decay a step, not by its product with the rate.
        return optax.chain(
            optax.scale_by_factored_rms(),
            optax.clip_by_block_rms(1.0),
            optax.add_decayed_weights(**decay),
            optax.scale_by_learning_rate(rate),
        )
    return optax.adamw(rate, b1=config.beta1, b2=config.beta2, **decay)


def matrices(params: Tree) -> dict[str, bool]:
    """Which parameters are more than vectors."""
    return jax.tree.map(lambda p: p.ndim > 1, params)


def contracted(params: Tree) -> dict[str, MuonDimensionNumbers | None]:
    """How Muon takes each parameter as a matrix: the axes that a product sums over, and those it makes.

    None for vectors, and for embeddings and the output projection, whose rows are looked up or compete one by one.
    """
    # optax asks again with what goes by Adam masked out.
    return {name: _contracted(name, getattr(p, "ndim", 0)) for name, p in params.items()}


def _contracted(name: str, ndim: int) -> MuonDimensionNumbers | None:
    if ndim < 2 or not name.startswith("blocks."):
        return None
    if ".attention." in name:
        *_, last = name.split(".")
        return MuonDimensionNumbers((0, 1), 2) if last == "o" else MuonDimensionNumbers(0, (1, 2))
    return MuonDimensionNumbers(ndim - 2, ndim - 1)  # of experts [E, ...] each one is a matrix
