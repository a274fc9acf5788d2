"""Compile whole training steps of the presets for GPUs: do they compile, and what memory do they need?

    python -m bench.aot.gpu.train_steps [TARGET...] [--preset NAME...] [--dtype D] [--implementation I...] [--write]

Prints the temporary memory of a step with each implementation of attention, and its ratio to that with plain XLA. A
step takes a minute to compile; the settings are those of the preset. --write keeps the rows in profiles/aot/, beside
those of other targets and presets.
"""

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from bench.aot import hardware
from bench.aot.gpu import compiler

WITHOUT = "default"  # the settings without a preset
PRESETS = (WITHOUT, "dante", "dante-moe", "nano", "h100")
FILE = Path("profiles/aot/train_steps.md")


def temp_bytes(target: hardware.Gpu, preset: str, attn: str, dtype: str | None) -> int:
    """Compile the training step of a preset; return its temporary memory in bytes."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import NamedSharding, PartitionSpec

    from dantinox.checkpoint.train_state import TrainState
    from dantinox.config import Config
    from dantinox.kernels.dispatch import target_device
    from dantinox.model.params import abstract_params
    from dantinox.training.optimizer import make_optimizer
    from dantinox.training.train_step import make_train_step

    topology = topologies.get_topology_desc(
        platform="cuda", topology="1x1x1", target_config=compiler.target_config(target)
    )
    everywhere = NamedSharding(topologies.make_mesh(topology, (1,), ("x",)), PartitionSpec())
    settings = {"attn": attn, "moe": "xla"} | ({} if dtype is None else {"dtype": dtype})
    jax.clear_caches()
    with target_device(target.platform, target.kind):
        config = Config() if preset == WITHOUT else Config.from_preset(preset)
        config = config.replace(vocab_size=config.data.bpe_vocab_size, **settings)
        model_def, params = abstract_params(config.model)
        optimizer = make_optimizer(config.optim, config.train.steps)
        state = TrainState(params, jax.eval_shape(optimizer.init, params))
        A, B, T = config.train.grad_accum, config.train.batch_size, config.train.seq_len
        tokens, number = jax.ShapeDtypeStruct((A, B // A, T), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
        arguments = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), (state, tokens, tokens, number)
        )
        step = make_train_step(model_def, config, optimizer, None, None)
        with jax.default_device(topology.devices[0]):
            memory = step.lower(*arguments).compile().memory_analysis()
    return memory.temp_size_in_bytes


@contextlib.contextmanager
def compiler_environment() -> Iterator[None]:
    """Set what the compiler reads, before JAX is imported."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "triton").mkdir()
        os.environ.update(compiler.environment(Path(folder)))
        os.environ.pop("MOSAIC_GPU_DUMP_PTX")
        os.environ.pop("MOSAIC_GPU_DUMP_RESOURCES")
        os.environ.pop("XLA_FLAGS")
        yield


def table(found: Mapping[tuple[str, str], Mapping[str, int]], old: str = "") -> str:
    """Return the table of profiles/aot.

    Args:
        found: bytes of temporaries by implementation of attention, by card and preset.
        old: the table before, whose other rows stay.
    """
    rows = {tuple(line.split(" | ")[:2]): line for line in old.splitlines() if line.startswith("| ")}
    for (card, preset), by_implementation in found.items():
        xla, triton = by_implementation["xla"], by_implementation["triton"]
        row = f"| {card} | {preset} | {xla / 2**20:.0f} | {triton / 2**20:.0f} | {triton / xla:.2f} |"
        rows[f"| {card}", preset] = row
    cards = [target.name for target in hardware.TARGETS.values() if isinstance(target, hardware.Gpu)]
    return "\n".join(
        [
            "# Whole training steps, compiled for GPUs that were not there",
            "",
            "Written by `python -m bench.aot.gpu.train_steps --write`: MiB of temporaries of a step of each preset in "
            "its own settings, `default` without a preset. The mixture of experts runs by XLA in both.",
            "",
            "| card | preset | attention by XLA | by Triton | ratio |",
            "|---|---|---|---|---|",
            *(rows[key] for card in cards for preset in PRESETS if (key := (f"| {card}", preset)) in rows),
        ]
    ) + "\n"  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, print a row per target and preset, and return 1 if a step does not compile."""
    gpus = [target.name for target in hardware.TARGETS.values() if isinstance(target, hardware.Gpu)]
    parser = argparse.ArgumentParser(prog="bench.aot.gpu.train_steps", description=__doc__.split("\n")[0])
    parser.add_argument("target", nargs="*", choices=gpus, help="default: all")
    parser.add_argument("--preset", nargs="+", choices=PRESETS, default=PRESETS, help="default: all")
    parser.add_argument("--implementation", nargs="+", default=["triton", "xla"], help="of attention (triton xla)")
    parser.add_argument("--dtype", help="instead of the preset's")
    parser.add_argument("--write", action="store_true", help=f"write {FILE}, with both implementations")
    arguments = parser.parse_args(argv)
    if arguments.write and (arguments.dtype or set(arguments.implementation) != {"triton", "xla"}):
        parser.error("--write is for both implementations and the presets' own dtypes")
    failed = False
    with compiler_environment():
        for name in arguments.target or gpus:
            target = hardware.get(name)
            assert isinstance(target, hardware.Gpu)
            for preset in arguments.preset:
                found: dict[str, int] = {}
                for implementation in arguments.implementation:
                    row = f"{name}, {preset}, attn {implementation}"
                    try:
                        found[implementation] = temp_bytes(target, preset, implementation, arguments.dtype)
                        print(f"{row}: {found[implementation] / 2**20:.0f} MiB of temporaries", flush=True)
                    except NotImplementedError as error:
                        print(f"{row}: refused: {error}", flush=True)
                    except Exception as error:  # a compiler may raise anything, and the next step must be compiled
                        failed = True
                        print(f"{row}: {type(error).__name__}: {' '.join(str(error).split())[:300]}", flush=True)
                if "xla" in found:
                    ratios = [f"{n} {x / found['xla']:.2f}" for n, x in found.items() if n != "xla"]
                    print(f"{name}, {preset}: ratio to xla: {', '.join(ratios)}", flush=True)
                if arguments.write and len(found) == 2:
                    old = FILE.read_text("utf-8") if FILE.exists() else ""
                    FILE.write_text(table({(name, preset): found}, old), "utf-8")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
