"""Fast Vision Transformers on images that need different numbers of tokens: one packed forward pass."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from revit_fast import _importing
from revit_fast.version import __version__

if TYPE_CHECKING:
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

_HOMES = {
    "AdaptivePipeline": "streaming.pipeline",
    "AdaptivePreprocessor": "adaptive.preprocess",
    "PackedBatch": "packing",
    "ReViT": "models.vit",
    "TokenLengthAssigner": "adaptive.assigner",
    "aspect_grid": "adaptive.crops",
    "create_model": "models.create",
    "load": "streaming.bundle",
    "optimize": "inference.optimize",
    "pipeline": "streaming.pipeline",
    "save_bundle": "streaming.bundle",
    "set_attention_backend": "ops._backends",
}
"""The module of each public name, loaded on first use: `--help` on the command line does not load torch."""


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        return value
    module = None if name.startswith("__") else _importing.submodule(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return module


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_importing.set_up()
