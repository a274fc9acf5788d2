"""A model taken apart into named arrays and put together again: what jit, the optimizer and checkpoints work on."""

from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from dantinox.config import ModelConfig
from dantinox.model.transformer import Transformer

Array = jax.Array
Params = dict[str, Array]  # dotted path -> array, such as blocks.0.attention.q


@dataclass(frozen=True)
class Skeleton:
    """A model without its arrays; hashable, so that jit can take it as a static argument."""

    graph: nnx.GraphDef
    tree: Any
    names: tuple[str, ...]

    def join(self, params: Params) -> Transformer:
        """The model with these arrays."""
        return nnx.merge(self.graph, jax.tree.unflatten(self.tree, [params[name] for name in self.names]))


def split(model: Transformer) -> tuple[Skeleton, Params]:
    """(skeleton, arrays by dotted path)."""
    graph, state = nnx.split(model)
    leaves, tree = jax.tree.flatten(state)
    names = tuple(".".join(map(str, path)) for path, _ in nnx.to_flat_state(state))
    return Skeleton(graph, tree, names), dict(zip(names, leaves, strict=True))


def abstract(config: ModelConfig) -> tuple[Skeleton, dict[str, jax.ShapeDtypeStruct]]:
    """The same for a model of this config, with shapes instead of arrays: nothing is computed."""
    return split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))


def axes(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """The letters of each parameter's axes, by dotted path."""
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    return {
        ".".join(map(str, path)): variable.get_metadata()["axes"]
        for path, variable in nnx.to_flat_state(nnx.state(model))
    }
