"""`dtype="auto"`: which dtype it is on a device, where it is resolved, and that a run keeps it."""

import importlib.resources

import jax
import jax.numpy as jnp
import pytest
import yaml
from flax import nnx

import dantinox
from dantinox.checkpoint.load import read_config
from dantinox.cli import doctor, train
from dantinox.config import Config, ModelConfig, presets
from dantinox.config.aliases import original_names
from dantinox.inference.prefill import init_caches
from dantinox.kernels.dispatch import target_device
from dantinox.metrics import logger as metrics_log
from dantinox.metrics import model_summary
from dantinox.model import flops

DTYPES = {
    ("gpu", "NVIDIA A100-SXM4-80GB"): "bfloat16",
    ("gpu", "NVIDIA H100 80GB HBM3"): "bfloat16",
    ("gpu", "NVIDIA B200"): "bfloat16",
    ("gpu", "NVIDIA L4"): "bfloat16",
    ("gpu", "NVIDIA GeForce RTX 3090"): "bfloat16",
    ("gpu", "NVIDIA GeForce RTX 5090"): "bfloat16",
    ("gpu", "AMD Instinct MI300X"): "bfloat16",
    ("tpu", "TPU v5 lite"): "bfloat16",
    ("tpu", "TPU v6 lite"): "bfloat16",
    ("gpu", "Tesla T4"): "float32",
    ("gpu", "Tesla V100-SXM2-16GB"): "float32",
    ("gpu", "AMD Radeon RX 7900 XTX"): "float32",
    ("gpu", "AMD Instinct MI50"): "float32",
    ("gpu", "an unknown device"): "float32",
    ("cpu", "cpu"): "float32",
}
TINY = dict(
    n_layers=1, dim=16, n_heads=2, n_kv_heads=1, window=8, max_context=32, mlp_ratio=1.0, seq_len=16, batch_size=4,
    steps=2, log_every=1, eval_every=2, eval_batches=1, save_every=2, sample_tokens=0, data="text.txt",
)  # fmt: skip


@pytest.mark.parametrize(("platform", "kind"), DTYPES)
def test_auto_is_bfloat16_where_a_device_has_fast_bfloat16(platform, kind):
    with target_device(platform, kind):
        assert ModelConfig().resolved_dtype == DTYPES[platform, kind]
        assert ModelConfig(dtype="float32").resolved_dtype == "float32"
        assert ModelConfig(dtype="bfloat16").resolved_dtype == "bfloat16"


def test_auto_is_the_default_of_the_settings_and_of_every_preset_that_names_no_dtype():
    for name in presets():
        named = yaml.safe_load((importlib.resources.files("dantinox") / "presets" / f"{name}.yaml").read_text())
        assert Config.from_preset(name).model.dtype == named.get("dtype", "auto")
    assert Config().model.dtype == Config.from_preset("nano").model.dtype == "auto"
    assert Config.from_preset("h100").model.dtype == "bfloat16"


@pytest.mark.parametrize(("device", "dtype"), [(("gpu", "NVIDIA L4"), "bfloat16"), (("cpu", "cpu"), "float32")])
def test_model_and_reports_have_the_resolved_dtype(device, dtype):
    config = Config().replace(**TINY)
    with target_device(*device):
        model = nnx.eval_shape(lambda: dantinox.Transformer(config.model, rngs=nnx.Rngs(0)))
        assert model.config == config.replace(dtype=dtype).model
        assert init_caches(config.model, 1, [8])[0].k.dtype == dtype
        assert f", {dtype}\n" in model_summary.describe(config) and "auto" not in model_summary.describe(config)
        item = jnp.dtype(dtype).itemsize
        assert flops.kv_bytes_per_token(config.model) == 2 * config.model.resolved_head_dim * item
        assert dict(doctor.devices())["--dtype auto"] == dtype
    x = jnp.ones((1, 8), jnp.int32)
    hidden = jax.eval_shape(lambda m: m.hidden(x)[0], model)  # outside `target_device`: the model keeps its dtype
    assert hidden.dtype == dtype


def test_unknown_dtype_is_one_line_with_the_allowed_ones(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--dtype", "float16"])
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.count("\n") == 1
    assert "'float16' for argument '--dtype'" in line and "auto" in line and "float32" in line and "bfloat16" in line
    with pytest.raises(dantinox.ConfigError, match="dtype is 'float16'; allowed: auto, float32, bfloat16"):
        Config().replace(dtype="float16")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a text, and a stand-in for the measurements that no test here reads."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DANTINOX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(metrics_log, "matmul_rate", lambda dtype: 1e9)
    monkeypatch.setattr(metrics_log, "plot_loss", lambda *_: None)
    (tmp_path / "text.txt").write_text("".join(f"{i} Nel mezzo del cammin di nostra vita\n" for i in range(200)))
    return tmp_path


def has_fast_bfloat16(monkeypatch, value):
    monkeypatch.setattr("dantinox.kernels.dispatch.has_fast_bfloat16", lambda: value)


@pytest.mark.parametrize(
    "flags",
    [[], *(pytest.param(flags, marks=pytest.mark.slow) for flags in (["--dtype", "auto"], ["--preset", "nano"]))],
    ids=" ".join,
)
def test_run_keeps_its_dtype_on_another_device(flags, here, monkeypatch, capsys):
    has_fast_bfloat16(monkeypatch, True)
    run = train.train(Config().replace(run="mine", **TINY))
    assert yaml.safe_load((run / "config.yaml").read_text())["dtype"] == "bfloat16"
    assert "bfloat16" in (run / "summary.txt").read_text()
    has_fast_bfloat16(monkeypatch, False)
    capsys.readouterr()
    assert train.main(["--run", "mine", "--resume", "--steps", "4", *flags]) == 0
    out = capsys.readouterr().out
    assert "resuming in bfloat16, the dtype of the run; --dtype auto of a new run is float32 here" in out
    assert "dtype 'bfloat16', not" not in out
    assert read_config(run).model.dtype == "bfloat16"
    assert dantinox.load(run)[0].config.dtype == "bfloat16"
    with pytest.raises(SystemExit):
        train.main(["--run", "mine", "--resume", "--dtype", "float32"])
    assert "--resume cannot change dtype 'bfloat16' -> 'float32'" in capsys.readouterr().err


@pytest.mark.slow
def test_run_of_an_earlier_version_is_float32(here, monkeypatch, capsys):
    has_fast_bfloat16(monkeypatch, True)
    run = train.train(Config().replace(run="old", dtype="float32", **TINY))
    lines = (run / "config.yaml").read_text().splitlines(keepends=True)
    assert read_config(run).model.dtype == "float32"
    (run / "config.yaml").write_text("".join(line for line in lines if not line.startswith("dtype:")))
    assert read_config(run).model.dtype == "float32"
    assert train.main(["--run", "old", "--resume", "--steps", "4"]) == 0
    assert "resuming in float32, the dtype of the run" in capsys.readouterr().out
    assert read_config(run).model.dtype == "float32"


def test_folders_of_earlier_sweeps_keep_their_names():
    assert original_names({"dtype": "auto"}) == original_names({"dtype": "float32"}) == {"dtype": "float32"}
    assert original_names({"dtype": "bfloat16"}) == {"dtype": "bfloat16"}
