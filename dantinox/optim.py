"""AdamW with a schedule, clipping and decay on matrices only, from optax."""

import jax
import optax

from dantinox.config import OptimConfig


def schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate of each step: a linear warm-up, then cosine, warm-up-stable-decay or constant."""
    warmup = min(round(config.warmup * steps), steps - 1)
    rest, floor = max(1, steps - warmup), config.lr * config.min_lr
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(config.lr, rest, alpha=config.min_lr)
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


def optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW; vectors (norm scales) are not decayed."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip) if config.clip else optax.identity(),
        optax.adamw(
            schedule(config, steps),
            b1=config.beta1,
            b2=config.beta2,
            weight_decay=config.weight_decay,
            mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
        ),
    )
