"""A web page for this machine: images, the grid that each gets, and a slider for the budget.

Each new image is decoded, assigned and run at every length once. Moving the slider only repeats the choice. The time
that the choice takes in packs is measured after the choice is shown.

Needs gradio: `pip install "revit-fast[page]"`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from revit_fast.adaptive.policies import Evidence
from revit_fast.explain.facts import Explanation, Length, T, explain, repeated, total, with_evidence
from revit_fast.explain.html import DARK, LEGEND, LIGHT, STYLE, entries, meter
from revit_fast.io.held import own_pixels
from revit_fast.io.images import ImageError, ImageSource
from revit_fast.io.names import on_one_line
from revit_fast.streaming.pipeline import AdaptivePipeline

HOST = "127.0.0.1"
"""The loopback address: the page has no login, so only users of this machine may reach it."""

TITLE = "Just enough tokens"

ROUNDS, TIMING_S = 3, 0.5
"""Timing runs at least `ROUNDS` rounds, and more until `TIMING_S` seconds have passed. Medians are shown."""

CSS = f""".entries {{ {LIGHT}
{STYLE} }}
.dark .entries {{ {DARK} }}
.entries .html-container {{ padding: 0; }}
.summary table {{ margin: 0; }}
.summary tbody th {{ width: 8.5rem; }}
footer {{ display: none !important; }}"""
"""CSS of the page. The rules of a sheet's entries apply to the entries only."""


class Seen(NamedTuple):
    """An image that went through every stage at every length.

    Attributes:
        name: name to show.
        error: why the image failed; the attributes below are then empty. None if it did not fail.
        image: the decoded image, uint8 `[H, W, 3]` or `[H, W]`.
        probabilities: the assigner's probabilities, float32 `[n_lengths]`, the longest length first.
        at: one explanation per length, the longest first, as if the image got that length.
    """

    name: str
    error: str | None = None
    image: np.ndarray | None = None
    probabilities: np.ndarray | None = None
    at: tuple[Explanation, ...] = ()


def look_at(pipe: AdaptivePipeline, source: ImageSource, name: str, *, top_k: int = 5) -> Seen:
    """Runs one image through every stage at every length; an image that cannot be read gives a `Seen` with an error.

    Args:
        pipe: a pipeline with an assigner.
        source: a path, bytes of an encoded file, a PIL image or a uint8 array.
        name: name to show.
        top_k: number of classes to list; 0 for none, for weights that are not trained.
    """
    name = on_one_line(name)
    try:
        image, decode_ms = _timed(lambda: pipe.prep.decode(source))
        image = own_pixels(image, source)  # it is kept
        asking = pipe.prep.with_policy("argmax")
        assignment, assign_ms = _timed(lambda: asking.assign([image]))
        probabilities = assignment.probabilities[0]
    except ImageError as error:
        return Seen(name, on_one_line(str(error)))
    at = [explain(pipe.with_policy(("fixed", g)), [image], top_k=top_k)[0] for g in pipe.prep.grids]
    failed = next((e.error for e in at if e.error is not None), None)
    if failed is not None:
        return Seen(name, failed)
    lengths = [
        n._replace(ms=e.stage_ms["pack"] + e.stage_ms["forward"]) for n, e in zip(at[0].lengths, at, strict=True)
    ]
    lengths = tuple(with_evidence(lengths, probabilities))
    once = {"decode": decode_ms, "assign": assign_ms}
    own = (replace(e, lengths=lengths, chosen=n, stage_ms=e.stage_ms | once) for n, e in zip(lengths, at, strict=True))
    return Seen(name, None, image, probabilities, tuple(own))


def _timed(run: Callable[[], T]) -> tuple[T, float]:
    """The result of a call, and the milliseconds of its fastest warm run."""

    def once() -> tuple[T, float]:
        begin = time.perf_counter()
        return run(), 1e3 * (time.perf_counter() - begin)

    return min(repeated(once), key=lambda timed: timed[1])


def decide(pipe: AdaptivePipeline, seen: Sequence[Seen]) -> list[Explanation]:
    """The length that the pipeline's policy gives every image; nothing is run.

    Args:
        pipe: the pipeline that saw the images, with a policy that needs only the assigner's probabilities.
        seen: results of `look_at`.
    """
    policy, explanations = pipe.prep.policy, []
    for index, entry in enumerate(seen):
        if entry.error is not None:
            explanations.append(Explanation(index, entry.name, error=entry.error))
            continue
        (chosen,) = policy.choose(Evidence(np.array([index]), entry.probabilities[None]))
        explanations.append(replace(entry.at[chosen], index=index, name=entry.name, policy=policy))
    return explanations


def time_packs(pipe: AdaptivePipeline, images: Sequence[np.ndarray]) -> tuple[float, float]:
    """Times the path from decoded images to logits in packs; the two pipelines below take turns.

    Returns:
        Median milliseconds with the pipeline's policy, assigner included, and with the longest length for every image.
    """
    pipes = pipe, pipe.with_policy(("fixed", pipe.prep.grids[0]))
    ms, end = [], time.perf_counter() + TIMING_S
    while len(ms) < ROUNDS or time.perf_counter() < end:
        turn = []
        for one in pipes:
            begin = time.perf_counter()
            for _ in one(images):
                pass
            turn.append(1e3 * (time.perf_counter() - begin))
        ms.append(turn)
    chosen, longest = np.median(ms, axis=0).tolist()
    return chosen, longest


def first_budget(pipe: AdaptivePipeline) -> int:
    """Mean patch tokens of held-out images at the policy's threshold; without one, half way between the lengths.

    Raises:
        ValueError: if there is no assigner, or it was never calibrated.
    """
    lengths = pipe.model.lengths
    half_way = (lengths[0] + lengths[-1]) // 2
    pipe.with_policy(("budget", half_way))  # raises if something is missing
    threshold = pipe.prep.policy.threshold
    if threshold is None:
        return half_way
    return int(np.ceil(pipe.prep.tla.calibration.shares(threshold) @ np.array(lengths)))


def totals_html(pipe: AdaptivePipeline, explanations: Sequence[Explanation]) -> str:
    """A table that compares the cost of this budget with that of the longest length for every image."""
    said = f'<p class="soft">θ = {pipe.prep.policy.threshold:.4g}, by the assigner\'s held-out images.</p>'
    decided = [e for e in explanations if e.error is None]
    if not decided:
        return said
    chosen, longest = [e.chosen for e in decided], [e.lengths[0] for e in decided]
    patches = [np.mean([n.grid**2 for n in lengths]) for lengths in (chosen, longest)]
    costs = [total(chosen), total(longest)]
    columns = {
        "patch tokens an image": (meter(n / patches[1], f"{n:,.1f}") for n in patches),
        "GMACs of the model": (meter(n.macs / costs[1].macs, n.gmacs) for n in costs),
    }
    return _table(longest[0].side, columns) + said


def times_html(pipe: AdaptivePipeline, images: Sequence[np.ndarray]) -> str:
    """A table of the time that images take in packs, measured now."""
    if not images:
        return ""
    chosen, longest = ms = time_packs(pipe, images)
    table = _table(Length(pipe.prep.grids[0], 0, 0).side, {"ms": (meter(x / max(ms), f"{x:,.1f}") for x in ms)})
    ratio = f"{longest / chosen:.2f} times as fast" if chosen < longest else f"{chosen / longest:.2f} times as slow"
    n_images = f"{len(images)} images" if len(images) > 1 else "one image"
    return f'{table}<p class="soft">{ratio}: {n_images}, pixels to logits in packs, assigner included.</p>'


def _table(longest: str, columns: Mapping[str, Iterable[str]]) -> str:
    """A table of two rows: this budget, and the longest length for every image."""
    heads = "".join(f'<th scope="col">{name}</th>' for name in ("", *columns))
    chosen, other = ("".join(cells) for cells in zip(*columns.values(), strict=True))
    rows = (
        f'<tr class="chosen"><th scope="row">this budget</th>{chosen}</tr>\n'
        f'<tr><th scope="row">{longest} for all</th>{other}</tr>'
    )
    return f"<table>\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>\n"


def sheet_html(explanations: Sequence[Explanation]) -> str:
    """One entry per image, including images that could not be read."""
    return f'{entries(explanations)}\n<p class="soft">{escape(LEGEND)}</p>' if explanations else ""


def import_gradio() -> ModuleType:
    """Imports gradio without its network calls: no analytics, no check for newer versions, no model hub, no proxy.

    Raises:
        ModuleNotFoundError: if it is missing.
    """
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")
    for name in ("NO_PROXY", "no_proxy"):  # gradio sends a request to its own server at the start
        hosts = dict.fromkeys([*filter(None, os.environ.get(name, "").split(",")), HOST])
        os.environ[name] = ",".join(hosts)
    import gradio

    return gradio


@contextmanager
def served(
    pipe: AdaptivePipeline,
    port: int,
    *,
    budget: int,
    about: str = "",
    samples: Mapping[str, ImageSource] | None = None,
    top_k: int = 5,
    open_browser: bool = False,
) -> Iterator[str]:
    """A context that serves the page on the loopback from its own threads, never by a public link.

    Uploaded files lie in a folder that other users cannot read. It is deleted at the end.

    Args:
        pipe: a pipeline with a calibrated assigner.
        port: port to listen on.
        budget: first value of the slider, in patch tokens, see `first_budget`.
        about: a few words of Markdown about the model.
        samples: images to show on request, by their names.
        top_k: number of classes to list for an image; 0 for none.
        open_browser: whether to open the page in a browser.

    Yields:
        The address of the page.

    Raises:
        ModuleNotFoundError: if gradio is missing.
    """
    gr = import_gradio()
    with TemporaryDirectory(prefix="revit-fast-demo-") as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads  # components read it when they are created
        page = _page(gr, pipe, budget, about, samples or {}, top_k)
        try:
            yield _launch(gr, page, port, open_browser)
        finally:
            page.close(verbose=False)


def _page(
    gr: ModuleType, pipe: AdaptivePipeline, budget: int, about: str, samples: Mapping[str, ImageSource], top_k: int
) -> Any:
    """The page as a `gradio.Blocks`."""

    def shown(seen: Sequence[tuple[str, Seen]], tokens: float) -> tuple[str, str]:
        asked = pipe.with_policy(("budget", tokens))
        explanations = decide(asked, [entry for _, entry in seen])
        return totals_html(asked, explanations), sheet_html(explanations)

    def look(sources: Iterable[tuple[str, str, ImageSource]], known: Sequence[tuple[str, Seen]], tokens: float):
        before = dict(known)
        seen = [(key, before.get(key) or look_at(pipe, source, name, top_k=top_k)) for key, name, source in sources]
        return seen, *shown(seen, tokens)

    def look_at_files(paths: Sequence[str] | None, known: Sequence[tuple[str, Seen]], tokens: float):
        return look([(path, Path(path).name, path) for path in paths or ()], known, tokens)

    def look_at_samples(known: Sequence[tuple[str, Seen]], tokens: float):
        return look([(name, name, source) for name, source in samples.items()], known, tokens)

    def timed(seen: Sequence[tuple[str, Seen]], tokens: float) -> str:
        images = [entry.image for _, entry in seen if entry.error is None]
        return times_html(pipe.with_policy(("budget", tokens)), images)

    plain = {"apply_default_css": False}
    own = {"api_visibility": "private", "show_progress": "hidden"}
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as page:
        seen = gr.State([])
        gr.Markdown(f"# {TITLE}\n{about}")
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                files = gr.File(label="Images", file_count="multiple", elem_id="files", height=190)
                sample = gr.Button(f"Show {len(samples)} sample images", visible=bool(samples), elem_id="samples")
            with gr.Column(scale=3, min_width=320):
                slider = gr.Slider(
                    pipe.model.lengths[-1],
                    pipe.model.lengths[0],
                    budget,
                    step=1,
                    label="Budget: patch tokens of an image, on average",
                    elem_id="budget",
                )
                totals = gr.HTML(shown([], budget)[0], elem_id="totals", elem_classes=["entries", "summary"], **plain)
                times = gr.HTML(elem_id="times", elem_classes=["entries", "summary"], **plain)
        sheet = gr.HTML(elem_id="sheet", elem_classes="entries", **plain)
        seeing = {"outputs": [seen, totals, sheet], **own, "show_progress": "minimal"}
        timing = {"fn": timed, "inputs": [seen, slider], "outputs": times, "trigger_mode": "always_last", **own}
        files.change(look_at_files, [files, seen, slider], **seeing).then(**timing)
        sample.click(look_at_samples, [seen, slider], **seeing).then(**timing)
        moved = slider.change(shown, [seen, slider], [totals, sheet], trigger_mode="always_last", **own)
        moved.then(**timing)
    return page


def _launch(gr: ModuleType, page: Any, port: int, open_browser: bool) -> str:
    """Serves the page in threads and returns its address."""
    # System fonts, because gradio's default fonts come from the network or from files of its own.
    theme = gr.themes.Default(
        primary_hue="blue", font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")
    )
    _, address, _ = page.launch(
        server_name=HOST,
        server_port=port,
        share=False,
        inbrowser=open_browser,
        inline=False,
        prevent_thread_lock=True,
        quiet=True,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        root_path="",
        theme=theme,
        css=CSS,
    )
    return address
