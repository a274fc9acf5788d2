"""Who may import whom, read from the source: imports inside functions count like those at the top."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("reference", "kernels", "dantinox", "bench")
OURS = {*PACKAGES, "tests"}
# numpy: shapes, and the float0 zeros that JAX asks for as gradients of integers. triton: kernels written in it.
ALLOWED = {
    "reference": {"jax", "reference"},
    "kernels": {"jax", "numpy", "kernels", "jax_triton", "triton"},
}


class Import(NamedTuple):
    file: str
    line: int
    package: str
    functions: tuple[str, ...]  # the functions around it, outermost first


def imports(tree: ast.AST, file: str, around: tuple[str, ...] = ()) -> Iterator[Import]:
    """Every import below a node."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(file, node.lineno, alias.name.split(".")[0], around)
        elif isinstance(node, ast.ImportFrom):
            package = Path(file).parts[0] if node.level else (node.module or "").split(".")[0]
            yield Import(file, node.lineno, package, around)
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        yield from imports(node, file, (*around, node.name) if inside else around)


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(package: str) -> list[Import]:
    found = []
    for path in sources(package):
        found += imports(ast.parse(path.read_text()), str(path.relative_to(ROOT)))
    return found


@pytest.mark.parametrize("package", ["reference", "kernels"])
def test_the_lower_layers_import_jax_and_themselves(package):
    allowed = ALLOWED[package] | set(sys.stdlib_module_names)
    serves_reference = lambda i: package == "kernels" and i.package == "reference" and "reference" in i.functions
    assert [i for i in imported(package) if i.package not in allowed and not serves_reference(i)] == []


def test_the_model_imports_no_benchmark_and_no_test():
    assert [i for i in imported("dantinox") if i.package in OURS - {"dantinox", "kernels", "reference"}] == []


def test_the_rules_are_about_files_that_are_there():
    for package in ("reference", "kernels", "dantinox"):
        assert len(imported(package)) > 5


@pytest.mark.parametrize("package", PACKAGES)
def test_no_file_is_long(package):
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sources(package)}
    assert {file: n for file, n in lines.items() if n > 400} == {}
