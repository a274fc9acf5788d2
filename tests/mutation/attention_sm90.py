"""Mutants of the Hopper attention kernels, which the tests run in interpret mode."""

from tests.mutation.mutant import Mutant, mutants_of

WINDOW = "test_output_and_residuals_match_float64_without_races[bfloat16-window, gate]"
SOFTCAP = "test_output_and_residuals_match_float64_without_races[bfloat16-full, softcap, head gate]"
NO_KEYS = "test_output_and_residuals_match_float64_without_races[bfloat16-queries without keys]"
MANY_BLOCKS = "test_output_and_residuals_match_float64_without_races[bfloat16-more blocks than stages]"
KV_RANGE = "test_kv_range_covers_visible_blocks_and_its_interior_is_unmasked"
PREPROCESS = "test_bwd_preprocess_matches_autodiff"
GRADIENTS = "test_gradients_match_reference_in_interpret_mode[queries without keys]"
GRADIENTS_WINDOW = "test_gradients_match_reference_in_interpret_mode[window]"
GRADIENTS_SOFTCAP = "test_gradients_match_reference_in_interpret_mode[window, softcap]"
GRADIENTS_D256 = (
    "test_gradients_match_reference_in_interpret_mode[segments]",
    "test_gradients_match_reference_in_interpret_mode[full, large scores]",
)
SCALED_LOSS = "test_float16_takes_the_cotangents_of_a_scaled_loss[D=64]"
SCORES = "test_every_finite_score_counts"
VISITED = "test_blocks_outside_the_visible_range_are_not_visited"
FREE = "in_use = kv_block - start >= stages\n            wait_when(in_use, smem.k_empty, slot)\n            full"

MUTANTS: list[Mutant] = [
    *mutants_of(
        "ops/attention/pallas_sm90/fwd_kernel",
        "attention_sm90_fwd",
        ("window one too wide", "jnp.uint32) < jnp.uint32(config.window)", "jnp.uint32) <= jnp.uint32(config.window)",
         WINDOW),
        ("a query does not see itself", "per_column(column, rows) <= per_row(last_key, columns)",
         "per_column(column, rows) < per_row(last_key, columns)", NO_KEYS),
        ("padded keys are visible", "visible = key < config.S", "visible = key <= config.S", SOFTCAP),
        ("top-left alignment", "(q_start + config.S - config.T - kv_block", "(q_start - kv_block", WINDOW),
        ("the first blocks are not masked", "carry = lax.fori_loop(wg_range.start, wg_range.interior_start, step(block_range.end, masked=True)",
         "carry = lax.fori_loop(wg_range.start, wg_range.interior_start, step(block_range.end, masked=False)", WINDOW),
        ("the last blocks are not masked", "carry = lax.fori_loop(wg_range.interior_end, wg_range.end, step(block_range.end, masked=True)",
         "carry = lax.fori_loop(wg_range.interior_end, wg_range.end, step(block_range.end, masked=False)", NO_KEYS),
        ("sum without decay", "l = l * decay +", "l = l +", WINDOW),
        ("output without decay", "acc = acc * per_row(decay, acc.shape[1])", "acc = acc + 0 * per_row(decay, acc.shape[1])", WINDOW),
        ("gate without sigmoid", "o * jax.nn.sigmoid(gate.astype(jnp.float32))", "o * gate.astype(jnp.float32)", WINDOW),
        ("a head's gate dropped", "acc = acc * per_row(sigmoid_gate, D)", "pass", SOFTCAP),
        ("cap does not restore the size", "config.softcap * LOG2E\n        elif", "LOG2E\n        elif", SOFTCAP),
        ("log-sum-exp without the maximum", "m + jnp.log2(", "jnp.log2(", WINDOW),
        ("no key gives NaN", "jnp.where(sees_no_key, 0.0, 1.0 / jnp.where(sees_no_key, 1.0, l))", "1.0 / l", NO_KEYS),
        ("every head reads the first keys", "kv_head = lax.div(self.head, jnp.int32(self.config.G))",
         "kv_head = self.head * 0", SOFTCAP),
        ("both warpgroups write the same rows",
         "rows = pl.ds(self.q_start + wg * self.sizes.block_q, self.sizes.block_q)\n        return ref.at[self.batch, rows",
         "rows = pl.ds(self.q_start, self.sizes.block_q)\n        return ref.at[self.batch, rows", WINDOW),
        ("values are not waited for", "plgpu.barrier_wait(smem.v_full.at[slot])\n        plgpu.barrier_wait(smem.schedule_barrier.at[wg])\n        acc",
         "plgpu.barrier_wait(smem.schedule_barrier.at[wg])\n        acc", WINDOW),
        ("a stage is filled while in use", FREE, FREE.replace(">=", ">"), MANY_BLOCKS),
    ),
    *mutants_of(
        "ops/attention/pallas_sm90/common",
        "attention_sm90_fwd",
        ("window one key short", "q_start + offset - config.window + 1)", "q_start + offset - config.window + 2)", KV_RANGE),
        ("edge of the window unmasked", "q_end + offset - config.window + block_kv - 1)", "q_end + offset - config.window)",
         KV_RANGE),
        ("diagonal unmasked", "block_of(q_start + offset + 1)", "block_of(q_start + offset + block_kv)", KV_RANGE),
        ("padded queries see keys", "q_end = lax.min(q_start + rows, jnp.int32(config.T))", "q_end = q_start + rows", KV_RANGE),
    ),
    *mutants_of(
        "ops/attention/pallas_sm90/vjp",
        "attention_sm90_fwd",
        ("wrong derivative of the gate", "dgate * (sigmoid_gate * jax.nn.sigmoid(-gate.astype(jnp.float32)))", "dgate * sigmoid_gate", PREPROCESS),
        ("delta from the gated cotangent", "delta = _delta(do_ungated", "delta = _delta(do_f32", PREPROCESS),
        ("a head gate gets the gradient of one element", "dgate = jnp.sum(dgate, axis=-1, keepdims=True)",
         "dgate = dgate[..., :1]", PREPROCESS),
        ("the gate does not reach the kernel", "do_ungated = do_f32 * sigmoid_gate", "do_ungated = do_f32", PREPROCESS),
    ),
    *mutants_of(
        "ops/attention/pallas_sm90/dq_kernel",
        "attention_sm90_bwd",
        ("dq without scale", "scale = self.config.scale", "scale = 1.0", GRADIENTS),
        ("dq without delta", "p * (dp - per_row(delta", "p * (dp - 0 * per_row(delta", GRADIENTS),
    ),
    *mutants_of(
        "ops/attention/pallas_sm90/common",
        "attention_sm90_bwd",
        ("wrong derivative of the cap", "1.0 - t * t", "1.0 - t", GRADIENTS_SOFTCAP),
        ("window one too wide", "[offset < config.window + n", "[offset <= config.window + n", GRADIENTS_WINDOW),
        ("a key does not see its own query", "[offset >= n for n", "[offset > n for n", GRADIENTS),
        ("later queries count as earlier", "range(0, -columns, -8)", "range(0, columns, 8)", GRADIENTS),
        ("all keys of a block count as its first eight", "range(0, columns, 8) if", "[0] * (columns // 8) if", GRADIENTS),
        ("the diagonal is not masked", "all_visible.append(distance >= keys - 1)", "all_visible.append(distance >= 0)", GRADIENTS),
        ("segments by order", "per_row(row_ids, columns) == per_column", "per_row(row_ids, columns) >= per_column", GRADIENTS_D256),
        ("mixed blocks count as one segment", "(block < self.interior_end)", "(block <= self.interior_end)", GRADIENTS_D256),
        ("one key block too few", "(offset - config.window + 1), 0)", "(offset - config.window + 2), 0)", VISITED),
        ("one query block too few", "(config.window - 1 - offset)", "(config.window - 2 - offset)", VISITED),
    ),
    *mutants_of(
        "ops/attention/pallas_sm90/dkv_kernel",
        "attention_sm90_bwd",
        ("dk without scale", "(dk * self.config.scale)", "(dk * 1.0)", GRADIENTS),
        ("dk without delta", "p_slope * (dp - per_column", "p_slope * (dp - 0 * per_column", GRADIENTS),
        ("the first head of a group twice", "+ lax.rem(i, jnp.int32(self.config.G))", "", GRADIENTS),
        ("a stage is filled while in use", "wait_when(i >= sizes.q_stages", "wait_when(i > sizes.q_stages", GRADIENTS),
        ("p is read before it is written", "plgpu.barrier_wait(smem.p_full)", "pass", GRADIENTS_D256),
        ("D=256: dk without delta", "dp = product[...] - per_column(", "dp = product[...] - 0 * per_column(", GRADIENTS_D256),
        ("D=256: dv takes dk's scale", "jnp.where(owns_dv, 1.0, self.config.scale)", "self.config.scale", GRADIENTS_D256),
    ),
    *mutants_of(
        "ops/attention/pallas_sm90/fwd_kernel",
        "attention_sm90_fwd",
        ("scores below -1e30 are dropped", "M_INIT = float(jnp.finfo(jnp.float32).min)", "M_INIT = -1e30", SCORES),
    ),
    *mutants_of(
        "ops/attention/pallas_sm90/bwd",
        "attention_sm90_fwd",
        ("float16 cotangents are not scaled", "if q.dtype == jnp.float16:", "if False:", SCALED_LOSS),
    ),
    *mutants_of(
        "ops/attention/pallas_sm90/dq_kernel",
        "attention_sm90_fwd",
        ("dq stays scaled", "if gmem.unscale is not None:", "if False:", SCALED_LOSS),
    ),
]  # fmt: skip
