"""Checkpoints: which are kept, which damage is reported, and what a full disk or a kill leaves behind."""

import dataclasses
import pickle
import random
import shutil
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dantinox.checkpoint import manifest
from dantinox.checkpoint.manager import Checkpoints
from dantinox.checkpoint.manifest import CorruptCheckpointError
from dantinox.checkpoint.train_state import TrainState
from dantinox.config import ModelConfig
from dantinox.model import params

ROOT = Path(__file__).parents[3]
NEW_NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]


def state(seed: int, size: int = 64) -> TrainState:
    """A train state of random numbers, with an average and Adam's moments."""
    draw = np.random.default_rng(seed)
    params = {name: jnp.asarray(draw.standard_normal((size, 3)), jnp.float32) for name in ("a.b", "c")}
    moments = jax.tree.map(lambda x: jnp.asarray(draw.integers(0, 2**30, x.shape), x.dtype), optax.adam(1).init(params))
    return TrainState(params, moments, jax.tree.map(lambda x: x * 2, params))


def shapes(current: TrainState) -> TrainState:
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), current)


def same(a: TrainState, b: TrainState) -> bool:
    return jax.tree.all(jax.tree.map(lambda x, y: x.dtype == y.dtype and bool((x == y).all()), a, b))


def saved(run: Path, *steps: int, keep: int = 3, **about) -> Checkpoints:
    checkpoints = Checkpoints(run, keep)
    for step in steps:
        checkpoints.save(step, state(step), about)
    checkpoints.close()
    return checkpoints


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A run with checkpoints 1 and 2."""
    run = tmp_path_factory.mktemp("run")
    saved(run, 1, 2)
    return run


def test_checkpoint_round_trip_is_bit_exact(two):
    checkpoints = Checkpoints(two)
    assert checkpoints.latest_valid()[::2] == (2, [])
    assert same(checkpoints.restore(2, shapes(state(0))), state(2))
    weights = checkpoints.restore_weights(1, shapes(state(0)).params, averaged=True)
    assert all((weights[name] == value).all() for name, value in state(1).ema.items())


def test_stored_parameter_names_are_the_earliest_ones():
    """Attributes of the modules may be renamed; a checkpoint written before must keep its tree."""
    config = ModelConfig(n_layers=1, n_experts=2, shared_expert=True, qk_norm=True, attn_gate="head")
    config = dataclasses.replace(config, tie_embeddings=False, pos_encoding="learned")
    gpt_oss = dataclasses.replace(config, attn_bias=True, attn_sinks=True, moe_bias=True)
    added = [f"attention.{name}" for name in ("sinks", "q_bias", "k_bias", "v_bias", "o_bias")]
    added += [f"mlp.{name}" for name in ("router_bias", "gate_bias", "up_bias", "down_bias")]
    assert params.param_axes(gpt_oss).keys() - params.param_axes(config).keys() == {f"blocks.0.{x}" for x in added}
    attention = [f"blocks.0.attention.{name}" for name in ("gate", "k", "k_scale", "o", "q", "q_scale", "v")]
    mlp = [
        f"blocks.0.mlp.{name}" for name in ("down", "gate", "router", "shared.down", "shared.gate", "shared.up", "up")
    ]
    names = [*attention, "blocks.0.attention_norm", *mlp, "blocks.0.mlp_norm", "embedding", "head", "norm", "position"]
    model_def, shapes = params.abstract_params(config)
    assert sorted(shapes) == sorted(params.param_axes(config)) == sorted(names)
    model = model_def.merge({name: np.full(x.shape, names.index(name)) for name, x in shapes.items()})
    for value, name in ((model.token_embedding, "embedding"), (model.lm_head, "head"), (model.final_norm, "norm")):
        assert (value[...] == names.index(name)).all()
    assert (model.pos_embedding[...] == names.index("position")).all()
    q_norm, k_norm = model.blocks[0].attention.q_norm, model.blocks[0].attention.k_norm
    assert (q_norm[...] == names.index(attention[5])).all() and (k_norm[...] == names.index(attention[2])).all()


def test_newest_and_best_checkpoints_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    losses = {1: (3.0, True), 2: (1.0, False), 3: (2.0, True), 4: (None, True), 5: (float("nan"), True)}
    for step, (loss, due) in losses.items():
        checkpoints.save(step, state(step), {"val_loss": loss}, due)
    checkpoints.close()
    assert checkpoints.steps() == [2, 4, 5] and checkpoints.best() == 2
    checkpoints.save(6, state(6), {"val_loss": 0.5}, due=False)
    checkpoints.close()
    assert checkpoints.steps() == [4, 5, 6]  # one that was kept for its loss alone goes with the next better one
    checkpoints.save(7, state(7), {"val_loss": 0.7})
    checkpoints.close()
    assert checkpoints.steps() == [5, 6, 7] and checkpoints.best() == 6


def test_saving_is_asynchronous(tmp_path, monkeypatch):
    """Of a state whose memory is given away in the meantime, as training steps do."""
    checkpoints, current = Checkpoints(tmp_path), state(1)
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0, tree), donate_argnums=0)
    hashing, going_on = manifest._sha256, []
    monkeypatch.setattr(manifest, "_sha256", lambda path: (going_on.append(checkpoints._thread), hashing(path))[1])
    checkpoints.save(1, current, {})
    assert checkpoints.steps() == []  # it gets its name last
    step(current)
    checkpoints.wait()
    assert checkpoints.steps() == [1] and all(going_on)
    assert same(checkpoints.restore(1, shapes(state(0))), state(1))


def damage(path: Path, kind: str, seed: int) -> None:
    draw, content = random.Random(seed), path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "shorter":
        path.write_bytes(content[: draw.randrange(len(content))])
    else:
        place, bit = draw.randrange(len(content)), draw.randrange(8)
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])


@pytest.mark.parametrize("kind", ["flipped", "shorter", "missing"])
def test_corrupt_file_is_reported_and_previous_checkpoint_is_used(kind, two, tmp_path):
    names = [path.relative_to(two / "checkpoints" / "2") for path in (two / "checkpoints" / "2").rglob("*")]
    names = [name for name in names if (two / "checkpoints" / "2" / name).is_file()]
    assert len(names) > 8
    for i, name in enumerate(names):
        run = shutil.copytree(two, tmp_path / str(i))
        damage(run / "checkpoints" / "2" / name, kind, seed=i)
        checkpoints = Checkpoints(run)
        step, _, (wrong,) = checkpoints.latest_valid()
        assert step == 1
        assert "checkpoints/2 is damaged: " in str(wrong) and str(name) in str(wrong) and "\n" not in str(wrong)
    assert same(checkpoints.restore(1, shapes(state(0))), state(1))
    damage(run / "checkpoints" / "1" / "state" / "_METADATA", kind, seed=i)
    with pytest.raises(
        CorruptCheckpointError, match=r"checkpoints/2 is damaged: .*; .*checkpoints/1 is damaged: .* no other"
    ):
        checkpoints.latest_valid()


def test_inconsistent_manifest_is_reported_as_corrupt(two, tmp_path):
    run = shutil.copytree(two, tmp_path / "run")
    path = run / "checkpoints" / "2" / "manifest.json"
    text = path.read_text()
    assert '"step": 2,' in text
    path.write_text(text.replace('"step": 2,', '"step": 3,'))
    assert str(Checkpoints(run).latest_valid()[2][0]).endswith("manifest.json was modified")


def test_kill_while_saving_leaves_only_removable_files(two, tmp_path):
    """Fault 7: files are half written."""
    run = shutil.copytree(two, tmp_path / "run")
    folder = run / "checkpoints"
    (folder / "2").rename(folder / ".partial-2")  # what a kill leaves before the rename
    checkpoints = Checkpoints(run)
    assert checkpoints.latest_valid()[0] == 1
    checkpoints.save(2, state(2), {})
    checkpoints.close()
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]


def test_missing_checkpoint_raises_with_a_message(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no checkpoint yet"):
        Checkpoints(tmp_path).latest_valid()
    assert list(tmp_path.iterdir()) == []


def test_restore_never_unpickles(two, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a file of a run was unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    checkpoints = Checkpoints(two)
    assert same(checkpoints.restore(checkpoints.latest_valid()[0], shapes(state(0))), state(2))


FULL = """
    import errno, sys
    sys.path.insert(0, "tests/dantinox/checkpoint")
    from test_checkpoint import *
    from dantinox.checkpoint import manager

    run = Path(sys.argv[1])
    first, large = state(1, 50_000), state(2, 50_000)
    checkpoints = Checkpoints(run)
    checkpoints.save(1, first, {})
    checkpoints.wait()
    for foreseen in (True, False, False, False, False):  # which write fails first, and how late, differs
        if not foreseen:
            manager._max_bytes = lambda state: 0
        try:
            checkpoints.save(2, large, {})
            checkpoints.wait()
        except manager.CheckpointWriteError as error:
            print(error)
        else:
            raise AssertionError("there was room")
        assert [path.name for path in (run / "checkpoints").iterdir()] == ["1"]
    checkpoints.close()
    assert Checkpoints(run).latest_valid()[::2] == (1, [])
    assert same(checkpoints.restore(1, shapes(first)), first)
"""


def test_full_disk_leaves_the_previous_checkpoint_intact(tmp_path):
    mount = f"mount -t tmpfs -o size=8m none {tmp_path}"
    if shutil.which("unshare") is None or subprocess.run([*NEW_NAMESPACE, "sh", "-c", mount]).returncode:
        pytest.skip("this system lets no user mount a small disk")
    code = textwrap.dedent(FULL)
    command = [*NEW_NAMESPACE, "sh", "-c", mount + ' && exec "$0" -c "$1" "$2"', sys.executable, code, tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for noise in ("orbax", "Traceback", "OCDBT"):  # above our line
        assert noise not in done.stderr, done.stderr[:3000]
    lines = done.stdout.splitlines()
    assert len(lines) == 5
    for line in lines:
        assert line.startswith("step 2 could not be saved in ") and "No space left on device" in line
        assert line.endswith("; the checkpoint of step 1 is intact")
    assert ["MB needed" in line for line in lines] == [True, False, False, False, False]


def test_log_filters_drop_only_noise(two, monkeypatch, capsys):
    Checkpoints(two)
    heard = []
    monkeypatch.setattr(sys.unraisablehook, "previous_hook", heard.append)

    def told(error, of):
        return types.SimpleNamespace(exc_value=error, object=of)

    closed = RuntimeError("Event loop is closed")
    others = [told(closed, "a finalizer"), told(RuntimeError("another"), None), told(OSError("disk"), None)]
    for each in [told(closed, None), *others]:
        sys.unraisablehook(each)
    assert heard == others
    Checkpoints(two)
    assert sys.unraisablehook.previous_hook == heard.append
