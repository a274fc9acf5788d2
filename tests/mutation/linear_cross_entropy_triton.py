"""Mutants of the Triton linear cross-entropy, which the tests run in Triton's interpreter."""

from tests.mutation.mutant import Mutant, mutants_of

FEATURES = "test_checks_hold[features]"
DTYPES = "test_checks_hold[dtypes]"
SUITE = "linear_cross_entropy_triton"

MUTANTS: list[Mutant] = [
    *mutants_of(
        "ops/linear_cross_entropy/common",
        SUITE,
        ("sums of splits are not rescaled", "totals * jnp.exp(maxima - row_max[None])", "totals", FEATURES),
        ("the maximum of the first split", "jnp.max(maxima, axis=0)", "maxima[0]", FEATURES),
        ("the target of the first split", "jnp.sum(target_logits, axis=0)", "target_logits[0]", FEATURES),
        ("z-loss of the lse", "z_loss * lse * lse", "z_loss * lse", FEATURES),
        ("loss of a row without part", "jnp.where(targets >= 0, loss, 0)", "loss", FEATURES),
        ("targets of the first chunk in every chunk", "targets - start", "targets", FEATURES),
        ("dh of the last chunk only", "dh += jnp.matmul(", "dh = jnp.matmul(", FEATURES),
        ("the rest is skipped", "if rest:", "if False:", FEATURES),
        ("the first chunk is skipped", "np.int32(0), np.int32(num_chunks)", "np.int32(1), np.int32(num_chunks)", FEATURES),
        ("dw at the first words", "dw_chunk, start, 0)", "dw_chunk, 0, 0)", FEATURES),
        ("gradients of logits in float16", "jnp.dtype(jnp.float32) if dtype == jnp.float16 else dtype", "dtype", DTYPES),
        ("half a gradient of the z-loss", "1 + 2 * z_loss", "1 + z_loss", FEATURES),
    ),
    *mutants_of(
        "triton_math",
        SUITE,
        ("every group has the first rows", "group_start + index % blocks", "index % blocks", FEATURES),
        ("the last group is a whole one", "tl.minimum(ROW_BLOCKS - group_start, GROUP_BLOCKS)", "GROUP_BLOCKS", FEATURES),
    ),
    *mutants_of(
        "ops/linear_cross_entropy/triton/common",
        SUITE,
        ("columns past M count", "(start + m < M)[None, :]", "(start + m >= 0)[None, :]", FEATURES),
        ("rows past the end are read", "tl.minimum(n, N - 1)", "n", FEATURES),
        ("words past the end are read", "tl.minimum(v, V - 1)", "v", FEATURES),
        ("w is not rounded", "round_operand(w_tile, PRECISION)", "w_tile", DTYPES),
        ("h is not rounded", "round_operand(h_tile, PRECISION)", "h_tile", DTYPES),
        ("products of the last columns only", "tl.trans(w_tile), s, input_precision", "tl.trans(w_tile), input_precision", FEATURES),
        ("columns of w stay the first", "w_pointers += BLOCK_M", "pass", FEATURES),
        ("logits times log2(e)", "config.softcap, unit=1.0", "config.softcap", FEATURES),
    ),
    *mutants_of(
        "ops/linear_cross_entropy/triton/fwd",
        SUITE,
        ("words past the vocabulary count", 'tl.where((v < V)[None, :], s, float("-inf"))', "s", FEATURES),
        ("the sum is not rescaled", "l * tl.exp(m - new_m)", "l", FEATURES),
        ("a tile's maximum is its own", "tl.maximum(m, tl.max(s, axis=1))", "tl.max(s, axis=1)", FEATURES),
        ("the last tile's target only", "s_target += tl.sum(", "s_target = tl.sum(", FEATURES),
        ("a target is the next word", "v[None, :] == target[:, None]", "v[None, :] == target[:, None] + 1", FEATURES),
        ("every split starts at the first word", "tl.range(split * SPLIT,", "tl.range(0,", FEATURES),
        ("one split of the results", "split.to(tl.int64) * N + n", "n", FEATURES),
        ("large caps use log2(e)", "CAPPED, UNIT=1.0", "CAPPED", FEATURES),
    ),
    *mutants_of(
        "ops/linear_cross_entropy/triton/bwd",
        SUITE,
        ("the target's gradient is added", "gradient -= tl.where(", "gradient += tl.where(", FEATURES),
        ("a target is the next word", "v[None, :] == target[:, None]", "v[None, :] == target[:, None] + 1", FEATURES),
        ("no derivative of the soft cap", "gradient *= cap_derivative(s, INVERSE)", "pass", FEATURES),
        ("large caps use log2(e)", "CAPPED, UNIT=1.0", "CAPPED", FEATURES),
        ("words past the chunk are stored", "is_row[:, None] & (v < V)[None, :]", "is_row[:, None] & (v >= 0)[None, :]", FEATURES),
        ("rows past the end are stored", "is_row[:, None] & (v < V)[None, :]", "(n >= 0)[:, None] & (v < V)[None, :]", FEATURES),
    ),
    *mutants_of(
        "ops/linear_cross_entropy/triton/vjp",
        SUITE,
        ("NaN of a row without part", "h = jnp.where((targets >= 0)[:, None], h, jnp.zeros_like(h))", "pass", FEATURES),
        ("cotangent of a row without part", "dloss = jnp.where(targets >= 0, dloss, 0)", "pass", FEATURES),
        ("weights are not normalized", "dlse / total", "dlse", FEATURES),
        ("the matmul precision is ignored", "float32_precision(), capability", '"tf32", capability', FEATURES),
    ),
    *mutants_of(
        "triton_call",
        SUITE,
        ("a second derivative comes out", 'return first_order(call, op, "triton")', "return call", DTYPES),
    ),
]  # fmt: skip
