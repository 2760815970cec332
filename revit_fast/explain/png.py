"""The sheet as one PNG, drawn with matplotlib. Positions and sizes are in pixels from the upper left corner."""

from __future__ import annotations

import re
import textwrap
import warnings
from collections.abc import Sequence
from os import PathLike

import numpy as np
from PIL import Image

from revit_fast.explain.facts import Bar, Column, Explanation, summary
from revit_fast.explain.html import LEGEND, LIGHT, TITLE
from revit_fast.explain.picture import PICTURE_PX
from revit_fast.io.atomic import replaced

MAX_IMAGES = 200
"""Maximum entries of a sheet. Pillow and other programs take a larger picture for a decompression bomb."""

COLOURS = dict(re.findall(r"--(\w+): (#\w+)", LIGHT))
"""The colours of the HTML sheet, by their names there."""

MARGIN, PAD, FACTS_PX, NAMES_PX, NUMBER_PX, ROW_PX = 32, 24, 800, 180, 100, 28
LEFT = MARGIN + PAD
FACTS = LEFT + PICTURE_PX[0] + PAD
WIDTH = FACTS + FACTS_PX + LEFT


def write_png(path: str | PathLike, explanations: Sequence[Explanation]) -> None:
    """Draws one picture, `WIDTH` pixels wide and as high as its entries, and writes it all or nothing.

    Raises:
        ImportError: without matplotlib.
        ValueError: for more than `MAX_IMAGES` entries.
    """
    if len(explanations) > MAX_IMAGES:
        raise ValueError(
            f"explanations: a PNG holds at most {MAX_IMAGES} entries, got {len(explanations)}; write .html, or parts"
        )
    try:
        from matplotlib import style
    except ImportError:
        raise ImportError('write_png: it needs matplotlib: pip install "revit-fast[plot]"') from None
    # The user's style must not change the sheet, and dollar signs in a name must not start a formula.
    with style.context(["default", {"text.parse_math": False}]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # the font has a box for such characters
        parts = [_drawn(_header, explanations), *(_drawn(_entry, e) for e in explanations)]
    with replaced(path) as temporary:
        Image.fromarray(np.concatenate(parts)).save(temporary, "PNG")


def _drawn(draw, content) -> np.ndarray:
    """Renders a drawing as uint8 `[H, WIDTH, 3]`; the function `draw` returns H."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(dpi=72, facecolor=COLOURS["page"])  # one point of a font is one pixel
    canvas = FigureCanvasAgg(figure)  # needs no window system, whatever is configured
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    height = round(draw(axes, content))
    axes.set(xlim=(0, WIDTH), ylim=(height, 0))
    figure.set_size_inches(WIDTH / 72, height / 72)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def _header(axes, explanations: Sequence[Explanation]) -> float:
    y = _write(axes, MARGIN, MARGIN, TITLE, WIDTH - 2 * MARGIN, 26, weight="bold")
    y = _write(axes, MARGIN, y, f"{summary(explanations)}.", WIDTH - 2 * MARGIN, 16)
    return _write(axes, MARGIN, y, LEGEND, WIDTH - 2 * MARGIN, 14, "soft") + 16


def _entry(axes, e: Explanation) -> float:
    """A card: the picture to the left and the facts to the right, or the error."""
    if e.error is not None:
        y = _write(axes, LEFT, PAD, e.name, WIDTH - 2 * LEFT, 17, weight="bold")
        bottom = PAD + _write(axes, LEFT, y, f"Error: {e.error}", WIDTH - 2 * LEFT, 15, "bad")
        _box(axes, MARGIN, 0, 5, bottom, "bad")
    else:
        width, height = e.picture.size
        axes.imshow(e.picture, extent=(LEFT, LEFT + width, PAD + height, PAD), aspect="auto", interpolation="none")
        below = _write(axes, LEFT, PAD + height + 8, e.measures, PICTURE_PX[0], 14, "soft")
        if e.attention is not None:
            top, (width, height) = below + 12, e.attention.size
            axes.imshow(
                e.attention, extent=(LEFT, LEFT + width, top + height, top), aspect="auto", interpolation="none"
            )
            below = _write(axes, LEFT, top + height + 8, e.attention_text, PICTURE_PX[0], 14, "soft")
        bottom = PAD + max(below, _facts(axes, e))
    _box(axes, MARGIN, 0, WIDTH - 2 * MARGIN, bottom, "card", edgecolor=COLOURS["line"], linewidth=1, zorder=-2)
    return bottom + 20


def _facts(axes, e: Explanation) -> float:
    y = _write(axes, FACTS, PAD, e.name, FACTS_PX, 17, weight="bold")
    y = _write(axes, FACTS, y + 4, e.decision, FACTS_PX, 19, "chosen")
    y = _write(axes, FACTS, y + 2, e.reason, FACTS_PX, 15)
    names = [f"{n.side}: {n.n_tokens:,} tokens" for n in e.lengths]
    y = _table(axes, y + 14, "", names, e.columns, NAMES_PX, chosen=e.lengths.index(e.chosen))
    if e.classes:
        labels, scores = zip(*e.classes, strict=True)
        bars = [Bar(score, f"{score:.3f}") for score in scores]
        y = _table(axes, y + 16, "Best classes", labels, [Column("", bars)], FACTS_PX / 2)
    stages = list(e.stage_ms.values())
    ends, total = np.cumsum(stages), sum(stages)
    bars = [Bar(ms / total, f"{ms:.2f} ms", (end - ms) / total) for ms, end in zip(stages, ends, strict=True)]
    y = _write(axes, FACTS, y + 16, e.time, FACTS_PX, 14, "soft")
    return _table(axes, y, "", list(e.stage_ms), [Column("", bars)], NAMES_PX)


def _table(axes, y, title, names: Sequence[str], columns: Sequence[Column], names_px: float, chosen=None) -> float:
    """Draws a row of bars for every name; returns where the table ends, as `_write` does."""
    width = (FACTS_PX - names_px) / len(columns)
    places = [(FACTS + names_px + i * width, column) for i, column in enumerate(columns)]
    ends = [_write(axes, FACTS, y, title, names_px, 14, "soft")]
    for x, column in places:
        end = _write(axes, x, y, column.title, width - 8, 14, "soft")
        ends.append(_write(axes, x, end, column.mark_text, width - 8, 14, "mark"))
    y = max(ends) + 4
    for row, name in enumerate(names):
        weight, colour = ("bold", "chosen") if row == chosen else ("normal", "bar")
        end = max(y + ROW_PX, _write(axes, FACTS, y + 5, name, names_px - 12, 14, weight=weight) + 3)
        if row == chosen:
            _box(axes, FACTS - 8, y, FACTS_PX + 8, end - y, "pick", zorder=-1)
        for x, column in places:
            bar, track = column.bars[row], width - NUMBER_PX
            _box(axes, x, y + 8, track, 12, "track")
            _box(axes, x + bar.begin * track, y + 8, bar.share * track, 12, colour)
            if column.mark is not None:
                _box(axes, x + column.mark * track - 1, y + 4, 2, 20, "mark")
            _write(axes, x + track + 8, y + 5, bar.text, NUMBER_PX, 14, weight=weight)
        y = end
    return y


def _box(axes, x: float, y: float, width: float, height: float, colour: str, **style) -> None:
    axes.bar(x, height, width, y, align="edge", **{"color": COLOURS[colour], "linewidth": 0} | style)


def _write(axes, x: float, y: float, text: str, width: float, size: int, colour="text", weight="normal") -> float:
    """Writes a text on as many lines as `width` requires; returns where the next line would begin."""
    n = max(len(text), 1)
    while True:
        lines = textwrap.wrap(text, n)
        style = {"size": size, "color": COLOURS[colour], "weight": weight}
        drawn = [axes.text(x, y + (1 + 1.4 * i) * size, line, **style) for i, line in enumerate(lines)]
        widest = max((line.get_window_extent().width for line in drawn), default=0)
        if widest <= width or n == 1:
            return y + 1.4 * size * len(lines)
        for line in drawn:
            line.remove()
        n = max(1, min(n - 1, int(n * width / widest)))
