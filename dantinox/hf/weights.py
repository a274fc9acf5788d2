"""Save and load weights as safetensors and config.json in the Hugging Face layouts of Llama, Mistral and Mixtral.

DantinoX                  Hugging Face, [out, in]
embedding          VM     model.embed_tokens.weight                lm_head.weight if it is not tied
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
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dantinox.config import ConfigError, ModelConfig
from dantinox.config.aliases import current_names
from dantinox.config.validation import did_you_mean
from dantinox.hf.config import Layout, from_hf, to_hf
from dantinox.model.params import abstract_params, split_params
from dantinox.model.transformer import Transformer

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_IGNORED_SUFFIX = "rotary_emb.inv_freq"  # rotary frequencies in old files, which follow from the config


class TensorMapping(NamedTuple):
    """A tensor of Hugging Face and the parameter, or the slice of one, that it corresponds to.

    Attributes:
        hf_name, param_name: names of the tensor and of the parameter.
        expert: index on the first axis of the parameter; None if it has no expert axis.
        in_features: number of inputs of a matrix, which is stored transposed; None for other tensors.
    """

    hf_name: str
    param_name: str
    expert: int | None = None
    in_features: int | None = None

    def export_tensor(self, param: np.ndarray) -> np.ndarray:
        """Return the tensor of a parameter."""
        x = param if self.expert is None else param[self.expert]
        return x if self.in_features is None else np.ascontiguousarray(x.reshape(self.in_features, -1).T)

    def import_tensor(self, tensor: np.ndarray, param: np.ndarray) -> None:
        """Copy the tensor into the parameter."""
        destination = param[...] if self.expert is None else param[self.expert]
        destination[...] = tensor if self.in_features is None else tensor.T.reshape(destination.shape)

    def hf_shape(self, param_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the tensor for the shape of its parameter."""
        shape = param_shape if self.expert is None else param_shape[1:]
        return shape if self.in_features is None else (int(np.prod(shape)) // self.in_features, self.in_features)


def tensor_mappings(config: ModelConfig) -> Iterator[TensorMapping]:
    """Yield the mapping of every tensor of a model, from input to output."""
    M, F, H, D = config.dim, config.hidden, config.n_heads, config.resolved_head_dim
    yield TensorMapping("model.embed_tokens.weight", "embedding")
    for i in range(config.n_layers):
        hf_block, block = f"model.layers.{i}", f"blocks.{i}"
        yield TensorMapping(f"{hf_block}.input_layernorm.weight", f"{block}.attention_norm")
        for name in "qkvo":
            names = f"{hf_block}.self_attn.{name}_proj.weight", f"{block}.attention.{name}"
            yield TensorMapping(*names, in_features=H * D if name == "o" else M)
        yield TensorMapping(f"{hf_block}.post_attention_layernorm.weight", f"{block}.mlp_norm")
        matrices = {"gate": M, "up": M, "down": F}
        if not config.n_experts:
            for name, in_features in matrices.items():
                names = f"{hf_block}.mlp.{name}_proj.weight", f"{block}.mlp.{name}"
                yield TensorMapping(*names, in_features=in_features)
            continue
        yield TensorMapping(f"{hf_block}.block_sparse_moe.gate.weight", f"{block}.mlp.router", in_features=M)
        for e in range(config.n_experts):
            for name, in_features in matrices.items():
                hf_matrix = {"gate": "w1", "up": "w3", "down": "w2"}[name]
                names = f"{hf_block}.block_sparse_moe.experts.{e}.{hf_matrix}.weight", f"{block}.mlp.{name}"
                yield TensorMapping(*names, expert=e, in_features=in_features)
    yield TensorMapping("model.norm.weight", "norm")
    if not config.tie_embeddings:
        yield TensorMapping("lm_head.weight", "head", in_features=M)


def save_hf(
    model: Transformer, folder: str | Path, layout: Layout | None = None, shard_bytes: int = SHARD_BYTES
) -> list[Path]:
    """Save a model atomically, with float32 weights, and return the files of the weights.

    Args:
        model: the model.
        folder: must not exist, or be empty.
        layout: "llama", "mistral" or "mixtral"; None: mixtral with experts, mistral with a window, llama otherwise.
        shard_bytes: maximum bytes of tensors per file; a larger tensor has a file of its own.

    Raises:
        ConfigError: the layout cannot represent a setting; the message names it.
        FileExistsError: the folder is not empty.
    """
    hf_config = to_hf(model.config, layout)
    if shard_bytes < 1:
        raise ConfigError(f"shard_bytes is {shard_bytes}; allowed: 1 or more")
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(17, "exists and is not empty; nothing was written", str(folder))
    params = {name: np.asarray(x, np.float32) for name, x in split_params(model)[1].items()}
    shards: list[list[TensorMapping]] = [[]]
    shard_size, total_size = 0, 0
    for mapping in tensor_mappings(model.config):
        param = params[mapping.param_name]
        size = param.nbytes // (1 if mapping.expert is None else len(param))
        if shards[-1] and shard_size + size > shard_bytes:
            shards.append([])
            shard_size = 0
        shards[-1].append(mapping)
        shard_size, total_size = shard_size + size, total_size + size
    file_names = [WEIGHTS]
    if len(shards) > 1:
        file_names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.tmp")
    try:
        draft.mkdir()
        for name, shard in zip(file_names, shards, strict=True):
            tensors = {mapping.hf_name: mapping.export_tensor(params[mapping.param_name]) for mapping in shard}
            save_file(tensors, draft / name, metadata={"format": "pt"})
        if len(shards) > 1:
            named_shards = zip(file_names, shards, strict=True)
            weight_map = {mapping.hf_name: name for name, shard in named_shards for mapping in shard}
            _write_json(draft / INDEX, {"metadata": {"total_size": total_size}, "weight_map": weight_map})
        _write_json(draft / CONFIG, hf_config)
        os.replace(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return [folder / name for name in file_names]


def load_hf(folder: str | Path, **overrides: Any) -> Transformer:
    """Load a model from a folder in the layout of Llama, Mistral or Mixtral; its parameters are float32.

    Args:
        folder: contains config.json and model.safetensors, or the files of model.safetensors.index.json.
        overrides: model settings to change by name, such as dtype="bfloat16" or attn="xla".

    Raises:
        ConfigError: config.json is damaged, or has a setting that DantinoX does not support.
        ValueError: a file is damaged, or a tensor is missing, unknown, or has the wrong shape or dtype.
        FileNotFoundError: a file is missing.
    """
    folder = _local_folder(folder)
    hf_config = _read_json(folder / CONFIG)
    try:
        config = _override(from_hf(hf_config), overrides)
    except ConfigError as error:
        raise ConfigError(f"{folder / CONFIG}: {error}") from None
    model_def, shapes = abstract_params(config)
    expected = {mapping.hf_name: mapping for mapping in tensor_mappings(config)}
    with _SafetensorsFiles(folder) as files:
        _check_tensor_names(folder, expected, files.file_names, config.tie_embeddings)
        dtype = hf_config.get("dtype") or hf_config.get("torch_dtype")
        allowed = {_DTYPES[dtype]} if dtype in _DTYPES else set(_DTYPES.values())
        params = {name: np.empty(x.shape, np.float32) for name, x in shapes.items()}
        for name, mapping in expected.items():
            tensor = files.read_tensor(name, mapping.hf_shape(shapes[mapping.param_name].shape), allowed)
            mapping.import_tensor(tensor, params[mapping.param_name])
        lm_head = "lm_head.weight"
        if config.tie_embeddings and lm_head in files.file_names:
            shape = shapes["embedding"].shape
            if not np.array_equal(files.read_tensor(lm_head, shape, allowed), params["embedding"]):
                raise ValueError(
                    f"{folder}: {lm_head} differs from the embedding, but config.json has tie_word_embeddings"
                )
    return model_def.merge({name: jnp.asarray(x) for name, x in params.items()})


def _local_folder(folder: str | Path) -> Path:
    """Return the folder as a path.

    Raises:
        FileNotFoundError: it does not exist, is the name of a model on the Hugging Face Hub, or a run of DantinoX.
        NotADirectoryError: it is a file.
    """
    path = Path(folder)
    if (path / "config.yaml").is_file() and not (path / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} is a run of DantinoX; dantinox.load loads it")
    if path.is_dir():
        return path
    if path.exists():
        raise NotADirectoryError(f"{folder} is a file; load_hf takes the folder that holds {CONFIG}")
    is_hub_name = re.fullmatch(r"[\w-]+(/[\w.-]+)?", str(folder)) is not None or "://" in str(folder)
    download = "; download a model of the Hugging Face Hub first, such as with hf download --local-dir"
    raise FileNotFoundError(f"{folder} does not exist; load_hf takes a local folder{download if is_hub_name else ''}")


class _SafetensorsFiles:
    """The open safetensors files of a folder.

    Attributes:
        file_names: name of each tensor -> name of its file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.open = folder, {}
        self.file_names: dict[str, str] = {}

    def __enter__(self) -> "_SafetensorsFiles":
        if (self.folder / WEIGHTS).is_file():
            self.file_names = dict.fromkeys(self._open_file(WEIGHTS).keys(), WEIGHTS)
        elif (self.folder / INDEX).is_file():
            weight_map = _read_json(self.folder / INDEX).get("weight_map")
            is_valid = isinstance(weight_map, Mapping) and all(isinstance(name, str) for name in weight_map.values())
            if not is_valid or any(Path(name).name != name for name in weight_map.values()):
                raise ValueError(f"{self.folder / INDEX}: weight_map must map each tensor to the name of a file")
            self.file_names = dict(weight_map)
            for tensor, name in weight_map.items():
                if tensor not in self._open_file(name).keys():  # noqa: SIM118 - not a mapping
                    raise ValueError(f"{self.folder / name}: {tensor} is missing, although {INDEX} lists it")
        else:
            raise FileNotFoundError(2, f"has neither {WEIGHTS} nor {INDEX}", str(self.folder))
        return self

    def __exit__(self, *_: object) -> None:
        self.open.clear()

    def _open_file(self, name: str) -> Any:
        if name not in self.open:
            path = self.folder / name
            if not path.is_file():
                raise FileNotFoundError(2, "No such file or directory", str(path))
            try:
                self.open[name] = safe_open(path, "numpy")
            except SafetensorError as error:
                raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from None
        return self.open[name]

    def read_tensor(self, name: str, shape: tuple[int, ...], dtypes: set[str]) -> np.ndarray:
        """Return a tensor as float32; a ValueError if it has another shape or dtype."""
        path, file = self.folder / self.file_names[name], self._open_file(self.file_names[name])
        stored = file.get_slice(name)
        if tuple(stored.get_shape()) != shape:
            raise ValueError(f"{path}: {name} has shape {stored.get_shape()}; allowed: {list(shape)}")
        if stored.get_dtype() not in dtypes:
            raise ValueError(f"{path}: {name} is {stored.get_dtype()}; allowed: {', '.join(sorted(dtypes))}")
        return file.get_tensor(name).astype(np.float32)


def _check_tensor_names(
    folder: Path, expected: Mapping[str, TensorMapping], names: Mapping[str, str], tie: bool
) -> None:
    """Check that the files contain all expected tensors and no others.

    Raises:
        ValueError: a tensor is missing or unknown.
    """
    unknown = names.keys() - expected.keys() - ({"lm_head.weight"} if tie else set())
    unknown = {name for name in unknown if not name.endswith(_IGNORED_SUFFIX)}
    for fault, faulty in (
        ("is missing", [name for name in expected if name not in names]),
        ("is not a tensor of a model with this config.json", sorted(unknown)),
    ):
        if faulty:
            more = f" (and {len(faulty) - 1} more)" if len(faulty) > 1 else ""
            raise ValueError(f"{folder}: {faulty[0]}{more} {fault}")


def _override(config: ModelConfig, overrides: Mapping[str, Any]) -> ModelConfig:
    field_names = [field.name for field in dataclasses.fields(config)]
    overrides = current_names(overrides)
    for name in overrides:
        if name not in field_names:
            raise ConfigError(f"unknown setting {name!r}; {did_you_mean(name, field_names)}")
    return dataclasses.replace(config, **overrides)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is damaged: expected a JSON object")
    return content


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
