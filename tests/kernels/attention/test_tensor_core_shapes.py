"""The Pallas and Triton attention at sizes and dtypes of tensor cores, with every feature: outputs and all gradients.

The tests also run the output alone: without gradients the forward kernel stores no residuals, and is another program.
On a GPU, where `make gpu` starts with these tests, they run the compiled Hopper kernels, large cases before small ones;
elsewhere all but one case are marked slow.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dantinox import kernels
from dantinox.kernels import workloads
from tests.helpers import cases, tolerance

ON_GPU = jax.default_backend() == "gpu"
UNSUPPORTED = kernels.implementations("attention")
needs_pallas = pytest.mark.skipif(UNSUPPORTED["pallas"] is not None, reason=str(UNSUPPORTED["pallas"]))
needs_triton = pytest.mark.skipif(UNSUPPORTED["triton"] is not None, reason=str(UNSUPPORTED["triton"]))
slow_off_gpu = () if ON_GPU else pytest.mark.slow


def row(T: int, S: int, **sizes: Any) -> workloads.Attention:
    return cases.attention(T, S, **({"H": 4} | sizes))


SMALL = (
    row(129, 129, D=64, window=70, gate="elementwise"),
    row(200, 200, D=128, gate="head", window=65),
    row(300, 300, D=256),
    row(65, 200, D=64, K=1, softcap=2.0, gate="head"),
    row(200, 65, D=128, gate="elementwise"),  # the first queries see no key
    row(129, 300, D=256, window=33, softcap=20.0),
    row(600, 600, D=64, segments="packed"),
    row(600, 600, D=128, segments="packed", window=300, gate="elementwise"),
    row(600, 600, D=256, segments="packed", causal=False),
    row(65, 127, D=64, causal=False, softcap=5.0),
    row(1, 127, D=128, gate="head"),
    row(130, 300, D=128, B=2, segments="unmatched", window=100),
    row(64, 130, D=256, scale=-0.05, gate="elementwise"),
    row(8, 1000, D=256, causal=False),
)
# Many blocks and many rounds of the ring buffers. Interpreted, each would take minutes.
LARGE = (
    row(2048, 2048, D=64, H=8, K=2, gate="head"),
    row(2048, 2048, D=128, H=8, K=2, window=512, gate="elementwise"),
    row(2048, 2048, D=256, window=1024, gate="head"),
    row(1500, 2000, D=128, causal=False, B=2),
    row(2000, 2000, D=128, segments="packed", softcap=30.0),
)
PAIRS = [(case, "bfloat16") for case in [*(LARGE if ON_GPU else ()), *SMALL]] + [
    (case, "float16") for case in SMALL[:6]
]
CASES = itertools.product(PAIRS, ("gradients", "output alone"))  # both use the expected outputs of a pair


@functools.lru_cache(maxsize=1)
def expected(case: workloads.Attention, dtype: str) -> tuple[tolerance.Arguments, tolerance.Arrays, tolerance.Arrays]:
    """Returns (the arguments, the outputs of plain jnp, those of the reference)."""
    inputs, aux, dout = cases.draw(case)
    given = tolerance.round_inputs(inputs, dout, dtype, aux=aux)
    return given, *tolerance.expected_outputs("attention", given, cases.options(case))


def name(value: Any) -> str:
    return value if isinstance(value, str) else value.label()


@needs_pallas
@pytest.mark.parametrize(
    ("case", "dtype", "wanted"),
    [pytest.param(*pair, wanted, marks=() if pair == PAIRS[0] else slow_off_gpu) for pair, wanted in CASES],
    ids=name,
)
@pytest.mark.sampled(2)
def test_attention_matches_reference_at_tensor_core_sizes(case, dtype, wanted):
    assert_matches_reference("pallas", case, dtype, wanted)


@needs_triton
@pytest.mark.parametrize(
    ("case", "dtype"),
    [*((case, "float32") for case in SMALL), *PAIRS, (row(70, 70, D=80, window=30), "bfloat16")],
    ids=name,
)
def test_triton_attention_matches_reference_at_tensor_core_sizes(case, dtype):
    with jax.default_matmul_precision("highest"):
        assert_matches_reference("triton", case, dtype, "gradients")


def assert_matches_reference(implementation: str, case: workloads.Attention, dtype: str, wanted: str) -> None:
    (inputs, aux, dout), plain, oracle = expected(case, dtype)
    run = tolerance.program("attention", implementation, cases.options(case), fast_compile=not ON_GPU)
    got = run(inputs, aux, dout if wanted == "gradients" else None)
    tolerance.assert_outputs_match(got, plain, oracle if wanted == "gradients" else {"o": oracle["o"]}, dtype)
    if case.causal and case.T > case.S:
        for output in {"o", "dq", "dgate"} & set(got):
            assert not np.any(got[output][:, : case.T - case.S]), f"{output}: a query that sees no key"


@needs_pallas
@pytest.mark.parametrize("D", [pytest.param(D, id=f"D={D}", marks=slow_off_gpu) for D in (64, 128, 256)])
def test_masked_keys_do_not_affect_output_at_tensor_core_sizes(D):
    case = row(65, 300, D=D, window=100, segments="unmatched", gate="head")
    inputs, aux, dout = cases.draw(case)
    inputs = {name: jnp.asarray(x, "bfloat16") for name, x in inputs.items()}
    run = tolerance.program("attention", "pallas", cases.options(case), fast_compile=not ON_GPU)
    once, again = (run(inputs, aux, jnp.asarray(dout, "bfloat16")) for _ in range(2))
    masked = aux["segment_ids"][1][0] == 99
    masked |= np.arange(300) < 300 - 65 - 100 + 1
    poisoned = {n: jnp.where(masked[None, :, None, None], jnp.nan, x) if n in "kv" else x for n, x in inputs.items()}
    tolerance.assert_bit_equal(once, again)
    tolerance.assert_bit_equal(once, run(poisoned, aux, jnp.asarray(dout, "bfloat16")))
