"""Draws packing.svg: three images at their grids, as a padded batch and as one pack.

Run: python docs/figures/packing.py
"""

from itertools import accumulate, pairwise
from pathlib import Path

GRIDS, N_PREFIX, TILE_ROWS = (14, 10, 7), 1, 64
SEQLENS = [g * g + N_PREFIX for g in GRIDS]
CU_SEQLENS = [0, *accumulate(SEQLENS)]

COLOURS = ("#0b66c3", "#0f8a7e", "#c2410c")
CARD, TEXT, SOFT, EMPTY = "#f4f5f7", "#1b1f24", "#59636e", "#d9dee3"

WIDTH, HEIGHT, LEFT = 760, 486, 32
PX_OF_TOKEN, PX_OF_PATCH, BAR = 2, 8, 22


def text(x: float, y: float, content: str, size: int = 14, colour: str = TEXT, anchor: str = "start") -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{colour}" text-anchor="{anchor}">{content}</text>'


def rect(x: float, y: float, width: float, height: float, fill: str, more: str = "") -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}"{more}/>'


def grid_lines(x: float, y: float, n: int) -> str:
    """The borders between the patches of a square of n a side, as one path."""
    side = n * PX_OF_PATCH
    across = "".join(f"M{x + i * PX_OF_PATCH:g} {y:g}v{side}" for i in range(1, n))
    along = "".join(f"M{x:g} {y + i * PX_OF_PATCH:g}h{side}" for i in range(1, n))
    return f'<path d="{across}{along}" stroke="#fff" stroke-opacity=".6" fill="none"/>'


def images(y: float) -> list[str]:
    parts, x = [text(LEFT, y, "Three images, each cut into the patches that it needs", 15)], LEFT
    bottom = y + 16 + GRIDS[0] * PX_OF_PATCH
    for colour, g, n in zip(COLOURS, GRIDS, SEQLENS, strict=True):
        side = g * PX_OF_PATCH
        parts += [rect(x, bottom - side, side, side, colour), grid_lines(x, bottom - side, g)]
        parts.append(text(x, bottom + 18, f"{g} × {g} + {N_PREFIX} = {n} tokens", 13, SOFT))
        x += 190
    return parts


def padded(y: float) -> list[str]:
    longest, total = max(SEQLENS), len(SEQLENS) * max(SEQLENS)
    said = f"Padded batch: {len(SEQLENS)} × {longest} = {total} rows, {total - sum(SEQLENS)} of them padding"
    parts = [text(LEFT, y, said, 15)]
    for i, (colour, n) in enumerate(zip(COLOURS, SEQLENS, strict=True)):
        top = y + 12 + i * (BAR + 4)
        parts.append(rect(LEFT, top, longest * PX_OF_TOKEN, BAR, EMPTY))
        parts.append(rect(LEFT, top, n * PX_OF_TOKEN, BAR, colour))
    return parts


def packed(y: float) -> list[str]:
    parts = [text(LEFT, y, f"One pack: {CU_SEQLENS[-1]} rows, no padding", 15)]
    for i, colour in enumerate(COLOURS):
        begin, end = CU_SEQLENS[i : i + 2]
        parts.append(rect(LEFT + begin * PX_OF_TOKEN, y + 12, (end - begin) * PX_OF_TOKEN, BAR, colour))
    for n in CU_SEQLENS:
        x = LEFT + n * PX_OF_TOKEN
        parts.append(f'<path d="M{x} {y + 12:g}v{BAR + 8}" stroke="{TEXT}" stroke-width="1.5"/>')
        parts.append(text(x, y + BAR + 34, str(n), 13, TEXT, "middle"))
    parts.append(text(LEFT + CU_SEQLENS[-1] * PX_OF_TOKEN, y - 1, "cu_seqlens below", 13, SOFT, "end"))
    return parts


def tiles(y: float) -> list[str]:
    cuts = [(begin + row, min(begin + row + TILE_ROWS, end)) for begin, end, row in tile_starts()]
    parts = [text(LEFT, y, f"Work list: {len(cuts)} tiles of at most {TILE_ROWS} rows, none across two images", 15)]
    for begin, end in cuts:
        sequence = max(i for i, first in enumerate(CU_SEQLENS) if first <= begin)
        x, width = LEFT + begin * PX_OF_TOKEN + 1, (end - begin) * PX_OF_TOKEN - 2
        parts.append(rect(x, y + 12, width, BAR, COLOURS[sequence], ' fill-opacity=".75" rx="3"'))
    return parts


def tile_starts() -> list[tuple[int, int, int]]:
    """First and last row of the sequence, and the tile's first row within it, of every tile."""
    sequences = pairwise(CU_SEQLENS)
    return [(begin, end, row) for begin, end in sequences for row in range(0, end - begin, TILE_ROWS)]


def draw() -> str:
    said = "Three images of 197, 101 and 50 tokens take 591 rows as a padded batch and 348 as one pack."
    parts = [*images(38), *padded(220), *packed(348), *tiles(432)]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
            'font-family="system-ui, sans-serif">',
            f"<title>{said}</title>",
            rect(0, 0, WIDTH, HEIGHT, CARD, ' rx="10"'),
            *parts,
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(draw(), encoding="utf-8")
