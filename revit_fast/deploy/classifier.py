"""Classifies encoded images for the HTTP service, in this process or in a replica of Ray Serve.

The batcher of the service is `AdaptivePipeline.session()`; Ray Serve handles processes and restarts. The session
decodes on threads, assigns in groups, puts an image into the first of several open packs with room, bounds its wait,
and takes images from any thread. Ray Serve's own `@serve.batch(batch_size_fn=...)` counts tokens only if they are known
when a request is queued. Here they depend on the pixels, so decoding and assigning would have to come before it. Its
queue also keeps only one open batch, puts a request that does not fit behind later ones, counts the batch again for
each arrival, and fails a request that is larger than the budget.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest

from revit_fast.inference.inference_copy import dtype_name
from revit_fast.io.formats import SERVED, check_formats
from revit_fast.io.images import ImageError, encoded_size
from revit_fast.io.trace import StageTimes
from revit_fast.streaming.pipeline import AdaptivePipeline
from revit_fast.streaming.results import Result

STATE_S = 2.0
"""Seconds to wait for a replica to say how it is."""

_PATH = re.compile(r"(?:[A-Za-z]:)?(?:[\\/][^\s\\/'\"<>:,;()\[\]]+){2,}[\\/]?")


@dataclass(frozen=True)
class Limits:
    """Limits of requests.

    Attributes:
        body_bytes: largest size of a request's body, in bytes.
        formats: Pillow's names of the image formats that may be read. By default those that browsers show: nobody's
            decoders read more files of strangers.
        image_pixels: largest width times height of an image, read from its header before decoding.
        images: largest number of images in one JSON request.
        seconds: longest time from a request's head to its answer; also bounds the time of the head itself, see
            `server.HEAD_S`, and that of sending the answer.
        waiting: largest number of images in the service; twice as many connections may be open. These and `body_bytes`
            bound the memory.
        top_k: default number of classes to return.
    """

    body_bytes: int = 32 << 20
    formats: tuple[str, ...] = SERVED
    image_pixels: int = 50_000_000
    images: int = 64
    seconds: float = 30.0
    waiting: int = 256
    top_k: int = 5

    def __post_init__(self) -> None:
        object.__setattr__(self, "formats", check_formats(self.formats))
        for name, value in vars(self).items():
            if name != "formats" and (not isinstance(value, (int, float)) or not value > 0):
                raise ValueError(f"{name}: expected a positive number, got {value!r}")

    @property
    def connections(self) -> int:
        """Largest number of open connections. Requests beyond `waiting` must get in, to be told that."""
        return 2 * self.waiting


DEFAULT_LIMITS = Limits()


class Refusal(Exception):
    """A request or an image that gets an error as its answer.

    Args:
        status: HTTP status code.
        kind: label of the error metric.
        reason: text for the client.
    """

    def __init__(self, status: int, kind: str, reason: str) -> None:
        super().__init__(status, kind, reason)  # all arguments, or it could not be sent between processes
        self.status, self.kind, self.reason = status, kind, reason

    def __str__(self) -> str:
        return self.reason


def without_paths(text: object) -> str:
    """A message without the paths of files in it: a client must not learn how the machine is laid out."""
    return _PATH.sub("…", str(text))


def reason_of(error: BaseException) -> str:
    """What a client may know of an error: one line without paths."""
    cause = getattr(error, "cause", None)  # Ray wraps an error of another process, with its traceback as the text
    text = str(cause if isinstance(cause, BaseException) else error)
    return without_paths(text.partition("\n")[0]) or type(error).__name__


class BatchMetrics(StageTimes):
    """Prometheus metrics of a classifier. They see every batch, because they are the pipeline's `StageTimes`.

    Args:
        token_budget: token budget of a batch. It is the last bucket but one, which makes larger batches visible.
        n_waiting: returns the number of images in the service now.
        dtype: name of the dtype of the weights that the model multiplies with.
    """

    def __init__(self, token_budget: int, n_waiting: Callable[[], int], dtype: str) -> None:
        super().__init__()
        self.registry = CollectorRegistry()

        def make(kind: type, name: str, text: str, **options: Any) -> Any:
            return kind(f"revit_fast_{name}", text, registry=self.registry, **options)

        budgets = sorted({max(1, token_budget * share // 16) for share in (1, 2, 4, 8, 12, 16)})
        self.batch_tokens = make(Histogram, "batch_tokens", "Tokens of a forward pass.", buckets=budgets)
        self.batch_images = make(
            Histogram, "batch_images", "Images of a forward pass.", buckets=[1, 2, 4, 8, 16, 32, 64]
        )
        self.stage_seconds = make(Counter, "stage_seconds", "Time spent in a stage.", labelnames=["stage"])
        make(Gauge, "waiting_images", "Images that wait for their result.").set_function(n_waiting)
        make(Info, "model", "The model that is served.").info({"dtype": dtype})

    def _record(self, stage: str, begin: float, end: float, details: dict) -> None:
        super()._record(stage, begin, end, details)
        self.stage_seconds.labels(stage).inc(end - begin)
        if stage == "forward":
            self.batch_tokens.observe(details["tokens"])
            self.batch_images.observe(details["images"])


class Classifies(Protocol):
    """What the HTTP service needs: a `Classifier`, or one in another process."""

    async def classify(self, image: bytes, top_k: int) -> dict[str, Any]:
        """The answer for an encoded image; a `Refusal` if it gets none, any other exception if the pipeline failed."""

    async def failure(self) -> str | None:
        """The reason why nothing can be classified any more; None while all is well."""

    async def metrics_text(self) -> bytes:
        """Prometheus text of the batches."""

    def close(self) -> None:
        """Finishes what was submitted; refuses later images."""


class Classifier:
    """Classifies encoded images with a session of a pipeline; it must be closed with `close`.

    Args:
        pipe: the pipeline; its `token_budget` and `max_wait_s` bound the batches.
        limits: limits of pixels and of waiting images.
    """

    def __init__(self, pipe: AdaptivePipeline, limits: Limits) -> None:
        self.limits = limits
        self.metrics = BatchMetrics(pipe.token_budget, lambda: len(self.session), dtype_name(pipe.model))
        self.session = pipe.session(self.metrics)

    def close(self) -> None:
        """Finishes all submitted images without waiting for full batches; refuses later images."""
        self.session.close()

    async def classify(self, image: bytes, top_k: int) -> dict[str, Any]:
        """See `Classifies`; the image is submitted before anything is awaited."""
        try:
            width, height = encoded_size(image, self.limits.formats)
        except ImageError as error:
            raise Refusal(422, "image", str(error)) from error
        if width * height > self.limits.image_pixels:
            limit = self.limits.image_pixels
            raise Refusal(422, "pixels", f"the image has {width}x{height} pixels, at most {limit} are allowed")
        if len(self.session) >= self.limits.waiting:
            raise Refusal(503, "overload", f"{self.limits.waiting} images are waiting; try again")
        result: Result = await asyncio.wrap_future(self.session.submit(image))
        if result.error is not None:
            raise Refusal(422, "image", result.reason)
        return {
            "predictions": result.top(top_k),
            "grid": result.grid,
            "tokens": result.n_tokens,
            "ms": round(result.ms, 3),
        }

    async def failure(self) -> str | None:
        return self.session.closed

    async def metrics_text(self) -> bytes:
        return generate_latest(self.metrics.registry)


class RemoteClassifier:
    """The classifier of a replica of Ray Serve.

    Args:
        handle: handle of the deployment that `http.make_app` makes.
    """

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def classify(self, image: bytes, top_k: int) -> dict[str, Any]:
        response = self._handle.classify.remote(image, top_k)
        try:
            answer = await response
        except asyncio.CancelledError:  # the client is gone or its time is over
            response.cancel()
            raise
        if isinstance(answer, Refusal):
            raise answer
        return answer

    async def failure(self) -> str | None:
        try:
            return await asyncio.wait_for(self._handle.failure.remote(), STATE_S)
        except Exception as error:  # Ray raises many types if a replica dies or starts again
            return f"the process that classifies does not answer ({type(error).__name__})"

    def close(self) -> None:
        """Nothing: Ray Serve ends its replicas."""

    async def metrics_text(self) -> bytes:
        try:
            return await asyncio.wait_for(self._handle.metrics_text.remote(), STATE_S)
        except Exception:  # as above; /healthz says so
            return b""
