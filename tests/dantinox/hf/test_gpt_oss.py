"""gpt-oss: folders like those of transformers, plain and in mxfp4, against NumPy float64."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy as safetensors

import dantinox
from bench import numpy_interpreter
from dantinox.config import Config
from dantinox.hf import mxfp4
from dantinox.hf.config import from_hf, to_hf
from dantinox.hf.weights import CONFIG, INDEX, WEIGHTS
from dantinox.model import flops
from dantinox.model.params import split_params
from dantinox.training.train_step import compute_loss
from tests.dantinox.hf import gpt_oss_oracle as oracle

EXPERTS = "model.layers.1.mlp.experts"
MXFP4 = {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}}
TOKENS = np.random.default_rng(1).integers(0, 50, (2, 24))  # beyond the window of 5
NAMES = ("gate_up_proj", "down_proj")


def write(folder, tensors, shards: int = 1, **changes):
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(oracle.CONFIG | changes))
    files = [WEIGHTS] if shards == 1 else [f"model-{i}.safetensors" for i in range(shards)]
    for i, file in enumerate(files):
        safetensors.save_file({name: tensors[name] for name in sorted(tensors)[i::shards]}, folder / file)
    if shards > 1:
        weight_map = {name: files[i % shards] for i, name in enumerate(sorted(tensors))}
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def pack(tensors, *suffixes: str) -> dict[str, np.ndarray]:
    """Return the tensors, with those of these suffixes in mxfp4."""
    out = {}
    for name, x in tensors.items():
        if name.endswith(suffixes):
            out[f"{name}_blocks"], out[f"{name}_scales"] = oracle.encode_mxfp4(x)
        else:
            out[name] = x
    return out


# Most of the time of these tests is LLVM's, and they run everything once.
quickly = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def arrays(model) -> dict[str, np.ndarray]:
    return {name: np.asarray(x) for name, x in split_params(model)[1].items()}


@pytest.fixture(scope="module")
def tensors():
    return oracle.random_tensors()


@pytest.fixture(scope="module")
def folder(tensors, tmp_path_factory):
    return write(tmp_path_factory.mktemp("gpt_oss") / "plain", tensors)


@pytest.fixture(scope="module")
def expected(tensors):
    return oracle.logits(tensors, TOKENS)


# --- logits and gradients ------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
@pytest.mark.sampled(2)
def test_logits_match_numpy(implementation, folder, expected):
    model = dantinox.load_hf(folder, attn=implementation, moe=implementation)
    definition, params = split_params(model)
    assert np.std(expected) > 0.5
    logits = quickly(lambda params: definition.merge(params)(TOKENS))(params)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        dict(layer_types=["full_attention"] * 3),
        dict(sliding_window=6),
        dict(swiglu_limit=7.0),
        dict(swiglu_alpha=1.702),
        dict(rope_theta=100.0),
        dict(rope_scaling=oracle.CONFIG["rope_scaling"] | {"truncate": True}),
        dict(num_experts_per_tok=3),
        dict(rms_norm_eps=1e-2),
    ],
    ids=lambda change: next(iter(change)),
)
def test_logits_would_differ_if_a_setting_were_ignored(change, tensors, expected):
    assert np.abs(oracle.logits(tensors, TOKENS, **change) - expected).max() > 1e-3


@pytest.mark.parametrize("part", ["sinks", "bias"])
def test_logits_would_differ_without(part, tensors, expected):
    zeroed = {name: x * 0 - 1e30 * (part == "sinks") if name.endswith(part) else x for name, x in tensors.items()}
    assert np.abs(oracle.logits(zeroed, TOKENS) - expected).max() > 0.1


def test_gradients_match_finite_differences_of_numpy(tensors, folder):
    """Of sinks, of every kind of bias, and of the router."""
    model = dantinox.load_hf(folder, attn="xla", moe="xla", router_aux_loss_coef=0.0, router_z_loss_coef=0.0)
    config = Config().replace(**vars(model.config))
    definition, params = split_params(model)
    inputs, targets = TOKENS[:, :12], TOKENS[:, 1:13]
    loss = lambda params: compute_loss(definition, config, params, inputs, targets, None)[0]
    gradient = {name: np.asarray(g) for name, g in numpy_interpreter.run(jax.grad(loss), params).items()}
    assert all(np.isfinite(g).all() for g in gradient.values())
    assert all(g.any() for g in gradient.values())

    def numpy_loss(name: str, index: tuple[int, ...], by: float) -> float:
        moved = dict(tensors)
        moved[name] = np.float64(moved[name])
        moved[name][index] += by
        x = oracle.logits(moved, inputs)
        x = x - np.log(np.exp(x).sum(-1, keepdims=True))
        return -np.take_along_axis(x, targets[..., None], -1).mean()

    block = "model.layers.1"
    for hf_name, index, name, at in (
        ("self_attn.sinks", (3,), "attention.sinks", (3,)),
        ("self_attn.q_proj.bias", (7,), "attention.q_bias", (1, 1)),
        ("self_attn.k_proj.bias", (11,), "attention.k_bias", (1, 5)),
        ("self_attn.v_proj.bias", (6,), "attention.v_bias", (1, 0)),
        ("self_attn.o_proj.bias", (9,), "attention.o_bias", (9,)),
        ("mlp.router.bias", (2,), "mlp.router_bias", (2,)),
        ("mlp.experts.gate_up_proj_bias", (1, 20), "mlp.gate_bias", (1, 10)),
        ("mlp.experts.gate_up_proj_bias", (1, 21), "mlp.up_bias", (1, 10)),
        ("mlp.experts.down_proj_bias", (0, 63), "mlp.down_bias", (0, 63)),
        ("mlp.experts.gate_up_proj", (1, 5, 9), "mlp.up", (1, 5, 4)),
    ):
        up, down = (numpy_loss(f"{block}.{hf_name}", index, by) for by in (1e-5, -1e-5))
        assert gradient[f"blocks.1.{name}"][at] == pytest.approx((up - down) / 2e-5, rel=1e-3, abs=1e-6), name


@pytest.mark.slow
def test_generation_picks_the_likeliest_token_of_numpy(tensors, folder):
    """Decoding with ring caches, prompts of different lengths, and drafts."""
    model = dantinox.load_hf(folder, attn="xla", moe="xla", decode="xla")
    prompts = [TOKENS[0, :9].tolist(), TOKENS[1, :3].tolist()]
    plain = dantinox.generate(model, prompts, max_new_tokens=12, temperature=0.0)
    assert plain == dantinox.generate(model, prompts, max_new_tokens=12, temperature=0.0, speculate=2)
    for prompt, new in zip(prompts, plain, strict=True):
        scores = oracle.logits(tensors, np.array([prompt + new]))[0, len(prompt) - 1 : -1]
        assert [int(i) for i in scores.argmax(-1)] == new


# --- mxfp4 ---------------------------------------------------------------------------------------


def test_every_code_and_every_scale_unpacks_exactly():
    """All 16 codes at each position of a byte, with scales from 2^-127, where values are subnormal, to 2^127."""
    scales = np.arange(255, dtype=np.uint8).reshape(1, 255, 1)
    low, high = np.arange(16, dtype=np.uint8), np.roll(np.arange(16, dtype=np.uint8), 5)
    blocks = np.broadcast_to(low + 16 * high, (1, 255, 1, 16)).copy()
    expected = np.empty((1, 32, 255))
    for scale in range(255):
        for i in range(16):
            expected[0, 2 * i, scale] = oracle.CODES[i] * 2.0 ** (scale - 127)
            expected[0, 2 * i + 1, scale] = oracle.CODES[high[i]] * 2.0 ** (scale - 127)
    with np.errstate(over="ignore"):
        expected = expected.astype(np.float32)
    unpacked = mxfp4.unpack(blocks, scales)
    np.testing.assert_array_equal(unpacked.view(np.uint32), expected.view(np.uint32))  # the sign of zero too
    assert np.isfinite(unpacked[..., :253]).all() and np.isinf(unpacked[..., 254]).any()
    assert np.isnan(mxfp4.unpack(blocks, np.full_like(scales, 255))).all()


@pytest.mark.parametrize("packed", [NAMES, ("gate_up_proj",), ("1.mlp.experts.down_proj",)], ids=str)
@pytest.mark.sampled(2)
def test_mxfp4_folder_loads_as_its_unpacked_values(packed, tensors, tmp_path):
    """Beside bfloat16, and with experts of which only some are in mxfp4, in several files."""
    stored = {name: x.astype(jnp.bfloat16) for name, x in tensors.items()}
    stored = pack(stored, *packed)
    unpacked = {name: x for name, x in stored.items() if not name.endswith(("_blocks", "_scales"))}
    for name in stored:
        if name.endswith("_blocks"):
            whole = name.removesuffix("_blocks")
            unpacked[whole] = oracle.decode_mxfp4(stored[name], stored[f"{whole}_scales"]).astype(np.float32)
    unpacked = {name: x.astype(np.float32) for name, x in unpacked.items()}
    model = dantinox.load_hf(write(tmp_path / "packed", stored, shards=3, **MXFP4 | {"torch_dtype": "bfloat16"}))
    plain = dantinox.load_hf(write(tmp_path / "plain", unpacked))
    assert model.config.dtype == "bfloat16" and plain.config.dtype == "float32"
    mine, other = arrays(model), arrays(plain)
    assert mine.keys() == other.keys()
    assert all(np.array_equal(mine[name], other[name]) for name in mine)
    assert not np.array_equal(mine["blocks.1.mlp.down"], tensors[f"{EXPERTS}.down_proj"])


@pytest.mark.parametrize("scale", [0, 252])
def test_extreme_scales_load(scale, tensors, tmp_path):
    stored = pack(tensors, *NAMES)
    stored[f"{EXPERTS}.down_proj_scales"][:] = scale
    stored[f"{EXPERTS}.down_proj_blocks"][:] = 0x17  # 6 and 0.5
    model = dantinox.load_hf(write(tmp_path / "out", stored, **MXFP4))
    down = arrays(model)["blocks.1.mlp.down"]
    assert np.all(np.float64(down[:, 0::2]) == 6 * 2.0 ** (scale - 127))
    assert np.all(np.float64(down[:, 1::2]) == 0.5 * 2.0 ** (scale - 127))


def test_mxfp4_without_a_dtype_computes_in_bfloat16(tensors, tmp_path):
    stored = pack(tensors, *NAMES)
    folder = write(tmp_path / "out", stored, **MXFP4, torch_dtype=None)
    assert dantinox.load_hf(folder).config.dtype == "bfloat16"


# --- files ---------------------------------------------------------------------------------------


def test_saved_model_loads_bit_for_bit(folder, tensors, tmp_path):
    model = dantinox.load_hf(folder)
    dantinox.save_hf(model, tmp_path / "out")
    stored = safetensors.load_file(tmp_path / "out" / WEIGHTS)
    assert stored.keys() == tensors.keys()
    assert all(np.array_equal(stored[name], tensors[name]) for name in tensors)
    again = dantinox.load_hf(tmp_path / "out")
    assert again.config == model.config and again.config.window_pattern == "SL"
    assert all(np.array_equal(x, arrays(model)[name]) for name, x in arrays(again).items())


BLOCKS, SCALES = f"{EXPERTS}.gate_up_proj_blocks", f"{EXPERTS}.gate_up_proj_scales"
SINKS, BIAS = "model.layers.2.self_attn.sinks", "model.layers.0.mlp.router.bias"
DAMAGE = {
    "no sinks": (lambda t: t.pop(SINKS), rf"{SINKS} is missing"),
    "no bias": (lambda t: t.pop(BIAS), rf"{BIAS} is missing"),
    "no scales": (lambda t: t.pop(SCALES), rf"{SCALES} is missing"),
    "no blocks": (lambda t: t.pop(BLOCKS), rf"{BLOCKS} is missing"),
    "neither": (lambda t: [t.pop(BLOCKS), t.pop(SCALES)], r"1.mlp.experts.gate_up_proj is missing"),
    "both": (lambda t: t.update({BLOCKS[:-7]: t[BIAS]}), r"gate_up_proj_blocks \(and 1 more\) is not a tensor"),
    "other mxfp4": (lambda t: t.update({"lm_head.weight_blocks": t[BLOCKS]}), r"lm_head.weight_blocks is not a tensor"),
    "sinks": (lambda t: t.update({SINKS: t[SINKS][:3]}), rf"{SINKS} has shape \[3\]; allowed: \[4\]"),
    "blocks": (
        lambda t: t.update({BLOCKS: t[BLOCKS][:, :-1]}),
        rf"{BLOCKS} has shape \[4, 63, 2, 16\]; allowed: \[4, 64, 2, 16\]",
    ),
    "scales": (
        lambda t: t.update({SCALES: t[SCALES][..., :1]}),
        rf"{SCALES} has shape \[4, 64, 1\]; allowed: \[4, 64, 2\]",
    ),
    "dtype": (lambda t: t.update({SCALES: t[SCALES].astype(np.int8)}), rf"{SCALES} is I8; allowed: U8"),
    "nan": (lambda t: t.update({SCALES: t[SCALES] * 0 + 255}), rf"{SCALES} has a scale that is NaN \(255\) or"),
    "huge": (lambda t: t.update({SCALES: t[SCALES] * 0 + 254}), rf"{SCALES} has a scale .* 2\^128 or more"),
}


@pytest.mark.parametrize("name", DAMAGE)
@pytest.mark.sampled(2)
def test_damaged_folder_raises_one_line_with_the_tensor(name, tensors, tmp_path):
    damage, message = DAMAGE[name]
    stored = pack(tensors, *NAMES)
    damage(stored)
    with pytest.raises(ValueError, match=message) as error:
        dantinox.load_hf(write(tmp_path / "out", stored, **MXFP4))
    assert "\n" not in str(error.value)


def test_mxfp4_needs_a_multiple_of_32_inputs(tmp_path):
    sizes = dict(hidden_size=48, intermediate_size=32)
    stored = oracle.random_tensors(**sizes)
    for name in [name for name in stored if name.endswith("gate_up_proj")]:
        stored[f"{name}_blocks"], stored[f"{name}_scales"] = oracle.encode_mxfp4(stored.pop(name)[:, :32])
    with pytest.raises(ValueError, match=r"gate_up_proj_blocks cannot hold 48 inputs; allowed: a multiple of 32"):
        dantinox.load_hf(write(tmp_path / "out", stored, **MXFP4, **sizes))


# --- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(quantization_config={"quant_method": "gptq"}), "quantization_config is .*'gptq'.*does not support"),
        (dict(layer_types=["full_attention"] * 2), "layer_types are .*; allowed: sliding_attention or full_attention"),
        (dict(layer_types=["linear"] * 3), "layer_types are linear, linear, linear; allowed: sliding_attention or"),
        (dict(sliding_window=None), "sliding_window is None; allowed: an integer, 1 or more, with layers of"),
        (dict(hidden_act="gelu"), "hidden_act is 'gelu'"),
        (dict(swiglu_limit=-1.0), "mlp_limit is -1.0; it must be positive"),
        (dict(rope_scaling=oracle.CONFIG["rope_scaling"] | {"truncate": "no"}), "rope_truncate is 'no'; allowed: true"),
        (dict(rope_scaling=oracle.CONFIG["rope_scaling"] | {"beta_fast": 16}), "beta_fast is 16"),
        (dict(num_experts_per_tok=5), "experts_per_token is 5 but n_experts is 4"),
    ],
)
def test_unsupported_config_raises_one_line(changes, message):
    with pytest.raises(dantinox.ConfigError, match=message) as error:
        from_hf(oracle.CONFIG | changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("layers", "experts", "total", "active"), [(24, 32, 20.91, 3.61), (36, 128, 116.83, 5.13)], ids=["20b", "120b"]
)
def test_published_sizes(layers, experts, total, active):
    """The parameters in billions of OpenAI's model card, which leaves the embedding out of the active ones."""
    small = {"vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880, "num_attention_heads": 64}
    small |= {"num_hidden_layers": layers, "num_local_experts": experts, "max_position_embeddings": 131072}
    config = from_hf(small | {"model_type": "gpt_oss"})
    assert round(flops.total_parameters(config) / 1e9, 2) == total
    assert round((flops.active_parameters(config) - 201088 * 2880) / 1e9, 2) == active
    assert (config.rope_theta, config.rope_scaling, config.rope_factor) == (150_000, "yarn", 32)
    assert (config.rope_original_context, config.rope_truncate) == (4096, False)
    assert (config.window, config.window_pattern, config.resolved_head_dim, config.n_kv_heads) == (128, "SL", 64, 8)
    assert (config.experts_per_token, config.norm_eps, config.mlp_limit, config.mlp_alpha) == (4, 1e-5, 7, 1.702)
    assert from_hf(to_hf(config)) == config


@pytest.mark.slow
def test_config_of_transformers_gives_the_same_settings():
    transformers = pytest.importorskip("transformers")
    default = transformers.GptOssConfig()
    config = from_hf(default.to_dict())
    assert config == from_hf({name: default.to_dict()[name] for name in MINIMAL} | {"model_type": "gpt_oss"})
    for changes in (
        {},
        dict(rope_scaling="none", rope_factor=1.0, rope_original_context=None, rope_truncate=True),
        dict(rope_scaling="linear", rope_original_context=None, rope_truncate=True),
        dict(window=None, window_pattern="S", attn_bias=False, mlp_alpha=2.0, mlp_limit=3.0),
        dict(window_pattern="LLS"),
    ):
        model = dantinox.ModelConfig(**vars(config) | changes)
        assert from_hf(transformers.GptOssConfig(**to_hf(model)).to_dict()) == model


MINIMAL = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
MINIMAL += ("max_position_embeddings",)
