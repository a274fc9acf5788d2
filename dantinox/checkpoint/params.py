"""Split a model into its definition and named parameters, and merge them again."""

from dataclasses import dataclass
from typing import Any, cast

import jax
from flax import nnx

from dantinox.config import ModelConfig
from dantinox.model.transformer import Transformer

Array = jax.Array
Params = dict[str, Array]  # dotted path -> array, such as blocks.0.attention.q


@dataclass(frozen=True)
class ModelDef:
    """A model without its parameters; hashable, so it can be a static argument of jit."""

    graph: nnx.GraphDef
    tree: Any
    names: tuple[str, ...]

    def merge(self, params: Params) -> Transformer:
        """The model with these parameters."""
        return nnx.merge(self.graph, jax.tree.unflatten(self.tree, [params[name] for name in self.names]))


def split_params(model: Transformer) -> tuple[ModelDef, Params]:
    """Split a model into (definition, parameters by dotted path)."""
    graph, state = nnx.split(model)
    leaves, tree = jax.tree.flatten(state)
    names = tuple(".".join(map(str, path)) for path, _ in nnx.to_flat_state(state))
    return ModelDef(graph, tree, names), dict(zip(names, leaves, strict=True))


def abstract_params(config: ModelConfig) -> tuple[ModelDef, dict[str, jax.ShapeDtypeStruct]]:
    """`split_params` of a model of this config, with shapes instead of arrays; nothing is computed."""
    definition, shapes = split_params(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
    return definition, cast("dict[str, jax.ShapeDtypeStruct]", shapes)


def param_axes(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """The axis letters of each parameter, by dotted path."""
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    return {
        ".".join(map(str, path)): variable.get_metadata()["axes"]
        for path, variable in nnx.to_flat_state(nnx.state(model))
    }
