"""Faults planted in Hopper's attention, which the tests run interpreted."""

from tests.mutation.mutant import Mutant, planted

FORMULA = "residuals"  # of the forward kernel, at head dims of 64, 128 and 256
WINDOWED, CAPPED, BLIND = (f"{FORMULA} and {D} and bfloat16" for D in ("True-70", "head-2", "200-65"))
TURNS = f"slow and {FORMULA} and 600-1000 and bfloat16"  # more key tiles than a ring has stages
GRADIENTS = "test_gradients_match_reference_in_interpret_mode"
PLAIN, WIDE = f"{GRADIENTS} and T200-S70", f"{GRADIENTS} and D256"
FREE = "in_use = kv_block - start >= stages\n            wait_when(in_use, smem.k_empty, slot)\n            full"
MUTANTS: list[Mutant] = [
    *planted(
        "ops/attention/pallas_sm90/fwd_kernel",
        "hopper",
        ("window one too wide", "jnp.uint32) < jnp.uint32(config.window)", "jnp.uint32) <= jnp.uint32(config.window)",
         WINDOWED),
        ("a query does not see itself", "per_column(column, rows) <= per_row(last, columns)",
         "per_column(column, rows) < per_row(last, columns)", BLIND),
        ("padded keys are seen", "visible = key < config.S", "visible = key <= config.S", CAPPED),
        ("top-left alignment", "(q_start + config.S - config.T - kv_block", "(q_start - kv_block", WINDOWED),
        ("the first tiles need no mask", "carry = lax.fori_loop(own.start, own.interior_start, step(block.end, masked=True)",
         "carry = lax.fori_loop(own.start, own.interior_start, step(block.end, masked=False)", WINDOWED),
        ("the last tiles need no mask", "carry = lax.fori_loop(own.interior_end, own.end, step(block.end, masked=True)",
         "carry = lax.fori_loop(own.interior_end, own.end, step(block.end, masked=False)", BLIND),
        ("sum without decay", "l = l * decay +", "l = l +", WINDOWED),
        ("output without decay", "acc = acc * per_row(decay, acc.shape[1])", "acc = acc + 0 * per_row(decay, acc.shape[1])", WINDOWED),
        ("gate without sigmoid", "o * jax.nn.sigmoid(gate.astype(jnp.float32))", "o * gate.astype(jnp.float32)", WINDOWED),
        ("a head's gate dropped", "acc = acc * per_row(sigmoid_gate, D)", "pass", CAPPED),
        ("cap does not restore the size", "config.softcap * LOG2E\n        elif", "LOG2E\n        elif", CAPPED),
        ("log-sum-exp without the largest", "m + jnp.log2(", "jnp.log2(", WINDOWED),
        ("no key gives NaN", "jnp.where(sees_no_key, 0.0, 1.0 / jnp.where(sees_no_key, 1.0, l))", "1.0 / l", BLIND),
        ("every head reads the first keys", "kv_head = lax.div(self.head, jnp.int32(self.config.G))",
         "kv_head = self.head * 0", CAPPED),
        ("both warpgroups write one tile",
         "rows = pl.ds(self.q_start + wg * self.sizes.block_q, self.sizes.block_q)\n        return ref.at[self.batch, rows",
         "rows = pl.ds(self.q_start, self.sizes.block_q)\n        return ref.at[self.batch, rows", WINDOWED),
        ("values are not waited for", "plgpu.barrier_wait(smem.v_full.at[slot])\n        plgpu.barrier_wait(smem.schedule_barrier.at[wg])\n        acc",
         "plgpu.barrier_wait(smem.schedule_barrier.at[wg])\n        acc", WINDOWED),
        ("a stage is filled while in use", FREE, FREE.replace(">=", ">"), TURNS),
    ),
    *planted(
        "ops/attention/pallas_sm90/common",
        "hopper",
        ("window a key short", "q_start + offset - config.window + 1)", "q_start + offset - config.window + 2)", "kv_range"),
        ("edge of the window unmasked", "q_end + offset - config.window + block_kv - 1)", "q_end + offset - config.window)",
         "kv_range"),
        ("diagonal unmasked", "block_of(q_start + offset + 1)", "block_of(q_start + offset + block_kv)", "kv_range"),
        ("padded queries see keys", "q_end = lax.min(q_start + rows, jnp.int32(config.T))", "q_end = q_start + rows", "kv_range"),
    ),
    *planted(
        "ops/attention/pallas_sm90/vjp",
        "hopper",
        ("slope of the gate", "dgate * (sigmoid_gate * (1 - sigmoid_gate))", "dgate * sigmoid_gate", "preprocess"),
        ("delta of the gated cotangent", "gate.dtype), _delta(do_ungated", "gate.dtype), _delta(do_f32", "preprocess"),
        ("a head's gate gets one element's gradient", "dgate = jnp.sum(dgate, axis=-1, keepdims=True)",
         "dgate = dgate[..., :1]", "preprocess"),
        ("the gate does not reach the kernel", "do_ungated = do_f32 * sigmoid_gate", "do_ungated = do_f32", "preprocess"),
    ),
    *planted(
        "ops/attention/pallas_sm90/dq_kernel",
        "hopper_backward",
        ("dq without scale", "(dq * config.scale)", "(dq * 1.0)", PLAIN),
        ("dq without delta", "p * (dp - per_row(delta", "p * (dp - 0 * per_row(delta", PLAIN),
    ),
    *planted(
        "ops/attention/pallas_sm90/common",
        "hopper_backward",
        ("slope of the cap", "1.0 - t * t", "1.0 - t", f"{GRADIENTS} and softcap5"),
        ("window one too wide", "[offset < config.window + n", "[offset <= config.window + n", f"{GRADIENTS} and window70"),
        ("a key does not see its own query", "[offset >= n for n", "[offset > n for n", PLAIN),
        ("queries that follow count as earlier", "range(0, -columns, -8)", "range(0, columns, 8)", PLAIN),
        ("all keys of a tile count as its first eight", "range(0, columns, 8) if", "[0] * (columns // 8) if", PLAIN),
        ("the diagonal needs no mask", "all_visible.append(distance >= keys - 1)", "all_visible.append(distance >= 0)", PLAIN),
        ("segments by order", "per_row(row_ids, columns) == per_column", "per_row(row_ids, columns) >= per_column", WIDE),
        ("mixed tiles pass for one segment's", "(block < self.interior_end)", "(block <= self.interior_end)", WIDE),
        ("a key tile too few", "(offset - config.window + 1), 0)", "(offset - config.window + 2), 0)", "outside"),
        ("a query tile too few", "(config.window - 1 - offset)", "(config.window - 2 - offset)", "outside"),
    ),
    *planted(
        "ops/attention/pallas_sm90/dkv_kernel",
        "hopper_backward",
        ("dk without scale", "(dk * self.config.scale)", "(dk * 1.0)", PLAIN),
        ("dk without delta", "p_slope * (dp - per_column", "p_slope * (dp - 0 * per_column", PLAIN),
        ("the first head of a group twice", "+ lax.rem(i, jnp.int32(self.config.G))", "", PLAIN),
        ("a stage is filled while in use", "wait_when(i >= sizes.q_stages", "wait_when(i > sizes.q_stages", PLAIN),
        ("p is taken before it is given", "plgpu.barrier_wait(smem.p_full)", "pass", WIDE),
        ("wide: dk without delta", "dp = product[...] - per_column(", "dp = product[...] - 0 * per_column(", WIDE),
        ("wide: dv takes dk's scale", "jnp.where(owns_dv, 1.0, self.config.scale)", "self.config.scale", WIDE),
    ),
]  # fmt: skip
