"""The picture of a failure shows the tiles to blame, and `--dump` writes the values of a kernel's variables."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench.judge import cases, dump, outcomes, pictures
from dantinox import kernels
from dantinox.kernels import workloads

GUIDES = Path(__file__).parents[3] / "docs" / "guides"


def case(**sizes) -> cases.Case:
    return cases.Case(workloads.Attention(name="", suites=(), devices=(), D=16, H=1, K=1, **sizes), "float32")


def skips(tiles: set[tuple[int, int]], gradient_only: bool = False):
    """Plain attention that leaves out tiles of 16 queries and 16 keys."""

    def attention(q, k, v, *, scale, **_):
        def plain(q, k, v, skipped):
            query, key = np.indices((q.shape[1], k.shape[1]))
            seen = key <= query
            for i, j in tiles if skipped else ():
                seen &= (query // 16 != i) | (key // 16 != j)
            scores = jnp.where(seen, jnp.einsum("bthd,bshd->bhts", q, k) * scale, -1e30)
            return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores, axis=-1), v)

        if not gradient_only:
            return plain(q, k, v, True)
        f = jax.custom_vjp(lambda *x: plain(*x, False))
        f.defvjp(lambda *x: (plain(*x, False), x), lambda x, do: jax.vjp(lambda *x: plain(*x, True), *x)[1](do))
        return f(q, k, v)

    return attention


@pytest.mark.parametrize("gradient_only", [False, True], ids=["output", "dv"])
def test_picture_marks_the_tile_that_is_skipped(gradient_only):
    kernels.register("attention", "skips", skips({(2, 1)}, gradient_only))
    (outcome,) = outcomes.judge("attention", "skips", ("CPU",), case(T=64, S=64))
    assert outcome.states["o"] == (outcomes.OK if gradient_only else outcomes.WRONG)
    assert outcome.states["dv"] == outcomes.WRONG and "worst at B 0, " in outcome.lines["dv"]
    size, *rows = outcome.picture.splitlines()
    tile = 8 if "of 8 queries" in size else 16 if "of 16 queries" in size else 4
    marked = {
        (i * tile // 16, j * tile // 16)
        for i, row in enumerate(rows)
        for j, mark in enumerate(row.split()[2:])
        if mark == "X"
    }
    assert marked == {(2, 1)}, outcome.picture


def test_picture_of_a_matrix_marks_its_wrong_blocks():
    exact = np.ones((64, 48))
    actual = exact.copy()
    actual[40, 47] = np.nan
    lines = pictures._blocks("NF", actual, exact).splitlines()
    assert lines[0].strip().startswith("blocks of 4 N x 3 F")
    assert [(i, row.count("X")) for i, row in enumerate(lines[1:]) if "X" in row] == [(10, 1)]


@pytest.fixture
def guide() -> str:
    spec = importlib.util.spec_from_file_location("my_attention", GUIDES / "my_attention.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kernels.register("attention", "guide", module.attention)
    return "guide"


def test_dump_writes_the_scores_of_a_tile(guide, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chosen = case(T=300, S=300)
    lines = dump.dump("attention", guide, chosen, ("s", "ds"), (2, 1))
    assert "at 0,0,2,1" in lines[1]
    problem = cases.draw(chosen)
    q, k = (np.asarray(problem.inputs[name])[0, :, 0] for name in "qk")
    expected = (q[256:300] @ k[128:256].T) * 16**-0.5
    with np.load(tmp_path / "runs/judge/attention-guide.npz") as arrays:
        np.testing.assert_allclose(arrays["my_attention.s"][:44], expected, rtol=1e-5, atol=1e-6)
        assert arrays["my_attention_backward.ds"].shape == (128, 128)
    assert (tmp_path / "runs/judge/attention-guide-my_attention.s.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("names", "tile", "message"),
    [
        (("zz",), (), "zz: no kernel assigns it; allowed: .*decay"),
        (("s",), (9, 9), r"ends with 9,9 of the grids \(1, "),
    ],
    ids=["variable", "tile"],
)
def test_dump_of_what_is_not_there_says_what_is(guide, names, tile, message):
    with pytest.raises(ValueError, match=message):
        dump.dump("attention", guide, case(T=40, S=40), names, tile)
