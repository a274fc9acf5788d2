"""Mutants of the decode attention kernels."""

from tests.mutation.mutant import Mutant, mutants_of

MATCHES = "test_implementation_matches_reference"
SLOT = "test_new_tokens_are_stored_in_their_slots_only"
SLOT_EIGHT_BITS = "test_new_token_is_stored_in_its_slot_only"
UNUSED_SLOTS = "test_unused_slots_do_not_affect_output"
DEQUANTIZED = "test_output_matches_dequantized_cache"
QUANTIZE = "test_quantize_rounds_to_nearest"
BLOCK_TABLE = "test_block_table_lists_blocks_with_visible_tokens"
SEVERAL_BLOCKS = "test_several_blocks_match_python_loops"
HALF_FULL = f"{SEVERAL_BLOCKS}[C=600-half full]"
APPENDS = "test_tpu_kernel_appends_and_attends"
EXTREMES = "test_extreme_numbers_give_the_exact_softmax"
EIGHT_BITS_FLOAT16 = "test_values_of_an_eight_bit_cache_fit_float16"
LONGEST = "test_longest_sequence_is_read_like_a_short_one"
HIDDEN_GRADIENTS = "test_hidden_slots_do_not_change_gradients"
SPLITS = "test_splits_divide_visible_blocks_evenly"
EMPTY_SPLIT = "test_split_without_visible_tokens_has_no_weight"
SM90_OUTPUT = (
    "test_output_matches_python_loops_and_tokens_are_stored[bfloat16-C=136 D=64-splits=1]",
    "test_output_matches_python_loops_and_tokens_are_stored[bfloat16-C=200 D=128-splits=2]",
)

SM90_TOKENS = "test_output_matches_python_loops_and_tokens_are_stored[bfloat16-C=136 D=64 T=5-splits=2]"

MUTANTS: list[Mutant] = [
    *mutants_of(
        "ops/decode_attention/kv_cache",
        "decode_attention",
        ("ring buffer does not wrap", "slot = cache.length % cache.k.shape[2]",
         "slot = jnp.minimum(cache.length, cache.k.shape[2] - 1)", SLOT),
        ("scatter is a slot off", ":, slot].set(", ":, slot - 1].set(",
         (f"{SLOT}[large batch-xla]", "test_random_caches_match_python_loops")),
        ("new value not stored", "KVCache(k, v, cache", "KVCache(k, cache.v, cache", SLOT),
    ),
    *mutants_of(
        "ops/decode_attention/api",
        "decode_attention",
        ("length not incremented", "jnp.asarray(length) + (1 if T is None else T)", "jnp.asarray(length)", SLOT),
    ),
    *mutants_of(
        "ops/decode_attention/xla",
        "decode_attention",
        ("ages shifted by one", "newest = length % C if", "newest = (length + 1) % C if", f"{MATCHES}[grouped-float32-xla]"),
        ("window dropped", "(age <= length) & (age < window)", "age <= length", f"{MATCHES}[window-float32-xla]"),
        ("window one too wide", "(age < window)", "(age <= window)", f"{MATCHES}[window-float32-xla]"),
        ("oldest token unseen", "age <= length if", "age < length if", f"{MATCHES}[grouped-float32-xla]"),
        ("sink dropped from the sum", "total * decay + jnp.exp(sink_rows - peak)", "total * decay",
         f"{MATCHES}[sinks-float32-xla]"),
        ("a query sees later tokens", "(distance >= 0)", "(distance >= -1)", f"{MATCHES}[five tokens-float32-xla]"),
        ("window of several tokens dropped", "rows & (distance < window)", "rows",
         f"{MATCHES}[five tokens-float32-xla]"),
        ("unused slots count", "jnp.where(visible_rows, jnp.exp(exponents), 0)", "jnp.exp(exponents)",
         f"{MATCHES}[grouped-float32-xla]"),
        ("cap does not restore the size", "soft_cap(scores * scale, softcap), 1.0",
         "soft_cap(scores * scale, softcap) / softcap, 1.0", f"{MATCHES}[multi-query, head gate, cap-float32-xla]"),
        ("gate dropped", "o = o * jax.nn.sigmoid(gate.astype(o.dtype))", "pass",
         (f"{MATCHES}[multi-head, elementwise gate-float32-xla]", f"{MATCHES}[multi-query, head gate, cap-float32-xla]")),
        ("unused values not zeroed", "jnp.where(visible[..., None], new_cache.v, 0).astype", "new_cache.v.astype",
         f"{UNUSED_SLOTS}[grouped-xla]"),
    ),
    *mutants_of(
        "ops/decode_attention/xla",
        "decode_attention_eight_bits",
        ("scales of the keys dropped", "scores if k_scale is None else scores * k_scale", "scores",
         f"{DEQUANTIZED}[grouped-xla-int8]"),
        ("scales of unused slots count", "jnp.where(visible, x, 0)[:, :, None]", "x[:, :, None]",
         f"{UNUSED_SLOTS}[grouped-xla-int8]"),
    ),
    *mutants_of(
        "ops/decode_attention/kv_cache",
        "decode_attention_eight_bits",
        ("scales are not stored", "KVCache(k, v, cache.length, k_scale, v_scale)",
         "KVCache(k, v, cache.length, cache.k_scale, cache.v_scale)",
         f"{SLOT_EIGHT_BITS}[xla-int8]"),
    ),
    *mutants_of(
        "ops/decode_attention/kv_cache",
        "decode_attention_eight_bits",
        ("the largest value is missed", "axis=-1) / qmax", "axis=-1) / (qmax + 1)", QUANTIZE),
        ("truncated instead of rounded", "jnp.round(scaled)", "jnp.trunc(scaled)", QUANTIZE),
        ("a vector of zeros becomes NaN", "jnp.where(scale == 0, 1, scale)", "scale", QUANTIZE),
    ),
    *mutants_of(
        "ops/decode_attention/common",
        "decode_attention_eight_bits",
        ("scales of the keys dropped", "qk if k_scale is None else qk * k_scale", "qk",
         f"{DEQUANTIZED}[grouped-pallas-int8]"),
        ("scales of the values dropped", "weights if v_scale is None else weights * v_scale", "weights",
         f"{DEQUANTIZED}[grouped-pallas-int8]"),
    ),
    *mutants_of(
        "ops/decode_attention/pallas_cpu/kernel",
        "decode_attention_eight_bits",
        ("scales of unused slots count", "jnp.where(slot_mask(1, size), v_scale, 0)", "v_scale",
         f"{UNUSED_SLOTS}[grouped-xla-int8]"),
        ("the new token is not quantized", "quantize_tokens(k, v, cache)", "quantize_tokens(k, v, KVCache(k, v, None))",
         f"{DEQUANTIZED}[grouped-xla-int8]"),
    ),
    *mutants_of(
        "ops/decode_attention/pallas_tpu/kernel",
        "decode_attention_eight_bits",
        ("the tile is written without the new scale", "jnp.where(lane == in_block, scale", "jnp.where(lane < 0, scale",
         "test_tpu_kernel_appends_values_and_scales[tokens in lanes-int8-numpy]"),
    ),
    *mutants_of(
        "ops/decode_attention/block_table",
        "decode_attention_tpu",
        ("the query sees a token too many", "jnp.minimum(length, max_visible - 1)", "jnp.minimum(length, max_visible)",
         BLOCK_TABLE),
        ("a wrapped ring buffer misses a block", "num_blocks - first + last + 1)", "num_blocks - first + last)", BLOCK_TABLE),
        ("steps do not wrap", "(of_step(first - ends + visited) + step[:, 0]) % num_blocks",
         "(of_step(first - ends + visited) + step[:, 0])", BLOCK_TABLE),
        ("too few steps if the ring buffer ends inside a block", " + (C % block_size > 0)", "", BLOCK_TABLE),
    ),
    *mutants_of(
        "ops/decode_attention/common",
        "decode_attention_tpu",
        ("the query does not see the new token", "broadcast_to(v.astype", "broadcast_to(0 * v.astype", SEVERAL_BLOCKS),
        ("the query sees the replaced token", "where(slots < slot, slot - slots,", "where(slots <= slot, slot - slots,", SEVERAL_BLOCKS),
        ("the sum forgets the decay", "l_old = decay * self.l[head]", "l_old = self.l[head]", SEVERAL_BLOCKS),
        ("the output forgets the decay", "l_old / l * self.o[head] +", "self.o[head] +", SEVERAL_BLOCKS),
        ("a query sees later new tokens", "visible = distance >= 0", "visible = distance > -2", f"{APPENDS}[five tokens, window-numpy]"),
        ("a new token counts twice", "visible & (age >= T)", "visible", f"{APPENDS}[five tokens, window-numpy]"),
        ("the window of several tokens is too wide", "G)) < tokens.window", "G)) <= tokens.window", f"{APPENDS}[five tokens, window-numpy]"),
        ("the sink is forgotten", "o *= l / (l + jnp.exp", "o *= l / (l + 0 * jnp.exp", f"{APPENDS}[three tokens-numpy]"),
        ("a partial block counts twice", " & (slots >= first)", "", SEVERAL_BLOCKS),
    ),
    *mutants_of(
        "ops/decode_attention/pallas_cpu/kernel",
        "decode_attention_tpu",
        ("values of unused slots count", "v = jnp.where(slot_mask(size, 1), v, 0)", "pass", SEVERAL_BLOCKS),
        ("a batched step is not masked", "s, visible, config",
         "s, None if config.batched else visible, config", HALF_FULL),
        ("unused slots of a batched step count", "jnp.all(jnp.isfinite(wv))", "True", HALF_FULL),
        ("a batched step mixes up the sequences", "jnp.repeat(per_sequence", "jnp.tile(per_sequence", HALF_FULL),
        ("a batched step writes nothing", "[[0], [0], [1]]", "[[0], [0], [2]]", HALF_FULL),
    ),
    *mutants_of(
        "ops/decode_attention/pallas_tpu/kernel",
        "decode_attention_tpu",
        ("partly visible blocks are not masked", " | (oldest % size == 0)", " | True", APPENDS),
        ("the tile is written without the new token", "jnp.where(row == slot, new", "jnp.where(row < 0, new", APPENDS),
        ("the tile is written without the new column", "jnp.where(lane == slot, column", "jnp.where(lane < 0, column",
         APPENDS),
        ("hidden values in lanes count", "visible if in_lanes else slot_mask(size, 1), v, 0", "True, v, 0", APPENDS),
    ),
    *mutants_of(
        "ops/decode_attention/numbers",
        "decode_attention_numbers",
        ("the sign of the scale is dropped", "math.copysign(power, scale)", "power",
         f"{EXTREMES}[products of bfloat16 beyond float32-xla]"),
        ("a small scale does not shrink q", "0 < rest < 1 and", "False and", f"{EXTREMES}[products beyond float32-xla]"),
        ("a power of two is lost", "2.0 ** (exponent - 1)", "2.0 ** exponent", f"{EXTREMES}[sums of values beyond float32-xla]"),
        ("weights of float16 are not enlarged", "if dtype != jnp.float16:", "if True:",
         (f"{EIGHT_BITS_FLOAT16}[1000-0.0001-int8-xla]", f"{EIGHT_BITS_FLOAT16}[1000-0.0001-int8-pallas for a TPU]")),
    ),
    *mutants_of(
        "ops/decode_attention/xla",
        "decode_attention_numbers",
        ("scores are scaled before their difference", "- row_max) * scale", "* scale - row_max * scale)",
         f"{EXTREMES}[the largest scale-xla]"),
        ("the largest score may be that of a hidden slot", "jnp.max(jnp.where(visible_rows, scores, lowest),",
         "jnp.max(scores,", f"{EXTREMES}[scores below -1e30-xla]"),
    ),
    *mutants_of(
        "ops/decode_attention/common",
        "decode_attention_numbers",
        ("the lowest score has a weight", "p if visible is None else jnp.where(visible, p, 0)", "p",
         f"{EXTREMES}[the smallest scale-pallas for a CPU]"),
        ("weights are normalized last", "weigh(p / l)", "weigh(p) / l",
         f"{EXTREMES}[sums of values beyond float32-pallas for a TPU]"),
    ),
    *mutants_of(
        "ops/decode_attention/block_table",
        "decode_attention_numbers",
        ("the longest sequence is empty", "jnp.minimum(length, max_visible - 1)",
         "jnp.minimum(length + 1, max_visible) - 1", f"{LONGEST}[window=None-pallas for a CPU]"),
    ),
    *mutants_of(
        "ops/decode_attention/xla",
        "decode_attention_hidden",
        ("hidden keys reach gradients", "jnp.where(visible[..., None], b, 0), *tangents", "b, *tangents",
         f"{HIDDEN_GRADIENTS}[xla-float32]"),
        ("hidden scores reach gradients", "scores = jnp.where(visible_rows, scores, 0)", "pass",
         f"{HIDDEN_GRADIENTS}[xla-float32]"),
    ),
    *mutants_of(
        "ops/decode_attention/pallas",
        "decode_attention_hidden",
        ("a gradient is not refused", 'q, k, v, cache, gate, sinks = without_gradient((q, k, v, cache, gate, sinks), "pallas")', "pass",
         "test_gradient_of_a_kernel_is_refused_by_one_sentence"),
    ),
    *mutants_of(
        "ops/decode_attention/pallas_sm90/splits",
        "decode_attention_sm90",
        ("the query sees a token too many", "(config.max_visible - 1)", "(config.max_visible)", SPLITS),
        ("a wrapped ring buffer misses a block", "num_blocks - first + last + 1)", "num_blocks - first + last)", SPLITS),
        ("the last split stops early", "split_start(split + 1))", "split_start(split + 1) - (split > 0))", SPLITS),
        ("all splits have the same weight", "weight = jnp.exp2(lse - largest)", "weight = 1 + 0 * lse", EMPTY_SPLIT),
        ("the output of an empty split is used", "jnp.where(weight > 0, o, 0)", "o", EMPTY_SPLIT),
    ),
    *mutants_of(
        "ops/decode_attention/pallas_sm90/kernel",
        "decode_attention_sm90",
        ("an empty split has a weight", "refs.lse_smem[...] = fill_rows(-jnp.inf)", "refs.lse_smem[...] = fill_rows(0.0)",
         SM90_OUTPUT),
        ("the query does not see the new token",
         "pl.when(has_new_token)(lambda: self.insert_new_tokens(self.keys, k_stage, first_slot))", "pass", SM90_OUTPUT),
        ("the new token is not stored", "pl.when(has_new_token)(lambda: self.store_new_tokens(first_slot))", "pass",
         SM90_OUTPUT),
        ("a query sees later tokens", "(distance >= 0) & ", "", SM90_TOKENS),
        ("a query sees more than its window", "(config.C if config.window is None else config.window))",
         "(config.C if config.window is None else config.window + 1))", SM90_TOKENS),
        ("the rows of a token are those of the next", "jnp.int32(config.G))", "jnp.int32(config.G + 1))", SM90_TOKENS),
        ("new tokens before the end of the ring buffer are lost", "jnp.where(slot < 0, slot + config.C, slot)", "slot",
         SM90_TOKENS),
        ("a block of older new tokens is not one", "+ 1 < config.T\n", "+ 1 < 1\n", SM90_TOKENS),
        ("a block that some queries see is not masked", "has_new_token | ~seen_by_all | ", "has_new_token | ",
         SM90_TOKENS),
        ("values of unused slots count", "x = jnp.where(self.visible_slots(x.shape, 0, first_slot), x, 0)", "pass",
         SM90_OUTPUT),
        ("keys of unused slots count", "jnp.where(self.visible_scores(s.shape, first_slot), s, -jnp.inf)", "s",
         SM90_OUTPUT),
        ("a window's oldest block is not masked", " | (i == 0)", "", SM90_OUTPUT),
        ("slots past the end of the ring buffer count", " & (slots < self.config.C)", "", SM90_OUTPUT),
        ("the sum forgets the decay", "l = l * decay +", "l = l +", SM90_OUTPUT),
        ("the output forgets the decay", "acc = acc * broadcast_rows(decay, acc.shape)", "pass", SM90_OUTPUT),
        ("a split's weight forgets its maximum", "m + jnp.log2(l)", "jnp.log2(l)", SM90_OUTPUT),
        ("cap does not restore the size", "unit=LOG2E)", "unit=LOG2E / config.softcap)", SM90_OUTPUT),
        ("gate dropped", "o = o * jax.nn.sigmoid(gate.astype(jnp.float32))", "pass", SM90_OUTPUT),
    ),
]  # fmt: skip
