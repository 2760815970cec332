"""Files that benches write: whole or not at all. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from revit_fast.io.atomic import replaced


def write_file(path: Path, text: str) -> None:
    """Writes a file whole or not at all, and its folder if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def replace_section(page: Path, marks: tuple[str, str], lines: Sequence[str]) -> None:
    """Replaces the text between two marks of a page.

    Raises:
        ValueError: if the page does not contain each of the marks exactly once.
    """
    text = page.read_text(encoding="utf-8")
    for mark in marks:
        if text.count(mark) != 1:
            raise ValueError(f"{page}: expected the mark {mark} once, found it {text.count(mark)} times")
    before, after = text.split(marks[0])[0], text.split(marks[1])[1]
    section = "\n".join([marks[0], *lines, marks[1]])
    write_file(page, f"{before}{section}{after}")
