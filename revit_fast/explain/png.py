"""The sheet as one picture, drawn with Pillow alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from os import PathLike

from PIL import Image, ImageDraw, ImageFont

from revit_fast.atomic import replaced
from revit_fast.explain.facts import ENTROPY_BITS, Explanation, summary
from revit_fast.explain.html import LEGEND, TITLE
from revit_fast.explain.picture import PICTURE_PX

MAX_IMAGES = 200
"""Of a sheet: a larger picture is one that other programs, Pillow among them, take for a decompression bomb."""

MARGIN, GAP, PAD = 32, 28, 24
FACTS_PX = 740
WIDTH = 2 * (MARGIN + PAD) + PICTURE_PX[0] + GAP + FACTS_PX

FONTS = {
    "regular": ("DejaVuSans.ttf", "arial.ttf", "Arial.ttf", "segoeui.ttf", "LiberationSans-Regular.ttf"),
    "bold": ("DejaVuSans-Bold.ttf", "arialbd.ttf", "Arial Bold.ttf", "segoeuib.ttf", "LiberationSans-Bold.ttf"),
}

PLAIN = str.maketrans({"×": "x", "≤": "<=", "≥": ">=", "θ": "theta", "–": "-"})
"""What Pillow's own font lacks."""

PAGE, CARD, TEXT, SOFT, LINE, TRACK = "#f4f5f7", "#ffffff", "#1b1f24", "#59636e", "#d9dee3", "#e6e9ed"
BAR, CHOSEN, PICK, MARK, BAD = "#8fa3b8", "#0b66c3", "#e7f1fc", "#c2410c", "#b42318"
STAGE_COLOURS = {"decode": "#7a5cc4", "assign": "#c2410c", "pack": "#0f8a7e", "forward": "#0b66c3"}

ROW_PX = 28


@cache
def _font(weight: str, size: int) -> tuple[ImageFont.FreeTypeFont, bool]:
    """A font of the system, or else Pillow's own; and whether it is that one."""
    for name in FONTS[weight]:
        try:
            return ImageFont.truetype(name, size), False
        except OSError:
            continue
    return ImageFont.load_default(size), True


class _Canvas:
    """A white page that is written from top to bottom and cut off where the text ends.

    Args:
        width: in pixels.
        height: room in pixels, at least what will be written.
        colour: of the page.
    """

    def __init__(self, width: int, height: int, colour: str) -> None:
        self.image = Image.new("RGB", (width, height), colour)
        self.draw = ImageDraw.Draw(self.image)

    def length(self, text: str, size: int, weight: str = "regular") -> float:
        font, is_plain = _font(weight, size)
        return font.getlength(text.translate(PLAIN) if is_plain else text)

    def text(
        self, x: float, y: float, text: str, size: int = 15, colour: str = TEXT, weight: str = "regular", anchor="lm"
    ) -> None:
        """Writes one line, by default to the right of x with its middle at y."""
        font, is_plain = _font(weight, size)
        self.draw.text((x, y), text.translate(PLAIN) if is_plain else text, colour, font, anchor)

    def fitted(self, text: str, width: float, size: int, weight: str = "regular") -> str:
        """The text, its middle left out where it is wider."""
        kept = len(text)
        shown = text
        while kept > 2 and self.length(shown, size, weight) > width:
            kept -= 1
            shown = f"{text[: (kept + 1) // 2]}…{text[len(text) - kept // 2 :]}"
        return shown

    def paragraph(self, x: float, y: float, width: float, text: str, size: int = 15, colour: str = TEXT) -> float:
        """Writes words on as many lines as they take; returns where the next line begins."""
        line = ""
        for word in text.split():
            longer = f"{line} {word}".lstrip()
            if line and self.length(longer, size) > width:
                self.text(x, y + 0.7 * size, line, size, colour)
                y, longer = y + 1.45 * size, word
            line = self.fitted(longer, width, size) if longer == word else longer
        self.text(x, y + 0.7 * size, line, size, colour)
        return y + 1.45 * size

    def bar(
        self, x: float, y: float, width: float, share: float, colour: str, begin: float = 0.0, mark: float | None = None
    ) -> None:
        """A bar from `begin` over `share` of its track, its middle at y, with a mark at a share of the track."""
        self.draw.rectangle((x, y - 6, x + width - 1, y + 5), TRACK)
        left, right = round(x + begin * width), round(x + (begin + share) * width)
        if right > left:
            self.draw.rectangle((left, y - 6, right - 1, y + 5), colour)
        if mark is not None:
            at = min(round(x + mark * width), round(x + width - 1))
            self.draw.rectangle((at - 1, y - 10, at, y + 9), MARK)


def write_png(path: str | PathLike, explanations: Sequence[Explanation]) -> None:
    """Draws one picture, `WIDTH` pixels wide and as high as its entries take; written all or nothing.

    Raises:
        ValueError: for more than `MAX_IMAGES` entries.
    """
    if len(explanations) > MAX_IMAGES:
        raise ValueError(
            f"explanations: a PNG holds at most {MAX_IMAGES} entries, got {len(explanations)}; write .html, or parts"
        )
    parts = [_header(explanations), *map(_entry, explanations)]
    sheet = Image.new("RGB", (WIDTH, sum(part.height for part in parts)), PAGE)
    y = 0
    for part in parts:
        sheet.paste(part, (0, y))
        y += part.height
    with replaced(path) as temporary:
        sheet.save(temporary, "PNG")


def _header(explanations: Sequence[Explanation]) -> Image.Image:
    canvas = _Canvas(WIDTH, 400, PAGE)
    canvas.text(MARGIN, MARGIN + 14, TITLE, 26, weight="bold")
    y = canvas.paragraph(MARGIN, MARGIN + 44, WIDTH - 2 * MARGIN, f"{summary(explanations)}.", 16)
    y = canvas.paragraph(MARGIN, y + 2, WIDTH - 2 * MARGIN, LEGEND, 14, SOFT)
    return canvas.image.crop((0, 0, WIDTH, round(y) + 16))


def _entry(e: Explanation) -> Image.Image:
    """A card, as high as what is on it."""
    room = 1200 + ROW_PX * (len(e.lengths) + len(e.classes)) + 2 * len(e.error or e.reason)
    canvas = _Canvas(WIDTH, room, CARD)
    x = MARGIN + PAD
    bottom = _draw_error(canvas, x, e) if e.error is not None else _draw_decision(canvas, x, e)
    card = canvas.image.crop((0, 0, WIDTH, round(bottom) + PAD))
    framed = Image.new("RGB", (WIDTH, card.height + 20), PAGE)
    framed.paste(card, (0, 0))
    draw = ImageDraw.Draw(framed)
    for left, right in ((0, MARGIN - 1), (WIDTH - MARGIN, WIDTH)):
        draw.rectangle((left, 0, right, card.height), PAGE)
    draw.rectangle((MARGIN, 0, WIDTH - MARGIN - 1, card.height - 1), outline=LINE)
    if e.error is not None:
        draw.rectangle((MARGIN, 0, MARGIN + 4, card.height - 1), BAD)
    return framed


def _draw_error(canvas: _Canvas, x: int, e: Explanation) -> float:
    width = WIDTH - 2 * x
    canvas.text(x, PAD + 10, canvas.fitted(e.name, width, 18, "bold"), 18, weight="bold")
    return canvas.paragraph(x, PAD + 28, width, f"Error: {e.error}", 15, BAD)


def _draw_decision(canvas: _Canvas, x: int, e: Explanation) -> float:
    canvas.image.paste(e.picture, (x, PAD))
    left = canvas.paragraph(x, PAD + e.picture.height + 10, PICTURE_PX[0], e.measures, 14, SOFT)
    x += PICTURE_PX[0] + GAP
    canvas.text(x, PAD + 10, canvas.fitted(e.name, FACTS_PX, 17, "bold"), 17, weight="bold")
    canvas.text(x, PAD + 42, canvas.fitted(e.decision, FACTS_PX, 19), 19, CHOSEN)
    y = canvas.paragraph(x, PAD + 60, FACTS_PX, e.reason, 15)
    y = _draw_lengths(canvas, x, y + 14, e)
    if e.classes:
        y = _draw_classes(canvas, x, y + 22, e)
    return max(left, _draw_times(canvas, x, y + 22, e))


def _draw_lengths(canvas: _Canvas, x: float, y: float, e: Explanation) -> float:
    """The table of all grids: evidence and cost as bars, numbers to their right."""
    columns = []  # (title, its mark's text, [(share, text, begin, mark)])
    if e.chosen.probability is not None:
        columns.append(("P", "", [(n.probability, f"{n.probability:.3f}", 0.0, None) for n in e.lengths]))
    if (theta := e.policy.threshold) is not None:
        cells = [(n.suffices, f"{n.suffices:.3f}", 0.0, theta) for n in e.lengths]
        columns.append(("P(label ≤ grid)", f"θ = {theta:.4g}", cells))
    if e.entropy is not None:
        at = e.entropy / ENTROPY_BITS
        cells = [((b - a) / ENTROPY_BITS, text, a / ENTROPY_BITS, at) for a, b, text in e.entropy_ranges]
        columns.append(("entropy, bits", f"{e.entropy:.3f}", cells))
    columns.append(("GMACs", "", [(n.macs / e.lengths[0].macs, n.gmacs, 0.0, None) for n in e.lengths]))
    if e.chosen.ms is not None:
        most = max(n.ms for n in e.lengths)
        columns.append(("ms", "", [(n.ms / most, f"{n.ms:.2f}", 0.0, None) for n in e.lengths]))
    begin = x + 176
    titles = y + 8
    # A column is wider where its title is.
    needs = [130 + canvas.length(f"{title} {mark}", 14) for title, mark, _ in columns]
    canvas.text(x + 10, titles, "grid", 14, SOFT)
    canvas.text(begin - 24, titles, "tokens", 14, SOFT, anchor="rm")
    left = begin
    for i, (title, mark, cells) in enumerate(columns):
        width = (FACTS_PX - 176) * needs[i] / sum(needs)
        canvas.text(left, titles, title, 14, SOFT)
        if mark:
            canvas.text(left + canvas.length(title, 14) + 9, titles, mark, 14, MARK)
        numbers = max(canvas.length(text, 16, "bold") for _, text, *_ in cells) + 8
        columns[i] = (left, width - numbers - 20, cells)
        left += width
    y += 22
    for i, length in enumerate(e.lengths):
        middle, is_chosen = y + ROW_PX // 2, length is e.chosen
        if is_chosen:
            canvas.draw.rectangle((x, y, x + FACTS_PX - 1, y + ROW_PX - 1), PICK)
            canvas.draw.rectangle((x, y, x + 3, y + ROW_PX - 1), CHOSEN)
        canvas.draw.line((x, y, x + FACTS_PX - 1, y), LINE)
        style = {"size": 16, "weight": "bold"} if is_chosen else {}
        canvas.text(x + 10, middle, length.side, **style)
        canvas.text(begin - 24, middle, f"{length.n_tokens:,}", anchor="rm", **style)
        for left, track, cells in columns:
            share, text, start, mark = cells[i]
            canvas.bar(left, middle, track, share, CHOSEN if is_chosen else BAR, start, mark)
            canvas.text(left + track + 8, middle, text, **style)
        y += ROW_PX
    return y


def _draw_classes(canvas: _Canvas, x: float, y: float, e: Explanation) -> float:
    canvas.text(x, y, "Best classes", 14, SOFT)
    y += 12
    names, numbers = 0.5 * FACTS_PX, 60
    for label, score in e.classes:
        canvas.text(x + 10, y + 12, canvas.fitted(label, names - 30, 15))
        canvas.bar(x + names, y + 12, FACTS_PX - names - numbers, score, BAR)
        canvas.text(x + FACTS_PX - numbers + 8, y + 12, f"{score:.3f}")
        y += 24
    return y


def _draw_times(canvas: _Canvas, x: float, y: float, e: Explanation) -> float:
    total = sum(e.stage_ms.values())
    canvas.text(x, y, f"Time: {total:.2f} ms", 14, SOFT)
    y += 14
    begin, at = 0.0, float(x)
    for stage, ms in e.stage_ms.items():
        left, right = (round(x + share * FACTS_PX) for share in (begin, begin + ms / total))
        if right > left:
            canvas.draw.rectangle((left, y, right - 1, y + 13), STAGE_COLOURS[stage])
        begin += ms / total
        canvas.draw.rectangle((at, y + 25, at + 11, y + 36), STAGE_COLOURS[stage])
        text = f"{stage} {ms:.2f} ms"
        canvas.text(at + 18, y + 31, text, 14)
        at += canvas.length(text, 14) + 44
    return y + 42
