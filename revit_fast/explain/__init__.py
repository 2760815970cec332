"""Explains why each image got its number of tokens: decision, evidence and cost, one entry per image, as HTML or PNG.

Needs Pillow: `pip install "revit-fast[cli]"`; PNG sheets also need matplotlib: `pip install "revit-fast[plot]"`.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from revit_fast.explain.facts import STAGES, Explanation, Length, explain
from revit_fast.explain.html import write_html
from revit_fast.explain.picture import draw_grid
from revit_fast.explain.png import write_png

__all__ = ["STAGES", "WRITERS", "Explanation", "Length", "draw_grid", "explain", "write", "write_html", "write_png"]

WRITERS = {".html": write_html, ".png": write_png}


def write(path: str | PathLike, explanations: Sequence[Explanation]) -> None:
    """Writes a sheet in the format that the path ends in, all or nothing.

    Raises:
        ImportError: for .png without matplotlib.
        ValueError: if the path does not end in .html or .png, or there are more entries than a PNG can hold.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in WRITERS:
        raise ValueError(f"path: expected a name that ends in {' or '.join(WRITERS)}, got {str(path)!r}")
    WRITERS[suffix](path, explanations)
