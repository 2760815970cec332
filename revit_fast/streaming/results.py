"""The results of a pipeline, and the state of an image before it has a result."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from os import PathLike

import numpy as np
from torch import Tensor

from revit_fast.io.images import ImageSource, Source, is_file, name_of


@dataclass(frozen=True, eq=False, repr=False)
class Result:
    """The result of a source.

    Attributes:
        index: place of the source in the stream.
        source: the source as it was given; a producer that fills it again has changed it.
        grid: assigned patches per side; in a cascade the last grid; None if there is an error. If proportions are kept
            (see `AdaptivePreprocessor`), this is the side of a square with the largest number of tokens allowed.
        n_tokens: tokens that the model processed, including prefix tokens; in a cascade the sum over all grids.
        logits: float32 `[n_classes]` on the CPU; None if there is an error, the model did not run, or embeddings were
            asked for.
        error: None, or a text that names the source and the problem.
        probabilities: the assigner's, `[n_lengths]`, longest length first; None if the policy needs none.
        ms: milliseconds of decoding, plus a share of the time to assign its group and, by tokens, to run its pack.
        labels: names of the classes; None if the pipeline has none.
        grid_hw: rows and columns of patches in the last grid; None if there is an error.
        embedding: float32 `[C]` on the CPU, what the model's head reads; None unless the pipeline gives embeddings.
        tokens: float32 `[n_tokens, C]` on the CPU, every token after the final norm: first the model's
            `num_prefix_tokens`, then the patches row by row; None unless they are asked for.
    """

    index: int
    source: ImageSource
    grid: int | None = None
    n_tokens: int | None = None
    logits: Tensor | None = None
    error: str | None = None
    probabilities: np.ndarray | None = None
    ms: float = 0.0
    labels: Sequence[str] | None = None
    grid_hw: tuple[int, int] | None = None
    embedding: Tensor | None = None
    tokens: Tensor | None = None

    def __repr__(self) -> str:
        parts = [f"{self.index}, {name_of(self.source)!r}"]
        if self.error is not None:
            parts.append(f"error={self.reason!r}")
        else:
            parts += [f"grid={self.grid}, n_tokens={self.n_tokens}"]
            parts += [f"top={best['label']!r} at {best['score']:.3f}" for best in self.top(1)]
            parts += [] if self.embedding is None else [f"embedding=[{len(self.embedding)}]"]
            parts.append(f"ms={self.ms:.1f}")
        return f"Result({', '.join(parts)})"

    @property
    def reason(self) -> str | None:
        """The error without the name of the source."""
        if self.error is None:
            return None
        if isinstance(self.source, (str, PathLike, Source)) or is_file(self.source):
            return self.error.removeprefix(f"{name_of(self.source)}: ")
        return self.error.partition(">: ")[2]  # of "<120 bytes>: reason"; the source's size may have changed

    def top(self, k: int = 5) -> list[dict]:
        """The k best classes, `{"label": name or index, "score": probability}`; empty without logits."""
        if self.logits is None:
            return []
        scores, classes = self.logits.softmax(dim=0).topk(min(k, len(self.logits)))
        names = self.labels if self.labels is not None else range(len(self.logits))
        return [{"label": names[c], "score": s} for c, s in zip(classes.tolist(), scores.tolist(), strict=True)]


@dataclass(slots=True, eq=False)
class Ready:
    """A decoded image that waits for a forward pass, and the values for its `Result`.

    Attributes:
        image: pixels, or the frames of a clip.
        index: place of the source in the stream.
        source: the source as it was given.
        probabilities: the assigner's; None if the policy needs none.
        ms: milliseconds so far, see `Result`.
        grid: patches per side that the next pass was assigned.
        grid_hw: rows and columns of patches in that pass.
        n_tokens: tokens of that pass, including prefix tokens.
        n_tokens_before: tokens of all passes before that one.
    """

    image: np.ndarray = field(repr=False)
    index: int
    source: ImageSource
    probabilities: np.ndarray | None
    ms: float
    grid: int = 0
    grid_hw: tuple[int, int] = (0, 0)
    n_tokens: int = 0
    n_tokens_before: int = 0

    def start_pass(self, grid: int, grid_hw: tuple[int, int], n_tokens: int) -> None:
        """Sets the values of the next pass, and adds the tokens of the present pass to those before."""
        self.n_tokens_before += self.n_tokens
        self.grid, self.grid_hw, self.n_tokens = grid, grid_hw, n_tokens

    def result(self, labels: Sequence[str] | None, **values: Tensor) -> Result:
        """The result of its last pass.

        Args:
            labels: names of the classes.
            **values: what the model gave: fields of `Result`.
        """
        return Result(
            self.index,
            self.source,
            self.grid,
            self.n_tokens_before + self.n_tokens,
            probabilities=self.probabilities,
            ms=self.ms,
            labels=labels,
            grid_hw=self.grid_hw,
            **values,
        )


class InOrder:
    """Puts results back into the order of their sources."""

    def __init__(self, first_index: int) -> None:
        self._waiting: dict[int, Result] = {}
        self._next = first_index

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, result: Result) -> None:
        self._waiting[result.index] = result

    def ready(self) -> Iterator[Result]:
        """Results that are ready to be returned in order."""
        while self._next in self._waiting:
            self._next += 1
            yield self._waiting.pop(self._next - 1)
