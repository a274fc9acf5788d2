"""Measured block sizes and implementations: what the operations make of kernels/tuned/<device>.json."""

import importlib
import json
import logging
import re

import jax.numpy as jnp
import numpy as np
import pytest

from dantinox import kernels
from dantinox.kernels import dispatch, tuning
from dantinox.kernels.dispatch import Device, target_device
from dantinox.kernels.ops.attention.pallas_cpu.block_sizes import CpuBlockSizes
from dantinox.kernels.ops.attention.pallas_cpu.block_sizes import heuristic_block_sizes as attention_sizes
from dantinox.kernels.ops.decode_attention.pallas_cpu.kernel import choose_block_size
from dantinox.kernels.ops.grouped_matmul.pallas_cpu.gmm import tile_sizes

SIZES = {"heads": 4, "G": 1, "T": 512, "S": 512, "causal": True, "window": 64}
ATTENTION = "attention.pallas_cpu.heuristic_block_sizes(heads=4, G=1, T=512, S=512, causal=True, window=64)"
DECODE = "decode_attention.pallas_cpu.kernel.choose_block_size(C=4096, max_visible=64, itemsize=4, eight_bits=False)"
TILES = "grouped_matmul.pallas_cpu.gmm.tile_sizes(N=4096, E=8)"
X = jnp.ones((1, 512, 4, 32))


@pytest.fixture(autouse=True)
def own_folder(monkeypatch, tmp_path):
    """Tables in a folder of the test, and no earlier log lines."""
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    for function in (tuning.table, tuning._log_choice, dispatch._log_choice):
        function.cache_clear()
    yield
    tuning.table.cache_clear()


def write(folder, block_sizes=(), implementations=(), name="cpu"):
    rows = {
        "block_sizes": {key: {"choice": choice} for key, choice in dict(block_sizes).items()},
        "implementations": {key: {"fastest": fastest} for key, fastest in dict(implementations).items()},
    }
    (folder / f"{name}.json").write_text(json.dumps(rows), "utf-8")


def test_heuristics_decide_without_a_table():
    assert attention_sizes(**SIZES) == CpuBlockSizes(4, 64, 64, 2)
    assert (choose_block_size(4096, 64, 4, False), tile_sizes(4096, 8)) == (64, (512, 128))


def test_measured_sizes_replace_those_of_the_heuristics_for_the_same_problem(tmp_path, caplog):
    write(tmp_path, {ATTENTION: {"block_q": 32, "kv_blocks_per_step": 1}, DECODE: 256, TILES: [256, 64]})
    with caplog.at_level(logging.INFO, logger="dantinox.kernels"):
        assert attention_sizes(**SIZES) == CpuBlockSizes(4, 32, 64, 1)
    assert f"{ATTENTION}: measured CpuBlockSizes(kv_heads=4, block_q=32" in caplog.text
    assert choose_block_size(4096, 64, 4, eight_bits=False) == 256
    assert tile_sizes(E=8, N=4096) == (256, 64)
    assert attention_sizes(**SIZES | {"heads": 8}).block_q == 64
    with target_device("gpu", "NVIDIA H100 80GB HBM3"):
        assert tile_sizes(4096, 8) == (512, 128)


def test_names_do_not_depend_on_how_arguments_are_passed():
    with tuning.recording() as seen:
        choose_block_size(4096, 64, itemsize=4, eight_bits=False)
    assert seen.choices == {DECODE: 64}


def test_forced_sizes_reach_calls_that_were_traced_before(tmp_path):
    def sizes_of_call():
        with tuning.recording() as seen:
            kernels.attention(X, X, X, window=64, implementation="pallas")
        return seen.choices.get(ATTENTION)

    write(tmp_path, {ATTENTION: {"block_q": 32, "kv_blocks_per_step": 1}})
    assert sizes_of_call()["block_q"] == 32
    with tuning.forcing({}):
        assert sizes_of_call()["block_q"] == 64
    with tuning.forcing({ATTENTION: {"block_q": 128, "kv_blocks_per_step": 1}}):
        assert sizes_of_call()["block_q"] == 128


def test_measured_sizes_give_the_same_attention(tmp_path):
    write(tmp_path, {ATTENTION: {"block_q": 128, "block_kv": 32, "kv_blocks_per_step": 1}})
    q = jnp.asarray(np.random.default_rng(0).standard_normal(X.shape), jnp.float32)
    o = kernels.attention(q, q, q, window=64, implementation="pallas")
    np.testing.assert_allclose(o, kernels.attention(q, q, q, window=64, implementation="reference"), atol=1e-5)


@pytest.mark.parametrize("content", ["{", "[]", '{"block_sizes": {}}', '{"block_sizes": {"a": 1}}'])
def test_damaged_table_is_reported_and_ignored(content, tmp_path, caplog):
    (tmp_path / "cpu.json").write_text(content, "utf-8")
    assert attention_sizes(**SIZES).block_q == 64
    assert re.search(r"cpu\.json is damaged", caplog.text)


def test_auto_follows_the_measured_winner_of_the_same_call(tmp_path, caplog):
    call = "attention(float32[1,512,4,32], float32[1,512,4,32], float32[1,512,4,32], 64, True, False, None)"
    write(tmp_path, implementations={call: "pallas"})
    with caplog.at_level(logging.INFO, logger="dantinox.kernels"), tuning.recording() as seen:
        kernels.attention(X, X, X, window=64)
        kernels.attention(X, X, X, window=65)
    assert seen.calls[0] == call
    assert "auto chose pallas, the fastest when measured, on cpu" in caplog.text
    assert re.search(r"auto chose xla on cpu; not pallas: interpreted, it is slow at these sizes", caplog.text)


def test_measured_winner_must_pass_its_check_on_an_accelerator(tmp_path, monkeypatch):
    """A table says what is fast there, not what is right."""
    device = Device("tpu", "TPU v6 lite")
    write(tmp_path, implementations={"op()": "pallas"}, name="tpu-v6-lite")
    slow = dispatch.Implementation("pallas", lambda: "pallas", not_auto=lambda: "it failed its check")
    missing = dispatch.Implementation.missing("triton", "none")
    others = [dispatch.Implementation(name, lambda name=name: name) for name in ("xla", "reference")]
    with target_device(*device):
        assert dispatch.Operation("op", (slow, missing, *others)).select("auto")() == "xla"


def test_committed_tables_name_choices_that_exist():
    for path in (tuning.Path(tuning.__file__).parent / "tuned").glob("*.json"):
        content = json.loads(path.read_text("utf-8"))
        assert content["versions"]["jax"] and path.stem == tuning.table_path(Device("", content["device"])).stem
        for key, row in content["block_sizes"].items():
            module, _, function = key.partition("(")[0].rpartition(".")
            found = [f"dantinox.kernels.ops.{module}{end}" for end in ("", ".block_sizes")]
            modules = [importlib.import_module(name) for name in found if importlib.util.find_spec(name)]
            assert any(hasattr(candidate, function) for candidate in modules), key
            assert row["spread"][1] < 1 and row["choice"] != row["heuristic"]
        assert {row["fastest"] for row in content["implementations"].values()} <= {"xla", "pallas", "triton"}
