"""Writes models as files for other runtimes: `torch.export`, AOTInductor packages that run without Python, and ONNX.

A model can be exported as two programs. The *packed* program takes the patch rows of any number of images at any mix of
grids. It needs the package's operators: `import revit_fast` in Python, elsewhere `dlopen` of `revit_fast/_C.so`, which
is a plain library over libtorch. The *single* program takes images of one size and uses only PyTorch's own operators.

| file | from | needs |
| --- | --- | --- |
| `.pt2` of `save_program` | either program | Python and torch; a packed program also revit_fast |
| `.pt2` of `compile_package` | either program | libtorch; a packed program also `_C.so` |
| `.onnx` | single program, assigner | an ONNX runtime |

Every file contains its settings, see `model_settings` and `assigner_settings`.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from revit_fast.adaptive.assigner import TokenLengthAssigner
from revit_fast.adaptive.policies import PolicySpec, make_policy
from revit_fast.deploy.programs import AssignerProgram, DenseProgram, FixedProgram, make_packed
from revit_fast.io.atomic import is_hidden, replaced, replaced_folder
from revit_fast.io.names import dumps
from revit_fast.kernels.constants import N_CLASSES
from revit_fast.layers.conv_stem import ConvStem
from revit_fast.models.macs import forward_macs
from revit_fast.models.settings import input_settings
from revit_fast.models.vit import ReViT
from revit_fast.ops._modes import own_modes
from revit_fast.streaming.bundle import Bundle

OPSET = 20
"""Operator set version of the ONNX files."""

SETTINGS = "revit_fast.json"
"""Name of the extra file with the settings, for `torch.export.load`."""

ONNX_BYTES = 3 << 29
"""Largest size, in bytes, of the weights in one ONNX file; protobuf files are limited to 2 GiB."""

Grid = int | tuple[int, int]


def export_packed(
    model: ReViT, grids: Iterable[Grid] | None = None, *, mix: Sequence[Grid] | None = None
) -> ExportedProgram:
    """Exports the forward pass over a pack, for any number of images and tokens, or for one mix of grids.

    Call it as `program.module()(batch.data, batch.grid_hw)` with the tensors of a `PackedBatch` or similar ones:
    normalised rows `[T, P*P*3]` in the model's dtype, where T is exactly the number of patches of all images, and int32
    `[B, 2]`, the rows and columns of patches of each image, with B at least 1. With `mix` the rows are the only
    argument. The logits equal those of `model` bit for bit.

    An optimised copy (`optimize`) is exported as its single fused op, with weights packed for the instruction set in
    use. With another instruction set the op raises an error that names the weight. A copy made with
    `engine="modules"` is exported as its model is; the logits then equal the copy's up to rounding.

    Args:
        model: the model, in evaluation mode on the CPU.
        grids: possible grids of images, as sides or (rows, columns); by default the model's. Any other grid is an error
            at run time.
        mix: the grids of a fixed pack, in its order.

    Raises:
        TypeError, ValueError: if the model is not as above, or a grid is not valid.
    """
    _check_model(model)
    mix = None if mix is None else _pairs(mix, "mix")
    grids = mix or _pairs(model.grids if grids is None else grids, "grids")
    program = make_packed(model, dict.fromkeys(grids)).eval()
    # The example has two images, because a compiler treats a size of one as a constant.
    example = mix or (grids[0], grids[-1])
    rows = torch.zeros(
        sum(h * w for h, w in example),
        model.patch_size**2 * model.in_chans,
        dtype=model.pos_embed.dtype,
        device="cpu",
    )
    if mix is not None:
        return _traced(FixedProgram(program, mix), (rows,), None)
    grid_hw = torch.tensor(example, dtype=torch.int32, device="cpu")
    return _traced(program, (rows, grid_hw), ({0: Dim("rows", min=1)}, {0: Dim("images", min=1)}))


def export_single(model: ReViT, grid: Grid) -> ExportedProgram:
    """Exports the forward pass over images of one grid in PyTorch's own operators; the number of images is dynamic.

    Call it as `program.module()(images)` with normalised images `[B, 3, rows * P, columns * P]` in the model's dtype.
    The logits equal the model's up to rounding.

    Args:
        model: the model, in evaluation mode on the CPU.
        grid: patches per side, or (rows, columns).

    Raises:
        TypeError, ValueError: if the model is not as above, or the grid is not valid.
    """
    _check_model(model)
    ((height, width),) = _pairs([grid], "grid")
    sides = (height * model.patch_size, width * model.patch_size)
    images = torch.zeros(2, model.in_chans, *sides, dtype=model.pos_embed.dtype, device="cpu")
    return _traced(DenseProgram(model, (height, width)), (images,), ({0: Dim("images", min=1)},))


def export_assigner(tla: TokenLengthAssigner) -> ExportedProgram:
    """Exports an assigner: probabilities `[B, n_lengths]`, longest first, of normalised thumbnails `[B, 3, S, S]`."""
    if tla.training:
        raise ValueError("tla: the assigner is in training mode; call .eval()")
    dtype = next(tla.parameters()).dtype
    thumbnails = torch.zeros(2, 3, tla.thumbnail_px, tla.thumbnail_px, dtype=dtype, device="cpu")
    return _traced(AssignerProgram(tla), (thumbnails,), ({0: Dim("images", min=1)},))


def model_settings(model: ReViT, classes: Sequence[str] | None = None) -> dict[str, Any]:
    """The settings that a program's caller needs, as JSON values: grids, patch size, preprocessing, names of classes.

    Args:
        model: the model.
        classes: a name for each class; None if they have none.
    """
    own = input_settings(model)
    return {
        "grids": list(model.grids),
        "patch_size": model.patch_size,
        "mean": list(map(float, own["mean"])),
        "std": list(map(float, own["std"])),
        "crop_pct": own["crop_pct"],
        "interpolation": own["interpolation"],
        "classes": None if classes is None else list(classes),
    }


def assigner_settings(
    tla: TokenLengthAssigner, policy: PolicySpec = "argmax", macs: Sequence[float] | None = None
) -> dict[str, Any]:
    """The settings that a caller of an exported assigner needs, as JSON values.

    Args:
        tla: the assigner.
        policy: the policy that chooses grids, see `policies.make_policy`.
        macs: multiply-adds of the model at each grid, for budgets of mean_gmacs.

    Returns:
        The settings. `threshold` is set for the policies threshold, budget and assigned-cascade: they choose the
        smallest grid whose P(label <= length), the sum of the probabilities from the longest length down to this grid,
        reaches it. `confidence` is set for cascade and assigned-cascade: the caller runs the next longer grid, until
        the model's largest class probability reaches it.
    """
    chosen = make_policy(policy, tla.grids, calibration=tla.calibration, macs=macs)
    return {
        "grids": list(tla.grids),
        "thumbnail_px": tla.thumbnail_px,
        "mean": list(tla.mean),
        "std": list(tla.std),
        "interpolation": "bilinear",
        "policy": policy,
        "threshold": chosen.threshold,
        "confidence": chosen.bound,
    }


def save_program(program: ExportedProgram, path: str | os.PathLike, settings: Mapping[str, Any]) -> None:
    """Writes a program for `torch.export.load`, completely or not at all.

    Its extra file `SETTINGS` contains the settings as JSON.
    """
    with replaced(_with_suffix(path, ".pt2")) as temporary, open(temporary, "wb") as file, warnings.catch_warnings():
        # The warning is about the embedding's weight in channels-last memory, which is saved and loaded in that order.
        warnings.filterwarnings("ignore", "No complete tensor found")
        torch.export.save(program, file, extra_files={SETTINGS: dumps(settings)})


def check_compiler() -> None:
    """Raises a RuntimeError if there is no C++ compiler for `compile_package`."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise RuntimeError(
            "AOTInductor needs a C++ compiler: install g++ or clang++, or name yours by the variable CXX"
        ) from error


def compile_package(program: ExportedProgram, path: str | os.PathLike, settings: Mapping[str, Any]) -> None:
    """Compiles a program with AOTInductor for this machine's processor and writes the package.

    The package is written completely or not at all. `torch._inductor.aoti_load_package` loads it or, without Python,
    `torch::inductor::AOTIModelPackageLoader`. Its metadata are the settings, each as JSON. It contains the weights.

    Raises:
        RuntimeError: if there is no C++ compiler.
    """
    import torch._inductor.config

    check_compiler()
    options: dict[str, Any] = {"aot_inductor.metadata": _as_text(settings)}
    if hasattr(torch._inductor.config.aot_inductor, "check_lowerbound"):
        # It would check for at least two images, only because the example has two; one image works as well.
        options["aot_inductor.check_lowerbound"] = False
    with replaced(_with_suffix(path, ".pt2")) as temporary, open(temporary, "wb+") as file:
        torch._inductor.aoti_compile_and_package(program, package_path=file, inductor_configs=options)


def write_onnx(
    program: ExportedProgram, path: str | os.PathLike, settings: Mapping[str, Any], *, inputs: str, outputs: str
) -> None:
    """Writes a program of PyTorch's own operators as ONNX, opset `OPSET`, in float32, completely or not at all.

    Args:
        program: a program of `export_single` or `export_assigner`.
        path: the `.onnx` file to write.
        settings: settings that become the metadata of the file, each as JSON.
        inputs: name of the input.
        outputs: name of the output.

    Raises:
        ModuleNotFoundError: if the package `onnx` or `onnxscript` is missing.
        ValueError: if the weights do not fit into one ONNX file.
    """
    n_bytes = sum(t.numel() * t.element_size() for t in program.state_dict.values())
    if n_bytes > ONNX_BYTES:
        raise ValueError(f"program: {n_bytes >> 20} MiB of weights, one ONNX file holds {ONNX_BYTES >> 20}")
    onnx_program = torch.onnx.export(
        program, dynamo=True, opset_version=OPSET, input_names=[inputs], output_names=[outputs], verbose=False
    )
    onnx_program.model.metadata_props.update(_as_text(settings))
    with replaced(_with_suffix(path, ".onnx")) as temporary:
        onnx_program.save(temporary)


def write_single_onnx(model: ReViT, grid: Grid, path: str | os.PathLike, settings: Mapping[str, Any]) -> None:
    """Writes the model at one grid as ONNX: from `images` `[B, 3, rows * P, columns * P]` to `logits`.

    Args:
        model: the model, in evaluation mode on the CPU. It is exported in float32, which every runtime supports.
        grid: patches per side, or (rows, columns).
        path: see `write_onnx`, also for the errors.
        settings: settings from `model_settings`; `grid` is added.
    """
    own = model if model.pos_embed.dtype == torch.float32 else copy.deepcopy(model).float()
    program = export_single(own, grid)
    write_onnx(program, path, {**settings, "grid": grid}, inputs="images", outputs="logits")


def write_adaptive_onnx(bundle: Bundle, folder: str | os.PathLike) -> None:
    """Writes a bundle as a folder of ONNX files: `grid-14.onnx` and so on, and `assigner.onnx`.

    A new folder appears when it is complete. In an existing one, each file is replaced once all new ones are complete,
    and ONNX files of other names go. The assigner maps `thumbnails` to `probabilities`; its metadata say how to choose
    a grid from them.

    Raises:
        ModuleNotFoundError, ValueError: see `write_onnx`; a ValueError also if the folder contains other files.
    """
    model, tla = bundle.model, bundle.tla
    old = list(Path(folder).iterdir()) if Path(folder).is_dir() else []
    if any(file.suffix != ".onnx" and not is_hidden(file) for file in old):
        raise ValueError(f"folder: {folder} holds other files; give a new folder: ONNX files of other names would go")
    settings = model_settings(model, bundle.classes or None)
    if tla is not None:  # first what may be refused, then the grids, which take long
        choice = assigner_settings(tla, bundle.policy, [forward_macs(model, n) for n in model.lengths])
        assigner = export_assigner(tla)
    with replaced_folder(folder, sorted(file.name for file in old if file.suffix == ".onnx")) as new:
        if tla is not None:
            write_onnx(assigner, new / "assigner.onnx", choice, inputs="thumbnails", outputs="probabilities")
        for grid in model.grids:
            write_single_onnx(model, grid, new / f"grid-{grid}.onnx", settings)


def _traced(module: nn.Module, example: tuple[Tensor, ...], dynamic: tuple | None) -> ExportedProgram:
    with own_modes():
        program = torch.export.export(module.eval(), example, dynamic_shapes=dynamic)
    for node in program.graph.nodes:
        # The runtime of a package turns an empty list into None. Zeros are safe: without tiles nobody reads them.
        if node.target is torch.ops.revit_fast.varlen_attention.default and not node.args[-1]:
            node.args = (*node.args[:-1], [0] * N_CLASSES)
    program.graph_module.recompile()
    return program


def _check_model(model: ReViT) -> None:
    if not isinstance(model, ReViT):
        raise TypeError(f"model: expected a revit_fast.ReViT, got {type(model).__name__}; use ReViT.from_timm(vit)")
    if model.training:
        raise ValueError("model: it is in training mode, and a program is for inference; call .eval()")
    if model.pos_embed.device.type != "cpu":
        raise ValueError(
            f"model: expected it on the CPU, got {model.pos_embed.device}; export a copy.deepcopy(model).cpu()"
        )
    for name, there in (
        ("a convolutional stem", isinstance(model.patch_embed, ConvStem)),
        ("a token-label head", model.aux_head is not None),
    ):
        if there:
            raise ValueError(f"model: it has {name} (LV-ViT), which is not exported; run it from Python")


def _pairs(grids: Iterable[Grid], name: str) -> list[tuple[int, int]]:
    """Grids as (rows, columns), after a check."""
    pairs = []
    for grid in grids:
        pair = (grid, grid) if isinstance(grid, int) else tuple(grid)
        if len(pair) != 2 or not all(isinstance(side, int) and side > 0 for side in pair):
            raise ValueError(f"{name}: expected positive ints or (rows, columns) such as 14 or (10, 12), got {grid!r}")
        pairs.append(pair)
    if not pairs:
        raise ValueError(f"{name}: expected at least one grid, got none")
    return pairs


def _with_suffix(path: str | os.PathLike, suffix: str) -> Path:
    """The path, after a check of its suffix, which loaders depend on."""
    if Path(path).suffix != suffix:
        raise ValueError(f"path: expected a name that ends in {suffix}, got {os.fspath(path)!r}")
    return Path(path)


def _as_text(settings: Mapping[str, Any]) -> dict[str, str]:
    return {name: dumps(value, ensure_ascii=False) for name, value in settings.items()}
