"""Programs on folders of weights in the format of Hugging Face: text out, scores, export, continued training."""

import importlib
import json
import shutil
import subprocess
import sys

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy as safetensors

import dantinox
from dantinox.checkpoint.manager import Checkpoints
from dantinox.cli import train
from dantinox.cli.train import parse
from dantinox.data.corpus import find_documents
from dantinox.data.tokenizer import load_tokenizer, train_tokenizer
from dantinox.hf.weights import load_hf, save_hf
from dantinox.inference.scoring import score_documents
from dantinox.metrics import logger as metrics_log
from tests.dantinox.hf.test_hf import arrays, logits
from tests.dantinox.inference.test_generate import build

TEXT = "".join(f"{i} Nel mezzo del cammin di nostra vita mi ritrovai è\n" for i in range(120))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """hf: bfloat16 matrices in shards, float32 norms' values, a BPE; bare: the same without a tokenizer."""
    place = tmp_path_factory.mktemp("folder")
    (place / "text.txt").write_text(TEXT, "utf-8")
    tokenizer = train_tokenizer("bpe", [TEXT], 300)
    model = build(n_layers=1, vocab_size=304, window=8, max_context=48)
    save_hf(model, place / "hf", shard_bytes=20_000, tokenizer=tokenizer)
    for path in (place / "hf").glob("*.safetensors"):
        tensors = {name: x.astype(ml_dtypes.bfloat16) for name, x in safetensors.load_file(path).items()}
        safetensors.save_file(tensors, path)
    config = json.loads((place / "hf" / "config.json").read_text())
    config |= {"dtype": "bfloat16", "torch_dtype": "bfloat16"}
    config["dantinox"].pop("dtype")
    (place / "hf" / "config.json").write_text(json.dumps(config))
    shutil.copytree(place / "hf", place / "bare")
    (place / "bare" / "tokenizer.json").unlink()
    return place


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """(exit code, stdout, stderr) of a program beside the folders."""
    monkeypatch.chdir(folder)

    def call(program, *words):
        try:
            code = importlib.import_module(f"dantinox.cli.{program}").main([str(word) for word in words])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return call


def test_generate_prints_the_text_of_the_folder(run, folder):
    model, tokenizer = load_hf(folder / "hf"), load_tokenizer(folder / "hf")
    want = "Nel " + dantinox.complete(model, tokenizer, ["Nel "], max_new_tokens=12, temperature=0.0)[0] + "\n"
    flags = ["--max-new-tokens", 12, "--temperature", 0]
    assert run("generate", "hf", "Nel ", *flags)[:2] == (0, want)
    assert run("generate", "--from=bare", "--tokenizer", "hf/tokenizer.json", "--prompt", "Nel ", *flags)[1] == want


@pytest.mark.slow
def test_evaluate_scores_with_the_folder(run, folder):
    code, out, _ = run("evaluate", "hf", "text.txt", "--json")
    model, tokenizer = load_hf(folder / "hf"), load_tokenizer(folder / "hf")
    score = score_documents(model, tokenizer, find_documents("text.txt"))
    record = json.loads(out)
    assert (code, record["from"], "run" in record) == (0, "hf", False)
    assert record["nats"] == pytest.approx(score.nats, rel=1e-6) and record["tokens"] == score.tokens


def test_export_of_a_folder_keeps_its_layout_and_tokenizer(run, folder, tmp_path):
    assert run("export", "--from", "hf", "--out", tmp_path / "out")[0] == 0
    old, new = load_hf(folder / "hf"), load_hf(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "mistral"
    assert all(np.array_equal(x, arrays(new)[name]) for name, x in arrays(old).items())
    assert load_tokenizer(tmp_path / "out").fingerprint == load_tokenizer(folder / "hf").fingerprint
    assert run("export", "bare", tmp_path / "without")[0] == 0 and not (tmp_path / "without" / "dantinox").exists()


@pytest.mark.parametrize(
    ("program", "flags", "message"),
    [
        ("generate", ["--from", "nowhere"], "nowhere does not exist"),
        ("generate", ["--from", "text.txt"], "text.txt is a file"),
        ("generate", ["--from", "."], "config.json: No such file"),
        ("generate", ["--from", "bare"], "bare has no tokenizer.json; give --tokenizer a tokenizer.json or its folder"),
        ("generate", ["--from", "bare", "--tokenizer", "nope"], "tokenizer is 'nope'; allowed: a tokenizer.json or"),
        ("generate", ["--from", "hf", "--run", "x"], "run and from are both given; allowed: one of them"),
        ("generate", ["--from", "hf", "--checkpoint", "best"], "checkpoint is given with from, and only runs have"),
        ("generate", ["--run", "x", "--tokenizer", "hf"], "tokenizer is given, and a run has its own"),
        ("generate", ["--run", "hf"], "hf is not a run but a model in the format of Hugging Face; give --from hf"),
        ("generate", ["--from", "hf", "--param-dtype", "float16"], "invalid choice 'float16'"),
        ("generate", ["--from"], "--from needs a value"),
        ("evaluate", ["--from", "bare", "--data", "text.txt"], "bare has no tokenizer.json"),
        ("evaluate", ["--from", "nowhere", "--data", "text.txt"], "nowhere does not exist"),
        ("export", ["--from", "hf", "--run", "x", "--out", "new"], "run and from are both given"),
        ("export", ["--from", "hf", "--layout", "llama", "--out", "new"], "cannot represent window 8"),
        ("train", ["--init-from", "nowhere"], "nowhere does not exist"),
        (
            "train",
            ["--init-from", "bare"],
            "tokenizer is 'bpe', but init_from bare has no tokenizer.json; allowed: the",
        ),
        ("train", ["--init-from", "hf", "--tokenizer", "char"], "tokenizer is 'char', but init_from hf has its own"),
        ("train", ["--init-from", "hf", "--dim", "32", "--window", "4"], "contradicts dim 32, where it has "),
        ("train", ["--init-from", "hf", "--vocab-size", "300"], "contradicts vocab_size 300, where it has 304"),
    ],
)
def test_unusable_folder_is_one_line(run, program, flags, message):
    code, out, err = run(program, *flags)
    assert code == 2 and out == "" and message in err and err.count("\n") == 1


def test_file_of_settings_must_agree_with_the_folder(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    (folder / "wide.yaml").write_text("init_from: hf\nn_layers: 9\nlr: 0.5\n")
    with pytest.raises(SystemExit):
        parse(["--config", "wide.yaml"])
    assert "init_from hf contradicts n_layers 9, where it has 1" in capsys.readouterr().err
    (folder / "wide.yaml").write_text("init_from: hf\nlr: 0.5\nattn: xla\nmax_context: 24\nseq_len: 16\n")
    settings = parse(["--config", "wide.yaml", "--preset", "dante"]).settings
    assert (settings.optim.lr, settings.model.attn, settings.model.max_context) == (0.5, "xla", 24)
    assert (settings.model.n_layers, settings.data.tokenizer, settings.train.seq_len) == (1, "hf", 16)


@pytest.mark.slow
def test_training_continues_from_the_folder_and_resumes_without_it(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DANTINOX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(metrics_log, "matmul_rate", lambda dtype: 1e9)
    monkeypatch.setattr(metrics_log, "plot_loss", lambda *_: None)
    shutil.copytree(folder / "hf", tmp_path / "hf")
    shutil.copy(folder / "text.txt", tmp_path)
    flags = (
        "--init-from hf --data text.txt --seq-len 16 --batch-size 2 --lr 1e-9 --steps 2 --run mine --sample-tokens 3 "
        "--eval-every 1 --eval-batches 1 --log-every 1 --dtype float32 --ema-decay 0.5"
    ).split()
    assert train.main(flags) == 0
    shutil.rmtree(tmp_path / "hf")
    model, tokenizer = dantinox.load("runs/mine")
    whole = arrays(load_hf(folder / "hf"))
    assert all(np.allclose(x, whole[name], atol=1e-6) for name, x in arrays(model).items())
    assert tokenizer.fingerprint == load_tokenizer(folder / "hf").fingerprint and model.config.vocab_size == 304
    assert train.main(["--run", "mine", "--resume", "--steps", "3"]) == 0
    assert Checkpoints(tmp_path / "runs" / "mine", 3).steps()[-1] == 3
    with pytest.raises(SystemExit):
        train.main(["--run", "mine", "--resume", "--init-from", "else"])
    assert "--resume cannot change init_from 'hf' -> 'else'" in capsys.readouterr().err


# --- dtype of the parameters ----------------------------------------------------------------------


def test_parameters_stay_in_bfloat16_and_give_the_same_numbers(folder):
    tokens = np.arange(12)[None]
    full, auto, chosen = (load_hf(folder / "hf", param_dtype=x) for x in ("float32", "auto", "bfloat16"))
    assert full.config.dtype == "bfloat16"
    for model in (auto, chosen):
        kinds = {x.ndim > 1: x.dtype for x in arrays(model).values()}
        assert kinds == {True: jnp.bfloat16, False: np.float32}
    np.testing.assert_array_equal(logits(auto, tokens), logits(full, tokens))
    assert {x.dtype for x in arrays(full).values()} == {np.dtype(np.float32)}
    in_float32 = load_hf(folder / "hf", param_dtype="auto", dtype="float32")
    assert {x.dtype for x in arrays(in_float32).values()} == {np.dtype(np.float32)}
    with pytest.raises(dantinox.ConfigError, match="param_dtype is 'half'; allowed: auto, float32, bfloat16"):
        load_hf(folder / "hf", param_dtype="half")


@pytest.mark.slow
def test_peak_memory_of_loading_is_the_file_and_one_tensor(tmp_path):
    model = build(n_layers=12, dim=512, n_heads=8, n_kv_heads=4, vocab_size=16384, mlp_ratio=4.0)
    save_hf(model, tmp_path / "big")
    del model
    program = """
import sys, jax, jax.numpy as jnp, dantinox, dantinox.hf.weights
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1000
jax.block_until_ready(jnp.zeros(3) + 1)
before = peak()
model = dantinox.load_hf(sys.argv[1], param_dtype=sys.argv[2])
print(peak() - before)
"""
    size = sum(path.stat().st_size for path in (tmp_path / "big").glob("*.safetensors")) / 1e6
    for dtype, share in (("float32", 1), ("bfloat16", 0.5)):
        words = [sys.executable, "-c", program, str(tmp_path / "big"), dtype]
        added = float(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
        # Two copies of the largest tensor, 34 MB, and what of the file is mapped.
        assert added < share * size + 2 * 34 + 64 + 20
