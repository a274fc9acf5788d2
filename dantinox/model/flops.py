"""Cost of a model, from its config alone: parameters, FLOPs per token, bytes of key/value cache."""

from dantinox.config import ModelConfig
from dantinox.kernels.cost import visible_pairs


def total_parameters(config: ModelConfig) -> int:
    """Number of trained values; a tied embedding is one array and counts once."""
    return _non_mlp_parameters(config) + _mlp_parameters(config, config.n_experts)


def active_parameters(config: ModelConfig) -> int:
    """Number of parameters that one token uses: k of E experts, the router, the shared expert and all dense layers.

    By convention all of the embedding counts, although a token reads one row of it; a tied one counts once.
    """
    return _non_mlp_parameters(config) + _mlp_parameters(config, config.experts_per_token)


def flops_per_token(config: ModelConfig, seq_len: int, training: bool = True) -> float:
    """FLOPs of the matmuls per token, averaged over the tokens of a sequence.

    Forward: 2 per weight of each matmul (the logits included, the embedding lookup not), and 4 H D per (query, key)
    pair inside the layer's window: scores and weighted values. The backward pass costs twice the forward;
    rematerialisation is not counted.
    """
    weights = config.n_layers * _attention_weights(config) + _mlp_weights(config, config.experts_per_token)
    weights += config.dim * config.vocab_size
    windows = [config.layer_window(layer) for layer in range(config.n_layers)]
    pairs = sum(visible_pairs(seq_len, seq_len, window=window) for window in windows)
    forward = 2 * weights + 4 * config.n_heads * config.resolved_head_dim * pairs / seq_len
    return (3 if training else 1) * forward


def kv_bytes_per_token(config: ModelConfig) -> int:
    """Bytes that one token adds to the cache over all layers, as long as no window is full."""
    return config.n_layers * _layer_kv_bytes(config)


def kv_cache_bytes(config: ModelConfig, context: int, batch: int = 1) -> int:
    """Bytes of the keys and values of `batch` sequences; windowed layers keep min(window, context), in eights."""
    slots = sum(config.layer_slots(layer, context) for layer in range(config.n_layers))
    return batch * slots * _layer_kv_bytes(config)


def _layer_kv_bytes(config: ModelConfig) -> int:
    """Bytes of the keys and values of one token in one layer; an 8-bit vector has a scale of 4 bytes."""
    vector_bytes = config.resolved_head_dim * {"float32": 4, "bfloat16": 2}[config.resolved_dtype]
    if config.kv_cache_dtype != "auto":
        vector_bytes = config.resolved_head_dim + 4
    return 2 * config.n_kv_heads * vector_bytes


def _mlp_weights(config: ModelConfig, experts: int) -> int:
    """Weights of the MLPs of all layers with `experts` of their experts; routers and shared experts included."""
    M, num_sparse = config.dim, _num_sparse(config)
    dense = (2 if config.mlp == "gelu" else 3) * M * config.dense_hidden
    hidden = experts * config.hidden + config.shared_expert * config.shared_hidden
    return (config.n_layers - num_sparse) * dense + num_sparse * (M * config.n_experts + 3 * M * hidden)


def _mlp_parameters(config: ModelConfig, experts: int) -> int:
    """Weights and biases of the MLPs of all layers with `experts` of their experts."""
    biases = config.n_experts + experts * (2 * config.hidden + config.dim) if config.moe_bias else 0
    biases += config.n_experts if config.selection_bias else 0
    return _mlp_weights(config, experts) + _num_sparse(config) * biases


def _num_sparse(config: ModelConfig) -> int:
    """Number of layers with experts."""
    return sum(config.is_sparse(layer) for layer in range(config.n_layers))


def _attention_weights(config: ModelConfig) -> int:
    """Weights of the projections q, k, v, o and gate of one layer."""
    M, H, K, D = config.dim, config.n_heads, config.n_kv_heads, config.resolved_head_dim
    gate = {"none": 0, "head": H, "elementwise": H * D}[config.attn_gate]
    return M * (2 * H * D + 2 * K * D + gate)


def _non_mlp_parameters(config: ModelConfig) -> int:
    """All parameters except those of the MLPs."""
    M, H, K, D = config.dim, config.n_heads, config.n_kv_heads, config.resolved_head_dim
    attention = _attention_weights(config)
    if config.qk_norm:
        attention += (H + K) * D if config.qk_norm_all_heads else 2 * D
    attention += H * D + 2 * K * D + M * config.attn_out_bias if config.attn_bias else 0
    attention += H if config.attn_sinks else 0
    norms = 4 if config.norms == "both" else 2
    embeddings = config.vocab_size * M * (1 if config.tie_embeddings else 2)
    if config.pos_encoding == "learned":
        embeddings += config.max_context * M
    return embeddings + config.n_layers * (attention + norms * M) + M
