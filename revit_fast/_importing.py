"""Set-up when the package is imported: modules under their old names, and the operators once torch is imported."""

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
    "model": ("models.vit", "models.create", "models.inputs", "models.timm_api"),
    "page": ("explain.page",),
    "parts": ("deploy.results_folder",),
    "pipeline": ("streaming.pipeline", "streaming.results", "streaming.session"),
    "policies": ("adaptive.policies",),
    "positions": ("layers.positions",),
    "preprocess": ("adaptive.preprocess", "adaptive.crops", "models.settings"),
    "programs": ("deploy.programs",),
    "ray_engine": ("deploy.ray_dataset",),
    "serve": ("deploy.http", "deploy.service", "deploy.classifier"),
    "snapshot": ("layers.derived",),
    "stem": ("layers.conv_stem",),
    "timm_import": ("models.from_timm",),
    "tla": ("adaptive.assigner", "adaptive.network"),
    "trace": ("io.trace",),
    "transformers_import": ("models.from_transformers",),
}
"""Modules up to 0.1 and where their content is now. Pickles contain module names, so old ones need this table."""


class _Moved(ModuleType):
    """A module under its old name. Its attributes come from the modules that hold its content now."""

    def __init__(self, name: str, homes: tuple[str, ...]) -> None:
        super().__init__(f"{PACKAGE}.{name}", f"The old name of {', '.join(f'{PACKAGE}.{home}' for home in homes)}.")
        self.__dict__["_homes"] = homes

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("__"):  # tools read dunder names of all modules: no loading then
            for home in self._homes:
                module = import_module(f"{PACKAGE}.{home}")
                if hasattr(module, name):
                    return getattr(module, name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        homes = " or ".join(f"{PACKAGE}.{home}" for home in self._homes)
        raise AttributeError(f"{self.__name__} is an old name and holds nothing itself; set {name!r} in {homes}")


class _OperatorsWithTorch(MetaPathFinder, Loader):
    """Registers the operators when torch is imported after this package, so that they need no other import."""

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
        # A module of the package that imports torch imports the operators itself if it needs them.
        if not _is_importing():
            import_module(f"{PACKAGE}.ops")


def _is_importing() -> bool:
    """Whether the import of any module of the package is in progress."""
    modules = [module for name, module in sys.modules.items() if name.startswith(f"{PACKAGE}.")]
    return any(getattr(module.__spec__, "_initializing", False) for module in modules)


def set_up() -> None:
    """Registers the old module names and arranges the import of the operators. The package calls it once."""
    sys.modules.update({f"{PACKAGE}.{name}": _Moved(name, homes) for name, homes in MOVED.items()})
    for variable, module in (("REVIT_FAST_MALLOC", "io.memory"), ("REVIT_FAST_ISA", "ops")):
        if os.environ.get(variable):
            import_module(f"{PACKAGE}.{module}")  # obeys the variable, or refuses its value
    if "torch" in sys.modules:
        import_module(f"{PACKAGE}.ops")
    else:
        sys.meta_path.insert(0, _OperatorsWithTorch())


def submodule(name: str) -> ModuleType | None:
    """The module of the package with this current or old name, imported if necessary; None if there is none."""
    if name in MOVED:
        return sys.modules[f"{PACKAGE}.{name}"]
    found = PathFinder.find_spec(f"{PACKAGE}.{name}", sys.modules[PACKAGE].__path__)
    return None if found is None else import_module(f"{PACKAGE}.{name}")
