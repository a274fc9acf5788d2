"""Earlier names of settings and flags: accepted on the command line, in YAML and in Python; two values are an error."""

import dataclasses
from pathlib import Path

import pytest

from dantinox.cli import export, generate, train
from dantinox.config import Config, ConfigError
from dantinox.config.aliases import ALIASES, FLAG_ALIASES, NEW_SETTINGS, VALUE_ALIASES, original_names
from dantinox.sweep import search_space

EARLIER = Path(__file__).parent / "earlier_names.yaml"  # the config.yaml of a run from before the names changed
VALUES = {
    "kv_heads": (2, 1),
    "layer_pattern": ("SL", "L"),
    "gate": ("elementwise", "none"),
    "positions": ("learned", "none"),
    "expansion": (1.5, 2.5),
    "balance_coef": (0.5, 0.25),
    "router_z_coef": (0.5, 0.25),
    "tie": (False, True),
    "kv_dtype": ("model", "int8"),
    "bpe_vocab": (512, 640),
    "warmup": (0.25, 0.5),
    "min_lr": (0.25, 0.5),
    "clip": (0.5, 0.25),
    "ema": (0.5, 0.25),
    "keep": (5, 6),
}
"""Earlier name -> two values, of which the first is not the preset's."""


def from_flags(settings: dict) -> Config:
    return train.parse([f"--{name}={value}" for name, value in settings.items()]).settings


def from_separate_flags(settings: dict) -> Config:
    words = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        words += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return train.parse(words).settings


def from_yaml(settings: dict) -> Config:
    path = Path("settings.yaml")
    path.write_text("".join(f"{name}: {value}\n" for name, value in settings.items()))
    return Config.from_yaml(path, Config.from_preset("nano"))


def from_preset(settings: dict) -> Config:
    return Config.from_preset("nano", **settings)


def from_replace(settings: dict) -> Config:
    return Config.from_preset("nano").replace(**settings)


def from_sweep(settings: dict) -> Config:
    return search_space.resolve_settings({"preset": "nano"} | settings)


ENTRY_POINTS = (from_flags, from_separate_flags, from_yaml, from_preset, from_replace, from_sweep)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_every_alias_is_tested_and_names_a_setting():
    assert VALUES.keys() == ALIASES.keys()
    assert set(ALIASES.values()) <= Config().flat().keys() and not ALIASES.keys() & Config().flat().keys()


@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
@pytest.mark.parametrize("earlier", ALIASES)
@pytest.mark.sampled(2)
def test_earlier_name_sets_the_setting(earlier, entry_point):
    name, value = ALIASES[earlier], VALUES[earlier][0]
    today = VALUE_ALIASES.get((name, value), value)
    config = entry_point({earlier: value})
    assert config == Config.from_preset("nano", **{name: today}) and config.flat()[name] == today
    assert entry_point({earlier: value, name: today}) == config


@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
@pytest.mark.parametrize("earlier", ALIASES)
def test_two_values_under_two_names_raise_one_line(earlier, entry_point, capsys):
    name, (first, second) = ALIASES[earlier], VALUES[earlier]
    with pytest.raises((ConfigError, SystemExit)) as error:
        entry_point({earlier: first, name: second})
    line = capsys.readouterr().err if error.type is SystemExit else f"{error.value}\n"
    assert error.type is ConfigError or error.value.code == 2
    assert line.count("\n") == 1 and f"{earlier} is " in line and line.endswith(f"both set {name}; give {name} only\n")


def test_earlier_names_are_not_in_the_help(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    shown = capsys.readouterr().out.split()
    assert "--n-kv-heads" in shown and not {f"--{name.replace('_', '-')}" for name in ALIASES} & set(shown)


def test_flags_of_single_programs_have_their_earlier_names(capsys):
    assert generate.parse(["nano", "--prompt-file", "-", "--lines", "--kv-dtype", "model"]) == generate.Arguments(
        run="nano", prompt_file="-", prompt_per_line=True, kv_cache_dtype="auto"
    )
    with pytest.raises(SystemExit) as stop:
        export.main(["--run", "none", "--to", "folder"])
    assert stop.value.code == 2 and "run runs/none does not exist" in capsys.readouterr().err
    fields = {field.name for args in (generate.Arguments, export.Arguments) for field in dataclasses.fields(args)}
    assert {new for old, new in FLAG_ALIASES.items() if old not in ALIASES} <= fields


def test_settings_of_an_earlier_run_are_read():
    config = Config.from_yaml(EARLIER)
    assert (config.model.n_kv_heads, config.model.attn_gate, config.model.tie_embeddings) == (1, "head", False)
    assert (config.model.kv_cache_dtype, config.optim.min_lr_ratio, config.train.max_checkpoints) == ("auto", 0.2, 2)
    rewritten = Path("today.yaml")
    rewritten.write_text(config.to_yaml())
    assert Config.from_yaml(rewritten) == config
    assert not any(f"\n{name}:" in config.to_yaml() for name in ALIASES)


def test_sweeps_find_earlier_runs_by_their_folders():
    """The folder of a run is a hash of its settings: it must not change with the name of one."""
    run = search_space.Run.from_values({"preset": "nano", "kv_heads": 1, "qk_norm": False}, ["kv_heads"])
    assert run.name == "kv_heads=1_9bf9653c" and run.flags() == ["--preset=nano", "--kv-heads=1", "--qk-norm=False"]
    today = search_space.Run.from_values({"preset": "nano", "n_kv_heads": 1, "qk_norm": False}, ["n_kv_heads"])
    assert today.name == f"n_{run.name}"
    assert original_names({"n_kv_heads": 1, "kv_cache_dtype": "auto"}) == {"kv_heads": 1, "kv_dtype": "model"}
    assert original_names({"loss": "auto", "attn_sinks": True}) == {"attn_sinks": True}
    assert all(Config().flat()[name] == default for name, default in NEW_SETTINGS.items())


def test_sweep_parameter_under_two_names_raises(tmp_path):
    path = tmp_path / "sweep.yaml"
    parameters = "{kv_heads: {value: 1}, n_kv_heads: {values: [1, 2]}}"
    path.write_text(f"program: dantinox/train.py\nmethod: grid\nparameters: {parameters}\n")
    with pytest.raises(ConfigError, match="kv_heads and n_kv_heads are one parameter; give n_kv_heads only"):
        search_space.load_sweep(path)
