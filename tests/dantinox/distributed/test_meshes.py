"""Training on meshes of eight simulated devices gives the losses and gradients of one device."""

import json
from pathlib import Path

import jax
import pytest
from jax.sharding import AbstractMesh

from dantinox import ConfigError
from dantinox.config import Config
from dantinox.distributed.inference import inference_mesh
from dantinox.distributed.mesh import AXES, check_expert_exchange, make_mesh, uneven_cuts
from tests.dantinox.distributed.mesh_losses import all_meshes
from tests.helpers.simulated_devices import run_with_devices

HERE = Path(__file__).parent
EXPERTS = {"n_experts": 8, "mlp_ratio": 1.0}
EVERYTHING = {
    "n_experts": 8,
    "mlp_ratio": 1.0,
    "shared_expert": True,
    "moe_bias": True,
    "attn_bias": True,
    "attn_sinks": True,
    "qk_norm": True,
    "attn_gate": "elementwise",
    "mlp": "swiglu_clamped",
    "tie_embeddings": False,
    "logit_softcap": 5.0,
    "pos_encoding": "learned",
    "grad_accum": 2,
    "batch_size": 16,
}
AFMOE = {
    "n_layers": 5,
    "window_pattern": "SSL",
    "rope_pattern": "RRN",
    "qk_norm": True,
    "norms": "both",
    "attn_gate": "elementwise",
    "n_experts": 8,
    "mlp_ratio": 1.0,
    "n_dense_layers": 1,
    "dense_ratio": 2.0,
    "shared_expert": True,
    "shared_ratio": 2.0,
    "router": "sigmoid",
    "router_scale": 2.0,
    "selection_bias": True,
    "selection_bias_rate": 0.1,
    "scale_embeddings": True,
}
OLMO = {
    "qk_norm": True,
    "qk_norm_all_heads": True,
    "norms": "post",
    "rope_theta_windowed": 77.0,
    "attn_bias": True,
    "attn_out_bias": False,
}
GEMMA = {
    "qk_norm": True,
    "norms": "both",
    "norm_offset": True,
    "mlp": "geglu",
    "attn_scale": 0.3,
    "scale_embeddings": True,
    "rope_theta_windowed": 77.0,
}
DROPOUT = {"dropout": 0.2, "remat": "block"}


def assert_equal_to_one_device(meshes, settings, devices=8):
    program = str(HERE / "mesh_losses.py")
    output = run_with_devices(program, json.dumps(meshes), json.dumps(settings), devices=devices)
    found = json.loads(output.splitlines()[-1])
    assert found.keys() == set(meshes)
    apart = {mesh: worst for mesh, worst in found.items() if worst[0] >= 1e-6 or worst[1] >= 1e-5}
    assert not apart, apart


def test_mesh_over_four_axes_equals_one_device():
    """Fault 8: a model over several devices gives other numbers than on one."""
    assert_equal_to_one_device(["fsdp=2,expert=2,context=2,tensor=2"], EXPERTS, devices=16)


@pytest.mark.slow
@pytest.mark.parametrize("short", [True, False], ids=["short", "long"])
def test_exchanges_equal_one_device(short):
    """Skewed routings and their rounds, windows across devices, gathered weights, with gradients."""
    run_with_devices(str(HERE / "exchanges.py"), *["--short"] * short, devices=4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{}, {"window": None}, EXPERTS, EVERYTHING, DROPOUT],
    ids=["windowed", "full", "experts", "every setting", "dropout"],
)
def test_every_mesh_equals_one_device(settings):
    meshes = all_meshes(8)
    assert len(meshes) == 35
    if "n_experts" not in settings:  # without experts the axis deals sequences only; a few meshes have it
        meshes = [mesh for mesh in meshes if "expert" not in mesh or mesh == "expert=8"]
    assert_equal_to_one_device(meshes, settings)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [AFMOE, OLMO, GEMMA], ids=["afmoe", "olmo", "gemma"])
def test_open_models_on_meshes_equal_one_device(settings):
    assert_equal_to_one_device(["tensor=2", "fsdp=2", "expert=2", "fsdp=2,tensor=2"], settings, devices=4)


def test_ragged_exchange_is_refused_on_a_cpu():
    mesh = AbstractMesh((2,), ("expert",))
    check_expert_exchange("padded", mesh)
    check_expert_exchange("ragged", AbstractMesh((1,), ("expert",)))
    with pytest.raises(ConfigError, match=r"^expert_exchange is 'ragged'; allowed on CPUs: padded$"):
        check_expert_exchange("ragged", mesh)


@pytest.mark.slow
def test_loop_over_layers_on_meshes_equals_one_device():
    settings = {"loop": True, "n_layers": 4} | EXPERTS
    assert_equal_to_one_device(["data=2,fsdp=4", "expert=2,context=2,tensor=2"], settings)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, EXPERTS], ids=["dense", "experts"])
def test_lora_on_meshes_equals_one_device(settings):
    meshes = ["data=8", "fsdp=4,tensor=2", "expert=2,context=2,tensor=2"]
    assert_equal_to_one_device(meshes, settings | {"lora_rank": 2, "lr": 0.01})


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, EXPERTS], ids=["dense", "experts"])
def test_meshes_with_pallas_kernels_equal_one_device(settings):
    meshes = ["data=8", "fsdp=4,tensor=2", "data=2,context=4", "expert=2,context=2,tensor=2"]
    assert_equal_to_one_device(meshes, settings | {"attn": "pallas", "moe": "pallas", "loss": "pallas"})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("implementations", "meshes", "flags"),
    [
        (["pallas"], ["data=2,tensor=4"], ["--short"]),
        (["xla", "pallas"], ["tensor=2", "data=2,tensor=4"], []),
    ],
    ids=["short", "long"],
)
def test_generation_and_evaluation_on_a_mesh_equal_one_device(implementations, meshes, flags):
    """Greedy, sampled and speculative ids, and losses; a single prompt does not divide over data."""
    program = str(HERE / "generation.py")
    run_with_devices(program, json.dumps(implementations), json.dumps(meshes), *flags)


def test_sizes_that_divide_badly_are_told():
    mesh = jax.sharding.AbstractMesh((1, 4, 1, 2, 2), AXES)
    assert uneven_cuts(mesh, 1024, 1024) == []
    vocabulary, columns = uneven_cuts(mesh, 257, 96)
    assert "vocab_size 257 is not a multiple of tensor=2" in vocabulary
    assert "has 12 of the 96 columns" in columns


def test_mesh_of_inference_has_data_and_tensor_only():
    with pytest.raises(ConfigError, match="with fsdp; allowed in generation and evaluation: data and tensor"):
        inference_mesh("data=2,fsdp=4")


def test_invalid_mesh_raises():
    with pytest.raises(ConfigError, match="needs 4096 devices"):
        make_mesh({"data": 64, "fsdp": 64})
    for mesh in ("data", "data=0", "model=2", "data=x"):
        with pytest.raises(ConfigError, match="with N at least 1 and slices, data, fsdp"):
            Config().replace(mesh=mesh)
    with pytest.raises(ConfigError, match="multiple of the 3 devices"):
        Config().replace(mesh="data=3", batch_size=8)
    with pytest.raises(ConfigError, match="seq_len is 100; it must be a multiple of context"):
        Config().replace(mesh="context=8", seq_len=100)
