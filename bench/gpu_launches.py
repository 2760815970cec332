"""Lists every launch whose machine code is compiled, for chips that need not be present.

The library's own launchers run on fake tensors, and their launches are recorded. A `Case` is one call of an op and has
one launch or more per target. Calls of different lengths often ask the compiler for the same code; such launches are
listed once.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from triton import knobs

from bench.machine_code import Code, code_of
from revit_fast.kernels.launch import TARGETS, Launch, Target, record
from revit_fast.ops import _triton
from revit_fast.packing import work_list

HEAD_DIMS = (64, 80, 128)
CHANNELS = (192, 384, 768)
SEQLENS = (32, 50, 101, 145, 197, 256, 577)
"""One sequence length for each class of tiles with rows in the work list."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

N_HEADS = 6
N_LENGTHS = 3


@dataclass(frozen=True)
class Case:
    """One call of an op.

    Attributes:
        op: "attention", "layer_norm", "patch_embed", "mean_pool" or "rotary".
        direction: "fwd" or "bwd".
        dtype: dtype of the rows, a key of `DTYPES`.
        size: head dimension, or channels.
        seqlen: length of the one sequence.
        variant: "", or one of "causal", "grouped" (fewer heads of keys), "derived" (no work list), "residual",
            "fp32 weights", "rms" (no bias), "interleaved" (a pair is two neighbours), "learned" (angles of each head).
    """

    op: str
    direction: str
    dtype: str
    size: int
    seqlen: int = 197
    variant: str = ""

    def __str__(self) -> str:
        variant = f"-{self.variant.replace(' ', '_')}" if self.variant else ""
        return f"{self.op}-{self.direction}-{self.dtype}-{self.size}-L{self.seqlen}{variant}"

    def call(self) -> tuple[str, tuple[Any, ...]]:
        """Returns the op's name and its arguments, for one sequence and 64 padding rows.

        The caller enters `FakeTensorMode` first.
        """
        return _CALLS[self.op](self)

    def launches(self, target: Target) -> list[Launch]:
        """The launches that the op's launcher makes on `target`."""
        with FakeTensorMode(), record(target) as launches:
            name, arguments = self.call()
            getattr(_triton.load(_triton.KERNELS[name]), name)(*arguments)
        return launches


def _empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="cuda")


def _attention_call(case: Case) -> tuple[str, tuple[Any, ...]]:
    dtype, n_rows = DTYPES[case.dtype], case.seqlen + 64
    qkv = _empty(n_rows, 3, N_HEADS, case.size, dtype=dtype)  # views of one product, as in the model
    q, k, v = qkv.unbind(1)
    if case.variant == "grouped":
        k, v = k[:, :2], v[:, :2]
    work = work_list([case.seqlen], n_padding=64)
    tiles = None if case.variant == "derived" else _empty(*work.tiles.shape)
    counts = [] if tiles is None else list(work.counts)
    cu_seqlens = _empty(2)
    sequences = (cu_seqlens, cu_seqlens, case.seqlen, case.seqlen, case.size**-0.5, case.variant == "causal")
    if case.direction == "fwd":
        return "varlen_attention", (q, k, v, *sequences, tiles, counts)
    out, grad_out = (_empty(n_rows, N_HEADS, case.size, dtype=dtype) for _ in range(2))
    lse = _empty(N_HEADS, n_rows, dtype=torch.float32)
    return "varlen_attention_backward", (grad_out, None, q, k, v, out, lse, *sequences, tiles, counts)


def _layer_norm_call(case: Case) -> tuple[str, tuple[Any, ...]]:
    dtype, n_rows = DTYPES[case.dtype], case.seqlen + 64
    weight_dtype = torch.float32 if case.variant == "fp32 weights" else dtype
    x, other = (_empty(n_rows, case.size, dtype=dtype) for _ in range(2))
    weight, bias = (_empty(N_LENGTHS, case.size, dtype=weight_dtype) for _ in range(2))
    bias = None if case.variant == "rms" else bias
    pack = (_empty(2), _empty(1))
    if case.direction == "fwd":
        rows = (x, other) if case.variant == "residual" else (x,)
        name = "tal_layer_norm_residual" if case.variant == "residual" else "tal_layer_norm"
        return name, (*rows, weight, bias, *pack, 1e-6, None)
    mean, rstd = (_empty(n_rows, dtype=torch.float32) for _ in range(2))
    mean = None if case.variant == "rms" else mean
    grad_sum = torch.empty_like(x) if case.variant == "residual" else None
    return "tal_layer_norm_backward", (other, grad_sum, x, weight, mean, rstd, *pack, None)


def _patch_embed_call(case: Case) -> tuple[str, tuple[Any, ...]]:
    dtype, n_rows = DTYPES[case.dtype], case.seqlen + 64
    pos_table = _empty(345, case.size, dtype=dtype)
    if case.direction == "fwd":
        patches, prefix = _empty(n_rows, case.size, dtype=dtype), _empty(1, case.size, dtype=dtype)
        return "assemble_tokens", (patches, prefix, pos_table, _empty(1), _empty(2))
    grad_tokens = _empty(n_rows + 1, case.size, dtype=dtype)
    return "assemble_tokens_backward", (grad_tokens, pos_table, _empty(1), _empty(2), 1)


def _mean_pool_call(case: Case) -> tuple[str, tuple[Any, ...]]:
    dtype, n_rows = DTYPES[case.dtype], case.seqlen + 64
    if case.direction == "fwd":
        return "mean_pool", (_empty(n_rows, case.size, dtype=dtype), _empty(2), 1)
    return "mean_pool_backward", (_empty(1, case.size, dtype=dtype), _empty(2), 1, n_rows)


def _rotary_call(case: Case) -> tuple[str, tuple[Any, ...]]:
    dtype, n_rows = DTYPES[case.dtype], case.seqlen + 64
    if case.direction == "fwd":
        q, k, _ = _empty(n_rows, 3, N_HEADS, case.size, dtype=dtype).unbind(1)
    else:
        q, k = (_empty(n_rows, N_HEADS, case.size, dtype=dtype) for _ in range(2))
    n_angles = N_HEADS if case.variant == "learned" else 1
    cos, sin = (_empty(n_rows, n_angles, case.size // 2, dtype=torch.float32) for _ in range(2))
    return "rotary", (q, k, cos, sin, case.variant != "interleaved", case.direction == "bwd")


_CALLS: dict[str, Callable[[Case], tuple[str, tuple[Any, ...]]]] = {
    "attention": _attention_call,
    "layer_norm": _layer_norm_call,
    "patch_embed": _patch_embed_call,
    "mean_pool": _mean_pool_call,
    "rotary": _rotary_call,
}


@lru_cache
def cases() -> tuple[Case, ...]:
    """All cases, in a fixed order."""
    directions = ("fwd", "bwd")
    found = [Case("attention", *rest) for rest in product(directions, DTYPES, HEAD_DIMS, SEQLENS)]
    variants = [("causal", 50), ("causal", 197), ("causal", 577), ("grouped", 197), ("derived", 197)]
    for direction, dtype, (variant, seqlen) in product(directions, DTYPES, variants):
        found.append(Case("attention", direction, dtype, 64, seqlen, variant))
    for direction, dtype, size in product(directions, DTYPES, CHANNELS):
        rows = Case("layer_norm", direction, dtype, size)
        found += [rows, replace(rows, variant="residual"), replace(rows, variant="rms")]
        found += [replace(rows, variant="fp32 weights")] if dtype != "fp32" else []
        found += [Case(op, direction, dtype, size) for op in ("patch_embed", "mean_pool")]
    for direction, dtype, size in product(directions, DTYPES, HEAD_DIMS):
        found += [Case("rotary", direction, dtype, size, variant=v) for v in ("", "interleaved", "learned")]
    return tuple(found)


@dataclass(frozen=True)
class Compilation:
    """One launch of a case on a target. It can be pickled; a `Launch` cannot."""

    case: Case
    target: str
    index: int
    kernel: str

    def __str__(self) -> str:
        return f"{self.target}-{self.case}-{self.index}-{self.kernel.removesuffix('_kernel')}"

    @property
    def launch(self) -> Launch:
        """The launch, recorded again in this process."""
        return _launches(self.case, self.target)[self.index]

    def compile(self) -> Code:
        """Compiles the launch and reads its machine code."""
        return code_of(self.launch, TARGETS[self.target])


@lru_cache(maxsize=4096)
def _launches(case: Case, target: str) -> list[Launch]:
    return case.launches(TARGETS[target])


def asked_of_compiler(launch: Launch) -> tuple[Any, ...]:
    """Everything of a launch that the compiler sees: launches with equal keys have the same machine code."""
    arguments = tuple(
        (name, a.dtype, a.storage_offset() * a.element_size() % 16 == 0)
        if isinstance(a, torch.Tensor)
        else (name, a if a is None else type(a))
        for name, a in launch.arguments.items()
    )
    specialised = tuple(
        (a == 1, a % 16 == 0) if type(a) is int and not p.do_not_specialize else None
        for p, a in zip(launch.kernel.params, launch.arguments.values(), strict=False)
    )
    constants = tuple((name, str(value)) for name, value in launch.constants.items())
    return (launch.kernel.__name__, arguments, specialised, constants, launch.num_warps, launch.num_stages)


def compilations(of: Iterable[Case], targets: Iterable[str] = TARGETS) -> list[Compilation]:
    """The launches of some cases, each once."""
    found: dict[Any, Compilation] = {}
    for target, case in product(targets, of):
        for index, launch in enumerate(_launches(case, target)):
            key = (target, asked_of_compiler(launch))
            found.setdefault(key, Compilation(case, target, index, launch.kernel.__name__))
    return list(found.values())


def schedule_of(launch: Launch) -> str:
    """ "short", "streaming", "short, streaming" or "fused" for attention's kernels, "" for others."""
    name, constants = launch.kernel.__name__, launch.constants
    if "FIRST_CLASS" not in constants:
        return ""
    if "fused" in name:
        return "fused"
    if "KEY_BLOCKS" in constants:
        parts = {"short": constants["KEY_BLOCKS"], "streaming": constants["STREAMING"]}
        return ", ".join(schedule for schedule, part in parts.items() if part)
    return "short" if constants.get("KEY_PARTS") is not None else "streaming"


def pool(jobs: int | None = None, prepare: Callable[[], None] | None = None) -> ProcessPoolExecutor:
    """A pool of compiler processes, by default one per core; each calls `prepare` first."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(jobs or os.cpu_count(), mp_context=context, initializer=prepare)


def submit(pool: ProcessPoolExecutor, of: Iterable[Compilation]) -> dict[Compilation, Future[Code]]:
    """Starts to compile and returns a future for each result."""
    return {compilation: pool.submit(Compilation.compile, compilation) for compilation in of}


def assemblers() -> str:
    """Names and versions of the assemblers that Triton calls for NVIDIA's chips."""
    tools = {"ptxas": knobs.nvidia.ptxas, "ptxas for sm_100 and later": knobs.nvidia.ptxas_blackwell}
    return ", ".join(f"{name} {tool.version}" for name, tool in tools.items())
