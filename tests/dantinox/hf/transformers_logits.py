"""Logits of transformers for small folders that `dantinox.save_hf` writes, kept in transformers_logits.npz.

    python -m tests.dantinox.hf.transformers_logits DIR      writes the folders; needs DantinoX
    python tests/dantinox/hf/transformers_logits.py DIR      runs them; needs transformers and torch, of any Python

The file has, by case, the logits of `TOKENS` and the greedy continuation of the first sequence.
"""

import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np

V = 50
TOKENS = np.random.default_rng(1).integers(0, V, (2, 24))  # beyond the windows
NEW_TOKENS = 64
FILE = Path(__file__).with_suffix(".npz")
SIZES = {"vocab_size": V, "dim": 24, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "mlp_ratio": 2.0, "max_context": 96}
OLMO = {"qk_norm": True, "qk_norm_all_heads": True, "norms": "post", "norm_eps": 1e-5}
AFMOE = {
    "attn_gate": "elementwise", "qk_norm": True, "norms": "both", "n_experts": 6, "experts_per_token": 2,
    "router": "sigmoid", "selection_bias": True, "shared_expert": True,
}  # fmt: skip
LINEAR = {
    "window": 6, "window_pattern": "SL", "rope_theta": 1e6, "rope_theta_windowed": 1e4, "rope_scaling": "linear",
    "rope_factor": 8.0,
}  # fmt: skip
GEMMA = {"mlp": "geglu", "norms": "both", "norm_offset": True, "qk_norm": True, "scale_embeddings": True}
CASES: dict[str, dict[str, Any]] = {
    "llama": {"n_kv_heads": 1, "rope_scaling": "llama3", "rope_factor": 4.0, "rope_original_context": 12},
    "mistral": {"window": 5, "head_dim": 10, "rope_theta": 500.0, "norm_eps": 1e-5},
    "mixtral": {"window": 7, "n_experts": 4, "experts_per_token": 3},
    "qwen3": {"qk_norm": True, "head_dim": 16},
    "qwen3, windows": {"qk_norm": True, "window": 5, "window_pattern": "LLSS", "tie_embeddings": False},
    "qwen3_moe": {"qk_norm": True, "head_dim": 8, "n_experts": 6, "experts_per_token": 2, "tie_embeddings": False},
    "qwen3_moe, window": {"qk_norm": True, "n_experts": 6, "experts_per_token": 3, "window": 6},
    "smollm3": {"rope_pattern": "RRN"},
    "smollm3, windows": {
        "rope_pattern": "RN",
        "window": 5,
        "window_pattern": "SSL",
        "attn_bias": True,
        "tie_embeddings": False,
    },
    "olmo2": OLMO | {"n_kv_heads": 4, "attn_bias": True},
    "olmo3": OLMO | {"window": 5, "window_pattern": "SSL", "tie_embeddings": False},
    "olmo3, yarn": OLMO
    | {
        "window": 6,
        "window_pattern": "SL",
        "rope_theta": 500.0,
        "rope_theta_windowed": 500.0,
        "rope_scaling": "yarn",
        "rope_factor": 4.0,
        "rope_original_context": 12,
    },
    "afmoe": AFMOE | {"window": 5, "window_pattern": "SSL", "rope_pattern": "RRN", "n_dense_layers": 1},
    "afmoe, wide": AFMOE
    | {
        "n_layers": 5,
        "window": 7,
        "window_pattern": "SL",
        "rope_pattern": "RN",
        "n_dense_layers": 2,
        "dense_ratio": 3.0,
        "shared_ratio": 4.0,
        "router_scale": 2.5,
        "scale_embeddings": True,
        "head_dim": 8,
        "attn_bias": True,
        "tie_embeddings": False,
    },
    "afmoe, dense": {
        "attn_gate": "elementwise",
        "qk_norm": True,
        "norms": "both",
        "window": 5,
        "window_pattern": "SL",
        "rope_pattern": "RN",
        "scale_embeddings": True,
        "tie_embeddings": False,
    },
    "gemma3_text": GEMMA | {"window": 5, "window_pattern": "SSL", "rope_theta_windowed": 100.0, "attn_scale": 12**-0.5},
    "gemma3_text, linear": GEMMA
    | LINEAR
    | {"head_dim": 8, "attn_bias": True, "logit_softcap": 20.0, "tie_embeddings": False},
    "qwen2": {"attn_bias": True, "attn_out_bias": False, "window": 5, "window_pattern": "LSSS"},
    "lfm3": {"attn_gate": "head", "qk_norm": True, "window": 5, "window_pattern": "SSSL"},
    "lfm3, norms": {"attn_gate": "head", "qk_norm": True, "norms": "both", "head_dim": 8, "tie_embeddings": False},
    "lfm3, no gate": LINEAR | {"qk_norm": True, "norms": "both", "attn_bias": True, "norm_eps": 1e-5},
}


PRESET_SIZES = {name: x for name, x in SIZES.items() if name != "mlp_ratio"} | {"head_dim": None, "window": 5}
CASES |= {f"lfm3, {name}": {"preset": name} for name in ("nano", "h100")}
CASES |= {f"afmoe, {name}": {"preset": name} for name in ("dante", "dante-moe")}
CASES |= {"qwen3_moe, nano-moe": {"preset": "nano-moe"}}
"""A preset has the sizes above and the rest of its own settings."""


def random_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return a weight of a model by its name; scales are near 1, products are of the size of their inputs."""
    x = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if name.endswith(("norm", "scale")):
        return np.float32(1 + 0.3 * x)
    return np.float32(x * (0.5 if name == "embedding" else 0.35))


def make_model(case: str, **overrides: Any) -> Any:
    """Return the model of a case."""
    from flax import nnx

    from dantinox import Transformer
    from dantinox.config import Config, ModelConfig
    from dantinox.model.params import split_params

    overrides = {"dtype": "float32"} | overrides
    if preset := CASES[case].get("preset"):
        config = Config.from_preset(preset, seq_len=64, **PRESET_SIZES | overrides).model
    else:
        config = ModelConfig(**SIZES | {"window": None} | CASES[case] | overrides)
    model_def, params = split_params(Transformer(config, rngs=nnx.Rngs(0)))
    return model_def.merge({name: random_weight(name, x.shape) for name, x in params.items()})


def write_folders(root: Path) -> None:
    """Write a folder per case."""
    from dantinox.hf.weights import save_hf

    for case in CASES:
        save_hf(make_model(case), root / case)


def run_folders(root: Path) -> None:
    """Load the folders by transformers and keep the results."""
    import torch
    from transformers import AutoModelForCausalLM

    kept = {}
    for case in CASES:
        model, info = AutoModelForCausalLM.from_pretrained(
            root / case, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
        with torch.no_grad():
            tokens = torch.tensor(TOKENS)
            kept[f"{case}: logits"] = model(tokens).logits.numpy()
            greedy = model.generate(
                tokens[:1], attention_mask=torch.ones_like(tokens[:1]), max_new_tokens=NEW_TOKENS, do_sample=False,
                eos_token_id=V, pad_token_id=0,
            )  # fmt: skip
        kept[f"{case}: greedy"] = greedy[0, TOKENS.shape[1] :].numpy()
        print(case, kept[f"{case}: greedy"])
    np.savez_compressed(FILE, **kept)


if __name__ == "__main__":
    (write_folders if __package__ else run_folders)(Path(sys.argv[1]))
