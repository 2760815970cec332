"""Clips: TimeSformer on packed frames of several grids and frame counts."""

from revit_fast.video.checkpoints import read_folder, save_folder
from revit_fast.video.clips import PackedClips
from revit_fast.video.engine import optimize
from revit_fast.video.model import TimeSformer
from revit_fast.video.pipeline import ClipPipeline, ClipPreprocessor, pipeline
from revit_fast.video.reader import ClipError, read_clip

__all__ = [
    "ClipError",
    "ClipPipeline",
    "ClipPreprocessor",
    "PackedClips",
    "TimeSformer",
    "optimize",
    "pipeline",
    "read_clip",
    "read_folder",
    "save_folder",
]
