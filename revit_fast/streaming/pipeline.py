"""The pipeline: decodes a stream of images ahead, assigns grids, packs by tokens, and returns results in order."""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Sequence
from copy import copy
from functools import partial
from os import PathLike
from typing import Literal

import torch
from torch import Tensor, nn

from revit_fast.adaptive.assigner import TokenLengthAssigner
from revit_fast.adaptive.policies import PolicySpec, confidence
from revit_fast.adaptive.preprocess import AdaptivePreprocessor
from revit_fast.inference.inference_copy import device_name, dtype_name
from revit_fast.inference.optimize import optimize as optimized_copy
from revit_fast.io.finding import IMAGES
from revit_fast.io.images import ImageSource, as_sources, name_of
from revit_fast.io.memory import keep_freed_pages, release_freed_pages
from revit_fast.io.names import shortened
from revit_fast.io.threads import check_compute_threads
from revit_fast.io.trace import StageTimes
from revit_fast.models.classes import class_names
from revit_fast.models.create import create_model
from revit_fast.models.vit import ReViT
from revit_fast.packing import PackedBatch
from revit_fast.streaming.asynchronous import streamed
from revit_fast.streaming.batching import TokenBudgetBatcher
from revit_fast.streaming.decoding import Decoders, Fed, copies, default_decoders
from revit_fast.streaming.outputs import Embedder, Outputs, outputs_of_logits
from revit_fast.streaming.results import InOrder, Ready, Result
from revit_fast.streaming.session import Session

MAX_BYTES = 256 << 20
"""Largest size, in bytes, of decoded images that wait to be packed."""

RELEASE_BYTES = 64 << 20
"""Size of processed images, in bytes, after which freed memory is returned to the system."""

MAX_BEHIND = 1024
"""Largest number of results that wait for an earlier one."""


class AdaptivePipeline:
    """Computes the logits of images, each at the number of tokens that the preprocessor's policy chooses.

    Threads decode images ahead. Decoded images are assigned in small groups and join the first open pack that has room
    for their tokens. When a pack is full or has waited, they are resized directly into it. Results come in the order of
    the sources; a source that cannot be read gives an error and does not change the place of any other. Memory does not
    grow with the stream. From the first pipeline on, the process keeps freed memory, see
    `revit_fast.io.memory.keep_freed_pages`.

    Args:
        model: a `ReViT` in evaluation mode, preferably a copy made by `optimize`; or another module that
            `prep.check_model` accepts.
        prep: preprocessor of the model: decodes, assigns and packs images.
        token_budget: largest number of tokens in a pack, including prefix tokens.
        labels: names of the classes.
        max_wait_s: longest time, in seconds, that an image waits for others to fill its pack.
        n_decoders: number of decoding threads; by default `decoding.default_decoders()`.

    Raises:
        TypeError, ValueError: if an argument is not as above, or the arguments do not fit together.
    """

    def __init__(
        self,
        model: nn.Module,
        prep: AdaptivePreprocessor,
        *,
        token_budget: int = 4096,
        labels: Sequence[str] | None = None,
        max_wait_s: float = 0.1,
        n_decoders: int | None = None,
    ) -> None:
        prep.check_model(model)
        if n_decoders is not None and n_decoders < 1:
            raise ValueError(f"n_decoders: expected at least 1, got {n_decoders}")
        if labels is not None and len(labels) != model.num_classes:
            raise ValueError(f"labels: the model has {model.num_classes} classes, got {len(labels)} names")
        check_compute_threads("pipeline")
        keep_freed_pages()
        self.model, self.prep, self.labels = model, prep, labels
        self.n_decoders, self.token_budget = n_decoders or default_decoders(), token_budget
        smallest = self._n_tokens((model.grids[-1], model.grids[-1]))
        options = {"min_tokens": smallest, "max_wait_s": max_wait_s, "max_bytes": MAX_BYTES}
        self._make_batcher = partial(TokenBudgetBatcher, token_budget, **options)
        self._make_batcher()  # checks its arguments

    KIND = IMAGES
    """Kind of the files that a text or path as `sources` stands for."""

    _embedder: Embedder | None = None

    def __repr__(self) -> str:
        model, prep = self.model, self.prep
        grids = "/".join(map(str, model.grids))
        return (
            f"{type(self).__name__}({type(model).__name__} of grids {grids}, {model.num_classes} classes"
            f"{'' if self.labels is None else ' with names'}, {dtype_name(model)} on {device_name(model)}; "
            f"policy={shortened(prep.policy.spec)}, token_budget={self.token_budget})"
        )

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the classes; None if the pipeline has none."""
        return None if self.labels is None else tuple(self.labels)

    def with_policy(self, policy: PolicySpec) -> AdaptivePipeline:
        """A copy of this pipeline with another policy."""
        other = copy(self)
        other.prep = self.prep.with_policy(policy)
        if self._embedder is not None:
            self._embedder.check(self.model, other.prep.policy)
        return other

    def with_embeddings(self, *, tokens: bool = False, normalize: bool = False) -> AdaptivePipeline:
        """A copy of this pipeline whose results have embeddings in place of logits: in calls, sessions and streams.

        Args:
            tokens: also give every token after the final norm, as `Result.tokens`.
            normalize: divide every embedding by its Euclidean norm; one of zeros stays as it is. Tokens are left alone.

        Raises:
            TypeError: if the model is no `ReViT`, such as one that takes clips.
            ValueError: if the model has no pooling, or the policy is a cascade, which needs logits.
        """
        other = copy(self)
        other._embedder = Embedder(tokens, normalize)
        other._embedder.check(self.model, self.prep.policy)
        return other

    def __call__(
        self,
        sources: Iterable[ImageSource] | str | PathLike,
        *,
        times: StageTimes | None = None,
        first_index: int = 0,
        copy: bool = True,
    ) -> Iterator[Result]:
        """Yields one `Result` per source, in the order of the sources; computes them as they are consumed.

        Args:
            sources: paths, bytes of encoded files, PIL images, uint8 arrays; may be endless. A thread iterates them,
                unless they are a list or tuple. A generator is closed when the results end or are left. A single text
                or path is a file, a folder, a glob pattern or a list of them (see `io.finding.find_images`), such as
                "photos/", "photos/*.jpg" or "@list.txt".
            times: collects the time of each stage; a `Trace` also keeps the spans.
            first_index: place of the first source in its stream, for `Result.index` and for policies that depend on the
                place. A part of a stream then gives the same results as in the whole stream.
            copy: a generator may fill the array, buffer or PIL image that it has yielded again: what it could change is
                copied before `next()` is called on it. False spares the copy, if sources stay unchanged until their
                results. What is in a list or tuple is never copied and must stay unchanged. Files are read later.

        Raises:
            TypeError: for a single image that is no path.
            RuntimeError: while the results are consumed, in a process that was forked since they began, or from one
                that had computed on several threads.
        """
        sources = as_sources(sources, self.KIND)
        return self._run(sources, times or StageTimes(), first_index, copy)

    def embed(
        self,
        sources: Iterable[ImageSource] | str | PathLike,
        *,
        tokens: bool = False,
        normalize: bool = False,
        **options,
    ) -> Iterator[Result]:
        """Yields one `Result` with an `embedding` per source: what the model's head reads, float32 `[C]`.

        It is that of `model.forward_embeddings` at the grid that the policy chooses. With a model that `optimize` made,
        it is bitwise the same for an image alone and in any pack on the CPU. The model may have no classifier
        (`num_classes=0`).

        Args:
            sources: see `__call__`.
            tokens: see `with_embeddings`.
            normalize: see `with_embeddings`.
            **options: further arguments of `__call__`.

        Raises:
            TypeError, ValueError, RuntimeError: see `with_embeddings` and `__call__`.
        """
        return self.with_embeddings(tokens=tokens, normalize=normalize)(sources, **options)

    def assign(
        self, sources: Iterable[ImageSource] | str | PathLike, *, times: StageTimes | None = None, copy: bool = True
    ) -> Iterator[Result]:
        """Decides without running the model; yields results without logits as soon as they are known.

        Args:
            sources: see `__call__`.
            times: collects the time of each stage.
            copy: see `__call__`.

        Raises:
            ValueError: if the policy is a cascade, which needs the logits.
        """
        sources = as_sources(sources, self.KIND)
        self.prep.policy.decides_before("assign runs no model")
        return self._assign(sources, times or StageTimes(), copy)

    def classify(
        self, images: Iterable[ImageSource] | str | PathLike, top_k: int = 5, *, copy: bool = True
    ) -> list[dict]:
        """A list of `{"predictions": [{"label", "score"}, ...], "grid", "tokens", "error"}`, one per image.

        Args:
            images: see `__call__`.
            top_k: number of classes for each image.
            copy: see `__call__`.
        """
        return [
            {"predictions": r.top(top_k), "grid": r.grid, "tokens": r.n_tokens, "error": r.error}
            for r in self(images, copy=copy)
        ]

    def session(self, times: StageTimes | None = None, *, copy: bool = True) -> Session:
        """Starts a `Session`, which takes images from any thread; it is a context manager.

        Args:
            times: collects the time of each stage.
            copy: False if arrays, buffers and PIL images stay unchanged until their results; they are not copied then.
        """
        return Session(self, times, copy=copy)

    def stream(
        self, sources: AsyncIterable[ImageSource] | Iterable[ImageSource] | str | PathLike, *, copy: bool = True
    ) -> AsyncIterator[Result]:
        """Yields the results of a stream in order, without blocking the event loop; waits for its consumer.

        Leaving early (`break`, an exception, cancellation, `aclose`) ends it at once: images that wait are not
        computed.

        Args:
            sources: see `__call__`; or an async iterable, which this event loop iterates. At most `MAX_BEHIND` sources
                are taken ahead of the consumer.
            copy: see `__call__`.
        """
        sources = as_sources(sources, self.KIND)
        return streamed(partial(self.session, copy=copies(sources, copy)), sources, MAX_BEHIND)

    def _run(self, sources: Iterable[ImageSource], times: StageTimes, first_index: int, copy: bool) -> Iterator[Result]:
        batcher: TokenBudgetBatcher[Ready] = self._make_batcher()
        done = InOrder(first_index)
        decoders = Decoders(sources, self.prep.decode, self.n_decoders, times, first_index, copy=copy)
        try:
            end, n_unreleased = None, 0
            while end is None:
                chunk, end = decoders.chunk(batcher.deadline)
                packs: deque[list[Ready]] = deque()
                self._sort_in(self._assigned(chunk, times), done, batcher, packs)
                packs += batcher.expired(time.perf_counter())
                yield from done.ready()
                while True:
                    if not packs and (end is not None or len(done) >= MAX_BEHIND):
                        packs += batcher.flush()
                    if not packs:
                        break
                    decoders.check_process()  # the compute threads may be lost, too, and would be waited for
                    pack = packs.popleft()
                    n_unreleased += sum(ready.image.nbytes for ready in pack)
                    if n_unreleased >= RELEASE_BYTES:
                        n_unreleased = 0
                        release_freed_pages()
                    self._sort_in(self._forward(pack, times), done, batcher, packs)
                    yield from done.ready()
            if end.error is not None:
                raise end.error
        finally:
            decoders.close()

    def _sort_in(
        self,
        items: Iterable[Ready | Result],
        done: InOrder,
        batcher: TokenBudgetBatcher[Ready],
        packs: deque[list[Ready]],
    ) -> None:
        """Adds results to `done`, images to the batcher, and the packs that it closes to `packs`."""
        now = time.perf_counter()
        for item in items:
            if isinstance(item, Result):
                done.add(item)
            else:
                packs += batcher.add(item, item.n_tokens, now, item.image.nbytes)

    def _n_tokens(self, grid_hw: tuple[int, int]) -> int:
        return self.prep.n_patches(grid_hw) + self.model.num_prefix_tokens

    def _start_pass(self, ready: Ready, grid: int) -> Ready:
        """Gives an image the grid of its next pass, and works out what follows from it."""
        grid_hw = self.prep.grid_hw(ready.image, grid)
        ready.start_pass(grid, grid_hw, self._n_tokens(grid_hw))
        return ready

    def _assign(self, sources: Iterable[ImageSource], times: StageTimes, copy: bool) -> Iterator[Result]:
        decoders = Decoders(sources, self.prep.decode, self.n_decoders, times, copy=copy)
        try:
            end = None
            while end is None:
                chunk, end = decoders.chunk(math.inf)
                items = self._assigned(chunk, times)
                yield from sorted(
                    (i.result(self.labels) if isinstance(i, Ready) else i for i in items), key=lambda r: r.index
                )
            if end.error is not None:
                raise end.error
        finally:
            decoders.close()

    def _assigned(self, chunk: list[Fed], times: StageTimes) -> list[Ready | Result]:
        """Decoded images with their grids, and a `Result` with an error for each source that could not be read."""
        items: list[Ready | Result] = []
        readable: list[Ready] = []
        for fed in chunk:
            image, error, ms = fed.decoded.result()
            if image is None:
                items.append(self._error(fed.index, fed.source, error, ms))
            else:
                readable.append(Ready(image, fed.index, fed.source, None, ms))
        if not readable:
            return items
        begin = time.perf_counter()
        with times.span("assign", images=len(readable)):
            assignment = self.prep.assign([ready.image for ready in readable], [ready.index for ready in readable])
        assign_ms = 1e3 * (time.perf_counter() - begin) / len(readable)
        probabilities = assignment.probabilities
        if probabilities is None:
            probabilities = [None] * len(readable)
        for ready, grid, p in zip(readable, assignment.grids, probabilities, strict=True):
            ready.probabilities = p
            ready.ms += assign_ms
            items.append(self._start_pass(ready, grid))
        return items

    def _error(self, index: int, source: ImageSource, error: str, ms: float) -> Result:
        return Result(index, source, error=error, ms=ms, labels=self.labels)

    def logits(self, batch: PackedBatch) -> Tensor:
        """Float32 logits `[B, n_classes]`, on the CPU, of a batch that `prep` packed."""
        with torch.inference_mode():
            return self.model(self._on_device(batch)).float().cpu()

    def _on_device(self, batch: PackedBatch) -> PackedBatch:
        device = self.model.input_device
        return batch if batch.device == device else batch.to(device)

    def _outputs(self, batch: PackedBatch) -> Outputs:
        """What this pipeline computes of a batch that `prep` packed."""
        if self._embedder is None:
            return outputs_of_logits(self.logits(batch))
        with torch.inference_mode():
            return self._embedder(self.model, self._on_device(batch))

    def _forward(self, pack: list[Ready], times: StageTimes) -> Iterator[Ready | Result]:
        """Runs one packed forward pass and divides its time among the images by their tokens.

        Yields a result for each image, or the image itself if a cascade goes on with a longer grid.
        """
        begin = time.perf_counter()
        grids = [ready.grid for ready in pack]
        n_tokens = sum(ready.n_tokens for ready in pack)
        with times.span("pack", images=len(pack), tokens=n_tokens):
            batch = self.prep.pack([ready.image for ready in pack], [ready.grid_hw for ready in pack])
        with times.span("forward", images=len(pack), tokens=n_tokens):
            outputs = self._outputs(batch)
        next_grids = self.next_grids(grids, outputs.logits)
        ms_per_token = 1e3 * (time.perf_counter() - begin) / n_tokens
        results = zip(pack, outputs.values, outputs.is_finite, next_grids, strict=True)
        for ready, values, finite, next_grid in results:
            if not finite:
                error = f"{name_of(ready.source)}: the model's output is not a number"
                yield self._error(ready.index, ready.source, error, ready.ms)
                continue
            ready.ms += ms_per_token * ready.n_tokens
            yield ready.result(self.labels, **values) if next_grid is None else self._start_pass(ready, next_grid)

    def next_grids(self, grids: Sequence[int], logits: Tensor | None) -> list[int | None]:
        """The next grid of each image in a cascade; None for an image that is finished, and for all other policies.

        Args:
            grids: grids of the forward pass, one for each image.
            logits: `[B, n_classes]` on the CPU, the result of that pass; only a cascade needs them.
        """
        bound, longer = self.prep.policy.bound, dict(itertools.pairwise(reversed(self.model.grids)))
        if bound is None:
            return [None] * len(grids)
        content = (confidence(logits.numpy()) >= bound).tolist()
        return [None if sure else longer.get(grid) for grid, sure in zip(grids, content, strict=True)]


def pipeline(
    model: ReViT | str = "deit_small_patch16_224",
    assigner: TokenLengthAssigner | str | PathLike | None = None,
    *,
    weights: str | PathLike | None = None,
    policy: PolicySpec | None = None,
    labels: Sequence[str] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | Literal["auto"] | None = None,
    token_budget: int = 4096,
    optimize: bool = True,
    **options,
) -> AdaptivePipeline:
    """Makes a pipeline with an optimised model, ready to be called with images.

    Args:
        model: a `ReViT`, or the timm name of a model to create (needs timm).
        assigner: a `TokenLengthAssigner`, or the file that one was saved to.
        weights: weight file for a model created by name, see `create_model`.
        policy: see `policies.make_policy`; by default "argmax", or the longest grid without an assigner.
        labels: names of the classes; by default the model's own, see `models.classes.class_names`.
        device: device of the model; by default its present one.
        dtype: type of the model's weights, see `optimize`; "auto" and int8 are for an optimised copy.
        token_budget: largest number of tokens in a pack.
        optimize: run a copy made by `revit_fast.optimize`; otherwise the model itself, in evaluation mode.
        **options: further arguments of `AdaptivePipeline`, or of `AdaptivePreprocessor` (draft, crop_pct, ...).

    Raises:
        TypeError, ValueError, FileNotFoundError: if a part cannot be loaded, or the parts do not fit together.
    """
    if isinstance(model, str):
        model = create_model(model, weights=weights)
    elif weights is not None:
        raise ValueError("weights: they are for a model made by name; load them with model.load_checkpoint(path)")
    if isinstance(assigner, (str, PathLike)):
        assigner = TokenLengthAssigner.load(assigner)
    if dtype in ("auto", torch.int8) and not optimize:
        raise ValueError(
            f"dtype: {dtype} is for an optimised copy; leave optimize=False out, or give a floating-point dtype"
        )
    model = model if device is None else model.to(device)
    fast = optimized_copy(model, dtype) if optimize else model.to(dtype or model.pos_embed.dtype).eval()
    own = {name: options.pop(name) for name in ("max_wait_s", "n_decoders") if name in options}
    policy = policy or ("argmax" if assigner is not None else ("fixed", fast.grids[0]))
    prep = AdaptivePreprocessor.for_model(fast, assigner, policy=policy, **options)
    labels = class_names(fast) if labels is None else labels
    return AdaptivePipeline(fast, prep, token_budget=token_budget, labels=labels, **own)
