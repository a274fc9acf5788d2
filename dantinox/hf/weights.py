"""Save and load weights as safetensors and config.json in the Hugging Face layouts of `dantinox.hf.tensor_mappings`."""

import dataclasses
import json
import os
import re
import secrets
import shutil
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dantinox.config import ConfigError, ModelConfig
from dantinox.config.aliases import current_names
from dantinox.config.validation import did_you_mean
from dantinox.data.hf_tokenizer_export import to_hf_tokenizer
from dantinox.data.tokenizer_protocol import Tokenizer
from dantinox.distributed.inference import inference_shardings
from dantinox.hf import mxfp4
from dantinox.hf.config import from_hf, is_mxfp4, layout_of, to_hf
from dantinox.hf.families import Layout
from dantinox.hf.tensor_mappings import MXFP4_SUFFIXES, TensorMapping, tensor_mappings
from dantinox.model.params import Params, abstract_params, param_axes, split_params
from dantinox.model.transformer import Transformer

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
REOPEN_BYTES = 1 << 26  # so that not all of a file stays mapped to memory while it is read
ParamDtype = Literal["auto", "float32", "bfloat16"]
_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_IGNORED_SUFFIX = "rotary_emb.inv_freq"  # rotary frequencies in old files, which follow from the config


def save_hf(
    model: Transformer,
    folder: str | Path,
    layout: Layout | None = None,
    shard_bytes: int = SHARD_BYTES,
    tokenizer: Tokenizer | None = None,
) -> list[Path]:
    """Save a model atomically, with float32 weights, and return the files of the weights.

    Args:
        model: the model.
        folder: must not exist, or be empty.
        layout: a name in `families.FAMILIES`; None: the first that can represent the model.
        shard_bytes: maximum bytes of tensors per file; a larger tensor has a file of its own.
        tokenizer: saved too, in the format of Hugging Face, with a generation_config.json.

    Raises:
        ConfigError: the layout cannot represent a setting; the message names it.
        FileExistsError: the folder is not empty.
    """
    hf_config = to_hf(model.config, layout)
    hf_tokenizer = None if tokenizer is None else to_hf_tokenizer(tokenizer)
    if hf_tokenizer is not None:
        hf_config |= {"bos_token_id": hf_tokenizer.token_id("bos_token"), "eos_token_id": hf_tokenizer.eos_id}
    if shard_bytes < 1:
        raise ConfigError(f"shard_bytes is {shard_bytes}; allowed: 1 or more")
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(17, "exists and is not empty; nothing was written", str(folder))
    params = {name: np.asarray(x, np.float32) for name, x in split_params(model)[1].items()}
    shards: list[list[TensorMapping]] = [[]]
    shard_size, total_size = 0, 0
    for mapping in tensor_mappings(model.config, layout or layout_of(model.config)):
        arrays = [params[name] for name in mapping.param_names]
        size = sum(x.nbytes // (1 if mapping.expert is None else len(x)) for x in arrays)
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
            tensors = {mapping.hf_name: mapping.export_tensor(params) for mapping in shard}
            save_file(tensors, draft / name, metadata={"format": "pt"})
        if len(shards) > 1:
            named_shards = zip(file_names, shards, strict=True)
            weight_map = {mapping.hf_name: name for name, shard in named_shards for mapping in shard}
            _write_json(draft / INDEX, {"metadata": {"total_size": total_size}, "weight_map": weight_map})
        if hf_tokenizer is not None:
            hf_tokenizer.save(draft)
        _write_json(draft / CONFIG, hf_config)
        os.replace(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return [folder / name for name in file_names]


def load_hf(
    folder: str | Path, *, mesh: str = "", param_dtype: ParamDtype = "float32", **overrides: Any
) -> Transformer:
    """Load a model from a folder in a layout of `families.FAMILIES`.

    Tensors are read one by one, straight to their devices. Weights in mxfp4, which gpt-oss stores its experts in, are
    unpacked.

    Args:
        folder: contains config.json and model.safetensors, or the files of model.safetensors.index.json.
        mesh: devices to lay the model over, such as data=2,tensor=4; "": one device.
        param_dtype: dtype of the matrices. auto: bfloat16 for those stored in 16 bits or fewer if matmuls are in
            bfloat16 (which gives the same numbers), else float32. Vectors, such as norms, are float32.
        overrides: model settings to change by name, such as dtype="bfloat16" or attn="xla".

    Raises:
        ConfigError: config.json is damaged, or has a setting that DantinoX does not support.
        ValueError: a file is damaged, or a tensor is missing, unknown, or has the wrong shape or dtype.
        FileNotFoundError: a file is missing.
    """
    if param_dtype not in get_args(ParamDtype):
        raise ConfigError(f"param_dtype is {param_dtype!r}; allowed: {', '.join(get_args(ParamDtype))}")
    config = read_model_config(folder, **overrides)
    model_def, shapes = abstract_params(config)
    shardings = inference_shardings(param_axes(config), shapes, mesh)
    return model_def.merge(load_params(folder, config, shardings, param_dtype))


def read_model_config(folder: str | Path, **overrides: Any) -> ModelConfig:
    """Return the model settings of a folder; arguments and errors as those of `load_hf`."""
    folder = local_folder(folder)
    hf_config = _read_json(folder / CONFIG)
    try:
        return _override(from_hf(hf_config), overrides)
    except ConfigError as error:
        raise ConfigError(f"{folder / CONFIG}: {error}") from None


def read_model_type(folder: str | Path) -> str:
    """Return the model_type of a folder."""
    return str(_read_json(local_folder(folder) / CONFIG).get("model_type"))


def load_params(
    folder: str | Path, config: ModelConfig, shardings: Mapping[str, jax.sharding.Sharding], param_dtype: ParamDtype
) -> Params:
    """Load the parameters of a model; one parameter at a time is in the memory of the host.

    Args:
        folder: as in `load_hf`, which names the errors too.
        config: the settings of the model in that folder.
        shardings: where to put each parameter, by name.
        param_dtype: as in `load_hf`.
    """
    folder = local_folder(folder)
    hf_config = _read_json(folder / CONFIG)
    _, shapes = abstract_params(config)
    mappings = list(tensor_mappings(config, hf_config["model_type"]))
    param_shapes = {name: x.shape for name, x in shapes.items()}
    missing = Counter(name for mapping in mappings for name in mapping.param_names)
    on_host: dict[str, np.ndarray] = {}
    params: Params = {}
    with _SafetensorsFiles(folder) as files:
        packed = _packed_tensors(mappings, files.file_names) if is_mxfp4(hf_config) else set()
        _check_tensor_names(folder, _stored_names(mappings, packed), files.file_names, config.tie_embeddings)
        dtype = hf_config.get("dtype") or hf_config.get("torch_dtype")
        # Some tensors, such as norms, stay in float32.
        allowed = {_DTYPES[dtype], "F32"} if dtype in _DTYPES else set(_DTYPES.values())
        _check_lm_head(folder, files, config, param_shapes["embedding"], allowed)
        for mapping in mappings:
            name, shape = mapping.hf_name, mapping.hf_shape(param_shapes)
            is_packed = name in packed
            tensor = files.read_packed(name, shape) if is_packed else files.read_tensor(name, shape, allowed)
            is_short = is_packed or tensor.dtype.itemsize == 2
            for param in mapping.param_names:
                if param not in on_host:
                    in_bfloat16 = param_dtype == "bfloat16" or (
                        param_dtype == "auto" and is_short and config.dtype == "bfloat16"
                    )
                    kind = jnp.bfloat16 if in_bfloat16 and len(param_shapes[param]) > 1 else np.float32
                    on_host[param] = np.empty(param_shapes[param], kind)
            mapping.import_tensor(tensor, on_host)
            del tensor
            for param in mapping.param_names:
                missing[param] -= 1
                if not missing[param]:
                    params[param] = _to_devices(on_host.pop(param), shardings[param])
    return params


def _to_devices(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """Return an array on its devices, of which each is sent its own part."""
    return jax.block_until_ready(jax.make_array_from_callback(array.shape, sharding, lambda index: array[index]))


def _check_lm_head(
    folder: Path, files: "_SafetensorsFiles", config: ModelConfig, shape: tuple[int, ...], dtypes: set[str]
) -> None:
    """Check that an output projection that is stored although it is tied equals the embedding."""
    name = "lm_head.weight"
    if config.tie_embeddings and name in files.file_names:
        embedding = files.read_tensor("model.embed_tokens.weight", shape, dtypes)
        if not np.array_equal(files.read_tensor(name, shape, dtypes), embedding):
            raise ValueError(f"{folder}: {name} differs from the embedding, but config.json has tie_word_embeddings")


def local_folder(folder: str | Path) -> Path:
    """Return the folder as a path.

    Raises:
        FileNotFoundError: it does not exist, is the name of a model on the Hugging Face Hub, or a run of DantinoX.
        NotADirectoryError: it is a file.
    """
    path = Path(folder)
    if (path / "config.yaml").is_file() and not (path / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} is a run of DantinoX; dantinox.load loads it")
    if path.is_dir():
        if not (path / CONFIG).is_file():
            raise FileNotFoundError(2, "No such file or directory", str(path / CONFIG))
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
        self.folder, self.open, self.bytes_read = folder, {}, 0
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
        """Return a tensor; a ValueError if it has another shape or dtype."""
        path, file = self.folder / self.file_names[name], self._open_file(self.file_names[name])
        stored = file.get_slice(name)
        if tuple(stored.get_shape()) != shape:
            raise ValueError(f"{path}: {name} has shape {stored.get_shape()}; allowed: {list(shape)}")
        if stored.get_dtype() not in dtypes:
            raise ValueError(f"{path}: {name} is {stored.get_dtype()}; allowed: {', '.join(sorted(dtypes))}")
        tensor = file.get_tensor(name)
        self.bytes_read += tensor.nbytes
        if self.bytes_read > REOPEN_BYTES:
            self.open.clear()
            self.bytes_read = 0
        return tensor

    def read_packed(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Return a tensor [E, in, out] in mxfp4 as float32; a ValueError if its parts are not those of this shape."""
        E, in_features, out_features = shape
        names = mxfp4.packed_names(name)
        if in_features % mxfp4.BLOCK:
            raise ValueError(
                f"{self.folder / self.file_names[names[0]]}: {names[0]} cannot hold {in_features} inputs; allowed: a "
                f"multiple of {mxfp4.BLOCK}, the values per block of mxfp4"
            )
        shapes = mxfp4.packed_shapes((E, in_features, out_features))
        tensor = mxfp4.unpack(*(self.read_tensor(*x, {"U8"}) for x in zip(names, shapes, strict=True)))
        if not np.isfinite(tensor).all():
            path = self.folder / self.file_names[names[1]]
            raise ValueError(f"{path}: {names[1]} has a scale that is NaN (255) or gives a value of 2^128 or more")
        return tensor


def _packed_tensors(mappings: Collection[TensorMapping], stored: Collection[str]) -> set[str]:
    """Return the names of the tensors that the files hold in mxfp4."""
    names = [mapping.hf_name for mapping in mappings if mapping.hf_name.endswith(MXFP4_SUFFIXES)]
    return {name for name in names if name not in stored and any(part in stored for part in mxfp4.packed_names(name))}


def _stored_names(mappings: Collection[TensorMapping], packed: Collection[str]) -> list[str]:
    """Return the names of the tensors in the files, with two for each of those in mxfp4."""
    names = [mapping.hf_name for mapping in mappings]
    return [part for name in names for part in (mxfp4.packed_names(name) if name in packed else (name,))]


def _check_tensor_names(folder: Path, expected: Collection[str], names: Mapping[str, str], tie: bool) -> None:
    """Check that the files contain all expected tensors and no others.

    Raises:
        ValueError: a tensor is missing or unknown.
    """
    unknown = names.keys() - set(expected) - ({"lm_head.weight"} if tie else set())
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
