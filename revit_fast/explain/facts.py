"""The facts of an explanation and how they are measured."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from revit_fast.adaptive.crops import eval_box
from revit_fast.adaptive.policies import Policy, confidence, suffices
from revit_fast.explain.picture import draw_attention, draw_grid
from revit_fast.io.held import held
from revit_fast.io.images import ImageError, ImageSource, as_sources, is_file, name_of
from revit_fast.io.names import on_one_line
from revit_fast.io.trace import StageTimes
from revit_fast.models.macs import forward_macs
from revit_fast.streaming.pipeline import AdaptivePipeline
from revit_fast.streaming.results import Result

STAGES = ("decode", "assign", "pack", "forward")

N_RUNS = 5
"""Runs of an image that are timed. Of each stage the fastest is shown: other work on a machine only makes it slower."""

T = TypeVar("T")

ENTROPY_BITS = 8
"""Entropy of 256 equally frequent grey values: the upper end of the scale."""


class Length(NamedTuple):
    """One of the lengths that an image could have got.

    Attributes:
        grid: patches a side.
        n_tokens: number of tokens, prefix tokens included.
        macs: multiply-adds of the model's forward pass.
        probability: the assigner's probability that this is the smallest sufficient length; None where the policy does
            not ask the assigner.
        suffices: P(label <= length), the probability that this length is long enough; None where `probability` is.
        ms: milliseconds of packing and forward pass, for this image alone; None where it was not run at every length.
    """

    grid: int
    n_tokens: int
    macs: int
    probability: float | None = None
    suffices: float | None = None
    ms: float | None = None

    @property
    def side(self) -> str:
        return f"{self.grid} × {self.grid}"

    @property
    def gmacs(self) -> str:
        """Multiply-adds with three digits, in giga."""
        giga = self.macs / 1e9
        return f"{giga:.2f}" if giga >= 1 else f"{giga:.3g}"


class Bar(NamedTuple):
    """A bar of a table and the text beside it.

    Attributes:
        share: length of the bar, as a share of its track.
        text: the number that the bar shows.
        begin: where the bar begins, as a share of its track.
    """

    share: float
    text: str
    begin: float = 0.0


class Column(NamedTuple):
    """A column of the table of lengths.

    Attributes:
        title: what the bars show.
        bars: one for every length, the longest length first.
        mark: the value that decided, as a share of the track; None where there is none.
        mark_text: that value in words.
    """

    title: str
    bars: list[Bar]
    mark: float | None = None
    mark_text: str = ""


def with_evidence(lengths: Sequence[Length], probabilities: np.ndarray) -> list[Length]:
    """The lengths with the assigner's probabilities for an image, `[n_lengths]`."""
    evidence = zip(probabilities.tolist(), suffices(probabilities[None])[0].tolist(), strict=True)
    return [n._replace(probability=p, suffices=s) for n, (p, s) in zip(lengths, evidence, strict=True)]


def total(lengths: Sequence[Length]) -> Length:
    """The total cost of one pass at each of these lengths; the grid of the result is the longest one."""
    return Length(max(n.grid for n in lengths), sum(n.n_tokens for n in lengths), sum(n.macs for n in lengths))


@dataclass(frozen=True, eq=False)
class Explanation:
    """What the pipeline decides for one image and why.

    Attributes:
        index: place in the stream; some policies decide by it.
        name: name of the source, with characters that cannot be printed escaped.
        error: why the image has no decision; the attributes below are then empty. None if it has one.
        size: width and height of the upright image in pixels, as decoded.
        crop: the region that the model sees, (left, upper, right, lower) in pixels of that image.
        picture: the image with its crop and grid, see `draw_grid`.
        is_cut: whether the picture leaves out the far ends of a very long image.
        policy: the policy that chose.
        lengths: all lengths that it could choose, the longest first.
        chosen: the length that it chose.
        entropy: entropy of the grey values in bits; None where the policy does not need it.
        confidences: probability of the best class at every length that the model ran at, the shortest first. Only
            cascades run at more than one length.
        classes: (label, probability) of the best classes; empty where none were asked for.
        stage_ms: milliseconds of each stage in `STAGES`, for this image alone: each the fastest of `N_RUNS`
            warm runs.
        n_threads: compute threads of the runs, those that the pipeline has in this thread.
        is_busy: whether the machine had more to do than it has processors, which makes all runs slow.
        attention: the image, coloured by what the class token reads of each patch in the last block, the mean of the
            heads; without a class token, by the patches' mean. None if it was not asked for.
        attention_text: whose attention it is.
    """

    index: int
    name: str
    error: str | None = None
    size: tuple[int, int] | None = None
    crop: tuple[float, float, float, float] | None = None
    picture: Image.Image | None = field(default=None, repr=False)
    is_cut: bool = False
    policy: Policy | None = None
    lengths: tuple[Length, ...] = ()
    chosen: Length | None = None
    entropy: float | None = None
    confidences: tuple[float, ...] = ()
    classes: tuple[tuple[str, float], ...] = ()
    stage_ms: dict[str, float] = field(default_factory=dict)
    n_threads: int = 0
    is_busy: bool = False
    attention: Image.Image | None = field(default=None, repr=False)
    attention_text: str = ""

    @property
    def time(self) -> str:
        """The total of the stages, and how it was measured."""
        times, threads = (
            f"Time: {sum(self.stage_ms.values()):.2f} ms",
            f"{self.n_threads} thread{'s' * (self.n_threads != 1)}",
        )
        busy = "; the machine was busy, which makes times longer" if self.is_busy else ""
        return f"{times}, each stage the fastest of {N_RUNS} warm runs of this image alone, on {threads}{busy}"

    @property
    def ran(self) -> tuple[Length, ...]:
        """The lengths that the model ran at: the chosen one, and shorter ones that a cascade tried first."""
        place = self.lengths.index(self.chosen)
        return self.lengths[place : place + len(self.confidences)]

    @property
    def decision(self) -> str:
        """The chosen grid and what it costs."""
        longest, cost = self.lengths[0], total(self.ran)
        share = "the longest" if self.ran == (longest,) else f"{cost.macs / longest.macs:.0%} of the longest"
        return f"{self.chosen.side} patches, {cost.n_tokens} tokens, {cost.gmacs} GMACs ({share})"

    @property
    def reason(self) -> str:
        """Why the policy chose this length."""
        name, argument = self._spec
        if name == "assigned-cascade":
            return f"assigned-cascade: it begins where {self._reached_threshold()}; {self._ended_cascade()}."
        if self.policy.threshold is not None:
            return self._reason_of_threshold(name, argument)
        if name == "argmax":
            return f"argmax: {self.chosen.side} is the most probable label, at {self.chosen.probability:.3f}."
        if name == "entropy":
            return self._reason_of_entropy()
        if name == "cascade":
            return f"cascade: {self._ended_cascade()}."
        if name == "cycle":
            return f"cycle: the grids take turns; this is the one of place {self.index} in the stream."
        if name == "random":
            return f"random: drawn from the image's place in the stream, {self.index}, and nothing else."
        if isinstance(argument, (int, np.integer)):
            return "fixed: every image gets this grid."
        return f"fixed: this grid was given for image {self.index} of the stream."

    @property
    def _spec(self) -> tuple[str, object]:
        spec = self.policy.spec
        return (spec, None) if isinstance(spec, str) else tuple(spec)

    def _reason_of_threshold(self, name: str, argument: object) -> str:
        text = self._reached_threshold()
        if name == "threshold":
            return f"threshold: {text}."
        kind, budget = next(iter(argument.items())) if isinstance(argument, Mapping) else ("mean_tokens", argument)
        unit = {"mean_tokens": "patch tokens", "mean_gmacs": "GMACs"}[kind]
        return f"budget: {text}. This θ costs the held-out images at most {budget:g} {unit} on average."

    def _reached_threshold(self) -> str:
        threshold, first = self.policy.threshold, self.ran[-1]
        own, theta = _apart(first.suffices, threshold)
        text = f"P(label ≤ {first.side}) = {own} reaches θ = {theta}"
        place = self.lengths.index(first)
        if place + 1 < len(self.lengths):
            shorter = self.lengths[place + 1]
            text = f"{text}; P(label ≤ {shorter.side}) = {_apart(shorter.suffices, threshold)[0]} does not"
        return text

    def _ended_cascade(self) -> str:
        bound, (*before, last) = self.policy.bound, self.confidences
        tried = [f"{_apart(p, bound)[0]} at {length.side}" for p, length in zip(before, self.ran[:0:-1], strict=True)]
        if last < bound:
            shorter = f"the best class has less than p = {bound:g} ({', '.join(tried)})" if tried else "none is longer"
            return f"the longest; {shorter}"
        text = f"the best class reaches p = {bound:g}, with {_apart(last, bound)[0]} at {self.chosen.side}"
        return f"{text}, after {', '.join(tried)}" if tried else text

    def _reason_of_entropy(self) -> str:
        place, bits = self.lengths.index(self.chosen), self.policy.bits
        parts = []
        if place > 0:
            parts.append(f"below {_apart(bits[place - 1], self.entropy)[0]}")
        if place < len(bits):
            parts.append(f"at least {_apart(bits[place], self.entropy)[0]}")
        return f"entropy: its grey values hold {self.entropy:.3f} bits, {' and '.join(parts)}."

    @property
    def entropy_ranges(self) -> list[tuple[float, float, str]]:
        """The range of entropies for which each length is chosen: its lower end, its upper end, and its text."""
        bits, ranges = self.policy.bits, []
        for i in range(len(self.lengths)):
            low, high = bits[i] if i < len(bits) else 0.0, bits[i - 1] if i else float(ENTROPY_BITS)
            text = "any" if not bits else f"≥ {low:.2f}" if i == 0 else f"< {high:.2f}"
            text = f"{low:.2f}–{high:.2f}" if 0 < i < len(bits) else text
            ranges.append((*(min(max(b, 0.0), ENTROPY_BITS) for b in (low, high)), text))
        return ranges

    @property
    def columns(self) -> list[Column]:
        """The table of lengths: evidence, then cost."""
        lengths, columns = self.lengths, []
        if self.chosen.probability is not None:
            columns.append(Column("P", [Bar(n.probability, f"{n.probability:.3f}") for n in lengths]))
        if (theta := self.policy.threshold) is not None:
            bars = [Bar(n.suffices, f"{n.suffices:.3f}") for n in lengths]
            columns.append(Column("P(label ≤ grid)", bars, theta, f"θ = {theta:.4g}"))
        if self.entropy is not None:
            bars = [
                Bar((high - low) / ENTROPY_BITS, text, low / ENTROPY_BITS) for low, high, text in self.entropy_ranges
            ]
            columns.append(Column("entropy, bits", bars, self.entropy / ENTROPY_BITS, f"{self.entropy:.3f}"))
        columns.append(Column("GMACs", [Bar(n.macs / lengths[0].macs, n.gmacs) for n in lengths]))
        if self.chosen.ms is not None:
            most = max(n.ms for n in lengths)
            columns.append(Column("ms", [Bar(n.ms / most, f"{n.ms:.2f}") for n in lengths]))
        return columns

    @property
    def measures(self) -> str:
        """Sizes of the image and of the region that the model sees."""
        left, upper, right, lower = self.crop
        text = f"{self.size[0]} × {self.size[1]} px; the model sees {right - left:.0f} × {lower - upper:.0f} of it"
        return f"{text}; far ends not shown" if self.is_cut else text

    @property
    def described(self) -> str:
        """The picture in words."""
        return f"{self.name}, {self.measures}, outlined and cut into {self.chosen.side} patches"


def explain(
    pipe: AdaptivePipeline,
    sources: Iterable[ImageSource] | str | PathLike,
    *,
    top_k: int = 5,
    attention: bool = False,
) -> list[Explanation]:
    """What the pipeline decides for every image and why; decisions and classes are those of `pipe(sources)`.

    Each image runs alone, on the compute threads that the pipeline has in this thread. The first run sets things up and
    is not timed. The time of a stage is the fastest of the `N_RUNS` following ones.

    Args:
        pipe: the pipeline.
        sources: see `AdaptivePipeline.__call__`. A picture of each is kept, about 1 MB.
        top_k: number of classes to list; 0 for none, for weights that are not trained.
        attention: whether to draw what the class token reads of each patch, see `Explanation.attention`.

    Raises:
        ValueError: for a pipeline that keeps proportions, or has no attention to draw.
    """
    sources = as_sources(sources, pipe.KIND)
    if attention and not hasattr(pipe.model, "class_attention"):
        raise ValueError(f"attention: expected a pipeline of a ReViT, got one of a {type(pipe.model).__name__}")
    if pipe.prep.aspect != "crop":
        raise ValueError('pipe: explanations show square grids; give a pipeline whose preprocessor has aspect="crop"')
    n_prefix = pipe.model.num_prefix_tokens
    lengths = [Length(g, g * g + n_prefix, forward_macs(pipe.model, g * g)) for g in pipe.prep.grids]
    return [_explanation(pipe, lengths, index, source, top_k, attention) for index, source in enumerate(sources)]


def summary(explanations: Sequence[Explanation]) -> str:
    """One line with the number of images and what their grids save."""
    decided = [e for e in explanations if e.error is None]
    n_failed = len(explanations) - len(decided)
    text = f"{len(explanations)} image{'s' * (len(explanations) != 1)}"
    if n_failed:
        text += f", {n_failed} failed"
    if decided:
        ran, longest = total([n for e in decided for n in e.ran]), total([e.lengths[0] for e in decided])
        text += f"; {_cost(ran)}, where {longest.side} for every image would take {_cost(longest)}"
    return text


def _cost(length: Length) -> str:
    return f"{length.n_tokens:,} tokens and {length.macs / 1e9:.3g} GMACs"


def repeated(run: Callable[[], T]) -> list[T]:
    """Results of `N_RUNS` calls, after a first one that sets things up."""
    run()
    return [run() for _ in range(N_RUNS)]


def _explanation(
    pipe: AdaptivePipeline, lengths: list[Length], index: int, source: ImageSource, top_k: int, attention: bool
) -> Explanation:
    name = on_one_line(name_of(source))
    kept = held(source).kept if is_file(source) else source  # a stream can be read once

    def timed() -> tuple[_Run, StageTimes]:
        times = StageTimes()
        return _run(pipe, index, kept, times), times

    try:
        runs = repeated(timed)
        run = runs[-1][0]
    except ImageError as error:
        return Explanation(index, name, error=on_one_line(str(error)))
    if run.probabilities is not None:
        lengths = with_evidence(lengths, run.probabilities)
    height, width = run.image.shape[:2]
    crop = eval_box(height, width, run.grid * pipe.prep.patch_size, pipe.prep.crop_pct)
    picture, is_cut = draw_grid(run.image, crop, run.grid)
    top = Result(index, source, logits=run.logits, labels=pipe.labels).top(top_k)
    return Explanation(
        index,
        name,
        size=(width, height),
        crop=crop,
        picture=picture,
        is_cut=is_cut,
        policy=pipe.prep.policy,
        lengths=tuple(lengths),
        chosen=next(length for length in lengths if length.grid == run.grid),
        entropy=run.entropy,
        confidences=run.confidences,
        classes=tuple((on_one_line(str(entry["label"])), entry["score"]) for entry in top),
        stage_ms={stage: 1e3 * min(times.seconds[stage] for _, times in runs) for stage in STAGES},
        n_threads=torch.get_num_threads(),
        is_busy=hasattr(os, "getloadavg") and os.getloadavg()[0] > (os.cpu_count() or 1),
        **(_attention(pipe, run, crop) if attention else {}),
    )


def _attention(pipe: AdaptivePipeline, run: _Run, crop: tuple[float, float, float, float]) -> dict[str, Any]:
    """The fields of an explanation that show attention."""
    batch = pipe.prep.pack([run.image], [run.grid]).to(pipe.model.pos_embed.device)
    weights = pipe.model.class_attention(batch)[0].mean(0).cpu().numpy()
    reader = "the class token" if pipe.model.has_class_token else "a patch, on average,"
    text = f"What {reader} reads in the last block, mean of its heads: at most {weights.max():.1%} of one patch"
    return {"attention": draw_attention(run.image, crop, weights), "attention_text": text}


class _Run(NamedTuple):
    """Results of every stage for one image."""

    image: np.ndarray
    grid: int
    probabilities: np.ndarray | None
    entropy: float | None
    logits: Tensor
    confidences: tuple[float, ...]


def _run(pipe: AdaptivePipeline, index: int, source: ImageSource, times: StageTimes) -> _Run:
    """Runs the stages of the pipeline on one image; `index` is its place in the stream, as policies see it."""
    prep = pipe.prep
    with times.span("decode"):
        image = prep.decode(source)
    with times.span("assign"):
        assignment = prep.assign([image], [index])
    (next_grid,) = assignment.grids
    confidences = []
    while next_grid is not None:
        grid = next_grid
        with times.span("pack"):
            batch = prep.pack([image], [grid])
        with times.span("forward"):
            (logits,) = pipe.logits(batch)
        if not logits.isfinite().all():
            raise ImageError("the model's output is not a number")
        confidences.append(float(confidence(logits.numpy())))
        (next_grid,) = pipe.next_grids([grid], logits[None])
    probabilities = None if assignment.probabilities is None else assignment.probabilities[0]
    entropy = None if assignment.entropy is None else float(assignment.entropy[0])
    return _Run(image, grid, probabilities, entropy, logits, tuple(confidences))


def _apart(a: float, b: float) -> tuple[str, str]:
    """Both numbers with three decimals, or as many as it takes to tell them apart."""
    for n_digits in range(3, 9):
        texts = f"{a:.{n_digits}f}", f"{b:.{n_digits}f}"
        if texts[0] != texts[1]:
            break
    return texts if a != b else (f"{a:.3f}", f"{b:.3f}")
