"""What `bench.gpu` measures: our ops, model and training step, and their peers, as functions of the same inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import revit_fast as rf
from revit_fast import ops, reference
from revit_fast.packing import PackedBatch, cumulative

Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Setting:
    """Sizes, dtype and device of all cases.

    Attributes:
        device: device of all tensors.
        dtype: dtype of rows and weights.
        counts: number of images of each of `grids`.
        grids: square patch grids, strictly decreasing.
        heads: attention heads.
        head_dim: channels of a head.
        depth: blocks of the model.
        patch: patch size in pixels.
        n_sets: input sets that calls rotate through.
        compiled: whether peers that need `torch.compile` are compiled.
    """

    device: torch.device
    dtype: torch.dtype
    counts: tuple[int, ...]
    grids: tuple[int, ...] = (14, 10, 7)
    heads: int = 6
    head_dim: int = 64
    depth: int = 12
    patch: int = 16
    n_sets: int = 4
    compiled: bool = True

    @property
    def channels(self) -> int:
        return self.heads * self.head_dim

    @property
    def groups(self) -> list[tuple[int, int]]:
        """(sequences, tokens) of each length, including one prefix token."""
        return [(count, g * g + 1) for count, g in zip(self.counts, self.grids, strict=True)]

    @property
    def seqlens(self) -> list[int]:
        return [n for count, n in self.groups for _ in range(count)]

    def pack(self) -> PackedBatch:
        """The layout of the tokens, as a pack of rows without channels."""
        rows = torch.empty(sum(self.seqlens), 0, device=self.device)
        return PackedBatch.from_rows(rows, self.seqlens, lengths=[g * g for g in self.grids], n_prefix=1)

    def randn(self, *shape: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(*shape, generator=generator).to(self.device, self.dtype)


@dataclass
class Case:
    """Candidates that compute the same outputs.

    Attributes:
        group: heading of the table.
        name: name of the case.
        candidates: name -> builds a function of the round's number; if it raises, the peer is listed with the reason.
            Names that begin with "ours" are ours. The others are compared with "ours".
        truth: outputs of round 0 in float64.
        same_dtype: outputs of round 0 by plain PyTorch in the dtype of the candidates.
        n_bytes: least number of bytes that must move.
        n_flops: floating-point operations of the useful work.
    """

    group: str
    name: str
    candidates: dict[str, Callable[[], Callable[[int], Outputs | Tensor]]]
    truth: Callable[[], Outputs]
    same_dtype: Callable[[], Outputs]
    n_bytes: int = 0
    n_flops: int = 0
    notes: dict[str, object] = field(default_factory=dict)


def by_length(s: Setting, rows: Tensor) -> list[Tensor]:
    """Views `[count, L, ...]` of the rows of every length; these rows are contiguous."""
    parts = rows.split([count * n for count, n in s.groups])
    return [part.view(count, n, *rows.shape[1:]) for part, (count, n) in zip(parts, s.groups, strict=True)]


def attention_peers(s: Setting) -> dict[str, Callable[[], Callable[[Tensor], Tensor]]]:
    """name -> builds a function from qkv `[T, 3, H, D]` to `[T, H, D]`."""
    batch = s.pack()
    cu_seqlens, longest = batch.cu_seqlens, max(s.seqlens)

    def ours():
        return lambda qkv: ops.varlen_attention(
            *qkv.unbind(1), cu_seqlens, tiles=batch.tiles, tile_counts=batch.tile_counts
        )

    def flash_attn():
        from flash_attn import flash_attn_varlen_func

        return lambda qkv: flash_attn_varlen_func(*qkv.unbind(1), cu_seqlens, cu_seqlens, longest, longest)

    def torch_varlen():
        from torch.nn.attention.varlen import varlen_attn

        return lambda qkv: varlen_attn(*qkv.unbind(1), cu_seqlens, cu_seqlens, longest, longest)

    def flex():
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        n_rows = sum(s.seqlens)
        lengths = torch.tensor(s.seqlens, device=s.device)
        document = torch.repeat_interleave(torch.arange(len(s.seqlens), device=s.device), lengths)

        def same_document(batch, head, row, column):
            return document[row] == document[column]

        mask = create_block_mask(same_document, None, None, n_rows, n_rows, device=s.device)
        attend = torch.compile(flex_attention) if s.compiled else flex_attention

        def run(qkv):
            q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in qkv.unbind(1))
            return attend(q, k, v, block_mask=mask)[0].transpose(0, 1)

        return run

    def grouped():
        def run(qkv):
            groups = (F.scaled_dot_product_attention(*_heads_first(g)).transpose(1, 2) for g in by_length(s, qkv))
            return torch.cat([g.flatten(0, 1) for g in groups])

        return run

    return {
        "ours": ours,
        "flash-attn varlen": flash_attn,
        "torch.nn.attention.varlen": torch_varlen,
        "FlexAttention": flex,
        "SDPA grouped by length": grouped,
    }


def _heads_first(group: Tensor) -> list[Tensor]:
    return [t.transpose(1, 2) for t in group.unbind(2)]


def attention(s: Setting) -> Iterator[Case]:
    sets = [s.randn(sum(s.seqlens), 3, s.heads, s.head_dim, seed=i) for i in range(s.n_sets)]
    grads = [s.randn(sum(s.seqlens), s.heads, s.head_dim, seed=100 + i) for i in range(s.n_sets)]
    cu_seqlens = s.pack().cu_seqlens
    n_flops = 4 * sum(n * n for n in s.seqlens) * s.channels
    n_bytes = sets[0].nbytes + grads[0].nbytes

    def plain(dtype, backward):
        leaf = sets[0].to(dtype).requires_grad_(backward)
        out, _ = reference.varlen_attention(*leaf.unbind(1), cu_seqlens, cu_seqlens, scale=s.head_dim**-0.5)
        return torch.autograd.grad(out, leaf, grads[0].to(dtype)) if backward else (out,)

    def forward(build):
        function = build()
        return lambda turn: function(sets[turn % s.n_sets])

    def backward(build):
        function = build()
        leaves = [qkv.clone().requires_grad_() for qkv in sets]
        with torch.enable_grad():
            outs = [function(leaf) for leaf in leaves]

        def run(turn):
            i = turn % s.n_sets
            return torch.autograd.grad(outs[i], leaves[i], grads[i], retain_graph=True)

        return run

    for name, wrap, flops, n in (("forward", forward, n_flops, n_bytes), ("backward", backward, 2.5 * n_flops, 0)):
        is_backward = wrap is backward
        yield Case(
            "Attention",
            name,
            {peer: lambda build=build, wrap=wrap: wrap(build) for peer, build in attention_peers(s).items()},
            truth=lambda b=is_backward: plain(torch.float64, b),
            same_dtype=lambda b=is_backward: plain(s.dtype, b),
            n_bytes=n or 2 * n_bytes,  # backward reads qkv, out and its gradient, and writes the gradient of qkv
            n_flops=int(flops),
        )


def layer_norm(s: Setting) -> Iterator[Case]:
    batch, n_rows = s.pack(), sum(s.seqlens)
    sets = [[s.randn(n_rows, s.channels, seed=10 * i + j) for j in range(4)] for i in range(s.n_sets)]
    weight, bias = (s.randn(len(s.grids), s.channels, seed=i) for i in (1000, 1001))

    def ours(x, residual, weight, bias):
        out = ops.tal_layer_norm(
            x, weight, bias, batch.cu_seqlens, batch.length_index, residual=residual, tiles=batch.tiles
        )
        return out if residual is not None else (out,)

    def plain(x, residual, weight, bias):
        total = x if residual is None else x + residual
        groups = total.split([count * n for count, n in s.groups])
        y = torch.cat([F.layer_norm(g, g.shape[1:], weight[i], bias[i], 1e-6) for i, g in enumerate(groups)])
        return (y,) if residual is None else (y, total)

    def arguments(i, residual, dtype=s.dtype):
        x, other, *_ = sets[i]
        tensors = (x, other if residual else None, weight, bias)
        return [None if t is None else t.to(dtype) for t in tensors]

    def forward(function, residual):
        return lambda turn: function(*arguments(turn % s.n_sets, residual))

    def gradients(function, i, dtype=s.dtype):
        leaves = [t.clone().requires_grad_() for t in arguments(i, True, dtype)]
        with torch.enable_grad():
            outs = function(*leaves)
        grads = [g.to(dtype) for g in sets[i][2:]]
        return lambda: torch.autograd.grad(outs, leaves, grads, retain_graph=True)

    def backward(function):
        graphs = [gradients(function, i) for i in range(s.n_sets)]
        return lambda turn: graphs[turn % s.n_sets]()

    functions = {"ours": ours, "layer_norm per length group": plain}
    row_bytes = n_rows * s.channels * weight.element_size()
    for name, residual, tensors in (("norm", False, 2), ("residual + norm", True, 4)):
        yield Case(
            "TAL-LN",
            name,
            {key: lambda f=f, r=residual: forward(f, r) for key, f in functions.items()},
            truth=lambda r=residual: plain(*arguments(0, r, torch.float64)),
            same_dtype=lambda r=residual: plain(*arguments(0, r)),
            n_bytes=tensors * row_bytes,
        )
    yield Case(
        "TAL-LN",
        "residual + norm, backward",
        {key: lambda f=f: backward(f) for key, f in functions.items()},
        truth=lambda: gradients(plain, 0, torch.float64)(),
        same_dtype=lambda: gradients(plain, 0)(),
        n_bytes=4 * row_bytes,
    )


def embedding(s: Setting) -> Iterator[Case]:
    lengths = [n - 1 for n in s.seqlens]
    n_rows, n_tokens = sum(lengths), sum(s.seqlens)
    sets = [s.randn(n_rows, s.channels, seed=i) for i in range(s.n_sets)]
    prefix = s.randn(1, s.channels, seed=50)
    table = s.randn(sum(g * g for g in s.grids), s.channels, seed=51)
    cu_seqlens = cumulative(lengths).to(s.device)
    first = [sum(g * g for g in s.grids[:i]) for i in range(len(s.grids))]
    offsets = [first[i] for i, (count, _) in enumerate(s.groups) for _ in range(count)]
    pos_offset = torch.tensor(offsets, dtype=torch.int32, device=s.device)
    position = torch.cat([torch.arange(o, o + n) for o, n in zip(offsets, lengths, strict=True)]).to(s.device)
    starts = cumulative(s.seqlens)[:-1].long()
    target = torch.cat([torch.arange(b + 1, b + 1 + n) for b, n in zip(starts.tolist(), lengths, strict=True)])
    target, starts = target.to(s.device), starts.to(s.device)

    def gather(patches):
        out = patches.new_empty(n_tokens, s.channels)
        out.index_copy_(0, starts, prefix.expand(len(starts), -1))
        return out.index_copy_(0, target, patches + table[position])

    def ours():
        return lambda turn: ops.assemble_tokens(sets[turn % s.n_sets], prefix, table, pos_offset, cu_seqlens)

    def plain(dtype):
        return (reference.assemble_tokens(*(t.to(dtype) for t in (sets[0], prefix, table)), pos_offset, cu_seqlens),)

    yield Case(
        "Patch embedding",
        "positions and prefix tokens",
        {"ours": ours, "gather, add, index_copy": lambda: lambda turn: gather(sets[turn % s.n_sets])},
        truth=lambda: plain(torch.float64),
        same_dtype=lambda: plain(s.dtype),
        n_bytes=(2 * n_rows + len(lengths)) * s.channels * prefix.element_size(),
    )


def make_vit(s: Setting) -> nn.Module:
    torch.manual_seed(0)
    vit = timm.models.VisionTransformer(
        img_size=s.grids[0] * s.patch,
        patch_size=s.patch,
        embed_dim=s.channels,
        depth=s.depth,
        num_heads=s.heads,
        dynamic_img_size=True,
    )
    with torch.no_grad():  # so that activations are of order one
        for parameter in vit.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    return vit.to(s.device, s.dtype).eval()


def padded_forward(vit: nn.Module, groups: list[Tensor]) -> Tensor:
    """timm's blocks over all images, padded to the longest with a mask: the usual batch of mixed lengths."""
    tokens = [vit.norm_pre(vit._pos_embed(vit.patch_embed(group))) for group in groups]
    longest = tokens[0].shape[1]
    x = torch.cat([F.pad(t, (0, 0, 0, longest - t.shape[1])) for t in tokens])
    real = torch.cat([torch.arange(longest, device=x.device).expand(len(t), -1) < t.shape[1] for t in tokens])
    mask = real[:, None, None, :].expand(-1, 1, longest, -1)
    for block in vit.blocks:
        x = block(x, attn_mask=mask)
    return vit.forward_head(vit.norm(x))


def whole_model(s: Setting) -> Iterator[Case]:
    vit = make_vit(s)
    model = rf.ReViT.from_timm(vit, grids=s.grids).eval()
    shapes = [(count, 3, g * s.patch, g * s.patch) for count, g in zip(s.counts, s.grids, strict=True)]
    images = [[s.randn(*shape, seed=10 * i + j) for j, shape in enumerate(shapes)] for i in range(s.n_sets)]
    packs = [model.pack([image for group in groups for image in group]) for groups in images]
    n_tokens = sum(s.seqlens)
    wide = s.channels * n_tokens * (2 * 12 * s.channels)  # 12 C² weights a block
    n_flops = s.depth * (wide + 4 * sum(n * n for n in s.seqlens) * s.channels)
    n_flops += 2 * (n_tokens - len(s.seqlens)) * 3 * s.patch**2 * s.channels

    def timm_grouped(vit, groups):
        return torch.cat([vit(group) for group in groups])

    def ours_graph():
        fast = rf.optimize(model)
        return lambda turn: fast(packs[turn % s.n_sets])

    def no_grad(run):
        return lambda turn: torch.no_grad()(run)(turn % s.n_sets)

    def graph_of(forward):
        """Replays one CUDA graph of timm's forward; images are copied into the tensors that it reads."""
        static = [image.clone() for image in images[0]]
        with torch.no_grad():
            forward(vit, static)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = forward(vit, static)

        def run(turn):
            for target, image in zip(static, images[turn % s.n_sets], strict=True):
                target.copy_(image)
            graph.replay()
            return out

        return run

    graphed = {
        "timm grouped by length, graph": lambda: graph_of(timm_grouped),
        "timm padded and masked, graph": lambda: graph_of(padded_forward),
    }

    with torch.no_grad():
        double = copy.deepcopy(vit).double()
        truth = timm_grouped(double, [group.double() for group in images[0]])
        same = timm_grouped(vit, images[0])
    yield Case(
        "Whole model",
        "forward",
        {
            "ours": lambda: no_grad(lambda i: model(packs[i])),
            "ours, graph": ours_graph,
            "timm grouped by length": lambda: no_grad(lambda i: timm_grouped(vit, images[i])),
            "timm padded and masked": lambda: no_grad(lambda i: padded_forward(vit, images[i])),
            **(graphed if s.device.type == "cuda" else {}),
        },
        truth=lambda: (truth,),
        same_dtype=lambda: (same,),
        n_flops=n_flops,
        notes={"launches": lambda: count_launches(model, packs[0])},
    )

    watched = ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "head.weight")
    labels = torch.arange(len(s.seqlens), device=s.device)

    def step(net, forward, inputs):
        """Computes all gradients and returns those of parameters that every candidate has."""
        names, parameters = zip(*net.named_parameters(), strict=True)
        with torch.enable_grad():
            loss = F.cross_entropy(forward(inputs), labels)
            grads = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
        return tuple(grads[name] for name in watched)

    def double_groups():
        return [group.double() for group in images[0]]

    yield Case(
        "Training step",
        "forward and backward",
        {
            "ours": lambda: lambda turn: step(model, model, packs[turn % s.n_sets]),
            "timm grouped by length": lambda: (
                lambda turn: step(vit, lambda groups: timm_grouped(vit, groups), images[turn % s.n_sets])
            ),
            "timm padded and masked": lambda: (
                lambda turn: step(vit, lambda groups: padded_forward(vit, groups), images[turn % s.n_sets])
            ),
        },
        truth=lambda: step(double, lambda groups: timm_grouped(double, groups), double_groups()),
        same_dtype=lambda: step(vit, lambda groups: timm_grouped(vit, groups), images[0]),
        n_flops=3 * n_flops,
    )


def count_launches(model: nn.Module, batch: PackedBatch) -> dict[str, int]:
    """Number of Triton launches of one packed forward, by kernel; no kernel runs."""
    from revit_fast.kernels.launch import record, target_of

    counts: dict[str, int] = {}
    with torch.no_grad(), record(target_of(batch.device)) as launches:
        model(batch)
    for launch in launches:
        name = getattr(launch.kernel, "__name__", None) or launch.kernel.fn.__name__
        counts[name] = counts.get(name, 0) + 1
    return counts


def all_cases(s: Setting) -> Iterator[Case]:
    for build in (attention, layer_norm, embedding, whole_model):
        yield from build(s)
