"""ONNX Runtime on its CPU provider, in float32 and in int8 by its own quantiser."""

from __future__ import annotations

import tempfile
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from timm.models import VisionTransformer
from torch import Tensor

from bench.model_work import N_SETS, Case
from bench.peers.common import Peer, Run, fastest
from bench.peers.exported import WithPositions, example_inputs, numpy_inputs, quiet_export


@lru_cache(maxsize=1)
def onnx_file(vit: VisionTransformer) -> tuple[Path, tempfile.TemporaryDirectory]:
    """The model as an ONNX file with free batch, height and width, and the folder that lives as long as it is held."""
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / "vit.onnx"
    with quiet_export():
        torch.onnx.export(
            WithPositions(vit),
            example_inputs(vit),
            str(path),
            dynamo=False,
            opset_version=17,
            input_names=["images", "positions"],
            output_names=["logits"],
            dynamic_axes={"images": {0: "batch", 2: "height", 3: "width"}, "positions": {1: "tokens"}},
        )
    return path, folder


@lru_cache(maxsize=1)
def onnx_int8_file(vit: VisionTransformer) -> tuple[Path, tempfile.TemporaryDirectory]:
    """The model in int8 beside its file, and their folder.

    ONNX Runtime's documentation recommends dynamic quantization for transformers: activations get one scale for a
    tensor in every call. Its defaults are kept, so weights get one scale for a tensor too.
    """
    from onnxruntime.quantization import quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    path, folder = onnx_file(vit)
    prepared, quantized = path.with_name("prepared.onnx"), path.with_name("int8.onnx")
    quant_pre_process(path, prepared, skip_symbolic_shape=True)  # which fails on sizes that are free
    quantize_dynamic(prepared, quantized)
    return quantized, folder


def onnxruntime_run(case: Case, path: Path, spin: bool) -> Run:
    """One call of a file's model per grid.

    Each grid and count has a session with its shape fixed; open-ended grids share a dynamic one.
    """
    import onnxruntime

    inputs = [
        [{"images": images, "positions": positions} for images, positions in groups] for groups in numpy_inputs(case)
    ]

    def session(arrays: dict[str, np.ndarray] | None):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = case.n_threads, 1
        options.log_severity_level = 3
        if spin:  # but not past the end of a call: the next grid's session has threads of its own
            options.add_session_config_entry("session.force_spinning_stop", "1")
        else:
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if arrays is not None:
            batch, _, height, width = arrays["images"].shape
            sizes = {"batch": batch, "height": height, "width": width, "tokens": arrays["positions"].shape[1]}
            for name, size in sizes.items():
                options.add_free_dimension_override_by_name(name, size)
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    shared = session(None) if case.open_ended else None
    sessions = [shared or session(arrays) for arrays in inputs[0]]

    def run(turn: int) -> Tensor:
        logits = [s.run(None, arrays)[0] for s, arrays in zip(sessions, inputs[turn % N_SETS], strict=True)]
        return torch.from_numpy(np.concatenate(logits))

    return run


def onnxruntime_grouped(case: Case, int8: bool = False) -> Peer:
    """ONNX Runtime's CPU provider, all graph optimisations."""
    path, _ = onnx_int8_file(case.vit) if int8 else onnx_file(case.vit)
    variants = {name: onnxruntime_run(case, path, spin) for name, spin in (("spinning", True), ("no spinning", False))}
    name, run = fastest(variants)
    note = name + (", dynamic shapes" if case.open_ended else "")
    precision = "int8 per tensor" if int8 else "float32"
    return Peer(run, case.grouped_order, case.shape.flops(case.seqlens), note, precision)
