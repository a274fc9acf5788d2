"""Run one program of `bench` without its command line: `python -m bench.gpu.child MODULE JSON`.

The module has a dataclass `Arguments` and a function `run(Arguments) -> int`. Command lines need tyro, which the
machine may lack; this program needs only the standard library.
"""

import importlib
import json
import sys
from collections.abc import Sequence

from bench.gpu.process import prepare_child


def main(argv: Sequence[str]) -> int:
    """Build the module's arguments from JSON, run it and return its exit status."""
    prepare_child()
    name, text = argv
    values = json.loads(text)
    module = importlib.import_module(name)
    for field, value in values.items():
        if isinstance(value, list):
            values[field] = tuple(value)
    if "settings" in values:  # overrides of a preset
        from dantinox.config import Config

        values["settings"] = Config.from_preset(values.get("preset") or "nano", **values["settings"])
    return module.run(module.Arguments(**values))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
