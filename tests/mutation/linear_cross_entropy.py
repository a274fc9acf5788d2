"""Mutants of the linear cross-entropy."""

from tests.mutation.mutant import Mutant, mutants_of

TILES = "test_tile_size_does_not_change_xla[random-block_v=7-block_n=4]"
EQUAL = "test_tile_size_does_not_change_xla[equal-block_v=7-block_n=4]"
ONE_TILE = "test_tile_size_does_not_change_xla[random-block_v=50-block_n=4]"
SYMBOL = "test_tiles_of_rows_below_transformations[export]"
NAN_IN_TILES = "test_rows_without_part_do_not_affect_tiles[value=nan]"
PRODUCTS = "test_equal_cotangents_take_three_products"
NAN = "test_rows_without_part_do_not_affect_results[xla]"
FLOAT16 = "test_float16_gradients_of_a_mean_do_not_vanish[xla]"
RANGE = "test_logits_beyond_the_range_of_exponentials[xla]"
PAST = "test_target_past_the_vocabulary_takes_no_part[xla]"
PARTS = "test_tile_sizes_do_not_change_results[N=70-TPU-parts of tiles]"
UNEVEN = "test_tile_sizes_do_not_change_results[N=70-TPU-uneven parts]"

MUTANTS: list[Mutant] = [
    *mutants_of(
        "ops/linear_cross_entropy/xla",
        "linear_cross_entropy",
        ("NaN of a row without part reaches dw", "h = jnp.where((targets >= 0)[:, None], h, 0)", "", NAN),
        ("cotangent of a row without part", "dloss = jnp.where(takes_part, dloss, 0)", "pass", (NAN, NAN_IN_TILES)),
        ("the sum is not rescaled", "stats.total * jnp.exp(stats.row_max - row_max)", "stats.total", SYMBOL),
        (
            "each tile has a maximum of its own",
            "jnp.maximum(stats.row_max, jnp.max(s, axis=1))",
            "jnp.max(s, axis=1)",
            RANGE,
        ),
        (
            "the last words are skipped",
            "return body(size - rest, rest, carry) if rest else carry",
            "return carry",
            TILES,
        ),
        ("the first tile is skipped", "np.int32(0), np.int32(num_full)", "np.int32(1), np.int32(num_full)", TILES),
        ("the last tile's target only", "stats.target + target)", "target)", SYMBOL),
        (
            "targets of the first tile in every tile of logits",
            "_tile_logits(h, _slice(w, v, size), options), targets - v)",
            "_tile_logits(h, _slice(w, v, size), options), targets)",
            SYMBOL,
        ),
        (
            "targets of the first tile in every tile of gradients",
            "_gradients(s, h, w_tile, targets - v, stats, dloss, options)",
            "_gradients(s, h, w_tile, targets, stats, dloss, options)",
            (SYMBOL, TILES),
        ),
        (
            "targets of the first columns in all columns",
            "_slice(w, v, width), targets_tile - v, stats, dloss, options)",
            "_slice(w, v, width), targets_tile, stats, dloss, options)",
            (TILES, EQUAL),
        ),
        ("dh of the last tile only", "return dh + dh_part,", "return dh_part,", SYMBOL),
        ("dh of the last columns only", "return dh_tile + dh_part,", "return dh_part,", (TILES, EQUAL)),
        ("dw of the last rows only", "_slice(dw, v, width) + dw_part", "dw_part", EQUAL),
        ("dh is not scaled", "dh = dh * dloss[:, None]", "pass", (TILES, EQUAL)),
        ("dw is not scaled", "lambda: dw * common,", "lambda: dw,", EQUAL),
        (
            "dw is scaled by one cotangent of several",
            "jnp.all(jnp.where(takes_part, dloss == common, True))",
            "jnp.any(takes_part)",
            TILES,
        ),
        (
            "rows without part are compared",
            "jnp.all(jnp.where(takes_part, dloss == common, True))",
            "jnp.all(dloss == common)",
            PRODUCTS,
        ),
        ("the first row's cotangent", "jnp.argmax(takes_part)", "0", PRODUCTS),
        (
            "no gradient of the z-loss",
            "dlse = lse_gradient(dloss, stats.lse, options.z_loss)",
            "dlse = dloss",
            (TILES, ONE_TILE),
        ),
        (
            "half a gradient of the z-loss",
            "stats.lse, options.z_loss)",
            "stats.lse, options.z_loss / 2)",
            (TILES, ONE_TILE),
        ),
        (
            "no derivative of the soft cap",
            "ds = ds * cap_derivative(s, softcap=options.softcap)",
            "pass",
            (TILES, ONE_TILE),
        ),
        (
            "the target's gradient has the z-loss",
            "jnp.where(_is_target(targets, s.shape[1]), dloss[:, None], 0)",
            "jnp.where(_is_target(targets, s.shape[1]), dlse[:, None], 0)",
            (TILES, ONE_TILE),
        ),
        (
            "gradients of logits in float16",
            "product_dtype = gradient_dtype(h.dtype)",
            "product_dtype = h.dtype",
            FLOAT16,
        ),
        ("loss of a row without part", "return jnp.where(targets >= 0, loss, 0)", "return loss", NAN),
    ),
    *mutants_of(
        "integers",
        "linear_cross_entropy",
        (
            "a target past the vocabulary is clamped",
            "jnp.where((ids >= 0) & (ids < V), ids, jnp.int32(-1))",
            "jnp.minimum(jnp.maximum(ids, -1), V - 1)",
            PAST,
        ),
    ),
    *mutants_of(
        "ops/linear_cross_entropy/pallas_tpu/fwd",
        "linear_cross_entropy_tpu",
        (
            "state of the rows before",
            "@pl.when(v_block == 0)",
            "@pl.when((v_block == 0) & (pl.program_id(0) == 0))",
            PARTS,
        ),
        ("words past the vocabulary count", "if masked:", "if False:", PARTS),
        ("the sum is not rescaled", "sum_ref[:, n] * jnp.exp(old_max - new_max)", "sum_ref[:, n]", PARTS),
        ("losses after the first tile", "v_block == config.num_v_blocks - 1", "v_block == 0", PARTS),
        ("loss of a row without part", "jnp.where(targets_ref[...] >= 0, loss, 0.0)", "loss", PARTS),
        ("z-loss of the lse", "config.z_loss * lse * lse", "config.z_loss * lse", PARTS),
    ),
    *mutants_of(
        "ops/linear_cross_entropy/pallas_tpu/bwd",
        "linear_cross_entropy_tpu",
        ("NaN past the vocabulary in dh", "rows_of_w(config, w_ref, v_block, masked=masked)", "w_ref[...]", PARTS),
        (
            "gradients past the vocabulary in dh",
            "s_ref[tile.v, n], rows, masked=masked)",
            "s_ref[tile.v, n], rows, masked=False)",
            PARTS,
        ),
        (
            "dh keeps the sums of other rows",
            "@pl.when(v_block == 0)",
            "@pl.when((v_block == 0) & (pl.program_id(0) == 0))",
            PARTS,
        ),
        (
            "dw keeps the sums of other words",
            "@pl.when(pl.program_id(1) == 0)",
            "@pl.when((pl.program_id(1) == 0) & (v_block == 0))",
            PARTS,
        ),
        ("dw of the first rows", "pl.program_id(1) == pl.num_programs(1) - 1", "pl.program_id(1) == 0", PARTS),
    ),
    *mutants_of(
        "ops/linear_cross_entropy/pallas_tpu/common",
        "linear_cross_entropy_tpu",
        ("no derivative of the soft cap", "ds = ds * cap_derivative(s, softcap=config.softcap)", "pass", PARTS),
        (
            "parts count words from their block",
            "v_block * config.sizes.block_v + v.start, v.size",
            "v_block * config.sizes.block_v, v.size",
            PARTS,
        ),
        (
            "the last part of a tile is skipped",
            "for start in range(0, size, step)",
            "for start in range(0, size - size % step, step)",
            UNEVEN,
        ),
        ("the last tile is not masked", "is_last = v_block == config.num_v_blocks - 1", "is_last = v_block < 0", PARTS),
    ),
    *mutants_of(
        "ops/linear_cross_entropy/pallas",
        "linear_cross_entropy_tpu",
        ("NaN of a row without part", "h = jnp.where((targets >= 0)[:, None], h, jnp.zeros_like(h))", "", PARTS),
        ("no gradient of the z-loss", "dlse = lse_gradient(dloss, lse, config.z_loss)", "dlse = dloss", PARTS),
    ),
]
