"""What importing the package sets up: modules under their old names, and the operators as soon as torch is there."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from types import ModuleType
from typing import Any

PACKAGE = __package__

MOVED = {
    "atomic": ("io.atomic",),
    "batching": ("streaming.batching",),
    "bundle": ("streaming.bundle", "models.hub", "models.folder"),
    "checkpoint": ("models.weights",),
    "costs": ("models.macs",),
    "decoding": ("streaming.decoding",),
    "engine": ("inference.optimize",),
    "export": ("deploy.export",),
    "fused": ("inference.cpu",),
    "graphs": ("inference.cuda_graphs",),
    "hub": ("models.hub",),
    "images": ("io.images",),
    "inference_copy": ("inference.inference_copy",),
    "lvvit": ("models.lvvit",),
    "memory": ("io.memory",),
    "model": ("models.vit", "models.create"),
    "page": ("explain.page",),
    "parts": ("deploy.results_folder",),
    "pipeline": ("streaming.pipeline", "streaming.results", "streaming.session"),
    "policies": ("adaptive.policies",),
    "positions": ("layers.positions",),
    "preprocess": ("adaptive.preprocess", "adaptive.crops", "models.settings"),
    "programs": ("deploy.programs",),
    "ray_engine": ("deploy.ray_dataset",),
    "serve": ("deploy.http",),
    "snapshot": ("inference.snapshot",),
    "stem": ("layers.conv_stem",),
    "timm_import": ("models.from_timm",),
    "tla": ("adaptive.assigner", "adaptive.network"),
    "trace": ("io.trace",),
    "transformers_import": ("models.from_transformers",),
}
"""Modules up to 0.1 and where their content is now. Pickles name modules: what was pickled then loads by this table."""


class _Moved(ModuleType):
    """A module under its old name; what is asked of it comes from the modules that hold its content now."""

    def __init__(self, name: str, homes: tuple[str, ...]) -> None:
        super().__init__(f"{PACKAGE}.{name}", f"The old name of {', '.join(f'{PACKAGE}.{home}' for home in homes)}.")
        self.__dict__["_homes"] = homes

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("__"):  # those are asked of every module of the process, and must not load these
            for home in self._homes:
                module = import_module(f"{PACKAGE}.{home}")
                if hasattr(module, name):
                    return getattr(module, name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        homes = " or ".join(f"{PACKAGE}.{home}" for home in self._homes)
        raise AttributeError(f"{self.__name__} is an old name and holds nothing itself; set {name!r} in {homes}")


class _OperatorsWithTorch(MetaPathFinder, Loader):
    """Registers the operators when torch is imported after this package: no other import is needed for them."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None:
            self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        if (
            not _is_importing()
        ):  # a module of the package that imports torch imports the operators itself if it needs them
            import_module(f"{PACKAGE}.ops")


def _is_importing() -> bool:
    """Whether an import of a module of the package has begun and has not ended."""
    modules = [module for name, module in sys.modules.items() if name.startswith(f"{PACKAGE}.")]
    return any(getattr(module.__spec__, "_initializing", False) for module in modules)


def set_up() -> None:
    """Called once, by the package."""
    sys.modules.update({f"{PACKAGE}.{name}": _Moved(name, homes) for name, homes in MOVED.items()})
    for variable, module in (("REVIT_FAST_MALLOC", "io.memory"), ("REVIT_FAST_ISA", "ops")):
        if os.environ.get(variable):
            import_module(f"{PACKAGE}.{module}")  # obeys the variable, or refuses its value
    if "torch" in sys.modules:
        import_module(f"{PACKAGE}.ops")
    else:
        sys.meta_path.insert(0, _OperatorsWithTorch())


def submodule(name: str) -> ModuleType | None:
    """A module of the package by its present or its old name, loaded where it is not yet."""
    if name in MOVED:
        return sys.modules[f"{PACKAGE}.{name}"]
    found = PathFinder.find_spec(f"{PACKAGE}.{name}", sys.modules[PACKAGE].__path__)
    return None if found is None else import_module(f"{PACKAGE}.{name}")
