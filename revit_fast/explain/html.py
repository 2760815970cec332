"""The sheet as one self-contained HTML file: no script, no font, no network."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from os import PathLike
from string import Template

from PIL import Image

from revit_fast.explain.facts import Explanation, summary
from revit_fast.io.atomic import replaced

TITLE = "How many tokens each image gets"

LEGEND = (
    "The frame is the region that the model sees; what is dimmed is cut away; lines are the borders of its patches. "
    "P is the assigner's probability that a grid is the smallest sufficient one, P(label ≤ grid) that it suffices. "
    "Times are of each image alone, in warm runs."
)

LIGHT = """--page: #f4f5f7; --card: #fff; --text: #1b1f24; --soft: #59636e; --line: #d9dee3; --track: #e6e9ed;
  --bar: #8fa3b8; --chosen: #0b66c3; --pick: #e7f1fc; --mark: #c2410c; --bad: #b42318;
  --decode: #7a5cc4; --assign: #c2410c; --pack: #0f8a7e; --forward: #0b66c3;"""

DARK = """--page: #101418; --card: #191f26; --text: #e7ebef; --soft: #9ba7b3; --line: #303943; --track: #2a323b;
    --bar: #627588; --chosen: #58a6ff; --pick: #16283c; --mark: #ff9350; --bad: #ff8a80;
    --decode: #a58ceb; --assign: #ff9350; --pack: #3cc2b3; --forward: #58a6ff;"""

STYLE = """* { box-sizing: border-box; }
h2 { font-size: 1.05rem; margin: 0; overflow-wrap: anywhere; }
p { margin: .25rem 0; }
.soft, caption, th, figcaption { color: var(--soft); font-weight: normal; }
article { display: grid; grid-template-columns: minmax(0, 5fr) minmax(0, 7fr); gap: 1.5rem; margin-top: 1.25rem;
  padding: 1.25rem; background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
article.failed { display: block; border-left: 4px solid var(--bad); }
.failed p { color: var(--bad); overflow-wrap: anywhere; }
@media (max-width: 60rem) { article { grid-template-columns: minmax(0, 1fr); } }
figure { margin: 0; }
figure img { display: block; max-width: 100%; height: auto; border-radius: 4px; }
figcaption { font-size: .87rem; margin-top: .4rem; }
.decision { font-size: 1.15rem; color: var(--chosen); }
table { width: 100%; border-collapse: collapse; margin: .8rem 0; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .2rem; }
th, td { text-align: left; padding: .3rem .5rem; white-space: nowrap; }
thead th, caption { font-size: .87rem; }
thead th { white-space: normal; vertical-align: bottom; }
tbody tr { border-top: 1px solid var(--line); }
tbody th { color: inherit; width: 1%; }
.name { white-space: normal; overflow-wrap: anywhere; width: 45%; }
.number { text-align: right; width: 1%; }
.chosen { background: var(--pick); font-weight: 600; }
.chosen th { font-weight: 600; }
.meter { display: flex; align-items: center; gap: .5rem; }
.track { position: relative; flex: 1; min-width: 1.25rem; height: .75rem; background: var(--track);
  border-radius: 2px; }
.track b { position: absolute; top: 0; height: 100%; background: var(--bar); border-radius: 2px; }
.chosen .track b { background: var(--chosen); }
.track i { position: absolute; top: -.28rem; bottom: -.28rem; width: 2px; margin-left: -1px; background: var(--mark); }
.mark { color: var(--mark); white-space: nowrap; }
.time { display: flex; height: .9rem; gap: 1px; border-radius: 2px; overflow: hidden; }
.times { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin: .35rem 0 0; padding: 0; list-style: none; }
.times b { display: inline-block; width: .75rem; height: .75rem; margin-right: .4rem; border-radius: 2px; }
@media (max-width: 36rem) { article { padding: .75rem; } th, td { padding: .3rem .2rem; } .meter { gap: .2rem; }
  .track { min-width: .5rem; } }
@media (forced-colors: active) { .track, .track *, .time *, .times b { forced-color-adjust: none; } }"""
"""Style of the entries, on any page that defines the colours of `LIGHT` or `DARK`."""

PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>$title</title>
<style>
:root { $light }
@media (prefers-color-scheme: dark) {
  :root { $dark } }
body { margin: 0 auto; padding: 1.5rem; max-width: 84rem; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; }
@media (max-width: 36rem) { body { padding: .75rem; } }
$style
</style>
</head>
<body>
<header>
<h1>$title</h1>
<p>$summary.</p>
<p class="soft">$legend</p>
</header>
<main>
$articles
</main>
</body>
</html>
""")


def write_html(path: str | PathLike, explanations: Sequence[Explanation]) -> None:
    """Writes one self-contained page, all or nothing."""
    page = PAGE.substitute(
        title=TITLE,
        light=LIGHT,
        dark=DARK,
        style=STYLE,
        summary=escape(summary(explanations)),
        legend=escape(LEGEND),
        articles=entries(explanations),
    )
    with replaced(path) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace")


def entries(explanations: Sequence[Explanation]) -> str:
    """One `article` element for each explanation; `STYLE` is their style."""
    return "\n".join(map(_article, explanations))


def _article(e: Explanation) -> str:
    if e.error is not None:
        return f'<article class="failed">\n<h2>{escape(e.name)}</h2>\n<p>Error: {escape(e.error)}</p>\n</article>'
    width, height = e.picture.size
    return f"""<article>
<figure>
<img src="{_data_uri(e.picture)}" width="{width}" height="{height}" alt="{escape(e.described)}">
<figcaption>{escape(e.measures)}</figcaption>{_attention(e)}
</figure>
<div>
<h2>{escape(e.name)}</h2>
<p class="decision">{escape(e.decision)}</p>
<p>{escape(e.reason)}</p>
{_table_of_lengths(e)}
{_table_of_classes(e)}
{_times(e)}
</div>
</article>"""


def _attention(e: Explanation) -> str:
    if e.attention is None:
        return ""
    width, height = e.attention.size
    return (
        f'\n<img src="{_data_uri(e.attention)}" width="{width}" height="{height}" alt="{escape(e.attention_text)}">\n'
        f"<figcaption>{escape(e.attention_text)}</figcaption>"
    )


def _data_uri(picture: Image.Image) -> str:
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=92, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode('ascii')}"


def meter(share: float, text: str, mark: float | None = None, begin: float = 0.0) -> str:
    """A bar that starts at `begin` and covers `share` of its track, a text beside it, and a mark at share `mark`."""
    line = "" if mark is None else f'<i style="left:{mark:.2%}"></i>'
    bar = f'<b style="left:{begin:.2%};width:{share:.2%}"></b>'
    return f'<td><div class="meter"><span class="track" aria-hidden="true">{bar}{line}</span>{escape(text)}</div></td>'


def _table_of_lengths(e: Explanation) -> str:
    columns = e.columns
    head = [f'{c.title} <span class="mark">| {c.mark_text}</span>' if c.mark_text else c.title for c in columns]
    meters = [[meter(bar.share, bar.text, c.mark, bar.begin) for bar in c.bars] for c in columns]
    rows = []
    for length, *cells in zip(e.lengths, *meters, strict=True):
        is_chosen = length is e.chosen
        tag = '<tr class="chosen">' if is_chosen else "<tr>"
        mark = ' <span aria-label="chosen">✓</span>' if is_chosen else ""
        first = f'<th scope="row">{length.side}{mark}</th><td class="number">{length.n_tokens}</td>'
        rows.append(f"{tag}{first}{''.join(cells)}</tr>")
    names = "".join(f'<th scope="col">{name}</th>' for name in head)
    body = "\n".join(rows)
    return (
        '<table>\n<thead><tr><th scope="col">grid</th><th scope="col" class="number">tokens</th>'
        f"{names}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"
    )


def _table_of_classes(e: Explanation) -> str:
    if not e.classes:
        return ""
    rows = "\n".join(
        f'<tr><th scope="row" class="name">{escape(label)}</th>{meter(score, f"{score:.3f}")}</tr>'
        for label, score in e.classes
    )
    return f"<table>\n<caption>Best classes</caption>\n<tbody>\n{rows}\n</tbody>\n</table>"


def _times(e: Explanation) -> str:
    total = sum(e.stage_ms.values())
    bars = "".join(
        f'<span style="width:{ms / total:.2%};background:var(--{s})"></span>' for s, ms in e.stage_ms.items()
    )
    items = "".join(
        f'<li><b aria-hidden="true" style="background:var(--{stage})"></b>{stage} {ms:.2f} ms</li>'
        for stage, ms in e.stage_ms.items()
    )
    return (
        f'<p class="soft">{escape(e.time)}</p>\n<div class="time" aria-hidden="true">{bars}</div>\n'
        f'<ul class="times">{items}</ul>'
    )
