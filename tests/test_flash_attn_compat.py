"""flash-attn's functions over our op: its signatures and return values, truth, gradients, and what is refused."""

import inspect

import pytest
import torch
from helpers import FLOAT_DTYPES, alike_on_all_devices, check_op, cu_seqlens_of, randn
from torch.utils._python_dispatch import TorchDispatchMode

from revit_fast import flash_attn_compat, reference

# flash_attn/flash_attn_interface.py of flash-attn 2.8.3.
OPTIONS = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
    "deterministic=False, return_attn_probs=False"
)
OFFSETS = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
SIGNATURES = {
    "flash_attn_varlen_func": f"(q, k, v, {OFFSETS}, {OPTIONS}, block_table=None)",
    "flash_attn_varlen_kvpacked_func": f"(q, kv, {OFFSETS}, {OPTIONS})",
    "flash_attn_varlen_qkvpacked_func": f"(qkv, cu_seqlens, max_seqlen, {OPTIONS})",
}

SEQLENS_Q, SEQLENS_K = (5, 0, 20, 9), (9, 3, 20, 4)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature_is_flash_attns(name):
    signature = inspect.signature(getattr(flash_attn_compat, name))
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    assert str(inspect.Signature(bare)) == SIGNATURES[name]


def make(device, heads=(4, 2), dim=40, dtype=torch.float32):
    """q, k, v and the four arguments that describe their sequences, in flash-attn's order."""
    shapes = ((sum(SEQLENS_Q), heads[0]), (sum(SEQLENS_K), heads[1]), (sum(SEQLENS_K), heads[1]))
    q, k, v = (randn(*shape, dim, dtype=dtype, seed=seed).to(device) for seed, shape in enumerate(shapes))
    offsets = [cu_seqlens_of(lengths).to(device) for lengths in (SEQLENS_Q, SEQLENS_K)]
    return q, k, v, *offsets, max(SEQLENS_Q), max(SEQLENS_K)


def truth(q, k, v, grad_out, cu_seqlens_q, cu_seqlens_k, scale, causal):
    """out, lse and the gradients of q, k and v by the reference."""
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out, lse = reference.varlen_attention(*leaves, cu_seqlens_q, cu_seqlens_k, scale=scale, causal=causal)
    return (out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, grad_out))


WIDTHS = [((2, 2), 64, None), ((4, 2), 40, 0.3), ((3, 1), 256, None)]


# The widest head goes without float32, which tests of the op itself cover: sums of 256 products and their rounding say
# nothing about this layer.
@alike_on_all_devices
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("heads", "dim", "scale", "dtype"),
    [(*width, dtype) for width in WIDTHS for dtype in FLOAT_DTYPES if (width[1], dtype) != (256, torch.float32)],
)
def test_matches_reference(device, heads, dim, scale, dtype, causal):
    q, k, v, cu_q, cu_k, max_q, max_k = make(device, heads, dim, dtype)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out, lse, probabilities = flash_attn_compat.flash_attn_varlen_func(
        *leaves, cu_q, cu_k, max_q, max_k, 0.0, scale, causal, deterministic=True, return_attn_probs=True
    )
    assert (lse.shape, lse.dtype) == ((heads[0], sum(SEQLENS_Q)), torch.float32)
    assert probabilities.numel() == 0
    grad_out = randn(*out.shape, dtype=dtype, seed=7).to(device)
    grads = torch.autograd.grad(out, leaves, grad_out)
    ours = (out.detach(), lse.detach(), *grads)
    check_op(ours, truth, *(t.detach() for t in leaves), grad_out, cu_q, cu_k, scale or dim**-0.5, causal)


def test_returns_the_output_alone_by_default(device):
    arguments = make(device)
    out = flash_attn_compat.flash_attn_varlen_func(*arguments)
    with_lse = flash_attn_compat.flash_attn_varlen_func(*arguments, return_attn_probs=True)
    assert torch.equal(out, with_lse[0])


@alike_on_all_devices
def test_packed_forms_equal_the_plain_one(device):
    q, k, v, *sequences = make(device, heads=(2, 2))
    plain, packed = (t.requires_grad_() for t in (k, torch.stack([k, v], dim=1)))
    expected = flash_attn_compat.flash_attn_varlen_func(q, plain, v, *sequences, softmax_scale=0.2, causal=True)
    got = flash_attn_compat.flash_attn_varlen_kvpacked_func(q, packed, *sequences, softmax_scale=0.2, causal=True)
    assert torch.equal(got, expected)
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), plain)
    (got_grad,) = torch.autograd.grad(got.square().sum(), packed)
    assert torch.equal(got_grad[:, 0], expected_grad)

    qkv = torch.stack([k, k, v], dim=1).detach().requires_grad_()
    leaves = [t.detach().requires_grad_() for t in (k, k, v)]
    cu, longest = sequences[1], sequences[3]
    expected = flash_attn_compat.flash_attn_varlen_func(*leaves, cu, cu, longest, longest)
    got = flash_attn_compat.flash_attn_varlen_qkvpacked_func(qkv, cu, longest)
    assert torch.equal(got, expected)
    expected_grads = torch.autograd.grad(expected.square().sum(), leaves)
    (got_grad,) = torch.autograd.grad(got.square().sum(), qkv)
    assert torch.equal(got_grad, torch.stack(expected_grads, dim=1))


class RecordAttention(TorchDispatchMode):
    """Keeps the tensors that the op is called with."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.revit_fast.varlen_attention.default:
            self.inputs = args[:3]
        return function(*args, **(kwargs or {}))


def test_packed_tensors_are_read_in_place(device):
    q, k, v, *sequences = make(device, heads=(2, 2))
    kv, qkv = torch.stack([k, v], dim=1), torch.stack([k, k, v], dim=1)
    with RecordAttention() as record:
        flash_attn_compat.flash_attn_varlen_kvpacked_func(q, kv, *sequences)
    for part, tensor in enumerate(record.inputs[1:]):
        assert (tensor.data_ptr(), tensor.stride()) == (kv[:, part].data_ptr(), kv[:, part].stride())
    with RecordAttention() as record:
        flash_attn_compat.flash_attn_varlen_qkvpacked_func(qkv, sequences[1], sequences[3])
    for part, tensor in enumerate(record.inputs):
        assert (tensor.data_ptr(), tensor.stride()) == (qkv[:, part].data_ptr(), qkv[:, part].stride())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("dropout_p", 0.1, r"dropout_p: only 0\.0 is supported, got 0\.1"),
        ("window_size", (128, 0), r"window_size: only \(-1, -1\) is supported, got \(128, 0\)"),
        ("softcap", 30.0, r"softcap: only 0\.0 is supported, got 30\.0"),
        ("alibi_slopes", torch.ones(2), r"alibi_slopes: only None is supported, got \[2\] torch\.float32 on cpu"),
        ("block_table", torch.zeros(4, 1, dtype=torch.int32), r"block_table: only None is supported, got \[4, 1\]"),
    ],
)
def test_unsupported_arguments_are_refused_by_name(device, name, value, message):
    q, k, v, *sequences = make(device, heads=(2, 2))
    kv, qkv = torch.stack([k, v], dim=1), torch.stack([k, k, v], dim=1)
    with pytest.raises(ValueError, match=message):
        flash_attn_compat.flash_attn_varlen_func(q, k, v, *sequences, **{name: value})
    if name == "block_table":  # the packed functions have none
        return
    with pytest.raises(ValueError, match=message):
        flash_attn_compat.flash_attn_varlen_kvpacked_func(q, kv, *sequences, **{name: value})
    with pytest.raises(ValueError, match=message):
        flash_attn_compat.flash_attn_varlen_qkvpacked_func(qkv, sequences[1], sequences[3], **{name: value})


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("qkv", [1.0], TypeError, r"qkv: expected a tensor \[total, 3, nheads, headdim\]"),
        ("qkv", torch.zeros(4, 3, 16), ValueError, r"qkv: expected shape \[total, 3, nheads, headdim\]"),
        ("qkv", torch.zeros(4, 2, 1, 16), ValueError, r"qkv: expected shape \[total, 3, nheads, headdim\]"),
        ("qkv", torch.zeros(4, 3, 1, 16, dtype=torch.int32), TypeError, "qkv: expected float32"),
        ("qkv", torch.zeros(4, 3, 1, 257), ValueError, "head_dim must be 1 to 256, got 257"),
        ("cu_seqlens", torch.tensor([0, 4]), TypeError, "cu_seqlens: expected int32"),
        (
            "cu_seqlens",
            torch.zeros(2, dtype=torch.int32, device="meta"),
            ValueError,
            r"cu_seqlens: expected a tensor on cpu like qkv, got .* on meta; use cu_seqlens.to\(qkv.device\)",
        ),
    ],
)
def test_bad_qkv_is_named(name, value, error, message):
    good = {"qkv": torch.zeros(4, 3, 1, 16), "cu_seqlens": cu_seqlens_of([4]), "max_seqlen": 4}
    with pytest.raises(error, match=message):
        flash_attn_compat.flash_attn_varlen_qkvpacked_func(**{**good, name: value})


@pytest.mark.parametrize(
    ("kv", "error", "message"),
    [
        (torch.zeros(4, 3, 1, 16), ValueError, r"kv: expected shape \[total, 2, nheads, headdim\]"),
        (torch.zeros(4, 2, 1, 16, dtype=torch.float16), TypeError, "kv: expected torch.float32 like q"),
        (torch.zeros(4, 2, 1, 16, device="meta"), ValueError, "kv: expected a tensor on cpu like q"),
    ],
)
def test_bad_kv_is_named(kv, error, message):
    cu = cu_seqlens_of([4])
    with pytest.raises(error, match=message):
        flash_attn_compat.flash_attn_varlen_kvpacked_func(torch.zeros(4, 1, 16), kv, cu, cu, 4, 4)
