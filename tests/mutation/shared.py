"""Mutants of the modules that all operations share: validation, dispatch, cost, workloads."""

from tests.mutation.mutant import Mutant, mutants_of

MATCHES = "test_implementation_matches_reference"
BAD_ARGUMENT = "test_invalid_attention_argument_raises_with_its_name"
ROUTE = "test_route_follows_the_expert_distribution"

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
        ("negative caps pass", " and softcap > 0", "", f"{BAD_ARGUMENT}[softcap is -1]"),
    ),
    *mutants_of(
        "dispatch",
        "dispatch",
        ("silent fallback", "if reason: raise", "if reason: return self.implementations[1].function; raise",
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
        ("a full ring buffer is read", "C if window is None else min(C, window)).sum()", "C).sum()",
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
