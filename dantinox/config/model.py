"""Settings of the network."""

import math
from dataclasses import dataclass, replace
from typing import Literal

from dantinox import kernels
from dantinox.config.validation import check, check_fields, check_fraction, check_positive
from dantinox.kernels import dispatch

KVDtype = Literal["auto", "int8", "fp8"]
LORA_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
CACHE_SLOT_MULTIPLE = 8  # the decode kernels of GPUs and TPUs copy slots in eights
Implementation = Literal["auto", "reference", "xla", "pallas", "triton"] | str  # or the name of a kernel of your own


@dataclass(frozen=True)
class ModelConfig:
    """Settings of the network."""

    vocab_size: int = 256
    """Number of token ids; training sets it from the tokenizer."""
    dim: int = 512
    """Width M of the residual stream."""
    n_layers: int = 12
    """Number of blocks L."""
    n_heads: int = 16
    """Query heads H."""
    n_kv_heads: int = 4
    """Key/value heads K; H must be a multiple of K (K = H: multi-head, K = 1: multi-query)."""
    head_dim: int | None = None
    """Width D of one head; None: dim // n_heads."""
    max_context: int = 512
    """Longest sequence, in tokens, of layers without a window."""
    window: int | None = None
    """Keys per query in windowed layers, its own included; None: no window."""
    window_pattern: str = "S"
    """Repeated over the layers: S = windowed, L = full attention; for example SSSL."""
    attn_gate: Literal["none", "elementwise", "head"] = "none"
    """Sigmoid gate on the attention output, one value per element or one per head."""
    qk_norm: bool = False
    """RMSNorm on queries and keys, per head."""
    attn_bias: bool = False
    """Biases on the projections q, k, v and o."""
    attn_sinks: bool = False
    """Attention sinks: one learned logit per query head joins the sum of its softmax."""
    attn_softcap: float | None = None
    """Replace attention scores s by softcap * tanh(s / softcap)."""
    logit_softcap: float | None = None
    """The same for the final logits."""
    pos_encoding: Literal["rope", "learned", "none"] = "rope"
    """Position encoding."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: Literal["none", "linear", "ntk", "yarn", "llama3"] = "none"
    """Scaling of rotary frequencies to contexts longer than the one trained on."""
    rope_factor: float = 1.0
    """Factor of rope_scaling: new context over trained context."""
    rope_original_context: int | None = None
    """Context trained on, for yarn and llama3; None: max_context / rope_factor."""
    rope_truncate: bool = True
    """Round the bounds of yarn's ramp to whole pairs of features."""
    mlp: Literal["swiglu", "gelu", "swiglu_clamped", "geglu"] = "swiglu"
    """Kind of feed-forward network."""
    mlp_limit: float = 7.0
    """Limit of swiglu_clamped: u g sigmoid(alpha g) with g = min(gate, limit) and u = 1 + clip(up, -limit, limit)."""
    mlp_alpha: float = 1.702
    """The alpha of swiglu_clamped."""
    mlp_ratio: float = 4.0
    """Hidden width F of the MLP (or of each expert) over dim."""
    n_experts: int = 0
    """Experts E per MLP; 0: dense MLPs."""
    experts_per_token: int = 2
    """Experts k per token."""
    shared_expert: bool = False
    """Add an unweighted expert that processes every token."""
    moe_bias: bool = False
    """Biases on the router and on the projections of its experts."""
    router_aux_loss_coef: float = 0.01
    """Weight of the load-balancing loss E * sum_e f_e P_e, averaged over layers."""
    router_z_loss_coef: float = 0.001
    """Weight of the router z-loss, mean logsumexp(router logits)^2, averaged over layers."""
    tie_embeddings: bool = True
    """Share one array between the input embedding and the output projection."""
    dropout: float = 0.0
    """Dropout rate on both residual branches, in training only."""
    norm_eps: float = 1e-6
    """Epsilon of every RMSNorm."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of all matmuls; parameters are float32. auto: bfloat16 on devices with fast bfloat16, else float32."""
    remat: Literal["none", "block", "dots"] = "none"
    """Recomputation in the backward pass: none, whole blocks, or everything except matmuls (dots)."""
    attn: Implementation = "auto"
    """Implementation of attention."""
    moe: Implementation = "auto"
    """Implementation of the mixture of experts."""
    decode: Implementation = "auto"
    """Implementation of cached decoding."""
    loss: Implementation = "auto"
    """Implementation of the loss; reference keeps the logits of all tokens."""
    kv_cache_dtype: KVDtype = "auto"
    """Storage of the KV cache: the model's dtype (auto), or 8 bits per value and one scale per vector."""

    # Fine-tuning
    lora_rank: int = 0
    """Train updates of this rank of the lora_targets, and freeze everything else; 0: train all parameters."""
    lora_alpha: float = 16.0
    """Factor of these updates, over lora_rank."""
    lora_targets: str = "q,k,v,o,gate,up,down"
    """Weights of each block that the updates are added to."""
    # What single families of open models add
    attn_out_bias: bool = True
    """With attn_bias, a bias on o too; false: on q, k and v only."""
    qk_norm_all_heads: bool = False
    """With qk_norm, one RMSNorm over all heads of a token instead of one per head."""
    norms: Literal["pre", "post", "both"] = "pre"
    """RMSNorms of the branches: on their inputs (pre), on their outputs (post), or both."""
    rope_pattern: str = "R"
    """Repeated over the layers: R = rotary positions, N = none; for example RRRN. For pos_encoding rope."""
    rope_theta_windowed: float | None = None
    """Base of the rotary frequencies of windowed layers, which are not scaled then; None: as in the others."""
    attn_scale: float | None = None
    """Factor on attention scores; None: head_dim ** -0.5."""
    norm_offset: bool = False
    """Store the scales of RMSNorms minus one."""
    scale_embeddings: bool = False
    """Multiply embedded tokens by sqrt(dim)."""
    n_dense_layers: int = 0
    """With experts, the number of first layers that have a dense MLP instead."""
    dense_ratio: float | None = None
    """Hidden width of these MLPs over dim; None: mlp_ratio."""
    shared_ratio: float | None = None
    """Hidden width of the shared expert over dim; None: mlp_ratio."""
    router: Literal["softmax", "sigmoid"] = "softmax"
    """Scores of experts: probabilities over all experts (softmax), or one by one (sigmoid)."""
    router_renormalise: bool = True
    """Divide the scores of a token's experts by their sum."""
    router_scale: float = 1.0
    """Factor on the weights of a token's experts."""
    selection_bias: bool = False
    """A bias per expert on the scores, for the selection only; each step moves it against the expert's load error."""
    selection_bias_rate: float = 0.001
    """Distance of this move."""

    def __post_init__(self) -> None:
        check_fields(self)
        operations = {
            "attn": "attention",
            "moe": "moe_mlp",
            "decode": "decode_attention",
            "loss": "linear_cross_entropy",
        }
        for name, op in operations.items():
            value, allowed = getattr(self, name), kernels.implementation_names(op)
            check(value in allowed, f"{name} is {value!r}; allowed: {', '.join(allowed)}")
        check_positive(self, "vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "max_context")
        check_positive(self, "rope_original_context", "mlp_ratio", "norm_eps", "attn_softcap", "logit_softcap")
        check_positive(self, "mlp_limit", "mlp_alpha", "dense_ratio", "shared_ratio", "router_scale")
        check_positive(self, "attn_scale", "lora_alpha")
        check(self.rope_theta > 1, f"rope_theta is {self.rope_theta}; allowed: more than 1")
        check(
            self.rope_theta_windowed is None or self.rope_theta_windowed > 1,
            f"rope_theta_windowed is {self.rope_theta_windowed}; allowed: more than 1, or None",
        )
        check_fraction(self, "dropout")
        check(self.lora_rank >= 0, f"lora_rank is {self.lora_rank}; allowed: 0 (no LoRA) or more")
        targets = self.lora_targets.split(",")
        check(
            set(targets) <= set(LORA_TARGETS) and len(set(targets)) == len(targets),
            f"lora_targets is {self.lora_targets!r}; allowed: some of {','.join(LORA_TARGETS)}",
        )
        check(
            self.n_heads % self.n_kv_heads == 0,
            f"n_heads is {self.n_heads} and n_kv_heads is {self.n_kv_heads}; n_heads must be a multiple of n_kv_heads",
        )
        if self.head_dim is None:
            check(
                self.dim % self.n_heads == 0,
                f"dim is {self.dim} and n_heads is {self.n_heads}; dim must be a multiple of n_heads, or set head_dim",
            )
        check(
            self.pos_encoding != "rope" or self.resolved_head_dim % 2 == 0,
            f"head_dim is {self.resolved_head_dim}; rotary positions need an even head_dim",
        )
        check(
            self.window is None or self.window >= 1,
            f"window is {self.window}; allowed: 1 or more keys, or None for no window",
        )
        check(
            self.window_pattern != "" and set(self.window_pattern) <= set("SL"),
            f"window_pattern is {self.window_pattern!r}; allowed: the letters S (windowed) and L (full)",
        )
        check(
            self.rope_pattern != "" and set(self.rope_pattern) <= set("RN"),
            f"rope_pattern is {self.rope_pattern!r}; allowed: the letters R (rotary positions) and N (none)",
        )
        check(self.rope_factor >= 1, f"rope_factor is {self.rope_factor}; allowed: 1 or more")
        check(
            self.rope_scaling == "none" or self.pos_encoding == "rope",
            f"rope_scaling is {self.rope_scaling!r} but pos_encoding is {self.pos_encoding!r}; it needs rope",
        )
        for name, hidden in (
            ("mlp_ratio", self.hidden),
            ("dense_ratio", self.dense_hidden),
            ("shared_ratio", self.shared_hidden),
        ):
            check(hidden >= 1, f"{name} is {getattr(self, name)}; it leaves no hidden width for dim {self.dim}")
        check(self.n_dense_layers >= 0, f"n_dense_layers is {self.n_dense_layers}; allowed: 0 or more")
        check(self.n_experts >= 0, f"n_experts is {self.n_experts}; allowed: 0 (dense) or more")
        check(
            self.experts_per_token >= 1,
            f"experts_per_token is {self.experts_per_token}; allowed: 1 or more",
        )
        if self.n_experts:
            check(
                self.experts_per_token <= self.n_experts,
                f"experts_per_token is {self.experts_per_token} but n_experts is {self.n_experts}; "
                "experts_per_token must not exceed n_experts",
            )
            check(
                self.mlp in ("swiglu", "swiglu_clamped"),
                f"mlp is {self.mlp!r} with n_experts {self.n_experts}; experts are swiglu or swiglu_clamped",
            )
            check(
                self.n_dense_layers < self.n_layers,
                f"n_dense_layers is {self.n_dense_layers} but n_layers is {self.n_layers}; "
                "with n_experts a layer must remain for them",
            )
        for name in ("router_aux_loss_coef", "router_z_loss_coef", "selection_bias_rate"):
            check(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}; allowed: 0 or more")

    @property
    def resolved_head_dim(self) -> int:
        """Width D of one head: head_dim, or dim // n_heads."""
        return self.dim // self.n_heads if self.head_dim is None else self.head_dim

    @property
    def resolved_dtype(self) -> str:
        """Dtype of all matmuls: dtype, or what auto is on the current device."""
        if self.dtype != "auto":
            return self.dtype
        return "bfloat16" if dispatch.has_fast_bfloat16() else "float32"

    def with_resolved_dtype(self) -> "ModelConfig":
        """Return the settings with the dtype that auto is on the current device."""
        return replace(self, dtype=self.resolved_dtype)

    def without_default_head_dim(self) -> "ModelConfig":
        """Return the settings with head_dim None if it equals dim // n_heads, so that it follows a new dim."""
        if self.head_dim is None or self.head_dim * self.n_heads != self.dim:
            return self
        return replace(self, head_dim=None)

    @property
    def hidden(self) -> int:
        """Hidden width F of the MLP."""
        return round(self.dim * self.mlp_ratio)

    @property
    def dense_hidden(self) -> int:
        """Hidden width of the dense MLPs; those before the layers with experts may have one of their own."""
        is_own = self.n_experts > 0 and self.dense_ratio is not None
        return round(self.dim * self.dense_ratio) if is_own else self.hidden

    @property
    def shared_hidden(self) -> int:
        """Hidden width of the shared expert."""
        return self.hidden if self.shared_ratio is None else round(self.dim * self.shared_ratio)

    def is_sparse(self, layer: int) -> bool:
        """Return whether one layer has experts."""
        return self.n_experts > 0 and layer >= self.n_dense_layers

    def layer_window(self, layer: int) -> int | None:
        """Return the window of one layer; None if it has full attention."""
        return self.window if self.window_pattern[layer % len(self.window_pattern)] == "S" else None

    def layer_rope(self, layer: int) -> Literal["plain", "windowed"] | None:
        """Return the kind of rotary positions of one layer: with rope_theta, rope_theta_windowed, or none."""
        if self.pos_encoding != "rope" or self.rope_pattern[layer % len(self.rope_pattern)] == "N":
            return None
        is_windowed = self.rope_theta_windowed is not None and self.layer_window(layer) is not None
        return "windowed" if is_windowed else "plain"

    @property
    def period(self) -> int:
        """Layers after which the patterns of windows and of rotary positions repeat."""
        return math.lcm(len(self.window_pattern), len(self.rope_pattern))

    def layer_slots(self, layer: int, context: int, drafts: int = 0) -> int:
        """Return the slots C of one layer's key/value cache for a context length, and for drafted tokens."""
        window = self.layer_window(layer)
        slots = (context if window is None else min(window, context)) + drafts
        return -(-slots // CACHE_SLOT_MULTIPLE) * CACHE_SLOT_MULTIPLE
