"""What a model costs, from its config alone: parameters, FLOPs a token, bytes of key/value cache."""

from dantinox.config import ModelConfig
from dantinox.kernels.cost import visible_pairs


def total_parameters(config: ModelConfig) -> int:
    """Every number that training moves; a tied embedding is one array and counts once."""
    return _fixed(config) + config.n_layers * _mlp(config, config.n_experts)


def active_parameters(config: ModelConfig) -> int:
    """Parameters that one token meets: k of E experts, the router, the shared expert and everything dense.

    The embedding counts whole, as is the custom, though a token reads one row of it; once if tied.
    """
    return _fixed(config) + config.n_layers * _mlp(config, config.experts_per_token)


def flops_per_token(config: ModelConfig, seq_len: int, training: bool = True) -> float:
    """FLOPs of the matrix products, averaged over the tokens of a sequence.

    Forward: 2 for each weight that multiplies (the embedding's lookup multiplies nothing, the logits do), and
    4 H D for each (query, key) pair that the layer's window lets be seen: scores and weighted values. The backward pass
    costs twice the forward; what rematerialisation repeats is not counted.
    """
    weights = config.n_layers * (_attention(config) + _mlp(config, config.experts_per_token))
    weights += config.dim * config.vocab_size
    windows = [config.layer_window(layer) for layer in range(config.n_layers)]
    pairs = sum(visible_pairs(seq_len, seq_len, window=window) for window in windows)
    forward = 2 * weights + 4 * config.n_heads * config.head_dim * pairs / seq_len
    return (3 if training else 1) * forward


def kv_bytes_per_token(config: ModelConfig) -> int:
    """Bytes that one token adds to the cache while no window is full, over all layers."""
    return config.n_layers * _kv_bytes(config)


def kv_cache_bytes(config: ModelConfig, context: int, batch: int = 1) -> int:
    """Bytes of keys and values of `batch` sequences; a windowed layer keeps min(window, context) tokens."""
    slots = sum(config.layer_slots(layer, context) for layer in range(config.n_layers))
    return batch * slots * _kv_bytes(config)


def _kv_bytes(config: ModelConfig) -> int:
    """One token's keys and values in one layer; of 8 bits each vector has a factor of 4 bytes."""
    vector = config.head_dim * {"float32": 4, "bfloat16": 2}[config.dtype]
    if config.kv_cache_dtype != "auto":
        vector = config.head_dim + 4
    return 2 * config.n_kv_heads * vector


def _mlp(config: ModelConfig, experts: int) -> int:
    """Weights of one layer's MLP when `experts` of its experts count, router and shared expert included."""
    M, F = config.dim, config.hidden
    if not config.n_experts:
        return (3 if config.mlp == "swiglu" else 2) * M * F
    return M * config.n_experts + 3 * M * F * (experts + config.shared_expert)


def _attention(config: ModelConfig) -> int:
    """Weights of one layer's projections q, k, v, o and gate."""
    M, H, K, D = config.dim, config.n_heads, config.n_kv_heads, config.head_dim
    gate = {"none": 0, "head": H, "elementwise": H * D}[config.attn_gate]
    return M * (2 * H * D + 2 * K * D + gate)


def _fixed(config: ModelConfig) -> int:
    """All parameters but those of the MLPs."""
    M = config.dim
    attention = _attention(config) + (2 * config.head_dim if config.qk_norm else 0)
    embeddings = config.vocab_size * M * (1 if config.tie_embeddings else 2)
    if config.pos_encoding == "learned":
        embeddings += config.max_context * M
    return embeddings + config.n_layers * (attention + 2 * M) + M
