"""What is fixed when the Hopper attention kernels are traced, for both directions."""

from typing import NamedTuple

from jax.experimental.pallas import mosaic_gpu as plgpu


class Static(NamedTuple):
    """Sizes and options that shape the code of a kernel. Hashable: `hopper` hands it to custom_vjp as it is."""

    T: int
    S: int
    G: int  # query heads a key head serves
    causal: bool
    window: int | None
    scale: float
    softcap: float | None
    interpret: plgpu.InterpretGPUParams | None = None  # None compiles; the parameters interpret the kernel on the CPU
