"""Write the tables of profiles/aot/README.md from the profiles beside it."""

from pathlib import Path

from bench.aot.report import sm90_tables, tpu_tables

FILE = "README.md"


def write(folder: Path) -> None:
    """Rewrite all tables, if the folder has a README."""
    if (page := folder / FILE).exists():
        text = tpu_tables.update(page.read_text("utf-8"), tpu_tables.load(folder))
        page.write_text(sm90_tables.update(text, sm90_tables.load(folder)), "utf-8")
