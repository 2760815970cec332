"""Other ways to run a ViT on a batch of mixed grids, each in the form in which it serves such a batch best.

A builder takes a `Case` and returns a `Peer`. Peers run at their default precision, and in float32 where that is not
the default. Where a peer has settings that no rule decides, its variants are timed and the fastest is taken: a
comparison should not be won by the other's wrong setting.
"""

from __future__ import annotations

import contextlib
import copy
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from timm.layers import resample_abs_pos_embed
from timm.models import VisionTransformer
from torch import Tensor, nn

from bench.model_work import LONGEST, N_SETS, SLOW_S, Case, Flops, Grid

Run = Callable[[int], Tensor]
"""The logits of a batch, from the number of the round, which says which set of inputs to take."""


class Unsuited(Exception):
    """A peer has no sensible form for a case; the message says why."""


@dataclass
class Peer:
    """A candidate.

    Attributes:
        run: computes the logits.
        order: image that each row of the logits belongs to; None where no image's logits can be compared with timm's.
        flops: what it executes.
        note: the variant taken, or what else is particular to the case.
        precision: the lowest among the operands of its matrix products, a key of `TOLERANCES`.
    """

    run: Run
    order: Sequence[int] | None
    flops: Flops
    note: str = ""
    precision: str = "float32"


def precision_name(dtype: torch.dtype) -> str:
    """A dtype as a key of `TOLERANCES`, "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def fastest(variants: dict[str, Run], pause_s: float = 0.1) -> tuple[str, Run]:
    """Name and function of the fastest, by the best of three calls after a first one; by one where all are slow."""
    seconds = {name: [] for name in variants}
    for turn in range(4):
        for name, run in variants.items():
            time.sleep(pause_s)
            begin = time.perf_counter()
            run(turn)
            seconds[name].append(time.perf_counter() - begin)
        if turn == 1 and min(map(min, seconds.values())) > SLOW_S:
            break
    name = min(variants, key=lambda name: min(seconds[name][1:]))
    return name, variants[name]


class WithPositions(nn.Module):
    """A timm ViT whose position embeddings come as an input, so that an exported graph serves every grid."""

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, images: Tensor, positions: Tensor) -> Tensor:
        """Logits of images `[B, 3, H, W]` with positions `[1, N, C]` of their grid, class token first."""
        vit = self.vit
        x = vit.patch_embed.proj(images).flatten(2).transpose(1, 2)
        x = torch.cat([vit.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + positions
        return vit.forward_head(vit.norm(vit.blocks(x)))


def positions_of(vit: VisionTransformer, grid: Grid) -> Tensor:
    """Position embeddings `[1, N, C]` of a grid."""
    n_prefix = vit.num_prefix_tokens
    return resample_abs_pos_embed(vit.pos_embed, grid, num_prefix_tokens=n_prefix).detach().contiguous()


def example_inputs(vit: VisionTransformer) -> tuple[Tensor, Tensor]:
    """Inputs of `WithPositions` to trace it with."""
    side = 7 * vit.patch_embed.patch_size[0]
    return torch.randn(2, 3, side, side), positions_of(vit, (7, 7))


@contextlib.contextmanager
def quiet_export():
    """Hides torch's notices that TorchScript is deprecated: both engines' importers still read it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        yield


def numpy_inputs(case: Case) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """Of every set, images and positions of every group, as arrays over the same memory."""
    positions = {grid: positions_of(case.vit, grid).numpy() for grid in case.groups}
    return [[(images.numpy(), positions[grid]) for grid, images in stacked.items()] for stacked in case.stacked]


def timm_full_length(case: Case) -> Peer:
    """Every image at the longest grid: what one does without mixed lengths."""
    images = case.full_length
    run = torch.inference_mode()(lambda i: case.vit(images[i % N_SETS]))
    seqlens = [LONGEST * LONGEST + case.shape.n_prefix] * len(case.grids)
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


def torch_compiled(case: Case) -> Peer:
    """TorchInductor with frozen weights, compiled for every grid and count; one call per grid."""
    if case.open_ended:
        raise Unsuited("would be compiled anew, for most of a minute, for every new grid")
    from torch._dynamo import config as dynamo
    from torch._inductor import config as inductor

    compiled = {grid: torch.compile(case.vit, fullgraph=True, dynamic=False) for grid in case.groups}

    @torch.no_grad()  # freezing does nothing where gradients may be wanted
    def run(turn: int) -> Tensor:
        return torch.cat([compiled[grid](x) for grid, x in case.stacked[turn % N_SETS].items()])

    with inductor.patch(freezing=True), dynamo.patch(recompile_limit=64):
        run(0)
    return Peer(run, case.grouped_order, case.shape.flops(case.seqlens))


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


def openvino_run(case: Case, hint: str, precision: str | None) -> tuple[Run, str]:
    """The function and the precision that OpenVINO takes for it.

    There is one request per grid: they run one after another under LATENCY, all at once under THROUGHPUT. Each grid and
    count has a model of its own, reshaped before it is compiled; open-ended grids share a dynamic one.
    """
    inputs = numpy_inputs(case)
    model = openvino_model(case.vit)
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


def openvino_grouped(case: Case, precision: str | None = "f32") -> Peer:
    """OpenVINO at a precision, or at its own choice of one where that is None."""
    variants = {hint: openvino_run(case, hint, precision) for hint in ("LATENCY", "THROUGHPUT")}
    hint, run = fastest({hint: run for hint, (run, _) in variants.items()})
    note = f"{hint} hint" + (", dynamic shapes" if case.open_ended else "")
    return Peer(run, case.grouped_order, case.shape.flops(case.seqlens), note, precision=variants[hint][1])


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


def onnxruntime_run(case: Case, spin: bool) -> Run:
    """One call per grid; a session per grid and count with its shape fixed, or one dynamic one for open-ended grids."""
    import onnxruntime

    path, _ = onnx_file(case.vit)
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


def onnxruntime_grouped(case: Case) -> Peer:
    """ONNX Runtime's CPU provider, all graph optimisations."""
    variants = {name: onnxruntime_run(case, spin) for name, spin in (("spinning", True), ("no spinning", False))}
    name, run = fastest(variants)
    note = name + (", dynamic shapes" if case.open_ended else "")
    return Peer(run, case.grouped_order, case.shape.flops(case.seqlens), note)


@lru_cache(maxsize=1)
def naflexvit(vit: VisionTransformer) -> nn.Module:
    """timm's NaFlexVit with the weights of `vit`."""
    from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg, checkpoint_filter_fn

    side = vit.patch_embed.grid_size
    config = NaFlexVitCfg(
        patch_size=vit.patch_embed.patch_size,
        embed_dim=vit.embed_dim,
        depth=len(vit.blocks),
        num_heads=vit.blocks[0].attn.num_heads,
        mlp_ratio=vit.blocks[0].mlp.fc1.out_features / vit.embed_dim,
        class_token=True,
        global_pool="token",
        fc_norm=False,
        pos_embed_grid_size=side,
        use_key_only_attn_mask=True,  # a mask of [B, 1, 1, N], not [B, 1, N, N]
    )
    model = NaFlexVit(num_classes=vit.num_classes, img_size=vit.patch_embed.img_size, cfg=config).eval()
    # The filter adds the class token's position embedding to the class token in place: it must not be that of `vit`.
    weights = {name: value.clone() for name, value in vit.state_dict().items()}
    model.load_state_dict(checkpoint_filter_fn(weights, model))
    return model.requires_grad_(False)


def naflexvit_padded(case: Case) -> Peer:
    """One call: patches of every image padded to the longest one's, with a mask."""
    model, p = naflexvit(case.vit), case.patch
    n_longest = max(h * w for h, w in case.grids)
    batches = []
    for images in case.sets:
        patches = torch.zeros(len(images), n_longest, p * p * 3)
        coord = torch.zeros(len(images), n_longest, 2, dtype=torch.long)
        valid = torch.zeros(len(images), n_longest, dtype=torch.bool)
        for b, (image, (h, w)) in enumerate(zip(images, case.grids, strict=True)):
            patches[b, : h * w] = image.view(3, h, p, w, p).permute(1, 3, 2, 4, 0).reshape(h * w, -1)
            coord[b, : h * w] = torch.cartesian_prod(torch.arange(h), torch.arange(w))
            valid[b, : h * w] = True
        batches.append({"patches": patches, "patch_coord": coord, "patch_valid": valid})
    run = torch.inference_mode()(lambda i: model(batches[i % N_SETS]))
    seqlens = [n_longest + case.shape.n_prefix] * len(case.grids)
    return Peer(run, range(len(case.grids)), case.shape.flops(seqlens))


@lru_cache(maxsize=1)
def navit(vit: VisionTransformer) -> nn.Module:
    """vit-pytorch's NaViT of the same sizes; its weights are random, as its architecture has other parameters."""
    from vit_pytorch.na_vit import NaViT

    attention = vit.blocks[0].attn
    model = NaViT(
        image_size=LONGEST * vit.patch_embed.patch_size[0],
        patch_size=vit.patch_embed.patch_size[0],
        num_classes=vit.num_classes,
        dim=vit.embed_dim,
        depth=len(vit.blocks),
        heads=attention.num_heads,
        dim_head=attention.head_dim,
        mlp_dim=vit.blocks[0].mlp.fc1.out_features,
    )
    return model.eval().requires_grad_(False)


def navit_packed(case: Case) -> Peer:
    """One call: images packed into sequences of bounded length, with a mask that parts the images."""
    from vit_pytorch.na_vit import group_images_by_max_seq_len

    model, p = navit(case.vit), case.patch
    variants = {
        f"sequences up to {bound}": torch.inference_mode()(
            lambda i, bound=bound: model(case.sets[i % N_SETS], group_images=True, group_max_seq_len=bound)
        )
        for bound in (256, 512, 2048)
    }
    name, run = fastest(variants)
    packs = group_images_by_max_seq_len(case.sets[0], patch_size=p, max_seq_len=int(name.split()[-1]))
    n_longest = max(sum(image[0].numel() for image in pack) // (p * p) for pack in packs)
    flops = case.shape.flops([n_longest + case.shape.n_prefix] * len(packs))
    return Peer(run, None, flops, name)


@dataclass(frozen=True)
class Kind:
    """A candidate as the tables name it."""

    name: str
    build: Callable[[Case], Peer]
    note: str


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
    "openvino": Kind(
        "OpenVINO, grouped",
        openvino_grouped,
        "A static model for every grid and count, float32, the better of the LATENCY and THROUGHPUT hints (under the "
        "latter all grids run at once). Random grids: one dynamic model, a request per grid.",
    ),
    "openvino-default": Kind(
        "OpenVINO, grouped, default precision",
        partial(openvino_grouped, precision=None),
        "The same at the precision that OpenVINO chooses, bfloat16 on CPUs with instructions for it.",
    ),
    "onnxruntime": Kind(
        "ONNX Runtime, grouped",
        onnxruntime_grouped,
        "A session with fixed shapes for every grid and count, the better of spinning and waiting threads. Random "
        "grids: one dynamic session, a call per grid.",
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
