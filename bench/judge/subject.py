"""What is judged: an implementation by its name, or a file that defines one."""

import importlib.util
import sys
from pathlib import Path

from dantinox import kernels


def load(op: str, name_or_file: str) -> str:
    """Return the name of the implementation to judge, registered from its file if it is one.

    Args:
        op: the operation.
        name_or_file: the name of an implementation, or the path of a Python file that calls
            `dantinox.kernels.register` or defines a function with the operation's name.

    Raises:
        ValueError: there is no such implementation or file, or the file defines none.
    """
    path = Path(name_or_file)
    if path.suffix != ".py":
        names = [name for name in kernels.implementation_names(op) if name not in ("auto", "reference")]
        if name_or_file not in names:
            raise ValueError(f"{op} has no implementation {name_or_file!r}; allowed: {', '.join(names)}, or a .py file")
        return name_or_file
    if not path.is_file():
        raise ValueError(f"no file {name_or_file!r}")
    before = set(kernels.implementation_names(op))
    module = _import(path)
    registered = [name for name in kernels.implementation_names(op) if name not in before]
    if registered:
        return registered[-1]
    function = getattr(module, op, None)
    if not callable(function):
        raise ValueError(f"{name_or_file} neither calls dantinox.kernels.register nor defines a function {op}")
    name = path.stem if path.stem not in before else f"{path.stem}_"
    kernels.register(op, name, function)
    return name


def _import(path: Path) -> object:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    sys.path.insert(0, str(path.parent.absolute()))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        where = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise ValueError(f"{path} cannot be imported: {type(error).__name__}: {error}{where}") from error
    return module
