"""Mutants of the modules that all operations share: validation, dispatch, cost, workloads."""

from tests.mutation.mutant import Mutant, mutants_of

MATCHES = "test_implementation_matches_reference"
BAD_ARGUMENT = "test_invalid_attention_argument_raises_with_its_name"
ROUTE = "test_route_follows_the_expert_distribution"

SEGMENTS = "test_segment_ids_of_any_dtypes_are_equal_where_the_given_ones_are[(False, False)-x64=False]"
NO_EXPERT = "test_expert_id_outside_the_experts_becomes_their_number"
SIZES = "test_group_sizes_are_refused_on_the_host_and_clamped_on_a_device"

MUTANTS: list[Mutant] = [
    *mutants_of(
        "einsum",
        "attention",
        ("mean over grouped heads", "grad.sum(axis=", "grad.mean(axis=",
         f"{MATCHES}[129 multi-query, head gate, cap-float32-xla]"),
    ),
    *mutants_of(
        "validation",
        "dispatch",
        ("a window of 0 passes", "numbers.Integral) or value < 1", "numbers.Integral) or value < 0",
         f"{BAD_ARGUMENT}[window is 0]"),
        ("a window without causal passes", "    if not causal:", "    if False:",
         f"{BAD_ARGUMENT}[window is 2 with causal=False]"),
        ("3 heads on 2 pass", "K < 1 or H % K", "K < 1", f"{BAD_ARGUMENT}[q has 4 heads and k has 3]"),
        ("mixed dtypes pass", "if x.dtype != present[first].dtype:", "if False:", f"{BAD_ARGUMENT}[v has dtype]"),
        ("negative caps pass", "softcap is None or not _is_normal(softcap)",
         "softcap is None or not _is_normal(abs(softcap))", f"{BAD_ARGUMENT}[softcap is -1]"),
    ),
    *mutants_of(
        "validation",
        "integers",
        ("a word is a flag", "if not isinstance(value, bool | np.bool_):", "if False:",
         "test_flag_that_is_not_a_bool_is_refused_by_name[false]"),
        ("no key heads pass", "K < 1 or H % K", "K > 0 and H % K", "test_no_key_heads_is_refused_by_name[attention]"),
        ("a scale beyond float32 passes", "float(info.tiny) <= value <= float(info.max)", "float(info.tiny) <= value",
         "test_number_that_float32_cannot_hold_is_refused_by_name[{'scale': 1e+39}-scale is 1e]"),
        ("a subnormal scale passes", "float(info.tiny) <= value <= float(info.max)", "0 < value <= float(info.max)",
         "test_number_that_float32_cannot_hold_is_refused_by_name[{'scale': -1e-40}-scale is -1e-40]"),
        ("head dim 0 divides by zero", "1.0 if D == 0 else D**-0.5", "D**-0.5",
         "test_empty_axis_decodes_to_nothing[xla-(2, 4, 0)]"),
        ("the byte order is kept", "native_order(x) if isinstance(x, np.ndarray) else x", "x",
         "test_big_endian_and_unusual_arrays_are_taken"),
    ),
    *mutants_of(
        "integers",
        "integers",
        ("ids are cut to 32 bits", "return x.astype(np.int32) if fits else x", "return x.astype(np.int32)",
         "test_hashes_of_documents_separate_them[xla]"),
        ("ids that one dtype cannot hold meet", "x.astype(dtype), dtype.type(-2))", "x.astype(dtype), dtype.type(-1))", SEGMENTS),
        ("unsigned ids lose their order", "x ^ np.uint32(1 << 31) if", "x if",
         "test_one_array_of_segment_ids_keeps_its_order[uint32]"),
        ("an id of -1 is expert 0", "(ids >= 0) & (ids < E)", "ids < E", NO_EXPERT),
        ("the last expert has no id", "(ids >= 0) & (ids < E)", "(ids >= 0) & (ids < E - 1)", NO_EXPERT),
        ("an id beyond int32 wraps", "x = clip(x, x.dtype.type(low), x.dtype.type(high))", "x = x", NO_EXPERT),
        ("groups run past the rows", "dtype=jnp.int32), N)", "dtype=jnp.int32), 2 * N)", SIZES),
        ("negative sizes count", "jnp.clip(saturate_int32(group_sizes), 0, N)",
         "jnp.clip(saturate_int32(group_sizes), -N, N)", SIZES),
        ("sizes on the host are not summed", "(total := sum(map(int, group_sizes))) > N", "(total := 0) > N", SIZES),
        ("a long length loses its slot", "slots + length % slots", "slots", "test_length_past_int32_decodes_and_counts_on"),
        ("a narrow length passes", "if length.dtype.itemsize < 4:", "if False:",
         "test_wrong_length_is_refused_by_name[[3]-cache.length has dtype int8; allowed: int32]"),
    ),
    *mutants_of(
        "call",
        "eager_calls",
        ("eager calls are compiled again", "partial(_jitted(op), ", "partial(_jitted.__wrapped__(op), ",
         "test_second_eager_call_compiles_nothing[attention-xla-value]"),
    ),
    *mutants_of(
        "call",
        "modes",
        ("arguments vary over their own axes", "[match_vma(x, *arrays) for x in arrays]", "arrays",
         "test_operation_is_right_in_every_mode[default-shard_map-grouped_matmul-xla]"),
        ("explicit axes stay explicit", "if not explicit:", "if True:",
         "test_operation_is_right_in_every_mode[default-explicit axes-attention-pallas]"),
    ),
    *mutants_of(
        "dispatch",
        "dispatch",
        ("Triton is never offered", 'importlib.util.find_spec("jax_triton") is None', "True",
         "test_triton_is_offered_on_nvidia_gpus_with_jax_triton[NVIDIA A100-SXM4-40GB-installed=True-reason=None]"),
        ("silent fallback", 'if "implementation=" not in reason:',
         'if True: return self.implementations[1].function\n            if "implementation=" not in reason:',
         "test_named_implementation_runs_or_raises_with_the_reason"),
        ("the target device is ignored", "_target_device = jax.make_user_context(default_value=None)",
         "import types; _target_device = type('Context', (), {'value': None, '__call__': lambda self, device: "
         "contextlib.ExitStack()})()", "test_jitted_function_is_traced_again_for_another_target_device"),
    ),
    *mutants_of(
        "cost",
        "workloads",
        ("triangle without its diagonal", "ramp * (ramp + 1) // 2", "ramp * (ramp - 1) // 2",
         "test_visible_pairs_match_a_count_of_the_mask"),
        ("keys before the window are read", "min(S, T + window - 1)", "min(S, T + window)",
         "test_num_visible_keys_counts_keys_with_a_query"),
        ("segments' window one too wide", 'window, side="right"', 'window, side="left"',
         "test_visible_pairs_of_segments_match_a_count_of_the_mask"),
        ("idle groups are read", "rows * M + active * M * F + N * F", "rows * M + E * M * F + N * F",
         "test_grouped_matmul_cost_matches_its_rows_and_arrays"),
        ("a full ring buffer is read", "most = C if window is None else min(C, window)", "most = C",
         "test_decode_attention_cost_matches_its_slots_and_arrays"),
    ),
    *mutants_of(
        "workloads/types",
        "workloads",
        ("queries are the first positions", "ids[:, n - self.T :]", "ids[:, : self.T]",
         "test_segment_ids_are_aligned_to_the_last_positions"),
        ("tokens are routed to the least likely experts", "np.argsort(-scores, axis=1)", "np.argsort(scores, axis=1)", ROUTE),
        ("tokens are routed without noise", "1e-30)) + noise", "1e-30))", ROUTE),
    ),
]  # fmt: skip
