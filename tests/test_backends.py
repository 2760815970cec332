"""The choice of attention kernels on CUDA, what each needs installed, and an import that needs none of them.

The other projects' kernels need a GPU. Stand-ins take their place, behind the dispatch that a GPU's tensors meet: they
compute with the reference and leave memory as those kernels leave it. PyTorch's own function is met with fake tensors.
"""

import contextlib
import sys
import threading
import types

import helpers
import pytest
import torch
from helpers import check_op, cu_seqlens_of, randn
from test_library import run_python
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import varlen

import revit_fast as rf
from revit_fast import ops, reference
from revit_fast.kernels import launch
from revit_fast.ops import _backends, _library, _triton
from revit_fast.packing import work_list

needs_extension = pytest.mark.skipif(not _library.HAS_EXTENSION, reason="the extension is not built")

# Queries and keys of each sequence: none on either side, one, and fewer or more keys than queries.
CROSS_MIX = ((5, 9), (0, 3), (4, 0), (1, 1), (30, 7), (7, 40))
BACKENDS = ("flash_attn", "torch")


class StandIn(torch.autograd.Function):
    """Attention as both projects' kernels leave it.

    Rows of no sequence keep what the memory held; lse is +inf where no key is seen; the gradient of lse is dropped.
    """

    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens_q, cu_seqlens_k, scale, causal):
        for t in (q, k, v):
            assert t.dtype in (torch.float16, torch.bfloat16)
            assert t.shape[2] % 8 == 0
            assert t.stride(2) == 1
            assert not any(s % 8 for s in t.stride()[:2])
        assert cu_seqlens_q.is_contiguous()
        assert cu_seqlens_k.is_contiguous()
        assert scale > 0
        ctx.save_for_backward(q, k, v, cu_seqlens_q, cu_seqlens_k)
        ctx.scale, ctx.causal = scale, causal
        out, lse = reference.varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, scale=scale, causal=causal)
        used = int(cu_seqlens_q[-1])
        out[used:] = float("nan")
        lse = lse.masked_fill(torch.isneginf(lse), float("inf"))
        lse[:, used:] = float("nan")
        return out, lse

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        q, k, v, cu_q, cu_k = ctx.saved_tensors
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (q, k, v)]
            out, _ = reference.varlen_attention(*leaves, cu_q, cu_k, scale=ctx.scale, causal=ctx.causal)
        grad_out = grad_out.clone()
        grad_out[int(cu_q[-1]) :] = 0.0  # not read
        grads = torch.autograd.grad(out, leaves, grad_out)
        for grad, cu in zip(grads, (cu_q, cu_k, cu_k), strict=True):
            grad[int(cu[-1]) :] = float("nan")
        return (*grads, *[None] * 4)


class Calls(list):
    """What the stand-ins were called with, and the shape of lse that they return."""

    pad_lse = False


@pytest.fixture
def calls(monkeypatch):
    """Stand-ins in place of flash-attn and of PyTorch's varlen attention; Triton selected before and afterwards."""
    recorded = Calls()

    def record(name, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, causal, **others):
        assert type(max_seqlen_q) is type(max_seqlen_k) is int
        recorded.append({"name": name, "q": q, "k": k, "max": (max_seqlen_q, max_seqlen_k), **others})
        out, lse = StandIn.apply(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, causal)
        return out, lse[None] if recorded.pad_lse else lse

    # Arguments and defaults of flash-attn 2.8.3 and, below, of torch 2.14.
    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
        block_table=None,
    ):
        assert return_attn_probs
        assert dropout_p == softcap == 0.0
        sequences = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        results = record("flash_attn", q, k, v, *sequences, softmax_scale, causal, deterministic=deterministic)
        return *results, q.new_empty(0)

    def varlen_attn(
        query,
        key,
        value,
        cu_seq_q,
        cu_seq_k,
        max_q,
        max_k,
        *,
        return_aux=None,
        scale=None,
        window_size=(-1, -1),
        enable_gqa=False,
        seqused_k=None,
        block_table=None,
        num_splits=None,
    ):
        assert return_aux.lse
        assert enable_gqa == (query.shape[1] != key.shape[1])
        causal = {(-1, -1): False, (-1, 0): True}[window_size]
        return record("torch", query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, causal)

    fake = types.ModuleType("flash_attn")
    fake.__version__, fake.flash_attn_varlen_func = "2.8.3.post1", flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", fake)
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    monkeypatch.setattr(_backends, "_selected", "triton")
    return recorded


@pytest.fixture
def cuda_dispatch():
    """Brings CPU tensors to the implementation that CUDA tensors meet."""
    if helpers.device != "cpu":
        yield
        return
    if not _library.HAS_EXTENSION:
        pytest.skip("without the extension the CPU key is taken by the reference")
    with torch.library._scoped_library("revit_fast", "IMPL") as library:
        _triton.register("CPU", library)
        yield


def make(mix, device, heads=(2, 2), dim=32, dtype=torch.bfloat16, padding=0):
    """q, k, v with `padding` rows of NaN behind the sequences, and their offsets."""
    seqlens_q, seqlens_k = zip(*mix, strict=True)
    tensors = []
    for seed, (lengths, n_heads) in enumerate(((seqlens_q, heads[0]), (seqlens_k, heads[1]), (seqlens_k, heads[1]))):
        t = randn(sum(lengths) + padding, n_heads, dim, dtype=dtype, seed=seed)
        t[sum(lengths) :] = float("nan")
        tensors.append(t.to(device))
    return *tensors, cu_seqlens_of(seqlens_q).to(device), cu_seqlens_of(seqlens_k).to(device)


def truth(q, k, v, grad_out, cu_q, cu_k, scale, causal):
    """out, lse and the gradients of q, k and v by the reference, in which padding is zero."""
    leaves = [t.detach().nan_to_num().requires_grad_() for t in (q, k, v)]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, lse = reference.varlen_attention(*leaves, cu_q, cu_k, scale=scale, causal=causal)
    return (out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, grad_out))


def check_forward_and_backward(q, k, v, cu_q, cu_k, scale=None, causal=False, **options):
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out, lse = ops.varlen_attention(*leaves, cu_q, cu_k, scale=scale, causal=causal, return_lse=True, **options)
    grad_out = randn(*out.shape, dtype=out.dtype, seed=7).to(out.device)
    ours = (out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, grad_out))
    assert all(t.is_contiguous() for t in ours)
    check_op(ours, truth, q, k, v, grad_out, cu_q, cu_k, scale, causal)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("dim", "dtype"), [(64, torch.bfloat16), (20, torch.float16)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_backend_honours_the_pack_contract(calls, cuda_dispatch, device, backend, dim, dtype, causal):
    """Padding, empty sequences, blind queries, grouped heads, a head_dim that is no multiple of 8."""
    with rf.set_attention_backend(backend):
        check_forward_and_backward(*make(CROSS_MIX, device, (4, 2), dim, dtype, padding=3), causal=causal)
    assert [call["name"] for call in calls] == [backend] * 2
    assert all(call["max"] == (50, 63) for call in calls)  # no bound was given: all rows
    assert all(call.get("deterministic", True) for call in calls)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_scale_that_is_not_positive(calls, cuda_dispatch, device, backend, scale):
    with rf.set_attention_backend(backend):
        check_forward_and_backward(*make(((9, 9), (3, 3)), device), scale=scale)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_launched_for_nothing(calls, cuda_dispatch, device, backend):
    with rf.set_attention_backend(backend):
        for mix in (((0, 0),), ((0, 3),), ((3, 0),)):
            check_forward_and_backward(*make(mix, device))
        q = torch.zeros(2, 1, 8, dtype=torch.float16, device=device)
        assert not ops.varlen_attention(q, q, q, cu_seqlens_of([]).to(device)).any()
    assert not calls


@pytest.mark.parametrize("backend", BACKENDS)
def test_work_list_without_padding_spares_the_masks(calls, cuda_dispatch, device, backend, monkeypatch):
    q, k, v, cu, _ = make(((9, 9), (0, 0), (3, 3)), device)
    monkeypatch.setattr(_backends, "_left_out", None)
    work = work_list((9, 0, 3))
    options = {"causal": True, "tiles": work.tiles.to(device), "tile_counts": work.counts}
    with rf.set_attention_backend(backend):
        check_forward_and_backward(q, k, v, cu, cu, **options, max_seqlen_q=9, max_seqlen_k=10)
    assert [call["max"] for call in calls] == [(9, 10)] * 2


@pytest.mark.parametrize(("seqlens", "longest"), [((9, 3), 32), ((9, 0, 50), 64), ((257, 3), 260)])
def test_work_list_bounds_the_lengths(calls, cuda_dispatch, device, seqlens, longest):
    """By the keys of its longest class, or all rows where that streams."""
    q, k, v, cu, _ = make([(n, n) for n in seqlens], device)
    work = work_list(seqlens)
    with rf.set_attention_backend("torch"):
        check_forward_and_backward(q, k, v, cu, cu, tiles=work.tiles.to(device), tile_counts=work.counts)
    assert [call["max"] for call in calls] == [(longest, longest)] * 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_work_list_with_padding_keeps_the_masks(calls, cuda_dispatch, device, backend):
    q, k, v, cu, _ = make(((9, 9), (3, 3)), device, padding=4)
    work = work_list((9, 3), n_padding=4)
    with rf.set_attention_backend(backend):
        check_forward_and_backward(q, k, v, cu, cu, tiles=work.tiles.to(device), tile_counts=work.counts)


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_are_passed_on_unless_a_row_is_off_its_boundary(calls, cuda_dispatch, device, backend):
    qkv = randn(12, 3, 2, 32, dtype=torch.float16).to(device)
    cu = cu_seqlens_of((9, 3)).to(device)
    with rf.set_attention_backend(backend):
        ops.varlen_attention(*qkv.unbind(1), cu, max_seqlen_q=1)
        assert calls[-1]["q"].data_ptr() == qkv.data_ptr()
        assert calls[-1]["max"] == (2, 2)  # one query per sequence would be another code path of flash-attn
        for odd in (qkv[..., 1:9], qkv.transpose(0, 3).contiguous().transpose(0, 3), qkv[..., :20]):
            check_forward_and_backward(*odd.unbind(1), cu, cu)


def test_forward_and_backward_may_run_on_different_backends(calls, cuda_dispatch, device):
    q, k, v, cu, _ = make(((9, 9), (3, 3)), device)
    q.requires_grad_()
    with rf.set_attention_backend("torch"):
        out = ops.varlen_attention(q, k, v, cu)
    with rf.set_attention_backend("flash_attn"):
        out.sum().backward()
    assert [call["name"] for call in calls] == ["torch", "flash_attn"]


def test_compiled_code_follows_the_choice_without_recompiling(calls, cuda_dispatch, device):
    n_compiled = 0

    def count(graph, example_inputs):
        nonlocal n_compiled
        n_compiled += 1
        return graph.forward

    q, k, v, cu, _ = make(((9, 9), (3, 3)), device)
    torch._dynamo.reset()
    compiled = torch.compile(lambda q: 2 * ops.varlen_attention(q, k, v, cu), fullgraph=True, backend=count)
    outs = []
    for backend in BACKENDS:
        with rf.set_attention_backend(backend):
            outs.append(compiled(q))
    assert torch.equal(*outs)
    assert [call["name"] for call in calls] == list(BACKENDS)
    assert n_compiled == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_is_refused(calls, cuda_dispatch, device, backend):
    q, k, v, cu, _ = make(((3, 3),), device, dtype=torch.float32)
    message = (
        rf'q: the attention backend "{backend}" computes in float16 and bfloat16, got torch.float32; use q.bfloat16'
    )
    with rf.set_attention_backend(backend), pytest.raises(TypeError, match=message):
        ops.varlen_attention(q, k, v, cu)


def test_float64_is_served_by_the_reference(calls, cuda_dispatch, device):
    q, k, v, cu, _ = make(((3, 3),), device, dtype=torch.float64)
    with rf.set_attention_backend("torch"):
        out = ops.varlen_attention(q, k, v, cu)
    torch.testing.assert_close(out, reference.varlen_attention(q, k, v, cu, cu, scale=32**-0.5)[0])
    assert not calls


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_lse_is_refused(calls, cuda_dispatch, device, backend):
    q, k, v, cu, _ = make(((3, 3),), device)
    q.requires_grad_()
    with rf.set_attention_backend(backend):
        _, lse = ops.varlen_attention(q, k, v, cu, return_lse=True)
        with pytest.raises(ValueError, match=rf'return_lse: the attention backend "{backend}" has no gradient of lse'):
            lse.sum().backward()


def test_unknown_layout_of_lse_is_refused(calls, cuda_dispatch, device):
    q, k, v, cu, _ = make(((3, 3),), device)
    calls.pad_lse = True
    with rf.set_attention_backend("torch"), pytest.raises(RuntimeError, match=r"expected lse of shape \[2, 3\]"):
        ops.varlen_attention(q, k, v, cu)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
def test_installed_torch_takes_the_call(heads, causal):
    """PyTorch's own function, forward and backward, on tensors without values.

    They are of the CPU, because autograd would ask the driver for a CUDA tensor's streams.
    """
    with FakeTensorMode(), rf.set_attention_backend("torch"):
        q = torch.empty(12, heads[0], 20, dtype=torch.bfloat16)
        k, v = (torch.empty(12, heads[1], 20, dtype=torch.bfloat16) for _ in range(2))
        cu = torch.empty(3, dtype=torch.int32)
        options = (cu, cu, 9, None, 0.2, causal, None, [])
        out, lse = _backends.selected_implementation("varlen_attention")(q, k, v, *options)
        assert (out.shape, lse.shape) == (q.shape, (heads[0], 12))
        backward = _backends.selected_implementation("varlen_attention_backward")
        grads = backward(torch.empty_like(out), None, q, k, v, out, lse, *options)
        for grad, leaf in zip(grads, (q, k, v), strict=True):
            assert (grad.shape, grad.dtype) == (leaf.shape, leaf.dtype)


@needs_extension
@pytest.mark.skipif(helpers.device != "cpu", reason="about the C++ kernels")
def test_cpu_tensors_keep_the_cpu_kernels(calls):
    q, k, v, cu, _ = make(((9, 9), (3, 3)), "cpu", dtype=torch.float32)
    expected = ops.varlen_attention(q, k, v, cu)
    with rf.set_attention_backend("flash_attn"):
        assert torch.equal(ops.varlen_attention(q, k, v, cu), expected)
    assert not calls


def selected():
    implementation = _backends.selected_implementation("varlen_attention")
    return "triton" if implementation is None else implementation.args[0]


def test_choice_nests_and_survives_exceptions(calls):
    with rf.set_attention_backend("torch"):
        with contextlib.suppress(KeyError), rf.set_attention_backend("flash_attn"):
            assert selected() == "flash_attn"
            raise KeyError
        assert selected() == "torch"
        rf.set_attention_backend("flash_attn")
        assert selected() == "flash_attn"
    assert selected() == "triton"


def test_choice_lasts_without_a_with_statement(calls):
    rf.set_attention_backend("torch")
    assert selected() == "torch"
    assert _backends.selected_implementation("tal_layer_norm") is None


def test_choice_holds_in_threads_that_autograd_might_use(calls):
    seen = []
    with rf.set_attention_backend("torch"):
        thread = threading.Thread(target=lambda: seen.append(selected()))
        thread.start()
        thread.join()
    assert seen == ["torch"]


def test_unknown_backend_is_named(calls):
    with pytest.raises(ValueError, match="name: expected one of 'triton', 'flash_attn', 'torch', got 'cudnn'"):
        rf.set_attention_backend("cudnn")


def refused(name, message):
    with pytest.raises(ImportError, match=message):
        rf.set_attention_backend(name)
    assert selected() == "triton"


def test_missing_flash_attn_is_an_import_error(calls, monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    refused("flash_attn", r'flash_attn cannot be imported \(.*\): pip install .*"flash-attn>=2\.7,<3"')


@pytest.mark.parametrize("version", ["2.6.3", "1.0.9", "3.0.0b1", None])
def test_other_flash_attn_is_an_import_error(calls, monkeypatch, version):
    fake = types.ModuleType("flash_attn")
    fake.flash_attn_varlen_func = print
    if version:
        fake.__version__ = version
    monkeypatch.setitem(sys.modules, "flash_attn", fake)
    refused("flash_attn", f"flash_attn {version or 'of unknown version'} is not supported: pip install")


def test_flash_attn_without_the_function_is_an_import_error(calls, monkeypatch):
    monkeypatch.delattr(sys.modules["flash_attn"], "flash_attn_varlen_func")
    refused("flash_attn", "is not supported: pip install")


def test_old_torch_is_an_import_error(calls, monkeypatch):
    def of_torch_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
        raise NotImplementedError

    monkeypatch.setattr(varlen, "varlen_attn", of_torch_2_10)
    refused("torch", r'has no scale, window_size in torch\.nn\.attention\.varlen: pip install "torch>=2\.11"')
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    refused("torch", r"has no varlen_attn in torch\.nn\.attention\.varlen")


def test_missing_triton_is_an_import_error(calls, cuda_dispatch, device, monkeypatch):
    message = r'need Triton, which cannot be imported \(.*\): pip install "triton>=3\.6".*or move to the CPU'
    monkeypatch.setitem(sys.modules, "triton", None)
    _triton.load.cache_clear()
    refused("triton", message)
    q, k, v, cu, _ = make(((3, 3),), device)
    with pytest.raises(ImportError, match=message):
        ops.varlen_attention(q, k, v, cu)
    with pytest.raises(ImportError, match=message):
        ops.mean_pool(q.flatten(1), cu)


def test_old_triton_is_an_import_error(calls, monkeypatch):
    fake = types.ModuleType("triton")
    fake.__version__ = "3.5.1+git1"
    monkeypatch.setitem(sys.modules, "triton", fake)
    refused("triton", r'do not run on Triton 3\.5\.1\+git1: pip install "triton>=3\.6"')


@pytest.mark.parametrize("capability", [(7, 5), (6, 1)])
def test_gpu_before_sm_80_is_refused(monkeypatch, capability):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    message = rf"need compute capability 8\.0 or later, cuda:0 has {capability[0]}\.{capability[1]}; move .* to the CPU"
    with pytest.raises(RuntimeError, match=message):
        launch._device_target.__wrapped__(0)


@pytest.mark.parametrize(
    ("capability", "target"),
    [((8, 0), "sm_80"), ((8, 6), "sm_120"), ((8, 9), "sm_120"), ((9, 0), "sm_90"), ((10, 3), "sm_100")],
)
def test_gpu_takes_the_choices_of_the_nearest_older_target(monkeypatch, capability, target):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    assert launch._device_target.__wrapped__(0).name == target


def test_tiles_on_another_device_are_named():
    q = torch.zeros(3, 1, 8)
    with pytest.raises(ValueError, match=r"tiles: expected a tensor on cpu like q, .*use tiles\.to\(q\.device\)"):
        ops.varlen_attention(q, q, q, cu_seqlens_of([3]), tiles=torch.zeros(1, 3, dtype=torch.int32, device="meta"))


OPTIONAL = ("triton", "flash_attn", "timm", "transformers", "matplotlib", "ray")

# A system without any optional package: not even a look at the disk finds them.
IMPORT = f"""
import importlib.abc
import sys

OPTIONAL = {OPTIONAL!r}


class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in OPTIONAL:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)


if "refuse" in sys.argv:
    sys.meta_path.insert(0, Refuse())
import torch
before = set(sys.modules)
import revit_fast as rf

x = torch.ones(3, 1, 8, requires_grad=True)
cu_seqlens = torch.tensor([0, 3], dtype=torch.int32)
rf.ops.varlen_attention(x, x, x, cu_seqlens).sum().backward()
rf.flash_attn_compat.flash_attn_varlen_func(x, x, x, cu_seqlens, cu_seqlens, 3, 3)
rf.ops.tal_layer_norm(x[:, 0], torch.ones(1, 8), torch.ones(1, 8), cu_seqlens, torch.zeros(1, dtype=torch.int32))
print(*sorted(set(OPTIONAL) & (set(sys.modules) - before)))
"""


@pytest.mark.processes
@pytest.mark.skipif(helpers.device != "cpu", reason="the same on every device")
@pytest.mark.parametrize("argument", ["find", "refuse"])
def test_import_and_cpu_ops_need_no_optional_package(argument):
    run = run_python(IMPORT, argument)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == []
