"""Small models of transformers with its default settings: what it saves, and its logits.

    DIR/bin/python tests/dantinox/hf/transformers_defaults.py DIR      needs transformers and torch, of any Python

transformers_defaults.json has, by family, the config.json and the names and shapes of the tensors that transformers
saves; transformers_defaults.npz the logits of `TOKENS` with `random_tensor` as the weights.
"""

import json
import sys
import zlib
from pathlib import Path

import numpy as np

V = 50
TOKENS = np.random.default_rng(2).integers(0, V, (2, 20))
SETTINGS, LOGITS = Path(__file__).with_suffix(".json"), Path(__file__).with_suffix(".npz")
SIZES = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
SMALL = {
    "num_key_value_heads": 2,
    "head_dim": 8,
    "moe_intermediate_size": 24,
    "num_experts": 5,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "sliding_window": 6,
}
"""Sizes of settings whose default is a number."""
WITHOUT_CONVOLUTIONS = {
    "layer_types": ["sliding_attention", "full_attention", *["sliding_attention"] * 3],
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
    },
}
CHANGES = {"lfm3": WITHOUT_CONVOLUTIONS}
"""Changes of the default settings to some that we read."""
CLASSES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "mixtral": "Mixtral",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3Moe",
    "qwen2": "Qwen2",
    "smollm3": "SmolLM3",
    "olmo2": "Olmo2",
    "olmo3": "Olmo3",
    "afmoe": "Afmoe",
    "gemma3_text": "Gemma3Text",
    "lfm3": "Lfm3",
}


def random_tensor(name: str, shape: list[int]) -> np.ndarray:
    """Return the tensor of a name; scales are near 1, products are of the size of their inputs."""
    x = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if name.endswith("norm.weight"):
        return np.float32(1 + 0.3 * x)
    return np.float32(0.3 * x)


def main(root: Path) -> None:
    """Save the models by transformers, replace their weights and keep the results."""
    import torch
    import transformers
    from safetensors import safe_open
    from safetensors.numpy import save_file

    settings, logits = {}, {}
    for family, name in CLASSES.items():
        config_class = getattr(transformers, f"{name}Config")
        defaults = config_class().to_dict()
        small = {key: x for key, x in SMALL.items() if defaults.get(key) is not None}
        config = config_class(**SIZES | small | CHANGES.get(family, {}))
        folder = root / family
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        file = folder / "model.safetensors"
        with safe_open(file, "np") as tensors:
            shapes = {key: tensors.get_slice(key).get_shape() for key in tensors.keys()}  # noqa: SIM118
        save_file({key: random_tensor(key, shape) for key, shape in shapes.items()}, file, {"format": "pt"})
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
        with torch.no_grad():
            logits[family] = model(torch.tensor(TOKENS)).logits.numpy()
        print(family, logits[family].std())
        settings[family] = {"config": json.loads((folder / "config.json").read_text("utf-8")), "tensors": shapes}
    lines = ",\n".join(f"{json.dumps(family)}: {json.dumps(x)}" for family, x in settings.items())
    SETTINGS.write_text(f"{{\n{lines}\n}}\n", "utf-8")
    np.savez_compressed(LOGITS, **logits)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
