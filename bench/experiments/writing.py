"""Reports of experiments: Markdown made only from numbers, and a plot of the same numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.experiments.stats import Effect, Spread, paired, spread
from revit_fast.io.atomic import replaced


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [list(heads), ["---"] * len(heads), *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines)


def number(value: float | None, digits: int = 2) -> str:
    """A number with `digits` decimals; "-" for None."""
    return "-" if value is None else f"{value:.{digits}f}"


def percent(value: float | None, digits: int = 1) -> str:
    """A share in per cent."""
    return "-" if value is None else f"{100 * value:.{digits}f} %"


def mean_spread(values: Sequence[float | None], scale: float = 1.0, digits: int = 2) -> str:
    """`mean ± standard deviation` of the values over seeds that are not None."""
    s: Spread = spread(values)
    if s.mean is None:
        return "-"
    return number(scale * s.mean, digits) + ("" if s.sd is None else f" ± {number(scale * s.sd, digits)}")


def accuracies(values: Sequence[float | None]) -> str:
    """Accuracies over seeds in per cent."""
    return mean_spread(values, 100.0)


def effect_cell(effect: Effect, scale: float = 1.0, digits: int = 2) -> str:
    """`+1.20 [+0.40, +2.00]`, in bold if the interval excludes zero."""
    if effect.mean is None:
        return "-"
    text = f"{scale * effect.mean:+.{digits}f}"
    if effect.low is None:
        return f"{text} (one seed)"
    text += f" [{scale * effect.low:+.{digits}f}, {scale * effect.high:+.{digits}f}]"
    return f"**{text}**" if effect.shown else text


def finding(what: str, effect: Effect, unit: str = "points", scale: float = 100.0, digits: int = 2) -> str:
    """A sentence that claims an effect only if the interval over seeds excludes zero."""
    if effect.mean is None:
        return f"- {what}: no seed gave both values, so nothing can be said."
    size = f"{scale * effect.mean:+.{digits}f} {unit}".rstrip()
    if effect.low is None:
        return f"- {what}: {size} with one seed, which shows no effect: more seeds are needed."
    if effect.low == effect.high:
        return f"- {what}: no effect shown ({size} with each of {effect.n} seeds, whose spread is none)."
    interval = f"95 % interval {scale * effect.low:+.{digits}f} to {scale * effect.high:+.{digits}f}, {effect.n} seeds"
    if not effect.shown:
        return f"- {what}: no effect shown ({size}, {interval}, which includes zero)."
    return f"- {what}: {'higher' if effect.mean > 0 else 'lower'} by {size.lstrip('+-')} ({interval})."


def compare(what: str, values: Sequence[float | None], reference: Sequence[float | None], **options: Any) -> str:
    """`finding` for the paired differences."""
    return finding(what, paired(values, reference), **options)


@dataclass(frozen=True)
class Series:
    """Points of a panel.

    Attributes:
        label: label in the legend.
        x: numbers, or names of bars.
        y: numbers; None leaves a gap.
        error: half the length of error bars, or None.
    """

    label: str
    x: Sequence[Any]
    y: Sequence[float | None]
    error: Sequence[float | None] | None = None


@dataclass(frozen=True)
class Panel:
    """One set of axes; `kind` is "line" or "bar"."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    kind: str = "line"
    log_x: bool = False
    log_y: bool = False


def over_seeds(label: str, x: Sequence[Any], values: Sequence[Sequence[float | None]], scale: float = 1.0) -> Series:
    """Mean and standard deviation of `values[seed][i]` at `x[i]`."""
    spreads = [spread([row[i] for row in values]) for i in range(len(x))]
    means = [None if s.mean is None else scale * s.mean for s in spreads]
    return Series(label, list(x), means, [scale * (s.sd or 0.0) for s in spreads])


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def draw(panels: Sequence[Panel], folder: Path, name: str) -> str:
    """Draws panels side by side as `name`.svg, all or nothing.

    Returns:
        The name of the file.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    file = f"{name}.svg"
    with rc_context({"svg.hashsalt": "revit-fast"}):  # the same panels give the same bytes
        figure = Figure(figsize=(5.5 * len(panels), 4.2), layout="constrained")
        for i, panel in enumerate(panels):
            _draw_panel(figure.add_subplot(1, len(panels), i + 1), panel)
        with replaced(folder / file) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})
    return file


def _draw_panel(axes, panel: Panel) -> None:
    n = len(panel.series)
    for i, series in enumerate(panel.series):
        y = [float("nan") if value is None else value for value in series.y]
        error = None if series.error is None else [value or 0.0 for value in series.error]
        if panel.kind == "bar":
            places = [k + (i - (n - 1) / 2) * 0.8 / n for k in range(len(y))]
            axes.bar(places, y, 0.8 / n, yerr=error, capsize=2, label=series.label)
            axes.set_xticks(range(len(y)), [str(x) for x in series.x], rotation=30 if len(y) > 5 else 0)
        elif error is None:
            axes.plot(series.x, y, label=series.label, linewidth=1)
        else:
            axes.errorbar(series.x, y, error, fmt="o-", markersize=4, linewidth=1, capsize=2, label=series.label)
    axes.set_title(panel.title)
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    if panel.log_x:
        axes.set_xscale("log")
    if panel.log_y:
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    if n > 1:
        axes.legend(fontsize=8)
