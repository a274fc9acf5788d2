"""Measure training, decoding and first-token speed of a model: `python -m bench.end_to_end`.

One small model (width 256, 6 blocks, 8 heads over 2, SwiGLU x4, window 64, sequence 256, batch 8, vocabulary 97), dense
and with 8 experts, 2 per token. The limit is what the machine's own matmul rate allows: rate / (6 x active parameters)
tokens per second. The rate and all rows are measured alternately in one process, because machines drift. With
--peer PYTHON (an interpreter that has torch and transformers), Mistral and Mixtral of the same sizes take their turns
too, in a process of their own that works only on request.
"""

import json
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import jax
import numpy as np
from flax import nnx
from rich.table import Table

from bench.model.train_step_timer import TrainStepTimer
from dantinox import cli
from dantinox.config import Config
from dantinox.inference import generate
from dantinox.inference.generate import Request, Sampling
from dantinox.metrics.logger import matmul_rate
from dantinox.model import flops
from dantinox.model.transformer import Transformer
from dantinox.system import malloc
from dantinox.system.console import Console

PROG = "bench.end_to_end"
BASE = {
    "vocab_size": 97,
    "dim": 256,
    "n_layers": 6,
    "n_heads": 8,
    "n_kv_heads": 2,
    "head_dim": None,
    "window": 64,
    "attn_gate": "none",
    "mlp_ratio": 4.0,
    "max_context": 256,
    "seq_len": 256,
    "batch_size": 8,
    "dtype": "float32",
}
MOE = {"n_experts": 8, "experts_per_token": 2}


@dataclass(frozen=True)
class Arguments:
    """What to measure."""

    rounds: int = 8
    """Alternating rounds; the result is their median."""
    peer: str | None = None
    """A Python with torch and transformers, to measure their models as well."""
    attn: str = "auto"
    """Implementation of attention."""
    moe: str = "auto"
    """Implementation of the experts."""
    decode: str = "auto"
    """Implementation of cached decoding."""
    out: str | None = None
    """Write the numbers to this JSON file."""
    tiny: bool = False
    """Use a small model: a rehearsal."""


def make_decode_timer(config: Config, prompt: int, new: int) -> Callable[[], tuple[float, float]]:
    """Return a function that decodes greedily and returns (seconds to the first token, seconds per token after it).

    Args:
        config: the model.
        prompt: tokens of the prompt.
        new: tokens to decode after the first.
    """
    model = Transformer(config.model, rngs=nnx.Rngs(0))
    ids = np.random.default_rng(1).integers(0, config.model.vocab_size, prompt).tolist()
    sampling = Sampling.create(temperature=0.0)

    def time_generation(tokens: int) -> float:
        request = Request([ids], tokens, sampling, 0, (), (0,), None)
        start = time.perf_counter()
        for _ in generate.generate_chunks(model, request):
            pass
        return time.perf_counter() - start

    def time_decoding() -> tuple[float, float]:
        first = time_generation(1)
        return first, (time_generation(1 + new) - first) / new

    time_decoding()
    return time_decoding


class TorchBaseline:
    """The process of `model/torch_baseline.py`; it trains one step per request."""

    def __init__(self, python: str) -> None:
        script = Path(__file__).parent / "model" / "torch_baseline.py"
        self._process = subprocess.Popen(
            [python, str(script), json.dumps(BASE | MOE)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )
        self.step("dense"), self.step("moe")

    def step(self, kind: str) -> float:
        """Seconds of one training step of "dense" or "moe"."""
        self._process.stdin.write(kind + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        time.sleep(0.3)  # its threads spin for a while, which must not slow the next measurement
        if not answer:
            raise ValueError("peer: the torch process ended; it needs torch and transformers")
        return float(answer)

    def close(self) -> None:
        """End the process."""
        self._process.kill()


def measure(arguments: Arguments) -> dict[str, dict[str, float]]:
    """Measure all rows: medians over the rounds, with the spread (interquartile range over median)."""
    implementations = {name: getattr(arguments, name) for name in ("attn", "moe", "decode")}
    sizes = BASE | ({"dim": 32, "n_layers": 1, "batch_size": 2, "seq_len": 32} if arguments.tiny else {})
    base = Config().replace(**sizes, **implementations)
    configs = {"dense": base, "moe": base.replace(**MOE)}
    train_timers = {kind: TrainStepTimer(config) for kind, config in configs.items()}
    long = base.replace(max_context=4096)
    decode_timers = {
        "dense, context 256": make_decode_timer(configs["dense"], 128, 127),
        "moe, context 256": make_decode_timer(configs["moe"], 128, 127),
        **({} if arguments.tiny else {"dense, position 4000": make_decode_timer(long, 3968, 127)}),
        "dense, first token of 8 at context 4096": make_decode_timer(long.replace(window=None), 8, 8),
    }
    baseline = TorchBaseline(arguments.peer) if arguments.peer else None
    samples: dict[str, list[float]] = {}

    def record(name: str, value: float) -> None:
        samples.setdefault(name, []).append(value)

    for _ in range(arguments.rounds):
        for kind in train_timers:
            record("rate", matmul_rate("float32", repeats=4))
            record(f"train {kind}", train_timers[kind]())
            if baseline:
                record(f"peer {kind}", baseline.step(kind))
        for name, time_decoding in decode_timers.items():
            first, per_token = time_decoding()
            record(f"first {name}", first)
            record(f"decode {name}", per_token)
    if baseline:
        baseline.close()

    rate = median(samples["rate"])
    tokens = base.train.batch_size * base.train.seq_len
    rows: dict[str, dict[str, float]] = {"matmul": {"GFLOP/s": rate / 1e9, "spread": _spread(samples["rate"])}}
    for name, values in samples.items():
        spread, (kind, *rest) = _spread(values), name.split(maxsplit=1)
        if kind in ("train", "peer"):
            limit = rate / (6 * flops.active_parameters(configs[rest[0]].model))
            speed = tokens / median(values)
            rows[name] = {"tokens/s": speed, "fraction of limit": speed / limit, "spread": spread}
        elif kind == "decode" and "first" not in name:
            rows[name] = {"ms/token": median(values) * 1e3, "spread": spread}
        elif kind == "first" and "first token" in name:
            rows[name] = {"ms": median(values) * 1e3, "spread": spread}
    for kind in configs:
        if baseline:
            ratios = [p / t for p, t in zip(samples[f"peer {kind}"], samples[f"train {kind}"], strict=True)]
            rows[f"train {kind}"]["times the peer"] = median(ratios)
    return rows


def _spread(values: Sequence[float]) -> float:
    low, high = np.percentile(values, [25, 75])
    return float((high - low) / median(values))


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and measure."""
    return run(cli.parse(Arguments, argv, default=Arguments(), prog=PROG, description=__doc__.split("\n")[0]))


def run(arguments: Arguments) -> int:
    """Measure and print a table."""
    malloc.tune_glibc_malloc()
    with cli.one_line_errors(PROG, implementation_flags=cli.IMPLEMENTATION_FLAGS):
        rows = measure(arguments)
    table = Table(title=f"model on {jax.devices()[0].device_kind}, jax {jax.__version__}")
    table.add_column("row")
    table.add_column("measured", justify="right")
    for name, row in rows.items():
        table.add_row(name, ", ".join(f"{key} {value:.3g}" for key, value in row.items()))
    Console().print(table)
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    cli.run_main(main)
