"""gpt-oss in NumPy float64, on tensors by their Hugging Face names: random ones, mxfp4 ones, and the logits."""

import math
from typing import Any

import numpy as np

CONFIG: dict[str, Any] = dict(
    model_type="gpt_oss",
    vocab_size=50,
    hidden_size=64,
    intermediate_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    num_local_experts=4,
    num_experts_per_tok=2,
    sliding_window=5,
    layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    max_position_embeddings=1024,
    rms_norm_eps=1e-5,
    rope_theta=150.0,
    rope_scaling=dict(
        rope_type="yarn",
        factor=4.0,
        beta_fast=32.0,
        beta_slow=1.0,
        truncate=False,
        original_max_position_embeddings=256,
    ),
    swiglu_limit=2.0,
    swiglu_alpha=1.5,
    tie_word_embeddings=False,
    hidden_act="silu",
    attention_bias=True,
    attention_dropout=0.0,
    initial_context_length=256,
    experts_per_token=2,
    router_aux_loss_coef=0.9,
    torch_dtype="float32",
)
CODES = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]


def random_tensors(seed: int = 0, **changes: Any) -> dict[str, np.ndarray]:
    """Draw the tensors of a model in float32."""
    c = CONFIG | changes
    V, M, F, E = c["vocab_size"], c["hidden_size"], c["intermediate_size"], c["num_local_experts"]
    H, K, D = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
    shapes = {"model.embed_tokens.weight": (V, M), "model.norm.weight": (M,), "lm_head.weight": (V, M)}
    for i in range(c["num_hidden_layers"]):
        block = f"model.layers.{i}"
        for name, n_out, n_in in (("q", H * D, M), ("k", K * D, M), ("v", K * D, M), ("o", M, H * D)):
            shapes[f"{block}.self_attn.{name}_proj.weight"] = (n_out, n_in)
            shapes[f"{block}.self_attn.{name}_proj.bias"] = (n_out,)
        shapes[f"{block}.self_attn.sinks"] = (H,)
        shapes[f"{block}.input_layernorm.weight"] = shapes[f"{block}.post_attention_layernorm.weight"] = (M,)
        shapes[f"{block}.mlp.router.weight"], shapes[f"{block}.mlp.router.bias"] = (E, M), (E,)
        shapes[f"{block}.mlp.experts.gate_up_proj"] = (E, M, 2 * F)
        shapes[f"{block}.mlp.experts.gate_up_proj_bias"] = (E, 2 * F)
        shapes[f"{block}.mlp.experts.down_proj"] = (E, F, M)
        shapes[f"{block}.mlp.experts.down_proj_bias"] = (E, M)
    rng = np.random.default_rng(seed)
    return {
        name: (("norm" in name) + 0.3 * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()
    }


def encode_mxfp4(tensor: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return blocks [E, out, in / 32, 16] and scales [E, out, in / 32] of a tensor [E, in, out] rounded to mxfp4."""
    E, n_in, n_out = tensor.shape
    x = np.float64(tensor).transpose(0, 2, 1).reshape(E, n_out, n_in // 32, 32)
    exponent = np.floor(np.log2(np.maximum(np.abs(x).max(-1), 2.0**-120))) - 2  # 4 = 2^2 begins the largest binade
    codes = np.abs(x[..., None] / np.exp2(exponent)[..., None, None] - np.array(CODES)).argmin(-1).astype(np.uint8)
    return np.ascontiguousarray(codes[..., 0::2] + 16 * codes[..., 1::2]), (exponent + 127).astype(np.uint8, order="C")


def decode_mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Return the tensor [E, in, out] in float64, one value at a time."""
    E, n_out, n_blocks, _ = blocks.shape
    out = np.empty((E, n_blocks * 32, n_out))
    for e, o, b, j in np.ndindex(blocks.shape):
        low, high = int(blocks[e, o, b, j]) & 15, int(blocks[e, o, b, j]) >> 4
        for i, code in ((2 * j, low), (2 * j + 1, high)):
            out[e, 32 * b + i, o] = CODES[code] * 2.0 ** (int(scales[e, o, b]) - 127)
    return out


def logits(tensors: dict[str, np.ndarray], tokens: np.ndarray, **changes: Any) -> np.ndarray:
    """Return the logits [B, T, V] of tokens [B, T]."""
    c, w = CONFIG | changes, {name: np.float64(x) for name, x in tensors.items()}
    h = w["model.embed_tokens.weight"][tokens]
    for i, kind in enumerate(c["layer_types"]):
        block = f"model.layers.{i}"
        x = _rms_norm(h, w[f"{block}.input_layernorm.weight"], c)
        h = h + _attention(x, w, f"{block}.self_attn", c["sliding_window"] if kind == "sliding_attention" else None, c)
        x = _rms_norm(h, w[f"{block}.post_attention_layernorm.weight"], c)
        h = h + np.stack([[_experts(token, w, f"{block}.mlp", c) for token in row] for row in x])
    return _rms_norm(h, w["model.norm.weight"], c) @ w["lm_head.weight"].T


def _rms_norm(x: np.ndarray, weight: np.ndarray, c: dict[str, Any]) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + c["rms_norm_eps"]) * weight


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _rotary(T: int, c: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """YaRN (Peng et al., 2023, section 3.2), as gpt-oss computes it."""
    D, theta, yarn = c["head_dim"], c["rope_theta"], c["rope_scaling"]
    context, factor = yarn["original_max_position_embeddings"], yarn["factor"]
    bounds = [D / 2 * math.log(context / (turns * 2 * math.pi), theta) for turns in (32, 1)]
    if yarn["truncate"]:
        bounds = [math.floor(bounds[0]), math.ceil(bounds[1])]
    low, high = max(bounds[0], 0), min(bounds[1], D - 1)
    frequencies = []
    for i in range(D // 2):
        ramp = min(max((i - low) / (high - low), 0), 1)
        frequency = theta ** (-2 * i / D)
        frequencies.append(frequency * (1 - ramp) + frequency / factor * ramp)
    angle = np.outer(np.arange(T), frequencies)
    return np.cos(angle) * (0.1 * math.log(factor) + 1), np.sin(angle) * (0.1 * math.log(factor) + 1)


def _attention(x: np.ndarray, w: dict, name: str, window: int | None, c: dict[str, Any]) -> np.ndarray:
    B, T, _ = x.shape
    H, K, D = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
    project = lambda p, y: y @ w[f"{name}.{p}_proj.weight"].T + w[f"{name}.{p}_proj.bias"]
    q, k, v = (project(p, x).reshape(B, T, -1, D) for p in "qkv")
    cos, sin = (t[None, :, None] for t in _rotary(T, c))
    turn = lambda y: np.concatenate(
        [y[..., : D // 2] * cos - y[..., D // 2 :] * sin, y[..., D // 2 :] * cos + y[..., : D // 2] * sin], -1
    )
    q, k = turn(q), turn(k)
    out = np.empty((B, T, H, D))
    for b, t, head in np.ndindex(B, T, H):
        first = 0 if window is None else max(0, t - window + 1)
        keys, values = (y[b, first : t + 1, head // (H // K)] for y in (k, v))
        scores = np.append(keys @ q[b, t, head] / math.sqrt(D), w[f"{name}.sinks"][head])
        out[b, t, head] = _softmax(scores)[:-1] @ values
    return project("o", out.reshape(B, T, -1))


def _experts(x: np.ndarray, w: dict, name: str, c: dict[str, Any]) -> np.ndarray:
    scores = w[f"{name}.router.weight"] @ x + w[f"{name}.router.bias"]
    chosen = np.argsort(-scores)[: c["num_experts_per_tok"]]
    limit, alpha, out = c["swiglu_limit"], c["swiglu_alpha"], 0
    for e, weight in zip(chosen, _softmax(scores[chosen]), strict=True):
        h = x @ w[f"{name}.experts.gate_up_proj"][e] + w[f"{name}.experts.gate_up_proj_bias"][e]
        gate, up = np.minimum(h[0::2], limit), np.clip(h[1::2], -limit, limit)
        h = (up + 1) * gate / (1 + np.exp(-alpha * gate))
        out = out + weight * (h @ w[f"{name}.experts.down_proj"][e] + w[f"{name}.experts.down_proj_bias"][e])
    return out
