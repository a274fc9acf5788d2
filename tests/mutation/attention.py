"""Mutants of the attention kernels."""

from tests.mutation.mutant import Mutant, mutants_of

MATCHES = "test_implementation_matches_reference"
MASKED_KEYS = "test_masked_keys_do_not_affect_output"
LOOPS = "test_random_shapes_match_python_loops[xla]"
CHUNKED = "test_chunked_scores_match_python_loops"
SCHEDULE = "test_schedule_lists_the_visible_blocks"
WINDOW = "test_tokens_outside_window_do_not_affect_output"
SPANS = (
    "test_gradients_summed_over_kv_spans_match_reference[window, gate-float32]",
    "test_gradients_summed_over_kv_spans_match_reference[cap, fewer queries-float32]",
)
HEAD_DIMS = (
    "test_each_head_dim_matches_reference[D=80-bfloat16]",
    "test_each_head_dim_matches_reference[D=192-float16]",
)
KV_BLOCK_RANGES = "test_kv_block_ranges_cover_segments_and_mark_full_blocks"
RACES = "test_attention_with_several_blocks_subtiles_and_spans[subtile of half a head, cap, segments, fewer queries]"

HIDDEN = "test_finite_values_of_hidden_keys_have_no_effect"
MAGNITUDE = "test_operands_of_every_magnitude"
SCORES = "test_every_finite_score_counts"
GATES = "test_gates_of_every_size"
CAPS = "test_soft_caps_of_every_size"
EACH_CAP = "test_soft_cap_and_its_derivative_for_scores_of_every_size[unit=1.0]"
LSE = "test_lse_and_its_gradients"
MERGED = "test_merge_of_two_parts_equals_the_whole"
SHARDS = 'test_shard_map_over_sequences_and_heads_equals_one_device[P("data", None, "heads")-check_vma=True]'

MUTANTS: list[Mutant] = [
    *mutants_of(
        "ops/attention/lse",
        "attention",
        ("a sink counts twice", "jax.nn.sigmoid(some_lse - sinks)", "jax.nn.sigmoid(some_lse - sinks - 0.7)",
         f"{MATCHES}[sinks, window, gate-float32-xla]"),
    ),
    *mutants_of(
        "ops/attention/lse",
        "attention_lse",
        ("sinks do not join the lse", "jnp.logaddexp(some_lse, sinks)", "some_lse",
         "test_sinks_that_are_nothing_and_sinks_that_are_all[xla]"),
        ("rows without a key give NaN", "some_lse = jnp.where(sees_key, lse, 0)", "some_lse = lse",
         "test_sinks_of_minus_infinity_have_no_gradient[xla]"),
        ("the parts change places", "o_a * (a / total)[..., None] + o_b * (b / total)[..., None]",
         "o_a * (b / total)[..., None] + o_b * (a / total)[..., None]", f"{MERGED}[xla-queries without a key]"),
        ("the weights do not add up to 1", "total = jnp.where(sees_key, a + b, 1)", "total = jnp.where(sees_key, a + b + 0.1, 1)",
         f"{MERGED}[xla-queries without a key]"),
        ("no part gives NaN", "largest = jnp.where(largest > -jnp.inf, largest, 0)", "pass",
         f"{MERGED}[xla-queries without a key]"),
    ),
    *mutants_of(
        "ops/attention/pallas",
        "attention_lse",
        ("the cotangent of the lse is dropped", "delta = delta - dlse", "delta = delta",
         (f"{LSE}[pallas-window, gate per head]", f"{LSE}[pallas on TPU-window, gate per head]")),
        ("the lse of a TPU stays to base 2", "result.m * math.log(2)", "result.m", f"{LSE}[pallas on TPU-window, gate per head]"),
        ("the lse lacks the sum", "m - jnp.log(jnp.where(result.inv_l == 0, 1, result.inv_l))", "m",
         f"{LSE}[pallas-window, gate per head]"),
    ),
    *mutants_of(
        "ops/attention/xla",
        "attention",
        ("gradients of weights in bfloat16", "if v.dtype == jnp.bfloat16:", "p = p.astype(v.dtype)\n        if False:",
         "test_queries_of_one_key_have_no_gradient[window of one-xla]"),
    ),
    *mutants_of(
        "ops/attention/xla",
        "attention_lse",
        ("the lse lacks the maximum", "m + jnp.log(safe_l)", "jnp.log(safe_l)", f"{LSE}[xla-banded]"),
        ("no key has an lse of 0", "jnp.where(l == 0, -jnp.inf, m + jnp.log(safe_l))", "m + jnp.log(safe_l)",
         f"{LSE}[xla-queries without a key]"),
    ),
    *mutants_of(
        "einsum",
        "attention_number_range",
        ("float16 cotangents are narrowed", "dz if a.dtype == jnp.float16 else dz.astype(a.dtype)", "dz.astype(a.dtype)",
         f"{MAGNITUDE}[float16-xla]"),
    ),
    *mutants_of(
        "softcap",
        "attention_number_range",
        ("no size is restored", "jnp.tanh(qk * (scale / softcap)) * (bound * unit)", "jnp.tanh(qk * (scale / softcap)) * unit", EACH_CAP),
        ("large caps divide as small ones", "softcap < MAX_SIMPLE_SOFTCAP and", "softcap > 0 and", EACH_CAP),
        ("the largest caps are inverted", "SHRINK if softcap > 2**100 else 1.0", "1.0", EACH_CAP),
        ("small scales divide as large ones", "SIMPLE_RATIOS[0] <= ratio <= SIMPLE_RATIOS[1]", "True", EACH_CAP),
        ("small caps lose their slope", "bound = max(softcap, MIN_CAPPED_SCORE) * unit", "bound = softcap * unit", EACH_CAP),
        ("masked scores have a slope", "jnp.clip(capped * SHRINK, -limit, limit)", "capped * SHRINK", EACH_CAP),
        ("the derivative of the parts", "tangents[0] * cap_derivative(capped, softcap=softcap)", "tangents[0]",
         "test_soft_cap_has_derivatives_of_every_order"),
    ),
    *mutants_of(
        "derivatives",
        "attention_transformations",
        ("nothing is refused", "refusing = jax.custom_jvp(f)", "return f\n    refusing = jax.custom_jvp(f)",
         "test_a_second_derivative_of_pallas_is_refused_by_one_sentence"),
    ),
    *mutants_of(
        "ops/attention/xla",
        "attention_transformations",
        ("symbolic sizes are compared", "is_symbolic = not (isinstance(T, int) and isinstance(S, int))", "is_symbolic = False",
         "test_export_with_symbolic_sizes_runs_for_every_size"),
    ),
    *mutants_of(
        "ops/attention/segment_ids",
        "attention_transformations",
        ("the attended keys do not vary", "match_vma(jnp.zeros((B, S), bool), q_ids, kv_ids)", "jnp.zeros((B, S), bool)",
         "test_ids_of_shards_vary"),
    ),
    *mutants_of(
        "ops/attention/pallas",
        "attention_transformations",
        ("the forward kernel varies", "call_invariant(run_fwd, q, k, v, gate, segments)", "run_fwd(q, k, v, gate, segments)",
         "test_ids_of_shards_vary"),
        ("the kernels of derivatives vary", "functools.partial(call_invariant, kernel)", "kernel", SHARDS),
    ),
    *mutants_of(
        "ops/attention/xla",
        "attention_number_range",
        ("float16 weights are narrowed", "if v.dtype == jnp.bfloat16:",
         "p = p.astype(v.dtype)\n        if v.dtype == jnp.bfloat16:", f"{MAGNITUDE}[float16-xla]"),
        ("1 - sigmoid rounds to zero", "dx * (sigmoid * _sigmoid(-x))", "dx * (sigmoid * (1 - sigmoid))", f"{GATES}[xla]"),
        ("products of a small scale overflow", "q, k, scale = split_small_scale(q, k, scale)", "pass",
         f"{MAGNITUDE}[float32, small scale-xla]"),
    ),
    *mutants_of(
        "ops/attention/xla",
        "attention_hidden_values",
        ("a masked score has a slope", "soft_cap(jnp.where(mask, scores, 0), self.softcap)", "soft_cap(scores, self.softcap)",
         f"{HIDDEN}[causal, cap-float32-xla]"),
    ),
    *mutants_of(
        "ops/attention/common",
        "attention_number_range",
        ("scores below -1e30 are dropped", "M_INIT = float(jnp.finfo(jnp.float32).min)", "M_INIT = -1e30", f"{SCORES}[pallas]"),
        ("masked scores are finite", "MASK_VALUE = -jnp.inf", "MASK_VALUE = -2e38", f"{SCORES}[pallas]"),
    ),
    *mutants_of(
        "ops/attention/pallas",
        "attention_number_range",
        ("float16 stays narrow", "if dtype == jnp.float16:", "if False:", f"{MAGNITUDE}[float16-pallas]"),
        ("1 - sigmoid rounds to zero", "jax.nn.sigmoid(-gate.astype(jnp.float32))", "(1 - sigmoid_gate)", f"{GATES}[pallas]"),
        ("products of a small scale overflow", "q, k, scale = split_small_scale(q, k, scale)", "pass",
         f"{MAGNITUDE}[float32, small scale-pallas]"),
    ),
    *mutants_of(
        "ops/attention/pallas_cpu/bwd",
        "attention_hidden_values",
        ("infinite dp of hidden keys counts", "ds = jnp.where(s == MASK_VALUE, 0, ds)", "pass", f"{HIDDEN}[causal, cap-float32-pallas]"),
    ),
    *mutants_of(
        "ops/attention/xla",
        "attention",
        ("a query sees the next key", "mask &= (distance >= 0)[None]", "mask &= (distance >= -1)[None]", f"{MATCHES}[7-float32-xla]"),
        ("window one too wide", "mask &= (distance < window)[None]", "mask &= (distance <= window)[None]",
         f"{MATCHES}[129 on 7, window-float32-xla]"),
        ("band one too wide", "(distance < window))[None]", "(distance <= window))[None]",
         f"{MATCHES}[127 grouped, gate, window-float32-xla]"),
        ("band sees the next key", "mask = ((distance >= 0)", "mask = ((distance >= -1)",
         f"{MATCHES}[127 grouped, gate, window-float32-xla]"),
        ("top-left alignment", "_visible_mask(jnp.arange(T) + S - T,", "_visible_mask(jnp.arange(T),",
         f"{MATCHES}[129 on 7, window-float32-xla]"),
        ("band forgets S - T", "* block + S - T - num_past_blocks * block", "* block - num_past_blocks * block",
         (f"{MATCHES}[unmatched, banded-float32-xla]", LOOPS)),
        ("keys before the first are visible", "((k_pos >= 0) & (k_pos < S))", "(k_pos < S)",
         f"{MATCHES}[127 grouped, gate, window-float32-xla]"),
        ("chunk stops a key early", "start + chunk_T + S - T)) if", "start + chunk_T + S - T - 1)) if", CHUNKED),
        ("chunk forgets its start", "* block + start + S - T", "* block + S - T", CHUNKED),
        ("first chunk's segments for all", "jnp.pad(q_ids[:, start : start + chunk_T]",
         "jnp.pad(q_ids[:, :chunk_T]", f"{CHUNKED}[segments]"),
        ("segments by order", "q_ids[:, :, None] == kv_ids", "q_ids[:, :, None] >= kv_ids",
         f"{MATCHES}[packed-float32-xla]"),
        ("band segments by order", "(q_ids[..., None] == ", "(q_ids[..., None] >= ",
         f"{MATCHES}[packed, window-float32-xla]"),
        (
            "masked values are not zeroed",
            "k, v = (jnp.where(attended[..., None], x, 0) for x in (k, v))",
            "k = jnp.where(attended[..., None], k, 0)",
            (f"{MASKED_KEYS}[one block, window-xla-output]", f"{MASKED_KEYS}[one block, window-xla-gradients]"),
        ),
        ("masked keys of a band are not zeroed", "None if q_ids is None and T == S else", "None if q_ids is None else",
         (f"{MASKED_KEYS}[banded, window-xla-output]", f"{MASKED_KEYS}[banded, window-xla-gradients]")),
        ("masked keys of segments are not zeroed", "all_attended = q_ids is None and window", "all_attended = window",
         (f"{MASKED_KEYS}[full, segments-xla-output]", f"{MASKED_KEYS}[full, segments-xla-gradients]")),
        ("scale dropped", "q, k, acc_dtype) * self.scale", "q, k, acc_dtype)", f"{MATCHES}[7-float32-xla]"),
        ("gate dropped", "out.o * _sigmoid(gate.astype(out.o.dtype))", "out.o",
         f"{MATCHES}[7 of 129, window-float32-xla]"),
        ("no key gives NaN", "jnp.where(l == 0, 1, l)", "l", f"{MATCHES}[129 on 7, window-float32-xla]"),
        (
            "heads grouped the wrong way",
            "q.reshape(B, T, K, H // K, D).transpose(0, 2, 3, 1, 4)",
            "q.reshape(B, T, H // K, K, D).transpose(0, 3, 2, 1, 4)",
            f"{MATCHES}[127 grouped, gate, window-float32-xla]",
        ),
    ),
    *mutants_of(
        "ops/attention/api",
        "attention",
        ("scale argument ignored", "check_scale(scale, D)", "check_scale(None, D)",
         "test_reference_matches_python_loops[full, scale]"),
        ("long windows one key short", "min(window, max(S, 1))", "min(window, max(S - 1, 1))",
         "test_random_shapes_match_python_loops[pallas]"),
    ),
    *mutants_of(
        "ops/attention/block_schedule",
        "attention_block_schedule",
        ("window a block short", "q_start - window + 1)", "q_start - window + 2)", SCHEDULE),
        ("edge of the window unmasked", "q_last - j * block_kv < window", "q_last - j * block_kv <= window", SCHEDULE),
        ("diagonal unmasked", "q_start >= (j + 1) * block_kv - 1", "q_start >= j * block_kv", SCHEDULE),
        ("padded keys unmasked", "fully_visible = (j + 1) * block_kv <= S and kv_end", "fully_visible = kv_end",
         SCHEDULE),
        ("no block for queries without keys", "kv_blocks = [0]", "kv_blocks = []", SCHEDULE),
        ("a visited block counts as first use again", "FIRST_USE_OF_KV * (j not in visited)",
         "FIRST_USE_OF_KV * (j == kv_blocks[0])", SCHEDULE),
    ),
    *mutants_of(
        "ops/attention/common",
        "attention_tpu",
        ("a query sees the next key", "return distance >= 0", "return distance >= -1", WINDOW),
        ("window one too wide", "astype(jnp.uint32) < config", "astype(jnp.uint32) <= config", WINDOW),
        ("cap without its unit", "softcap=config.softcap, unit=unit)", "softcap=config.softcap)", SPANS),
    ),
    *mutants_of(
        "ops/attention/common",
        "attention",
        ("padded keys are visible", "key < config.S - kv_block * sizes.block_kv - c * keys", "key < sizes.block_kv",
         f"{MATCHES}[full, cap-float32-pallas]"),
    ),
    *mutants_of(
        "ops/attention/pallas_cpu/common",
        "attention_block_schedule",
        ("the blocks of a step end past the keys", "np.minimum(schedule.kv[starts_q_block], num_kv_blocks - kv_blocks_per_step)",
         "schedule.kv[starts_q_block]", "test_multi_block_steps_cover_every_visible_pair_once"),
    ),
    *mutants_of(
        "ops/attention/pallas_cpu/common",
        "attention_tpu",
        ("every block of a step is the first", "self.kv_block + n]", "self.kv_block]", "test_subtile_layouts_match_reference[three blocks per step]"),
    ),
    *mutants_of(
        "ops/attention/pallas_cpu/common",
        "attention",
        ("segments by order", "self.load_q(segments.q_ids) == self", "self.load_q(segments.q_ids) >= self",
         (f"{MATCHES}[packed-float32-pallas]", f"{MATCHES}[packed, window-float32-pallas]")),
    ),
    *mutants_of(
        "ops/attention/pallas_cpu/fwd",
        "attention_tpu",
        ("sum without decay", "decay * l_ref[...]", "l_ref[...]", SPANS),
        ("output without decay", "decay * acc_ref[...]", "acc_ref[...]", SPANS),
        ("gate dropped", "o = o * jax.nn.sigmoid(step.load_q(inputs.gate).astype(jnp.float32))", "pass", HEAD_DIMS),
    ),
    *mutants_of(
        "ops/attention/pallas_cpu/fwd",
        "attention",
        ("no key gives NaN", "jnp.where(sees_no_key, 1.0, l)", "l", f"{MATCHES}[129 on 7, window-float32-pallas]"),
        ("probabilities not normalized", "jnp.where(sees_no_key, 0.0, 1 / safe_l)", "jnp.where(sees_no_key, 0.0, 1.0)",
         f"{MATCHES}[full, cap-float32-pallas]"),
    ),
    *mutants_of(
        "ops/attention/pallas_cpu/bwd",
        "attention_tpu",
        ("delta added", "- step.load_q(inputs.delta)", "+ step.load_q(inputs.delta)", HEAD_DIMS),
        ("dk without scale", "(dk * config.scale).astype", "dk.astype", HEAD_DIMS),
        ("dq without scale", "(dq_acc_ref[...] * config.scale)", "dq_acc_ref[...]", HEAD_DIMS),
    ),
    *mutants_of(
        "ops/attention/pallas_cpu/bwd",
        "attention",
        ("derivative of the cap dropped", "ds = ds * cap_derivative(s, softcap=config.softcap)", "pass", f"{MATCHES}[full, cap-float32-pallas]"),
        ("dk and dv sums restart", "pl.when(step.is_first_use_of_kv)", "pl.when(step.is_first_kv_block)",
         (f"{MATCHES}[unmatched, banded-float32-pallas]", f"{MATCHES}[banded 600-float32-pallas]")),
    ),
    *mutants_of(
        "ops/attention/pallas_tpu/common",
        "attention_tpu",
        ("sums over keys forget the decay", "decay_ref.load(r) * acc_ref.load(r)", "acc_ref.load(r)",
         SPANS),
    ),
    *mutants_of(
        "ops/attention/pallas_tpu/common",
        "race_detector",
        ("mixed segments unmasked", " | (overlap == PARTIAL_OVERLAP)", "", RACES),
        ("segments by order", "q_ids == jnp.broadcast_to", "q_ids >= jnp.broadcast_to", RACES),
        ("only the first subtiles are masked", "fori_loop(0, num_q_subtiles * num_kv_subtiles, ", "fori_loop(0, num_q_subtiles, ", RACES),
    ),
    *mutants_of(
        "ops/attention/pallas_tpu/block_call",
        "attention_tpu",
        ("dq of every span starts at its first block", "held.clamp(q_block) - held.start", "0 * q_block", SPANS),
    ),
    *mutants_of(
        "ops/attention/pallas_tpu/refs",
        "race_detector",
        ("every part of a head is its first", "pl.ds(q_part * self.q + start, q)", "pl.ds(start, q)", RACES),
    ),
    *mutants_of(
        "ops/attention/pallas_tpu/fwd",
        "attention_tpu",
        ("sum without decay", "l_ref.store(decay * l_ref.load(r), r)", "l_ref.store(l_ref.load(r), r)", SPANS),
        ("gate of heads dropped", "o = o * jax.nn.sigmoid(gate_ref.load(r).astype(jnp.float32))", "pass", SPANS[0]),
        ("gate dropped", "o_piece * jax.nn.sigmoid(gate_ref.load(r, piece).astype(jnp.float32))", "o_piece", SPANS[1]),
        ("no key gives NaN", "jnp.where(sees_no_key, 1.0, l)", "l", SPANS),
        ("probabilities not normalized", "jnp.where(sees_no_key, 0.0, 1 / safe_l)", "jnp.where(sees_no_key, 0.0, 1.0)", SPANS),
    ),
    *mutants_of(
        "ops/attention/pallas_tpu/bwd",
        "attention_tpu",
        ("delta added", "- delta_ref.load(r)", "+ delta_ref.load(r)", SPANS),
        ("dq without scale", "dq_acc_ref.load(r) * config.scale", "dq_acc_ref.load(r)", SPANS),
        ("derivative of the cap dropped", "ds = ds * cap_derivative(s, softcap=config.softcap, unit=LOG2E)", "pass", SPANS),
        ("dq of the last span only", "block.q_block < span.continued_stop", "block.q_block < 0", SPANS),
        ("no query block is finished before the last span", "block.q_block < span.shared_start", "block.q_block < 0", SPANS[0]),
    ),
    *mutants_of(
        "ops/attention/pallas_tpu/bwd",
        "race_detector",
        ("dk without scale, compiled", "(dk_ref, dk_acc_ref, config.scale)", "(dk_ref, dk_acc_ref, 1)", RACES),
        ("all keys of a span share a sum", "span_block = block.kv_block - span.start", "span_block = block.kv_block * 0", RACES),
        ("sums are never zeroed", "pl.when(block.step == 0)", "pl.when(block.step < 0)", RACES),
    ),
    *mutants_of(
        "ops/attention/pallas",
        "attention_tpu",
        ("wrong derivative of the gate", "(sigmoid_gate * jax.nn.sigmoid(-gate.astype(jnp.float32)))", "sigmoid_gate", HEAD_DIMS),
    ),
    *mutants_of(
        "ops/attention/packing",
        "attention_tpu",
        ("NaN past the last token", "for axis in range(x.ndim)]) if padding",
         "for axis in range(x.ndim)], constant_values=jnp.nan) if padding", HEAD_DIMS),
    ),
    *mutants_of(
        "ops/attention/segment_ids",
        "attention",
        ("one key too many cut off", "num_attended := T + window - 1", "num_attended := T + window - 2",
         f"{MATCHES}[7 of 129, window-float32-pallas]"),
        ("masked values are not zeroed", "k, v = jnp.where(attended, k, 0), jnp.where(attended, v, 0)",
         "k = jnp.where(attended, k, 0)",
         (f"{MASKED_KEYS}[full, segments-pallas-output]", f"{MASKED_KEYS}[full, segments-pallas-gradients]")),
    ),
    *mutants_of(
        "ops/attention/segment_ids",
        "race_detector",
        ("mixed segments count as one", "(low == other_high) & (other_low == high)", "low == other_low", RACES),
        ("overlapping segments count as disjoint", "(low > other_high) |", "(low != other_low) |", RACES),
    ),
    *mutants_of(
        "ops/attention/segment_ids",
        "attention_segment_ids",
        ("a key range ends a block early", "jnp.where(disjoint, 0, j + 1)", "jnp.where(disjoint, 0, j)", KV_BLOCK_RANGES),
        ("a mixed block counts as one segment", "same_segment | (j < interior_start", "same_segment | (j <= interior_start", KV_BLOCK_RANGES),
    ),
]  # fmt: skip
