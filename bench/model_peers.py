"""Other ways to run a ViT on a batch of mixed grids, each in the form in which it serves such a batch best.

A builder takes a `Case` and returns a `Peer`; bench/peers has one file for each runtime. Peers run at their default
precision, and in float32 where that is not the default. Where a peer has settings that no rule decides, its variants
are timed and the fastest is taken: a comparison should not be won by the other's wrong setting.
"""

from __future__ import annotations

from functools import partial

import torch

from bench.peers.common import Kind
from bench.peers.exported import N_CALIBRATION
from bench.peers.onnxruntime_ import onnxruntime_grouped
from bench.peers.openvino_ import openvino_grouped
from bench.peers.packed import naflexvit_padded, navit_packed
from bench.peers.pytorch import timm_full_length, timm_grouped, torch_compiled

SLOW_TO_BUILD = ("compile-tuned", "compile-tuned-bf16")
"""Peers that take minutes for every case, as each product of each grid is compiled and timed."""

PEERS = {
    "timm-full": Kind(
        "timm, full length",
        timm_full_length,
        "Every image at 14×14. More work on larger images: its logits have no counterpart to compare with.",
    ),
    "timm": Kind(
        "timm, grouped by length", timm_grouped, "One call per grid; in float64 the truth that all are checked against."
    ),
    "timm-bf16": Kind(
        "timm, grouped, autocast bf16",
        partial(timm_grouped, dtype=torch.bfloat16),
        'The same under `torch.autocast("cpu", torch.bfloat16)`; the weights that it would cast are cast beforehand.',
    ),
    "compile": Kind(
        "torch.compile, frozen, grouped",
        torch_compiled,
        "TorchInductor with freezing, compiled for every grid and count. Random grids would be compiled one by one, "
        "without end: not measured there.",
    ),
    "compile-bf16": Kind(
        "torch.compile, frozen, grouped, autocast bf16",
        partial(torch_compiled, precision="bfloat16"),
        'The same under `torch.autocast("cpu", torch.bfloat16)`.',
    ),
    "compile-tuned": Kind(
        "torch.compile, frozen, grouped, max-autotune",
        partial(torch_compiled, autotune=True),
        "In float32 with `max_autotune`: for every matrix product the faster of inductor's own and the library's.",
    ),
    "compile-tuned-bf16": Kind(
        "torch.compile, frozen, grouped, max-autotune, autocast bf16",
        partial(torch_compiled, precision="bfloat16", autotune=True),
        "The same under autocast.",
    ),
    "torchao-int8": Kind(
        "torchao dynamic int8, torch.compile, frozen, grouped",
        partial(torch_compiled, precision="int8"),
        "Linear layers by `Int8DynamicActivationInt8WeightConfig`, then as `torch.compile`.",
    ),
    "openvino-default": Kind(
        "OpenVINO, grouped, default precision",
        openvino_grouped,
        "A static model for every grid and count, the better of the LATENCY and THROUGHPUT hints (under the latter all "
        "grids run at once), at the precision that OpenVINO chooses: bfloat16 on CPUs with instructions for it. Random "
        "grids: one dynamic model, a request per grid.",
    ),
    "openvino": Kind(
        "OpenVINO, grouped, held to float32",
        partial(openvino_grouped, precision="f32"),
        "The same, held to float32.",
    ),
    "openvino-int8": Kind(
        "OpenVINO, grouped, NNCF int8",
        partial(openvino_grouped, int8=True),
        f"The same after `nncf.quantize` for transformers, calibrated on {N_CALIBRATION} other images of the three "
        "lengths; what stays in floating point is at the precision that OpenVINO chooses. On CPUs without VNNI with "
        "NNCF's fix for saturation.",
    ),
    "onnxruntime": Kind(
        "ONNX Runtime, grouped",
        onnxruntime_grouped,
        "A session with fixed shapes for every grid and count, the better of spinning and waiting threads. Random "
        "grids: one dynamic session, a call per grid.",
    ),
    "onnxruntime-int8": Kind(
        "ONNX Runtime, grouped, dynamic int8",
        partial(onnxruntime_grouped, int8=True),
        "The same after `quant_pre_process` and `quantize_dynamic`, the quantization that its documentation recommends "
        "for transformers, with its defaults.",
    ),
    "naflex": Kind(
        "timm NaFlexViT, padded",
        naflexvit_padded,
        "The same weights; one call over patches padded to the batch's longest image, with a key mask.",
    ),
    "navit": Kind(
        "vit-pytorch NaViT, packed",
        navit_packed,
        "The same width, depth, heads and MLP, but another architecture (normalised queries and keys, factorised "
        "positions, attention pooling in place of a class token): it cannot hold timm's weights, so only shape and "
        "finiteness of its logits are checked. Best of three bounds on a packed sequence; FLOP without its pooling.",
    ),
}
