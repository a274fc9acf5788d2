"""The tensor core tests can be collected on a machine that has JAX, NumPy and pytest, and no optional package."""

import itertools
import subprocess
import sys
from pathlib import Path

from tests.helpers import absent_packages

ROOT = Path(__file__).parents[2]
FILES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("tests/kernels/*/test_tensor_core_*.py"))
# Pretends to be on a GPU, which is enough for what is decided before a test runs.
PYTEST = "import sys, jax, pytest; jax.default_backend = lambda: 'gpu'; sys.exit(pytest.main(sys.argv[1:]))"
COLLECT = ("--collect-only", "-q", "-p", "no:cacheprovider")
FIRST_CASE = {  # a size in the id of the first case of each test
    "test_attention_matches_reference_at_tensor_core_sizes": "T=2048",
    "test_grouped_matmul_matches_reference_at_tensor_core_sizes": "N=8192",
    "test_mixture_of_experts_matches_reference_at_tensor_core_sizes": "N=4096",
    "test_three_decode_steps_match_reference_at_tensor_core_sizes": "C=4096",
}


def run_without_packages(folder: Path, code: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run Python without the optional packages."""
    environment = absent_packages.environment_without(folder, *absent_packages.OPTIONAL_PACKAGES)
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_tensor_core_tests_order_large_and_bfloat16_cases_first(tmp_path):
    done = run_without_packages(tmp_path, PYTEST, *COLLECT, *FILES)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = [line.split("::", 1) for line in done.stdout.splitlines() if "::" in line]
    assert len(FILES) >= 3 and sorted({file for file, _ in lines}) == FILES
    found = itertools.groupby((name for _, name in lines), lambda name: name.split("[")[0])
    found = {test: list(names) for test, names in found}
    for test, size in FIRST_CASE.items():
        names = found[test]
        assert size in names[0], names[0]
        narrow = ["-float16" in name for name in names]
        assert narrow == sorted(narrow) and 0 < sum(narrow) < len(names), names
        # Programs without gradients too, but for decoding, which has none.
        assert any(name.endswith("-output alone]") for name in names) == (size != "C=4096"), names


def test_random_shape_tests_need_hypothesis(tmp_path):
    """Collecting a file that needs Hypothesis fails, so the packages are absent indeed."""
    done = run_without_packages(tmp_path, PYTEST, *COLLECT, "tests/kernels/moe/test_moe.py")
    assert done.returncode == 2 and "No module named 'hypothesis'" in done.stdout, done.stdout[-3000:]


def test_find_spec_returns_none_for_absent_packages_only(tmp_path):
    names = [*absent_packages.OPTIONAL_PACKAGES, "numpy", "jax"]
    code = f"from importlib.util import find_spec; print([name for name in {names} if find_spec(name)])"
    assert run_without_packages(tmp_path, code).stdout.strip() == "['numpy', 'jax']"
