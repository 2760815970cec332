"""Work on single rows: norms, activations, rotation, epilogues, whose bound is the rate at which memory is copied."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu_suite.measure import Bench, Case, Outputs, Run
from bench.gpu_suite.setting import Setting, models
from bench.gpu_suite.step import Context
from revit_fast import ops, reference
from revit_fast.packing import cumulative

Function = Callable[..., Outputs]


def elementwise(s: Setting, name: str, function: Function, n_rows_read: int, hidden: int) -> Case:
    """A function of `n_rows_read` tensors `[T, hidden]` and a vector `[hidden]`, as the model runs it and compiled."""
    sets = [[s.randn(s.n_tokens, hidden, seed=10 * i + j) for j in range(n_rows_read)] for i in range(s.n_sets)]
    vector = s.randn(hidden, seed=1000)

    def build(f: Function) -> Run:
        return lambda turn: f(*sets[turn % s.n_sets], vector)

    def plain(dtype: torch.dtype) -> Outputs:
        return function(*(t.to(dtype) for t in (*sets[0], vector)))

    candidates = {"ours": lambda: build(function)}
    if s.compiled and name in COMPILED:
        candidates["torch.compile"] = lambda: build(torch.compile(function, dynamic=False))
    n_bytes = (n_rows_read + 1) * sets[0][0].nbytes
    return _case(s, name, candidates, plain, n_bytes)


def _case(s: Setting, name: str, candidates: dict, plain: Callable[[torch.dtype], Outputs], n_bytes: int) -> Case:
    return Case(
        "Rows",
        f"{s.name}: {name}",
        candidates,
        truth=lambda: plain(torch.float64),
        same_dtype=lambda: plain(s.dtype),
        n_bytes=n_bytes,
        facts={"dtype": str(s.dtype)[6:], "tokens": s.n_tokens},
    )


ELEMENTWISE = {
    "GELU of the hidden rows": (lambda x, _: (F.gelu(x),), 1, 4),
    "GELU (tanh) of the hidden rows": (lambda x, _: (F.gelu(x, approximate="tanh"),), 1, 4),
    "layer scale": (lambda x, gamma: (x * gamma,), 1, 1),
    "residual": (lambda x, y, _: (x + y,), 2, 1),
    "layer scale and residual": (lambda x, y, gamma: (x + y * gamma,), 2, 1),
}
"""name -> (function as the model runs it, tensors read, columns in units of C)."""

COMPILED = ("GELU of the hidden rows", "layer scale and residual")
"""Those that are compiled too; that takes seconds."""


def tal_layer_norm(s: Setting, scaled: bool, residual: bool, backward: bool) -> Case:
    """TAL-LN, alone, after a residual addition, or after layer scale and the addition."""
    batch = s.pack()
    sets = [[s.randn(s.n_tokens, s.channels, seed=10 * i + j) for j in range(4)] for i in range(s.n_sets)]
    weight, bias = (s.randn(len(s.groups), s.channels, seed=i) for i in (1000, 1001))
    gamma = s.randn(s.channels, seed=1002)

    def ours(x, other, weight, bias, gamma) -> Outputs:
        x = x * gamma if scaled else x
        residual_rows = other if residual else None
        out = ops.tal_layer_norm(
            x, weight, bias, batch.cu_seqlens, batch.length_index, residual=residual_rows, tiles=batch.tiles
        )
        return out if residual else (out,)

    def plain(x, other, weight, bias, gamma) -> Outputs:
        x = x * gamma if scaled else x
        total = x + other if residual else x
        groups = total.split([count * n for count, n in s.groups])
        y = torch.cat([F.layer_norm(g, g.shape[1:], weight[i], bias[i], 1e-6) for i, g in enumerate(groups)])
        return (y, total) if residual else (y,)

    def arguments(i: int, dtype: torch.dtype) -> list[Tensor]:
        return [t.to(dtype) for t in (*sets[i][:2], weight, bias, gamma)]

    def forward_of(function: Function) -> Run:
        made = [arguments(i, s.dtype) for i in range(s.n_sets)]
        return lambda turn: function(*made[turn % s.n_sets])

    def gradients(function: Function, i: int, dtype: torch.dtype) -> Callable[[], Outputs]:
        leaves = [t.clone().requires_grad_() for t in arguments(i, dtype)]
        outs = function(*leaves)
        grads = [g.to(dtype) for g in sets[i][2 : 2 + len(outs)]]
        used = leaves[: 4 if residual else 1] if not scaled else leaves
        return lambda: torch.autograd.grad(outs, used, grads, retain_graph=True)

    def backward_of(function: Function) -> Run:
        made = [gradients(function, i, s.dtype) for i in range(s.n_sets)]
        return lambda turn: made[turn % s.n_sets]()

    def truth(dtype: torch.dtype) -> Outputs:
        return gradients(plain, 0, dtype)() if backward else plain(*arguments(0, dtype))

    wrap = backward_of if backward else forward_of
    parts = [*(["layer scale"] if scaled else []), *(["residual"] if residual else []), "TAL-LN"]
    candidates = {"ours": lambda: wrap(ours), "PyTorch by length": lambda: wrap(plain)}
    if s.compiled and scaled:
        candidates["PyTorch by length, torch.compile"] = lambda: wrap(torch.compile(plain, dynamic=False))
    return _case(
        s,
        " + ".join(parts) + (", backward" if backward else ""),
        candidates,
        truth,
        (4 if residual or backward else 2) * sets[0][0].nbytes,
    )


def rotary(s: Setting, half: bool) -> Case:
    """Rotary embedding of the queries and keys of one product."""
    shape = s.n_tokens, 3, s.heads, s.head_dim
    sets = [s.randn(*shape, seed=i).unbind(1)[:2] for i in range(s.n_sets)]
    angle = s.randn(s.n_tokens, 1, s.head_dim // 2, seed=60).float()
    cos, sin = angle.cos(), angle.sin()

    def build(function: Function) -> Run:
        return lambda turn: function(*sets[turn % s.n_sets], cos, sin)

    def plain(dtype: torch.dtype) -> Outputs:
        wide = torch.promote_types(dtype, torch.float32)
        return reference.rotary(*(t.to(dtype) for t in sets[0]), cos.to(wide), sin.to(wide), half)

    as_ops = partial(reference.rotary, half=half)
    candidates = {"ours": lambda: build(partial(ops.rotary, half=half)), "PyTorch": lambda: build(as_ops)}
    if s.compiled and half:
        candidates["torch.compile"] = lambda: build(torch.compile(as_ops, dynamic=False))
    n_bytes = 2 * sum(t.nbytes for t in sets[0]) + cos.nbytes + sin.nbytes
    return _case(s, f"rotary, {'half' if half else 'interleaved'}", candidates, plain, n_bytes)


def embedding(s: Setting) -> Case:
    """Positions and prefix tokens of embedded patches."""
    lengths = [n - 1 for n in s.seqlens]
    n_rows, positions = sum(lengths), [n - 1 for _, n in s.groups]
    sets = [s.randn(n_rows, s.channels, seed=i) for i in range(s.n_sets)]
    prefix, table = s.randn(1, s.channels, seed=50), s.randn(sum(positions), s.channels, seed=51)
    cu_seqlens = cumulative(lengths).to(s.device)
    offsets = [sum(positions[:i]) for i, (count, _) in enumerate(s.groups) for _ in range(count)]
    pos_offset = torch.tensor(offsets, dtype=torch.int32, device=s.device)
    position = torch.cat([torch.arange(o, o + n) for o, n in zip(offsets, lengths, strict=True)]).to(s.device)
    starts = cumulative(s.seqlens)[:-1].long()
    target = torch.cat([torch.arange(b + 1, b + 1 + n) for b, n in zip(starts.tolist(), lengths, strict=True)])
    target, starts = target.to(s.device), starts.to(s.device)

    def gather(turn: int) -> Tensor:
        out = prefix.new_empty(s.n_tokens, s.channels)
        out.index_copy_(0, starts, prefix.expand(len(starts), -1))
        return out.index_copy_(0, target, sets[turn % s.n_sets] + table[position])

    def ours(turn: int) -> Tensor:
        return ops.assemble_tokens(sets[turn % s.n_sets], prefix, table, pos_offset, cu_seqlens)

    def plain(dtype: torch.dtype) -> Outputs:
        return (reference.assemble_tokens(*(t.to(dtype) for t in (sets[0], prefix, table)), pos_offset, cu_seqlens),)

    return _case(
        s,
        "positions and prefix tokens",
        {"ours": lambda: ours, "gather, add, index_copy": lambda: gather},
        plain,
        (n_rows + s.n_tokens) * s.channels * prefix.element_size(),
    )


def cases_of(s: Setting) -> Iterator[Callable[[], Case]]:
    """Every case at one size."""
    for scaled, residual, backward in ((0, 0, 0), (0, 1, 0), (1, 1, 0), (0, 1, 1)):
        yield partial(tal_layer_norm, s, bool(scaled), bool(residual), bool(backward))
    for name, (function, n_rows_read, width) in ELEMENTWISE.items():
        yield partial(elementwise, s, name, function, n_rows_read, width * s.channels)
    for half in (True, False):
        yield partial(rotary, s, half)
    yield partial(embedding, s)


def cases(device: torch.device) -> Iterator[Callable[[], Case]]:
    """Every case at the smallest and the largest model."""
    found = models(device)
    for s in dict.fromkeys((found[0], found[-1])):
        yield from cases_of(s)


def run(context: Context) -> list[str]:
    """The step."""
    bench = Bench(context)
    bench.measure_ceilings(models(context.device)[0].dtype)
    return bench.run_all(list(cases(context.device)))
