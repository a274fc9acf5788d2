"""Runs Pallas kernels on a simulated TPU or GPU that watches every access to memory.

    races           two cores, warpgroups or copies touch the same place, one of them writes, nothing orders them
    out of bounds   a read past the end of a buffer; the run stops there
    uninitialised   memory never written reached the result: it differs between memory full of NaN and full of zeros

What is simulated is the order of accesses, not their speed: small shapes only.
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

from tests.helpers import tolerance


class Findings(NamedTuple):
    """The result (None where the run stopped), and the faults; `out_of_bounds` is what the simulator said."""

    result: Any
    races: bool
    out_of_bounds: str | None
    uninitialised: bool

    @property
    def clean(self) -> bool:
        return not (self.races or self.out_of_bounds or self.uninitialised)


def on_tpu(f: Callable[..., Any], *args: Any, cores: int = 2, **options: Any) -> Findings:
    """f(*args) with its Pallas kernels on a simulated TPU of `cores` cores; `options` go to `InterpretParams`."""

    def simulate(memory: str) -> AbstractContextManager:
        return pltpu.force_tpu_interpret_mode(
            pltpu.InterpretParams(detect_races=True, uninitialized_memory=memory, num_cores_or_threads=cores, **options)
        )

    return _run(f, args, simulate, tpu_interpreter, "RaceDetectionState", pltpu.reset_tpu_interpret_mode_state)


def on_gpu(f: Callable[..., Any], *args: Any, **options: Any) -> Findings:
    """f(*args) with its Pallas kernels on a simulated GPU; `options` go to `InterpretGPUParams`."""

    def simulate(memory: str) -> AbstractContextManager:
        params = plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory=memory, **options)
        return plgpu.force_gpu_interpret_mode(params)

    reset = gpu_interpreter.reset_gpu_interpret_mode_state
    with mock.patch.object(gpu_interpreter, "wgmma", functools.partial(_multiply, gpu_interpreter.wgmma)):
        return _run(f, args, simulate, gpu_interpreter, "GPURaceDetectionState", reset)


def _multiply(wgmma: Callable[..., Any], **given: Any) -> Any:
    """As the simulator multiplies, which does not watch what a matrix product reads of shared memory.

    It reads by the way that TMA takes: what a warpgroup wrote is there once the warpgroup has committed it and those
    that read have heard so, by a barrier. Each product is an event of the first of the warpgroup's warps, which do
    nothing else by themselves here, so that who writes there later must have heard of the product.
    """
    memory, thread = gpu_interpreter._get_shared_memory(), given["thread"]
    if memory.detect_races:
        with memory.lock:
            memory.clocks[thread].inc(memory.thread_to_vc_position(thread) + 1)
            seen = memory.clocks[thread].async_smem_clock.copy()
        for operand in "ab":
            key = gpu_interpreter.HostAllocationKey.from_array(given[f"{operand}_allocation_key_as_array"])
            if key.memory_space_id == gpu_interpreter.memory.get_memory_space_idx(plgpu.SMEM):
                transforms = gpu_interpreter._remove_noop_transforms(given[f"{operand}_transforms"])
                place = memory.access(key, jax.tree.map(int, transforms))
                gpu_interpreter.get_races().check_read(thread, seen, key, place, source_info=given["source_info"])
    return wgmma(**given)


def by_two_blocks(operation: Callable[..., Any], inputs: dict, aux: dict, dout: Any, **options: Any) -> dict[str, Any]:
    """The output and the gradients of a Hopper operation whose tiles two thread blocks share."""
    o, pull = jax.vjp(lambda x: operation(**x, **aux, blocks=2, **options), inputs)
    return {"o": o} | {f"d{name}": gradient for name, gradient in pull(dout)[0].items()}


def watched_blocks(
    operation: Callable[..., Any], width: int | None, inputs: dict, aux: dict, dout: Any
) -> dict[str, Any]:
    """The same on memory full of NaN and on memory full of zeros, every access watched."""
    found = on_gpu(functools.partial(by_two_blocks, operation, width=width), inputs, aux, dout)
    assert found.clean, found
    return found.result


@contextmanager
def _every(interpreter: Any, name: str) -> Iterator[list[Any]]:
    """Every race detector made meanwhile: there is a new one for each kernel, and JAX keeps the last only."""
    made, kind = [], getattr(interpreter, name)

    def make(*args: Any, **kwargs: Any) -> Any:
        made.append(kind(*args, **kwargs))
        return made[-1]

    with mock.patch.object(interpreter, name, make):
        yield made


def _run(
    f: Callable[..., Any],
    args: tuple[Any, ...],
    simulate: Callable[[str], AbstractContextManager],
    interpreter: Any,
    detector: str,
    reset: Callable[[], None],
) -> Findings:
    results, races = [], False
    for memory in ("nan", "zero"):
        with _every(interpreter, detector) as made, simulate(memory):
            try:
                # A function of its own, so that no program of another run is taken from a cache.
                result = tolerance.quick(lambda *args: f(*args))(*args)
                results.append(jax.tree.map(np.asarray, jax.block_until_ready(result)))
            except Exception as error:
                if "ut-of-bounds" not in str(error):
                    raise
                said = next(line.strip() for line in str(error).splitlines() if "ut-of-bounds" in line)
                return Findings(None, any(d.races_found for d in made), said, False)
            finally:
                # After an exception the simulated memory would still be there.
                reset()
        assert made, "no Pallas kernel ran on the simulated device"
        races |= any(d.races_found for d in made)
    one, other = (jax.tree.leaves(result) for result in results)
    differ = any(a.tobytes() != b.tobytes() for a, b in zip(one, other, strict=True))
    return Findings(results[0], races, None, differ)
