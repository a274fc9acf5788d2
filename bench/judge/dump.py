"""Write the values that variables of a kernel hold in one step of its grid, as an npz file and as pictures."""

from pathlib import Path

import numpy as np

from bench import numpy_interpreter
from bench.judge import cases, forms
from bench.judge.cases import Case

FOLDER = Path("runs") / "judge"


def dump(op: str, implementation: str, case: Case, names: tuple[str, ...], tile: tuple[int, ...]) -> list[str]:
    """Run a case in NumPy and write variables of its kernels; the form for a TPU if there is one, else that of a CPU.

    Args:
        op: the operation.
        implementation: the implementation.
        case: the case.
        names: variables, as the kernels' source assigns them.
        tile: the last indices of the step of the grid; (): the first step that assigns each variable.

    Returns:
        A line for each variable, and the paths.

    Raises:
        ValueError: no kernel assigns one of the variables in this step.
    """
    problem = cases.draw(case)
    for form in ("TPU", "CPU"):
        with numpy_interpreter.watch(names, tile) as found:
            try:
                forms.run(op, implementation, form, case, problem)
            except (NotImplementedError, forms.NoKernelError):
                continue
        break
    missing = [name for name in names if name not in {variable for _, variable in found.values}]
    if missing:
        assigned, grids = ", ".join(found.assigned) or "nothing", ", ".join(map(str, found.grids)) or "none"
        place = f" in a step that ends with {','.join(map(str, tile))} of the grids {grids}" if tile else ""
        raise ValueError(f"--dump is {', '.join(missing)}: no kernel assigns it{place}; allowed: {assigned}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"{op}-{implementation}.npz"
    np.savez(path, **{f"{kernel}.{name}": _storable(x) for (kernel, name), x in found.values.items()})
    lines = [f"{form} form, --case {case.id!r}: {path}"]
    for (kernel, name), x in found.values.items():
        wide = _storable(x)
        finite = wide[np.isfinite(wide)]
        span = f"{finite.min():.4g} to {finite.max():.4g}" if finite.size else "nothing finite"
        special = f", {np.isnan(wide).sum()} NaN, {np.isinf(wide).sum()} infinite"
        place = ",".join(map(str, found.place_of[kernel, name]))
        picture = _picture(path, f"{kernel}.{name}", wide)
        lines.append(f"  {kernel}.{name} {x.dtype}{list(x.shape)} at {place}: {span}{special}; {picture}")
    return lines


def _storable(x: np.ndarray) -> np.ndarray:
    """Return an array that NumPy's files can hold: 16-bit numbers become float32."""
    return x if x.dtype.kind in "biu" else x.astype(np.float32 if x.dtype.itemsize < 8 else np.float64)


def _picture(path: Path, name: str, x: np.ndarray) -> Path:
    """Draw the last two axes of an array, at the first index of the others; returns the path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    x = np.atleast_2d(x.reshape(-1, *x.shape[-2:])[0] if x.ndim >= 2 else x).astype(np.float64)
    figure, axes = pyplot.subplots(figsize=(7, 6))
    axes.set_facecolor("lightgray")  # infinite and NaN
    image = axes.imshow(np.where(np.isinf(x), np.nan, x), aspect="auto", interpolation="nearest")
    axes.set_title(f"{name} {list(x.shape)}")
    figure.colorbar(image)
    out = path.with_name(f"{path.stem}-{name}.png")
    figure.savefig(out, dpi=100, bbox_inches="tight")
    pyplot.close(figure)
    return out
