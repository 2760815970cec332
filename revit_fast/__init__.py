"""Fast Vision Transformers on images that need different numbers of tokens: one packed forward pass."""

from revit_fast import flash_attn_compat, ops
from revit_fast.adaptive.assigner import TokenLengthAssigner
from revit_fast.adaptive.crops import aspect_grid
from revit_fast.adaptive.preprocess import AdaptivePreprocessor
from revit_fast.inference.optimize import optimize
from revit_fast.models.create import create_model
from revit_fast.models.vit import ReViT
from revit_fast.ops._backends import set_attention_backend
from revit_fast.packing import PackedBatch
from revit_fast.streaming.bundle import load, save_bundle
from revit_fast.streaming.pipeline import AdaptivePipeline, pipeline
from revit_fast.version import __version__

__all__ = [
    "AdaptivePipeline",
    "AdaptivePreprocessor",
    "PackedBatch",
    "ReViT",
    "TokenLengthAssigner",
    "__version__",
    "aspect_grid",
    "create_model",
    "flash_attn_compat",
    "load",
    "ops",
    "optimize",
    "pipeline",
    "save_bundle",
    "set_attention_backend",
]
