"""--resume in every spelling: which run it resumes, with which settings."""

import os
from pathlib import Path

import pytest

from dantinox.cli import train
from dantinox.config import Config
from dantinox.system.run_lock import RunLock


@pytest.fixture(scope="module", autouse=True)
def here(tmp_path_factory):
    """The settings of runs/nano and of elsewhere/mine differ from every preset."""
    folder, before = tmp_path_factory.mktemp("spellings"), Path.cwd()
    os.chdir(folder)
    saved = Config.from_preset("nano", dim=48, n_layers=3, steps=77, lr=0.125, qk_norm=False, vocab_size=321)
    for path, config in (("runs/nano", saved), ("elsewhere/mine", saved.replace(run="before", runs_dir="gone"))):
        Path(path).mkdir(parents=True)
        Path(path, "config.yaml").write_text(config.to_yaml())
    Path("nano.yaml").write_text("dim: 16\nlr: 0.5\n")
    Path("number.yaml").write_text("run: 5\n")
    Path("wrong.yaml").write_text("n_heads: 7\n")
    Path("mine.yaml").write_text("run: mine\nruns_dir: elsewhere\nsteps: 5\n")
    yield folder
    os.chdir(before)


def saved(path: str) -> dict:
    return Config.from_yaml(Path(path) / "config.yaml").flat()


RESUMED = {
    "--resume": "runs/nano",
    "--resume=true": "runs/nano",
    "--resume=True": "runs/nano",
    "--no-resume --resume": "runs/nano",
    "--resume=false --resume": "runs/nano",
    "--run nano --resume": "runs/nano",
    "--resume --run=nano": "runs/nano",
    "--preset nano --resume": "runs/nano",  # make train ARGS=--resume
    "--preset=nano --resume=true": "runs/nano",
    "--preset dante --run nano --resume": "runs/nano",
    "--config nano.yaml --resume": "runs/nano",
    "--config wrong.yaml --run nano --resume": "runs/nano",  # not read as settings of a new run
    "--preset dante-moe --config nano.yaml --run nano --resume": "runs/nano",
    "--runs-dir runs --resume": "runs/nano",
    "--runs_dir=runs --run nano --resume": "runs/nano",
    "--run other --run nano --resume": "runs/nano",
    "--run runs/nano --resume": "runs/nano",
    "--run runs/nano/ --resume": "runs/nano",
    "--run nano/ --resume": "runs/nano",
    "--run ./runs/../runs/nano --resume": "runs/nano",
    "--runs-dir ./runs --run runs/nano --resume": "runs/nano",
    "--config mine.yaml --resume": "elsewhere/mine",
    "--runs-dir elsewhere --run mine --resume": "elsewhere/mine",
    "--run elsewhere/mine --resume": "elsewhere/mine",
    "--preset nano --run elsewhere/mine --resume=TRUE": "elsewhere/mine",
}


@pytest.mark.parametrize("words", RESUMED)
@pytest.mark.sampled(2)
def test_resume_starts_from_the_settings_of_the_run(words):
    parsed = train.parse(words.split())
    train_settings = parsed.settings.train
    assert parsed.resume and os.path.samefile(Path(train_settings.runs_dir) / train_settings.run, RESUMED[words])
    place = {"run": train_settings.run, "runs_dir": train_settings.runs_dir}
    assert parsed.settings.flat() == saved(RESUMED[words]) | place


def test_absolute_path_of_a_run_resumes(here):
    settings = train.parse(["--run", str(here / "runs" / "nano"), "--resume"]).settings
    assert settings.flat() == saved("runs/nano")


LAID_OVER = {
    "--steps 99": {"steps": 99},
    "--lr=0.5 --lr 0.25": {"lr": 0.25},
    "--preset nano --dim 64": {"dim": 64, "head_dim": 16},
    "--config nano.yaml --clip 2": {"grad_clip": 2.0},  # an earlier name
    "--qk-norm --data elsewhere.txt": {"qk_norm": True, "data": "elsewhere.txt"},
    "--qk_norm=true": {"qk_norm": True},
}


@pytest.mark.parametrize("words", LAID_OVER)
def test_only_flags_that_are_given_are_laid_over(words):
    assert train.parse(["--resume", *words.split()]).settings.flat() == saved("runs/nano") | LAID_OVER[words]


@pytest.mark.parametrize(
    "words", ["", "--no-resume", "--resume=false", "--resume --no-resume", "--resume --resume=False"]
)
def test_without_resume_the_preset_counts(words):
    parsed = train.parse(words.split())
    assert not parsed.resume and parsed.settings == Config.from_preset("nano")


def test_value_of_resume_may_be_a_word_of_its_own():
    for words in ("--resume true", "--resume True --steps 5", "--resume false --resume", "--resume --data false"):
        assert train.wants_resume(words.split()), words
    for words in (
        "--resume false",
        "--resume False --steps 5",
        "--resume true --no-resume",
        "--resume --help",
        "false",
    ):
        assert not train.wants_resume(words.split()), words


@pytest.mark.parametrize("words", ["--run runs/new", "--run runs/nano", "--runs-dir runs --run ./runs/new/"])
def test_path_in_the_folder_of_the_runs_is_a_name(words):
    settings = train.parse(words.split()).settings.train
    assert settings.run == Path(words.split()[-1]).name and Path(settings.runs_dir) == Path("runs")


def test_ignored_settings_of_a_preset_are_one_line(capsys):
    train.parse(["--preset", "nano", "--resume"])
    assert capsys.readouterr().out == (
        "resuming with the settings of the run, not those of --preset (dim 48, not 128; n_layers 3, not 4; "
        "qk_norm False, not True; lr 0.125, not 0.003 and 1 more); flags change them\n"
    )
    train.parse(["--resume"])
    assert capsys.readouterr().out == ""


ABSENT = "does not exist (it has no config.yaml)"
PLAIN = "allowed: a plain folder name, or the path of a run"
WRONG = {
    "--run missing --resume": f"run runs/missing {ABSENT}; runs in runs: nano",
    "--preset dante --resume": f"run runs/dante {ABSENT}; runs in runs: nano",
    "--run empty/x --resume": f"run is 'empty/x'; {PLAIN} (for a new one there: --runs-dir empty --run x)",
    "--runs-dir elsewhere --resume": f"run elsewhere/nano {ABSENT}; runs in elsewhere: mine",
    "--runs-dir none --resume": f"run none/nano {ABSENT}; no runs in none",
    "--runs-dir elsewhere --run runs/nano --resume": f"run is 'runs/nano'; {PLAIN}",
    "--run .. --resume": f"run runs/.. {ABSENT}",
    "--resume --preset nanno": "preset is 'nanno'; did you mean 'nano'?",
    "--resume --config none.yaml": "config none.yaml: cannot be read (No such file or directory)",
    "--resume --dim 50": "n_heads",
    "--config number.yaml --resume": f"run runs/5 {ABSENT}",
    "--resume=yes": "yes",
}


@pytest.mark.parametrize("words", WRONG)
def test_resume_of_no_run_prints_one_line_and_exits_2(words, capsys):
    before = sorted(Path().rglob("*"))
    with pytest.raises(SystemExit) as stop:
        train.main(words.split())
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and WRONG[words] in err, err
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize("words", ["--resume", "--preset nano --resume", "--run runs/nano", "--preset nano", ""])
def test_run_that_is_in_use_is_refused_and_untouched(words, capsys):
    with RunLock(Path("runs/nano")):
        before = sorted(Path().rglob("*"))
        with pytest.raises(SystemExit) as stop:
            train.main([*words.split(), "--data", "nano.yaml"])
        assert sorted(Path().rglob("*")) == before
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.out == ""
    told = f"runs/nano is in use by process {os.getpid()}; wait for it, stop it, or use another name"
    assert captured.err == f"dantinox-train: error: {told}\n"
