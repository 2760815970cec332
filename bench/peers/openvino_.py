"""OpenVINO on its CPU plugin, at its own choice of precision, in float32, and in int8 by NNCF."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from timm.models import VisionTransformer
from torch import Tensor

from bench.model_work import LONGEST, N_SETS, Case
from bench.peers.common import Peer, Run, fastest
from bench.peers.exported import (
    WithPositions,
    calibration_images,
    example_inputs,
    numpy_inputs,
    positions_of,
    quiet_export,
)
from bench.probe import has_vnni


@lru_cache(maxsize=1)
def openvino_core():
    """One for the process, never given up.

    Each OpenVINO core sets the alternate signal stack of the thread that first compiles with it, and sets the one
    before it when it goes: two that go in the order they came leave a freed stack behind, and the next signal of a
    handler on it (Python's all are) ends the process.
    """
    import openvino

    return openvino.Core()


@lru_cache(maxsize=1)
def openvino_model(vit: VisionTransformer):
    """The model with free batch, height and width."""
    import openvino

    images, positions = example_inputs(vit)
    shapes = [openvino.PartialShape([-1, 3, -1, -1]), openvino.PartialShape([1, -1, positions.shape[2]])]
    with quiet_export():
        return openvino.convert_model(WithPositions(vit), example_input=(images, positions), input=shapes)


def openvino_quantized(model, samples: Sequence[tuple[np.ndarray, ...]]):
    """A copy of a model in int8, by NNCF's post-training quantization for transformers.

    Activations get one scale for a tensor, weights one for a channel. NNCF smooths outliers of the activations.

    Args:
        model: the model in float32.
        samples: inputs to calibrate with, none of those that are measured.
    """
    import nncf

    # Without VNNI, OpenVINO adds products of 8 bits in 16, where they saturate: NNCF's remedy is weights of 7 bits, by
    # default in the first layer only.
    fix = nncf.OverflowFix.FIRST_LAYER if has_vnni() else nncf.OverflowFix.ENABLE
    with contextlib.redirect_stdout(sys.stderr):  # where its progress does not interrupt a table
        return nncf.quantize(
            model,
            nncf.Dataset(samples),
            subset_size=len(samples),
            model_type=nncf.ModelType.TRANSFORMER,
            advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=fix),
        )


@lru_cache(maxsize=1)
def openvino_int8_model(vit: VisionTransformer):
    """The quantized model with free batch, height and width, calibrated on images of all three lengths."""
    samples = [(images.numpy(), positions_of(vit, grid).numpy()) for grid, images in calibration_images(vit)]
    return openvino_quantized(openvino_model(vit), samples)


def openvino_full_length(vit: VisionTransformer, batch: int, calibration: Sequence[Tensor] | None = None):
    """A model for images `[batch, 3, side, side]` of the longest grid; compile it with `openvino_compiled`.

    Args:
        vit: the model.
        batch: images of a call.
        calibration: images `[1, 3, side, side]` to quantize it with; None for float32.
    """
    import openvino

    side = LONGEST * vit.patch_embed.patch_size[0]
    with quiet_export():
        model = openvino.convert_model(vit, example_input=torch.zeros(2, 3, side, side), input=[-1, 3, side, side])
    if calibration is not None:
        model = openvino_quantized(model, [(image.numpy(),) for image in calibration])
    model.reshape([batch, 3, side, side])
    return model


def openvino_compiled(model, n_threads: int, hint: str, precision: str | None):
    """A model compiled for the CPU, at OpenVINO's own choice of precision where `precision` is None."""
    settings = {"PERFORMANCE_HINT": hint, "INFERENCE_NUM_THREADS": n_threads}
    if precision is not None:
        settings["INFERENCE_PRECISION_HINT"] = precision
    return openvino_core().compile_model(model, "CPU", settings)


def openvino_precision(compiled) -> str:
    """The precision that OpenVINO took for a compiled model, a key of `TOLERANCES`."""
    names = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}
    return names[compiled.get_property("INFERENCE_PRECISION_HINT").to_string()]


def openvino_run(case: Case, model, hint: str, precision: str | None) -> tuple[Run, str]:
    """The function of a model with free sizes and the precision that OpenVINO takes for it.

    There is one request per grid: they run one after another under LATENCY, all at once under THROUGHPUT. Each grid and
    count has a model of its own, reshaped before it is compiled; open-ended grids share a dynamic one.
    """
    inputs = numpy_inputs(case)
    shared = openvino_compiled(model, case.n_threads, hint, precision) if case.open_ended else None
    requests = []
    for images, positions in inputs[0]:
        compiled = shared
        if compiled is None:
            static = model.clone()
            static.reshape({static.input(0): images.shape, static.input(1): positions.shape})
            compiled = openvino_compiled(static, case.n_threads, hint, precision)
        requests.append(compiled.create_infer_request())

    def run(turn: int) -> Tensor:
        for request, arrays in zip(requests, inputs[turn % N_SETS], strict=True):
            request.start_async(arrays, share_inputs=True)
            if hint == "LATENCY":
                request.wait()
        for request in requests:
            request.wait()
        return torch.from_numpy(np.concatenate([request.get_output_tensor().data for request in requests]))

    return run, openvino_precision(compiled)


def openvino_grouped(case: Case, precision: str | None = None, int8: bool = False) -> Peer:
    """OpenVINO at a precision, at its own choice of one where that is None, or quantized by NNCF."""
    model = openvino_int8_model(case.vit) if int8 else openvino_model(case.vit)
    variants = {hint: openvino_run(case, model, hint, precision) for hint in ("LATENCY", "THROUGHPUT")}
    hint, run = fastest({hint: run for hint, (run, _) in variants.items()})
    note = f"{hint} hint" + (", dynamic shapes" if case.open_ended else "")
    taken = "int8 per tensor" if int8 else variants[hint][1]
    return Peer(run, case.grouped_order, case.shape.flops(case.seqlens), note, precision=taken)
