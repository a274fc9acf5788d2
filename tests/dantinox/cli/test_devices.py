"""Every preset on every card: `--dry-run` succeeds, or one line names the flag that runs."""

import importlib.util
import re
import sys
import types

import jax
import jax.numpy as jnp
import pytest

from dantinox.cli import evaluate, generate, train
from dantinox.config import presets
from dantinox.kernels.dispatch import target_device
from dantinox.kernels.ops.attention import xla as attention_xla
from dantinox.kernels.ops.decode_attention import xla as decode_attention_xla
from dantinox.kernels.ops.grouped_matmul import xla as grouped_matmul_xla
from dantinox.kernels.ops.linear_cross_entropy import xla as linear_cross_entropy_xla
from dantinox.kernels.ops.moe import xla as moe_xla
from dantinox.metrics import logger as metrics_log
from dantinox.metrics import model_summary

DEVICES = (
    "NVIDIA H100 80GB HBM3",
    "NVIDIA B200",
    "NVIDIA A100-SXM4-80GB",
    "NVIDIA GeForce RTX 4090",
    "NVIDIA GeForce RTX 5090",
)
SIZES = "--n-layers 1 --tokenizer char --data text.txt --batch-size 1 --grad-accum 1 --eval-batches 1".split()
# The default settings are those of `Config()`: a model of head dim 32 without a gate.
DEFAULTS = "--dim 512 --n-heads 16 --n-kv-heads 4 --window None --attn-gate none --mlp-ratio 4 --max-context 512"
MODELS = {name: ["--preset", name] for name in presets()} | {"defaults": DEFAULTS.split(), "no flag": []}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("cards")
    (path / "text.txt").write_text("".join(f"{i} Nel mezzo del cammin di nostra vita\n" for i in range(1500)))
    return path


@pytest.fixture(autouse=True)
def stand_ins(folder, monkeypatch):
    """jax-triton is installed; its kernels are those of XLA, and a step is traced instead of compiled."""
    find_spec = importlib.util.find_spec
    installed = importlib.util.find_spec("importlib")
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, *package: installed if name == "jax_triton" else find_spec(name, *package),
    )
    for module, name, function in (
        ("attention.triton.vjp", "attention", attention_xla.attention),
        ("grouped_matmul.triton.vjp", "grouped_matmul", grouped_matmul_xla.grouped_matmul),
        ("moe.triton.vjp", "moe_mlp", moe_xla.moe_mlp),
        ("decode_attention.triton.decode_step", "decode_attention", decode_attention_xla.decode_attention),
        ("linear_cross_entropy.triton.vjp", "linear_cross_entropy", linear_cross_entropy_xla.linear_cross_entropy),
    ):
        stand_in = types.ModuleType(module)
        setattr(stand_in, name, function)
        monkeypatch.setitem(sys.modules, f"dantinox.kernels.ops.{module}", stand_in)
    monkeypatch.setattr(model_summary, "compiled_memory", trace)
    monkeypatch.setenv("DANTINOX_CACHE", str(folder / "cache"))
    monkeypatch.chdir(folder)


def trace(step, state, config):
    tokens = jax.ShapeDtypeStruct((1, 1, config.train.seq_len), jnp.int32)
    jax.eval_shape(step, state, tokens, tokens, jax.ShapeDtypeStruct((), jnp.int32))
    return "traced"


def dry_run(kind, words, capsys):
    """Run the program for a device; returns (exit code, output, errors)."""
    capsys.readouterr()
    try:
        with target_device("gpu", kind):
            code = train.main([*words, *SIZES, "--dry-run"])
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def check(kind, words, capsys):
    """Check that it runs, or that the flag that the refusal names does."""
    code, out, line = dry_run(kind, words, capsys)
    if code == 0:
        assert out.endswith("traced\n") and line == ""
        return True
    assert code == 2 and line.count("\n") == 1 and "implementation=" not in line
    flag, value, reason, replacement = re.fullmatch(
        r"dantinox-train: error: \w+: (--\w+) (\w+) cannot run here: (.*); (--\w+ \w+) runs here\n", line
    ).groups()
    assert [flag, value] == words[-2:] and reason and replacement.split()[0] == flag
    assert dry_run(kind, [*words[:-2], *replacement.split()], capsys)[0] == 0
    return False


@pytest.mark.parametrize("attn", ["auto", "triton", "pallas"])
@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.sampled(48)
def test_preset_runs_on_a_card_or_the_refusal_names_what_does(model, kind, attn, capsys):
    assert check(kind, [*MODELS[model], "--attn", attn], capsys) == (attn != "pallas" or "H100" in kind)


@pytest.mark.parametrize("flag", ["--moe pallas", "--moe triton", "--decode pallas", "--decode triton"])
@pytest.mark.parametrize("kind", ["NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB"])
@pytest.mark.sampled(6)
def test_experts_and_decoding_run_or_the_refusal_names_what_does(kind, flag, capsys):
    check(kind, ["--preset", "nano-moe", *flag.split()], capsys)


def test_float32_on_hopper_is_refused_with_a_flag_that_runs(capsys):
    assert not check("NVIDIA H100 80GB HBM3", ["--dtype", "float32", "--attn", "pallas"], capsys)


def test_card_without_triton_is_told_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, line = dry_run("NVIDIA L4", ["--attn", "triton"], capsys)
    assert code == 2 and "EXTRAS=triton brings it; --attn xla runs here" in line


@pytest.mark.slow
def test_run_of_another_card_generates_and_is_scored_with_the_flag_that_the_refusal_names(folder, monkeypatch, capsys):
    monkeypatch.setattr(metrics_log, "matmul_rate", lambda dtype: 1e9)
    monkeypatch.setattr(metrics_log, "plot_loss", lambda *_: None)
    assert train.main([*SIZES, "--steps", "1", "--sample-tokens", "0", "--seq-len", "32"]) == 0
    config = folder / "runs" / "nano" / "config.yaml"
    config.write_text(re.sub("(attn|decode): auto", r"\1: triton", config.read_text()))
    score, write = (evaluate.main, ["--data", "text.txt"]), (generate.main, ["--max-new-tokens", "1", "--prompt", "N"])
    for main, words, flags in ((*score, ["--attn"]), (*write, ["--attn", "--decode"])):
        for flag in flags:
            with pytest.raises(SystemExit):
                main(["nano", *words])
            line = capsys.readouterr().err
            value = re.search(rf": {flag} triton cannot run here: .*; {flag} (\w+) runs here\n$", line)[1]
            words = [*words, flag, value]
        assert main(["nano", *words]) == 0
