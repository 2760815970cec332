"""Clips: TimeSformer on packed frames of several grids and frame counts."""

from revit_fast.video.clips import PackedClips
from revit_fast.video.engine import optimize
from revit_fast.video.model import TimeSformer

__all__ = ["PackedClips", "TimeSformer", "optimize"]
