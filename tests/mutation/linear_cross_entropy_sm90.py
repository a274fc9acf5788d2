"""Mutants of the linear cross-entropy on Hopper, which the tests run on a simulated GPU."""

from tests.mutation.mutant import Mutant, mutants_of

MATCH = "test_output_and_gradients_match_without_races"
ALL = f"{MATCH}[bfloat16-N=150 M=70 V=333 softcap=3.0 z_loss=0.1 absent=some-width=64]"
WIDE = f"{MATCH}[bfloat16-N=130 M=64 V=600 absent=some-width=256]"
NAN = "test_rows_without_part_have_no_effect_and_runs_are_equal"
LARGE = "test_large_logits_and_small_gradients_fit"
SPLITS = "test_splits_are_not_empty_and_keep_the_sms_busy"
REFUSED = "test_unsupported_inputs_raise_with_the_reason"
SUITE = "linear_cross_entropy_sm90"

MUTANTS: list[Mutant] = [
    *mutants_of(
        "ops/linear_cross_entropy/pallas_sm90/fwd",
        SUITE,
        ("words past the vocabulary count", "self.V - tile * block_v - n, x, -jnp.inf", "self.V, x, -jnp.inf", ALL),
        ("the sum is not rescaled", "l * jnp.exp(m - m_next)", "l", ALL),
        ("a tile's maximum is its own", "jnp.maximum(m, jnp.max(largest, axis=1))", "jnp.max(largest, axis=1)", ALL),
        ("the maximum of the last columns", "x if largest is None else jnp.maximum(largest, x)", "x", LARGE),
        ("the target of the last columns", "target if found is None else found + target", "target", WIDE),
        ("the last tile's target only", "target_logit += jnp.sum(", "target_logit = jnp.sum(", ALL),
        ("every split starts at the first word", "first_tile = split * self.split_tiles", "first_tile = split * 0", ALL),
        ("both warpgroups have the first rows", "row = task.row + self.warpgroup * WARPGROUP_ROWS", "row = task.row", ALL),
        ("sums are overwritten while they are stored", "plgpu.wait_smem_to_gmem(0, wait_read_only=True)", "pass", ALL),
        ("sums are stored before they are committed", "plgpu.commit_smem() plgpu.copy_smem_to_gmem(", "plgpu.copy_smem_to_gmem(", ALL),
    ),
    *mutants_of(
        "ops/linear_cross_entropy/pallas_sm90/common",
        SUITE,
        ("every k step reads the first slice", "contracted = pl.ds(k * BLOCK_K, BLOCK_K)", "contracted = pl.ds(0, BLOCK_K)", ALL),
        ("both warpgroups multiply the same rows", "pl.ds(warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)", "pl.ds(0, WARPGROUP_ROWS)", ALL),
        ("a target is the next word", "per_row(targets - first_word, 8)", "per_row(targets - first_word + 1, 8)", ALL),
        ("targets in the first eight columns only", "range(first_column, first_column + columns, 8)", "[0] * (columns // 8)", ALL),
        ("no soft cap", "softcap * softcap_tanh(s, scale=1.0, softcap=softcap)", "s", ALL),
    ),
    *mutants_of(
        "ops/linear_cross_entropy/pallas_sm90/bwd",
        SUITE,
        ("the target's gradient is added", "ds -= jnp.where(", "ds += jnp.where(", ALL),
        ("no derivative of the soft cap", "ds *= 1.0 - t * t", "pass", ALL),
        ("maxima of the first rows", "m, dweight, dtarget = (load_rows(x, row)", "m, dweight, dtarget = (load_rows(x, tile.row)", ALL),
        ("targets of the first rows", "targets = load_rows(gmem.targets, row)", "targets = load_rows(gmem.targets, tile.row)", ALL),
        ("chunks of columns at the first one", "pl.ds(tile.word + n, columns)", "pl.ds(tile.word, columns)", WIDE),
        ("words of w past the chunk", "launch(inputs, pl.cdiv(words, COLUMNS) * COLUMNS, config)[:, :words]",
         "launch(inputs, words // COLUMNS * COLUMNS, config)", ALL),
    ),
    *mutants_of(
        "ops/linear_cross_entropy/pallas_sm90/vjp",
        SUITE,
        ("NaN of a row without part", "h = jnp.where((targets >= 0)[:, None], h, jnp.zeros_like(h))", "pass", NAN),
        ("cotangent of a row without part", "dloss = jnp.where(targets >= 0, dloss, 0)", "pass", NAN),
        ("weights are not normalized", "dlse / total", "dlse", ALL),
        ("float32 is multiplied in bfloat16", "if dtype not in DTYPES:", "if False:", REFUSED),
        ("soft caps of any size", "return softcap_unsupported(softcap)", "return None", REFUSED),
        ("a second derivative comes out", 'return first_order(call, "linear_cross_entropy")', "return call",
         "test_second_derivative_is_refused"),
    ),
    *mutants_of(
        "ops/linear_cross_entropy/pallas_sm90/block_sizes",
        SUITE,
        ("one split for all", "return min(range(num_v_blocks, 0, -1), key=slowest_sm)", "return num_v_blocks", SPLITS),
        ("SMs share the last task", "-(-tasks // num_sms)", "(tasks / num_sms)", SPLITS),
    ),
    *mutants_of(
        "mosaic_gpu",
        SUITE,
        ("small numbers lose their digits", "if softcap <= LARGE_SOFTCAP:", "if softcap <= 1e9:",
         "test_tanh_is_exact_near_zero_and_far_from_it"),
    ),
]  # fmt: skip
