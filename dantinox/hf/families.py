"""The families of Hugging Face models that DantinoX reads and writes, one table entry each."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Layout = Literal[
    "llama", "mistral", "mixtral", "qwen3", "qwen3_moe", "gpt_oss", "qwen2", "smollm3", "olmo2", "olmo3", "afmoe",
    "gemma3_text", "lfm3",
]  # fmt: skip

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
    "attn_out_bias": True,
    "attn_sinks": False,
    "moe_bias": False,
    "qk_norm_all_heads": False,
    "norms": "pre",
    "attn_scale": None,
    "norm_offset": False,
    "scale_embeddings": False,
    "n_dense_layers": 0,
    "router": "softmax",
    "router_renormalise": True,
    "router_scale": 1.0,
    "selection_bias": False,
}
LAYER_TYPES = {"S": "sliding_attention", "L": "full_attention"}  # by the letter of window_pattern
_PRE_NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
_POST_NORMS = {"attention_post_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm"}
PROJECTIONS = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
_REQUIRED = {"hidden_act": "silu", "attention_dropout": 0.0}
_OLMO = {"qk_norm": True, "qk_norm_all_heads": True, "norms": "post"}


@dataclass(frozen=True)
class Family:
    """What a family stores, and where.

    Attributes:
        class_name: class of transformers.
        rope_theta: default base of the rotary positions.
        default_scaling: scaling of the rotary positions that config.json leaves out.
        windows: full: no layer has a window; one: all or none; pattern: each layer has a window or not, by a list.
        default_window: the window that config.json leaves out.
        default_pattern: (config.json, number of layers) -> the letters of its layers where it has no list of them.
        windowed_theta: (name, default) of the base of windowed layers, if they have rotary positions of their own; "":
            config.json has them in `rope_parameters` only.
        rope_layers: all: each layer has rotary positions; listed: those of the list `no_rope_layers` that have a one;
            windowed: those with a window.
        switch: whether config.json names a window that holds only with `use_sliding_window`.
        norms: our name of each norm of a block -> that of its tensor.
        final_norm: tensor of the norm after the blocks.
        mlp: module of a block with its MLP.
        projections: tensors of gate, up and down in a dense MLP.
        experts: names of the experts' tensors; None: a dense MLP.
        whole_heads: whether the width must be a multiple of the number of heads.
        may_be_dense: whether a model without experts fits beside those with them: all its layers count as dense.
        fields: names of settings in config.json, beside `COMMON_FIELDS`.
        switches: settings that config.json stores as true, the default, or false -> (name, value of false, of true).
        other_names: names of settings of config.json in some versions of transformers -> the current ones.
        defaults: values of settings that config.json leaves out, where they are not ours.
        differs: settings of which the family has one value that differs from most others'.
        required: other settings of config.json, written, and of which one value is read.
        checked: settings of config.json that are not written, and of which one value is read.
        written: other names in config.json of settings, which are not read.
    """

    class_name: str
    rope_theta: float = 1e4
    default_scaling: Mapping[str, Any] | None = None
    windows: Literal["full", "one", "pattern"] = "one"
    default_window: int | None = None
    default_pattern: Callable[[Mapping[str, Any], int], str] = lambda hf_config, n_layers: "L" * n_layers
    windowed_theta: tuple[str, float] | None = None
    rope_layers: Literal["all", "listed", "windowed"] = "all"
    switch: bool = False
    norms: Mapping[str, str] = field(default_factory=lambda: _PRE_NORMS)
    final_norm: str = "norm"
    mlp: str = "mlp"
    projections: Mapping[str, str] = field(default_factory=lambda: PROJECTIONS)
    experts: Literal["mixtral", "qwen3_moe", "gpt_oss", "afmoe"] | None = None
    whole_heads: bool = False
    may_be_dense: bool = False
    fields: Mapping[str, str] = field(default_factory=dict)
    switches: Mapping[str, tuple[str, Any, Any]] = field(default_factory=dict)
    other_names: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    differs: Mapping[str, Any] = field(default_factory=dict)
    required: Mapping[str, Any] = field(default_factory=dict)
    checked: Mapping[str, Any] = field(default_factory=dict)
    written: Mapping[str, str] = field(default_factory=dict)

    @property
    def names(self) -> dict[str, str]:
        """Our name of every setting that config.json stores -> its name there."""
        return COMMON_FIELDS | dict(self.fields)

    @property
    def fixed(self) -> dict[str, Any]:
        """Settings of which the family has one value."""
        stored = {*self.fields, *self.switches, "shared_expert" if "shared_experts" in self.fields else ""}
        return {name: value for name, value in _FIXED.items() if name not in stored} | dict(self.differs)

    @property
    def all_required(self) -> dict[str, Any]:
        """Other settings of config.json of which one value is read."""
        return _REQUIRED | dict(self.required)


def _windowed_after(hf_config: Mapping[str, Any], n_layers: int) -> str:
    """Return the letters of layers of which only the last have a window."""
    first = hf_config.get("max_window_layers", 28)
    return "".join("LS"[layer >= first] for layer in range(n_layers))


def _alternating(hf_config: Mapping[str, Any], n_layers: int) -> str:
    """Return the letters of layers of which every other one has a window, from the first."""
    return ("SL" * n_layers)[:n_layers]


def _full_every(name: str | None, default: int) -> Callable[[Mapping[str, Any], int], str]:
    """Return the letters of layers of which every n-th has no window, n by a setting of config.json."""

    def pattern(hf_config: Mapping[str, Any], n_layers: int) -> str:
        n = (name and hf_config.get(name)) or default
        return "".join("SL"[(layer + 1) % n == 0] for layer in range(n_layers))

    return pattern


def shortest_period(pattern: str) -> str:
    """Return the shortest pattern that gives this one when it is repeated."""
    n = len(pattern)
    return next(pattern[:size] for size in range(1, n + 1) if pattern == (pattern[:size] * n)[:n])


def listed_ropes(hf_config: Mapping[str, Any], n_layers: int) -> list[int]:
    """Return for each layer whether it has rotary positions, by `no_rope_layers` or by its interval."""
    interval = hf_config.get("no_rope_layer_interval") or 4
    return hf_config.get("no_rope_layers") or [int((layer + 1) % interval != 0) for layer in range(n_layers)]


def _with_convolutions(hf_config: Mapping[str, Any], n_layers: int) -> str:
    """Return the letters of layers of which half are convolutions (C), which we do not have."""
    return ("CCLCS" + "CLCS" * n_layers)[:n_layers]


def _windowed_without_rope(hf_config: Mapping[str, Any], n_layers: int) -> str:
    """Return the letters of layers of which those without rotary positions have the window, if there is one."""
    if hf_config.get("sliding_window") is None:
        return "L" * n_layers
    return "".join("L" if has_rope else "S" for has_rope in listed_ropes(hf_config, n_layers)[:n_layers])


FAMILIES: dict[Layout, Family] = {
    "llama": Family(
        "LlamaForCausalLM", whole_heads=True, windows="full", required={"attention_bias": False, "mlp_bias": False}
    ),
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
        default_window=4096,
        default_pattern=_windowed_after,
        switch=True,
        defaults={"n_kv_heads": 32, "resolved_head_dim": 128},
        differs={"qk_norm": True},
        required={"attention_bias": False},
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        default_window=4096,
        switch=True,
        experts="qwen3_moe",
        fields=_EXPERT_FIELDS
        | {
            "n_experts": "num_experts",
            "hidden": "moe_intermediate_size",
            "router_renormalise": "norm_topk_prob",
        },
        other_names={"num_local_experts": "num_experts"},
        defaults={
            "n_experts": 128,
            "experts_per_token": 8,
            "n_kv_heads": 4,
            "hidden": 768,
            "router_aux_loss_coef": 1e-3,
            "router_renormalise": False,
        },
        differs={"qk_norm": True},
        required={"attention_bias": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
        written={"hidden": "intermediate_size"},  # of dense layers, of which there are none
    ),
    "gpt_oss": Family(
        "GptOssForCausalLM",
        rope_theta=150_000.0,
        default_scaling={
            "rope_type": "yarn",
            "factor": 32.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        windows="pattern",
        default_window=128,
        default_pattern=_alternating,
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
        differs={"mlp": "swiglu_clamped", "attn_sinks": True, "moe_bias": True},
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        windows="pattern",
        default_window=4096,
        default_pattern=_windowed_after,
        switch=True,
        defaults={"n_kv_heads": 32},
        differs={"attn_bias": True, "attn_out_bias": False},
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        rope_theta=2e6,
        windows="pattern",
        default_pattern=_windowed_without_rope,
        switch=True,
        rope_layers="listed",
        fields={"attn_bias": "attention_bias"},
        defaults={"n_kv_heads": 4, "tie_embeddings": True},
        required={"mlp_bias": False},
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        windows="full",
        norms=_POST_NORMS,
        fields={"attn_bias": "attention_bias"},
        defaults={"norm_eps": 1e-5},
        differs=_OLMO,
    ),
    "olmo3": Family(
        "Olmo3ForCausalLM",
        rope_theta=5e5,
        windowed_theta=("rope_theta", 5e5),
        windows="pattern",
        default_window=4096,
        default_pattern=_full_every(None, 4),
        norms=_POST_NORMS,
        fields={"attn_bias": "attention_bias"},
        defaults={"norm_eps": 1e-5},
        differs=_OLMO,
    ),
    "afmoe": Family(
        "AfmoeForCausalLM",
        windows="pattern",
        default_window=1024,
        default_pattern=_full_every("global_attn_every_n_layers", 4),
        rope_layers="windowed",
        norms={
            "attention_norm": "input_layernorm",
            "attention_post_norm": "post_attention_layernorm",
            "mlp_norm": "pre_mlp_layernorm",
            "mlp_post_norm": "post_mlp_layernorm",
        },
        experts="afmoe",
        may_be_dense=True,
        fields={
            "hidden": "moe_intermediate_size",
            "dense_hidden": "intermediate_size",
            "n_dense_layers": "num_dense_layers",
            "n_experts": "num_experts",
            "experts_per_token": "num_experts_per_tok",
            "shared_experts": "num_shared_experts",
            "router_scale": "route_scale",
            "scale_embeddings": "mup_enabled",
            "attn_bias": "attention_bias",
        },
        defaults={
            "hidden": 1408,
            "dense_hidden": 6144,
            "n_dense_layers": 1,
            "n_experts": 64,
            "experts_per_token": 6,
            "shared_experts": 2,
            "resolved_head_dim": 128,
            "norm_eps": 1e-5,
            "router_aux_loss_coef": 0.0,
        },
        differs={
            "attn_gate": "elementwise",
            "qk_norm": True,
            "norms": "both",
            "router": "sigmoid",
            "selection_bias": True,
        },
        checked={  # of the code that came with the first checkpoints
            "score_func": "sigmoid",
            "route_norm": True,
            "n_group": 1,
            "topk_group": 1,
            "num_expert_groups": 1,
            "num_limited_groups": 1,
        },
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        whole_heads=True,
        rope_theta=1e6,
        windowed_theta=("rope_local_base_freq", 1e4),
        windows="pattern",
        default_window=4096,
        default_pattern=_full_every("sliding_window_pattern", 6),
        norms={
            "attention_norm": "input_layernorm",
            "attention_post_norm": "post_attention_layernorm",
            "mlp_norm": "pre_feedforward_layernorm",
            "mlp_post_norm": "post_feedforward_layernorm",
        },
        fields={
            "attn_scale": "query_pre_attn_scalar",
            "attn_bias": "attention_bias",
            "logit_softcap": "final_logit_softcapping",
        },
        defaults={"n_kv_heads": 4, "resolved_head_dim": 256, "attn_scale": 256, "tie_embeddings": True},
        differs={"mlp": "geglu", "norms": "both", "norm_offset": True, "qk_norm": True, "scale_embeddings": True},
        required={
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            "attn_logit_softcapping": None,
            "use_bidirectional_attention": False,
        },
    ),
    "lfm3": Family(
        "Lfm3ForCausalLM",
        rope_theta=1e6,
        default_scaling={"rope_type": "proportional"},
        windowed_theta=("", 1e6),
        windows="pattern",
        default_window=256,
        default_pattern=_with_convolutions,
        norms={
            "attention_norm": "operator_norm",
            "attention_post_norm": "post_operator_norm",
            "mlp_norm": "ffn_norm",
            "mlp_post_norm": "post_ffn_norm",
        },
        final_norm="embedding_norm",
        mlp="feed_forward",
        projections={"gate": "w1", "up": "w3", "down": "w2"},
        fields={"norm_eps": "norm_eps", "attn_bias": "attention_bias"},
        switches={
            "norms": ("use_sandwich_norm", "pre", "both"),
            "attn_gate": ("use_attention_gate", "none", "head"),
        },
        defaults={"n_kv_heads": 4, "resolved_head_dim": 128, "norm_eps": 1e-5, "tie_embeddings": True},
        differs={"qk_norm": True},
    ),
}
