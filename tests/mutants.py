"""Do the tests notice? Plants one fault after the other in a copy of the kernels and expects a test to fail.

    python -m tests.mutants [--list] [--only SUBSTRING] [-j N]

For each fault the tests most likely to notice run first, all of the operation's only where those pass. At the end the
tests that noticed run without any fault: they must pass. Exit status: 0 where at least 95% are caught, 1 where fewer,
2 where a fault no longer fits its file or a run proves nothing.
"""

import argparse
import ast
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
COPIED = ("kernels", "reference", "dantinox", "tests", "pyproject.toml")
ENOUGH = 0.95
LIMITS = (300, 900)  # seconds: the likely tests, all tests of the operation
# Where a fault may be noticed at all.
FILES = {
    "attention": ("attention", "refusals"),
    "decode": ("decode", "refusals"),
    "flash": ("flash", "attention"),
    "grouped_matmul": ("grouped_matmul", "moe", "refusals"),
    "moe": ("moe", "refusals"),
    "refusals": ("refusals", "attention"),
    "sanitizer": ("sanitizer", "flash"),
    "specs": ("specs",),
}


class Mutant(NamedTuple):
    """One fault: `old`, found once in `file`, becomes `new`; `tests` is one of FILES, `likely` a pytest -k for it."""

    file: str
    tests: str
    name: str
    old: str
    new: str
    likely: str

    @property
    def title(self) -> str:
        return f"{self.file.removeprefix('kernels/').removesuffix('.py')}: {self.name}"

    def applied(self, text: str) -> str:
        """The file with the fault.

        Raises:
            ValueError: the old text is not there exactly once, or Python does not parse the new one.
        """
        if (found := text.count(self.old)) != 1:
            raise ValueError(f"{self.title}: found {found} times in {self.file}, expected once: {self.old!r}")
        changed = text.replace(self.old, self.new)
        try:
            ast.parse(changed)
        except SyntaxError as error:
            raise ValueError(f"{self.title}: {self.file} does not parse: {error}") from None
        return changed


def _in(file: str, tests: str, *faults: tuple[str, str, str, str]) -> list[Mutant]:
    return [Mutant(f"kernels/{file}.py", tests, *fault) for fault in faults]


RULE = "keeps_the_rule"
FEW = f"{RULE} and few and float32"
FLASH = f"{RULE} and pallas and float32"
TPU = "several_tiles"  # what only the simulated TPU runs
MUTANTS: list[Mutant] = [
    *_in(
        "attention/xla",
        "attention",
        ("a query sees the next key", "mask &= distance >= 0", "mask &= distance >= -1", f"{RULE} and 7 and float32"),
        ("window one too wide", "mask &= distance < window", "mask &= distance <= window", f"{RULE} and 129 and on"),
        ("band one too wide", "(distance < window))[None]", "(distance <= window))[None]", f"{RULE} and 127"),
        ("band sees the next key", "mask = ((distance >= 0)", "mask = ((distance >= -1)", f"{RULE} and 127"),
        ("top-left alignment", "_visible(jnp.arange(T) + S - T,", "_visible(jnp.arange(T),", f"{RULE} and 129 and of"),
        ("band forgets S - T", "* block + S - T - back * block", "* block - back * block", "banded or any_small"),
        ("keys before the first are seen", "((k_pos >= 0) & (k_pos < S))", "(k_pos < S)", f"{RULE} and 127"),
        ("chunk stops a key early", "start + t + S - T)) if", "start + t + S - T - 1)) if", "chunked and formula"),
        ("chunk forgets its start", "jnp.arange(n) * rows + start + S - T", "jnp.arange(n) * rows + S - T", "chunked"),
        ("first chunk's segments for all", "jnp.pad(q_ids[:, start : start + t]", "jnp.pad(q_ids[:, :t]", "chunked"),
        ("segments by order", "q_ids[:, :, None] == kv_ids", "q_ids[:, :, None] >= kv_ids", f"{RULE} and packed"),
        ("band segments by order", "(q_ids[..., None] == ", "(q_ids[..., None] >= ", f"{RULE} and packed"),
        (
            "unseen values are not cleared",
            "k, v = (jnp.where(seen[..., None], x, 0) for x in (k, v))",
            "k = jnp.where(seen[..., None], k, 0)",
            "unseen_keys and block",
        ),
        ("band's unseen keys are not cleared", "None if q_ids is None and T == S else", "None if q_ids is None else",
         "unseen_keys and banded"),
        ("segments' unseen keys are not cleared", "every = q_ids is None and window", "every = window",
         "unseen_keys and full"),
        ("scale dropped", "q, k, wide) * self.scale", "q, k, wide)", f"{RULE} and 7 and float32"),
        ("cap does not restore the size", "self.softcap * jnp.tanh(", "jnp.tanh(", f"{RULE} and cap and float32"),
        ("gate dropped", "o = o * jax.nn.sigmoid(gate.astype(o.dtype))", "pass", f"{RULE} and 129 and window"),
        ("no key gives NaN", "jnp.where(total == 0, 1, total)", "total", f"{RULE} and 129 and on"),
        (
            "heads grouped the wrong way",
            "q.reshape(B, T, K, H // K, D).transpose(0, 2, 3, 1, 4)",
            "q.reshape(B, T, H // K, K, D).transpose(0, 3, 2, 1, 4)",
            f"{RULE} and 127",
        ),
    ),
    *_in(
        "attention/__init__",
        "attention",
        ("given scale ignored", "scale=D**-0.5 if scale is None else scale", "scale=D**-0.5", "the_formula and full"),
        # The reference is called through the same wrapper: only loops notice.
        ("long windows one short", "min(int(window), max(S, 1))", "min(int(window), max(S - 1, 1))", "any_small"),
    ),
    *_in(
        "attention/plan",
        "flash",
        ("window a tile short", "first - window + 1)", "first - window + 2)", "plan_is"),
        ("edge of the window unmasked", "last - j * k_rows < window", "last - j * k_rows <= window", "plan_is"),
        ("diagonal unmasked", "first >= (j + 1) * k_rows - 1", "first >= j * k_rows", "plan_is"),
        ("padded keys unmasked", "whole = (j + 1) * k_rows <= S and high >= low", "whole = high >= low", "plan_is"),
        ("no tile for queries without keys", "tiles = [0]", "tiles = []", "plan_is"),
        ("keys met are fresh again", "FRESH * (j not in met)", "FRESH * (j == tiles[0])", "plan_is"),
    ),
    *_in(
        "attention/scores",
        "flash",
        ("a query sees the next key", "visible = distance >= 0", "visible = distance >= -1", "neither"),
        ("window one too wide", "astype(jnp.uint32) < static", "astype(jnp.uint32) <= static", "neither"),
        ("sums over keys forget the decay", "self.get(decay, r) * self.get(name, r)", "self.get(name, r)",
         "span_by_span"),
    ),
    *_in(
        "attention/scores",
        "attention",
        ("cap does not restore the size", "* (cap * self.static.unit)", "* self.static.unit", f"{FLASH} and full"),
        ("padded keys are seen", "visible = key < static.S - self.j * k - c * keys", "visible = key < k",
         f"{FLASH} and full"),
        ("segments by order", '"q ids", r) == self._column', '"q ids", r) >= self._column', f"{FLASH} and packed"),
    ),
    *_in(
        "attention/scores",
        "sanitizer",
        ("mixed segments unmasked", " | (shared == MIXED)", "", TPU),
        ("only the first pieces are masked", "fori_loop(0, across * down, piece", "fori_loop(0, across, piece", TPU),
    ),
    *_in(
        "attention/mosaic_tpu",
        "flash",
        ("sum without decay", 'value=decay * tile.get("l", r))', 'value=tile.get("l", r))', "span_by_span"),
        ("gate dropped", 'o = o * jax.nn.sigmoid(tile.get("gate", r).astype(jnp.float32))', "pass", "every_width"),
    ),
    *_in(
        "attention/mosaic_tpu",
        "attention",
        ("no key gives NaN", "jnp.where(nobody, 1.0, l)", "l", f"{FLASH} and 129 and window"),
        ("shares of one", "jnp.where(nobody, 0.0, 1 / some)", "jnp.where(nobody, 0.0, 1.0)",
         f"{FLASH} and full"),
    ),
    *_in(
        "attention/mosaic_tpu_backward",
        "flash",
        ("delta added", '- tile.get("delta", r))', '+ tile.get("delta", r))', "every_width"),
        ("dk without scale", "dk, dv = (dk * static.scale).astype", "dk, dv = dk.astype", "every_width"),
        ("dq without scale", 'tile.get("dq acc", r) * static.scale', 'tile.get("dq acc", r)', "every_width"),
        ("dq of the last span only", "first:last].add(found)", "first:last].set(found)", "span_by_span"),
    ),
    *_in(
        "attention/mosaic_tpu_backward",
        "attention",
        ("cap's slope", "ds = ds * (1 - jnp.minimum(t * t, 1))", "pass", f"{FLASH} and full"),
        ("sums of keys start anew", "tile.fresh if static.interpret", "tile.first if static.interpret",
         f"{FLASH} and banded"),
    ),
    *_in(
        "attention/mosaic_tpu_backward",
        "sanitizer",
        ("dk without scale, compiled", '(("dk", static.scale), ("dv", 1))', '(("dk", 1), ("dv", 1))', TPU),
        ("a span's keys share a sum", "else (tile.j - first_key_tile,)", "else (tile.j * 0,)", TPU),
        ("sums are never cleared", "else tile.n == 0)", "else tile.n < 0)", TPU),
    ),
    *_in(
        "attention/flash",
        "flash",
        ("slope of the gate", "(open_ * (1 - open_))", "open_", "every_width"),
        ("garbage behind the last token", "for axis in range(x.ndim)]) if missing",
         "for axis in range(x.ndim)], constant_values=jnp.nan) if missing", "every_width"),
    ),
    *_in(
        "attention/flash",
        "attention",
        ("a key too many cut off", "seen = T + window - 1", "seen = T + window - 2", f"{FLASH} and 7 and of"),
        ("unseen values are not cleared", "k, v = jnp.where(seen, k, 0), jnp.where(seen, v, 0)",
         "k = jnp.where(seen, k, 0)", "unseen_keys and full and pallas"),
    ),
    *_in(
        "attention/flash",
        "sanitizer",
        ("mixed segments pass for one", "(low_q == high_k) & (low_k == high_q)", "low_q == low_k", TPU),
        ("some shared ids pass for none", "(low_q > high_k) |", "(low_q != low_k) |", TPU),
    ),
    *_in(
        "einsum",
        "attention",
        ("mean over grouped heads", "found.sum(axis=", "found.mean(axis=", f"{RULE} and 129 and float32"),
    ),
    *_in(
        "decode/xla",
        "decode",
        ("ring does not wrap", "slot = cache.length % C", "slot = jnp.minimum(cache.length, C - 1)", "into_its_slot"),
        ("scatter is a slot off", ":, slot].set(", ":, slot - 1].set(", "any_ring or into_its_slot"),
        ("ages shifted by one", "(cache.length[:, None] - jnp", "(cache.length[:, None] + 1 - jnp", RULE),
        ("window dropped", "limit = C if window is None else min(C, window)", "limit = C",
         f"{RULE} and window and float32"),
        ("window one too wide", "min(C, window)", "min(C, window + 1)", f"{RULE} and window and float32"),
        ("new token unseen", "(cache.length[:, None] + 1, limit)", "(cache.length[:, None], limit)", RULE),
        ("empty slots count", "(seen[:, :, None], scores, -jnp.inf)", "(seen[:, :, None], scores, 0.0)", RULE),
        ("scale dropped", "scores = scores * scale", "pass", RULE),
        ("cap does not restore the size", "softcap * jnp.tanh(", "jnp.tanh(", f"{RULE} and cap and float32"),
        ("gate dropped", "o = o * jax.nn.sigmoid(gate.astype(jnp.float32))", "pass", f"{RULE} and gate and float32"),
        ("empty values not cleared", "jnp.where(seen[..., None], values, 0).astype", "values.astype", "empty_slots"),
        ("new value not kept", "_put(cache.v, v, slot)", "cache.v", "into_its_slot"),
        ("length not incremented", "values, cache.length + 1)", "values, cache.length)", "into_its_slot"),
    ),
    *_in(
        "grouped_matmul/xla",
        "grouped_matmul",
        ("groups start a row late", "return ends - group_sizes, ends", "return ends - group_sizes + 1, ends", RULE),
        ("rows of nobody not zeroed", "return _owned(jax.lax.fori_loop(0, w.shape[0], group, y)[:N], group_sizes)",
         "return jax.lax.fori_loop(0, w.shape[0], group, y)[:N]", f"{RULE} and 63 and float32"),
        ("last group skipped", "fori_loop(0, w.shape[0], group, y)", "fori_loop(0, w.shape[0] - 1, group, y)",
         f"{RULE} and last"),
        ("a last single row skipped", "return end - state[0] > leave", "return end - state[0] > leave + 1",
         f"{RULE} and 63"),
        ("dw takes the next group's rows", "0) for a in (x, dy))", "_rows(a, row, size)) for a in (x, dy))",
         f"{RULE} and 63"),
        ("dw of an empty group not zeroed", "jnp.zeros((x.shape[1], dy.shape[1]), wide)",
         "jnp.ones((x.shape[1], dy.shape[1]), wide)", RULE),
        ("too little room for the last tile", "(0, TILES[-1])", "(0, TILES[0])", RULE),
    ),
    *_in(
        "grouped_matmul/xla",
        "moe",
        ("gradients take the next expert's rows", "0) for a in (x, gate, up, dy))",
         "_rows(a, row, size)) for a in (x, gate, up, dy))", RULE),
        ("dw of an idle expert not zeroed", "zeros = [jnp.zeros(", "zeros = [jnp.ones(", RULE),
        ("silu's slope", "s * (1 + g * (1 - s))", "s * (1 - g * (1 - s))", RULE),
        ("silu is a sigmoid", "h = (jax.nn.silu(g) * u)", "h = (jax.nn.sigmoid(g) * u)", RULE),
        ("dw_up from the gate's side", "dw_up + _dot(x_t, du,", "dw_up + _dot(x_t, dg,", RULE),
        ("dx without the gate's side", " + _dot(dg, gate_e, (1, 1))", "", RULE),
        ("weights of the other choice", "expert_weights.astype(wide)[..., None]",
         "expert_weights[:, ::-1].astype(wide)[..., None]", f"{RULE} and zipf"),
        ("dx of the first choice only", "for j in range(inverse.shape[1])", "for j in range(1)", f"{RULE} and zipf"),
        ("one row: another's weight", "weights.reshape(-1)[r].astype", "weights.reshape(-1)[n].astype", FEW),
        ("one row: the last rows of a matrix skipped", "while M % rows:", "while M % 1:", FEW),
    ),
    *_in(
        "checks",
        "refusals",
        ("a window of 0 passes", "numbers.Integral) or value < 1", "numbers.Integral) or value < 0", "attention"),
        ("a window without causal passes", "    if not causal:", "    if False:", "attention"),
        ("3 heads on 2 pass", "K < 1 or H % K", "K < 1", "attention"),
        ("mixed dtypes pass", "if x.dtype != given[first].dtype:", "if False:", "attention"),
        ("negative caps pass", " and softcap > 0", "", "attention"),
    ),
    *_in(
        "dispatch",
        "refusals",
        ("silent fallback", "choice = table[implementation]",
         'choice = table[implementation] if callable(table[implementation]) else table["xla"]', "says_why_not"),
    ),
    *_in(
        "cost",
        "specs",
        ("triangle without its diagonal", "ramp * (ramp + 1) // 2", "ramp * (ramp - 1) // 2", "pairs"),
        ("keys behind the window are read", "min(S, T + window - 1)", "min(S, T + window)", "seen_keys"),
        ("segments' window one too wide", 'window, side="right"', 'window, side="left"', "segments"),
        ("idle groups are read", "rows * M + busy * M * F + N * F", "rows * M + E * M * F + N * F", "grouped"),
        ("a full ring is read", "C if window is None else min(C, window)).sum()", "C).sum()", "decoding"),
    ),
    *_in(
        "shapes",
        "specs",
        ("queries are the first positions", "ids[:, n - self.T :]", "ids[:, : self.T]", "segment"),
        ("routes with the smallest share", "np.argsort(-score, axis=1)", "np.argsort(score, axis=1)", "route"),
        ("routes without chance", "1e-30)) + noise", "1e-30))", "route"),
    ),
]  # fmt: skip


def copy(to: Path) -> None:
    """What the tests need of this tree, uncommitted changes and all."""
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, to / name)


class Runner:
    """Runs pytest in copies of the tree; `stop` ends what is still running."""

    def __init__(self) -> None:
        self.running: set[subprocess.Popen] = set()
        self.lock = threading.Lock()
        self.stopped = False

    def pytest(self, folder: Path, arguments: Iterable[str], limit: float) -> tuple[int | None, str]:
        """(exit status, None where time ran out; output)."""
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-rfE", "--tb=no", "-p", "no:cacheprovider", *arguments]
        # Wide lines, so that no test's name is cut short.
        environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "400"}
        environment.pop("PYTHONPATH", None)
        with self.lock:
            if self.stopped:
                return None, ""
            process = subprocess.Popen(
                command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
            self.running.add(process)
        try:
            output, _ = process.communicate(timeout=limit)
            return process.returncode, output
        except subprocess.TimeoutExpired:
            process.kill()
            return None, process.communicate()[0]
        finally:
            with self.lock:
                self.running.discard(process)

    def stop(self) -> None:
        with self.lock:
            self.stopped = True
            for process in self.running:
                process.kill()


class Verdict(NamedTuple):
    """What became of a fault: caught, survived, or error (the run proves nothing); by which test, or why."""

    mutant: Mutant
    what: str
    by: str
    seconds: float


def judge(mutant: Mutant, runner: Runner) -> Verdict:
    """Plant one fault in a copy of its own and run the tests."""
    began = time.monotonic()
    verdict = lambda what, by: Verdict(mutant, what, by, time.monotonic() - began)
    with tempfile.TemporaryDirectory(prefix="mutant-") as name:
        folder = Path(name)
        copy(folder)
        target = folder / mutant.file
        target.write_text(mutant.applied(target.read_text()))
        first, *_ = files = [f"tests/parity/test_{file}.py" for file in FILES[mutant.tests]]
        for arguments, limit in zip(([first, "-k", mutant.likely], files), LIMITS, strict=True):
            status, output = runner.pytest(folder, arguments, limit)
            failed = failures(output)
            if status == 1 and failed:
                return verdict("caught", failed[0])
            if status == 5 and arguments != files:
                return verdict("error", f"-k {mutant.likely!r} selects no test")
            if status != 0:
                return verdict("error", "time ran out" if status is None else " ".join(output.split())[-300:])
    return verdict("survived", "")


def failures(output: str) -> list[str]:
    """The ids of the tests that failed, from pytest's summary."""
    return [line.removeprefix("FAILED ").split(" - ")[0] for line in output.splitlines() if line.startswith("FAILED ")]


def innocent(verdicts: list[Verdict], runner: Runner) -> str:
    """Empty where the tests that noticed a fault pass without one, else what pytest said."""
    tests = sorted({verdict.by for verdict in verdicts if verdict.what == "caught"})
    if not tests:
        return ""
    with tempfile.TemporaryDirectory(prefix="mutant-") as name:
        copy(Path(name))
        status, output = runner.pytest(Path(name), tests, LIMITS[1])
    return "" if status == 0 else output[-2000:] or "time ran out"


def show(verdict: Verdict) -> None:
    by = verdict.by.removeprefix("tests/parity/")
    print(f"{verdict.what:9}{verdict.seconds:5.0f} s  {verdict.mutant.title:58}  {by}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="show the faults and stop")
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="the faults whose title holds this")
    parser.add_argument("-j", type=int, default=os.cpu_count() or 1, metavar="N", help="at once (all cores)")
    options = parser.parse_args()
    mutants = [mutant for mutant in MUTANTS if options.only in mutant.title]
    try:
        for mutant in mutants:
            mutant.applied((ROOT / mutant.file).read_text())
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    if options.list or not mutants:
        print("\n".join(mutant.title for mutant in mutants) or f"no fault's title holds {options.only!r}")
        return 0 if mutants else 2
    # However it is stopped, nothing is left behind.
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, signal.default_int_handler)
    began, runner, verdicts = time.monotonic(), Runner(), []
    pool = ThreadPoolExecutor(max(1, options.j))
    try:
        for done in as_completed([pool.submit(judge, mutant, runner) for mutant in mutants]):
            verdicts.append(done.result())
            show(verdicts[-1])
        blame = innocent(verdicts, runner)
    except KeyboardInterrupt:
        # A second signal must not interrupt the clearing up.
        for stop in (signal.SIGINT, signal.SIGTERM):
            signal.signal(stop, signal.SIG_IGN)
        print("stopped", file=sys.stderr)
        return 130
    finally:
        runner.stop()
        pool.shutdown(cancel_futures=True)
    count = {what: sum(verdict.what == what for verdict in verdicts) for what in ("caught", "survived", "error")}
    print(
        f"{count['caught']} of {len(verdicts)} caught, {count['survived']} survived, {count['error']} errors,", end=" "
    )
    print(f"{(time.monotonic() - began) / 60:.1f} minutes, {os.times().children_user / 60:.1f} of a core")
    for verdict in verdicts:
        if verdict.what != "caught":
            show(verdict)
    if blame:
        print(f"tests that noticed a fault fail without one too:\n{blame}", file=sys.stderr)
    if blame or count["error"]:
        return 2
    return 0 if count["caught"] >= ENOUGH * len(verdicts) else 1


if __name__ == "__main__":
    raise SystemExit(main())
