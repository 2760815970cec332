"""timm's own model: eager and compiled, in float32 and bfloat16."""

from __future__ import annotations

import copy
from functools import lru_cache

import torch
from timm.models import VisionTransformer
from torch import Tensor, nn

from bench.model_work import N_SETS, Case
from bench.peers.common import Peer, Unsuited, precision_name


def timm_full_length(case: Case) -> Peer:
    """Every image at the longest grid: what one does without mixed lengths."""
    images = case.full_length
    run = torch.inference_mode()(lambda i: case.vit(images[i % N_SETS]))
    seqlens = [case.longest**2 + case.shape.n_prefix] * len(case.grids)
    return Peer(run, None, case.shape.flops(seqlens))


@lru_cache(maxsize=1)
def cast_for_autocast(vit: VisionTransformer) -> VisionTransformer:
    """A copy with the weights in bfloat16 that autocast would cast in every call, a tenth of its time on DeiT-S."""
    cast = copy.deepcopy(vit)
    for module in cast.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.bfloat16()
    return cast


def timm_grouped(case: Case, dtype: torch.dtype = torch.float32) -> Peer:
    """One call per grid, in bfloat16 under autocast."""
    autocast = dtype == torch.bfloat16
    vit = cast_for_autocast(case.vit) if autocast else case.vit

    @torch.inference_mode()
    def run(turn: int) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return torch.cat([vit(x) for x in case.stacked[turn % N_SETS].values()])

    return Peer(run, case.grouped_order, case.shape.flops(case.seqlens), precision=precision_name(dtype))


@lru_cache(maxsize=1)
def quantized_by_torchao(vit: VisionTransformer) -> VisionTransformer:
    """A copy with linear layers in int8: a scale for every row of activations in each call, and for every output."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantized = copy.deepcopy(vit)
    # The settings of inductor that it would make are for Triton, and would stay for all peers.
    quantize_(quantized, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
    return quantized


def torch_compiled(case: Case, precision: str = "float32", autotune: bool = False) -> Peer:
    """TorchInductor with frozen weights, compiled for every grid and count; one call per grid.

    Args:
        case: the images.
        precision: "float32"; "bfloat16" for autocast; or "int8" for linear layers by torchao.
        autotune: whether inductor times its own matrix products beside the libraries'.
    """
    if case.open_ended:
        raise Unsuited("would be compiled anew, for most of a minute, for every new grid")
    from torch._dynamo import config as dynamo
    from torch._inductor import config as inductor

    vit = quantized_by_torchao(case.vit) if precision == "int8" else case.vit
    compiled = {grid: torch.compile(vit, fullgraph=True, dynamic=False) for grid in case.groups}

    @torch.no_grad()  # freezing does nothing where gradients may be wanted
    def run(turn: int) -> Tensor:
        # At every call: under other settings it would be compiled again, without freezing.
        settings = inductor.patch(freezing=True, max_autotune=autotune), dynamo.patch(recompile_limit=64)
        with settings[0], settings[1], torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            return torch.cat([compiled[grid](x) for grid, x in case.stacked[turn % N_SETS].items()])

    run(0)
    return Peer(run, case.grouped_order, case.shape.flops(case.seqlens), precision=precision)
