"""The HTTP service on Ray Serve: as an application for a cluster of one's own, and as a whole server on one machine.

`service` says what requests are answered, `classifier` who classifies, and `server` how connections are kept in bounds.

Needs `pip install "revit-fast[serve]"`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from starlette.requests import Request
from starlette.responses import Response

from revit_fast.deploy.classifier import DEFAULT_LIMITS, Limits, Refusal, RemoteClassifier
from revit_fast.deploy.server import Server, listening_socket
from revit_fast.deploy.service import Service
from revit_fast.streaming.pipeline import AdaptivePipeline


def make_app(
    make_pipe: Callable[[], AdaptivePipeline],
    limits: Limits = DEFAULT_LIMITS,
    *,
    threads: int | None = None,
    gpus: int = 0,
) -> Any:
    """Makes the Ray Serve application, for `ray.serve.run`.

    One replica uses all its threads and receives all requests, so that batches fill and `/metrics` describes the whole
    service. For more machines, run one service on each behind a load balancer.

    Args:
        make_pipe: makes the pipeline in the replica, so that no weights travel through Ray's control plane.
        limits: limits of requests.
        threads: compute threads of the replica; by default all of this machine.
        gpus: 1 if the pipeline runs on "cuda": Ray hides the GPUs from a replica that asks for none.
    """
    from ray import serve

    threads = threads or os.cpu_count() or 1

    # Requests beyond `limits.waiting` must reach the service, which refuses them.
    @serve.deployment(
        name="revit-fast",
        num_replicas=1,
        max_ongoing_requests=2 * limits.waiting,
        ray_actor_options={
            "num_cpus": 1,
            "num_gpus": gpus,
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(threads)}},
        },
    )
    class Replica:
        def __init__(self, make_pipe: Callable[[], AdaptivePipeline], limits: Limits) -> None:
            warnings.filterwarnings("ignore", module="PIL")  # unusual files are the client's concern
            torch.set_num_threads(threads)
            self.service = Service(warmed(make_pipe()), limits)

        async def __call__(self, request: Request) -> Response:
            """Answers a request that came through a proxy of Ray Serve."""
            return await self.service(request)

        async def classify(self, image: bytes, top_k: int) -> dict[str, Any] | Refusal:
            """Returns a refusal: Ray would log a raised one as an error of the replica."""
            try:
                return await self.service.classifier.classify(image, top_k)
            except Refusal as refusal:
                return refusal

        async def failure(self) -> str | None:
            return await self.service.classifier.failure()

        async def metrics_text(self) -> bytes:
            return await self.service.classifier.metrics_text()

        async def check_health(self) -> None:
            """Raises an error if the pipeline has failed; Ray Serve then restarts the replica."""
            reason = await self.failure()
            if reason is not None:
                raise RuntimeError(reason)

        async def __del__(self) -> None:
            if hasattr(self, "service"):
                await self.service.drain()

    return Replica.bind(make_pipe, limits)


def warmed(pipe: AdaptivePipeline) -> AdaptivePipeline:
    """The pipeline after an image at every length: the first call packs weights, and the first client would wait."""
    blank = np.zeros((pipe.model.patch_size, pipe.model.patch_size, 3), np.uint8)
    for one in (pipe, *(pipe.with_policy(("fixed", grid)) for grid in pipe.prep.grids)):
        list(one([blank]))
    return pipe


def run(
    make_pipe: Callable[[], AdaptivePipeline],
    limits: Limits = DEFAULT_LIMITS,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    threads: int | None = None,
    gpus: int = 0,
    on_ready: Callable[[int], None] = lambda port: None,
    verbose: bool = False,
) -> None:
    """Serves on a Ray instance of this machine until SIGINT or SIGTERM, then as `server.Server` says.

    The server runs in this process, the model in a replica of Ray Serve, which is restarted if it fails.

    Args:
        make_pipe: see `make_app`.
        limits: limits of requests.
        host: address to listen on.
        port: port to listen on; 0 takes a free one.
        threads: compute threads of the replica.
        gpus: see `make_app`.
        on_ready: called with the port when the service is ready for requests.
        verbose: whether the logs of Ray and of the replica are printed; errors always are.
    """
    import ray
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.INFO if verbose else logging.ERROR)  # its import has set INFO
    listening = listening_socket(host, port)
    port = listening.getsockname()[1]
    try:
        ray.init("local", include_dashboard=False, log_to_driver=verbose, logging_level="INFO" if verbose else "ERROR")
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # until the server runs, as Ctrl-C
        serve.start(
            proxy_location="Disabled",  # it would bound neither heads nor connections
            http_options={"host": host, "port": port},  # only for Ray's messages, then
            logging_config={"enable_access_log": False, "log_level": "INFO" if verbose else "WARNING"},
        )
        handle = serve.run(make_app(make_pipe, limits, threads=threads, gpus=gpus), name="revit-fast", route_prefix="/")
        server = Server(Service(RemoteClassifier(handle), limits), lambda: on_ready(port))
        asyncio.run(server.serve([listening]))
    except KeyboardInterrupt:
        pass
    finally:
        for one in (signal.SIGINT, signal.SIGTERM):
            signal.signal(one, signal.SIG_IGN)  # a further Ctrl-C would leave Ray's processes behind
        listening.close()
        ray.shutdown()  # this function started Ray; Ray Serve ends with it
