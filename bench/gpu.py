"""Everything worth knowing about a device in one bounded command: `python -m bench.gpu --out DIR [--minutes 9]`.

In order of importance, each part in a process of its own, each written as soon as it is there, so that a part that
hangs, crashes or finds no time left takes nothing with it:

    environment   device, driver, versions, ceilings
    tensor_cores  the Pallas attention at its sizes, every feature: outputs and gradients by the error rule of the tests
    tensor_core_groups, tensor_core_experts    so for grouped products and experts, at every width of their tiles
    attention-*, grouped-*, moe-*    the rows that kernels are judged by, one a part: the kernel beside cuDNN, tokamax
                  and XLA, the ceilings sampled in between; the first of each operation first
    tiles         the grouped kernels at every width of their tiles, and the constants of tiles.py that fit the times
    moe_kernel_times, kernel_times    forward and backward of a mixture and of attention traced, kernel by kernel
    parity        every row of the parity table, every implementation that runs here, by the same rule
    attention, grouped_matmul, moe_mlp, decode_attention    the rows of this machine, kernels beside XLA and the peers
    trace         one training step's kernels with their times, by the Pallas attention
    toggles       each feature of the model flipped
    model         tokens/s of training, milliseconds a decoded token

Contests are also written one by one, into <part>.jsonl. On a CPU the same command is a rehearsal: a tiny version of
each part, Hopper's attention interpreted. What a time limit cut, the last lines and summary.json say.
"""

import importlib.util
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from bench.results import ROOT
from dantinox import cli

PROG = "bench.gpu"
MARGIN = 5.0  # seconds kept back for writing and stopping
HANGS = 75  # seconds after which a test's process is given up; another goes on with the next test
JUDGED = {  # attention is judged by these rows: part -> row
    "attention-d128-causal": "16k d128 causal",
    "attention-window": "H100 S=16384",
    "attention-window-gate": "16k d128 window 1024, gate",
    "attention-d64-causal": "16k d64 causal",
    "attention-d256-causal": "16k d256 causal",
    "attention-d128-causal-gate": "16k d128 causal, gate",
}
BESIDE = ("pallas", "jax.nn cudnn", "tokamax")
GROUPED = {  # so for grouped products and experts: part -> operation, row
    "grouped-mixtral": ("grouped_matmul", "Mixtral-8x7B uniform"),
    "moe-mixtral": ("moe_mlp", "Mixtral-8x7B uniform"),
    "grouped-256-experts": ("grouped_matmul", "256 experts, narrow"),
    "grouped-128-groups": ("grouped_matmul", "128 groups"),
}
# With hundreds of groups XLA's own would take the time, or the memory, of all: it has its turn in the last parts.
BESIDE_GROUPED = ("pallas", "one dense matmul", "tokamax")
ENVIRONMENT = "import sys; from bench import gpu; gpu.write_environment(sys.argv[1])"


@dataclass(frozen=True)
class Arguments:
    """Where to, and how long."""

    out: str
    """Folder for the results, <device>/... as in profiles/."""
    minutes: float = 9.0
    """The command ends before."""
    only: tuple[str, ...] = ()
    """Parts by name; none: all."""
    tiny: bool | None = None
    """The smallest version of each part; default: on a CPU."""


class Part(NamedTuple):
    """One command; `share` is the most of the whole time that it may take."""

    name: str
    command: list[str]
    share: float


def parts(out: Path, tiny: bool, seconds: float) -> list[Part]:
    """All parts in order, for a command of so many seconds."""
    run = lambda module, *flags: [sys.executable, "-m", module, *flags]
    to = ("--out", str(out))
    cores, groups = (f"tests/parity/test_tensor_core_{name}.py" for name in ("sizes", "groups"))
    rule = "keeps_the_rule and one and float32" if tiny else "keeps_the_rule"
    test = ["-v", "-x" if tiny else "--maxfail=40", "-p", "no:cacheprovider"]
    if not tiny and importlib.util.find_spec("xdist"):
        # Compiling is most of a test. A kernel that never ends takes one test with it, not the part.
        test += ["-n", "4", "-o", f"faulthandler_timeout={HANGS}", "-o", "faulthandler_exit_on_timeout=true"]
    interpreted = ("tests/parity/test_hopper.py", "tests/parity/test_hopper_backward.py") if tiny else ()
    row = {
        "attention": ("nano",),
        "grouped_matmul": ("E=8",),
        "moe_mlp": ("nano-moe",),
        "decode_attention": ("C=512, full",),
    }
    quick = ("--budget", "0.1", "--implementation", "xla", "lax.ragged_dot")

    def bench(name: str, op: str, share: float, chosen: Sequence[str]) -> Part:
        # It stops by itself at three quarters of its time, and so writes what it has.
        limit = ("--seconds", f"{0.75 * share * seconds:.0f}")
        files = ("--html", str(out / f"{name}.html"), "--lines", str(out / f"{name}.jsonl"))
        return Part(name, run("bench", "--op", op, *chosen, *limit, *to, *files), share)

    beside = ("--budget", "0.6", "--implementation", *BESIDE)
    judged = [bench(name, "attention", 0.1, ("--spec", spec, *beside)) for name, spec in JUDGED.items()]
    few = lambda name: (*BESIDE_GROUPED, *(("lax.ragged_dot", "triton") if name.endswith("mixtral") else ()))
    grouped = [
        # Seven kernels are compiled for a mixture's gradients, three for a product's.
        bench(
            name,
            op,
            0.13 if op == "moe_mlp" else 0.08,
            ("--spec", spec, "--budget", "0.6", "--implementation", *few(name)),
        )
        for name, (op, spec) in GROUPED.items()
    ]
    if tiny:  # one is as good as six
        judged = [bench(next(iter(JUDGED)), "attention", 0.1, ("--spec", *row["attention"], *quick))]
        grouped = [bench("grouped-mixtral", "grouped_matmul", 0.1, ("--spec", *row["grouped_matmul"], *quick))]
    limit = ("--tiny", "--rounds", "1", "--seconds", "30") if tiny else ("--seconds", f"{0.09 * seconds:.0f}")
    kept = ("--json", str(out / "tiles.json"), "--lines", str(out / "tiles.jsonl"))
    tiles = Part("tiles", run("bench.tiles", *limit, *kept), 0.15)
    ops = [
        bench(op, op, share, ("--spec", *row[op], *quick) if tiny else ())
        for op, share in zip(row, (0.3, 0.2, 0.15, 0.1), strict=True)
    ]

    def times(name: str, op: str, spec: str) -> Part:
        spec, steps = (row[op][0], "1") if tiny else (spec, "3")
        command = run("bench.profile", "--op", op, "--spec", spec, "--implementation", "pallas", "--backward")
        return Part(
            name, [*command, "--steps", steps, "--out", str(out / name), "--json", str(out / f"{name}.json")], 0.1
        )

    preset = "nano" if tiny else "h100"
    trace = run("bench.profile", "--preset", preset, "--steps", "2", "--out", str(out / "trace"))
    trace += ["--json", str(out / "trace.json"), *(() if tiny else ("--attn", "pallas"))]
    toggles = run("bench.toggles", "--preset", "nano" if tiny else "dante", "--rounds", "1" if tiny else "10", *to)
    model = run("bench.model", "--rounds", "1" if tiny else "5", "--out", str(out / "model.json"))
    if tiny:
        toggles += ["--only", "no gate"]
    return [
        Part("environment", [sys.executable, "-c", ENVIRONMENT, str(out / "environment.json")], 0.1),
        Part("tensor_cores", run("pytest", *test, cores, *interpreted), 0.2),
        Part("tensor_core_groups", run("pytest", *test, groups, "-k", "not experts"), 0.12),
        Part("tensor_core_experts", run("pytest", *test, groups, "-k", "experts"), 0.15),
        *judged[:1],
        *grouped[:2],
        *judged[1:3],
        *grouped[2:],
        tiles,
        times("moe_kernel_times", *GROUPED["moe-mixtral"]),
        *judged[3:],
        times("kernel_times", "attention", JUDGED["attention-window-gate"]),
        Part(
            "parity", run("pytest", *test, "-k", rule, f"--ignore={cores}", f"--ignore={groups}", "tests/parity"), 0.2
        ),
        *ops,
        Part("trace", trace, 0.15),
        Part("toggles", toggles, 0.15),
        Part("model", model, 0.15),
    ]


def perform(chosen: Sequence[Part], out: Path, deadline: float, console: Console) -> list[dict[str, Any]]:
    """Run the parts until the deadline (of `time.monotonic`); what each gave, also written to summary.json."""
    whole = deadline - time.monotonic()
    done: list[dict[str, Any]] = []
    for part in chosen:
        left = deadline - time.monotonic() - MARGIN
        if left < 1:
            done.append({"part": part.name, "result": "no time left"})
        else:
            console.print(f"[bold]{part.name}[/] (at most {min(left, part.share * whole):.0f} s)", highlight=False)
            done.append(_one(part, out, min(left, part.share * whole)))
        console.print(f"  {said(done[-1])}", highlight=False)
        (out / "summary.json").write_text(json.dumps(done, indent=1) + "\n")
    return done


def said(done: dict[str, Any]) -> str:
    """One part's result in a line: how it ended, and of tests and contests how many there are."""
    words = [done["result"]]
    if "tests" in done:
        counts = dict(done["tests"])
        words.append(", ".join(f"{n} {what}" for what, n in counts.items() if what != "of") or "no test ended")
        words[-1] += f" of {counts['of'] or 'an unknown number'}"
    if "contests" in done:
        words.append(f"{done['contests']} contests")
    return ", ".join([*words, f"{done.get('seconds', 0)} s"])


def verdict(done: Sequence[dict[str, Any]], tiny: bool) -> list[str]:
    """What the whole run was worth, in plain lines."""
    names = lambda word: [part["part"] for part in done if part["result"].startswith(word)]
    lines = [f"{len(names('done'))} of {len(done)} parts done"]
    for word, title in (("failed", "failed"), ("cut", "cut short"), ("no time", "no time left for")):
        lines += [f"{title}: {', '.join(names(word))}"] if names(word) else []
    if tiny:
        lines.append("a rehearsal at tiny sizes: it shows that the parts run, not how fast anything is")
    return lines


def _one(part: Part, out: Path, limit: float) -> dict[str, Any]:
    """Run one part with a time limit; its output goes to <part>.log."""
    start = time.monotonic()
    log = out / f"{part.name}.log"
    with log.open("w") as file:
        # A session of its own: a part that is stopped takes its children along.
        streams = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT}
        # Test processes that run beside each other share the memory.
        env = os.environ | ({"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if "-n" in part.command else {})
        process = subprocess.Popen(part.command, cwd=ROOT, env=env, start_new_session=True, **streams)
        try:
            code = process.wait(limit)
            result = "done" if code == 0 else f"failed with exit code {code}: {_last_line(log)}"
        except subprocess.TimeoutExpired:
            result = f"cut short after {limit:.0f} s"
        finally:
            for kill in (signal.SIGTERM, signal.SIGKILL):
                if process.poll() is None:
                    os.killpg(process.pid, kill)
                    try:
                        process.wait(2)
                    except subprocess.TimeoutExpired:
                        continue
    found = {"part": part.name, "result": result, "seconds": round(time.monotonic() - start, 1)}
    if "pytest" in part.command:
        found["tests"] = outcomes(log.read_text(errors="replace"))
    if (lines := out / f"{part.name}.jsonl").exists():
        found["contests"] = len(lines.read_text().splitlines())
    return found


def outcomes(log: str) -> dict[str, int]:
    """What `pytest -v` has said so far: the tests there are (0 where it did not get to counting them), and how many had
    which outcome."""
    selected = re.search(r"/ (\d+) selected|collected (\d+) items?$|workers? \[(\d+) items?\]", log, re.M)
    there = next((int(n) for n in selected.groups() if n), 0) if selected else 0
    ended = r"(PASSED|FAILED|SKIPPED|ERROR)"  # before the test's name where several processes share them
    found = re.findall(rf"(?m)^(?:\[gw\d+\] \[.*?\] {ended} |\S+::.* {ended}\b)", log)
    return {"of": there} | Counter((one or other).lower() for one, other in found)


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:200] if lines else "no output"


def environment() -> dict[str, Any]:
    """Device, driver and versions, and the ceilings of this device."""
    from importlib.metadata import PackageNotFoundError, version

    import jax

    from bench.ceilings import Ceilings
    from bench.clock import clock

    def versions() -> Iterator[tuple[str, str]]:
        for name in ("jax", "jaxlib", "flax", "optax", "jax-cuda13-plugin", "jax-cuda12-plugin", "libtpu", "tokamax"):
            try:
                yield name, version(name)
            except PackageNotFoundError:
                continue

    ceilings = Ceilings(clock())
    for dtype in ("float32",) if jax.default_backend() == "cpu" else ("bfloat16", "float32"):
        for _ in range(5):
            ceilings.sample(dtype)
    query = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
    except (FileNotFoundError, subprocess.TimeoutExpired):
        driver = ""
    return {
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "nvidia-smi": driver,
        "clock": clock().name,
        "ceilings": ceilings.summary(),
        "python": platform.python_version(),
        "versions": dict(versions()),
    }


def write_environment(path: str) -> None:
    """The environment as a JSON file."""
    Path(path).write_text(json.dumps(environment(), indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run all parts; exit code 1 where one failed, its reason in summary.json."""
    start = time.monotonic()
    arguments = cli.parse(
        Arguments,
        argv,
        default=Arguments(out="profiles"),
        prog=PROG,
        description=__doc__.split("\n")[0],
    )
    console = Console(width=max(100, Console().width))
    with cli.user_errors(PROG):
        if not arguments.minutes > 0.1:
            raise ValueError(f"--minutes is {arguments.minutes}; allowed: more than 0.1")
        tiny = arguments.tiny
        if tiny is None:
            tiny = _platform() == "cpu"
        out = Path(arguments.out).absolute()
        out.mkdir(parents=True, exist_ok=True)
        chosen = parts(out, tiny, arguments.minutes * 60)
        for name in arguments.only:
            if name not in [part.name for part in chosen]:
                raise ValueError(f"--only {name!r} is no part; allowed: {', '.join(part.name for part in chosen)}")
        chosen = [part for part in chosen if not arguments.only or part.name in arguments.only]
        for part in chosen:
            (out / f"{part.name}.jsonl").unlink(missing_ok=True)  # it is appended to
        done = perform(chosen, out, start + arguments.minutes * 60, console)
        for line in verdict(done, tiny):
            console.print(line, highlight=False)
    return 0 if all(part["result"] == "done" for part in done) else 1


def _platform() -> str:
    """Asked of another process: this one must not hold the device's memory while the parts run."""
    code = "import jax; print(jax.default_backend())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise ValueError(f"jax finds no device: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout.strip()


if __name__ == "__main__":
    cli.console(main)
