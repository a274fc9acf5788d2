"""What a token's choices do not name has no effect on it, whatever it holds: bit for bit, in outputs and gradients."""

import numpy as np
import pytest

from dantinox.kernels import workloads
from tests.helpers import cases, tolerance

IMPLEMENTATIONS = ("reference", *tolerance.runnable_implementations("moe_mlp"))
E = 4
# Ids that no expert has, and expert 3 without tokens. Few rows are multiplied one by one.
IDS = {
    "few rows": np.int32([[0, -1], [E, 9], [2, 0]]),
    "many rows": np.int32([[0, -1], [E, 9], [2, 0], [-7, E], [1, 1], [0, 2], [E, 1], [2, -1]] * 3),
}
FILLS = (0, 60000, np.nan, np.inf)


def draw(ids: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    N, k = ids.shape
    inputs, _, dout = cases.draw(cases.make_workload(workloads.MoE, N=N, M=8, F=12, E=E, k=k))
    return {name: np.float32(x) for name, x in inputs.items()}, np.float32(dout)


def variants(implementation: str):
    return tolerance.kernel_variants(implementation, tolerance.program("moe_mlp", implementation)).items()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
@pytest.mark.sampled(8)
def test_values_that_no_choice_names(ids, implementation):
    """Ids without an expert and their weights, tokens with only such ids and their cotangents, an idle expert."""
    inputs, dout = draw(ids)
    is_none = (ids < 0) | (ids >= E)
    alone, idle = is_none.all(1)[:, None], np.arange(E)[:, None, None] == 3
    hidden = {"x": alone, "expert_weights": is_none, "w_gate": idle, "w_up": idle, "w_down": idle}
    for form, run in variants(implementation):
        results = []
        for fill in FILLS:
            filled = {name: np.float32(np.where(hidden[name], fill, x)) for name, x in inputs.items()}
            results.append(run(filled, {"expert_ids": ids}, np.float32(np.where(alone, fill, dout))))
        for poisoned in results[1:]:
            tolerance.assert_bit_equal(results[0], poisoned)
        got = {name: np.asarray(x) for name, x in results[0].items()}
        for name, mask in {
            "o": alone,
            "dx": alone,
            "dexpert_weights": is_none,
            "dw_gate": idle,
            "dw_down": idle,
        }.items():
            assert not np.any(got[name] * mask), f"{form}: {name}"
        assert all(np.any(x) for x in got.values()), form


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
@pytest.mark.sampled(8)
def test_ids_without_an_expert_match_their_absence(ids, implementation):
    """The same as with an expert of zeros in their place."""
    inputs, dout = draw(ids)
    extended = {
        name: np.concatenate([x, np.zeros_like(x[:1])]) if name.startswith("w_") else x for name, x in inputs.items()
    }
    with_zeros = np.int32(np.where((ids < 0) | (ids >= E), E, ids))
    expected = tolerance.program("moe_mlp", "reference")(extended, {"expert_ids": with_zeros}, dout)
    got = tolerance.program("moe_mlp", implementation)(inputs, {"expert_ids": ids}, dout)
    for name, value in got.items():
        oracle = expected[name][:E] if name.startswith("dw_") else expected[name]
        scale = float(np.abs(oracle).max())
        np.testing.assert_allclose(value, oracle, rtol=1e-5, atol=1e-5 * scale, err_msg=name)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("fill", FILLS[1:], ids=str)
def test_values_of_other_tokens_and_experts(fill, implementation):
    """A token changes its own results and its experts' gradients; an expert those of its tokens and its own."""
    ids = IDS["many rows"]
    inputs, dout = draw(ids)
    changed = {
        "token 0": inputs | {"x": np.where(np.arange(len(ids))[:, None] == 0, np.float32(fill), inputs["x"])},
        "expert 1": inputs | {"w_up": np.where(np.arange(E)[:, None, None] == 1, np.float32(fill), inputs["w_up"])},
    }
    tokens = {"token 0": np.arange(len(ids)) != 0, "expert 1": (ids != 1).all(1)}
    experts = {"token 0": np.arange(E) != 0, "expert 1": np.arange(E) != 1}
    for _, run in variants(implementation):
        before = run(inputs, {"expert_ids": ids}, dout)
        for what, others in changed.items():
            after = run(others, {"expert_ids": ids}, dout)
            kept = [
                {name: np.asarray(x)[(experts if name.startswith("dw_") else tokens)[what]] for name, x in r.items()}
                for r in (before, after)
            ]
            tolerance.assert_bit_equal(*kept)
