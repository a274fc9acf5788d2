"""Split a model into its definition and named parameters, and merge them again.

Checkpoints, sharding rules and optimizer states know a parameter by its name here, which never changes; `STORED_NAMES`
maps the attributes of the modules whose names have changed since.
"""

from dataclasses import dataclass, replace
from typing import Any, cast

import jax
from flax import nnx

from dantinox.config import ModelConfig
from dantinox.model.lora import factor_axes, factor_shapes, merge_factors
from dantinox.model.transformer import Transformer

Array = jax.Array
Params = dict[str, Array]  # name -> array; a name is a dotted path such as blocks.0.attention.q
STORED_NAMES = {
    "token_embedding": "embedding",
    "pos_embedding": "position",
    "final_norm": "norm",
    "lm_head": "head",
    "q_norm": "q_scale",
    "k_norm": "k_scale",
}


@dataclass(frozen=True)
class ModelDef:
    """A model without its parameters; hashable, so it can be a static argument of jit.

    Attributes:
        graph: definition of the modules.
        tree: structure of their state.
        names: name of each leaf of the state, in order.
        lora_scale: factor of the products that LoRA adds to weights.
    """

    graph: nnx.GraphDef
    tree: Any
    names: tuple[str, ...]
    lora_scale: float = 1.0

    def merge(self, params: Params) -> Transformer:
        """Return the model with these parameters; factors of LoRA are added to their weights."""
        params = merge_factors(params, self.lora_scale)
        return nnx.merge(self.graph, jax.tree.unflatten(self.tree, [params[name] for name in self.names]))


def split_params(model: Transformer) -> tuple[ModelDef, Params]:
    """Split a model into (definition, parameters by name)."""
    graph, state = nnx.split(model)
    leaves, tree = jax.tree.flatten(state)
    names = tuple(_stored_name(path) for path, _ in nnx.to_flat_state(state))
    return ModelDef(graph, tree, names), dict(zip(names, leaves, strict=True))


def abstract_params(config: ModelConfig) -> tuple[ModelDef, dict[str, jax.ShapeDtypeStruct]]:
    """Return `split_params` of a model of this config with shapes instead of arrays, and the factors of its LoRA.

    Nothing is computed.
    """
    definition, shapes = split_params(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
    if config.lora_rank:
        definition = replace(definition, lora_scale=config.lora_alpha / config.lora_rank)
    return definition, cast("dict[str, jax.ShapeDtypeStruct]", shapes) | factor_shapes(
        config, _weight_axes(config), shapes
    )


def param_axes(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Return the axis letters of each parameter, by name; those of the factors of LoRA come last."""
    axes = _weight_axes(config)
    return axes | factor_axes(config, axes)


def _weight_axes(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    return {
        _stored_name(path): variable.get_metadata()["axes"] for path, variable in nnx.to_flat_state(nnx.state(model))
    }


def _stored_name(path: tuple[Any, ...]) -> str:
    """Return the name of a parameter: its dotted path, under the earliest names of the attributes."""
    return ".".join(STORED_NAMES.get(attribute, str(attribute)) for attribute in path)
