"""Draw the pictures of the architecture page: the imports between packages, a training step, a generated token.

    python docs/pictures.py DIR

The first picture is computed from the source. The flows name functions; each name is resolved, so that a picture never
shows a function that does not exist.
"""

import ast
import pkgutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

ROOT = Path(__file__).parents[1]
INK, FILL, ACCENT = "#24292f", "#eef2f7", "#dbe8d8"
TRAINING_STEP = (
    ("dantinox.training.loop:Loop", "evaluates, saves, logs, stops"),
    ("dantinox.training.trainer:Trainer", "owns the mesh and the compiled steps"),
    ("dantinox.training.train_step:make_train_step", "a pure function of (state, batch, step)"),
    ("dantinox.training.train_step:compute_loss", "forward pass, cross-entropy, router losses"),
    ("dantinox.model.transformer:Transformer", "embedding, blocks, final norm, logits"),
    ("dantinox.model.transformer:Block", "attention branch, then MLP or experts"),
    ("dantinox.kernels:attention", "one signature, several implementations"),
    ("dantinox.kernels:moe_mlp", "routed rows sorted by expert"),
    ("dantinox.training.optimizer:make_optimizer", "gradients to updates"),
)
GENERATED_TOKEN = (
    ("dantinox.inference.generate:generate", "checks prompts, batches them"),
    ("dantinox.inference.prefill:prefill_chunk", "one chunk of the prompts fills the KV cache"),
    ("dantinox.inference.sampling:sample", "logits to the next token"),
    ("dantinox.inference.prefill:decode_step", "one token through all blocks"),
    ("dantinox.kernels:decode_attention", "writes the token into the ring buffer and attends"),
)


def import_graph() -> dict[str, set[str]]:
    """Return, for each package of the repository, the packages that it imports."""
    graph: dict[str, set[str]] = {}
    for path in sorted([*(ROOT / "dantinox").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]):
        if any(parent.is_symlink() for parent in path.parents):
            continue
        name = package(".".join(("dantinox", *path.relative_to(ROOT).with_suffix("").parts)))
        imported = {package(module) for module in imports(path)} - {name, "", "dantinox"}
        graph.setdefault(name, set()).update(imported)
    graph.pop("dantinox", None)
    return {name: {other for other in others if other in graph} for name, others in graph.items()}


def package(module: str) -> str:
    """Return the folder of a module: kernels, dantinox.training, ..."""
    parts = module.split(".")
    if parts[0] != "dantinox":
        return ""
    parts = parts[1:] if len(parts) > 1 and parts[1] in ("dantinox", "kernels", "reference") else parts
    if parts[0] in ("kernels", "reference"):
        return parts[0]
    return ".".join(parts[:2]) if len(parts) > 1 and (ROOT / "dantinox" / parts[1]).is_dir() else "dantinox"


def imports(path: Path) -> Iterator[str]:
    """Yield the absolute names of the modules that a file imports."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def floors(graph: dict[str, set[str]]) -> dict[str, int]:
    """Return the floor of each package: one above the highest package that it imports."""
    height: dict[str, int] = {}

    def floor(name: str, above: tuple[str, ...] = ()) -> int:
        if name in above:
            raise ValueError(f"imports form a cycle: {' -> '.join((*above, name))}")
        if name not in height:
            height[name] = 1 + max((floor(other, (*above, name)) for other in graph[name]), default=-1)
        return height[name]

    for name in graph:
        floor(name)
    return height


def reduced(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """Return the graph without the imports that follow from others (its transitive reduction)."""

    def reaches(name: str) -> set[str]:
        return set().union(*({other} | reaches(other) for other in graph[name])) if graph[name] else set()

    return {
        name: {o for o in others if not any(o in reaches(p) for p in others - {o})} for name, others in graph.items()
    }


def resolve(path: str) -> object:
    """Return the object at "module:name".

    Raises:
        AttributeError, ImportError: there is none.
    """
    return pkgutil.resolve_name(path)


def draw_imports(target: Path) -> None:
    """Draw one box per package, higher floors importing lower ones."""
    graph = import_graph()
    height, edges = floors(graph), reduced(graph)
    rows = [[name for name in graph if height[name] == floor] for floor in range(max(height.values()) + 1)]
    figure, axes = plt.subplots(figsize=(9, 1.05 * len(rows)))
    place = {}
    for floor, names in enumerate(rows):
        for i, name in enumerate(sorted(names)):
            place[name] = ((i + 0.5 + 0.18 * (floor % 2)) / len(names), floor)
    for name, (x, y) in place.items():
        color = ACCENT if name in ("kernels", "reference") else FILL
        axes.add_patch(
            FancyBboxPatch((x - 0.075, y - 0.2), 0.15, 0.4, "round,pad=0.01", fc=color, ec=INK, lw=0.8, zorder=3)
        )
        axes.text(x, y, name.removeprefix("dantinox."), ha="center", va="center", fontsize=9, color=INK, zorder=4)
    for name, others in edges.items():
        for other in others:
            (x0, y0), (x1, y1) = place[name], place[other]
            arrow = FancyArrowPatch(
                (x0, y0 - 0.22), (x1, y1 + 0.22), arrowstyle="->", mutation_scale=9, color="#8a94a0", lw=0.9
            )
            axes.add_patch(arrow)
    save(figure, axes, target, (-0.02, 1.12), (-0.5, len(rows) - 0.5))


def draw_flow(steps: Sequence[tuple[str, str]], target: Path) -> None:
    """Draw functions from top to bottom, each with what it does."""
    figure, axes = plt.subplots(figsize=(9, 0.62 * len(steps)))
    for i, (path, text) in enumerate(steps):
        resolve(path)
        module, _, name = path.partition(":")
        y = -float(i)
        color = ACCENT if module == "dantinox.kernels" else FILL
        axes.add_patch(FancyBboxPatch((0, y - 0.3), 0.46, 0.6, "round,pad=0.008", fc=color, ec=INK, lw=0.8))
        axes.text(
            0.23, y, f"{module.removeprefix('dantinox.')}.{name}", ha="center", va="center", fontsize=9, color=INK
        )
        axes.text(0.5, y, text, ha="left", va="center", fontsize=9, color=INK)
        if i:
            axes.add_patch(
                FancyArrowPatch((0.23, y + 0.68), (0.23, y + 0.32), arrowstyle="->", mutation_scale=9, color=INK)
            )
    save(figure, axes, target, (-0.02, 1), (-len(steps) + 0.4, 0.5))


def save(figure: plt.Figure, axes: plt.Axes, target: Path, x: tuple[float, float], y: tuple[float, float]) -> None:
    """Write a figure without axes as SVG."""
    axes.set(xlim=x, ylim=y)
    axes.axis("off")
    figure.savefig(target, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


def main(folder: Path) -> None:
    """Draw all pictures into a folder."""
    plt.rcParams["svg.hashsalt"] = "dantinox"  # the same source gives the same file
    folder.mkdir(parents=True, exist_ok=True)
    draw_imports(folder / "imports.svg")
    draw_flow(TRAINING_STEP, folder / "training_step.svg")
    draw_flow(GENERATED_TOKEN, folder / "generated_token.svg")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
