"""flash-attn 2's functions for packed sequences with the same names and arguments, on CPU and GPU.

`import flash_attn` becomes `from revit_fast import flash_attn_compat as flash_attn`. Signatures and semantics are those
of `flash_attn/flash_attn_interface.py` in flash-attn 2.8; `revit_fast.ops.varlen_attention` does the work and also
takes float32 and float64 and any head_dim from 1 to 256.

Differences: features that are not supported (dropout, windows, soft caps, ALiBi, paged keys) raise an error that names
them; the log-sum-exp of a query that sees no key is `-inf`, where flash-attn 2 writes `+inf`; and gradients flow
through the log-sum-exp, where flash-attn drops them.
"""

from __future__ import annotations

from torch import Tensor

from revit_fast.ops import _checks
from revit_fast.ops.attention import varlen_attention

__all__ = ["flash_attn_varlen_func", "flash_attn_varlen_kvpacked_func", "flash_attn_varlen_qkvpacked_func"]


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Attention within every sequence of a pack; differentiable in q, k and v.

    Args:
        q: `[total_q, nheads, headdim]`.
        k: `[total_k, nheads_k, headdim]`; nheads is a multiple of nheads_k, and query head h reads key head
            `h // (nheads // nheads_k)`.
        v: `[total_k, nheads_k, headdim]`.
        cu_seqlens_q: int32 `[batch_size + 1]`, first row of every sequence in q, then the end of the last.
        cu_seqlens_k: the same for k and v.
        max_seqlen_q: a bound on the queries of any sequence.
        max_seqlen_k: a bound on the keys of any sequence.
        dropout_p: must be 0.
        softmax_scale: factor on the scores; by default `headdim ** -0.5`.
        causal: query i of a sequence sees keys up to `i + seqlen_k - seqlen_q` (aligned bottom right).
        window_size: must be (-1, -1).
        softcap: must be 0.
        alibi_slopes: must be None.
        deterministic: accepted; results are deterministic either way.
        return_attn_probs: whether to return the log-sum-exp too.
        block_table: must be None.

    Returns:
        out `[total_q, nheads, headdim]`. With `return_attn_probs` a triple, as in flash-attn: out, softmax_lse
        `[nheads, total_q]` in float32, and an empty tensor in place of the probabilities, which only dropout needs.

    Raises:
        TypeError: for an argument of the wrong type or dtype.
        ValueError: for an argument that is not supported, and for shapes or devices that do not fit together.
    """
    _refuse_unsupported(dropout_p, window_size, softcap, alibi_slopes, block_table)
    out, lse = varlen_attention(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        scale=softmax_scale,
        causal=causal,
        return_lse=True,
    )
    return (out, lse, q.new_empty(0)) if return_attn_probs else out


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """`flash_attn_varlen_func` for keys and values in one tensor, which is read without a copy.

    Args:
        q: `[total_q, nheads, headdim]`.
        kv: `[total_k, 2, nheads_k, headdim]`.
        cu_seqlens_q: see `flash_attn_varlen_func` for this and all later arguments.
        cu_seqlens_k: offsets into kv.
        max_seqlen_q: a bound on the queries of any sequence.
        max_seqlen_k: a bound on the keys of any sequence.
        dropout_p: must be 0.
        softmax_scale: factor on the scores.
        causal: whether the mask is causal.
        window_size: must be (-1, -1).
        softcap: must be 0.
        alibi_slopes: must be None.
        deterministic: accepted.
        return_attn_probs: whether to return the log-sum-exp too.
    """
    _check_packed("kv", kv, 2)
    _checks.check_rows("q", q, "[total_q, nheads, headdim]")
    _checks.check_like("kv", kv, "q", q)
    k, v = kv.unbind(1)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """`flash_attn_varlen_func` for queries, keys and values in one tensor, which is read without a copy.

    Args:
        qkv: `[total, 3, nheads, headdim]`.
        cu_seqlens: int32 `[batch_size + 1]`, offsets into qkv.
        max_seqlen: a bound on the rows of any sequence.
        dropout_p: see `flash_attn_varlen_func` for this and all later arguments; must be 0.
        softmax_scale: factor on the scores.
        causal: whether the mask is causal.
        window_size: must be (-1, -1).
        softcap: must be 0.
        alibi_slopes: must be None.
        deterministic: accepted.
        return_attn_probs: whether to return the log-sum-exp too.
    """
    _check_packed("qkv", qkv, 3)
    _checks.check_cu_seqlens(cu_seqlens, "qkv", qkv)
    q, k, v = qkv.unbind(1)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def _check_packed(name: str, packed: Tensor, n_parts: int) -> None:
    axes = f"[total, {n_parts}, nheads, headdim]"
    _checks.check_rows(name, packed, axes)
    if packed.shape[1] != n_parts:
        raise ValueError(f"{name}: expected shape {axes}, got {_checks.describe(packed)}")


def _refuse_unsupported(dropout_p, window_size, softcap, alibi_slopes, block_table) -> None:
    def refuse(name: str, value: object, legal: str, fix: str):
        raise ValueError(f"{name}: only {legal} is supported, got {value}; {fix}")

    if dropout_p != 0.0:
        refuse("dropout_p", dropout_p, "0.0", "drop attention out of the model, or evaluate with dropout_p=0.0")
    if tuple(window_size) != (-1, -1):
        fix = "use causal=True for a causal mask, or flash-attn for a sliding window"
        refuse("window_size", window_size, "(-1, -1)", fix)
    if softcap != 0.0:
        refuse("softcap", softcap, "0.0", "use flash-attn for capped scores")
    if alibi_slopes is not None:
        refuse("alibi_slopes", _checks.describe(alibi_slopes), "None", "use flash-attn for ALiBi")
    if block_table is not None:
        refuse("block_table", _checks.describe(block_table), "None", "gather the pages into k and v, or use flash-attn")
