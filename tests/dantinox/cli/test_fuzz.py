"""Random settings: each either trains two finite steps or exits with one line and status 2."""

import collections
import contextlib
import io
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dantinox.checkpoint.train_state import TrainState
from dantinox.cli import train
from dantinox.config import Config

COUNT, GROUPS = 1000, 20
# One layer and small widths, most of them fit for each other; each setting is given now and then.
VALUES = {
    "dim": "8 16 24 32 12 7 0 x",
    "n-layers": "1 1 1 2 3 0 1.5",
    "n-heads": "1 2 4 8 3 0 -1",
    "n-kv-heads": "1 2 4 3 0",
    "head-dim": "None 1 2 4 6 5 0 -4",
    "max-context": "16 17 32 64 5 0",
    "window": "None 1 2 5 16 1000 0 -3 2.5",
    "window-pattern": "S L SL SSSL LS X sl",
    "attn-gate": "none elementwise head yes",
    "qk-norm": "True False maybe",
    "attn-bias": "True False",
    "qk-norm-all-heads": "True False",
    "norms": "pre post both none",
    "attn-scale": "None 0.25 1 0 -1 nan",
    "norm-offset": "True False",
    "scale-embeddings": "True False",
    "n-dense-layers": "0 0 1 2 3 -1",
    "dense-ratio": "None 1 2.5 0.01 0",
    "shared-ratio": "None 1 2.5 0.01 -2",
    "router": "softmax sigmoid tanh",
    "router-renormalise": "True False",
    "router-scale": "1 2.5 0 -1 nan",
    "selection-bias": "True False",
    "selection-bias-rate": "0.001 0 1 -1 inf",
    "rope-pattern": "R RN N NNR X r",
    "rope-theta-windowed": "None 10000 100 1.0 0 nan",
    "attn-out-bias": "True False maybe",
    "attn-softcap": "None 1 30 0.01 0 -1 nan",
    "logit-softcap": "None 1 30 0.01 1e-30 0 inf",
    "pos-encoding": "rope rope learned none alibi",
    "rope-theta": "10000 100 1.0 0.5 1e-3 1e30 0 -5 nan",
    "rope-scaling": "none none linear ntk yarn llama3 dynamic",
    "rope-factor": "1.0 2 7.5 1000 0.5 0 -2 inf",
    "rope-original-context": "None 1 4 16 1000000 0",
    "mlp": "swiglu swiglu gelu geglu relu",
    "mlp-ratio": "1 2 3.7 0.3 0.01 0 -1",
    "n-experts": "0 0 1 2 3 8 -1",
    "experts-per-token": "1 2 3 0 9",
    "shared-expert": "True False",
    "router-aux-loss-coef": "0 0.01 1 100 -1 nan",
    "router-z-loss-coef": "0 0.001 1 -1",
    "tie-embeddings": "True False",
    "dropout": "0 0.1 0.5 0.99 1 -0.1",
    "norm-eps": "1e-6 1e-3 1 1e-30 0",
    "dtype": "auto float32 bfloat16 float16",
    "remat": "none block dots all",
    "attn": "auto xla reference triton flash",
    "moe": "auto xla reference triton",
    "decode": "auto xla reference triton",
    "loss": "auto xla reference triton",
    "kv-cache-dtype": "auto int8 fp8 int4",
    "tokenizer": "char bpe word",
    "bpe-vocab-size": "300 320 299 0",
    "val-fraction": "0.1 0.5 0.9 0 1 0.0001",
    "lr": "3e-4 1 1e-10 0 -1 nan",
    "schedule": "cosine wsd constant linear",
    "warmup-ratio": "0 0.05 0.5 0.99 1 -0.1",
    "min-lr-ratio": "0 0.1 1 2 -1",
    "weight-decay": "0 0.1 10 -1",
    "beta1": "0 0.9 0.999 1 -1",
    "beta2": "0 0.95 0.999 1",
    "grad-clip": "0 1 1e-6 -1",
    "steps": "2 2 3 100 0 x",
    "batch-size": "1 2 3 4 6 0 -2",
    "seq-len": "1 2 8 16 17 33 0",
    "grad-accum": "1 2 3 0",
    "seed": "0 1 4294967295 4294967296 -1",
    "expert-exchange": "padded ragged dense",
    "mesh": "data=1 fsdp=1 data=1,fsdp=1 data=2 tensor=1 slices=2 context=3 model=1 data=0 ,",
    "eval-every": "0 1 -1",
    "eval-batches": "1 2 0",
    "sample-tokens": "0 1 5 -1",
    "max-checkpoints": "1 3 0",
    "log-every": "1 10 0",
    "profile-steps": "1:1 1:2 2:1 0:1 a:b 3",
}
BASE = [
    "--n-layers",
    "1",
    "--dim",
    "16",
    "--n-heads",
    "2",
    "--n-kv-heads",
    "1",
    "--max-context",
    "32",
    "--seq-len",
    "16",
]
BASE += ["--batch-size", "2", "--eval-batches", "1", "--steps", "2"]


def flags(seed: int) -> list[str]:
    """Draw a few settings; most values are from the front of their list, where the valid ones are."""
    rng = random.Random(seed)
    out = list(BASE)
    for name in rng.sample(sorted(VALUES), rng.choice([2, 3, 5, 8])):
        values = VALUES[name].split()
        out += [f"--{name}={values[int(len(values) * rng.random() ** 2)]}"]
    return out


def two_steps(config: Config, resume: bool = False) -> str:
    """Replace `train` by the checks that need more than the settings; writes no files."""
    trainer = train.Trainer(config)
    rng = np.random.default_rng(config.train.seed)
    draw = lambda x: jnp.asarray((x.ndim == 1) + 0.02 * rng.normal(size=x.shape), x.dtype)  # compiles nothing
    params = jax.tree.map(draw, trainer.shapes.params)
    current = TrainState(params, trainer.optimizer.init(params))
    if trainer.shardings is not None:
        current = jax.device_put(current, trainer.shardings)
    for step in range(min(2, config.train.steps)):
        current, parts = trainer.step(current, *trainer.batch(step), jnp.int32(step))
        assert np.isfinite([float(value) for value in parts.values()]).all(), parts
    assert np.isfinite(trainer.validation_loss(current.params))
    assert all(bool(jnp.isfinite(x).all()) for x in current.params.values())
    if 0 < config.train.sample_tokens < 200:
        trainer.sample_text(current.params, config.train.sample_tokens)
    return "runs/x"


def outcome(words: list[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """ "trained" or "refused"; anything else is an AssertionError that shows the command line."""
    said, out = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(out):
            code = train.main(words)
    except SystemExit as stop:
        code = stop.code
    except BaseException as error:
        raise AssertionError(f"{type(error).__name__}: {error!s:.300}\n{' '.join(words)}") from error
    if code == 0:
        return "trained"
    text = said.getvalue()
    assert code == 2 and text.startswith("dantinox-train: error: ") and text.count("\n") == 1, (code, text, words)
    return "refused"


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DANTINOX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("Nel mezzo del cammin di nostra vita mi ritrovai per una selva oscura. é\n" * 40)
    return ["--data", "text.txt"]


@pytest.mark.slow
@pytest.mark.parametrize("group", range(GROUPS))
def test_random_settings_train_or_raise_one_line(group, text, monkeypatch):
    monkeypatch.setattr(train, "train", two_steps)
    found = collections.Counter()
    with disable_optimizations():
        for seed in range(group, COUNT, GROUPS):
            found[outcome([*text, *flags(seed)], monkeypatch)] += 1
            if found.total() % 10 == 0:
                jax.clear_caches()
    assert found.total() == COUNT // GROUPS and min(found["trained"], found["refused"]) >= 5, found


@contextlib.contextmanager
def disable_optimizations():
    """Most of the time is LLVM's, and each program runs twice."""
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)


def test_random_setting_values_print_no_traceback(text, monkeypatch):
    """One setting at a time, and nothing compiled: what the settings alone can tell."""
    monkeypatch.setattr(train, "train", lambda config, resume: "runs/x")
    found = collections.Counter()
    for name in sorted(VALUES)[::6]:
        for value in VALUES[name].split():
            found[outcome([*text, *BASE, f"--{name}={value}"], monkeypatch)] += 1
    assert min(found["trained"], found["refused"]) >= 5
