"""Crash tests: kills at random moments, and damage to the newest checkpoint. Slow; `make test-crash` runs it."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from dantinox.checkpoint.manager import Checkpoints
from dantinox.checkpoint.manifest import CorruptCheckpointError
from dantinox.config import Config
from dantinox.metrics.logger import read_metrics
from dantinox.training.trainer import Trainer
from tests.helpers import process_group

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
KILLS, DAMAGES, SAVE_EVERY, MANY = 50, 200, 5, 1_000_000
KILLS_OF_TWO = int(os.environ.get("KILLS_OF_TWO", "30"))
FLAGS = f"""--data text.txt --tokenizer char --n-layers 1 --dim 16 --n-heads 2 --n-kv-heads 1 --window 8
--max-context 32 --seq-len 16 --batch-size 2 --dropout 0.2 --ema-decay 0.9 --warmup-ratio 0 --schedule constant
--log-every 1 --eval-every 0 --eval-batches 1 --sample-tokens 0 --save-every {SAVE_EVERY} --max-checkpoints 2""".split()
# Imports take most of a start: one process makes them, and each run is a fork of it from before JAX's own start.
STARTER = """
import json, os, sys
import jax, orbax.checkpoint, tensorboard.summary.writer.event_file_writer
from dantinox.cli import train
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        out = os.open("out.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1), os.dup2(out, 2)
        try:
            code = train.main(json.loads(line))
        except SystemExit as stop:
            code = stop.code
        sys.stdout.flush(), os._exit(code)
    print(pid, flush=True)
    print(os.waitpid(pid, 0)[1], flush=True)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with process_group.training_folder(tmp_path_factory.mktemp("crash")) as path:
        yield path


class Programs:
    """Runs of the training program, one at a time."""

    def __init__(self, folder: Path) -> None:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
        environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PLATFORMS": "cpu"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, "-c", STARTER], cwd=folder, env=environment, **pipes)

    def start(self, *words: str) -> int:
        self.process.stdin.write(json.dumps([*map(str, words)]) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def status(self) -> int:
        return int(self.process.stdout.readline())


@pytest.fixture(scope="module")
def programs(folder):
    programs = Programs(folder)
    yield programs
    programs.process.stdin.close()
    programs.process.wait(60)


def reported(run: Path) -> int:
    """The last step that the run has told of."""
    return max((row["step"] for row in read_metrics(run / "metrics.jsonl")), default=0)


def kill(programs: Programs, run: Path, draw: random.Random) -> tuple[bool, bool]:
    """Start or resume a run and kill it at a random moment; returns (between steps?, in a save?)."""
    known = Checkpoints(run).steps()
    before, started = known[-1] if known else 0, time.time()
    name = ["--run", run.name, "--steps", MANY]
    pid = programs.start(*(["--resume", *name] if known else [*FLAGS, *name]))
    if draw.random() < 0.8:
        seen = time.monotonic()
        while reported(run) <= before and time.monotonic() < seen + 120:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 1.5))
    else:
        time.sleep(draw.uniform(0, 4))
    os.kill(pid, signal.SIGKILL)
    assert programs.status() == signal.SIGKILL, Path("out.txt").read_text()[-3000:]
    saving = any(path.stat().st_mtime > started for path in run.glob("checkpoints/.partial-*"))
    return reported(run) > before, saving


def test_random_kills_lose_only_steps_since_the_last_save(folder, programs):
    run, draw, lost, among, unfinished = Path("runs/killed"), random.Random(0), [], 0, 0
    for _ in range(KILLS):
        stepped, saving = kill(programs, run, draw)
        among, unfinished = among + stepped, unfinished + saving
        if Checkpoints(run).steps():
            step, _, wrong = Checkpoints(run).latest_valid()
            assert wrong == []
            lost.append(reported(run) - step)
        else:
            lost.append(reported(run))
        assert lost[-1] <= SAVE_EVERY, lost
    print(
        f"\n{len(lost)} of {KILLS} kills survived: {among} among steps, {unfinished} in the middle of a save; "
        f"at step {reported(run)}; steps lost: {sum(lost) / len(lost):.1f} in the mean, {max(lost)} at most"
    )
    assert among > KILLS / 2
    last = reported(run) + 1
    programs.start("--run", run.name, "--resume", "--steps", last)
    assert programs.status() == 0, Path("out.txt").read_text()[-3000:]
    programs.start(*FLAGS, "--run", "whole", "--steps", last, "--save-every", "0")
    assert programs.status() == 0, Path("out.txt").read_text()[-3000:]
    assert rows(run) == rows(Path("runs/whole"))
    assert same(run, Path("runs/whole"), last)


# A dead process is named after seconds, not half a minute.
QUICK = """
from dantinox.distributed import processes, watch
watch.DEAD_S, watch.BEAT_S, processes.JOIN_S = 5.0, 0.5, 40
"""


def test_random_kills_of_a_random_process_end_both_and_lose_only_steps_since_the_last_save(folder):
    """A run of two processes with two devices each."""
    run, draw, lost, seconds = Path("runs/killed-in-two"), random.Random(2), [], []
    starter = process_group.Starter(folder)
    words = [*FLAGS, "--batch-size", 4, "--dtype", "float32", "--mesh", "data=2,fsdp=2", "--run", run.name]
    for _ in range(KILLS_OF_TWO):
        resumed = ["--resume", "--run", run.name] if Checkpoints(run).steps() else words
        programs = starter.group(*resumed, "--steps", MANY, codes=[QUICK, QUICK])
        if draw.random() < 0.8:
            limit = time.monotonic() + 120
            while " | compiled" not in programs[0].out() and time.monotonic() < limit:  # the first step
                time.sleep(0.01)
            time.sleep(draw.uniform(0, 1.5))
        else:
            time.sleep(draw.uniform(0, 8))
        killed = draw.randrange(2)
        start = time.monotonic()
        os.kill(programs[killed].pid, signal.SIGKILL)
        assert programs[killed].code() == -signal.SIGKILL
        assert programs[1 - killed].code(60) in (1, -signal.SIGABRT)  # JAX aborts processes that lose process 0
        seconds.append(time.monotonic() - start)
        text, named = (
            programs[1 - killed].err(),
            (f"process {killed} on ", "leader task", "not all processes of the run"),
        )
        assert any(name in text for name in named), text[-3000:]
        step = 0
        if Checkpoints(run).steps():
            step, _, wrong = Checkpoints(run).latest_valid()
            assert wrong == []
        lost.append(reported(run) - step)
        assert lost[-1] <= SAVE_EVERY, lost
    print(
        f"\n{len(lost)} of {KILLS_OF_TWO} kills of one of two processes survived; at step {reported(run)}; steps lost: "
        f"{sum(lost) / len(lost):.1f} in the mean, {max(lost)} at most; the other process ended within "
        f"{max(seconds):.1f} s, {sum(seconds) / len(seconds):.1f} s in the mean"
    )
    last = reported(run) + 1
    programs = starter.group("--run", run.name, "--resume", "--steps", last)
    assert [program.code(300) for program in programs] == [0, 0], programs[0].err()
    single = starter.start([*words, "--run", "whole-of-two", "--mesh", "", "--steps", last, "--save-every", 0])
    assert single.code(600) == 0, single.err()
    starter.close()
    for row, other in zip(rows(run), rows(Path("runs/whole-of-two")), strict=True):
        assert row["step"] == other["step"] and abs(row["loss"] - other["loss"]) < 1e-5


def rows(run: Path) -> list[dict]:
    times = ("tokens_per_s", "mfu")
    return [{k: v for k, v in row.items() if k not in times} for row in read_metrics(run / "metrics.jsonl")]


def states(run: Path, *steps: int) -> list:
    like = Trainer(Config.from_yaml(run / "config.yaml")).abstract_state()
    return [Checkpoints(run).restore(step, like) for step in steps]


def equal(a, b) -> bool:
    return jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), a, b))


def same(run: Path, other: Path, step: int) -> bool:
    return equal(states(run, step), states(other, step))


def hurt(folder: Path, draw: random.Random) -> str:
    """Flip a bit of a random file, cut it short, or delete it."""
    path = draw.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    content, kind = bytearray(path.read_bytes()), draw.choice(["flip", "truncation", "deletion"])
    if kind == "flip":
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
    elif kind == "truncation":
        path.write_bytes(content[: draw.randrange(len(content))])
    else:
        path.unlink()
    return kind


def test_corrupt_newest_checkpoint_is_reported_and_not_used(folder, programs):
    run, draw = Path("runs/damaged"), random.Random(1)
    programs.start(*FLAGS, "--run", run.name, "--steps", 2 * SAVE_EVERY)
    assert programs.status() == 0, Path("out.txt").read_text()[-3000:]
    older, newer = SAVE_EVERY, 2 * SAVE_EVERY
    like = Trainer(Config.from_yaml(run / "config.yaml")).abstract_state()
    truth = dict(zip((older, newer), states(run, older, newer)))
    restored, refused, kinds = 0, 0, []
    for number in range(DAMAGES):
        copy = Path(shutil.copytree(run / "checkpoints", f"copies/{number}/checkpoints")).parent
        if alone := number % 2:  # no other checkpoint is left to resume from
            shutil.rmtree(copy / "checkpoints" / str(older))
        kinds.append(hurt(copy / "checkpoints" / str(newer), draw))
        checkpoints = Checkpoints(copy)
        try:
            step, _, wrong = checkpoints.latest_valid()
            assert equal(checkpoints.restore(step, like), truth[step])
            told, restored = str(wrong[0]), restored + 1
        except CorruptCheckpointError as error:
            assert alone
            told, refused = str(error), refused + 1
        assert f"checkpoints/{newer} is damaged: " in told and "\n" not in told
        shutil.rmtree(copy)
    print(
        f"\n{restored + refused} of {DAMAGES} damages survived: {restored} went on from an intact step, {refused} "
        f"were refused and named; {', '.join(f'{kinds.count(k)} {k}s' for k in sorted(set(kinds)))}"
    )
    assert restored + refused == DAMAGES
