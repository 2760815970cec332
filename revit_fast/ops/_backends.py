"""Selects the kernels that compute attention on CUDA tensors: ours in Triton, those of flash-attn or of PyTorch.

The op's CUDA implementation reads the choice at every call, so compiled graphs do not depend on it. It is one variable
of the process and not a context variable, because autograd runs CUDA backward passes on its own threads, which do not
see the caller's context. PyTorch's own `sdpa_kernel` sets process-wide flags too.

Only the public functions of flash-attn and PyTorch are called. Their backward entry points are private, have changed
their arguments from release to release, and take the log-sum-exp in layouts that differ with version, GPU and vendor.
The backward pass therefore runs the public function again and differentiates it: this takes nine matrix products
instead of seven in a training step, but no release can change the gradients unnoticed.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import re
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.nn import functional as F

from revit_fast.kernels.constants import KEY_CLASSES, PADDING, STREAMING

OLDEST_TRITON = (3, 6)

# Earlier releases pad lse per sequence, later ones are other packages. The releases between return [nheads, total_q].
OLDEST_FLASH_ATTN, FLASH_ATTN_END = (2, 7), (3,)


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def require_triton() -> None:
    """Raises an ImportError that names the fix if Triton is missing or older than the kernels need."""
    oldest = ".".join(map(str, OLDEST_TRITON))
    fix = f'pip install "triton>={oldest}" (Windows: triton-windows), or move to the CPU'
    try:
        import triton
    except ImportError as error:
        raise ImportError(f"revit_fast's GPU kernels need Triton, which cannot be imported ({error}): {fix}") from error
    if _release(triton.__version__) < OLDEST_TRITON:
        raise ImportError(f"revit_fast's GPU kernels do not run on Triton {triton.__version__}: {fix}")


def _require_flash_attn() -> None:
    oldest = ".".join(map(str, OLDEST_FLASH_ATTN))
    fix = f'pip install --no-build-isolation "flash-attn>={oldest},<{FLASH_ATTN_END[0]}"'
    try:
        import flash_attn
    except ImportError as error:
        raise ImportError(f'attention backend "flash_attn": flash_attn cannot be imported ({error}): {fix}') from error
    version = getattr(flash_attn, "__version__", "of unknown version")
    served = OLDEST_FLASH_ATTN <= _release(version) < FLASH_ATTN_END
    if not served or not hasattr(flash_attn, "flash_attn_varlen_func"):
        raise ImportError(f'attention backend "flash_attn": flash_attn {version} is not supported: {fix}')


def _require_torch_varlen() -> None:
    try:
        from torch.nn.attention.varlen import AuxRequest, varlen_attn  # noqa: F401

        missing = {"scale", "window_size", "return_aux"} - inspect.signature(varlen_attn).parameters.keys()
    except ImportError:
        missing = {"varlen_attn"}
    if missing:
        raise ImportError(
            f'attention backend "torch": torch {torch.__version__} has no {", ".join(sorted(missing))} in '
            'torch.nn.attention.varlen: pip install "torch>=2.11"'
        )


_REQUIREMENTS = {"triton": require_triton, "flash_attn": _require_flash_attn, "torch": _require_torch_varlen}

_selected = "triton"


def set_attention_backend(name: str) -> AbstractContextManager[None]:
    """Selects the kernels that compute attention on CUDA tensors; by default "triton".

    It takes effect at once, for the whole process and all its threads. The returned context manager may be used in a
    `with` statement, which restores the previous backend at its end::

        with rf.set_attention_backend("torch"):
            loss = model(batch).sum()
            loss.backward()  # the backward pass uses the backend selected when it runs

    CPU tensors always use the C++ kernels, and float64 tensors the PyTorch reference. All backends keep the pack
    contract for padding and empty sequences, but only "triton" gives an image the same bits in every pack. "flash_attn"
    and "torch" compute in float16 and bfloat16, have no gradient of the log-sum-exp, and repeat the forward pass in the
    backward pass. Calls that they do not support raise an error that says so; no other backend runs silently instead.
    If neither `max_seqlen` nor a work list bounds the lengths, they launch for one sequence of all rows. Call this
    function outside compiled functions; they use the new backend without recompilation.

    Args:
        name: "triton", our kernels; "flash_attn", `flash_attn.flash_attn_varlen_func` of flash-attn 2.7 and later 2.x;
            "torch", `torch.nn.attention.varlen.varlen_attn` of torch 2.11 and later.

    Returns:
        A context manager that restores, at its end, the backend selected before this call.

    Raises:
        ValueError: for another name.
        ImportError: if the backend is not installed or too old; the message names the fix.
    """
    if name not in _REQUIREMENTS:
        raise ValueError(f"name: expected one of {', '.join(map(repr, _REQUIREMENTS))}, got {name!r}")
    _REQUIREMENTS[name]()
    former = _selected
    _select(name)
    return _restored(former)


def _select(name: str) -> None:
    global _selected
    _selected = name


@contextlib.contextmanager
def _restored(name: str):
    try:
        yield
    finally:
        _select(name)


def selected_implementation(op: str) -> Callable | None:
    """The function that replaces our Triton kernel for the op of this name; None if our kernel is used."""
    if _selected == "triton" or op not in _IMPLEMENTATIONS:
        return None
    return functools.partial(_IMPLEMENTATIONS[op], _selected)


def _flash_attn(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, causal):
    from flash_attn import flash_attn_varlen_func

    out, lse, _ = flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        softmax_scale=scale,
        causal=causal,
        deterministic=True,
        return_attn_probs=True,
    )
    return out, lse


def _torch_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, causal):
    from torch.nn.attention import varlen

    # torch 2.11 accepts fewer key heads without this option.
    grouped = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters else {}
    return varlen.varlen_attn(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        return_aux=varlen.AuxRequest(lse=True),
        scale=scale,
        window_size=(-1, 0) if causal else (-1, -1),
        **(grouped if q.shape[1] != k.shape[1] else {}),
    )


_FUNCTIONS = {"flash_attn": _flash_attn, "torch": _torch_varlen}


def _attend(backend, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, causal, tile_counts):
    """The backend's out `[Tq, Hq, D]` and lse `[Hq, Tq]`, unspecified for rows that see no key; differentiable in out.

    Converts every request of the op to the form that the backends accept.
    """
    head_dim = q.shape[2]
    if scale <= 0:  # the backends keep a running maximum of the unscaled scores
        q, scale = (-q, -scale) if scale < 0 else (q * 0, 1.0)
    q, k, v = (_vectorizable(t) for t in (q, k, v))
    longest = _longest(tile_counts) if cu_seqlens_k is cu_seqlens_q else None
    max_seqlen_q = next(n for n in (max_seqlen_q, longest, q.shape[0]) if n is not None)
    max_seqlen_k = next(n for n in (max_seqlen_k, longest, k.shape[0]) if n is not None)
    # With one query per sequence flash-attn regroups the rows by heads and then treats every row as a sequence.
    max_seqlen_q, max_seqlen_k = max(max_seqlen_q, 2), max(max_seqlen_k, 2)
    options = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, causal)
    out, lse = _FUNCTIONS[backend](q, k, v, *options)
    if lse.shape != (q.shape[1], q.shape[0]):  # PyTorch pads lse on some ROCm builds
        raise RuntimeError(
            f'attention backend "{backend}": expected lse of shape [{q.shape[1]}, {q.shape[0]}] (heads, rows), got '
            f'{list(lse.shape)}; use set_attention_backend("triton") with this version'
        )
    return out[..., :head_dim], lse


def _longest(tile_counts) -> int | None:
    """A bound on the keys of any sequence from the classes of a work list; None if they give none."""
    classes = [i for i, n_tiles in enumerate(tile_counts[:PADDING]) if n_tiles]
    return KEY_CLASSES[classes[-1]] if classes and classes[-1] < STREAMING else None


def _vectorizable(t: Tensor) -> Tensor:
    """`t` with a head_dim that is a multiple of 8 and every row on a 16-byte boundary, as 128-bit loads need.

    Zeros after the head dimension change no score; the outputs there are zero and are cut off.
    """
    if t.shape[2] % 8:
        return F.pad(t, (0, -t.shape[2] % 8))
    aligned = t.stride(2) == 1 and not any(s % 8 for s in (*t.stride()[:2], t.storage_offset()))
    return t if aligned else t.clone(memory_format=torch.contiguous_format)


def _check_dtype(backend: str, q: Tensor) -> None:
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise TypeError(
            f'q: the attention backend "{backend}" computes in float16 and bfloat16, got {q.dtype}; '
            'use q.bfloat16() or set_attention_backend("triton")'
        )


def _is_empty(q: Tensor, k: Tensor, cu_seqlens: Tensor) -> bool:
    return not q.shape[0] or not k.shape[0] or cu_seqlens.shape[0] == 1


def _all_rows_matter(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, tile_counts) -> bool:
    """Whether the host knows that every row is part of a sequence with keys, as in self-attention without padding."""
    return cu_seqlens_k is cu_seqlens_q and len(tile_counts) > PADDING and not tile_counts[PADDING]


def _left_out(cu_seqlens: Tensor, cu_seqlens_other: Tensor, n_rows: int, causal: bool = False) -> Tensor:
    """Rows without a partner on the other side: padding, or in a sequence that has none (`causal`: none that they see).

    Args:
        cu_seqlens: offsets of the rows to check.
        cu_seqlens_other: offsets of the keys, for queries; of the queries, for keys.
        n_rows: number of all rows.
        causal: whether query i sees keys up to i + Lk - Lq only.

    Returns:
        bool `[n_rows]`, computed on the device.
    """
    rows = torch.arange(n_rows, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    ends = cu_seqlens[1:]
    sequence = torch.searchsorted(ends, rows, right=True)  # padding rows get one past the last
    n_other = F.pad(cu_seqlens_other.diff(), (0, 1))[sequence]
    # The last row of a sequence sees all keys, the one before it all but one, and so on.
    n_needed = F.pad(ends, (0, 1), value=n_rows)[sequence] - rows if causal else 1
    return n_other < n_needed


def _forward(
    backend,
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    scale,
    causal,
    tiles,
    tile_counts,
):
    _check_dtype(backend, q)
    if _is_empty(q, k, cu_seqlens_q):
        return q.new_zeros(q.shape), q.new_full((q.shape[1], q.shape[0]), -math.inf, dtype=torch.float32)
    with torch.no_grad():
        options = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, causal, tile_counts)
        out, lse = _attend(backend, q, k, v, *options)
        if not _all_rows_matter(cu_seqlens_q, cu_seqlens_k, tile_counts):
            blind = _left_out(cu_seqlens_q, cu_seqlens_k, q.shape[0], causal)
            out, lse = out.masked_fill(blind[:, None, None], 0), lse.masked_fill(blind, -math.inf)
        return out.contiguous(), lse.contiguous()


def _backward(
    backend,
    grad_out,
    grad_lse,
    q,
    k,
    v,
    out,
    lse,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    scale,
    causal,
    tiles,
    tile_counts,
):
    _check_dtype(backend, q)
    if grad_lse is not None:
        raise ValueError(
            f'return_lse: the attention backend "{backend}" has no gradient of lse, and one is asked for; '
            'use lse.detach() or run the backward pass under set_attention_backend("triton")'
        )
    if _is_empty(q, k, cu_seqlens_q):
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    options = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, causal, tile_counts)
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        again, _ = _attend(backend, *leaves, *options)
    grad_q, grad_k, grad_v = torch.autograd.grad(again, leaves, grad_out)
    if not _all_rows_matter(cu_seqlens_q, cu_seqlens_k, tile_counts):
        blind = _left_out(cu_seqlens_q, cu_seqlens_k, q.shape[0], causal)[:, None, None]
        unseen = _left_out(cu_seqlens_k, cu_seqlens_q, k.shape[0])[:, None, None]
        grad_q, grad_k, grad_v = (
            grad.masked_fill(rows, 0) for grad, rows in ((grad_q, blind), (grad_k, unseen), (grad_v, unseen))
        )
    return grad_q.contiguous(), grad_k.contiguous(), grad_v.contiguous()


_IMPLEMENTATIONS = {"varlen_attention": _forward, "varlen_attention_backward": _backward}
