"""Correspondence of parameters to the tensors of the Hugging Face layouts of `families`.

DantinoX                  Hugging Face, [out, in]
The norms of a block have names by family.

embedding          VM     model.embed_tokens.weight                lm_head.weight if it is not tied
blocks.i.attention        model.layers.i.self_attn
  q  MHD, o  HDM            q_proj.weight, o_proj.weight           k and v like q
  q_bias  HD, o_bias  M     q_proj.bias, o_proj.bias               gpt-oss; Qwen2 without that of o
  q_scale, k_scale  D       q_norm.weight, k_norm.weight           Qwen3; HD and KD, flat: OLMo
  gate  MHD                 gate_proj.weight                       AFMoE; one per head: LFM3
  sinks  H                  sinks                                  gpt-oss
blocks.i.mlp              model.layers.i.mlp
  gate, up  MF, down FM     gate_proj.weight, up_proj, down_proj   LFM3: feed_forward.w1, w3, w2
blocks.i.mlp, experts     model.layers.i.block_sparse_moe
  router  ME                gate.weight
  gate, up  EMF, down EFM   experts.e.w1.weight, w3, w2
                          model.layers.i.mlp                       Qwen3-MoE
  router  ME                gate.weight
  gate, up  EMF, down EFM   experts.e.gate_proj.weight, up_proj, down_proj
                          model.layers.i.mlp                       AFMoE: as Qwen3-MoE, and
  router  ME                router.gate.weight
  selection_bias  E         expert_bias
  shared.gate, .up, .down   shared_experts.gate_proj.weight, up_proj, down_proj; of width 0 if there is none
                          model.layers.i.mlp                       gpt-oss
  router  ME                router.weight                          with router.bias
  gate and up  EMF          experts.gate_up_proj  [E, M, 2F]       gate in the even columns, up in the odd ones
  down  EFM                 experts.down_proj  [E, F, M]           each with experts.X_bias
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from dantinox.config import ModelConfig
from dantinox.hf.families import FAMILIES, PROJECTIONS, Layout

MXFP4_SUFFIXES = ("experts.gate_up_proj", "experts.down_proj")
"""Ends of the names of the tensors [E, in, out] that gpt-oss stores in mxfp4."""
ROWS = 32  # of a matrix, which are transposed at once


class TensorMapping(NamedTuple):
    """A tensor of Hugging Face and the parameter, the slice of one, or the parameters that it corresponds to.

    Attributes:
        hf_name: name of the tensor.
        param_names: names of the parameters; several are interleaved along the last axis of the tensor. None if the
            tensor is empty.
        expert: index on the first axis of the parameter; None if the tensor holds all experts, or there are none.
        in_features: number of inputs of a matrix, which is stored transposed; None for other tensors.
        flat: whether the tensor has one axis for all of the parameter's.
        empty_shape: shape of a tensor without elements.
    """

    hf_name: str
    param_names: tuple[str, ...]
    expert: int | None = None
    in_features: int | None = None
    flat: bool = False
    empty_shape: tuple[int, ...] = ()

    def export_tensor(self, params: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the tensor of the parameters."""
        if self.empty_shape:
            return np.zeros(self.empty_shape, np.float32)
        arrays = [params[name] if self.expert is None else params[name][self.expert] for name in self.param_names]
        shape = self.hf_shape({name: params[name].shape for name in self.param_names})
        if self.in_features is not None:
            matrix = arrays[0].reshape(self.in_features, -1)
            tensor = np.empty(matrix.shape[::-1], matrix.dtype)
            _transpose(matrix, tensor)
            return tensor
        return np.stack(arrays, axis=-1).reshape(shape) if len(arrays) > 1 else arrays[0].reshape(shape)

    def import_tensor(self, tensor: np.ndarray, params: Mapping[str, np.ndarray]) -> None:
        """Copy the tensor into the parameters."""
        for i, name in enumerate(self.param_names):
            destination = params[name] if self.expert is None else params[name][self.expert]
            if self.in_features is None:
                destination[...] = tensor[..., i :: len(self.param_names)].reshape(destination.shape)
                continue
            _transpose(tensor, destination.reshape(tensor.shape[::-1]))

    def hf_shape(self, param_shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """Return the shape of the tensor for the shapes of the parameters."""
        if self.empty_shape:
            return self.empty_shape
        shape = param_shapes[self.param_names[0]]
        shape = shape if self.expert is None else shape[1:]
        if self.flat:
            return (int(np.prod(shape)),)
        if self.in_features is not None:
            return int(np.prod(shape)) // self.in_features, self.in_features
        return *shape[:-1], shape[-1] * len(self.param_names)


def _transpose(matrix: np.ndarray, out: np.ndarray) -> None:
    """Write the transpose of a matrix to `out`, by blocks of rows that fit the caches, 5 times as fast."""
    for start in range(0, len(matrix), ROWS):
        out[:, start : start + ROWS] = matrix[start : start + ROWS].T


def tensor_mappings(config: ModelConfig, layout: Layout) -> Iterator[TensorMapping]:
    """Yield the mapping of every tensor of a model, from input to output."""
    M, H, D = config.dim, config.n_heads, config.resolved_head_dim
    family = FAMILIES[layout]
    yield TensorMapping("model.embed_tokens.weight", ("embedding",))
    for i in range(config.n_layers):
        hf_block, block = f"model.layers.{i}", f"blocks.{i}"
        for name, hf_name in family.norms.items():
            if config.norms == "both" or name.endswith("post_norm") == (config.norms == "post"):
                yield TensorMapping(f"{hf_block}.{hf_name}.weight", (f"{block}.{name}",))
        for name in "qkvo":
            hf_name, param_name = f"{hf_block}.self_attn.{name}_proj", f"{block}.attention.{name}"
            yield TensorMapping(f"{hf_name}.weight", (param_name,), in_features=H * D if name == "o" else M)
            if config.attn_bias and (name != "o" or config.attn_out_bias):
                yield TensorMapping(f"{hf_name}.bias", (f"{param_name}_bias",), flat=True)
        if config.qk_norm:
            for name in "qk":
                hf_name, param_name = f"{hf_block}.self_attn.{name}_norm.weight", f"{block}.attention.{name}_scale"
                yield TensorMapping(hf_name, (param_name,), flat=True)
        if config.attn_gate != "none":
            yield TensorMapping(f"{hf_block}.self_attn.gate_proj.weight", (f"{block}.attention.gate",), in_features=M)
        if config.attn_sinks:
            yield TensorMapping(f"{hf_block}.self_attn.sinks", (f"{block}.attention.sinks",))
        if family.experts and config.is_sparse(i):
            yield from _EXPERT_MAPPINGS[family.experts](config, hf_block, f"{block}.mlp")
        else:
            hf_mlp, mlp = f"{hf_block}.{family.mlp}", f"{block}.mlp"
            yield from _projections(config, hf_mlp, mlp, config.dense_hidden, family.projections)
    yield TensorMapping(f"model.{family.final_norm}.weight", ("norm",))
    if not config.tie_embeddings:
        yield TensorMapping("lm_head.weight", ("head",), in_features=M)


def _projections(
    config: ModelConfig, hf_mlp: str, mlp: str, hidden: int, names: Mapping[str, str] = PROJECTIONS
) -> Iterator[TensorMapping]:
    """Yield the mappings of a dense MLP."""
    for name, hf_name in names.items():
        in_features = hidden if name == "down" else config.dim
        yield TensorMapping(f"{hf_mlp}.{hf_name}.weight", (f"{mlp}.{name}",), in_features=in_features)


def _mixtral_experts(config: ModelConfig, hf_block: str, mlp: str) -> Iterator[TensorMapping]:
    return _single_experts(config, f"{hf_block}.block_sparse_moe", mlp, {"gate": "w1", "up": "w3", "down": "w2"})


def _qwen3_experts(config: ModelConfig, hf_block: str, mlp: str) -> Iterator[TensorMapping]:
    return _single_experts(config, f"{hf_block}.mlp", mlp, PROJECTIONS)


def _afmoe_experts(config: ModelConfig, hf_block: str, mlp: str) -> Iterator[TensorMapping]:
    yield TensorMapping(f"{hf_block}.mlp.expert_bias", (f"{mlp}.selection_bias",))
    yield from _single_experts(config, f"{hf_block}.mlp", mlp, PROJECTIONS, router="router.gate")
    hf_shared = f"{hf_block}.mlp.shared_experts"
    if config.shared_expert:
        yield from _projections(config, hf_shared, f"{mlp}.shared", config.shared_hidden)
    else:
        for name, hf_name in PROJECTIONS.items():
            shape = (config.dim, 0) if name == "down" else (0, config.dim)
            yield TensorMapping(f"{hf_shared}.{hf_name}.weight", (), empty_shape=shape)


def _single_experts(
    config: ModelConfig, hf_mlp: str, mlp: str, names: Mapping[str, str], router: str = "gate"
) -> Iterator[TensorMapping]:
    """Yield the mappings of the router, and of experts with a tensor per expert and matrix."""
    yield TensorMapping(f"{hf_mlp}.{router}.weight", (f"{mlp}.router",), in_features=config.dim)
    for e in range(config.n_experts):
        for name, projection in names.items():
            in_features = config.hidden if name == "down" else config.dim
            hf_name = f"{hf_mlp}.experts.{e}.{projection}.weight"
            yield TensorMapping(hf_name, (f"{mlp}.{name}",), expert=e, in_features=in_features)


def _gpt_oss_experts(config: ModelConfig, hf_block: str, mlp: str) -> Iterator[TensorMapping]:
    hf_mlp = f"{hf_block}.mlp"
    yield TensorMapping(f"{hf_mlp}.router.weight", (f"{mlp}.router",), in_features=config.dim)
    yield TensorMapping(f"{hf_mlp}.router.bias", (f"{mlp}.router_bias",))
    yield TensorMapping(f"{hf_mlp}.experts.gate_up_proj", (f"{mlp}.gate", f"{mlp}.up"))
    yield TensorMapping(f"{hf_mlp}.experts.gate_up_proj_bias", (f"{mlp}.gate_bias", f"{mlp}.up_bias"))
    yield TensorMapping(f"{hf_mlp}.experts.down_proj", (f"{mlp}.down",))
    yield TensorMapping(f"{hf_mlp}.experts.down_proj_bias", (f"{mlp}.down_bias",))


_EXPERT_MAPPINGS = {
    "mixtral": _mixtral_experts,
    "qwen3_moe": _qwen3_experts,
    "gpt_oss": _gpt_oss_experts,
    "afmoe": _afmoe_experts,
}
