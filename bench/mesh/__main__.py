"""Print what a training step keeps and exchanges on each device of a mesh, compiled for simulated devices.

    python -m bench.mesh [MESH...] [--preset NAME] [--set NAME=VALUE...]

A mesh is written as for training, such as data=2,fsdp=4. Bytes are those of one device, from the compiled program:
they say what the partition of the model costs, not how fast a network is.
"""

import argparse
import os
import sys
from collections.abc import Sequence

MESHES = ("data=8", "fsdp=8", "data=2,fsdp=4", "tensor=8", "context=8", "fsdp=4,tensor=2", "fsdp=2,context=2,tensor=2")
SMALL = (
    "vocab_size=1024 dim=256 n_layers=4 n_heads=8 n_kv_heads=8 window=32 window_pattern=SL max_context=128 seq_len=128 "
    "batch_size=16 attn=xla moe=xla dtype=float32 remat=none grad_accum=1"
).split()


def main(argv: Sequence[str] | None = None) -> int:
    """Compile for each mesh and print a row of it; returns 1 if one is refused or does not compile."""
    parser = argparse.ArgumentParser(prog="bench.mesh", description=__doc__.split("\n")[0])
    parser.add_argument("mesh", nargs="*", default=MESHES, help=f"default: {' '.join(MESHES)}")
    parser.add_argument("--preset", help="default: the settings of all presets")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings over those of the preset")
    parser.add_argument("--devices", type=int, default=8, help="simulated devices (8)")
    arguments = parser.parse_args(argv)
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={arguments.devices}",
    }
    from bench.mesh import steps  # after the environment is set
    from dantinox.config import Config, ConfigError, coerce_numbers

    base = SMALL if arguments.preset is None else []
    pairs = [pair.partition("=") for pair in (*base, *arguments.set)]
    try:
        settings = coerce_numbers({name: value for name, _, value in pairs}, "--set")
        preset = Config() if arguments.preset is None else Config.from_preset(arguments.preset)
        base_config = preset.replace(**settings)
    except ConfigError as error:
        parser.error(str(error))
    failed = False
    print(f"{'mesh':26} {'temporary':>10} {'arguments':>10}  exchanged in a step: count, MiB (largest array, MiB)")
    for mesh in ("", *arguments.mesh):
        try:
            cost = steps.step_cost(base_config.replace(mesh=mesh))
        except (ConfigError, NotImplementedError) as error:
            failed = True
            print(f"{mesh}: {error}", flush=True)
            continue
        memory = f"{cost.temporary / 2**20:6.1f} MiB {cost.arguments / 2**20:6.1f} MiB"
        print(f"{mesh or 'one device':26} {memory}  {cost.exchanged_text()}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
