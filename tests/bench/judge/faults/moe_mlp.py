"""Classic faults of a mixture of experts, planted in docs/guides/my_moe_mlp.py.

Name -> (text of the file, which occurs once, what replaces it, features of which at least one must be named as wrong).
"""

_ANY = ("top 1", "top 2", "one expert takes all")
_WRITE = "y_ref[...] = jnp.where(mine, y.astype(y_ref.dtype), y_ref[...])"
_MASK = "x, dy = (jnp.where(mine, ref[...], 0) for ref in (x_ref, dy_ref))"
_INIT = "@pl.when((t == 0) | (expert[t] != expert[jnp.maximum(t - 1, 0)]))"
FAULTS = {
    # Routing
    "rows of the choice's number": ("x[order // k]", "x[order % x.shape[0]]", ("top 2",)),
    "rows not sorted": ("x[order // k]", "x[jnp.arange(N * k) // k]", _ANY),
    "outputs not put back": ("outputs[jnp.argsort(order)]", "outputs", _ANY),
    "outputs put back by the same order": ("outputs[jnp.argsort(order)]", "outputs[order]", _ANY),
    "choices by column": (".reshape(N, k, -1)", ".reshape(k, N, -1).swapaxes(0, 1)", ("top 2",)),
    "sizes count the first choice only": (
        "jnp.sum(ids[:, None] == jnp.arange(E)",
        "jnp.sum(expert_ids[:, :1] == jnp.arange(E)",
        ("top 2",),
    ),
    "ids of no expert count as the last one": (
        "ids = expert_ids.reshape(-1)",
        "ids = jnp.minimum(expert_ids, E - 1).reshape(-1)",
        ("ids of no expert", "unseen NaN"),
    ),
    "ids of no expert count as the first one": (
        "ids = expert_ids.reshape(-1)",
        "ids = (expert_ids % E).reshape(-1)",
        ("ids of no expert", "unseen NaN"),
    ),
    "first choice only": ("jnp.sum(by_token *", "jnp.sum(by_token[:, :1] *", ("top 2",)),
    "weights forgotten": (
        "jnp.sum(by_token * expert_weights[:, :, None].astype(jnp.float32), axis=1)",
        "jnp.sum(by_token, axis=1)",
        _ANY,
    ),
    "weights normalized": (
        "expert_weights[:, :, None].astype(jnp.float32), axis=1)",
        "(expert_weights / jnp.sum(expert_weights, axis=1, keepdims=True))[:, :, None], axis=1)",
        _ANY,
    ),
    "weights of the first choice": (
        "expert_weights[:, :, None].astype",
        "expert_weights[:, :1, None].astype",
        ("top 2",),
    ),
    "no gradient of the weights": (
        "expert_weights[:, :, None].astype",
        "jax.lax.stop_gradient(expert_weights)[:, :, None].astype",
        _ANY,
    ),
    "weights rounded to 16 bits": (
        "expert_weights[:, :, None].astype(jnp.float32)",
        "expert_weights[:, :, None].astype(jnp.bfloat16)",
        ("float32",),
    ),
    # Intervals
    "tiles are not cut": (
        "jnp.arange(0, N, ROWS, dtype=jnp.int32), ends",
        "jnp.zeros(pl.cdiv(N, ROWS), jnp.int32), ends",
        ("several tiles",),
    ),
    "starts not sorted": (
        "start = jnp.sort(jnp.concatenate([jnp.arange(0, N, ROWS, dtype=jnp.int32), ends]))",
        "start = jnp.concatenate([jnp.arange(0, N, ROWS, dtype=jnp.int32), ends])",
        ("several tiles",),
    ),
    "intervals one row too long": ("(row < table[1][t])", "(row <= table[1][t])", ("top 1", "top 2")),
    "intervals one row too short": ("(table[0][t] <= row)", "(table[0][t] < row)", _ANY),
    "row index within the tile": ("row = tile_of(t, table, N) * ROWS + jax", "row = jax", ("several tiles",)),
    "tile of the interval's number": (
        "return jnp.minimum(table[0][t], N - 1) // ROWS",
        "return jnp.minimum(t, (N - 1) // ROWS)",
        ("several tiles",),
    ),
    "expert at the end of the interval": ("ends <= start[:, None]", "ends < start[:, None]", ("top 1", "top 2")),
    # Forward
    "matrices of the expert after": (
        "w_spec = pl.BlockSpec((None, M, columns), lambda f, t, *table: (jnp.minimum(table[2][t], E - 1), 0, f))",
        "w_spec = pl.BlockSpec((None, M, columns), lambda f, t, *table: (jnp.minimum(table[2][t] + 1, E - 1), 0, f))",
        ("top 1", "top 2"),
    ),
    "gate and up exchanged": ("[w_gate, w_up], sizes, rows.dtype", "[w_up, w_gate], sizes, rows.dtype", _ANY),
    "sigmoid instead of silu": ("return gate * jax.nn.sigmoid(gate) * up", "return jax.nn.sigmoid(gate) * up", _ANY),
    "gelu instead of silu": ("return gate * jax.nn.sigmoid(gate) * up", "return jax.nn.gelu(gate) * up", _ANY),
    "a shared tile overwrites the expert before": (_WRITE, "y_ref[...] = y.astype(y_ref.dtype)", ("top 1", "top 2")),
    "a shared tile is zero where it is not mine": (
        _WRITE,
        "y_ref[...] = jnp.where(mine, y, 0).astype(y_ref.dtype)",
        ("top 1", "top 2"),
    ),
    "rows of no expert not written": ("y_ref[...] = jnp.where(mine, 0, y_ref[...])", "pass", ("ids of no expert",)),
    "rows of no expert times zero": (
        "y_ref[...] = jnp.where(mine, 0, y_ref[...])",
        "y_ref[...] = jnp.where(mine, (x_ref[...][:, :1] * 0).astype(y_ref.dtype), y_ref[...])",
        ("unseen NaN", "ids of no expert"),
    ),
    "last columns left out": (
        "(pl.cdiv(F, columns), table.start.size),",
        "(max(1, F // columns), table.start.size),",
        ("several tiles of M", "several tiles of F", "odd sizes"),
    ),
    "default precision of float32 products": ("precision=matmul_precision(a, b), ", "", ("float32",)),
    "hidden rows in 16 bits": (
        "multiply_rows(hidden, [w_down], sizes, jnp.float32)",
        "multiply_rows(hidden.astype(jnp.bfloat16).astype(rows.dtype), [w_down], sizes, jnp.float32)",
        ("float32",),
    ),
    "float16 computed in bfloat16": (
        "(array.astype(jnp.float32) for array in (x, w_gate, w_up, w_down))",
        "(array.astype(jnp.bfloat16) for array in (x, w_gate, w_up, w_down))",
        ("float16",),
    ),
    # Backward
    "silu's derivative is the sigmoid": ("dhidden * up * s * (1 + gate * (1 - s))", "dhidden * up * s", _ANY),
    "silu's derivative with a minus": (
        "dhidden * up * s * (1 + gate * (1 - s))",
        "dhidden * up * s * (1 - gate * (1 - s))",
        _ANY,
    ),
    "up's gradient without silu": ("dup = (dhidden * gate * s)", "dup = (dhidden * gate)", _ANY),
    "gradient of the rows through the gate only": (
        "drows += multiply_rows(dup, [w_up.swapaxes(1, 2)], sizes, jnp.float32)",
        "pass",
        _ANY,
    ),
    "gradient of the rows with the other matrix": (
        "multiply_rows(dup, [w_up.swapaxes(1, 2)]",
        "multiply_rows(dup, [w_gate.swapaxes(1, 2)]",
        _ANY,
    ),
    "gate's matrix gets up's gradient": (
        "dw_gate = multiply_columns(rows, dgate, sizes)",
        "dw_gate = multiply_columns(rows, dup, sizes)",
        _ANY,
    ),
    "gradient of w_down before the multiplication by up": (
        "dw_down = multiply_columns(hidden, dy, sizes)",
        "dw_down = multiply_columns((gate * s).astype(dtype), dy, sizes)",
        _ANY,
    ),
    "gradient of an expert without rows not zeroed": (
        "return jnp.where(sizes[:, None, None] > 0, dw, 0)",
        "return dw",
        ("experts without tokens", "top 1", "top 2"),
    ),
    "gradient of an expert without rows times zero": (
        "return jnp.where(sizes[:, None, None] > 0, dw, 0)",
        "return dw * (sizes[:, None, None] > 0).astype(dw.dtype)",
        ("experts without tokens",),
    ),
    "gradient of rows of other experts": (_MASK, "x, dy = x_ref[...], dy_ref[...]", ("top 1", "top 2", "odd sizes")),
    "only the gradient's rows masked": (
        _MASK,
        "x, dy = x_ref[...], jnp.where(mine, dy_ref[...], 0)",
        ("unseen NaN", "one tile", "several tiles"),
    ),
    "gradient not initialized at a new expert": (_INIT, "@pl.when(t == 0)", ("top 1", "top 2")),
    "gradient initialized at every tile": (_INIT, "@pl.when(t >= 0)", ("several tiles",)),
    "gradient accumulated in 16 bits": (
        "acc_ref[...] += dot(x, dy, 0)",
        "acc_ref[...] = (acc_ref[...] + dot(x, dy, 0)).astype(jnp.bfloat16).astype(jnp.float32)",
        ("float32",),
    ),
}
