"""Faults planted in the decoding kernels."""

from tests.mutants.fault import Mutant, planted

RULE = "keeps_the_rule"
MUTANTS: list[Mutant] = [
    *planted(
        "decode/xla",
        "decode",
        ("ring does not wrap", "slot = cache.length % C", "slot = jnp.minimum(cache.length, C - 1)", "into_its_slot"),
        ("scatter is a slot off", ":, slot].set(", ":, slot - 1].set(", "any_ring or into_its_slot"),
        ("ages shifted by one", "(cache.length[:, None] - jnp", "(cache.length[:, None] + 1 - jnp", RULE),
        ("window dropped", "limit = C if window is None else min(C, window)", "limit = C",
         f"{RULE} and window and float32"),
        ("window one too wide", "min(C, window)", "min(C, window + 1)", f"{RULE} and window and float32"),
        ("new token unseen", "(cache.length[:, None] + 1, limit)", "(cache.length[:, None], limit)", RULE),
        ("empty slots count", "(seen[:, :, None], scores, -jnp.inf)", "(seen[:, :, None], scores, 0.0)", RULE),
        ("scale dropped", "scores = scores * scale", "pass", RULE),
        ("cap does not restore the size", "softcap * jnp.tanh(", "jnp.tanh(", f"{RULE} and cap and float32"),
        ("gate dropped", "o = o * jax.nn.sigmoid(gate.astype(jnp.float32))", "pass", f"{RULE} and gate and float32"),
        ("empty values not cleared", "jnp.where(seen[..., None], values, 0).astype", "values.astype", "empty_slots"),
        ("new value not kept", "put(cache.v, v, slot)", "cache.v", "into_its_slot"),
        ("length not incremented", "values, cache.length + 1)", "values, cache.length)", "into_its_slot"),
    ),
    *planted(
        "decode/visits",
        "decode_pallas",
        ("the query sees a token too many", "minimum(length + 1, limit), length", "minimum(length + 2, limit), length",
         "visits"),
        ("a wrapped ring misses a block", "blocks - first + last + 1)", "blocks - first + last)", "visits"),
        ("steps do not wrap", "(ends - each)[sequence]) % blocks", "(ends - each)[sequence])", "visits"),
        ("too few steps where the ring ends in a block", " + (slots % block > 0)", "", "visits"),
    ),
    *planted(
        "decode/mosaic_tpu",
        "decode_pallas",
        ("the new token is not seen", 'refs["new v"][0].astype(jnp', '0 * refs["new v"][0].astype(jnp', "formula"),
        ("the token it replaces is seen", "where(at < slot, slot - at,", "where(at <= slot, slot - at,", "formula"),
        ("the sum forgets the decay", 'decay * refs["l"][head] +', 'refs["l"][head] +', "formula"),
        ("the output forgets the decay", 'decay * refs["acc"][head] +', 'refs["acc"][head] +', "formula"),
        ("values of empty slots count", "v = jnp.where(old((static.block, 1)), v, 0)", "pass", "formula"),
        ("a partial block is seen twice", " & (at >= first)", "", "formula"),
        ("whole blocks begin too early", " | (oldest % static.block == 0)", " | True", "appends"),
        ("the tile leaves without its token", "jnp.where(row == slot, refs", "jnp.where(row < 0, refs", "appends"),
    ),
]  # fmt: skip
