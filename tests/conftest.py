"""Settings that every test needs before JAX starts."""

import os
from pathlib import Path

from hypothesis import settings

# Where a CUDA or TPU plugin is installed but no device is there, JAX would complain and try it first.
ACCELERATORS = ("/dev/nvidiactl", "/dev/accel0", "/dev/vfio/0")
if not any(Path(device).exists() for device in ACCELERATORS):
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
# A compiled program kept from another version of the code must never be what is tested.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"

# The same examples every time, so that a red run can be repeated; `--hypothesis-profile=explore` looks for new ones.
settings.register_profile("repeat", derandomize=True, deadline=None, max_examples=40, database=None)
settings.register_profile("explore", deadline=None, max_examples=1000)
# Of the random shapes of the four operations, 300 with "repeat", this makes 10^4.
settings.register_profile("long", settings.get_profile("repeat"), max_examples=1334)
# With -k "any_small_shape and pallas", 10^4 shapes of one implementation of attention.
settings.register_profile("thorough", settings.get_profile("repeat"), max_examples=6667)
settings.load_profile("repeat")
