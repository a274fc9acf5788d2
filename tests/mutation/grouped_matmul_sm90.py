"""Mutants of the grouped matmuls and the mixture of experts on Hopper."""

from tests.mutation.mutant import Mutant, mutants_of

SNAKE_ORDER = "test_snake_order_visits_each_tile_once_panel_by_panel"
GMM = "test_output_and_gradients_match_without_races[bfloat16-N=129 M=192 F=320 E=4 sizes=3,0,73,51-width=256]"
NARROW_GMM = GMM.replace("M=192 F=320", "M=80 F=176")
MOE = "test_output_and_gradients_match_without_races[bfloat16-N=75 M=64 F=320 E=4 skew=one-width=256]"
CYCLES = "test_cycle_estimate_counts_rounds_of_the_slowest_sm"

MUTANTS: list[Mutant] = [
    *mutants_of(
        "ops/grouped_matmul/pallas_sm90/tile_scheduler",
        "grouped_matmul_sm90",
        ("every panel starts on the left", "jnp.where(panel % 2 == 1, column_tiles - 1 - column, column)", "column", SNAKE_ORDER),
        ("the last panel is as high as the others", "jnp.minimum(PANEL_ROW_TILES, row_tiles - panel * PANEL_ROW_TILES)",
         "jnp.int32(PANEL_ROW_TILES)", SNAKE_ORDER),
        ("the last tile of a thread block is lost", 'lax.axis_index("block") + (blocks - 1)', 'lax.axis_index("block")', GMM),
        ("rows of the next group are written", "jnp.minimum(self.task.row_end - first, WARPGROUP_ROWS)",
         "jnp.minimum(self.task.row_end + 1 - first, WARPGROUP_ROWS)", GMM),
        ("rows of the group before are written", "jnp.maximum(self.task.row_start - first, 0)",
         "jnp.maximum(self.task.row_start - 1 - first, 0)", GMM),
    ),
    *mutants_of(
        "ops/grouped_matmul/pallas_sm90/warp_specialized",
        "grouped_matmul_sm90",
        ("a stage is filled before it is free", "pl.when(step >= self.stages)", "pl.when(step >= 2 * self.stages)", GMM),
        ("a stage is released while it is multiplied", "plgpu.wgmma_wait(len(accs))", "plgpu.wgmma_wait(2 * len(accs))",
         "test_stage_is_released_after_its_wgmmas"),
        ("all chunks use one store buffer", "buffers.at[n % STORE_BUFFERS, i]", "buffers.at[0, i]", GMM),
        ("a chunk is overwritten while it is stored", "STORE_BUFFERS - 1 if n else 0, wait_read_only",
         "STORE_BUFFERS, wait_read_only", GMM),
        ("a chunk is stored before it is committed", "plgpu.commit_smem() for first, buffer in pieces: start_copy",
         "for first, buffer in pieces: start_copy", GMM),
        ("all pieces of a chunk are stored at its first column", "start_copy(first, buffer)", "start_copy(0, buffer)",
         NARROW_GMM),
        ("every run of rows starts at the first row", "start = rows.offset + (rows.count & -(2 * size))", "start = rows.offset", GMM),
        ("the last single row is not written", "while size:", "while size > 1:", GMM),
    ),
    *mutants_of(
        "ops/grouped_matmul/pallas_sm90/gmm",
        "grouped_matmul_sm90",
        ("every k step reads the first slice", "contracted = pl.ds(k * BLOCK_K, BLOCK_K)",
         "contracted = pl.ds(0, BLOCK_K)", GMM),
        ("both warpgroups multiply the same rows", "pl.ds(warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)",
         "pl.ds(0, WARPGROUP_ROWS)", GMM),
    ),
    *mutants_of(
        "ops/grouped_matmul/pallas_sm90/gmm",
        "moe_sm90",
        ("the router's weight of another row", "load_row_values(self.gmem.row_scale, rows)",
         "load_row_values(self.gmem.row_scale, rows._replace(first=tile.task.row))", MOE),
        ("the router's weight dropped", "chunk *= lax.broadcast_in_dim(row_scale, chunk.shape, [0])", "pass", MOE),
    ),
    *mutants_of(
        "ops/grouped_matmul/pallas_sm90/tgmm",
        "grouped_matmul_sm90",
        ("rows of the group before count", "(n >= start) & (n < end)", "n < end", GMM),
        ("a last partial slice is not zeroed", "pl.when((start > 0) | (end < BLOCK_K))", "pl.when(start > 0)", GMM),
        ("zeroed halves are not waited for", "plgpu.barrier_arrive(self.smem.rows_zeroed) plgpu.barrier_wait(self.smem.rows_zeroed)",
         "pass", GMM),
        ("zeroed rows are not committed", "plgpu.commit_smem() plgpu.barrier_arrive(self.smem.rows_zeroed)",
         "plgpu.barrier_arrive(self.smem.rows_zeroed)", GMM),
        ("half of dy is not zeroed", "pl.ds(self.warpgroup * half + n, CHUNK_COLUMNS)",
         "pl.ds(n, CHUNK_COLUMNS)", GMM),
    ),
    *mutants_of(
        "ops/moe/pallas_sm90/up_proj",
        "moe_sm90",
        ("gate is used for both up projections", "enumerate((gmem.w_gate, gmem.w_up))", "enumerate((gmem.w_gate, gmem.w_gate))",
         MOE),
        ("silu is of the way up", "(swiglu(gate, up), gate, up)", "(swiglu(up, gate), gate, up)", MOE),
    ),
    *mutants_of(
        "ops/moe/pallas_sm90/down_proj_bwd",
        "moe_sm90",
        ("wrong derivative of silu", "(1 + gate - silu)", "(1 - gate + silu)", MOE),
        ("dw_down without the weight", "weighted_dh * silu, router_weight * h", "weighted_dh * silu, h", MOE),
        ("gate and up of the first rows", "index = self.pipeline.slot(step), pl.ds(self.warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)",
         "index = self.pipeline.slot(step), pl.ds(0, WARPGROUP_ROWS)", MOE),
        ("gate and up are read while they are overwritten", "plgpu.commit_smem() self.pipeline.consumer_release(step)",
         "self.pipeline.consumer_release(step)", MOE),
        ("both halves of a chunk are the first", "value[:, n : n + EPILOGUE_COLUMNS]", "value[:, :EPILOGUE_COLUMNS]", MOE),
        ("half of a router weight gradient", "functools.reduce(jnp.add, dp_terms)", "dp_terms[0]", MOE),
        ("partial router weight gradients overwrite each other", "lax.div(tile.column, self.block_n)", "0", MOE),
        ("a row finds the previous visit", 'side="right"', 'side="left"', "test_gather_row_values_restores_row_order"),
    ),
    *mutants_of(
        "ops/moe/pallas_sm90/vjp",
        "moe_sm90",
        ("dx without dup", "gmm([dgate, dup], [w_gate, w_up]", "gmm([dgate, dgate], [w_gate, w_up]", MOE),
    ),
    *mutants_of(
        "mosaic_gpu",
        "grouped_matmul_sm90",
        ("an H20 has an H100's cores", "else 78 if", "else 132 if", "test_number_of_sms_follows_the_device_kind"),
    ),
    *mutants_of(
        "ops/grouped_matmul/pallas_sm90/vjp",
        "grouped_matmul_sm90",
        ("F is not checked", 'for name, size in (("M", M), ("F", F)):', 'for name, size in (("M", M),):',
         "test_unsupported_inputs_raise_with_the_reason"),
    ),
    *mutants_of(
        "ops/grouped_matmul/pallas_sm90/block_sizes",
        "grouped_matmul_sm90_block_sizes",
        ("SMs share the last tile", "math.ceil(work.row_tiles * math.ceil(work.J / sizes.block_n) / num_sms)",
         "work.row_tiles * math.ceil(work.J / sizes.block_n) / num_sms", CYCLES),
        ("reads from L2 are free", "max(multiply, from_l2, from_memory)", "max(multiply, from_memory)",
         CYCLES),
        ("the narrowest width that is nearly the fastest", "for width in sorted(widths, reverse=True)]",
         "for width in sorted(widths)]", "test_widest_of_tiles_that_are_nearly_as_fast_is_chosen"),
        ("more stages than shared memory holds", "8 if width == 64 else 4", "8", "test_chosen_tile_fits_shared_memory"),
    ),
]  # fmt: skip
