"""The log of a run: lines on the terminal, CSV files and TensorBoard."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

from revit_fast.io.atomic import replaced
from revit_fast.io.names import on_one_line, say, whole_number

STEPS, EPOCHS = "steps.csv", "epochs.csv"


class RunLog:
    """Writes rows of numbers by update and by epoch to CSV files and, if it is installed, to TensorBoard.

    Args:
        folder: folder of the files; None: nothing is written.
        step: update that the run starts from; rows of later updates, which an interrupted run left, are removed.
        evaluated: update after which the model was last evaluated; rows of later evaluations are removed as well.
        terminal: where progress is printed; None: nowhere.
    """

    def __init__(self, folder: Path | None, step: int = 0, evaluated: int = 0, terminal: TextIO | None = None) -> None:
        self._folder, self._terminal, self._board = folder, terminal, None
        if folder is None:
            return
        _drop_rows_after(folder / STEPS, step)
        _drop_rows_after(folder / EPOCHS, evaluated)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.say('tensorboard/ is left out; it needs tensorboard: pip install "revit-fast[train]"')
            return
        try:
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        except UnicodeEncodeError:
            self.say(f"{on_one_line(str(folder))}: TensorBoard's files are left out, as it takes only names in UTF-8")

    def add(self, name: str, row: Mapping[str, float]) -> None:
        """Appends a row, whose first column is the update."""
        if self._folder is None:
            return
        path = self._folder / name
        new = not path.exists()
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(row)
            writer.writerow([_text(value) for value in row.values()])
        if self._board is not None:
            for column, value in row.items():
                self._board.add_scalar(f"{name.removesuffix('.csv')}/{column}", value, int(row["step"]))

    def say(self, text: str) -> None:
        """Prints a line."""
        say(self._terminal, text)

    def close(self) -> None:
        """Writes buffered rows and closes TensorBoard's file."""
        if self._board is not None:
            self._board.close()


def read_rows(path: Path) -> list[dict[str, float]]:
    """The rows of a file that `RunLog` wrote; [] if there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [{column: float(value) for column, value in row.items()} for row in csv.DictReader(file)]


def _text(value: float) -> str:
    return str(value) if isinstance(value, int) else repr(float(value))


def _drop_rows_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    with path.open(newline="", encoding="utf-8") as file:
        header, *rows = list(csv.reader(file)) or [[]]
    # A killed run may have left half a line at the end.
    kept = [row for row in rows if len(row) == len(header) and _at_most(step, row[0])]
    if not kept:
        path.unlink()
        return
    with replaced(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *kept])


def _at_most(step: int, text: str) -> bool:
    number = whole_number(text)
    return number is not None and number <= step


def percentages(values: Sequence[float]) -> str:
    """Shares as text in the form `91.2 90.1 87.5 %`."""
    return " ".join(f"{100 * value:.1f}" for value in values) + " %"
