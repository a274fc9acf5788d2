"""What may change between a run and its resumption: settings, the place of the text, files of the run."""

import hashlib
import itertools
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import jax
import numpy as np
import pytest

from dantinox.checkpoint.manager import Checkpoints
from dantinox.cli import train
from dantinox.config import Config
from dantinox.data import corpus
from dantinox.data.tokenizer import CharTokenizer, load_tokenizer
from dantinox.metrics import logger as metrics_log
from dantinox.metrics.logger import read_metrics
from dantinox.training.resume import RESUME_EFFECTS, diff_settings

# The schedule is constant, so that a run of 4 steps resumed with 8 is one of 8 steps.
BASE = Config().replace(
    n_layers=1, dim=16, n_heads=2, n_kv_heads=1, window=8, max_context=32, mlp_ratio=1.0, dropout=0.2, seq_len=16,
    batch_size=4, ema_decay=0.9, steps=4, lr=0.01, warmup_ratio=0.0, schedule="constant", log_every=1, eval_every=4,
    eval_batches=2, save_every=4, sample_tokens=0, data="text.txt", dtype="float32",
)  # fmt: skip
# Another value of each setting, by what it does to a resumed run.
NONE = {
    "vocab_size": 999, "max_context": 64, "decode": "reference", "kv_cache_dtype": "int8", "data": "moved/inferno.txt",
    "bpe_vocab_size": 400, "run": "renamed", "runs_dir": "elsewhere", "eval_every": 3, "patience": 50, "save_every": 3,
    "max_checkpoints": 1, "on_nan": "skip", "sample_every": 6, "sample_tokens": 3, "log_every": 3,
    "profile_steps": "6:7", "steps": 8, "expert_exchange": "ragged",
}  # fmt: skip
NUMBERS = {
    "router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.5, "dropout": 0.1, "remat": "block", "attn": "reference",
    "moe": "xla", "loss": "reference", "lr": 0.02, "schedule": "cosine", "warmup_ratio": 0.9, "min_lr_ratio": 0.5,
    "weight_decay": 0.5, "beta1": 0.5, "beta2": 0.5, "grad_clip": 0.1, "ema_decay": 0.1, "batch_size": 2, "seq_len": 8,
    "grad_accum": 2, "seed": 1, "mesh": "data=2", "eval_batches": 1, "selection_bias_rate": 0.01,
}  # fmt: skip
IMPOSSIBLE = {
    "dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 4, "window": None, "window_pattern": "SL",
    "attn_gate": "head", "qk_norm": True, "attn_bias": True, "attn_sinks": True, "attn_softcap": 5.0,
    "logit_softcap": 5.0, "pos_encoding": "none", "rope_theta": 500.0, "rope_scaling": "ntk", "rope_factor": 2.0,
    "rope_original_context": 16, "rope_truncate": False, "mlp": "gelu", "mlp_limit": 5.0, "mlp_alpha": 1.0,
    "moe_bias": True,
    "mlp_ratio": 2.0, "n_experts": 4, "experts_per_token": 1, "shared_expert": True, "tie_embeddings": False,
    "lora_rank": 2, "lora_alpha": 8.0, "lora_targets": "q,v",
    "attn_out_bias": False, "qk_norm_all_heads": True,
    "scale_embeddings": True, "n_dense_layers": 1, "dense_ratio": 2.0, "shared_ratio": 2.0, "router": "sigmoid",
    "attn_scale": 0.5, "norm_offset": True, "router_renormalise": False, "router_scale": 2.0, "selection_bias": True,
    "norms": "both", "rope_pattern": "RN", "rope_theta_windowed": 100.0,
    "norm_eps": 1e-5, "dtype": "bfloat16", "tokenizer": "bpe", "init_from": "folder",
    "data_format": "examples",
    "val_fraction": 0.2, "optimizer": "lion",
}  # fmt: skip
UNTRIED = {"wandb"}  # needs a package; tests/dantinox/metrics has a stand-in for it
copies = itertools.count()


@pytest.fixture(scope="module", autouse=True)
def here(tmp_path_factory):
    """A folder with a text, in two places, and a stand-in for the measurements that no test here reads."""
    folder, before = tmp_path_factory.mktemp("changes"), Path.cwd()
    text = "".join(f"{i} Nel mezzo del cammin di nostra vita mi ritrovai\n" for i in range(300))
    (folder / "moved").mkdir()
    for name in ("text.txt", "moved/inferno.txt"):
        (folder / name).write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DANTINOX_CACHE", str(folder / "cache"))
        patch.setattr(metrics_log, "matmul_rate", lambda dtype: 1e9)
        patch.setattr(metrics_log, "plot_loss", lambda *_: None)
        os.chdir(folder)
        yield folder
        os.chdir(before)


@pytest.fixture(scope="module")
def whole(here):
    """A run of 8 steps."""
    return digest(train.train(BASE.replace(run="whole", steps=8)))


@pytest.fixture(scope="module")
def parent(here):
    """A run of 4 steps."""
    return train.train(BASE.replace(run="parent"))


@pytest.fixture
def run(parent):
    """A copy of the run of 4 steps."""
    return Path(shutil.copytree(parent, f"runs/copy{next(copies)}"))


def digest(run: Path) -> str:
    """A hash of every number of a run's state after 8 steps."""
    settings = Config.from_yaml(run / "config.yaml")
    state = Checkpoints(run).restore(8, train.Trainer(settings).abstract_state())
    return hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state))).hexdigest()


def resume(run: Path, *words: str) -> int:
    return train.main(["--run", run.name, "--runs-dir", str(run.parent), "--resume", *words])


def refused(capsys, run: Path, *words: str) -> str:
    """Check that a run is refused with one line and untouched; returns the line."""
    capsys.readouterr()
    before = {path: path.is_file() and path.read_bytes() for path in run.rglob("*")}
    with pytest.raises(SystemExit) as stop:
        resume(run, *words)
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.err.count("\n") == 1 and "resumed" not in captured.out
    assert {path: path.is_file() and path.read_bytes() for path in run.rglob("*")} == before
    return captured.err.removeprefix("dantinox-train: error: ").strip()


def flag(name: str, value: object) -> str:
    if isinstance(value, bool):
        return f"--{'' if value else 'no-'}{name.replace('_', '-')}"
    return f"--{name.replace('_', '-')}={value}"


def test_every_setting_is_in_the_table_and_tried_here():
    assert set(RESUME_EFFECTS) == set(BASE.flat())
    assert {*NONE, *NUMBERS, *IMPOSSIBLE, *UNTRIED} == set(RESUME_EFFECTS)
    assert not {*NONE} & {*NUMBERS} and not {*NONE, *NUMBERS} & {*IMPOSSIBLE}


@pytest.mark.parametrize("name", IMPOSSIBLE)
@pytest.mark.sampled(32)
def test_impossible_change_is_refused_by_name(name, run, capsys):
    new, old = BASE.replace(**{name: IMPOSSIBLE[name]}).flat(), BASE.flat()
    line = refused(capsys, run, flag(name, IMPOSSIBLE[name]))
    assert line.startswith("--resume cannot change ") and f"{name} {old[name]!r} -> {new[name]!r}" in line


def test_change_of_later_numbers_is_listed_by_name():
    for name, value in NUMBERS.items():
        told = f"{name} {BASE.flat()[name]!r} -> {value!r}"
        assert diff_settings(BASE.replace(**{name: value}), BASE) == told
    for name, value in NONE.items():
        assert diff_settings(BASE.replace(**{name: value}), BASE) == "", name


CONDITIONAL = [
    ({"pos_encoding": "learned"}, {"max_context": 64}, "impossible"),
    ({"rope_scaling": "yarn", "rope_factor": 2.0}, {"max_context": 64}, "numbers"),
    ({"rope_scaling": "llama3", "rope_factor": 2.0, "rope_original_context": 16}, {"max_context": 64}, "none"),
    ({"rope_scaling": "linear", "rope_factor": 2.0}, {"max_context": 64}, "none"),
    ({"tokenizer": "bpe"}, {"bpe_vocab_size": 400}, "impossible"),
    ({"ema_decay": 0.0}, {"ema_decay": 0.5}, "impossible"),
    ({"ema_decay": 0.5}, {"ema_decay": 0.0}, "impossible"),
    ({"schedule": "cosine"}, {"steps": 9}, "numbers"),
    ({"warmup_ratio": 0.5}, {"steps": 9}, "numbers"),
]


@pytest.mark.parametrize(("settings", "change", "effect"), CONDITIONAL)
def test_effect_of_a_change_depends_on_other_settings(settings, change, effect):
    old = BASE.replace(**settings)
    if effect == "impossible":
        with pytest.raises(ValueError, match=f"--resume cannot change {next(iter(change))} "):
            diff_settings(old.replace(**change), old)
    else:
        assert bool(diff_settings(old.replace(**change), old)) == (effect == "numbers")


def resume_with(run: Path, changes: dict[str, object]) -> Path:
    """Resume a copy to step 8 with changed settings; a changed run or runs_dir moves it first."""
    target = Path(changes.get("runs_dir", run.parent)) / str(changes.get("run", run.name))
    if target != run:
        shutil.move(run, target)
    words = [flag(name, value) for name, value in changes.items() if name not in ("run", "runs_dir", "steps")]
    if "profile_steps" in changes:  # its reader of traces is for a process of its own
        command = [sys.executable, "-m", "dantinox.train", "--run", str(target), "--resume", "--steps=8", *words]
        subprocess.run(command, check=True, capture_output=True)
    else:
        assert resume(target, "--steps=8", *words) == 0
    return target


@pytest.mark.slow
def test_changes_without_effect_leave_every_later_number_equal(run, whole, capsys):
    """All at once: if this fails, the slow test below says which."""
    changes = {name: value for name, value in NONE.items() if name != "profile_steps"}
    assert digest(resume_with(run, changes)) == whole
    assert "resumed with" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", NONE)
def test_change_without_effect_leaves_every_later_number_equal(name, run, whole, capsys):
    assert digest(resume_with(run, {name: NONE[name]})) == whole
    assert "resumed with" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", NUMBERS)
def test_change_of_numbers_resumes_and_says_so(name, run, whole, capsys):
    if name == "mesh" and len(jax.devices()) < 2:
        pytest.skip("one device")
    found = digest(resume_with(run, {name: NUMBERS[name]}))
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("resumed with "))
    assert f" {name} {BASE.flat()[name]!r} -> {NUMBERS[name]!r}" in line  # the steps, too, if the schedule has an end
    assert line.endswith(": later steps differ from those of an uninterrupted run")
    if name not in (
        "router_aux_loss_coef",
        "router_z_loss_coef",
        "selection_bias_rate",
        "remat",
        "attn",
        "moe",
        "loss",
        "min_lr_ratio",
        "eval_batches",
    ):
        assert found != whole


PLACES = {
    "another file": "moved/inferno.txt",
    "an absolute path": "{here}/moved/inferno.txt",
    "a link": "link.txt",
    "a folder": "moved",
    "a pattern": "mov*/*.txt",
    "the same file": "./text.txt",
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.sampled(2)
def test_text_may_move(place, run, here, capsys):
    if not (here / "link.txt").is_symlink():
        (here / "link.txt").symlink_to("text.txt")
    assert resume(run, "--data", PLACES[place].format(here=here)) == 0
    out = capsys.readouterr().out
    assert "nothing to train: the run is at step 4" in out and "resumed with" not in out
    assert Config.from_yaml(run / "config.yaml").data.data == PLACES[place].format(here=here)


def test_another_text_is_refused(run, here, capsys):
    (here / "other.txt").write_text((here / "text.txt").read_text().replace("cammin", "camino"))
    line = refused(capsys, run, "--data", "other.txt")
    advice = "give the text with --data PATH, or start another run"
    assert line == f"data 'other.txt' is not the text that run {run} was trained on; {advice}"


def test_folder_of_ids_is_known_again(here, capsys):
    shutil.copytree(corpus.load_corpus("text.txt").path, here / "ids")
    run = train.train(BASE.replace(run="ids", data="ids"))
    assert resume(run) == 0
    assert "nothing to train: the run is at step 4" in capsys.readouterr().out
    ids = np.fromfile(here / "ids" / "train.bin", np.uint16)
    ids[100] += 1
    ids.tofile(here / "ids" / "train.bin")
    assert refused(capsys, run).startswith(f"data 'ids' is not the text that run {run} was trained on")


def test_lost_text_is_replaced_by_the_cache(run, here, capsys, monkeypatch):
    assert resume(run, "--data", "lost.txt") == 0
    assert "data 'lost.txt' is gone; resuming with the text of the run from the cache" in capsys.readouterr().out
    monkeypatch.setenv("DANTINOX_CACHE", str(here / "empty cache"))
    assert "lost.txt" in (line := refused(capsys, run, "--data", "other/lost.txt"))
    assert line.endswith("; give the text with --data PATH, or start another run")


def test_standard_library_of_another_python_does_not_block_a_run(run, here, capsys, monkeypatch):
    text = (here / "text.txt").read_text()
    for version, content in (("3.12", text), ("3.13", text + "import this\n")):
        (here / version).mkdir()
        (here / version / "text.py").write_text(content)
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("data: text.txt", "data: stdlib"))
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(here / "3.12"))
    assert resume(run) == 0 and "data 'stdlib'" not in capsys.readouterr().out
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(here / "3.13"))
    for _ in range(2):
        assert resume(run) == 0
        told = "data 'stdlib' is that of another Python now; resuming with the text of the run from the cache"
        assert told in capsys.readouterr().out
    monkeypatch.setenv("DANTINOX_CACHE", str(here / "another cache"))
    line = refused(capsys, run)
    assert line == (
        f"data 'stdlib' is not the text that run {run} was trained on; resume with the Python it began with, or give "
        "that text with --data PATH, or start another run"
    )
    assert resume(run, "--data", "3.12") == 0


def test_text_that_gives_another_tokenizer_now_keeps_that_of_the_run(run, parent, here, monkeypatch):
    """As after an upgrade that trains tokenizers in another way, with the cache gone."""
    monkeypatch.setenv("DANTINOX_CACHE", str(here / "newer cache"))
    monkeypatch.setattr(corpus, "train_tokenizer", lambda *_: CharTokenizer("é"))
    for _ in range(2):  # the second time, the cache has the text under both tokenizers
        assert resume(run) == 0
        assert (run / "tokenizer.json").read_bytes() == (parent / "tokenizer.json").read_bytes()
        for manifest in (run / "checkpoints").glob("*/manifest.json"):  # as the next checkpoint would be
            Checkpoints(run).update_metadata(int(manifest.parent.name), {"corpus": found_corpus(run)})


def found_corpus(run: Path) -> str:
    tokenizer = load_tokenizer(run)
    return corpus.load_corpus("text.txt", existing_tokenizer=tokenizer).path.name


DAMAGES = {
    "empty": b"",
    "half": BASE.to_yaml().encode()[:300],
    "not YAML": b"dim: [1\n",
    "not UTF-8": b"dim: 16\n\xff\xfe\x00",
    "zeros": bytes(500),
    "a list": b"- 1\n- 2\n",
    "of a newer version": BASE.to_yaml().encode() + b"hyper_connections: 4\n",
    "a wrong value": BASE.to_yaml().replace("dim: 16", "dim: many").encode(),
    "values that do not fit": BASE.to_yaml().replace("n_heads: 2", "n_heads: 3").encode(),
    "a name twice": BASE.to_yaml().encode() + b"dim: 16\n",
    "another model": BASE.replace(dim=32).to_yaml().encode(),
    "another optimizer": BASE.replace(optimizer="lion").to_yaml().encode(),
    "without the average": BASE.replace(ema_decay=0.0, optimizer="adafactor").to_yaml().encode(),
    "more layers": BASE.replace(n_layers=2).to_yaml().encode(),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.sampled(4)
def test_damaged_settings_are_one_line(damage, run, capsys):
    (run / "config.yaml").write_bytes(DAMAGES[damage])
    line = refused(capsys, run)
    assert "config.yaml" in line and len(line) < 250, line


def test_missing_settings_are_one_line(run, capsys):
    (run / "config.yaml").unlink()
    assert f"run {run} does not exist (it has no config.yaml); runs in runs: " in refused(capsys, run)


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff\xfe", b"[]"])
@pytest.mark.sampled(2)
def test_damaged_tokenizer_is_written_again(content, run, parent):
    (run / "tokenizer.json").unlink()
    if content is not None:
        (run / "tokenizer.json").write_bytes(content)
    assert resume(run) == 0
    assert (run / "tokenizer.json").read_bytes() == (parent / "tokenizer.json").read_bytes()


TORN = {
    "half a line": b'{"step": 5, "lo',
    "zeros": bytes(100),
    "not UTF-8": b"\xff\xfe\n",
    "a number": b"5\n",
    "no step": b"{}\n",
}


@pytest.mark.parametrize("torn", TORN)
@pytest.mark.sampled(4)
def test_torn_metrics_keep_their_intact_rows(torn, run, parent):
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(TORN[torn])
    assert resume(run) == 0
    assert read_metrics(run / "metrics.jsonl") == read_metrics(parent / "metrics.jsonl")


def test_missing_metrics_do_not_block_a_run(run):
    (run / "metrics.jsonl").unlink()
    assert resume(run) == 0 and read_metrics(run / "metrics.jsonl") == []
