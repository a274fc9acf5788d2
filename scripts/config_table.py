"""Print the tables of all settings for README.md, read from the source of their classes."""

import ast
import dataclasses
import inspect
import sys
from itertools import pairwise
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

sys.path.insert(0, str(Path(__file__).parents[1]))

from dantinox import config, kernels

SECTIONS = {
    "Model": config.ModelConfig,
    "Data": config.DataConfig,
    "Optimizer": config.OptimConfig,
    "Run": config.TrainConfig,
}


def field_docstrings() -> dict[str, str]:
    """Map the name of each field to the string below it."""
    texts = {}
    for section in SECTIONS.values():
        (definition,) = ast.parse(inspect.getsource(section)).body
        for field, text in pairwise(definition.body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                texts[field.target.id] = " ".join(text.value.value.split())
    return texts


def table() -> str:
    """Format the settings as Markdown, with a table per section."""
    texts, tables = field_docstrings(), []
    for title, section in SECTIONS.items():
        hints = get_type_hints(section)
        rows = [f"| {title} | default | |", "|---|---|---|"]
        for field in dataclasses.fields(section):
            hint, text = hints[field.name], texts[field.name]
            choices = kernels.IMPLEMENTATION_NAMES if hint == config.Implementation else get_args(hint)
            if get_origin(hint) is Literal or hint == config.Implementation:
                text += " `" + "` `".join(choices) + "`"
            flag = "--" + field.name.replace("_", "-")
            rows.append(f"| `{flag}` | {field.default if field.default != '' else '(empty)'} | {text} |")
        tables.append("\n".join(rows))
    return "\n\n".join(tables)


if __name__ == "__main__":
    print(table())
