"""Run Pallas kernels on a simulated TPU or GPU that checks every memory access.

    races           two cores, warpgroups or copies access the same address, one of them writes, nothing orders them
    out of bounds   a read past the end of a buffer; the run stops there
    uninitialized   the result depends on memory that was never written: NaN and zeros there give different results

The simulation is slow, so shapes must be small.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as tpu_interpreter
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks as gpu_interpreter
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from bench.verification.fast_compile import jit_fast_compile

MEMORIES = ("nan", "zero")  # what memory holds before it is written


class Findings(NamedTuple):
    """The result (None if the run stopped) and the faults; `out_of_bounds` is the simulator's message."""

    result: Any
    races: bool
    out_of_bounds: str | None
    uninitialized: bool

    @property
    def clean(self) -> bool:
        """Whether no fault was found."""
        return not (self.races or self.out_of_bounds or self.uninitialized)


def on_tpu(f: Callable[..., Any], *args: Any, cores: int = 2, **options: Any) -> Findings:
    """f(*args) with its Pallas kernels on a simulated TPU of `cores` cores; `options` go to `InterpretParams`."""

    def simulate(memory: str) -> AbstractContextManager:
        return pltpu.force_tpu_interpret_mode(
            pltpu.InterpretParams(detect_races=True, uninitialized_memory=memory, num_cores_or_threads=cores, **options)
        )

    return _run(f, args, simulate, tpu_interpreter, "RaceDetectionState", pltpu.reset_tpu_interpret_mode_state)


def on_gpu(f: Callable[..., Any], *args: Any, memories: tuple[str, ...] = MEMORIES, **options: Any) -> Findings:
    """f(*args) with its Pallas kernels on a simulated GPU; `options` go to `InterpretGPUParams`.

    With one kind of `memories` it takes half of the time, and uninitialized memory shows in the result only.
    """

    def simulate(memory: str) -> AbstractContextManager:
        params = plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory=memory, **options)
        return plgpu.force_gpu_interpret_mode(params)

    reset = gpu_interpreter.reset_gpu_interpret_mode_state
    with mock.patch.object(gpu_interpreter, "wgmma", functools.partial(_checked_wgmma, gpu_interpreter.wgmma)):
        return _run(f, args, simulate, gpu_interpreter, "GPURaceDetectionState", reset, memories)


def _checked_wgmma(wgmma: Callable[..., Any], **kwargs: Any) -> Any:
    """Check the shared memory reads of a wgmma, which the simulator does not, then run the simulator's wgmma.

    A wgmma reads through the async proxy, as TMA does: it sees writes of a warpgroup after that warpgroup has committed
    them and a barrier has ordered the readers after the commit. Each wgmma is an event of the first warp of its
    warpgroup, so that a later write must be ordered after it.
    """
    memory, thread = gpu_interpreter._get_shared_memory(), kwargs["thread"]
    if memory.detect_races:
        with memory.lock:
            memory.clocks[thread].inc(memory.thread_to_vc_position(thread) + 1)
            seen = memory.clocks[thread].async_smem_clock.copy()
        for operand in "ab":
            key = gpu_interpreter.HostAllocationKey.from_array(kwargs[f"{operand}_allocation_key_as_array"])
            if key.memory_space_id == gpu_interpreter.memory.get_memory_space_idx(plgpu.SMEM):
                transforms = gpu_interpreter._remove_noop_transforms(kwargs[f"{operand}_transforms"])
                place = memory.access(key, jax.tree.map(int, transforms))
                gpu_interpreter.get_races().check_read(thread, seen, key, place, source_info=kwargs["source_info"])
    return wgmma(**kwargs)


@contextmanager
def collect_detectors(interpreter: Any, name: str) -> Iterator[list[Any]]:
    """Collect every race detector: JAX makes one per kernel and keeps only the last."""
    detectors, detector_type = [], getattr(interpreter, name)

    def make(*args: Any, **kwargs: Any) -> Any:
        detectors.append(detector_type(*args, **kwargs))
        return detectors[-1]

    with mock.patch.object(interpreter, name, make):
        yield detectors


def _run(
    f: Callable[..., Any],
    args: tuple[Any, ...],
    simulate: Callable[[str], AbstractContextManager],
    interpreter: Any,
    detector: str,
    reset: Callable[[], None],
    memories: tuple[str, ...] = MEMORIES,
) -> Findings:
    results, races = [], False
    for memory in memories:
        with collect_detectors(interpreter, detector) as detectors, simulate(memory):
            try:
                # A new function, so that no program of another run is taken from a cache.
                result = jit_fast_compile(lambda *args: f(*args))(*args)
                results.append(jax.tree.map(np.asarray, jax.block_until_ready(result)))
            except Exception as error:
                if "ut-of-bounds" not in str(error):
                    raise
                message = next(line.strip() for line in str(error).splitlines() if "ut-of-bounds" in line)
                return Findings(None, any(d.races_found for d in detectors), message, False)
            finally:
                # After an exception the simulated memory would still be there.
                reset()
        assert detectors, "no Pallas kernel ran on the simulated device"
        races |= any(d.races_found for d in detectors)
    with_nan, with_zeros = (jax.tree.leaves(result) for result in (results[0], results[-1]))
    differ = any(a.tobytes() != b.tobytes() for a, b in zip(with_nan, with_zeros, strict=True))
    return Findings(results[0], races, None, differ)
