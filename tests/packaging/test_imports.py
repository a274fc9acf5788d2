"""Import rules between packages, read from the source, including imports inside functions."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("reference", "kernels", "dantinox", "bench")
LINKS = ("kernels", "reference")  # folders at the top that `dantinox` holds as links
# numpy: shapes. triton: kernels written in it.
ALLOWED = {
    "reference": {"jax", "jaxtyping", "dantinox.reference"},
    "kernels": {"jax", "jaxtyping", "numpy", "dantinox.kernels", "jax_triton", "triton"},
}
BACKENDS = {"xla", "pallas_tpu", "pallas_cpu", "pallas_sm90", "triton"}


class Import(NamedTuple):
    file: str
    line: int
    module: str  # of `from a import b` a.b, where that is a module of ours
    functions: tuple[str, ...]  # the functions around it, outermost first

    @property
    def package(self) -> str:
        """What it is a part of: `dantinox.kernels`, `dantinox.reference`, or the first part of its name."""
        parts = self.module.split(".")
        return ".".join(parts[:2]) if parts[0] == "dantinox" and parts[1:2] and parts[1] in LINKS else parts[0]


def imports(tree: ast.AST, file: str, around: tuple[str, ...] = ()) -> Iterator[Import]:
    """Every import below a node, but for those that only a type checker makes."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(file, node.lineno, alias.name, around)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: a relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield Import(file, node.lineno, whole if whole in MODULES else str(node.module), around)
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        yield from imports(node, file, (*around, node.name) if inside else around)


def sources(package: str) -> list[Path]:
    files = sorted((ROOT / package).rglob("*.py"))
    return [file for file in files if package != "dantinox" or file.relative_to(ROOT).parts[1] not in LINKS]


def module_of(path: Path) -> str:
    """The name that a file is imported by."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(("dantinox", *parts) if parts[0] in LINKS else parts)


MODULES = {module_of(path): path for package in PACKAGES for path in sources(package)}


def imported(package: str) -> list[Import]:
    found = []
    for path in sources(package):
        found += imports(ast.parse(path.read_text()), str(path.relative_to(ROOT)))
    return found


@pytest.mark.parametrize("package", ["reference", "kernels"])
def test_lower_layers_import_only_jax_and_themselves(package):
    allowed = ALLOWED[package] | set(sys.stdlib_module_names)
    serves_reference = lambda i: (
        package == "kernels" and i.package == "dantinox.reference" and "_reference" in i.functions
    )
    assert [i for i in imported(package) if i.package not in allowed and not serves_reference(i)] == []


def test_dantinox_does_not_import_bench():
    assert [i for i in imported("dantinox") if i.package == "bench"] == []


@pytest.mark.parametrize("package", [*PACKAGES, "scripts"])
@pytest.mark.sampled(2)
def test_tests_are_imported_by_tests_only(package):
    assert [i for i in imported(package) if i.package == "tests"] == []


@pytest.mark.parametrize("package", [*PACKAGES, "tests", "scripts"])
@pytest.mark.sampled(4)
def test_kernels_and_reference_have_one_import_name(package):
    assert [i for i in imported(package) if i.package in LINKS] == []


@pytest.mark.parametrize("package", [*PACKAGES, "tests", "scripts"])
@pytest.mark.sampled(4)
def test_shim_modules_are_not_imported(package):
    """They only start the programs of `dantinox.cli`."""
    shims = {f"dantinox.{name}" for name in ("train", "generate", "evaluate", "export", "doctor")}
    of_module = lambda i: i.module in shims and "import generate" not in source_line(i)
    assert [i for i in imported(package) if of_module(i)] == []


def source_line(found: Import) -> str:
    return (ROOT / found.file).read_text().splitlines()[found.line - 1]


def backend(module: str) -> str | None:
    return next((part for part in module.split(".") if part in BACKENDS), None)


def test_no_backend_imports_another():
    found = [i for i in imported("kernels") if i.package == "dantinox.kernels"]
    pairs = [(i, backend(module_of(ROOT / i.file)), backend(i.module)) for i in found]
    assert [i for i, own, other in pairs if own and other and own != other] == []
    assert {own for _, own, _ in pairs} >= BACKENDS


def in_cycles(arrows):
    """What is left of an import graph when all that leads to no cycle is taken out."""
    while leaves := {name for name, to in arrows.items() if not to & arrows.keys()}:
        arrows = {name: to for name, to in arrows.items() if name not in leaves}
    return arrows


@pytest.mark.parametrize("package", ["kernels", "dantinox", "bench"])
@pytest.mark.sampled(2)
def test_imports_have_no_cycle(package):
    """Of imports at the top of files; a package's own file counts as a module, not as all that is in it."""
    arrows = {
        module_of(path): {i.module for i in imports(ast.parse(path.read_text()), "") if not i.functions}
        & MODULES.keys()
        for path in sources(package)
    }
    assert in_cycles(arrows) == {}


def test_the_folders_of_dantinox_import_one_another_in_one_direction():
    folder = lambda module: module.split(".")[1]
    folders = {path.name for path in (ROOT / "dantinox").iterdir() if path.is_dir() and path.name not in LINKS}
    arrows = {name: set() for name in folders if name != "__pycache__"}
    for i in imported("dantinox"):
        importer = Path(i.file).parts[1]
        if importer in arrows and i.package == "dantinox" and "." in i.module and folder(i.module) in arrows:
            arrows[importer].add(folder(i.module))
    assert in_cycles({name: to - {name} for name, to in arrows.items()}) == {}


def test_kernels_import_without_the_model():
    heavy = {"flax", "optax", "orbax", "tyro", "yaml"}
    code = f"import sys, dantinox.kernels as k; k.attention; print(*{heavy} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "\n"), done.stderr


def test_no_function_shadows_a_package_and_no_module_is_callable():
    code = """
import types
import dantinox.kernels.ops.attention.xla as xla
import dantinox.cli.generate, dantinox.kernels, dantinox.reference
from dantinox import evaluate, kernels
assert xla.attention is not kernels.attention and isinstance(evaluate, types.ModuleType)
assert isinstance(dantinox.generate, types.FunctionType) and isinstance(kernels.moe_mlp, types.FunctionType)
assert not any(callable(module) for module in (dantinox, kernels, dantinox.cli.generate, evaluate))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


ORDERS = {
    "program first": "import dantinox.generate",
    "function first": "import dantinox; dantinox.generate; import dantinox.generate",
    "both by name": "from dantinox import evaluate, generate; import dantinox.generate",
    "under another name": "import dantinox.generate as f; assert callable(f)",
    "implementation first": "import dantinox.inference.generate, dantinox.generate",
}


CHECK = """
import sys, types
import dantinox.evaluate, dantinox.export, dantinox.train
import dantinox.inference.generate as module
assert dantinox.generate is module.generate
assert not any(isinstance(getattr(dantinox, name), types.ModuleType) for name in dantinox.__all__)
assert all(getattr(dantinox, name) is sys.modules[f"dantinox.{name}"] for name in ("evaluate", "export", "train"))
"""
FORKS = """
import os, sys, flax.nnx  # takes most of the time, and names nothing of ours
for order in sys.argv[2:]:
    pid = os.fork()
    if pid == 0:
        exec(order + sys.argv[1])
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0, order
"""


def test_public_functions_do_not_depend_on_what_is_imported_first():
    command = [sys.executable, "-c", FORKS, CHECK, *ORDERS.values()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_import_rules_name_existing_files():
    for package in ("reference", "kernels", "dantinox"):
        assert len(imported(package)) > 5
    for name in LINKS:
        assert (ROOT / "dantinox" / name).readlink() == Path("..") / name


@pytest.mark.parametrize("package", PACKAGES)
def test_files_have_at_most_400_lines(package):
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sources(package)}
    assert {file: n for file, n in lines.items() if n > 400} == {}
