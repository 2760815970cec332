"""Reports of an evaluation: rows of numbers as a table, as JSON and as a plot."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from revit_fast.adaptive.policies import PolicySpec
from revit_fast.io.atomic import replaced, write_json

FORMAT = "revit-fast evaluation 1"

PLOTS = (".png", ".svg", ".pdf")
"""File formats for the plot of accuracy over cost."""


@dataclass(frozen=True)
class Time:
    """Measured throughput, from decoded pixels to logits.

    Attributes:
        images_per_s: images per second, median over rounds.
        quartiles: first and third quartile of the images per second.
        ratio: throughput divided by that of the fixed longest length in the same round, median over rounds.
        ratio_quartiles: first and third quartile of the ratio.
    """

    images_per_s: float
    quartiles: tuple[float, float]
    ratio: float
    ratio_quartiles: tuple[float, float]

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Time:
        """The time whose values `asdict` gave, as JSON holds them."""
        return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


@dataclass(frozen=True)
class Row:
    """A way to choose lengths, and its results.

    Attributes:
        name: name of the policy or baseline.
        kind: "fixed", "assigner", "random", "entropy", "cascade", "assigned-cascade" or "oracle".
        accuracy: share of the images that are classified correctly.
        tokens: mean patch tokens per image, summed over all lengths that were run.
        gmacs: mean multiply-adds per image, in billions; they include the assigner's if the policy uses it.
        shares: share of the images that are classified at each length, the longest first.
        difference: accuracy minus that of the longest length.
        interval: paired 95 % interval of the difference; None for means over seeds and for the longest length itself.
        p_value: p-value of McNemar's exact test against the longest length; None in the same cases.
        captured: gain in accuracy over random lengths with the same shares, divided by the oracle's gain over them:
            0 for a random choice, 1 if the choice is right for every image that any length classifies correctly.
        policy: policy with which a pipeline makes the same choice.
        time: throughput; None if it was not measured.
    """

    name: str
    kind: str
    accuracy: float
    tokens: float
    gmacs: float
    shares: tuple[float, ...]
    difference: float
    interval: tuple[float, float] | None = None
    p_value: float | None = None
    captured: float | None = None
    policy: PolicySpec | None = None
    time: Time | None = None


@dataclass(frozen=True)
class Report:
    """The results of an evaluation.

    Attributes:
        rows: one row for every policy and baseline.
        grids: grids of the model.
        n_images: number of evaluated images.
        n_unreadable: number of images that could not be read; no other number includes them.
        n_classes: number of the model's classes.
        label_shares: share of the images for which the oracle chooses each length, the longest first.
        unsolved_share: share of the images that no length classifies correctly.
        assigner_gmacs: multiply-adds of the assigner per image, in billions.
        dtype: name of the dtype of the weights that the model multiplied with, such as "bfloat16".
        machine: setup in which times were measured; None without times.
        verdict: whether adaptive lengths pay here, and what to take (`verdict.with_verdict`); None if it was not asked.
        taken: name of the row to take; None without a verdict.
        right: whether each image is classified correctly, bool `[N]`, by the row's name; not saved.
        correct: whether each length classifies an image correctly, bool `[n_lengths, N]`; not saved.
    """

    rows: tuple[Row, ...]
    grids: tuple[int, ...]
    n_images: int
    n_unreadable: int
    n_classes: int
    label_shares: tuple[float, ...]
    unsolved_share: float
    assigner_gmacs: float
    dtype: str
    machine: Mapping[str, Any] | None = None
    verdict: str | None = None
    taken: str | None = None
    right: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False, compare=False)
    correct: np.ndarray | None = field(default=None, repr=False, compare=False)

    def row(self, name: str) -> Row:
        """The row with this name."""
        return next(row for row in self.rows if row.name == name)

    def with_times(self, times: Mapping[str, Time], machine: Mapping[str, Any]) -> Report:
        """A copy with measured times, given by the names of rows."""
        rows = tuple(replace(row, time=times.get(row.name)) for row in self.rows)
        return replace(self, rows=rows, machine=dict(machine))

    def table(self) -> str:
        """A Markdown table, a description of the images above it, and of the columns below it; then the verdict."""
        timed = any(row.time for row in self.rows)
        heads = ["policy", "accuracy", "to longest", "95 % interval", "p", "tokens", "GMACs", "gain", *_shares(self)]
        heads += ["images/s", "quartiles", "ratio"] if timed else []
        lines = [heads, ["---"] * len(heads), *(_cells(row, timed) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines]
        unreadable = f", {self.n_unreadable} more could not be read" if self.n_unreadable else ""
        labels = ", ".join(f"{g}x{g} {share:.1%}" for g, share in zip(self.grids, self.label_shares, strict=True))
        head = [
            f"{self.n_images} images of {self.n_classes} classes{unreadable}. Smallest right length: {labels} (the "
            f"longest also where none is right: {self.unsolved_share:.1%}). The assigner costs "
            f"{self.assigner_gmacs:.3g} GMACs an image. The model's weights are in {self.dtype}.",
            "",
        ]
        foot = [
            "",
            "To longest: accuracy minus that of the longest length, with a paired 95 % interval and McNemar's exact p. "
            "Tokens: mean patch tokens run. Gain: of the accuracy between random lengths with the same shares and the "
            "oracle, the part that is reached. WxW: images that each length decides.",
        ]
        if timed:
            machine = ", ".join(f"{name} {value}" for name, value in self.machine.items())
            foot += ["", f"Decoded pixels to logits, medians of rounds in turns; {machine}."]
        if self.verdict is not None:
            foot += ["", f"**Verdict.** {self.verdict}"]
        return "\n".join([*head, *table, *foot]) + "\n"

    def to_json(self) -> dict[str, Any]:
        """All values as JSON, except for the results of single images."""
        rows = [asdict(row) | ({"policy": None} if row.kind == "oracle" else {}) for row in self.rows]
        values = asdict(replace(self, rows=(), right={}, correct=None))
        del values["right"], values["correct"]
        return {"format": FORMAT, **values, "rows": rows}

    def save(self, path: str | os.PathLike) -> None:
        """Writes the report as JSON, all or nothing."""
        write_json(path, self.to_json())

    def plot(self, path: str | os.PathLike, *, cost: str = "gmacs") -> None:
        """Draws accuracy over cost, all or nothing; needs matplotlib.

        Args:
            path: .png, .svg or .pdf.
            cost: "gmacs" or "tokens".
        """
        suffix = Path(path).suffix.lower()
        if suffix not in PLOTS or cost not in ("gmacs", "tokens"):
            raise ValueError(f"path, cost: expected .png, .svg or .pdf, and gmacs or tokens, got {path} and {cost!r}")
        try:
            from matplotlib import rc_context
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError:
            raise ImportError('plot: it needs matplotlib: pip install "revit-fast[plot]"') from None
        with rc_context({"svg.hashsalt": "revit-fast"}):
            figure = Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
            FigureCanvasAgg(figure)  # it needs no window system, whatever backend is configured
            axes = figure.add_subplot()
            self._draw(axes, cost)
            metadata = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}}.get(suffix)
            with replaced(path) as temporary:
                figure.savefig(temporary, format=suffix[1:], metadata=metadata)

    def _draw(self, axes, cost: str) -> None:
        styles = {"fixed": "s-", "assigner": "o-", "cascade": "^-", "assigned-cascade": "D-"}
        styles |= {"random": "x", "entropy": "+", "oracle": "*"}
        names = {"fixed": "fixed length", "assigner": "assigner (TLA)", "cascade": "confidence cascade"}
        names["assigned-cascade"] = "assigner, then cascade"
        base = self.rows[0].accuracy
        for kind, style in styles.items():
            rows = sorted((r for r in self.rows if r.kind == kind), key=lambda r: getattr(r, cost))
            if rows:
                x, y = [getattr(r, cost) for r in rows], [100 * r.accuracy for r in rows]
                (line,) = axes.plot(x, y, style, label=names.get(kind, kind), markersize=6, linewidth=1)
                ends = [[100 * (base + end) for end in r.interval or (r.difference,) * 2] for r in rows]
                axes.vlines(x, *zip(*ends, strict=True), color=line.get_color(), linewidth=0.8, alpha=0.6)
        if self.taken is not None:
            row = self.row(self.taken)
            label = f"to take: {row.name}"
            axes.plot(getattr(row, cost), 100 * row.accuracy, "o", ms=14, mfc="none", mec="black", label=label)
        axes.set_xlabel("GMACs an image, mean" if cost == "gmacs" else "patch tokens an image, mean")
        axes.set_ylabel("accuracy, %")
        bars = "bars: 95 % interval of the difference to the longest length"
        axes.set_title(f"{self.n_images} images, {self.n_classes} classes; {bars}", fontsize=9)
        axes.grid(alpha=0.3)
        axes.legend()


def _shares(report: Report) -> list[str]:
    return [f"{grid}x{grid}" for grid in report.grids]


def _cells(row: Row, timed: bool) -> list[str]:
    interval = "" if row.interval is None else f"{100 * row.interval[0]:+.2f} to {100 * row.interval[1]:+.2f}"
    cells = [
        row.name,
        f"{row.accuracy:.2%}",
        f"{100 * row.difference:+.2f}",
        interval,
        "" if row.p_value is None else f"{row.p_value:.2g}",
        f"{row.tokens:.1f}",
        f"{row.gmacs:.4g}",
        "" if row.captured is None else f"{row.captured:.1%}",
        *(f"{share:.1%}" for share in row.shares),
    ]
    if timed:
        t = row.time
        cells += ["", "", ""] if t is None else [f"{t.images_per_s:.0f}", _range(t.quartiles), f"{t.ratio:.2f}"]
    return cells


def _range(quartiles: Sequence[float]) -> str:
    return f"{quartiles[0]:.0f} to {quartiles[1]:.0f}"
