"""Every family as transformers saves it with its default settings, and with damaged ones."""

import copy
import functools
import json
import math
import random

import jax
import numpy as np
import pytest
import safetensors.numpy as safetensors

import dantinox
from dantinox.hf.config import from_hf, to_hf
from dantinox.hf.families import FAMILIES
from dantinox.hf.weights import CONFIG, WEIGHTS, load_hf
from dantinox.model.params import split_params
from tests.dantinox.hf.transformers_defaults import LOGITS, SETTINGS, TOKENS, random_tensor

FROZEN = json.loads(SETTINGS.read_text("utf-8"))
NEW = ("qwen2", "smollm3", "olmo2", "olmo3", "afmoe", "gemma3_text", "lfm3")
quickly = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def tensors(family):
    return {name: random_tensor(name, shape) for name, shape in FROZEN[family]["tensors"].items()}


def write(folder, family, arrays=None, **changes):
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(FROZEN[family]["config"] | changes), "utf-8")
    safetensors.save_file(tensors(family) if arrays is None else arrays, folder / WEIGHTS)
    return folder


def test_file_has_every_family():
    assert FROZEN.keys() | {"gpt_oss"} == FAMILIES.keys()  # gpt-oss has an oracle in NumPy


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in NEW else pytest.mark.slow) for name in FROZEN]
)
@pytest.mark.sampled(2)
def test_folder_of_transformers_gives_its_logits(family, tmp_path):
    model_def, params = split_params(load_hf(write(tmp_path / "here", family), attn="xla", moe="xla"))
    logits = quickly(lambda params: model_def.merge(params)(TOKENS))(params)
    with np.load(LOGITS) as file:
        expected = file[family]
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("family", FROZEN)
def test_settings_survive_a_round_trip(family):
    config = from_hf(FROZEN[family]["config"])
    assert from_hf(to_hf(config, family)) == config
    stored = {name for name in FROZEN[family]["config"] if name in to_hf(config, family)}
    assert {"hidden_size", "num_hidden_layers", "vocab_size"} <= stored


# --- damage --------------------------------------------------------------------------------------

WRONG = [None, True, False, 0, 1, 2, 3, -1, -7, 10**9, 10**40, 10**400, 0.5, -0.5, 1e-30, 1e300, math.inf, -math.inf,
         math.nan, "", "x", "7", "sliding_attention", [], [1], ["full_attention"], [[]], [{}], ["x"] * 5, [0] * 5, {},
         {"rope_type": "yarn"}, {"rope_type": "linear", "factor": 1e308}, {"full_attention": 3}]  # fmt: skip
EXTRA = ["rope_scaling", "rope_theta", "rope_parameters", "layer_types", "sliding_window", "use_sliding_window",
         "max_window_layers", "dantinox", "quantization_config", "dtype", "torch_dtype", "attention_bias", "mlp_bias",
         "head_dim", "partial_rotary_factor", "original_max_position_embeddings", "norm_topk_prob",
         "no_rope_layers", "no_rope_layer_interval"]  # fmt: skip


def mutate(config: dict, rng: random.Random) -> dict:
    """Return settings of which one to three are wrong, missing or new, at any depth."""
    config = copy.deepcopy(config)
    for _ in range(rng.randint(1, 3)):
        table = config
        nested = [x for x in table.values() if isinstance(x, dict)]
        if nested and rng.random() < 0.25:
            table = rng.choice(nested)
        known = list(table) + (EXTRA if table is config else ["rope_type", "factor", "attention_factor", "truncate"])
        name = rng.choice(known)
        if name == "model_type" and rng.random() < 0.9:
            continue
        if isinstance(table.get(name), list) and table[name] and rng.random() < 0.5:
            table[name][rng.randrange(len(table[name]))] = rng.choice(WRONG)
        elif rng.random() < 0.25:
            table.pop(name, None)
        else:
            table[name] = rng.choice(WRONG)
    return config


def gpt_oss():
    return to_hf(dantinox.ModelConfig(n_experts=4, attn_sinks=True, moe_bias=True, mlp="swiglu_clamped", window=8))


@pytest.mark.parametrize("count", [20, pytest.param(500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", FAMILIES)
def test_damaged_settings_give_one_line_or_a_model(family, count):
    config, rng = (FROZEN[family]["config"] if family in FROZEN else gpt_oss()), random.Random(family)
    loaded = 0
    for _ in range(count):
        damaged = mutate(config, rng)
        try:
            settings = from_hf(damaged)
            loaded += 1
        except dantinox.ConfigError as error:
            assert "\n" not in str(error) and str(error), damaged
        except Exception as error:
            raise AssertionError(f"{damaged} gives {error!r}") from error
        else:
            if settings.n_layers < 100:
                assert from_hf(to_hf(settings, family)) == settings, damaged
    assert 0.1 * count < loaded < 0.9 * count


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name == "qwen2" else pytest.mark.slow) for name in NEW]
)
def test_damaged_tensor_is_named_in_one_line(family, tmp_path):
    """Each kind of tensor of layer 1 is missing, has another shape or another dtype; an unknown one is there."""
    names = [name for name in FROZEN[family]["tensors"] if ".layers.1." in name or "layers" not in name]
    names = [name for name in names if ".experts." not in name or ".experts.1." in name]
    here = write(tmp_path / "here", family)
    whole = tensors(family)

    def refused(changes, message):
        changed = {name: x for name, x in (whole | changes).items() if x is not None}
        safetensors.save_file(changed, here / WEIGHTS)
        with pytest.raises(ValueError, match=message) as error:
            load_hf(here)
        assert "\n" not in str(error.value)

    for i, name in enumerate(names):
        refused({name: None}, rf"{name} is missing")
        if i % 3 == 0:
            refused({name: whole[name][:-1]}, rf"{name} has shape .*; allowed: ")
            refused({name: whole[name].astype(np.int32)}, rf"{name} is I32; allowed: F32")
            extra = name.replace(".weight", "") + ".extra"
            refused({extra: np.ones(3, np.float32)}, rf"{extra} is not a tensor of a model")


def test_tensors_of_two_dtypes_load(tmp_path):
    """As in published folders: matrices in bfloat16, norms in float32."""
    bfloat16 = jax.numpy.bfloat16
    arrays = {name: x if x.ndim == 1 else x.astype(bfloat16) for name, x in tensors("qwen3").items()}
    model = load_hf(write(tmp_path / "here", "qwen3", arrays, dtype="bfloat16"))
    params = split_params(model)[1]
    assert model.config.dtype == "bfloat16"
    np.testing.assert_array_equal(params["norm"], arrays["model.norm.weight"])
    np.testing.assert_array_equal(params["embedding"], arrays["model.embed_tokens.weight"].astype(np.float32))
