"""The Pallas decode kernels of TPUs, simulated, and of CPUs, and the blocks that both visit."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench import numpy_interpreter
from bench.verification import race_detector
from bench.verification.fast_compile import jit_fast_compile
from dantinox import kernels
from dantinox.kernels import workloads
from dantinox.kernels.dispatch import target_device
from dantinox.kernels.ops.decode_attention.block_table import make_block_table
from dantinox.kernels.ops.decode_attention.pallas_tpu import block_sizes
from tests.helpers import cases, tolerance
from tests.helpers.decode_steps import draw

V6E = ("tpu", "TPU v6 lite")


def row(*lengths: int, **sizes) -> workloads.Decode:
    return cases.make_workload(workloads.Decode, lengths=lengths, **sizes)


@pytest.mark.parametrize("block_size", [1, 3, 4, 8], ids="block_size={}".format)
@pytest.mark.sampled(2)
def test_block_table_lists_blocks_with_visible_tokens(block_size):
    for C, max_visible in itertools.product((1, 8, 10, 13), (1, 2, 5, 13)):
        max_visible, lengths = min(max_visible, C), np.arange(3 * C + 2)
        make_table = functools.partial(make_block_table, C=C, max_visible=max_visible, block_size=block_size)
        table = numpy_interpreter.run(make_table, np.int32(lengths))
        expected = []
        for b, length in enumerate(lengths):
            visible = [p % C // block_size for p in range(max(0, length + 1 - max_visible), length + 1)]
            expected += [(b, block) for block in dict.fromkeys(visible)]
        num_steps = int(table.num_steps)
        assert num_steps == len(expected) and table.ends[-1] == num_steps and table.sequence.shape[0] >= num_steps
        assert list(zip(table.sequence[:num_steps].tolist(), table.block[:num_steps].tolist(), strict=True)) == expected
        np.testing.assert_array_equal(table.slot, lengths % C)
        np.testing.assert_array_equal(table.num_visible, np.minimum(lengths + 1, max_visible))


@pytest.mark.parametrize("T", [2, 5, 8])
@pytest.mark.sampled(2)
def test_block_table_of_several_tokens_writes_each_block_once(T):
    """The blocks that hold new tokens, each in consecutive steps among which is the block's own."""
    for C, max_visible, block_size in itertools.product((8, 10, 13), (1, 3, 13), (1, 3, 4)):
        max_visible, lengths = min(max_visible, C), np.arange(3 * C + 2)
        make_table = functools.partial(make_block_table, C=C, max_visible=max_visible, block_size=block_size, T=T)
        table = numpy_interpreter.run(make_table, np.int32(lengths))
        steps = list(zip(table.sequence.tolist(), table.block.tolist(), table.written.tolist(), strict=True))
        steps = steps[: int(table.num_steps)]
        for b, length in enumerate(lengths):
            seen = range(max(0, length + 1 - max_visible, length + T - C), length + T)
            blocks = [block for sequence, block, _ in steps if sequence == b]
            assert blocks == list(dict.fromkeys(p % C // block_size for p in seen))
            written = [block for block, _ in itertools.groupby(to for sequence, _, to in steps if sequence == b)]
            assert sorted(written) == sorted({p % C // block_size for p in range(length, length + T)})
            own_steps = {block for sequence, block, to in steps if sequence == b and block == to}
            assert own_steps == set(written)


TILED = {  # whole blocks of 16 slots: the simulator supports no others
    "a window across the end of the ring buffer": row(5, 40, 48, 100, C=48, D=128, window=11, gate="elementwise"),
    "a ring buffer of three blocks, cap, gate": row(0, 47, 48, 150, C=48, D=128, softcap=1.5, gate="head"),
    "one head, one token": row(0, 16, C=32, H=1, K=1, D=128, window=1),
    # Tokens in one block, in two, across the end; all blocks; more tokens than a block has slots.
    "five tokens, window": row(5, 30, 45, 100, C=48, D=128, window=11, new_tokens=5, gate="elementwise"),
    "three tokens": row(0, 44, 47, 152, C=48, D=128, H=3, K=1, new_tokens=3, softcap=1.5, sinks=True),
    "twenty tokens": row(0, 12, 39, 62, C=48, H=2, K=1, D=128, window=25, new_tokens=20, gate="head"),
}
TOKENS_IN_LANES = {  # blocks of 128 slots
    "tokens in lanes, a window across the end": row(5, 250, 384, 700, C=384, D=8, window=150, gate="elementwise"),
    "tokens in lanes, cap, gate": row(0, 383, 385, C=384, H=3, K=1, D=40, softcap=1.5, gate="head"),
    "tokens in lanes, one token": row(0, 256, C=256, H=1, K=1, D=64, window=1),
    "tokens in lanes, five tokens": row(5, 254, 381, C=384, D=8, window=150, new_tokens=5, sinks=True),
    "tokens in lanes, two tokens": row(0, 382, 900, C=384, H=3, K=1, D=40, new_tokens=2, gate="head"),
}
TPU_CASES = TILED | TOKENS_IN_LANES


def run_with_race_detection(operation: Callable[..., Any], *args: Any) -> Any:
    """Runs on JAX's simulated TPU, with race detection."""
    findings = race_detector.on_tpu(operation, *args, cores=1)
    assert not findings.races and findings.out_of_bounds is None
    return findings.result


@pytest.mark.parametrize(
    "run",
    [
        pytest.param(numpy_interpreter.run, id="numpy"),
        pytest.param(run_with_race_detection, id="race detector", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", TPU_CASES)
@pytest.mark.sampled(4)
def test_tpu_kernel_appends_and_attends(name, run, monkeypatch):
    """The kernel writes the new tokens' slots and nothing else of the cache."""
    case = TPU_CASES[name]
    assert block_sizes.tokens_in_lanes(case.C, case.D) == (name in TOKENS_IN_LANES)
    monkeypatch.setattr(block_sizes, "choose_block_size", lambda *_: 128 if name in TOKENS_IN_LANES else 16)
    step = draw(case, fill=np.nan)
    inputs = {key: jnp.float32(x) for key, x in step.inputs.items()}
    cache = kernels.KVCache(jnp.float32(step.cache_k), jnp.float32(step.cache_v), **case.integer_inputs())
    operation = lambda implementation, inputs, cache: kernels.decode_attention(
        **inputs, cache=cache, **case.options(), implementation=implementation
    )
    with target_device(*V6E):
        o, new_cache = run(functools.partial(operation, "pallas"), inputs, cache)
    reference, _ = numpy_interpreter.run(functools.partial(operation, "reference"), inputs, cache)
    tolerance.assert_within_bound({"o": o}, {"o": reference}, {"o": step.o}, "float32")
    for ring_buffer, old, new in ((new_cache.k, step.cache_k, "k"), (new_cache.v, step.cache_v, "v")):
        expected, tokens = old.copy(), step.inputs[new].reshape(case.B, -1, case.K, case.D)
        for b, t in np.ndindex(case.B, case.new_tokens):
            expected[b, :, (case.lengths[b] + t) % case.C] = tokens[b, t]
        np.testing.assert_array_equal(ring_buffer, expected)


def test_tokens_of_too_many_rows_are_refused_and_auto_takes_xla():
    case = row(0, C=256, H=8, K=1, D=128, new_tokens=17)
    arrays = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in case.shapes().items()}
    cache = kernels.KVCache.zeros(1, 1, 256, 128, jnp.bfloat16)
    step = lambda name, arrays, cache: kernels.decode_attention(**arrays, cache=cache, implementation=name)
    with target_device(*V6E):
        with pytest.raises(NotImplementedError, match="17 tokens of 8 heads per KV head and the kernel takes 128 rows"):
            jax.eval_shape(functools.partial(step, "pallas"), arrays, cache)
        assert jax.eval_shape(functools.partial(step, "auto"), arrays, cache)[0].shape == (1, 17, 8, 128)


@pytest.mark.parametrize("min_filled", [0, 0.5], ids=["any length", "half full"])
@pytest.mark.parametrize(
    ("C", "window"),
    [(600, None), (1100, 300), (1537, 513)],
    ids=["C=600", "C=1100 window=300", "C=1537 window=513"],
)
@pytest.mark.sampled(6)
def test_several_blocks_match_python_loops(C, window, min_filled):
    """Block by block, and batched if every ring buffer is at least half full."""
    lengths = (int(min_filled * C) - 1, C - 2, C - 1, 3 * C + 7) if min_filled else (0, C // 2 - 2, C - 1, 3 * C + 7)
    case = row(*lengths, C=C, window=window, gate="head", D=8)
    run = lambda name: jax.jit(
        lambda inputs, cache: kernels.decode_attention(**inputs, cache=cache, **case.options(), implementation=name)
    )
    pallas, outputs = run("pallas"), []
    for fill in (0, np.nan):
        step = draw(case, fill=fill)
        inputs = {key: jnp.float32(x) for key, x in step.inputs.items()}
        cache = kernels.KVCache(jnp.float32(step.cache_k), jnp.float32(step.cache_v), **case.integer_inputs())
        outputs.append({"o": pallas(inputs, cache)[0]})
    tolerance.assert_within_bound(outputs[1], {"o": run("reference")(inputs, cache)[0]}, {"o": step.o}, "float32")
    tolerance.assert_bit_equal(*outputs)


@pytest.mark.parametrize("name", ["xla", "pallas"])
@pytest.mark.parametrize("mapped", ["q", "k", "length"])
@pytest.mark.sampled(6)
def test_vmap_equals_a_loop(name, mapped):
    """As in decoding that tries several tokens on one cache."""
    rng = np.random.default_rng(0)
    shapes = {"q": (3, 4, 8), "k": (3, 2, 8), "v": (3, 2, 8), "ring": (3, 2, 16, 8)}
    x = {key: jnp.array(rng.standard_normal((2, *shape)), jnp.float32) for key, shape in shapes.items()}
    x["length"] = jnp.array([[3, 7, 20], [4, 0, 16]])
    axes = {key: 0 if key == mapped else None for key in x}
    x = {key: value if key == mapped else value[0] for key, value in x.items()}

    def run(x: dict[str, jax.Array]) -> tuple[jax.Array, ...]:
        cache = kernels.KVCache(x["ring"], -x["ring"], x["length"])
        o, cache = kernels.decode_attention(x["q"], x["k"], x["v"], cache, window=9, implementation=name)
        return o, cache.k, cache.v, cache.length

    run_once = jit_fast_compile(run)
    loop = [run_once({key: value[n] if key == mapped else value for key, value in x.items()}) for n in range(2)]
    for batched, *unbatched in zip(jit_fast_compile(jax.vmap(run, (axes,)))(x), *loop, strict=True):
        np.testing.assert_allclose(batched, jnp.stack(unbatched), rtol=1e-5, atol=1e-5)
