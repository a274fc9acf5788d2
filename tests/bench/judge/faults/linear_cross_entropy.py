"""Classic faults of a linear cross-entropy, planted in docs/guides/my_linear_cross_entropy.py.

Name -> (text of the file, which occurs once, what replaces it, features of which at least one must be named as wrong).
"""

_ANY = ("one tile", "several tiles of N", "several tiles of V", "odd sizes")
_ABSENT = ("rows without part", "no row takes part", "unseen NaN")
_EDGES = ("several tiles of V", "odd sizes", "one tile")
_MASK = "s = jnp.where(word < V, s, -jnp.inf)"
_INIT = "@pl.when(v == 0)"
_SUM = "decay * sum_ref[...] + jnp.sum(jnp.exp(s - row_max)"
_CAP = "softcap * jnp.tanh(s / softcap), word"
FAULTS = {
    # Rows without part
    "NaN of a row without part": ("h = jnp.where((targets >= 0)[:, None], h, 0)", "h = h + 0", ("unseen NaN",)),
    "loss of a row without part": ("return jnp.where(targets >= 0, loss, 0)[:, 0]", "return loss[:, 0]", _ABSENT),
    # The sum of exponentials
    "words past the end count": (_MASK, "s = jnp.where(word < V + 1, s, -jnp.inf)", _EDGES),
    "last word forgotten": (_MASK, "s = jnp.where(word < V - 1, s, -jnp.inf)", _ANY),
    "words counted within their tile": ("    word = v * WORDS + jax", "    word = jax", ("several tiles of V",)),
    "state of the rows before": (_INIT, "@pl.when((v == 0) & (pl.program_id(0) == 0))", ("several tiles of N",)),
    "state starts in every tile": (_INIT, "@pl.when(v >= 0)", ("several tiles of V",)),
    "sum not rescaled": (_SUM, "sum_ref[...] + jnp.sum(jnp.exp(s - row_max)", ("several tiles of V",)),
    "sum of the last tile": (_SUM, "jnp.sum(jnp.exp(s - row_max)", ("several tiles of V",)),
    "last partial tile left out": (
        "        (N // ROWS, pl.cdiv(V, WORDS)),\n",
        "        (N // ROWS, max(1, V // WORDS)),\n",
        ("several tiles of V", "odd sizes"),
    ),
    # The target
    "target of the last tile": (
        "logit_ref[...] += jnp.sum(",
        "logit_ref[...] = jnp.sum(",
        ("several tiles of V",),
    ),
    "target one too high": (
        "jnp.where(word == target_ref[...], s, 0)",
        "jnp.where(word == target_ref[...] + 1, s, 0)",
        _ANY,
    ),
    "gradient of the next word": (
        "jnp.where(word == target_ref[...], dloss_ref[...], 0)",
        "jnp.where(word == target_ref[...] + 1, dloss_ref[...], 0)",
        _ANY,
    ),
    "gradient of the target added": ("weight_ref[...] - jnp.where(", "weight_ref[...] + jnp.where(", _ANY),
    # z-loss
    "z-loss of the logsumexp": ("z_loss * lse * lse", "z_loss * lse", ("z-loss",)),
    "z-loss has no gradient": (
        "dlse = (1 + 2 * z_loss * (row_max + jnp.log(total))) * dloss",
        "dlse = dloss",
        ("z-loss",),
    ),
    "half a gradient of the z-loss": ("(1 + 2 * z_loss *", "(1 + z_loss *", ("z-loss",)),
    "z-loss in the target's gradient": ("dlse / total, dloss)", "dlse / total, dlse)", ("z-loss",)),
    "weights not normalized": ("dlse / total, dloss)", "dlse, dloss)", _ANY),
    # The soft cap
    "no soft cap": ("return s if softcap is None else " + _CAP, "return s, word", ("soft cap",)),
    "soft cap of 1": (_CAP, "jnp.tanh(s / softcap), word", ("soft cap",)),
    "soft cap has no derivative": ("ds *= 1 - (s / softcap) ** 2", "pass", ("soft cap",)),
    "derivative of a cap of 1": ("1 - (s / softcap) ** 2", "1 - s**2", ("soft cap",)),
    # The gradients' sums
    "gradients past the end": ("ds = jnp.where(word < V, ds, 0)", "ds = jnp.where(word < V + WORDS, ds, 0)", _EDGES),
    "NaN past the end": ("w = jnp.where(row_word < V, w_ref[...], 0)", "w = w_ref[...]", _EDGES),
    "sum of the rows or words before": (
        "@pl.when(step == 0)",
        "@pl.when((step == 0) & (pl.program_id(0) == 0))",
        ("several tiles of N", "several tiles of V"),
    ),
    "gradient after the first tile": (
        "@pl.when(step == pl.num_programs(1) - 1)",
        "@pl.when(step == 0)",
        ("several tiles of N", "several tiles of V"),
    ),
    "dw of other words": (
        'pl.program_id(1 if of == "dh" else 0), pl',
        "pl.program_id(1), pl",
        ("several tiles of N", "several tiles of V"),
    ),
    "gradients without the last partial tile": (
        "n_v(N // ROWS, pl.cdiv(V, WORDS))",
        "n_v(N // ROWS, max(1, V // WORDS))",
        ("several tiles of V", "odd sizes"),
    ),
    "words of the first tile": ("(n_v(*step)[1], 0)", "(n_v(*step)[1] * 0, 0)", ("several tiles of V",)),
}
