"""Weights out and in: safetensors with the names and the config.json of Hugging Face.

ours                      theirs, [out, in]                        Llama, Mistral, Mixtral
embedding          VM     model.embed_tokens.weight                lm_head.weight where it is not tied
blocks.i.attention        model.layers.i.self_attn
  q  MHD, o  HDM            q_proj.weight, o_proj.weight           k and v like q
blocks.i.mlp              model.layers.i.mlp
  gate, up  MF, down FM     gate_proj.weight, up_proj, down_proj
blocks.i.mlp, experts     model.layers.i.block_sparse_moe
  router  ME                gate.weight
  gate, up  EMF, down EFM   experts.e.w1.weight, w3, w2
"""

import dataclasses
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dantinox.checkpoint.params import abstract_params, split_params
from dantinox.config import ConfigError, ModelConfig
from dantinox.config.aliases import current_names
from dantinox.config.validation import did_you_mean
from dantinox.hf.config import Layout, from_hf, to_hf
from dantinox.model.transformer import Transformer

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_LEFT_OUT = "rotary_emb.inv_freq"  # old files hold the rotary frequencies, which follow from the config


class Row(NamedTuple):
    """One of their tensors and where it lies in ours.

    Attributes:
        theirs, ours: names.
        expert: the place on our first axis, None where there is no such axis.
        inputs: how many inputs the matrix has, None for what is no matrix and is kept as it is.
    """

    theirs: str
    ours: str
    expert: int | None = None
    inputs: int | None = None

    def give(self, ours: np.ndarray) -> np.ndarray:
        """Their tensor from ours."""
        x = ours if self.expert is None else ours[self.expert]
        return x if self.inputs is None else np.ascontiguousarray(x.reshape(self.inputs, -1).T)

    def take(self, theirs: np.ndarray, ours: np.ndarray) -> None:
        """Write their tensor into ours."""
        place = ours[...] if self.expert is None else ours[self.expert]
        place[...] = theirs if self.inputs is None else theirs.T.reshape(place.shape)

    def shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of their tensor where ours has this one."""
        size = ours if self.expert is None else ours[1:]
        return size if self.inputs is None else (int(np.prod(size)) // self.inputs, self.inputs)


def rows(config: ModelConfig) -> Iterator[Row]:
    """Every tensor of a model, in the order it is run through."""
    M, F, H, D = config.dim, config.hidden, config.n_heads, config.resolved_head_dim
    yield Row("model.embed_tokens.weight", "embedding")
    for i in range(config.n_layers):
        theirs, ours = f"model.layers.{i}", f"blocks.{i}"
        yield Row(f"{theirs}.input_layernorm.weight", f"{ours}.attention_norm")
        for name in "qkvo":
            row = f"{theirs}.self_attn.{name}_proj.weight", f"{ours}.attention.{name}"
            yield Row(*row, inputs=H * D if name == "o" else M)
        yield Row(f"{theirs}.post_attention_layernorm.weight", f"{ours}.mlp_norm")
        parts = {"gate": M, "up": M, "down": F}
        if not config.n_experts:
            for name, inputs in parts.items():
                yield Row(f"{theirs}.mlp.{name}_proj.weight", f"{ours}.mlp.{name}", inputs=inputs)
            continue
        yield Row(f"{theirs}.block_sparse_moe.gate.weight", f"{ours}.mlp.router", inputs=M)
        for e in range(config.n_experts):
            for name, inputs in parts.items():
                letter = {"gate": "w1", "up": "w3", "down": "w2"}[name]
                row = f"{theirs}.block_sparse_moe.experts.{e}.{letter}.weight", f"{ours}.mlp.{name}"
                yield Row(*row, expert=e, inputs=inputs)
    yield Row("model.norm.weight", "norm")
    if not config.tie_embeddings:
        yield Row("lm_head.weight", "head", inputs=M)


def save_hf(
    model: Transformer, folder: str | Path, layout: Layout | None = None, shard_bytes: int = SHARD_BYTES
) -> list[Path]:
    """Write a model, whole or not at all, and return the files of its weights, which are float32.

    Args:
        folder: must not be there, or be empty.
        layout: "llama", "mistral" or "mixtral"; None: mixtral with experts, mistral with a window, llama else.
        shard_bytes: most bytes of tensors a file; a larger tensor has a file to itself.

    Raises:
        ConfigError: naming what the layout cannot hold.
        FileExistsError: the folder holds something.
    """
    held = to_hf(model.config, layout)
    if shard_bytes < 1:
        raise ConfigError(f"shard_bytes is {shard_bytes}; allowed: 1 or more")
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(17, "is there already and not empty; nothing was written", str(folder))
    params = {name: np.asarray(x, np.float32) for name, x in split_params(model)[1].items()}
    shards: list[list[Row]] = [[]]
    size, total = 0, 0
    for row in rows(model.config):
        more = params[row.ours].nbytes // (1 if row.expert is None else len(params[row.ours]))
        if shards[-1] and size + more > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(row)
        size, total = size + more, total + more
    names = [WEIGHTS]
    if len(shards) > 1:
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.tmp")
    try:
        draft.mkdir()
        for name, shard in zip(names, shards, strict=True):
            tensors = {row.theirs: row.give(params[row.ours]) for row in shard}
            save_file(tensors, draft / name, metadata={"format": "pt"})
        if len(shards) > 1:
            where = {row.theirs: name for name, shard in zip(names, shards, strict=True) for row in shard}
            _write(draft / INDEX, {"metadata": {"total_size": total}, "weight_map": where})
        _write(draft / CONFIG, held)
        os.replace(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return [folder / name for name in names]


def load_hf(folder: str | Path, **overrides: Any) -> Transformer:
    """The model of a folder in the layout of Llama, Mistral or Mixtral; its parameters are float32.

    Args:
        folder: holds config.json and model.safetensors, or the files that model.safetensors.index.json names.
        overrides: model settings to change by name, such as dtype="bfloat16" or attn="xla".

    Raises:
        ConfigError: config.json holds what our models have no place for, or is damaged.
        ValueError: naming a tensor that is missing, unknown, or of the wrong shape or dtype, or a damaged file.
        FileNotFoundError: naming the file that is not there.
    """
    folder = Path(folder)
    held = _json(folder / CONFIG)
    try:
        config = _changed(from_hf(held), overrides)
    except ConfigError as error:
        raise ConfigError(f"{folder / CONFIG}: {error}") from None
    model_def, shapes = abstract_params(config)
    expected = {row.theirs: row for row in rows(config)}
    with _Files(folder) as files:
        _complete(folder, expected, files.where, config.tie_embeddings)
        dtype = held.get("dtype") or held.get("torch_dtype")
        allowed = {_DTYPES[dtype]} if dtype in _DTYPES else set(_DTYPES.values())
        params = {name: np.empty(x.shape, np.float32) for name, x in shapes.items()}
        for name, row in expected.items():
            row.take(files.read(name, row.shape(shapes[row.ours].shape), allowed), params[row.ours])
        head = "lm_head.weight"
        if config.tie_embeddings and head in files.where:
            shape = shapes["embedding"].shape
            if not np.array_equal(files.read(head, shape, allowed), params["embedding"]):
                raise ValueError(f"{folder}: {head} is not the embedding, but config.json says tie_word_embeddings")
    return model_def.merge({name: jnp.asarray(x) for name, x in params.items()})


class _Files:
    """The safetensors of a folder, open.

    Attributes:
        where: name of a tensor -> its file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.open = folder, {}
        self.where: dict[str, str] = {}

    def __enter__(self) -> "_Files":
        if (self.folder / WEIGHTS).is_file():
            self.where = dict.fromkeys(self._file(WEIGHTS).keys(), WEIGHTS)
        elif (self.folder / INDEX).is_file():
            where = _json(self.folder / INDEX).get("weight_map")
            fits = isinstance(where, Mapping) and all(isinstance(name, str) for name in where.values())
            if not fits or any(Path(name).name != name for name in where.values()):
                raise ValueError(f"{self.folder / INDEX}: weight_map must give each tensor the name of a file")
            self.where = dict(where)
            for tensor, name in where.items():
                if tensor not in self._file(name).keys():  # noqa: SIM118 - no mapping
                    raise ValueError(f"{self.folder / name}: {tensor} is missing, which {INDEX} says is here")
        else:
            raise FileNotFoundError(2, f"has neither {WEIGHTS} nor {INDEX}", str(self.folder))
        return self

    def __exit__(self, *_: object) -> None:
        self.open.clear()

    def _file(self, name: str) -> Any:
        if name not in self.open:
            path = self.folder / name
            if not path.is_file():
                raise FileNotFoundError(2, "No such file or directory", str(path))
            try:
                self.open[name] = safe_open(path, "numpy")
            except SafetensorError as error:
                raise ValueError(f"{path} is damaged or no safetensors: {error}") from None
        return self.open[name]

    def read(self, name: str, shape: tuple[int, ...], dtypes: set[str]) -> np.ndarray:
        """A tensor of this shape and one of these dtypes, as float32."""
        path, file = self.folder / self.where[name], self._file(self.where[name])
        found = file.get_slice(name)
        if tuple(found.get_shape()) != shape:
            raise ValueError(f"{path}: {name} has shape {found.get_shape()}; allowed: {list(shape)}")
        if found.get_dtype() not in dtypes:
            raise ValueError(f"{path}: {name} is {found.get_dtype()}; allowed: {', '.join(sorted(dtypes))}")
        return file.get_tensor(name).astype(np.float32)


def _complete(folder: Path, expected: Mapping[str, Row], there: Mapping[str, str], tie: bool) -> None:
    """Every tensor is there and no other one.

    Raises:
        ValueError: naming those that are not.
    """
    unknown = there.keys() - expected.keys() - ({"lm_head.weight"} if tie else set())
    unknown = {name for name in unknown if not name.endswith(_LEFT_OUT)}
    for what, names in (
        ("is missing", [name for name in expected if name not in there]),
        ("is nothing that a model of this config.json has", sorted(unknown)),
    ):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise ValueError(f"{folder}: {names[0]}{more} {what}")


def _changed(config: ModelConfig, overrides: Mapping[str, Any]) -> ModelConfig:
    known = [field.name for field in dataclasses.fields(config)]
    overrides = current_names(overrides)
    for name in overrides:
        if name not in known:
            raise ConfigError(f"unknown setting {name!r}; {did_you_mean(name, known)}")
    return dataclasses.replace(config, **overrides)


def _json(path: Path) -> dict[str, Any]:
    try:
        held = json.loads(path.read_text("utf-8"))
    except ValueError:
        held = None
    if not isinstance(held, dict):
        raise ConfigError(f"{path} is damaged: it must hold a JSON object")
    return held


def _write(path: Path, held: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(held, indent=2) + "\n", "utf-8")
