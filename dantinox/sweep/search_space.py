"""Sweep files in the format of W&B: parsing, validation against the settings, and the list of runs.

    program: dantinox/train.py
    method: grid                      or random, which needs run_cap
    metric: {name: val_loss, goal: minimize}
    parameters:                       any flag of dantinox.train except those that name the run
      preset: {value: nano}
      window: {values: [8, 64]}
      lr: {distribution: log_uniform_values, min: 1.0e-4, max: 1.0e-2}

`wandb sweep` accepts the same file, with a `command` for W&B's agent that starts dantinox.train. Runs are identified
by their settings, so a file may be extended without training earlier runs again.
"""

import functools
import hashlib
import itertools
import json
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dantinox.config import Config, ConfigError, coerce_numbers
from dantinox.config.aliases import ALIASES, original_name, original_names
from dantinox.config.validation import check, did_you_mean
from dantinox.config.yaml_loader import load_yaml_mapping
from dantinox.data.corpus import find_files
from dantinox.sweep.distributions import Parameter

PROGRAM = "dantinox/train.py"
KEYS = {"program", "name", "description", "project", "entity", "method", "metric", "parameters", "run_cap", "command"}
METRICS = ("val_loss", "loss", "grad_norm", "balance", "router_z", "tokens_per_s", "mfu")  # and router/KIND.LAYER
RESERVED = {"run", "runs_dir", "resume", "dry_run", "verbose", "wandb"}  # set by the sweep
MAX_RUNS = 10_000


@dataclass(frozen=True)
class Run:
    """One run of a sweep.

    Attributes:
        name: name of the folder, derived from the values.
        values: value of every parameter.
        refused: why the settings are invalid together; None if they are valid.
    """

    name: str
    values: dict[str, Any]
    refused: str | None = None

    @classmethod
    def from_values(cls, values: dict[str, Any], varied: Sequence[str]) -> "Run":
        """Create the run of these values; its name shows those that are `varied`."""
        hashed, refused = values, None
        try:
            hashed = resolve_settings(values).flat()  # includes the content of the preset and of a settings file
        except ConfigError as error:
            refused = str(error)
        return cls(folder_name(values, varied, hashed), values, refused)

    def flags(self, names: Sequence[str] | None = None) -> list[str]:
        """Return the values as flags; only those of `names`, if given."""
        return [f"--{n.replace('_', '-')}={value}" for n, value in self.values.items() if names is None or n in names]


@dataclass(frozen=True)
class Sweep:
    """A validated sweep file; `runs` lists its runs.

    Attributes:
        run_cap: maximum number of runs; None: the whole grid.
    """

    name: str
    method: str
    metric: str
    maximize: bool
    parameters: tuple[Parameter, ...]
    run_cap: int | None

    @property
    def varied(self) -> list[str]:
        """Names of the parameters with more than one value."""
        return [p.name for p in self.parameters if p.values is None or len(p.values) > 1]

    def runs(self, seed: int = 0) -> list[Run]:
        """Return the runs in order, without duplicates. Draw i depends only on the seed, i and the parameter's name.

        Raises:
            ConfigError: a value is invalid in every run, or a text does not exist; the message is one line.
        """
        all_values = self._grid() if self.method == "grid" else self._random(seed)
        runs: dict[str, Run] = {}
        for values in all_values:
            run = Run.from_values(values, self.varied)
            runs.setdefault(run.name, run)
            if len(runs) == self.run_cap:
                break
        for parameter in self.parameters:
            for value in parameter.ends:
                self._check_possible(parameter.name, value, [run.values for run in runs.values()])
        for data in {resolve_settings(run.values).data.data for run in runs.values() if run.refused is None}:
            try:
                next(find_files(data), None)
            except OSError as error:
                text = f"{error.filename}: {error.strerror}" if error.filename is not None else error
                raise ConfigError(f"data: {text}") from None
        return list(runs.values())

    def _grid(self) -> Iterator[dict[str, Any]]:
        names = [p.name for p in self.parameters]
        return (dict(zip(names, values)) for values in itertools.product(*(p.values for p in self.parameters)))

    def _random(self, seed: int) -> Iterator[dict[str, Any]]:
        for i in range(100 * self.run_cap):  # more draws than runs, because draws may repeat
            yield {p.name: p.draw(self._uniform(seed, i, p.name)) for p in self.parameters}

    @staticmethod
    def _uniform(seed: int, draw: int, name: str) -> float:
        return random.Random(f"{seed}/{draw}/{original_name(name)}").random()

    def _check_possible(self, name: str, value: Any, run_values: list[dict[str, Any]]) -> None:
        """Raise `ConfigError` if a value is invalid in every run; if only in some, those runs are refused."""
        names = [p.name for p in self.parameters]
        corners = (dict(zip(names, ends)) for ends in itertools.product(*(p.ends or (None,) for p in self.parameters)))
        errors = (
            settings_error(values | {name: value})
            for values in itertools.chain(run_values, itertools.islice(corners, MAX_RUNS))
        )
        first = next(errors)
        if first is not None and all(errors):
            raise ConfigError(f"{name}: {first}")


def load_sweep(path: Path) -> Sweep:
    """Load a sweep file.

    Raises:
        ConfigError, OSError: the file cannot be read, or a key, flag or value is invalid; the message names it.
    """
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text") from None
    try:
        return _parse_sweep(load_yaml_mapping(text, "the file"), path.stem)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _parse_sweep(content: Mapping[str, Any], stem: str) -> Sweep:
    for key in content:
        if key == "early_terminate":
            raise ConfigError("early_terminate is not supported; use the parameter patience to stop runs early")
        check(key in KEYS, f"unknown key {key!r}; {did_you_mean(key, KEYS)}")
    for key in ("program", "method", "parameters"):
        check(key in content, f"{key} is missing")
    check(content["program"] == PROGRAM, f"program is {content['program']!r}; allowed: {PROGRAM}")
    name = content.get("name", stem)
    check(
        isinstance(name, str) and name not in ("", ".", "..") and "/" not in name and "\\" not in name,
        f"name is {name!r}; allowed: a plain folder name",
    )
    method = content["method"]
    check(method in ("grid", "random"), f"method is {method!r}; allowed: grid, random")
    cap = content.get("run_cap")
    is_valid = isinstance(cap, int) and not isinstance(cap, bool) and 1 <= cap <= MAX_RUNS
    check(cap is None or is_valid, f"run_cap is {cap!r}; allowed: 1 to {MAX_RUNS}")
    check(cap is not None or method == "grid", "run_cap is missing; a random sweep needs it")
    _check_command(content.get("command"))
    metric, maximize = _parse_metric(content.get("metric", {"name": "val_loss"}))
    parameters = _parse_parameters(content["parameters"])
    if method == "grid":
        for p in parameters:
            check(p.values is not None, f"{p.name}: a grid needs value, values, or min and max that are integers")
        total = math.prod(len(p.values) for p in parameters)
        check(cap is not None or total <= MAX_RUNS, f"the grid has {total:,} runs; allowed: {MAX_RUNS:,}, or a run_cap")
    return Sweep(name, method, metric, maximize, tuple(parameters), cap)


def _parse_metric(metric: Any) -> tuple[str, bool]:
    check(isinstance(metric, dict), f"metric is {metric!r}; allowed: name and goal")
    for key in metric:
        check(key in ("name", "goal"), f"metric: unknown key {key!r}; {did_you_mean(key, ('name', 'goal'))}")
    name, goal = metric.get("name"), metric.get("goal", "minimize")
    is_metric = name in METRICS or (isinstance(name, str) and name.startswith("router/"))
    check(is_metric, f"metric: name is {name!r}; {did_you_mean(name, METRICS)}")
    check(goal in ("minimize", "maximize"), f"metric: goal is {goal!r}; allowed: minimize, maximize")
    return name, goal == "maximize"


def _check_command(words: Any) -> None:
    """Check that W&B's agent would train the same runs."""
    if words is None:
        return
    check(isinstance(words, list) and "dantinox.train" in words, f"command is {words!r}; it must run dantinox.train")
    arguments = words[words.index("dantinox.train") + 1 :]
    check("${args}" in arguments, "command: ${args} is missing after dantinox.train")
    for word in arguments:
        check(word in ("${args}", "--wandb"), f"command: {word!r} belongs below parameters, with a value")


def _parse_parameters(parameters: Any) -> list[Parameter]:
    check(
        isinstance(parameters, dict) and len(parameters) > 0, "parameters are missing; allowed: flags of dantinox.train"
    )
    allowed = {*Config().flat(), "preset", "config"} - RESERVED
    result = []
    for name, specification in parameters.items():
        check(name not in RESERVED, f"{name} cannot be a parameter; the sweep sets it")
        check(ALIASES.get(name, name) in allowed, f"unknown parameter {name!r}; {did_you_mean(name, allowed)}")
        duplicate = next((p.name for p in result if original_name(p.name) == original_name(name)), None)
        check(duplicate is None, f"{duplicate} and {name} are one parameter; give {ALIASES.get(name, name)} only")
        try:
            result.append(Parameter.parse(name, specification))
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from None
    return result


def resolve_settings(values: Mapping[str, Any]) -> Config:
    """Return the settings of dantinox.train with these flags.

    Raises:
        ConfigError: a flag is invalid, alone or with the others.
    """
    flags = dict(values)
    config = _preset(flags.pop("preset", "nano"))
    if (file := flags.pop("config", None)) is not None:
        check(isinstance(file, str), f"config is {file!r}; allowed: the path of a YAML file")
        config = Config.from_yaml(file, config)
    return config.replace(**coerce_numbers(flags, "the value"))


@functools.cache
def _preset(name: Any) -> Config:
    return Config.from_preset(name)


def settings_error(values: Mapping[str, Any]) -> str | None:
    """Return why these values are invalid; None if they are valid."""
    try:
        resolve_settings(values)
    except ConfigError as error:
        return str(error)
    return None


def folder_name(values: Mapping[str, Any], varied: Sequence[str], hashed: Mapping[str, Any]) -> str:
    """Return the varied values, for readability, and a hash of all settings, for uniqueness."""
    digest = hashlib.sha256(json.dumps(original_names(hashed), sort_keys=True).encode()).hexdigest()[:8]
    label = "_".join(f"{name}={values[name]}" for name in varied)
    return f"{re.sub(r'[^A-Za-z0-9_.=+-]', '-', label)[:100] or 'run'}_{digest}".lstrip(".-")
