"""Packed attention on the DeiT-S mix (4x197, 6x101, 6x50 tokens, 6 heads, D=64) against what PyTorch offers."""

import pytest
import torch
from conftest import Comparison
from torch.nn import functional as F

from bench.model_work import relative_error
from revit_fast import ops, reference
from revit_fast.packing import cumulative, work_list

GROUPS = ((4, 197), (6, 101), (6, 50))
SEQLENS = [n for count, n in GROUPS for _ in range(count)]
HEADS, HEAD_DIM = 6, 64
N_SETS = 4
CU_SEQLENS, WORK = cumulative(SEQLENS), work_list(SEQLENS)


def by_length(rows):
    """Views `[count, L, ...]` of the rows of every length: the mix is sorted, so grouping it costs the peer nothing."""
    parts = rows.split([count * n for count, n in GROUPS])
    return [part.view(count, n, *rows.shape[1:]) for part, (count, n) in zip(parts, GROUPS, strict=True)]


def heads_first(group):
    return [t.transpose(1, 2) for t in group.unbind(2)]


def make_inputs(dtype):
    generator = torch.Generator().manual_seed(0)
    shape = (sum(SEQLENS), 3, HEADS, HEAD_DIM)
    return [torch.randn(*shape, generator=generator).to(dtype) for _ in range(N_SETS)]


def packed(qkv):
    return ops.varlen_attention(*qkv.unbind(1), CU_SEQLENS, tiles=WORK.tiles, tile_counts=WORK.counts)


def grouped_sdpa(qkv):
    out = torch.empty_like(qkv[:, 0])
    for group, target in zip(by_length(qkv), by_length(out), strict=True):
        target.copy_(F.scaled_dot_product_attention(*heads_first(group)).transpose(1, 2))
    return out


def flex_attention_over_documents():
    """Compiled FlexAttention with its block mask built beforehand, as a model would share it among its layers."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    n_rows = sum(SEQLENS)
    document = torch.repeat_interleave(torch.arange(len(SEQLENS)), torch.tensor(SEQLENS))

    def same_document(batch, head, row, column):
        return document[row] == document[column]

    mask = create_block_mask(same_document, None, None, n_rows, n_rows, device="cpu")
    compiled = torch.compile(flex_attention)

    def run(qkv):
        q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in qkv.unbind(1))
        return compiled(q, k, v, block_mask=mask)[0].transpose(0, 1)

    return run


def forward_comparison(dtype, tolerance, peers):
    sets = make_inputs(dtype)
    q, k, v = sets[0].double().unbind(1)
    truth, _ = reference.varlen_attention(q, k, v, CU_SEQLENS, CU_SEQLENS, scale=HEAD_DIM**-0.5)

    def check(name, out):
        error = relative_error(out, truth)
        assert error <= tolerance, f"{name}: error {error:.2e}"
        return error

    def on_sets(function):
        def run(turn):
            with torch.no_grad():
                return function(sets[turn % N_SETS])

        return run

    candidates = {name: on_sets(function) for name, function in {"ours": packed, **peers}.items()}
    return Comparison("attention", "forward", candidates, check, str(dtype).removeprefix("torch."))


def build_forward():
    peers = {
        "SDPA grouped by length": grouped_sdpa,
        "compiled FlexAttention": flex_attention_over_documents(),
    }
    return forward_comparison(torch.float32, 3e-6, peers)


def build_forward_bfloat16():
    return forward_comparison(torch.bfloat16, 2**-7, {"SDPA grouped by length": grouped_sdpa})


def build_backward():
    """Backward alone: graphs are recorded beforehand and kept."""
    sets = make_inputs(torch.float32)
    grads_out = [torch.randn(sum(SEQLENS), HEADS, HEAD_DIM) for _ in range(N_SETS)]

    def record(qkv):
        leaf = qkv.clone().requires_grad_()
        return [(packed(leaf), leaf)], [
            (F.scaled_dot_product_attention(*parts).transpose(1, 2), parts)
            for parts in ([t.detach().requires_grad_() for t in heads_first(group)] for group in by_length(qkv))
        ]

    graphs = [record(qkv) for qkv in sets]

    def ours(turn):
        ((out, leaf),) = graphs[turn % N_SETS][0]
        return torch.autograd.grad(out, leaf, grads_out[turn % N_SETS], retain_graph=True)[0]

    def grouped(turn):
        grads = zip(graphs[turn % N_SETS][1], by_length(grads_out[turn % N_SETS]), strict=True)
        return [torch.autograd.grad(out, parts, grad, retain_graph=True) for (out, parts), grad in grads]

    leaf = sets[0].double().requires_grad_()
    out, _ = reference.varlen_attention(*leaf.unbind(1), CU_SEQLENS, CU_SEQLENS, scale=HEAD_DIM**-0.5)
    (truth,) = torch.autograd.grad(out, leaf, grads_out[0].double())

    def check(name, grads):
        if name != "ours":
            stacked = [torch.stack([t.transpose(1, 2) for t in group], 2).flatten(0, 1) for group in grads]
            grads = torch.cat(stacked)
        error = relative_error(grads, truth)
        assert error <= 1e-5, f"{name}: error {error:.2e}"
        return error

    return Comparison("attention", "backward", {"ours": ours, "SDPA grouped by length": grouped}, check, "float32")


@pytest.mark.parametrize("candidate", ["ours", "SDPA grouped by length", "compiled FlexAttention"])
def test_forward(replay, candidate):
    replay(build_forward, candidate)


@pytest.mark.parametrize("candidate", ["ours", "SDPA grouped by length"])
def test_forward_bfloat16(replay, candidate):
    replay(build_forward_bfloat16, candidate)


@pytest.mark.parametrize("candidate", ["ours", "SDPA grouped by length"])
def test_backward(replay, candidate):
    replay(build_backward, candidate)
