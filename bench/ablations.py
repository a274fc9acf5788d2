"""Measure what each feature of the model costs: change one setting of a config at a time (`python -m bench.ablations`).

For each ablation: parameters, matmul FLOPs per token, peak memory of a compiled training step, tokens per second. The
variants take turns, so ratios hold on a machine that drifts.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import jax
from rich.progress import track
from rich.table import Table

from bench.model.train_step_timer import TrainStepTimer
from bench.report import results
from bench.report.console_table import size
from dantinox import cli, kernels
from dantinox.config import Config
from dantinox.model import flops
from dantinox.system import malloc
from dantinox.system.console import Console

PROG = "bench.ablations"


@dataclass(frozen=True)
class Arguments:
    """What to change, and of which config."""

    preset: str = "nano"
    """Name of the base config."""
    rounds: int = 5
    """Turns of each variant; the result is their median."""
    only: tuple[str, ...] = ()
    """Ablations by name (default: all)."""
    out: str | None = None
    """Folder for <device>/<date>-ablations.json and .svg (default: profiles, or runs/bench if an implementation is
    not built in)."""


def base_config(preset: str) -> Config:
    """Load the preset, with the dtype of this device and the vocabulary size that its tokenizer would have."""
    config = Config.from_preset(preset)
    config = config.replace(dtype=config.model.resolved_dtype)
    return config.replace(vocab_size=config.data.bpe_vocab_size) if config.data.tokenizer == "bpe" else config


def make_variants(base: Config) -> dict[str, dict[str, Any]]:
    """Map the name of each ablation to the settings that it changes.

    Features that the base has are switched off, and others are switched on.
    """
    model, train = base.model, base.train
    active = model.experts_per_token + model.shared_expert
    # Experts and a dense layer with as many active parameters per token, apart from the router's.
    same_active = {"n_experts": 0, "mlp_ratio": model.mlp_ratio * active}
    if not model.n_experts:
        same_active = {"n_experts": 8, "mlp_ratio": model.mlp_ratio / active}
    changes: dict[str, dict[str, Any]] = {
        "base": {},
        "8 experts, as many active" if not model.n_experts else "no experts, as many active": same_active,
        "8 experts, 2 per token" if not model.n_experts else "no experts": {"n_experts": 0 if model.n_experts else 8},
        "no window" if model.window else "window 64": {"window": None if model.window else 64},
        "no gate" if model.attn_gate != "none" else "attn_gate": {
            "attn_gate": "none" if model.attn_gate != "none" else "head"
        },
        "gate per channel": {"attn_gate": "elementwise"},
        "all heads have keys": {"n_kv_heads": model.n_heads},
        "one key head": {"n_kv_heads": 1},
        "untied" if model.tie_embeddings else "tied": {"tie_embeddings": not model.tie_embeddings},
        "recompute blocks" if model.remat != "block" else "keep blocks": {
            "remat": "none" if model.remat == "block" else "block"
        },
        "recompute all but matmuls": {"remat": "dots"},
        "accumulate 4" if train.grad_accum == 1 else "accumulate 1": {"grad_accum": 4 if train.grad_accum == 1 else 1},
    }
    for field, op in (("attn", "attention"), ("moe", "moe_mlp"), ("loss", "linear_cross_entropy")):
        if field == "moe" and not model.n_experts:
            continue
        for name, reason in kernels.implementations(op).items():
            if reason is None:
                changes[f"{field} {name}"] = {field: name}
    return {name: change for name, change in changes.items() if name == "base" or base.replace(**change) != base}


def measure(base: Config, changes: Mapping[str, Mapping[str, Any]], rounds: int) -> dict[str, dict[str, Any]]:
    """Measure every variant.

    Args:
        base: the config.
        changes: the settings of each variant, by name.
        rounds: turns of each variant.

    Returns:
        Name -> parameters, active parameters, FLOPs per token, peak bytes, tokens per second and its spread.
    """
    timers = {
        name: TrainStepTimer(base.replace(**change))
        for name, change in track(
            changes.items(), description="compiling", transient=True, console=Console(stderr=True)
        )
    }
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    for number in range(rounds):
        for name in list(timers)[:: 1 if number % 2 else -1]:  # alternate the order, so that no variant is always last
            seconds[name].append(min(timers[name](), timers[name]()))  # in the first call, the cache is cold
    rows = {}
    for name, timer in timers.items():
        config, times = timer.config, sorted(seconds[name])
        rows[name] = {
            "parameters": flops.total_parameters(config.model),
            "active": flops.active_parameters(config.model),
            "flops_per_token": flops.flops_per_token(config.model, config.train.seq_len),
            "peak_bytes": timer.peak_bytes,
            "tokens_per_second": round(timer.tokens / median(times), 1),
            "spread": round((times[len(times) * 3 // 4] - times[len(times) // 4]) / median(times), 3),
        }
    return rows


def show(rows: Mapping[str, Mapping[str, Any]], title: str, console: Console) -> None:
    """Print a table, with ratios to the base in parentheses."""
    table = Table(title=title, title_justify="left")
    for name in ("ablation", "parameters", "FLOPs per token", "peak memory", "tokens/s"):
        table.add_column(name, justify="left" if name == "ablation" else "right", no_wrap=True)
    base = next(iter(rows.values()))

    def ratio(row: Mapping[str, Any], key: str) -> str:
        return "" if row is base else f" ({row[key] / base[key]:.2f}x)"

    for name, row in rows.items():
        table.add_row(
            name,
            f"{row['parameters'] / 1e6:.2f}M" + ratio(row, "parameters"),
            f"{row['flops_per_token'] / 1e6:.1f}M" + ratio(row, "flops_per_token"),
            size(row["peak_bytes"]) + ratio(row, "peak_bytes"),
            f"{row['tokens_per_second']:.0f}" + ratio(row, "tokens_per_second"),
        )
    console.print(table)


def plot(rows: Mapping[str, Mapping[str, Any]], title: str) -> str:
    """Draw four bar charts of ratios to the base, as SVG text."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    from bench.report.plots import svg

    names, base = list(rows), next(iter(rows.values()))
    figure = Figure(figsize=(11, 0.32 * len(names) + 1.4), layout="constrained")
    FigureCanvasSVG(figure)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    panels = figure.subplots(1, 4, sharey=True)
    labels = {"parameters": "parameters", "flops_per_token": "FLOPs per token", "peak_bytes": "peak memory"}
    for axes, (key, label) in zip(panels, (labels | {"tokens_per_second": "tokens/s"}).items(), strict=True):
        values = [rows[name][key] / base[key] for name in names]
        axes.barh(names, values, color=["#1b1b1b" if name == names[0] else "#1f3a5f" for name in names], height=0.6)
        axes.axvline(1, color="#a01c20", lw=0.8)
        for i, value in enumerate(values):
            axes.annotate(
                f"{value:.2f}", (value, i), xytext=(3, 0), textcoords="offset points", va="center", fontsize=7
            )
        axes.set_title(f"{label}, relative to the base", fontsize=9, loc="left")
        axes.set_xlim(0, max(values) * 1.2)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    panels[0].invert_yaxis()
    return svg(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and measure."""
    return run(cli.parse(Arguments, argv, default=Arguments(), prog=PROG, description=__doc__.split("\n")[0]))


def run(arguments: Arguments) -> int:
    """Measure, print and write."""
    malloc.tune_glibc_malloc()
    with cli.one_line_errors(PROG):
        if arguments.rounds < 1:
            raise ValueError(f"--rounds is {arguments.rounds}; allowed: 1 or more")
        base = base_config(arguments.preset)
        changes = make_variants(base)
        for name in arguments.only:
            if name not in changes:
                raise ValueError(f"--only {name!r} is not an ablation; allowed: {', '.join(repr(n) for n in changes)}")
        if arguments.only:
            changes = {name: change for name, change in changes.items() if name == "base" or name in arguments.only}
        rows = measure(base, changes, arguments.rounds)
        device = jax.devices()[0].device_kind
        title = f"{arguments.preset} in {base.model.dtype} on {device}, jax {jax.__version__}: a training step"
        show(rows, title, Console(width=max(100, Console().width)))
        today = str(datetime.date.today())
        tried = ["auto", *(name for change in changes.values() for name in (change.get("attn"), change.get("moe")))]
        custom = results.custom_implementations(("attention", "moe_mlp"), tried)
        out = arguments.out or ("runs/bench" if custom else "profiles")
        folder = Path(out) / results.device_folder(jax.default_backend(), device)
        folder.mkdir(parents=True, exist_ok=True)
        document = {"date": today, "device": device, "versions": {"jax": jax.__version__}, "preset": arguments.preset}
        document["dtype"] = base.model.dtype
        path = folder / f"{today}-ablations.json"
        path.write_text(json.dumps(document | {"rows": rows}, indent=1) + "\n", "utf-8")
        path.with_suffix(".svg").write_text(plot(rows, title), "utf-8")
        print(path, path.with_suffix(".svg"))
    return 0


if __name__ == "__main__":
    cli.run_main(main)
