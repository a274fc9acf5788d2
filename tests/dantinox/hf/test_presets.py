"""Every preset has a Hugging Face layout, and transformers the same logits in it; test_families has small models."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from dantinox import Config, Transformer
from dantinox.config import presets
from dantinox.hf.config import to_hf
from dantinox.hf.weights import CONFIG, load_hf, save_hf
from dantinox.model.params import split_params
from tests.dantinox.hf.transformers_logits import CASES, V, random_weight

LAYOUTS = {"nano": "lfm3", "h100": "lfm3", "nano-moe": "qwen3_moe", "dante": "afmoe", "dante-moe": "afmoe"}
NARROW = {"h100": {"dim": 192, "head_dim": 128}}  # 491M parameters otherwise


def test_every_preset_has_a_layout():
    assert {preset: to_hf(Config.from_preset(preset).model)["model_type"] for preset in presets()} == LAYOUTS
    cases = {settings["preset"]: case for case, settings in CASES.items() if "preset" in settings}
    assert {preset: case.partition(",")[0] for preset, case in cases.items()} == LAYOUTS


@pytest.mark.slow
@pytest.mark.parametrize("preset", LAYOUTS)
def test_preset_has_the_logits_of_transformers(preset, tmp_path):
    """With all its sizes but that of the vocabulary, and narrow if it is large."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = Config.from_preset(preset, vocab_size=V, dtype="float32", **NARROW.get(preset, {})).model
    model_def, params = split_params(Transformer(config, rngs=nnx.Rngs(0)))
    params = {
        name: random_weight(name, x.shape) if "norm" in name or name.endswith("bias") else x
        for name, x in params.items()
    }
    model = model_def.merge(params)
    save_hf(model, tmp_path / "out")
    assert json.loads((tmp_path / "out" / CONFIG).read_text("utf-8"))["model_type"] == LAYOUTS[preset]
    assert load_hf(tmp_path / "out").config == config
    tokens = np.random.default_rng(0).integers(0, V, (1, config.window + 40))
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager", output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    logits = jax.jit(lambda params: model_def.merge(params)(tokens))(params)
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max())
