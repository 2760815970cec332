"""`revit-fast demo`: a page in the browser that shows which grids images get."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import suppress
from threading import Event

import numpy as np

from revit_fast.cli.arguments import UsageError, check_free
from revit_fast.cli.pipelines import build_pipeline, has_weights, ignore_pillow_warnings, warn_of_random_weights
from revit_fast.explain import page
from revit_fast.io.names import on_one_line
from revit_fast.models.hub import SHIPPED, shipped_names
from revit_fast.streaming.pipeline import AdaptivePipeline
from revit_fast.train.datasets import open_images

N_SAMPLES = 12


def run(args: argparse.Namespace) -> int:
    """Runs `revit-fast demo` until SIGINT; returns 0."""
    page.import_gradio()  # if it is missing, main says what to install
    if os.environ.get("GRADIO_SHARE", "").lower() == "true":
        raise UsageError("GRADIO_SHARE: this page is for this machine alone and never shared; unset it")
    check_free(page.HOST, args.port, "--port")
    ignore_pillow_warnings()
    pipe = build_pipeline(args)
    try:
        budget = page.first_budget(pipe)
    except ValueError as error:
        raise UsageError(f"--assigner: {error}") from error
    warn_of_random_weights(args, "the page shows no classes")
    served = page.served(
        pipe,
        args.port,
        budget=budget,
        about=described(args.model, pipe),
        samples=samples_of(args.model, pipe),
        top_k=args.top_k if has_weights(args) else 0,
        open_browser=args.browser,
    )
    with served as address, suppress(KeyboardInterrupt):
        print(f"the page is at {address} until Ctrl-C", file=sys.stderr, flush=True)
        Event().wait()
    return 0


def described(name: str, pipe: AdaptivePipeline) -> str:
    """A line of Markdown that describes the model."""
    grids = ", ".join(f"{g} × {g}" for g in pipe.model.grids)
    text = f"Model `{name}`, {grids} patches of {pipe.model.patch_size} px"
    if pipe.classes is None:
        return f"{text}, {pipe.model.num_classes} classes."
    names = ", ".join(map(on_one_line, pipe.classes[:12])) + (", …" if len(pipe.classes) > 12 else "")
    return f"{text}. It knows: {names}."


def samples_of(name: str, pipe: AdaptivePipeline) -> dict[str, np.ndarray]:
    """The first of the test images that are stored beside a shipped model; none for other models."""
    folder = SHIPPED / name / "images"
    if name not in shipped_names() or not folder.is_dir():
        return {}
    images = open_images(folder, "test", pipe.classes)
    return {f"{i}: {images.classes[images.labels[i]]}": images.image(i) for i in range(min(N_SAMPLES, len(images)))}
