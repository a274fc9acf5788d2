"""Implementations from other packages: registered at run time, or named by an entry point."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dantinox import ModelConfig, kernels
from dantinox.kernels import registry
from dantinox.kernels.ops.attention import xla as attention_xla
from dantinox.kernels.ops.decode_attention import xla as decode_xla
from dantinox.kernels.ops.grouped_matmul import xla as grouped_matmul_xla
from dantinox.kernels.ops.moe import xla as moe_xla
from tests.helpers import tolerance

ROOT = Path(__file__).parents[2]
E, K, M, F = 3, 2, 8, 16
RNG = np.random.default_rng(0)
IDS = jnp.array([[0, 2], [-1, 1], [2, 2], [3, 7], [0, 0], [1, -5]], jnp.int32)


def normal(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


Q, KV = normal(1, 6, 4, 8), normal(1, 6, 2, 8)
CACHE = kernels.KVCache.zeros(1, 2, 8, 8, jnp.float32)
MOE = {
    "x": normal(len(IDS), M),
    "w_gate": normal(E, M, F) / 3,
    "w_up": normal(E, M, F) / 3,
    "w_down": normal(E, F, M) / 4,
    "expert_weights": jnp.asarray(RNG.random(IDS.shape), jnp.float32),
}
CALLS = {
    "attention": lambda name: kernels.attention(Q, KV, KV, window=3, implementation=name),
    "grouped_matmul": lambda name: kernels.grouped_matmul(
        MOE["x"], MOE["w_up"], jnp.array([2, 0, 3]), implementation=name
    ),
    "moe_mlp": lambda name: kernels.moe_mlp(**MOE, expert_ids=IDS, implementation=name),
    "decode_attention": lambda name: kernels.decode_attention(Q[:, 0], KV[:, 0], KV[:, 0], CACHE, implementation=name)[
        0
    ],
}
FUNCTIONS = {
    "attention": attention_xla.attention,
    "grouped_matmul": grouped_matmul_xla.grouped_matmul,
    "moe_mlp": moe_xla.moe_mlp,
    "decode_attention": decode_xla.decode_attention,
}


def careless_grouped_matmul(x, w, group_sizes):
    """A grouped matmul that leaves NaN in the rows past the last group, and sums over all rows in w's gradient."""
    group = jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(x.shape[0]), side="right")
    y = jnp.einsum("nm,nmf->nf", x, w[jnp.minimum(group, w.shape[0] - 1)])
    return y + jnp.where(group[:, None] < w.shape[0], 0, jnp.nan)


@pytest.fixture(autouse=True)
def no_registrations(monkeypatch):
    """Registrations of one test are none of the next one's, and the machine's packages have no entry points."""
    monkeypatch.setattr(registry, "_registered", {})
    monkeypatch.setattr(registry, "_entry_points", lambda op, built_in: {})


# --- register ---


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("form", ["function", "path"])
@pytest.mark.sampled(8)
def test_registered_implementation_runs_and_is_listed(op, form):
    before = kernels.implementation_names(op)
    f = FUNCTIONS[op]
    kernels.register(op, "mine", f if form == "function" else f"{f.__module__}:{f.__name__}")
    np.testing.assert_allclose(CALLS[op]("mine"), CALLS[op]("reference"), rtol=1e-5, atol=1e-5)
    assert kernels.implementation_names(op) == (*before, "mine")
    assert kernels.implementations(op)["mine"] is None is kernels.unsupported_reason(op, "mine")
    assert "mine" in tolerance.runnable_implementations(op)
    CALLS[op]("auto")
    assert "mine" not in kernels.IMPLEMENTATION_NAMES


def test_settings_accept_a_registered_name():
    for field, op in (("attn", "attention"), ("moe", "grouped_matmul"), ("decode", "decode_attention")):
        with pytest.raises(ValueError, match=f"{field} is 'mine'; allowed: auto, reference, xla, pallas, triton$"):
            ModelConfig(**{field: "mine"})
        kernels.register(op, "mine", FUNCTIONS[op])
        assert getattr(ModelConfig(**{field: "mine"}), field) == "mine"


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.sampled(8)
def test_second_registration_replaces_the_first_in_compiled_programs_too(op):
    compiled = jax.jit(lambda: CALLS[op]("mine"))
    for factor in (2, 3):
        called = []

        def mine(*args, factor=factor, called=called, **options):
            called.append(factor)
            return jax.tree.map(lambda x: factor * x, FUNCTIONS[op](*args, **options))

        kernels.register(op, "mine", mine)
        for run in (lambda: CALLS[op]("mine"), compiled):
            np.testing.assert_allclose(run(), factor * CALLS[op]("xla"), rtol=1e-5, atol=1e-5)
        assert set(called) == {factor}


def test_callable_that_cannot_be_hashed_runs():
    class Multiply:
        __hash__ = None

        def __call__(self, x, w, group_sizes):
            return grouped_matmul_xla.grouped_matmul(x, w, group_sizes)

    kernels.register("grouped_matmul", "mine", Multiply())
    np.testing.assert_array_equal(CALLS["grouped_matmul"]("mine"), CALLS["grouped_matmul"]("xla"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("softmax", "mine", len),
            "op is 'softmax'; allowed: attention, grouped_matmul, moe_mlp, decode_attention",
        ),
        ((["attention"], "mine", len), "op is ['attention']; allowed: attention"),
        (("attention", "xla", len), "name is 'xla'; allowed: any other than auto, reference, xla, pallas, triton"),
        (("attention", "auto", len), "name is 'auto'; allowed: any other than auto, reference, xla"),
        (("attention", "my kernel", len), "name is 'my kernel'; allowed: a word of letters, digits and _"),
        (("attention", "", len), "name is ''; allowed: a word"),
        (("attention", "None", len), "name is 'None'; allowed: a word"),
        (("attention", 3, len), "name is 3; allowed: a word"),
        (("attention", "mine", 3), "f is 3; allowed: a function, or its path as 'package.module:function'"),
        (("attention", "mine", "mypkg.attn"), "f is 'mypkg.attn'; allowed: a function, or its path"),
    ],
)
def test_bad_arguments_raise_one_line(arguments, message):
    with pytest.raises(ValueError) as error:
        kernels.register(*arguments)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
    assert not registry._registered


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("no_such_package.attn:attention", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("json:attention", "json has no 'attention'"),
        ("json:__name__", "json:__name__ is not a function"),
    ],
)
def test_path_that_cannot_be_imported_is_a_reason(path, reason):
    kernels.register("attention", "mine", path)
    assert reason in kernels.implementations("attention")["mine"]
    with pytest.raises(NotImplementedError) as refusal:
        CALLS["attention"]("mine")
    assert str(refusal.value).startswith("attention: implementation='mine' cannot run here: ")
    assert reason in str(refusal.value)


# --- a grouped matmul as an implementation of moe_mlp ---


def value_and_gradients(implementation, moe=MOE):
    def loss(moe):
        return jnp.sum(jnp.sin(kernels.moe_mlp(**moe, expert_ids=IDS, implementation=implementation)))

    return jax.jit(jax.value_and_grad(loss))(moe)


def assert_equal_to_reference(implementation):
    actual, expected = value_and_gradients(implementation), value_and_gradients("reference")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), actual, expected)


@pytest.mark.parametrize("f", [grouped_matmul_xla.grouped_matmul, careless_grouped_matmul])
def test_grouped_matmul_is_lifted_to_the_experts_with_gradients(f):
    kernels.register("grouped_matmul", "mine", f)
    assert kernels.implementations("moe_mlp")["mine"] is None
    assert_equal_to_reference("mine")
    poisoned = MOE | {"x": MOE["x"].at[3].set(jnp.nan)}  # no expert has this token
    jax.tree.map(np.testing.assert_array_equal, value_and_gradients("mine", poisoned), value_and_gradients("mine"))


def test_own_experts_come_before_the_lifted_ones():
    kernels.register("grouped_matmul", "mine", careless_grouped_matmul)
    run = jax.jit(lambda: CALLS["moe_mlp"]("mine"))
    run()
    kernels.register("moe_mlp", "mine", lambda x, *_: jnp.full_like(x, 7))
    np.testing.assert_array_equal(run(), jnp.full_like(MOE["x"], 7))


@pytest.mark.slow
def test_pieces_are_replaced_one_by_one():
    calls = []

    def noted(name, f):
        def piece(*args):
            calls.append(name)
            return f(*args)

        return piece

    def swiglu(gate, up):
        return jax.nn.silu(gate) * up

    def multiply(*args):
        return kernels.grouped_matmul(*args, implementation="xla")

    def up_proj(rows, w_gate, w_up, sizes):
        return swiglu(multiply(rows, w_gate, sizes), multiply(rows, w_up, sizes))

    def permute(x, routing):
        return x[routing.permutation // IDS.shape[1]]

    def combine(y, weights, routing):
        rows = y[routing.inverse_permutation].reshape(*weights.shape, -1)
        return jnp.einsum("nkm,nk->nm", rows, weights)

    pieces = {"permute": permute, "up_proj": up_proj, "swiglu": swiglu, "combine": combine}
    for name, piece in pieces.items():
        kernels.register("moe_mlp", "mine", kernels.compose_moe_mlp(multiply, **{name: noted(name, piece)}))
        assert_equal_to_reference("mine")
        assert set(calls) == {name}
        calls.clear()
    with pytest.raises(ValueError, match="up_proj and swiglu are both given"):
        kernels.compose_moe_mlp(multiply, up_proj=up_proj, swiglu=swiglu)
    with pytest.raises(ValueError, match="combine is 3; allowed: a function or None"):
        kernels.compose_moe_mlp(multiply, combine=3)
    with pytest.raises(ValueError, match="grouped_matmul is 'xla'; allowed: a function"):
        kernels.compose_moe_mlp("xla")


# --- entry points ---

KERNELS = """
import jax
import jax.numpy as jnp
from dantinox.kernels.ops.attention import xla
from dantinox.kernels.ops.grouped_matmul import xla as gmm

ONE = jnp.ones(())  # an array of the module: its first import may be traced
DEVICE = jax.config.jax_default_device

def attention(q, k, v, **options):
    return ONE * xla.attention(q, k, v, **options)

def grouped_matmul(x, w, group_sizes):
    return gmm.grouped_matmul(x, w, group_sizes)
"""
ENTRY_POINTS = """
[dantinox.kernels.attention]
mine = mypkg.fine:attention
broken = mypkg.broken:attention
quits = mypkg.quits:attention
xla = mypkg.fine:attention
[dantinox.kernels.grouped_matmul]
mine = mypkg.fine:grouped_matmul
[dantinox.kernels.decode_attention]
absent = mypkg.nowhere:decode
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder of packages with one that has kernels."""
    folder = tmp_path_factory.mktemp("site")
    for name, text in {
        "mypkg/__init__.py": "",
        "mypkg/fine.py": KERNELS,
        "mypkg/broken.py": "\n\ndef attention(:\n",
        "mypkg/quits.py": "raise SystemExit(3)",
        "mypkg-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: mypkg\nVersion: 1.0\n",
        "mypkg-1.0.dist-info/entry_points.txt": ENTRY_POINTS,
    }.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


def python(site, folder, *words):
    path = os.pathsep.join((str(ROOT), str(site)))
    return subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=600,
    )


PROGRAM = """
import sys, jax, jax.numpy as jnp
from dantinox import kernels
names = kernels.implementation_names("attention")
assert names == ("auto", "reference", "xla", "pallas", "triton", "mine", "broken", "quits"), names
assert not any(name.startswith("mypkg") for name in sys.modules), "imported early"
x = jnp.ones((1, 4, 1, 8))
for name in ("auto", "xla"):
    kernels.attention(x, x, x, implementation=name)
assert not any(name.startswith("mypkg") for name in sys.modules), "imported by another name"
for _ in range(2):
    with jax.default_device(jax.devices()[0]):  # may be one that only compiles
        assert (jax.jit(lambda x: kernels.attention(x, x, x, implementation="mine"))(x) == 1).all()
    jax.clear_caches()
assert sys.modules["mypkg.fine"].DEVICE is None
for name in ("broken", "quits"):
    try:
        kernels.attention(x, x, x, implementation=name)
    except NotImplementedError as error:
        print(error)
found = kernels.implementations("attention")
assert found["mine"] is None and found["broken"] and found["quits"]
assert kernels.implementations("moe_mlp")["mine"] is None
"""


def test_entry_points_are_found_by_name_and_imported_by_use(site, tmp_path):
    done = python(site, tmp_path, "-c", PROGRAM)
    assert done.returncode == 0, done.stderr
    broken, quits = done.stdout.splitlines()
    start = "attention: implementation='broken' cannot run here: mypkg.broken cannot be imported: SyntaxError: "
    assert broken.startswith(start) and "line 3)" in broken
    assert "mypkg.quits cannot be imported: SystemExit: 3" in quits
    (warning,) = done.stderr.splitlines()
    assert warning.startswith("entry point xla = mypkg.fine:attention of dantinox.kernels.attention is ignored: ")


TINY = "--data text.txt --tokenizer char --steps 2 --batch-size 2 --seq-len 32 --n-layers 1 --dim 32 --n-heads 2"
TINY += " --n-kv-heads 1 --sample-tokens 4 --eval-batches 1 --n-experts 4"


@pytest.mark.slow
def test_programs_take_names_of_entry_points(site, tmp_path):
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question. " * 200)

    def train(run, *flags):
        return python(site, tmp_path, "-m", "dantinox.train", "--run", run, *TINY.split(), *flags)

    losses = {}
    for run, flags in (("mine", ("--attn", "mine", "--moe", "mine")), ("xla", ("--attn", "xla", "--moe", "xla"))):
        done = train(run, *flags)
        assert done.returncode == 0, done.stderr
        log = (tmp_path / "runs" / run / "metrics.jsonl").read_text().splitlines()
        losses[run] = [json.loads(line)["loss"] for line in log]
    assert losses["mine"] == pytest.approx(losses["xla"], abs=1e-5)
    for flag, name in (("--attn", "broken"), ("--decode", "absent")):
        done = train("other", flag, name)
        assert done.returncode == 2 and f"implementation='{name}'" in done.stderr
        assert "Traceback" not in done.stderr and "cannot be imported" in done.stderr.splitlines()[-1]
    done = python(site, tmp_path, "-m", "dantinox.generate", "runs/mine", "to", "--decode", "absent")
    assert done.returncode == 2 and "mypkg.nowhere cannot be imported" in done.stderr.splitlines()[-1]
    done = python(site, tmp_path, "-m", "dantinox.evaluate", "runs/xla", "text.txt", "--attn", "mine", "--moe", "mine")
    assert done.returncode == 0, done.stderr
    report = " ".join(python(site, tmp_path, "-m", "dantinox.doctor").stdout.split())
    assert "attention mine can run" in report and "moe_mlp mine can run" in report
    assert "attention broken no: mypkg.broken cannot be imported: SyntaxError" in report
