"""The whole model on images of mixed sizes, beside other ways to run the same weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import revit_fast as rf
from bench.gpu_suite import attention
from bench.gpu_suite.measure import Bench, Case, Outputs, Run
from bench.gpu_suite.setting import Setting, models
from bench.gpu_suite.step import Context
from tests import dense_vit

Forward = Callable[[list[Tensor]], Tensor]
"""A function from the images of each grid, `[count, 3, h, w]`, to the logits of all."""

BASE = "ours, optimize"
WATCHED = ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "head.weight")
"""Parameters of every candidate whose gradients are compared."""


def redrawn(net: nn.Module, s: Setting) -> nn.Module:
    """The model with matrices drawn so that activations are of order one."""
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    return net.to(s.device, s.dtype).eval()


def make_vit(s: Setting) -> nn.Module:
    """timm's model; an ImportError if timm is missing."""
    from timm.models import VisionTransformer

    torch.manual_seed(0)
    shape = {"img_size": s.grids[0] * s.patch, "patch_size": s.patch, "embed_dim": s.channels}
    return redrawn(VisionTransformer(**shape, depth=s.depth, num_heads=s.heads, dynamic_img_size=True), s)


class Work:
    """Our model, timm's with the same weights, and sets of images. Without timm `vit` is None; `missing` says why."""

    def __init__(self, s: Setting) -> None:
        self.s, self.vit, self.missing = s, None, None
        try:
            self.vit = make_vit(s)
            self.model = rf.ReViT.from_timm(self.vit, grids=s.grids).eval()
        except ImportError as error:
            self.missing = error
            torch.manual_seed(0)
            shape = {"grids": s.grids, "patch_size": s.patch, "embed_dim": s.channels, "depth": s.depth}
            self.model = redrawn(rf.ReViT(**shape, num_heads=s.heads), s)
        shapes = [(count, 3, g * s.patch, g * s.patch) for (count, _), g in zip(s.groups, s.grids, strict=True)]
        self.images = [[s.randn(*shape, seed=10 * i + j) for j, shape in enumerate(shapes)] for i in range(s.n_sets)]
        self.packs = [self.model.pack([image for group in groups for image in group]) for groups in self.images]

    def timm(self) -> nn.Module:
        """timm's model, for candidates that need it."""
        if self.vit is None:
            raise self.missing
        return self.vit

    @property
    def n_flops(self) -> int:
        """Of a forward pass: 12 C² weights a block, scores and values, the patch embedding."""
        s = self.s
        blocks = 24 * s.channels**2 * s.n_tokens + 4 * sum(n * n for n in s.seqlens) * s.channels
        return s.depth * blocks + 2 * (s.n_tokens - len(s.seqlens)) * 3 * s.patch**2 * s.channels

    def plain(self, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits of the first set and the parameters that they come from: by timm, or by the definition without it."""
        groups = [group.to(dtype) for group in self.images[0]]
        if self.vit is not None:
            vit = copy.deepcopy(self.vit).to(dtype)
            return by_length(vit, groups), dict(vit.named_parameters())
        state = {name: t.detach().to(dtype).requires_grad_() for name, t in self.model.state_dict().items()}
        logits = [dense_vit.logits(self.model.spec, state, image) for group in groups for image in group]
        return torch.stack(logits), {name: state[name] for name, _ in self.model.named_parameters()}

    def logits(self, dtype: torch.dtype) -> Outputs:
        """Logits of the first set."""
        with torch.no_grad():
            return (self.plain(dtype)[0],)


def by_length(vit: nn.Module, groups: list[Tensor]) -> Tensor:
    """timm, a call for each grid."""
    return torch.cat([vit(group) for group in groups])


def _tokens(vit: nn.Module, group: Tensor) -> Tensor:
    return vit.norm_pre(vit._pos_embed(vit.patch_embed(group)))


def padded(vit: nn.Module, groups: list[Tensor]) -> Tensor:
    """timm's blocks over all images, padded to the longest with a mask: the usual batch of mixed lengths."""
    tokens = [_tokens(vit, group) for group in groups]
    longest = tokens[0].shape[1]
    x = torch.cat([F.pad(t, (0, 0, 0, longest - t.shape[1])) for t in tokens])
    real = torch.cat([torch.arange(longest, device=x.device).expand(len(t), -1) < t.shape[1] for t in tokens])
    mask = real[:, None, None, :].expand(-1, 1, longest, -1)
    for block in vit.blocks:
        x = block(x, attn_mask=mask)
    return vit.forward_head(vit.norm(x))


def packed(vit: nn.Module, attend: attention.Attend, starts: Tensor, groups: list[Tensor]) -> Tensor:
    """timm's modules over all rows at once, with another library's attention between them."""
    x = torch.cat([_tokens(vit, group).flatten(0, 1) for group in groups])
    for block in vit.blocks:
        qkv = block.attn.qkv(block.norm1(x)).view(len(x), 3, block.attn.num_heads, -1)
        x = x + block.ls1(block.attn.proj(attend(qkv).flatten(1)))
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return vit.head(vit.fc_norm(vit.norm(x)[starts]))


def packed_with(work: Work, peer: str) -> Forward:
    """`packed` with an entry of `attention.peers`."""
    s = work.s
    starts = torch.tensor([0, *s.seqlens], device=s.device).cumsum(0)[:-1]
    return partial(packed, work.timm(), attention.peers(s)[peer](), starts)


def with_backend(backend: SDPBackend, forward: Forward) -> Forward:
    return sdpa_kernel(backend)(forward)


def compiled(s: Setting, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """By TorchInductor with `max-autotune`, which replays CUDA graphs; a result is copied, as later calls reuse it."""
    fast = torch.compile(forward, mode="max-autotune", dynamic=False) if s.compiled else forward
    return lambda x: fast(x).clone()


def eager(work: Work, make: Callable[[], Forward]) -> Run:
    forward = torch.no_grad()(make())
    return lambda turn: forward(work.images[turn % work.s.n_sets])


def from_graph(work: Work, make: Callable[[], Forward]) -> Run:
    """Replays one CUDA graph of a forward pass; images are copied into the tensors that it reads."""
    forward = torch.no_grad()(make())
    static = [image.clone() for image in work.images[0]]
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        forward(static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = forward(static)

    def run(turn: int) -> Tensor:
        for target, image in zip(static, work.images[turn % work.s.n_sets], strict=True):
            target.copy_(image)
        graph.replay()
        return out

    return run


def ours(work: Work, fast: bool) -> Run:
    model = rf.optimize(work.model) if fast else torch.no_grad()(work.model)
    return lambda turn: model(work.packs[turn % work.s.n_sets])


COMPILED: dict[str, Callable[[Work], Forward]] = {
    "timm's modules packed, torch varlen, compiled": lambda work: compiled(
        work.s, packed_with(work, "torch.nn.attention.varlen")
    ),
    "timm by length, compiled": lambda work: by_length_compiled(work),
    "timm's modules packed, FlexAttention": lambda work: packed_with(work, "FlexAttention"),
}
"""Peers that take long to build: each has a case of its own, so that what was timed before it is kept."""


def forward_case(s: Setting, slow_peer: str | None = None) -> Case:
    """A forward pass beside all peers that need no compiler, or beside one that does."""
    work = Work(s)
    candidates: dict[str, Callable[[], Run]] = {BASE: lambda: ours(work, True)}
    if slow_peer:
        makers = {slow_peer: partial(COMPILED[slow_peer], work)}
    else:
        candidates["ours, eager"] = lambda: ours(work, False)
        makers = {
            "timm by length": lambda: partial(by_length, work.timm()),
            "timm by length, cuDNN SDPA": lambda: with_backend(
                SDPBackend.CUDNN_ATTENTION, partial(by_length, work.timm())
            ),
            "timm padded and masked": lambda: partial(padded, work.timm()),
            "timm's modules packed, torch varlen": lambda: packed_with(work, "torch.nn.attention.varlen"),
            "timm's modules packed, flash-attn": lambda: packed_with(work, "flash-attn varlen"),
        }
    for name, make in makers.items():
        candidates[name] = partial(eager, work, make)
        if s.device.type == "cuda" and not name.endswith("compiled"):  # these replay graphs of their own
            candidates[f"{name}, CUDA graph"] = partial(from_graph, work, make)
    return Case(
        "Whole model",
        f"{s.name}, beside {slow_peer}" if slow_peer else s.name,
        candidates,
        truth=lambda: work.logits(torch.float64),
        same_dtype=lambda: work.logits(s.dtype),
        n_flops=work.n_flops,
        base=BASE,
        whole_calls=True,
        facts={"dtype": str(s.dtype)[6:], "images": len(s.seqlens), "tokens": s.n_tokens},
    )


def by_length_compiled(work: Work) -> Forward:
    vit = compiled(work.s, work.timm())
    return lambda groups: torch.cat([vit(group) for group in groups])


def gradients(logits: Tensor, parameters: dict[str, Tensor]) -> Outputs:
    """Computes all gradients of a training step and returns those of parameters that every candidate has."""
    loss = F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))
    grads = dict(zip(parameters, torch.autograd.grad(loss, parameters.values()), strict=True))
    return tuple(grads[name] for name in WATCHED)


def step(net: nn.Module, forward: Callable, inputs: object) -> Outputs:
    """The forward and the backward pass of a batch."""
    return gradients(forward(inputs), dict(net.named_parameters()))


def training_case(s: Setting) -> Case:
    """Forward and backward pass of one batch."""
    work = Work(s)

    def by_timm(function: Callable) -> Run:
        vit = work.timm()
        return lambda turn: step(vit, partial(function, vit), work.images[turn % s.n_sets])

    return Case(
        "Training step",
        s.name,
        {
            "ours": lambda: lambda turn: step(work.model, work.model, work.packs[turn % s.n_sets]),
            "timm by length": partial(by_timm, by_length),
            "timm padded and masked": partial(by_timm, padded),
        },
        truth=lambda: gradients(*work.plain(torch.float64)),
        same_dtype=lambda: gradients(*work.plain(s.dtype)),
        n_flops=3 * work.n_flops,
        whole_calls=True,
        facts={"dtype": str(s.dtype)[6:], "images": len(s.seqlens), "tokens": s.n_tokens},
    )


def cases(device: torch.device) -> Iterator[Callable[[], Case]]:
    """Every model beside peers that are built at once, a training step, then every model beside those that are not."""
    for s in models(device):
        yield partial(forward_case, s)
    yield partial(training_case, models(device)[0])
    for s in models(device):
        for peer in COMPILED:
            yield partial(forward_case, s, peer)


def run(context: Context) -> list[str]:
    """The step."""
    bench = Bench(context)
    bench.measure_ceilings(models(context.device)[0].dtype)
    return bench.run_all(list(cases(context.device)))
