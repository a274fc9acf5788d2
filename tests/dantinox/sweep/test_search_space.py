"""Sweep files: which are valid, which runs they make, and one line per error before anything trains."""

import json
import math
import random
import statistics
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dantinox.config import ConfigError
from dantinox.sweep import search_space as sweep_file
from dantinox.sweep.distributions import KEYS, Parameter
from dantinox.sweep.search_space import load_sweep, resolve_settings

ROOT = Path(__file__).parents[3]
PLAIN = {"program": "dantinox/train.py", "method": "grid", "parameters": {"window": {"values": [8, None]}}}


def made(tmp_path, text=None, **changes):
    path = tmp_path / "plain.yaml"
    path.write_text(text if text is not None else yaml.safe_dump(PLAIN | changes, sort_keys=False))
    return load_sweep(path)


def test_grid_is_the_product_in_file_order(tmp_path):
    sweep = made(
        tmp_path, parameters={"n_kv_heads": {"values": [1, 4]}, "dim": {"value": 64}, "window": {"min": 4, "max": 6}}
    )
    assert [tuple(run.values.values()) for run in sweep.runs()] == [(k, 64, w) for k in (1, 4) for w in (4, 5, 6)]
    assert sweep.name == "plain" and sweep.varied == ["n_kv_heads", "window"] and not sweep.maximize
    run = sweep.runs()[0]
    assert run.flags() == ["--n-kv-heads=1", "--dim=64", "--window=4"] and run.name.startswith("n_kv_heads=1_window=4_")
    assert len({run.name for run in sweep.runs()}) == 6


def test_runs_are_identified_by_settings_when_the_file_changes(tmp_path):
    before = [run.name for run in made(tmp_path).runs()]
    more = made(tmp_path, parameters={"window": {"values": [4, 8, None, 8]}})
    assert [run.name for run in more.runs()][1:] == before  # equal settings are one run
    other = made(tmp_path, parameters={"window": {"values": [8, None]}, "lr": {"value": 0.1}})
    assert not {run.name for run in other.runs()} & set(before)
    (tmp_path / "base.yaml").write_text("dim: 32\n")
    based = {"window": {"values": [8, None]}, "config": {"value": str(tmp_path / "base.yaml")}}
    first = [run.name for run in made(tmp_path, parameters=based).runs()]
    (tmp_path / "base.yaml").write_text("dim: 64\n")
    assert not {run.name for run in made(tmp_path, parameters=based).runs()} & set(first)


RANDOM = {
    "lr": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2},
    "window": {"values": [8, 16, None], "probabilities": [0, 1, 3]},
    "warmup_ratio": {"min": 0.0, "max": 0.5},
    "batch_size": {"distribution": "q_uniform", "min": 8, "max": 64, "q": 8},
}


def test_samples_depend_only_on_seed_index_and_name(tmp_path):
    draw = lambda cap, seed=0, **more: made(tmp_path, method="random", run_cap=cap, parameters=RANDOM | more).runs(seed)
    few, many = draw(5), draw(20)
    assert many[:5] == few and len({run.name for run in many}) == 20
    with_more = [run.values for run in draw(5, dropout={"min": 0.0, "max": 0.3})]
    assert [{k: v for k, v in values.items() if k != "dropout"} for values in with_more] == [r.values for r in few]
    assert draw(5, seed=1) != few
    for run in many:
        assert 1e-4 <= run.values["lr"] <= 1e-2 and run.values["window"] in (16, None)
        assert run.values["batch_size"] % 8 == 0 and isinstance(run.values["batch_size"], int)
    # The same on every machine and in every version.
    assert few[0].values == {"lr": 0.0006279, "window": None, "warmup_ratio": 0.1673, "batch_size": 16}


def test_sampling_ends_when_combinations_are_exhausted(tmp_path):
    assert len(made(tmp_path, method="random", run_cap=9).runs()) == 2


@pytest.mark.parametrize(
    ("about", "quantile"),
    {
        "uniform": ({"min": 1.0, "max": 3.0}, lambda u: 1 + 2 * u),
        "log_uniform_values": ({"min": 0.01, "max": 100.0}, lambda u: 10 ** (4 * u - 2)),
        "normal": ({"mu": 2.0, "sigma": 3.0}, lambda u: statistics.NormalDist(2, 3).inv_cdf(u)),
        "log_normal": ({"sigma": 0.5}, lambda u: math.exp(statistics.NormalDist(0, 0.5).inv_cdf(u))),
        "int_uniform": ({"min": 3, "max": 12}, lambda u: 3 + math.floor(10 * u)),
        "q_normal": ({"mu": 0, "sigma": 8, "q": 2}, lambda u: 2 * round(statistics.NormalDist(0, 8).inv_cdf(u) / 2)),
        "q_uniform": ({"min": 0, "max": 1, "q": 0.25}, lambda u: round(4 * u) / 4),
    }.items(),
    ids=lambda item: item if isinstance(item, str) else "",
)
def test_distribution_has_the_expected_quantiles(about, quantile):
    keys, expected = quantile
    parameter = Parameter.parse("x", {"distribution": about} | keys)
    for u in (0.001, 0.25, 0.3333, 0.5, 0.77, 0.999):
        assert parameter.draw(u) == pytest.approx(expected(u), rel=1e-3), u
    assert math.isfinite(parameter.draw(0.0)) and math.isfinite(parameter.draw(math.nextafter(1.0, 0.0)))


def test_sampling_follows_the_probabilities():
    parameter = Parameter.parse("x", {"values": ["a", "b", "c"], "probabilities": [1, 0, 3]})
    draw, source = [], random.Random(0)
    draw = [parameter.draw(source.random()) for _ in range(4000)]
    assert draw.count("b") == 0 and abs(draw.count("a") / 4000 - 0.25) < 0.03


def test_incompatible_settings_are_a_row_and_not_an_error(tmp_path):
    heads = {"n_heads": {"values": [2, 4]}, "n_kv_heads": {"values": [1, 4]}, "preset": {"value": "nano"}}
    runs = made(tmp_path, parameters=heads).runs()
    assert [run.refused is None for run in runs] == [True, False, True, True]
    assert runs[1].refused == "n_heads is 2 and n_kv_heads is 4; n_heads must be a multiple of n_kv_heads"


def test_numbers_that_yaml_parses_as_text_are_converted(tmp_path):
    sweep = made(tmp_path, text=json.dumps(PLAIN | {"parameters": {"lr": {"values": ["1e-3", 0.1]}}}))
    assert [resolve_settings(run.values).optim.lr for run in sweep.runs()] == [0.001, 0.1]


WORDS = ("value", "values", "min", "max", "distribution", "q", "mu", "sigma", "probabilities", "name", "goal")
SETTINGS = ("window", "lr", "tie_embeddings", "mlp", "preset", "steps", "run", "data", "config", "n_kv_heads")
WRONG = {
    "a key": ({"metod": "grid"}, r"unknown key 'metod'; did you mean 'method'\?"),
    "no parameters": ({"parameters": {}}, "parameters are missing; allowed: flags of dantinox.train"),
    "a list": ({"parameters": [1]}, "parameters are missing"),
    "another program": ({"program": "train.py"}, "program is 'train.py'; allowed: dantinox/train.py"),
    "bayes": ({"method": "bayes"}, "method is 'bayes'; allowed: grid, random"),
    "no end": ({"method": "random"}, "run_cap is missing; a random sweep needs it"),
    "no run": ({"run_cap": 0}, "run_cap is 0; allowed: 1 to 10000"),
    "a name": ({"name": "a/b"}, "name is 'a/b'; allowed: a plain folder name"),
    "hyperband": (
        {"early_terminate": {"type": "hyperband"}},
        "early_terminate is not supported; use the parameter patience",
    ),
    "a metric": ({"metric": {"name": "val_los"}}, r"metric: name is 'val_los'; did you mean 'val_loss'\?"),
    "a goal": ({"metric": {"name": "loss", "goal": "min"}}, "metric: goal is 'min'; allowed: minimize, maximize"),
    "metric's key": ({"metric": {"nam": "loss"}}, r"metric: unknown key 'nam'; did you mean 'name'\?"),
    "a command": ({"command": ["python", "train.py"]}, "it must run dantinox.train"),
    "a flag beside": (
        {"command": ["-m", "dantinox.train", "--steps", "${args}"]},
        "command: '--steps' belongs below parameters, with a value",
    ),
    "no flags": ({"command": ["-m", "dantinox.train"]}, r"command: \$\{args\} is missing"),
    "a flag": ({"parameters": {"windw": {"value": 8}}}, r"unknown parameter 'windw'; did you mean 'window'\?"),
    "the run": ({"parameters": {"run": {"value": "x"}}}, "run cannot be a parameter; the sweep sets it"),
    "a value": ({"parameters": {"window": {"values": [8, -3]}}}, "window: window is -3; allowed: 1 or more keys"),
    "a choice": ({"parameters": {"mlp": {"value": "relu"}}}, "mlp: mlp is 'relu'; allowed: swiglu, gelu"),
    "text for a number": ({"parameters": {"steps": {"value": "many"}}}, "steps: steps is 'many'; allowed: an integer"),
    "a fraction of a step": ({"parameters": {"steps": {"values": [1.5]}}}, "steps: steps is 1.5; allowed: an integer"),
    "a list in a list": ({"parameters": {"window": {"values": [[8]]}}}, r"window: value is \[8\]; allowed: null"),
    "no values": (
        {"parameters": {"window": {"values": []}}},
        r"window: values are \[\]; allowed: a list of one or more",
    ),
    "no key": ({"parameters": {"window": {}}}, "window: has nothing; allowed: value, values, or min and max"),
    "a bare value": ({"parameters": {"window": 8}}, "window: is 8; allowed: value, values, or min and max"),
    "nested": ({"parameters": {"window": {"parameters": {"x": 1}}}}, "window: has parameters; allowed: value, values"),
    "two kinds": ({"parameters": {"window": {"value": 1, "max": 2}}}, "window: unknown key 'max' beside constant"),
    "a preset": ({"parameters": {"preset": {"value": "nanno"}}}, r"preset: preset is 'nanno'; did you mean 'nano'\?"),
    "a config": ({"parameters": {"config": {"value": "no.yaml"}}}, r"config: config no.yaml: cannot be read"),
    "a config's kind": ({"parameters": {"config": {"value": 3}}}, "config: config is 3; allowed: the path of a YAML"),
    "no text": (
        {"parameters": {"data": {"value": "no/such.txt"}}},
        "data: no file, folder or match of a pattern at no/",
    ),
    "a distribution": (
        {"parameters": {"lr": {"distribution": "uniforn", "min": 0.0, "max": 1.0}}},
        r"lr: distribution is 'uniforn'; did you mean 'uniform'\?",
    ),
    "a continuum in a grid": (
        {"parameters": {"lr": {"min": 0.1, "max": 0.2}}},
        "lr: a grid needs value, values, or min and max that are integers",
    ),
    "text for a bound": (
        {"method": "random", "run_cap": 2, "parameters": {"lr": {"min": "1e-4", "max": 1.0}}},
        r"lr: min is '1e-4'; allowed: a number \(YAML reads 1e-4 as text; write 1.0e-4\)",
    ),
    "a bound": (
        {"method": "random", "run_cap": 2, "parameters": {"warmup_ratio": {"min": 0.1, "max": 1.5}}},
        "warmup_ratio: warmup_ratio is 1.5; allowed: 0 <= warmup_ratio < 1",
    ),
    "bounds that are crossed": (
        {"method": "random", "run_cap": 2, "parameters": {"lr": {"min": 0.2, "max": 0.1}}},
        "lr: min is 0.2 and max is 0.1; allowed: min below max",
    ),
    "too many": ({"parameters": {"seed": {"min": 0, "max": 9999}, "window": {"values": [1, 2]}}}, "has 20,000 runs"),
    "together": (
        {"parameters": {"n_heads": {"value": 4}, "n_kv_heads": {"value": 3}}},
        "n_heads: n_heads is 4 and n_kv_heads is 3; n_heads must be a multiple of n_kv_heads",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_invalid_sweep_file_raises_one_line(name, tmp_path):
    """Fault 9: a typo in a settings file is ignored."""
    changes, message = WRONG[name]
    with pytest.raises(ConfigError, match=message) as error:
        made(tmp_path, **changes).runs()
    assert "\n" not in str(error.value)


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-9, 9)
    | st.floats()
    | st.sampled_from(["", "a", "1e-3", "grid", "val_loss"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=3),
    max_leaves=6,
)


@given(
    st.dictionaries(st.sampled_from(sorted(sweep_file.KEYS)), ANYTHING),
    st.dictionaries(st.sampled_from(SETTINGS), ANYTHING),
)
def test_random_sweep_file_is_valid_or_raises_one_line(keys, parameters):
    found = PLAIN | keys | ({"parameters": parameters} if parameters else {})
    try:
        sweep_file._parse_sweep(found, "x").runs()
    except ConfigError as error:
        assert str(error) and "\n" not in str(error)


TEXTS = {
    "a: [": "the file: not YAML, line ",
    "- a": "the file: expected `name: value` lines",
    "": "program is missing",
    "method: grid\nmethod: random": "the file: line 2: 'method' occurs twice",
    "? [1, 2]\n: 3": "the file: ",
    "1: 2": "the file: 1 is not a valid name",
    "a: !!python/object/apply:os.getcwd []": "the file: not YAML, line 1",
    "a: 2020-13-45": "the file: not YAML",
    "a: &a [*a]": "unknown key 'a'",
    "[" * 5000: "the file: not YAML",
}


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text[:12])
def test_sweep_file_without_mapping_raises_one_line(text, tmp_path):
    with pytest.raises(ConfigError) as error:
        made(tmp_path, text=text)
    assert TEXTS[text] in str(error.value) and str(error.value).count("\n") == 0


def test_example_sweep_is_valid_and_accepted_by_wandb():
    sweep = load_sweep(ROOT / "sweeps" / "example.yaml")
    assert len(sweep.runs()) == 12 and all(run.refused is None for run in sweep.runs())
    judged = getattr(pytest.importorskip("sweeps"), "schema_violations_from_proposed_config", None) or pytest.skip(
        "needs W&B's sweeps"
    )
    given = yaml.safe_load((ROOT / "sweeps" / "example.yaml").read_text())
    assert judged(given) == []
    assert judged(given | {"method": "bayess"})  # it does look


def test_wandb_accepts_every_supported_distribution():
    judged = getattr(pytest.importorskip("sweeps"), "schema_violations_from_proposed_config", None) or pytest.skip(
        "needs W&B's sweeps"
    )
    some = {"value": 1, "values": [1, 2], "probabilities": [1.0, 0.0], "min": 1, "max": 2}
    for kind, (needed, other) in KEYS.items():
        about = {"distribution": kind} | {key: some[key] for key in needed} | {key: 1 for key in other}
        assert judged(PLAIN | {"parameters": {"x": about}}) == [], kind
        assert judged(PLAIN | {"parameters": {"x": about | {"mni": 1}}}), kind
