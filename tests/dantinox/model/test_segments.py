"""Texts packed into one row: the same losses, gradients and logits as each text alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dantinox import Transformer
from dantinox.config import Config
from dantinox.data.packing import Example, PackedRows, pack
from dantinox.model.params import split_params
from dantinox.model.rope import positions_in_segments
from dantinox.training.train_step import compute_loss

SIZES = {
    "vocab_size": 29, "dim": 16, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "window": 5, "window_pattern": "SL",
    "max_context": 32, "seq_len": 24, "dtype": "float32", "moe": "xla", "loss": "xla",
}  # fmt: skip
EXPERTS = {"n_experts": 3, "experts_per_token": 2, "router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0}
FEATURES = {"attn_gate": "elementwise", "qk_norm": True, "attn_sinks": True, "attn_softcap": 5.0}
RNG = np.random.default_rng(0)
LENGTHS = (7, 12, 2, 3, 17, 9)


def examples() -> list[Example]:
    found = []
    for n in LENGTHS:
        learned = RNG.random(n) < 0.7
        learned[-1] = True
        found.append(Example(RNG.integers(0, 29, n).astype(np.int32), learned))
    return found


def test_positions_restart_with_each_segment():
    segment_ids = jnp.array([[0, 0, 0, 1, 1, -1], [4, 4, 4, 4, 4, 4], [0, 1, 2, 3, 3, 0]])
    positions = [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 1, 0]]
    np.testing.assert_array_equal(positions_in_segments(segment_ids), positions)


@pytest.mark.parametrize("attn", [pytest.param("xla", marks=pytest.mark.slow), "pallas"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param(FEATURES | EXPERTS, marks=pytest.mark.slow),
        pytest.param({"pos_encoding": "learned"}, marks=pytest.mark.slow),
    ],
    ids=["plain", "features", "learned positions"],
)
def test_packed_losses_and_gradients_equal_unpacked_ones(attn, settings):
    config = Config().replace(**SIZES | settings | {"attn": attn})
    model_def, params = split_params(Transformer(config.model, rngs=nnx.Rngs(0)))
    noise = {name: 0.1 * RNG.normal(size=x.shape) for name, x in params.items()}
    params = {name: x + noise[name].astype(np.float32) for name, x in params.items()}
    drawn = examples()
    packed, num_cut = pack(drawn, 24)
    assert num_cut == 0 and len(packed.inputs) < len(drawn)
    alone = [pack([example], 24)[0] for example in drawn]
    unpacked = PackedRows(*(np.concatenate(parts) for parts in zip(*alone, strict=True)))

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def loss_and_grad(params, rows):
        inputs, targets, segment_ids = rows
        return jax.value_and_grad(
            lambda params: compute_loss(model_def, config, params, inputs, targets, None, None, segment_ids)[0]
        )(params)

    loss, grads = loss_and_grad(params, packed)
    other, other_grads = loss_and_grad(params, unpacked)
    without = loss_and_grad(params, unpacked._replace(segments=None))[0]  # a text at the start of its own row
    assert abs(loss - other) < 1e-6 * abs(other) and abs(loss - without) < 1e-6 * abs(other)
    for name, grad in grads.items():
        np.testing.assert_allclose(grad, other_grads[name], atol=2e-6 * float(jnp.abs(other_grads[name]).max() + 1))
    crossed = loss_and_grad(params, packed._replace(segments=None))[0]
    assert abs(crossed - loss) > 1e-4, "texts that see each other have other losses"


def test_one_segment_is_a_row_as_it_is():
    model = Transformer(Config().replace(**SIZES).model, rngs=nnx.Rngs(0))
    tokens = jnp.asarray(RNG.integers(0, 29, (2, 12)))
    one = model.hidden(tokens, segment_ids=jnp.zeros((2, 12), jnp.int32))[0]
    np.testing.assert_allclose(one, model.hidden(tokens)[0], atol=1e-6)
