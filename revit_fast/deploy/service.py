"""The HTTP service: reads requests within limits, answers in JSON, counts every answer.

    POST /classify      an encoded image -> {"predictions": [{"label", "score"}], "grid", "tokens", "ms"}
    POST /classify      a form with files, or JSON {"image": text} or {"images": [text, ...]}, see `bodies`
                        -> as above for one image, or {"results": [as above, or {"error"}, ...]}
    GET  /healthz       200, or 503 once the pipeline has failed
    GET  /metrics       Prometheus text
    GET  /openapi.json  the description of all this, see `openapi`
    GET  /docs          a page to try it

`/` takes what `/classify` takes. `?top_k=3` sets the number of classes to return. An error is `{"error": reason}` with
a status of `openapi.REFUSALS`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from revit_fast.deploy.bodies import FORM, Form, Sent, from_json
from revit_fast.deploy.classifier import (
    DEFAULT_LIMITS,
    Classifier,
    Classifies,
    Limits,
    Refusal,
    reason_of,
    without_paths,
)
from revit_fast.deploy.openapi import (
    CLASSIFY,
    DESCRIPTION,
    HEALTH,
    METRICS,
    PAGE,
    PAGE_HEADERS,
    PROMETHEUS_TEXT,
    document,
    page,
)
from revit_fast.io.names import MOST_DIGITS, dumps, shortened, whole_number
from revit_fast.streaming.pipeline import AdaptivePipeline

LOG = logging.getLogger(__name__)

WATCHED = (HEALTH, METRICS)
"""Paths for those who watch the service; their answers are not counted, unless they are errors of the service."""


class Json(JSONResponse):
    """A JSON answer in ASCII, whose texts may be names that are no UTF-8 (see `io.names`)."""

    def render(self, content: Any) -> bytes:
        return dumps(content, separators=(",", ":"), allow_nan=False).encode("ascii")


class RequestMetrics:
    """Prometheus metrics of requests."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("revit_fast_requests", "Requests by status.", ["status"], registry=registry)
        self.errors = Counter(
            "revit_fast_errors", "Requests and images not classified, by kind.", ["kind"], registry=registry
        )
        self.latency = Histogram(
            "revit_fast_request_seconds", "From a request's arrival to its answer.", registry=registry
        )


class Service:
    """Answers requests with a classifier, in this process or in another; one of this process must be closed.

    Args:
        classifies: the pipeline to classify with in this process, or a classifier.
        limits: limits of requests.
    """

    def __init__(self, classifies: AdaptivePipeline | Classifies, limits: Limits = DEFAULT_LIMITS) -> None:
        own = isinstance(classifies, AdaptivePipeline)
        self.classifier: Classifies = Classifier(classifies, limits) if own else classifies
        self.limits = limits
        self.metrics = RequestMetrics()
        self._stopping, self._failed, self._n_open, self._n_reading = False, False, 0, 0

    def close(self) -> None:
        """Closes the classifier: finishes all submitted images without waiting for full batches; refuses later ones."""
        self.classifier.close()

    async def drain(self) -> None:
        """Refuses new requests, answers all others, also those whose bodies still come, and closes the service."""
        self._stopping = True
        while self._n_reading:
            await asyncio.sleep(0.01)
        await asyncio.to_thread(self.close)
        while self._n_open:
            await asyncio.sleep(0.01)

    async def __call__(self, request: Request) -> Response:
        """Answers a request; `limits.seconds` includes the time to read its body."""
        begin = time.perf_counter()
        self._n_open += 1
        try:
            response = await self._answer_or_refusal(request)
        except (ClientDisconnect, asyncio.CancelledError) as gone:
            response = self.refused(Refusal(400, "disconnect", "the client is gone"))
            if isinstance(gone, asyncio.CancelledError):
                raise
            return response  # nobody gets it, so it is not counted as an answer
        except Exception:  # a mistake of ours: it must not end the service, and must be seen
            response = self.refused(self.mistake())
        finally:
            self._n_open -= 1
        if request.scope["path"] not in WATCHED or response.status_code == 500:
            self.count(response)
            self.metrics.latency.observe(time.perf_counter() - begin)
        return response

    def mistake(self) -> Refusal:
        """Logs the exception that is handled now, which nobody expected; returns what a client may know of it."""
        LOG.exception("unexpected error")
        return Refusal(500, "internal", "an error of the service; its log has the reason")

    async def _answer_or_refusal(self, request: Request) -> Response:
        try:
            return await asyncio.wait_for(self._answer(request), self.limits.seconds)
        except asyncio.TimeoutError:
            return self.refused(Refusal(504, "timeout", f"took longer than {self.limits.seconds:g} s"))
        except Refusal as refusal:
            return self.refused(refusal)

    def refused(self, refusal: Refusal) -> Json:
        """The answer that a refusal gives; counts it by its kind."""
        self.metrics.errors.labels(refusal.kind).inc()
        headers = {503: {"Retry-After": "1"}, 405: {"Allow": "POST"}}.get(refusal.status)
        return Json({"error": str(refusal)}, refusal.status, headers)

    def count(self, response: Response) -> None:
        """Counts an answer by its status."""
        self.metrics.requests.labels(response.status_code).inc()

    async def _answer(self, request: Request) -> Response:
        path = request.scope["path"]
        if path in WATCHED:
            return await self._watched(path)
        if path == DESCRIPTION:
            return Json(document(self.limits))
        if path == PAGE:
            return HTMLResponse(page(self.limits), headers=PAGE_HEADERS)
        if path not in CLASSIFY:
            raise Refusal(404, "request", f"there is no {path[:80]}; POST an image to /, or see {PAGE}")
        if request.method != "POST":
            raise Refusal(405, "request", f"{request.method[:80]}: POST an image, or see {PAGE} in a browser")
        if self._stopping:
            raise Refusal(503, "shutdown", "the service stops")
        self._top_k(request.query_params.get("top_k"))
        sent = await self._images(request, self._media_type(request))
        top_k = self._top_k(request.query_params.get("top_k") if sent.top_k is None else sent.top_k)
        if not sent.as_list:
            return Json(await self._classified(sent.images[0], top_k))
        answers = await asyncio.gather(
            *(self._classified(image, top_k) for image in sent.images), return_exceptions=True
        )
        return Json({"results": [self._entry(answer) for answer in answers]})

    async def _watched(self, path: str) -> Response:
        if path == METRICS:
            text = generate_latest(self.metrics.registry) + await self.classifier.metrics_text()
            return Response(text, media_type=PROMETHEUS_TEXT)
        reason = "the service stops" if self._stopping else await self.classifier.failure()
        if reason is not None:
            return Json({"error": without_paths(reason)}, 503)
        return Json({"status": "ok"})

    def _entry(self, answer: dict | BaseException) -> dict[str, Any]:
        if isinstance(answer, Refusal):
            self.metrics.errors.labels(answer.kind).inc()
            return {"error": str(answer)}
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _top_k(self, text: str | None) -> int:
        if text is None:
            return self.limits.top_k
        top_k = whole_number(text)
        if top_k is None or not 1 <= top_k < 10**MOST_DIGITS:
            raise Refusal(400, "request", f"top_k: expected a positive integer, got {shortened(text)}")
        return top_k

    def _media_type(self, request: Request) -> str:
        """The media type of the body, in lower case; refuses what would be taken for the bytes of an image."""
        coding = request.headers.get("content-encoding", "identity").strip().lower()
        if coding not in ("", "identity"):
            raise Refusal(415, "request", f"Content-Encoding {coding[:80]!r}: send the body as it is, without coding")
        media_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
        if media_type.startswith("multipart/") and media_type != FORM:
            raise Refusal(
                415, "request", f"Content-Type {media_type[:80]!r}: send {FORM}, or the bytes of the image alone"
            )
        return media_type

    async def _images(self, request: Request, media_type: str) -> Sent:
        """Reads the body of a request."""
        if media_type == FORM:
            form = Form(request.headers["content-type"], self.limits)
            await self._body(request, form.write)
            return form.close()
        body = bytearray()
        await self._body(request, body.extend)
        return from_json(body, self.limits) if media_type == "application/json" else Sent([bytes(body)])

    async def _body(self, request: Request, write: Callable[[bytes], None]) -> None:
        """Hands on the body as it comes, at most `limits.body_bytes` of it."""
        limit = self.limits.body_bytes
        too_large = Refusal(413, "body", f"the body is larger than {limit} bytes")
        declared = whole_number(request.headers.get("content-length", ""))
        if declared is not None and declared > limit:
            raise too_large
        n_bytes = 0
        self._n_reading += 1
        try:
            async for chunk in request.stream():
                n_bytes += len(chunk)
                if n_bytes > limit:
                    raise too_large
                write(chunk)
        finally:
            self._n_reading -= 1

    async def _classified(self, image: bytes, top_k: int) -> dict[str, Any]:
        try:
            answer = await self.classifier.classify(image, top_k)
        except Refusal:
            raise
        except Exception as error:  # the error that ended the pipeline or its process, of any type
            if not self._failed:  # all images fail until it has started again
                LOG.error("the pipeline has failed", exc_info=error)
            self._failed = True
            raise Refusal(503, "pipeline", reason_of(error)) from error
        self._failed = False
        return answer
