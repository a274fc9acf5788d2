"""A sweep in the form of W&B's own files: read, checked against the settings there are, and laid out as runs.

    program: dantinox/train.py
    method: grid                      or random, which needs run_cap
    metric: {name: val_loss, goal: minimize}
    parameters:                       any flag of dantinox.train but those that name the run
      preset: {value: nano}
      window: {values: [8, 64]}
      lr: {distribution: log_uniform_values, min: 1.0e-4, max: 1.0e-2}

`wandb sweep` takes the same file, with a `command` that says how W&B's agent starts dantinox.train. A run is known by
its settings alone, so that a file may grow: what it asked for before is not run again.
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
OURS = {"run", "runs_dir", "resume", "dry_run", "verbose", "wandb"}  # a sweep names its runs itself
MOST = 10_000  # runs


@dataclass(frozen=True)
class Run:
    """One run of a sweep.

    Attributes:
        name: of its folder; it follows from the values.
        values: of every parameter.
        refused: why these settings do not go together; None where they do.
    """

    name: str
    values: dict[str, Any]
    refused: str | None = None

    @classmethod
    def of(cls, values: dict[str, Any], varied: Sequence[str]) -> "Run":
        """The run of these values; its name shows those that are `varied`."""
        told, refused = values, None
        try:
            told = settings(values).flat()  # what a preset and a file of settings say now is part of it
        except ConfigError as error:
            refused = str(error)
        return cls(folder_name(values, varied, told), values, refused)

    def flags(self, names: Sequence[str] | None = None) -> list[str]:
        """The values as the command line has them; only those of `names`."""
        return [f"--{n.replace('_', '-')}={value}" for n, value in self.values.items() if names is None or n in names]


@dataclass(frozen=True)
class Sweep:
    """A sweep file, checked by itself; `runs` lays it out.

    Attributes:
        varied: names of the parameters that have more than one value.
        run_cap: most runs; None: all of a grid.
    """

    name: str
    method: str
    metric: str
    maximize: bool
    parameters: tuple[Parameter, ...]
    run_cap: int | None

    @property
    def varied(self) -> list[str]:
        return [p.name for p in self.parameters if p.values is None or len(p.values) > 1]

    def runs(self, seed: int = 0) -> list[Run]:
        """The runs in order, no settings twice. Draw i depends on the seed, i and the parameter's name alone.

        Raises:
            ConfigError: a value that no run can have, or a text that is not there; the message is one line.
        """
        drawn = self._grid() if self.method == "grid" else self._random(seed)
        runs: dict[str, Run] = {}
        for values in drawn:
            run = Run.of(values, self.varied)
            runs.setdefault(run.name, run)
            if len(runs) == self.run_cap:
                break
        for parameter in self.parameters:
            for value in parameter.ends:
                self._possible(parameter.name, value, [run.values for run in runs.values()])
        for data in {settings(run.values).data.data for run in runs.values() if run.refused is None}:
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
        for i in range(100 * self.run_cap):  # few values have few combinations
            yield {p.name: p.draw(self._uniform(seed, i, p.name)) for p in self.parameters}

    @staticmethod
    def _uniform(seed: int, draw: int, name: str) -> float:
        return random.Random(f"{seed}/{draw}/{original_name(name)}").random()

    def _possible(self, name: str, value: Any, drawn: list[dict[str, Any]]) -> None:
        """A value that goes with nothing is a mistake of the file; one that goes with something, a matter of a run."""
        names = [p.name for p in self.parameters]
        corners = (dict(zip(names, ends)) for ends in itertools.product(*(p.ends or (None,) for p in self.parameters)))
        wrongs = (problem(values | {name: value}) for values in itertools.chain(drawn, itertools.islice(corners, MOST)))
        first = next(wrongs)
        if first is not None and all(wrongs):
            raise ConfigError(f"{name}: {first}")


def read(path: Path) -> Sweep:
    """The sweep that a file describes.

    Raises:
        ConfigError, OSError: it cannot be read, or a key, flag or value is wrong; the message is one line naming it.
    """
    try:
        text = path.read_text()
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text") from None
    try:
        return _read(load_yaml_mapping(text, "the file"), path.stem)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _read(found: Mapping[str, Any], stem: str) -> Sweep:
    for key in found:
        if key == "early_terminate":
            raise ConfigError("early_terminate is not known here; the parameter patience stops a run early")
        check(key in KEYS, f"unknown key {key!r}; {did_you_mean(key, KEYS)}")
    for key in ("program", "method", "parameters"):
        check(key in found, f"{key} is missing")
    check(found["program"] == PROGRAM, f"program is {found['program']!r}; allowed: {PROGRAM}")
    name = found.get("name", stem)
    check(
        isinstance(name, str) and name not in ("", ".", "..") and "/" not in name and "\\" not in name,
        f"name is {name!r}; allowed: a plain folder name",
    )
    method = found["method"]
    check(method in ("grid", "random"), f"method is {method!r}; allowed: grid, random")
    cap = found.get("run_cap")
    whole = isinstance(cap, int) and not isinstance(cap, bool) and 1 <= cap <= MOST
    check(cap is None or whole, f"run_cap is {cap!r}; allowed: 1 to {MOST}")
    check(cap is not None or method == "grid", "run_cap is missing; a random sweep has no other end")
    _check_command(found.get("command"))
    metric, maximize = _metric(found.get("metric", {"name": "val_loss"}))
    parameters = _parameters(found["parameters"])
    if method == "grid":
        for p in parameters:
            check(p.values is not None, f"{p.name}: a grid needs value, values, or min and max that are integers")
        total = math.prod(len(p.values) for p in parameters)
        check(cap is not None or total <= MOST, f"the grid has {total:,} runs; allowed: {MOST:,}, or a run_cap")
    return Sweep(name, method, metric, maximize, tuple(parameters), cap)


def _metric(found: Any) -> tuple[str, bool]:
    check(isinstance(found, dict), f"metric is {found!r}; allowed: name and goal")
    for key in found:
        check(key in ("name", "goal"), f"metric: unknown key {key!r}; {did_you_mean(key, ('name', 'goal'))}")
    name, goal = found.get("name"), found.get("goal", "minimize")
    known = name in METRICS or (isinstance(name, str) and name.startswith("router/"))
    check(known, f"metric: name is {name!r}; {did_you_mean(name, METRICS)}")
    check(goal in ("minimize", "maximize"), f"metric: goal is {goal!r}; allowed: minimize, maximize")
    return name, goal == "maximize"


def _check_command(words: Any) -> None:
    """What W&B's agent is to run must be what we run, or the same file would mean two things."""
    if words is None:
        return
    check(isinstance(words, list) and "dantinox.train" in words, f"command is {words!r}; it must run dantinox.train")
    after = words[words.index("dantinox.train") + 1 :]
    check("${args}" in after, "command: ${args} is missing after dantinox.train")
    for word in after:
        check(word in ("${args}", "--wandb"), f"command: {word!r} belongs below parameters, with a value")


def _parameters(found: Any) -> list[Parameter]:
    check(isinstance(found, dict) and len(found) > 0, "parameters are missing; allowed: flags of dantinox.train")
    known = {*Config().flat(), "preset", "config"} - OURS
    parameters = []
    for name, about in found.items():
        check(name not in OURS, f"{name} cannot be a parameter: the sweep decides it")
        check(ALIASES.get(name, name) in known, f"unknown parameter {name!r}; {did_you_mean(name, known)}")
        twin = next((p.name for p in parameters if original_name(p.name) == original_name(name)), None)
        check(twin is None, f"{twin} and {name} are one parameter; give {ALIASES.get(name, name)} only")
        try:
            parameters.append(Parameter.read(name, about))
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from None
    return parameters


def settings(values: Mapping[str, Any]) -> Config:
    """What dantinox.train makes of these flags.

    Raises:
        ConfigError: they cannot be, or do not go together.
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


def problem(values: Mapping[str, Any]) -> str | None:
    """Why there can be no run of these values; None where there can."""
    try:
        settings(values)
    except ConfigError as error:
        return str(error)
    return None


def folder_name(values: Mapping[str, Any], varied: Sequence[str], told: Mapping[str, Any]) -> str:
    """What was varied, to be read, and a hash of all that was `told`, to be sure."""
    digest = hashlib.sha256(json.dumps(original_names(told), sort_keys=True).encode()).hexdigest()[:8]
    shown = "_".join(f"{name}={values[name]}" for name in varied)
    return f"{re.sub(r'[^A-Za-z0-9_.=+-]', '-', shown)[:100] or 'run'}_{digest}".lstrip(".-")
