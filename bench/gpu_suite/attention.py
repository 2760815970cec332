"""Attention over packed rows beside other libraries' functions on the same tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.gpu_suite.measure import Bench, Case, Outputs, Run
from bench.gpu_suite.setting import Setting, attentions, models
from bench.gpu_suite.step import Context
from revit_fast import ops, reference

Attend = Callable[[Tensor], Tensor]
"""A function from qkv `[T, 3, H, D]` to `[T, H, D]`."""

FLEX_LENGTH = 197
"""Length at head dimension 64 for which FlexAttention is compiled; that takes seconds, so the others are left out."""


def by_length(s: Setting, rows: Tensor) -> list[Tensor]:
    """Views `[count, L, ...]` of the rows of every length; these rows are contiguous."""
    parts = rows.split([count * n for count, n in s.groups])
    return [part.view(count, n, *rows.shape[1:]) for part, (count, n) in zip(parts, s.groups, strict=True)]


def peers(s: Setting) -> dict[str, Callable[[], Attend]]:
    """name -> builds a function from qkv `[T, 3, H, D]` to `[T, H, D]`."""
    batch = s.pack()
    cu_seqlens, longest = batch.cu_seqlens, max(s.seqlens)

    def ours() -> Attend:
        return lambda qkv: ops.varlen_attention(
            *qkv.unbind(1), cu_seqlens, tiles=batch.tiles, tile_counts=batch.tile_counts
        )

    def flash_attn() -> Attend:
        from flash_attn import flash_attn_varlen_func

        return lambda qkv: flash_attn_varlen_func(*qkv.unbind(1), cu_seqlens, cu_seqlens, longest, longest)

    def torch_varlen() -> Attend:
        from torch.nn.attention.varlen import varlen_attn

        return lambda qkv: varlen_attn(*qkv.unbind(1), cu_seqlens, cu_seqlens, longest, longest)

    def flex() -> Attend:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        lengths = torch.tensor(s.seqlens, device=s.device)
        document = torch.repeat_interleave(torch.arange(len(s.seqlens), device=s.device), lengths)

        def same_document(batch, head, row, column):
            return document[row] == document[column]

        mask = create_block_mask(same_document, None, None, s.n_tokens, s.n_tokens, device=s.device)
        attend = torch.compile(flex_attention, dynamic=False) if s.compiled else flex_attention

        def run(qkv: Tensor) -> Tensor:
            q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in qkv.unbind(1))
            return attend(q, k, v, block_mask=mask)[0].transpose(0, 1)

        return run

    def sdpa(backend: SDPBackend | None) -> Attend:
        def run(qkv: Tensor) -> Tensor:
            groups = (F.scaled_dot_product_attention(*_heads_first(g)).transpose(1, 2) for g in by_length(s, qkv))
            return torch.cat([g.flatten(0, 1) for g in groups])

        return run if backend is None else sdpa_kernel(backend)(run)

    return {
        "ours": ours,
        "flash-attn varlen": flash_attn,
        "torch.nn.attention.varlen": torch_varlen,
        "SDPA by length": partial(sdpa, None),
        "cuDNN SDPA by length": partial(sdpa, SDPBackend.CUDNN_ATTENTION),
        "FlexAttention": flex,
    }


def _heads_first(group: Tensor) -> list[Tensor]:
    return [t.transpose(1, 2) for t in group.unbind(2)]


def case(s: Setting, backward: bool, candidates: dict[str, Callable[[], Attend]]) -> Case:
    """Forward or backward pass; `candidates` build functions from qkv to the output."""
    sets = [s.randn(s.n_tokens, 3, s.heads, s.head_dim, seed=i) for i in range(s.n_sets)]
    grads = [s.randn(s.n_tokens, s.heads, s.head_dim, seed=100 + i) for i in range(s.n_sets)]
    cu_seqlens = s.pack().cu_seqlens
    n_flops = 4 * sum(n * n for n in s.seqlens) * s.channels
    n_bytes = sets[0].nbytes + grads[0].nbytes

    def plain(dtype: torch.dtype) -> Outputs:
        leaf = sets[0].to(dtype).requires_grad_(backward)
        out, _ = reference.varlen_attention(*leaf.unbind(1), cu_seqlens, cu_seqlens, scale=s.head_dim**-0.5)
        return torch.autograd.grad(out, leaf, grads[0].to(dtype)) if backward else (out,)

    def forward_of(build: Callable[[], Attend]) -> Run:
        function = build()
        return lambda turn: function(sets[turn % s.n_sets])

    def backward_of(build: Callable[[], Attend]) -> Run:
        function = build()
        leaves = [qkv.clone().requires_grad_() for qkv in sets]
        outs = [function(leaf) for leaf in leaves]

        def run(turn: int) -> Outputs:
            i = turn % s.n_sets
            return torch.autograd.grad(outs[i], leaves[i], grads[i], retain_graph=True)

        return run

    wrap = backward_of if backward else forward_of
    return Case(
        "Attention",
        f"{s.name}, {'backward' if backward else 'forward'}",
        {name: partial(wrap, build) for name, build in candidates.items()},
        truth=lambda: plain(torch.float64),
        same_dtype=lambda: plain(s.dtype),
        # backward reads qkv, the output and its gradient, and writes the gradient of qkv
        n_bytes=2 * n_bytes if backward else n_bytes,
        n_flops=int(2.5 * n_flops) if backward else n_flops,
        facts={"head_dim": s.head_dim, "seqlens": sorted(set(s.seqlens)), "dtype": str(s.dtype)[6:]},
    )


def cases(device: torch.device) -> Iterator[Callable[[], Case]]:
    """A mix of three lengths first, then every length and head dimension."""
    mix = models(device)[0]
    for s in (mix, *attentions(device)):
        found = peers(s)
        if s.compiled and len(s.groups) == 1 and (s.head_dim, s.seqlens[0]) != (64, FLEX_LENGTH):
            del found["FlexAttention"]
        for backward in (False, True):
            yield partial(case, s, backward, found)


def run(context: Context) -> list[str]:
    """The step."""
    bench = Bench(context)
    bench.measure_ceilings(models(context.device)[0].dtype)
    return bench.run_all(list(cases(context.device)))
