"""Classic faults of a grouped matmul, planted in docs/guides/my_grouped_matmul.py.

Name -> (text of the file, which occurs once, what replaces it, features of which at least one must be named as wrong).
"""

_ANY = ("uniform groups", "uneven groups", "one group")
FAULTS = {
    # Intervals
    "first group starts at its size": (
        "ends = jnp.cumsum(group_sizes).astype(jnp.int32)",
        "ends = (jnp.cumsum(group_sizes) - group_sizes).astype(jnp.int32)",
        _ANY,
    ),
    "group by the end of the interval": (
        "ends <= start[:, None]",
        "ends < start[:, None]",
        ("uniform groups", "uneven groups"),
    ),
    "groups are not cut": (
        "start = jnp.sort(jnp.concatenate([tiles, ends]))",
        "start = jnp.sort(jnp.concatenate([tiles, ends // ROWS * ROWS]))",
        ("uniform groups", "uneven groups"),
    ),
    "starts not sorted": (
        "start = jnp.sort(jnp.concatenate([tiles, ends]))",
        "start = jnp.concatenate([tiles, ends])",
        ("uneven groups", "several tiles"),
    ),
    "tiles are not cut": (
        "tiles = jnp.arange(0, N, ROWS, dtype=jnp.int32)",
        "tiles = jnp.zeros(pl.cdiv(N, ROWS), jnp.int32)",
        ("several tiles",),
    ),
    "last partial tile left out": (
        "tiles = jnp.arange(0, N, ROWS, dtype=jnp.int32)",
        "tiles = jnp.arange(0, max(ROWS, N // ROWS * ROWS), ROWS, dtype=jnp.int32)",
        ("several tiles",),
    ),
    "last interval ends at the sum": (
        "end = jnp.append(start[1:], N).astype(jnp.int32)",
        "end = jnp.minimum(jnp.append(start[1:], N), ends[-1]).astype(jnp.int32)",
        ("rows past the sum",),
    ),
    "intervals one row too long": (
        "(row < table.end[t])",
        "(row <= table.end[t])",
        ("uniform groups", "uneven groups", "rows past the sum"),
    ),
    "intervals one row too short": ("(table.start[t] <= row)", "(table.start[t] < row)", _ANY),
    "row index within the tile": (
        "row = tile_of(t, table, N) * ROWS + jax",
        "row = jax",
        ("several tiles",),
    ),
    "output tile of another group": (
        "(jnp.minimum(table[2][t], E - 1), 0, f)),",
        "(jnp.minimum(table[2][t] + 1, E - 1), 0, f)),",
        ("uniform groups", "uneven groups"),
    ),
    "tile of the interval's number": (
        "return jnp.minimum(table.start[t], N - 1) // ROWS",
        "return jnp.minimum(t, (N - 1) // ROWS)",
        ("several tiles", "uneven groups"),
    ),
    # y and dx
    "a shared tile overwrites the group before": (
        "y_ref[...] = jnp.where(mine, dot(x_ref[...], w_ref[...], 1).astype(y_ref.dtype), y_ref[...])",
        "y_ref[...] = dot(x_ref[...], w_ref[...], 1).astype(y_ref.dtype)",
        ("uniform groups", "uneven groups"),
    ),
    "a shared tile is zero where it is not mine": (
        "dot(x_ref[...], w_ref[...], 1).astype(y_ref.dtype), y_ref[...])",
        "dot(x_ref[...], w_ref[...], 1).astype(y_ref.dtype), 0)",
        ("uniform groups", "uneven groups"),
    ),
    "a shared tile adds": (
        "y_ref[...] = jnp.where(mine, dot(x_ref[...], w_ref[...], 1).astype(y_ref.dtype), y_ref[...])",
        "y_ref[...] += jnp.where(mine, dot(x_ref[...], w_ref[...], 1).astype(y_ref.dtype), 0)",
        _ANY,
    ),
    "rows past the sum not written": ("y_ref[...] = jnp.where(mine, 0, y_ref[...])", "pass", ("rows past the sum",)),
    "rows past the sum multiplied by the last matrix": (
        "@pl.when(group[t] == E)\n    def rows_past_the_sum():\n        y_ref[...] = jnp.where(mine, 0, y_ref[...])",
        "@pl.when(group[t] == E)\n    def rows_past_the_sum():\n"
        "        y_ref[...] = jnp.where(mine, dot(x_ref[...], w_ref[...], 1).astype(y_ref.dtype), y_ref[...])",
        ("rows past the sum",),
    ),
    "rows past the sum times zero": (
        "y_ref[...] = jnp.where(mine, 0, y_ref[...])",
        "y_ref[...] = jnp.where(mine, (x_ref[...][:, :1] * 0).astype(y_ref.dtype), y_ref[...])",
        ("unseen NaN",),
    ),
    "last columns left out": (
        "grid=(pl.cdiv(F, columns), table.start.size),",
        "grid=(max(1, F // columns), table.start.size),",
        ("several tiles of F", "odd sizes"),
    ),
    "default precision of float32 products": ("precision=matmul_precision(a, b), ", "", ("float32",)),
    "operands rounded to 16 bits": (
        "dims = (((contract,), (0,)), ((), ()))",
        "dims = (((contract,), (0,)), ((), ()))\n    a = a.astype(jnp.bfloat16).astype(a.dtype)",
        ("float32",),
    ),
    "float16 computed in bfloat16": (
        "product(x.astype(jnp.float32), w.astype(jnp.float32), group_sizes)",
        "product(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16), group_sizes)",
        ("float16",),
    ),
    "dx with the matrix as it is": (
        "multiply_rows(dy, w.swapaxes(1, 2), group_sizes)",
        "multiply_rows(dy, w.reshape(w.shape[0], w.shape[2], w.shape[1]), group_sizes)",
        _ANY,
    ),
    "dx in float16 range": (
        "return multiply_rows(dy, w.swapaxes(1, 2), group_sizes), multiply",
        "return multiply_rows(dy, w.swapaxes(1, 2), group_sizes).astype(jnp.bfloat16).astype(x.dtype), multiply",
        ("float32",),
    ),
    # dw
    "empty group's dw not zeroed": (
        "return jnp.where(group_sizes[:, None, None] > 0, dw, 0)",
        "return dw",
        ("empty groups",),
    ),
    "empty group's dw times zero": (
        "return jnp.where(group_sizes[:, None, None] > 0, dw, 0)",
        "return dw * (group_sizes[:, None, None] > 0).astype(dw.dtype)",
        ("empty groups",),
    ),
    "dw of rows of other groups": (
        "x, dy = (jnp.where(mine, ref[...], 0) for ref in (x_ref, dy_ref))",
        "x, dy = x_ref[...], dy_ref[...]",
        ("uniform groups", "uneven groups", "odd sizes"),
    ),
    "dw masks x only": (
        "x, dy = (jnp.where(mine, ref[...], 0) for ref in (x_ref, dy_ref))",
        "x, dy = jnp.where(mine, x_ref[...], 0), dy_ref[...]",
        ("odd sizes", "several tiles", "one tile"),
    ),
    "dw masks dy only": (
        "x, dy = (jnp.where(mine, ref[...], 0) for ref in (x_ref, dy_ref))",
        "x, dy = x_ref[...], jnp.where(mine, dy_ref[...], 0)",
        ("unseen NaN", "odd sizes", "several tiles", "one tile"),
    ),
    "dw not initialized at a new group": (
        "@pl.when((t == 0) | (group[t] != group[jnp.maximum(t - 1, 0)]))",
        "@pl.when(t == 0)",
        ("uniform groups", "uneven groups"),
    ),
    "dw initialized at every tile": (
        "@pl.when((t == 0) | (group[t] != group[jnp.maximum(t - 1, 0)]))",
        "@pl.when(t >= 0)",
        ("several tiles",),
    ),
    "dw not initialized": (
        "@pl.when((t == 0) | (group[t] != group[jnp.maximum(t - 1, 0)]))",
        "@pl.when((t > 0) & (group[t] != group[jnp.maximum(t - 1, 0)]))",
        _ANY,
    ),
    "dw accumulated in 16 bits": (
        "acc_ref[...] += dot(x, dy, 0)",
        "acc_ref[...] = (acc_ref[...] + dot(x, dy, 0)).astype(jnp.bfloat16).astype(jnp.float32)",
        ("float32",),
    ),
    "dw written by the group after": (
        "(None, m_tile, f_tile), lambda m, f, t, *table: (jnp.minimum(table[2][t], E - 1), m, f)",
        "(None, m_tile, f_tile), lambda m, f, t, *table: (jnp.minimum(table[2][t] + 1, E - 1), m, f)",
        ("uniform groups", "uneven groups"),
    ),
    "dw of the tile of the interval's number": (
        "pl.BlockSpec((ROWS, f_tile), lambda m, f, t, *table: (tile(t, table), f)),",
        "pl.BlockSpec((ROWS, f_tile), lambda m, f, t, *table: (jnp.minimum(t, (N - 1) // ROWS), f)),",
        ("uniform groups", "uneven groups"),
    ),
    "dw of the first columns of x": (
        "pl.BlockSpec((ROWS, m_tile), lambda m, f, t, *table: (tile(t, table), m)),",
        "pl.BlockSpec((ROWS, m_tile), lambda m, f, t, *table: (tile(t, table), 0)),",
        ("several tiles of M",),
    ),
}
