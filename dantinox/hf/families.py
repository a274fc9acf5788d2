"""The families of Hugging Face models that DantinoX reads and writes, one table entry each."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Layout = Literal["llama", "mistral", "mixtral", "qwen3", "qwen3_moe", "gpt_oss"]

COMMON_FIELDS = {
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "hidden": "intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "resolved_head_dim": "head_dim",
    "max_context": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
"""Our name of a setting -> that of config.json."""
_EXPERT_FIELDS = {
    "n_experts": "num_local_experts",
    "experts_per_token": "num_experts_per_tok",
    "router_aux_loss_coef": "router_aux_loss_coef",
}
_FIXED = {
    "pos_encoding": "rope",
    "attn_gate": "none",
    "qk_norm": False,
    "attn_softcap": None,
    "logit_softcap": None,
    "shared_expert": False,
    "mlp": "swiglu",
    "attn_bias": False,
    "attn_sinks": False,
    "moe_bias": False,
}


@dataclass(frozen=True)
class Family:
    """What a family stores, and where.

    Attributes:
        class_name: class of transformers.
        rope_theta: default base of the rotary positions.
        windows: full: no layer has a window; one: all or none; pattern: each layer has a window or not, by a list.
        experts: names of the experts' tensors; None: a dense MLP.
        fields: names of settings in config.json, beside `COMMON_FIELDS`.
        defaults: values of settings that config.json leaves out, where they are not ours.
        fixed: settings of which the family has one value.
        required: other settings of config.json, written, and of which one value is read.
        switch: whether config.json names a window that holds only with `use_sliding_window`.
    """

    class_name: str
    rope_theta: float = 1e4
    windows: Literal["full", "one", "pattern"] = "one"
    experts: Literal["mixtral", "qwen3_moe", "gpt_oss"] | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=lambda: _FIXED)
    required: Mapping[str, Any] = field(default_factory=dict)
    switch: bool = False


FAMILIES: dict[Layout, Family] = {
    "llama": Family("LlamaForCausalLM", windows="full", required={"attention_bias": False, "mlp_bias": False}),
    "mistral": Family("MistralForCausalLM"),
    "mixtral": Family(
        "MixtralForCausalLM",
        rope_theta=1e6,
        experts="mixtral",
        fields=_EXPERT_FIELDS,
        defaults={"n_experts": 8},
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        windows="pattern",
        defaults={"n_kv_heads": 32, "resolved_head_dim": 128},
        fixed=_FIXED | {"qk_norm": True},
        required={"attention_bias": False},
        switch=True,
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        experts="qwen3_moe",
        fields=_EXPERT_FIELDS | {"n_experts": "num_experts", "hidden": "moe_intermediate_size"},
        defaults={
            "n_experts": 128,
            "experts_per_token": 8,
            "n_kv_heads": 4,
            "hidden": 768,
            "router_aux_loss_coef": 1e-3,
        },
        fixed=_FIXED | {"qk_norm": True},
        required={"attention_bias": False, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
        switch=True,
    ),
    "gpt_oss": Family(
        "GptOssForCausalLM",
        rope_theta=150_000.0,
        windows="pattern",
        experts="gpt_oss",
        fields=_EXPERT_FIELDS
        | {"attn_bias": "attention_bias", "mlp_limit": "swiglu_limit", "mlp_alpha": "swiglu_alpha"},
        defaults={
            "n_experts": 128,
            "experts_per_token": 4,
            "n_kv_heads": 8,
            "resolved_head_dim": 64,
            "norm_eps": 1e-5,
            "router_aux_loss_coef": 0.001,
            "attn_bias": True,
        },
        # Its biases of the projections are a setting.
        fixed={name: value for name, value in _FIXED.items() if name != "attn_bias"}
        | {"mlp": "swiglu_clamped", "attn_sinks": True, "moe_bias": True},
    ),
}
