"""Mutants of the Triton grouped matmul and mixture of experts, which the tests run in Triton's interpreter."""

from tests.mutation.mutant import Mutant, mutants_of

FEATURES = "test_checks_hold[features]"
DTYPES = "test_checks_hold[dtypes]"
HIDDEN = "test_checks_hold[hidden values]"
NUMBERS = "test_checks_hold[numbers]"
SUITE, MOE = "grouped_matmul_triton", "moe_triton"

MUTANTS: list[Mutant] = [
    *mutants_of(
        "ops/grouped_matmul/triton/common",
        SUITE,
        ("tiles start at multiples of their size", "align=1", "align=block_n", FEATURES),
        ("tiles without rows write", "jnp.where(in_use, metadata.row_end, 0)", "metadata.row_end", FEATURES),
        ("unassigned rows are multiplied", "tl.where((e < E) & (first < end), K, 0)", "K", FEATURES),
        ("the first group's matrix", "tl.minimum(e, E - 1)", "tl.minimum(e, 0)", FEATURES),
        ("the end of the next tile", "tl.load(tiles + 2 * TILES + tile)", "tl.load(tiles + 2 * TILES + tile + 1)", FEATURES),
        ("rows past the end are read", "tl.minimum(n, N - 1)", "n", FEATURES),
        ("rows of w past the end are read", "tl.minimum(j, J - 1)", "j", FEATURES),
        ("summands past K count", "start + k < K", "start + k >= 0", FEATURES),
        ("operands are not rounded", "return round_operand(tile, PRECISION)", "return tile", DTYPES),
        ("the last summands only", "w_tile, acc, input_precision", "w_tile, input_precision", FEATURES),
        ("summands of w stay the first", "w_pointers += BLOCK_K * J", "pass", FEATURES),
        ("summands of x stay the first", "x_pointers += BLOCK_K", "pass", FEATURES),
        ("rows of the next group are stored", "(n < end)[:, None]", "(n >= 0)[:, None]", FEATURES),
        ("columns past J are stored", "(n < end)[:, None] & (j < J)[None, :]", "(n < end)[:, None] & (j >= 0)[None, :]", FEATURES),
    ),
    *mutants_of(
        "ops/grouped_matmul/triton/gmm",
        SUITE,
        ("every group has the first matrix", "w + e * K * J", "w", FEATURES),
        ("every block has the first columns", "j_block * BLOCK_J + tl.arange(0, BLOCK_J)", "tl.arange(0, BLOCK_J)", FEATURES),
        ("every tile has the first rows", "n = first + tl.arange(0, BLOCK_N)", "n = tl.arange(0, BLOCK_N)", FEATURES),
    ),
    *mutants_of(
        "ops/grouped_matmul/triton/gmm",
        MOE,
        ("one pair of two", "if PAIRS == 2:", "if PAIRS == 3:", FEATURES),
        ("the first rows in both pairs", "add_products(acc, second_x, second,", "add_products(acc, x, second,", FEATURES),
        ("no weights of rows", "WEIGHTED=row_weights is not None", "WEIGHTED=False", FEATURES),
        ("weights of the first row", "row_weights + n,", "row_weights + n * 0,", FEATURES),
    ),
    *mutants_of(
        "ops/grouped_matmul/triton/tgmm",
        SUITE,
        ("rows of other groups count", "start + tl.arange(0, BLOCK_N) < end", "start + tl.arange(0, BLOCK_N) >= 0", FEATURES),
        ("x of other groups counts", "x_pointers, in_group, m < M, True,", "x_pointers, in_group, m < M, False,", FEATURES),
        ("dy of other groups counts", "dy_pointers, in_group, f < F, True,", "dy_pointers, in_group, f < F, False,", FEATURES),
        ("the last rows only", "dy_tile, acc, input_precision", "dy_tile, input_precision", FEATURES),
        ("groups start at the first row", "tl.load(ends + e), tl.load(ends + e + 1)", "0, tl.load(ends + e + 1)", FEATURES),
        ("one dw", "dw + e.to(tl.int64) * M * F", "dw", FEATURES),
        ("rows of dy stay the first", "dy_pointers += BLOCK_N * F", "pass", FEATURES),
        ("rows of x stay the first", "x_pointers += BLOCK_N * M", "pass", FEATURES),
        ("columns of x are the first", "m_block * BLOCK_M + tl.arange(0, BLOCK_M)", "tl.arange(0, BLOCK_M)", FEATURES),
        ("columns of dy are the first", "f_block * BLOCK_F + tl.arange(0, BLOCK_F)", "tl.arange(0, BLOCK_F)", FEATURES),
    ),
    *mutants_of(
        "ops/grouped_matmul/triton/vjp",
        SUITE,
        ("the matmul precision is ignored", "float32_precision(), capability", '"tf32", capability', FEATURES),
        ("dw of swapped rows", "(x, dy, group_sizes), None", "(dy, x, group_sizes), None", FEATURES),
    ),
    *mutants_of(
        "ops/moe/triton/swiglu",
        MOE,
        ("no limit of the gate", "tl.where(gate > LIMIT, LIMIT, gate)", "gate", FEATURES),
        ("no lower limit of up", "tl.where(up < -LIMIT, -LIMIT, up)", "up", FEATURES),
        ("a gate beyond its limit has a gradient", "tl.where(gate > LIMIT, 0.0, dgate)", "dgate", FEATURES),
        ("up below its limit has a gradient", "tl.abs(up) > LIMIT", "up > LIMIT", FEATURES),
        ("no alpha", "tl.sigmoid(ALPHA * gate)", "tl.sigmoid(gate)", FEATURES),
        ("no sigmoid", "gate * tl.sigmoid(gate) * up", "gate * up", HIDDEN),
        ("silu has the derivative sigmoid", "sigmoid_gate * (1.0 + gate * (1.0 - sigmoid_gate))", "sigmoid_gate", HIDDEN),
        ("a large gate loses its derivative", "1.0 + gate * (1.0 - sigmoid_gate)", "1.0 + gate - silu", NUMBERS),
    ),
    *mutants_of(
        "ops/moe/triton/up_proj",
        MOE,
        ("no bias of the gate", "if GATE_BIAS:", "if False:", FEATURES),
        ("no bias of up", "if UP_BIAS:", "if False:", FEATURES),
        ("residuals are not stored", "if SAVE:", "if False:", FEATURES),
        ("gate and up change places", "swiglu(acc_gate, acc_up,", "swiglu(acc_up, acc_gate,", FEATURES),
        ("up has the gate's matrix", "w_gate + w_offsets, w_up + w_offsets", "w_gate + w_offsets, w_gate + w_offsets", FEATURES),
        ("every expert has the first matrices", "e * K * J + (k[:, None] * J + j[None, :])", "(k[:, None] * J + j[None, :])", FEATURES),
    ),
    *mutants_of(
        "ops/moe/triton/down_proj_bwd",
        MOE,
        ("dp of the first columns", "jnp.sum(dp_parts, axis=0)", "dp_parts[0]", FEATURES),
        ("dp has the weight", "dh * h, 0.0", "dh * weighted_h_tile, 0.0", FEATURES),
        ("up is read as the gate", "tl.load(up + offsets", "tl.load(gate + offsets", FEATURES),
        ("weights of the first row", "router_weights + n,", "router_weights + n * 0,", FEATURES),
    ),
    *mutants_of(
        "ops/moe/triton/vjp",
        MOE,
        ("dx of the gate only", "(dgate, dup), (w_gate, w_up), group_sizes", "(dgate,), (w_gate,), group_sizes", FEATURES),
        ("float16 stays", "@widen_float16", "", NUMBERS),
        ("a second derivative names Pallas", 'TritonExpertsKernels(current_config()), "triton"', "TritonExpertsKernels(current_config())", NUMBERS),
    ),
]  # fmt: skip
