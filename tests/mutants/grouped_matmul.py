"""Faults planted in the grouped matmuls and the mixture of experts."""

from tests.mutants.fault import Mutant, planted

RULE = "keeps_the_rule"
FEW = f"{RULE} and few and float32"
MUTANTS: list[Mutant] = [
    *planted(
        "grouped_matmul/xla",
        "grouped_matmul",
        ("groups start a row late", "return ends - group_sizes, ends", "return ends - group_sizes + 1, ends", RULE),
        ("rows of nobody not zeroed", "return _owned(jax.lax.fori_loop(0, w.shape[0], group, y)[:N], group_sizes)",
         "return jax.lax.fori_loop(0, w.shape[0], group, y)[:N]", f"{RULE} and 63 and float32"),
        ("last group skipped", "fori_loop(0, w.shape[0], group, y)", "fori_loop(0, w.shape[0] - 1, group, y)",
         f"{RULE} and last"),
        ("a last single row skipped", "return end - state[0] > leave", "return end - state[0] > leave + 1",
         f"{RULE} and 63"),
        ("dw takes the next group's rows", "0) for a in (x, dy))", "_rows(a, row, size)) for a in (x, dy))",
         f"{RULE} and 63"),
        ("dw of an empty group not zeroed", "jnp.zeros((x.shape[1], dy.shape[1]), wide)",
         "jnp.ones((x.shape[1], dy.shape[1]), wide)", RULE),
        ("too little room for the last tile", "(0, TILES[-1])", "(0, TILES[0])", RULE),
    ),
    *planted(
        "grouped_matmul/xla",
        "moe",
        ("gradients take the next expert's rows", "0) for a in (x, gate, up, dy))",
         "_rows(a, row, size)) for a in (x, gate, up, dy))", RULE),
        ("dw of an idle expert not zeroed", "zeros = [jnp.zeros(", "zeros = [jnp.ones(", RULE),
        ("silu's slope", "s * (1 + g * (1 - s))", "s * (1 - g * (1 - s))", RULE),
        ("silu is a sigmoid", "h = (jax.nn.silu(g) * u)", "h = (jax.nn.sigmoid(g) * u)", RULE),
        ("dw_up from the gate's side", "dw_up + _dot(x_t, du,", "dw_up + _dot(x_t, dg,", RULE),
        ("dx without the gate's side", " + _dot(dg, gate_e, (1, 1))", "", RULE),
        ("weights of the other choice", "expert_weights.astype(wide)[..., None]",
         "expert_weights[:, ::-1].astype(wide)[..., None]", f"{RULE} and zipf"),
        ("dx of the first choice only", "for j in range(inverse.shape[1])", "for j in range(1)", f"{RULE} and zipf"),
        ("one row: another's weight", "weights.reshape(-1)[r].astype", "weights.reshape(-1)[n].astype", FEW),
        ("one row: the last rows of a matrix skipped", "while M % rows:", "while M % 1:", FEW),
    ),
]  # fmt: skip
