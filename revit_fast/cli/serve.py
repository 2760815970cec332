"""`revit-fast serve`: serves a model over HTTP."""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from importlib import import_module

from revit_fast.cli.arguments import check_free
from revit_fast.cli.pipelines import build_pipeline, warn_of_random_weights
from revit_fast.io.formats import SERVED

VISIBLE = "CUDA_VISIBLE_DEVICES"


def run(args: argparse.Namespace) -> int:
    """Runs `revit-fast serve` until SIGINT or SIGTERM; returns 0."""
    serve = import_module("revit_fast.deploy.http")  # if a package is missing, main says what to install
    import_module("ray.serve")
    check_free(args.host, args.port)
    make_pipe = partial(build_pipeline, args, args.max_wait_ms / 1e3)
    make_pipe()  # wrong arguments are reported here, not in the log of another process
    warn_of_random_weights(args)
    limits = serve.Limits(
        body_bytes=args.max_body_mb << 20,
        formats=args.formats or SERVED,
        image_pixels=args.max_megapixels * 1_000_000,
        seconds=args.max_seconds,
        waiting=args.max_waiting,
        top_k=args.top_k,
    )

    def say(port: int) -> None:
        url = f"http://{args.host}:{port}"
        print(f"listening on {url}; {url}/docs is a page to try it; Ctrl-C stops it", file=sys.stderr, flush=True)

    options = {"host": args.host, "port": args.port, "threads": args.threads, "verbose": args.verbose}
    serve.run(make_pipe, limits, gpus=see_one_gpu(args), on_ready=say, **options)
    print("stopped", file=sys.stderr, flush=True)
    return 0


def see_one_gpu(args: argparse.Namespace) -> int:
    """Leaves the processes that start from now on the GPU of --device alone, as "cuda"; returns how many they see."""
    name, _, index = args.device.partition(":")
    if name == "cpu":
        return 0
    seen = os.environ.get(VISIBLE, "").split(",")
    os.environ[VISIBLE] = seen[int(index or 0)] if seen[0] else index or "0"
    args.device = name
    return 1
