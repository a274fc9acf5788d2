"""A row reaches no other row, and no matrix but that of its group: bit for bit, in outputs and gradients."""

import numpy as np
import pytest

from dantinox.kernels import workloads
from tests.helpers import cases, tolerance

IMPLEMENTATIONS = ("reference", *tolerance.runnable_implementations("grouped_matmul"))
SIZES = (5, 0, 9, 3)
FILLS = (0, 60000, np.nan, np.inf)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("fill", FILLS[1:], ids=str)
def test_values_of_other_rows_and_groups(fill, implementation):
    inputs, aux, dout = cases.draw(cases.make_workload(workloads.GroupedMatmul, N=20, M=8, F=12, E=4, sizes=SIZES))
    inputs, dout = {name: np.float32(x) for name, x in inputs.items()}, np.float32(dout)
    owner = np.repeat(np.arange(5), [*SIZES, 3])
    row, group = np.arange(20) == 6, np.arange(4) == 2  # a row of the group
    changed = {
        "a row": (inputs | {"x": np.where(row[:, None], np.float32(fill), inputs["x"])}, dout),
        "a cotangent": (inputs, np.where(row[:, None], np.float32(fill), dout)),
        "a matrix": (inputs | {"w": np.where(group[:, None, None], np.float32(fill), inputs["w"])}, dout),
    }
    form = tolerance.kernel_variants(implementation, tolerance.program("grouped_matmul", implementation))
    for run in form.values():
        before = run(inputs, aux, dout)
        for what, (others, dy) in changed.items():
            after = run(others, aux, dy)
            rows = owner != 2 if what == "a matrix" else ~row
            kept = [
                {name: np.asarray(x)[~group if name == "dw" else rows] for name, x in r.items()}
                for r in (before, after)
            ]
            tolerance.assert_bit_equal(*kept)
