"""PyTorch's modes: what computes as if none were set, and those that would write programs of one example."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch


def without_autocast(device: torch.device | str = "cpu") -> AbstractContextManager:
    """Lets tensors on `device` be multiplied in their own precision, also under `torch.autocast`."""
    kind = torch.device(device).type
    enabled = kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if enabled else nullcontext()


@contextmanager
def own_modes() -> Iterator[None]:
    """Computes as if the caller had set no mode: tensors may be kept, they have no gradient, and autocast is off."""
    with torch.inference_mode(False), torch.no_grad(), without_autocast("cpu"), without_autocast("cuda"):
        yield


@contextmanager
def as_saved() -> Iterator[None]:
    """Makes modules that are filled from files or trained: on the CPU, and outside inference mode.

    On another default device, perhaps `meta`, they would get no values. In inference mode changes would leave no trace.
    """
    elsewhere = torch.get_default_device().type != "cpu"  # the mode costs a little in every call of PyTorch
    with torch.inference_mode(False), torch.device("cpu") if elsewhere else nullcontext():
        yield


def refuse_examples(what: str) -> None:
    """Raises an error in `torch.jit.trace` and `torch.onnx.export`: their programs would keep the example's lengths.

    Args:
        what: the model or op, for the message.

    Raises:
        NotImplementedError: there; it says what to use.
    """
    tracing = torch.jit.is_tracing()
    if (tracing or torch.compiler.is_exporting()) and _writes_onnx():
        raise NotImplementedError(
            f"{what}: torch.onnx.export has no ONNX for the package's ops; for a ReViT use revit_fast.deploy.export: "
            "write_single_onnx(model, grid, path, model_settings(model)), or write_adaptive_onnx(bundle, folder)"
        )
    if tracing:
        raise NotImplementedError(f"{what}: torch.jit.trace would keep the lengths of its example; {EXPORT}")


def _writes_onnx() -> bool:
    return "torch.onnx._internal.exporter" in sys.modules and torch.onnx.is_in_onnx_export()


# As torch.compiler.assume_constant_result does, which would import the compiler together with this module.
_writes_onnx._dynamo_marked_constant = True

EXPORT = (
    "for a ReViT use revit_fast.deploy.export: export_packed(model) for packs of any mix of grids, "
    "export_single(model, grid) for images of one grid; other models run from Python"
)
"""What to use in place of TorchScript."""


class NotScriptable:
    """A module that `torch.jit.script` cannot compile.

    Attributes:
        instead_of_script: what to use.
    """

    instead_of_script = EXPORT

    def __prepare_scriptable__(self) -> None:  # torch.jit.script calls it
        name = type(self).__name__
        raise NotImplementedError(f"{name}: torch.jit.script cannot compile it; {self.instead_of_script}")
