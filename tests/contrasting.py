"""Photos, an assigner that tells them apart, and a pipeline of both, for the tests of what shows decisions."""

import functools

import numpy as np
import torch
from PIL import Image
from small_models import GRIDS, make_model

import revit_fast as rf
from revit_fast.adaptive.assigner import TokenLengthAssigner
from revit_fast.adaptive.preprocess import AdaptivePreprocessor
from revit_fast.streaming.pipeline import AdaptivePipeline

PATCH = 16


def photo(seed, height=60, width=80):
    """A smooth random image with a contrast of its own."""
    rng = np.random.default_rng(seed)
    coarse = (rng.integers(0, 256, (5, 5, 3)) * rng.uniform(0.1, 1)).astype(np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


@functools.cache
def assigner():
    """Calibrated on photos of other seeds than the tests'."""
    torch.manual_seed(0)
    made = TokenLengthAssigner(GRIDS, thumbnail_px=16, widths=(8, 16))
    with torch.no_grad():
        made.network.head.weight.mul_(20)  # so that images are told apart
    made.eval().calibrate([photo(seed) for seed in range(100, 140)])
    return made


@functools.cache
def pipe_of(policy="argmax"):
    """A pipeline of small models of 40 classes."""
    model = rf.optimize(make_model(patch_size=PATCH))
    prep = AdaptivePreprocessor.for_model(model, assigner(), policy=policy)
    return AdaptivePipeline(model, prep, labels=[f"class {i}" for i in range(40)])


def spied_texts(monkeypatch):
    """A list that gets, for every part of a PNG sheet that is drawn (the header first), its lines of text.

    Each is a tuple of the text and its extent, (left, lower, right, upper) in pixels.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    drawn, draw = [], FigureCanvasAgg.draw

    def spy(canvas):
        draw(canvas)
        (axes,) = canvas.figure.axes
        drawn.append([(text.get_text(), text.get_window_extent().extents) for text in axes.texts])

    monkeypatch.setattr(FigureCanvasAgg, "draw", spy)
    return drawn
