"""An HTTP service that fills its batches by tokens, as a Ray Serve deployment.

The batcher of this service is `AdaptivePipeline.session()`; Ray Serve handles processes, restarts and HTTP. The session
decodes on threads, assigns in groups, puts an image into the first of several open packs with room, bounds its wait,
and takes images from any thread. Ray Serve's own `@serve.batch(batch_size_fn=...)` counts tokens only if they are known
when a request is queued. Here they depend on the pixels, so decoding and assigning would have to come before it. Its
queue also keeps only one open batch, puts a request that does not fit behind later ones, counts the batch again for
each arrival, and fails a request that is larger than the budget.

    POST /           an encoded image -> {"predictions": [{"label", "score"}], "grid", "tokens", "ms"}
    POST /           application/json {"images": [base64, ...]} -> {"results": [as above, or {"error"}, ...]}
    GET  /healthz    200, or 503 once the pipeline has failed
    GET  /metrics    Prometheus text

`?top_k=3` sets the number of classes to return. An error is `{"error": reason}` with a status: 400 (JSON, top_k), 404,
405, 413 (body too large), 422 (not an image, or too many pixels), 503 (too many images wait, or the pipeline has
failed), 504 (took too long).

Needs `pip install "revit-fast[serve]"`.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from revit_fast.inference.inference_copy import dtype_name
from revit_fast.io.images import ImageError, encoded_size
from revit_fast.io.names import MOST_DIGITS, dumps, shortened, whole_number
from revit_fast.io.trace import StageTimes
from revit_fast.streaming.pipeline import AdaptivePipeline
from revit_fast.streaming.results import Result

DELIVERY_S = 0.5
"""Seconds from the last answer of the service until the HTTP proxy in front of it has sent the answer."""

PROMETHEUS_TEXT = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True)
class Limits:
    """Limits of requests.

    Attributes:
        body_bytes: largest size of a request's body, in bytes.
        image_pixels: largest width times height of an image, read from its header before decoding.
        images: largest number of images in one JSON request.
        seconds: longest time from a request's arrival to its answer.
        waiting: largest number of images in the service; this and `body_bytes` bound the memory.
        top_k: default number of classes to return.
    """

    body_bytes: int = 32 << 20
    image_pixels: int = 50_000_000
    images: int = 64
    seconds: float = 30.0
    waiting: int = 256
    top_k: int = 5

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, (int, float)) or not value > 0:
                raise ValueError(f"{name}: expected a positive number, got {value!r}")


class Answer(JSONResponse):
    """A JSON answer, whose texts may be names that are no UTF-8 (see `io.names`)."""

    def render(self, content: Any) -> bytes:
        return dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


class Refusal(Exception):
    """A request that gets an error as its answer.

    Args:
        status: HTTP status code.
        kind: label of the error metric.
        reason: text for the client.
    """

    def __init__(self, status: int, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.status, self.kind = status, kind


class Metrics(StageTimes):
    """Prometheus metrics of a service. They see every batch, because they are the pipeline's `StageTimes`.

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
        self.requests = make(Counter, "requests", "Requests by status.", labelnames=["status"])
        self.errors = make(Counter, "errors", "Requests and images not classified, by kind.", labelnames=["kind"])
        self.latency = make(Histogram, "request_seconds", "From a request's arrival to its answer.")
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


class Service:
    """Answers requests with a session of a pipeline; it must be closed with `close`.

    Args:
        pipe: the pipeline; its `token_budget` and `max_wait_s` bound the batches.
        limits: limits of requests.
    """

    def __init__(self, pipe: AdaptivePipeline, limits: Limits = Limits()) -> None:
        self.limits = limits
        self.metrics = Metrics(pipe.token_budget, lambda: len(self.session), dtype_name(pipe.model))
        self.session = pipe.session(self.metrics)
        self._n_open = 0

    def close(self) -> None:
        """Finishes all submitted images without waiting for full batches; refuses later images."""
        self.session.close()

    async def drain(self) -> None:
        """Closes the service and returns when every request has its answer."""
        await asyncio.to_thread(self.close)
        while self._n_open:
            await asyncio.sleep(0.01)

    async def __call__(self, request: Request) -> Response:
        """Answers a request; `limits.seconds` includes the time to read its body."""
        if request.url.path in ("/healthz", "/metrics"):
            return self._watched(request)
        begin = time.perf_counter()
        self._n_open += 1
        try:
            response = Answer(await asyncio.wait_for(self._answer(request), self.limits.seconds))
        except asyncio.TimeoutError:
            response = self._refused(Refusal(504, "timeout", f"took longer than {self.limits.seconds:g} s"))
        except ClientDisconnect:
            response = self._refused(Refusal(400, "disconnect", "the client is gone"))
        except Refusal as refusal:
            response = self._refused(refusal)
        finally:
            self._n_open -= 1
        self.metrics.requests.labels(response.status_code).inc()
        self.metrics.latency.observe(time.perf_counter() - begin)
        return response

    def _watched(self, request: Request) -> Response:
        if request.url.path == "/metrics":
            return Response(generate_latest(self.metrics.registry), media_type=PROMETHEUS_TEXT)
        if self.session.closed is not None:
            return Answer({"error": self.session.closed}, 503)
        return Answer({"status": "ok"})

    def _refused(self, refusal: Refusal) -> Response:
        self.metrics.errors.labels(refusal.kind).inc()
        headers = {"Retry-After": "1"} if refusal.status == 503 else None
        return Answer({"error": str(refusal)}, refusal.status, headers)

    async def _answer(self, request: Request) -> dict[str, Any]:
        if request.url.path != "/":
            raise Refusal(404, "request", f"there is no {request.url.path}; POST an image to /")
        if request.method != "POST":
            raise Refusal(405, "request", f"{request.method}: POST an image")
        top_k = self._top_k(request)
        body = await self._body(request)
        if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            return await self._classified(body, top_k)
        answers = await asyncio.gather(
            *(self._classified(image, top_k) for image in self._images(body)), return_exceptions=True
        )
        return {"results": [self._entry(answer) for answer in answers]}

    def _entry(self, answer: dict | BaseException) -> dict[str, Any]:
        if isinstance(answer, Refusal):
            self.metrics.errors.labels(answer.kind).inc()
            return {"error": str(answer)}
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _top_k(self, request: Request) -> int:
        text = request.query_params.get("top_k", str(self.limits.top_k))
        top_k = whole_number(text)
        if top_k is None or not 1 <= top_k < 10**MOST_DIGITS:
            raise Refusal(400, "request", f"top_k: expected a positive integer, got {shortened(text)}")
        return top_k

    async def _body(self, request: Request) -> bytes:
        limit = self.limits.body_bytes
        too_large = Refusal(413, "body", f"the body is larger than {limit} bytes")
        declared = whole_number(request.headers.get("content-length", ""))
        if declared is not None and declared > limit:
            raise too_large
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise too_large
        return bytes(body)

    def _images(self, body: bytes) -> list[bytes]:
        try:
            encoded = json.loads(body)["images"]
            if not isinstance(encoded, list) or len(encoded) == 0:
                raise ValueError("no list of images")
            images = [base64.b64decode(text, validate=True) for text in encoded]
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise Refusal(400, "request", f'expected {{"images": [base64, ...]}}: {error}') from error
        if len(images) > self.limits.images:
            raise Refusal(413, "body", f"{len(images)} images in one request, at most {self.limits.images} are allowed")
        return images

    async def _classified(self, image: bytes, top_k: int) -> dict[str, Any]:
        try:
            width, height = encoded_size(image)
        except ImageError as error:
            raise Refusal(422, "image", str(error)) from error
        if width * height > self.limits.image_pixels:
            limit = self.limits.image_pixels
            raise Refusal(422, "pixels", f"the image has {width}x{height} pixels, at most {limit} are allowed")
        if len(self.session) >= self.limits.waiting:
            raise Refusal(503, "overload", f"{self.limits.waiting} images are waiting; try again")
        try:
            result: Result = await asyncio.wrap_future(self.session.submit(image))
        except asyncio.CancelledError:
            raise
        except Exception as error:  # the error that ended the pipeline, of any type
            raise Refusal(503, "pipeline", str(error)) from error
        if result.error is not None:
            raise Refusal(422, "image", result.reason)
        return {
            "predictions": result.top(top_k),
            "grid": result.grid,
            "tokens": result.n_tokens,
            "ms": round(result.ms, 3),
        }


def make_app(
    make_pipe: Callable[[], AdaptivePipeline], limits: Limits = Limits(), *, threads: int | None = None
) -> Any:
    """Makes the Ray Serve application, for `ray.serve.run`.

    One replica uses all its threads and receives all requests, so that batches fill and `/metrics` describes the whole
    service. For more machines, run one service on each behind a load balancer.

    Args:
        make_pipe: makes the pipeline in the replica, so that no weights travel through Ray's control plane.
        limits: limits of requests.
        threads: compute threads of the replica; by default all of this machine.
    """
    from ray import serve

    threads = threads or os.cpu_count() or 1

    # Requests beyond `limits.waiting` must reach the service, which refuses them.
    @serve.deployment(
        name="revit-fast",
        num_replicas=1,
        max_ongoing_requests=2 * limits.waiting,
        ray_actor_options={"num_cpus": 1, "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(threads)}}},
    )
    class Replica:
        def __init__(self, make_pipe: Callable[[], AdaptivePipeline], limits: Limits) -> None:
            warnings.filterwarnings("ignore", module="PIL")  # unusual files are the client's concern
            torch.set_num_threads(threads)
            self.service = Service(make_pipe(), limits)

        async def __call__(self, request: Request) -> Response:
            return await self.service(request)

        async def drain(self) -> None:
            await self.service.drain()

        def check_health(self) -> None:
            """Raises an error if the pipeline has failed; Ray Serve then restarts the replica."""
            if self.service.session.closed is not None:
                raise RuntimeError(self.service.session.closed)

        def __del__(self) -> None:
            if hasattr(self, "service"):
                self.service.close()

    return Replica.bind(make_pipe, limits)


def run(
    make_pipe: Callable[[], AdaptivePipeline],
    limits: Limits = Limits(),
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    threads: int | None = None,
    on_ready: Callable[[], None] = lambda: None,
) -> None:
    """Serves on a Ray instance of this machine until SIGINT or SIGTERM, then answers all received requests and stops.

    Args:
        make_pipe: see `make_app`.
        limits: limits of requests.
        host: address to listen on.
        port: port to listen on.
        threads: compute threads of the replica.
        on_ready: called when the service is ready for requests.
    """
    import ray
    from ray import serve

    handle = None
    try:
        ray.init("local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # SIGTERM acts like Ctrl-C (SIGINT)
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": host, "port": port},
            logging_config={"enable_access_log": False, "log_level": "WARNING"},
        )
        handle = serve.run(make_app(make_pipe, limits, threads=threads), name="revit-fast", route_prefix="/")
        on_ready()
        signal.pause()
    except KeyboardInterrupt:
        for one in (signal.SIGINT, signal.SIGTERM):
            signal.signal(one, signal.SIG_IGN)  # a second Ctrl-C would leave Ray's processes behind
        if handle is not None:
            # Ray Serve's own shutdown drops the connections of unfinished requests.
            with suppress(TimeoutError):
                handle.drain.remote().result(timeout_s=limits.seconds)
            time.sleep(DELIVERY_S)
    finally:
        ray.shutdown()  # this function started Ray; Ray Serve ends with it
