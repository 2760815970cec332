"""Launchers on fake CUDA tensors: what they return is what the ops promise, and no program is launched without work."""

import contextlib
from itertools import groupby

import pytest
import torch
from small_models import MIX, images_of, make_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from bench.gpu_launches import Case
from revit_fast.kernels import launch as launch_module
from revit_fast.kernels.constants import PADDING, TILE_ROWS
from revit_fast.kernels.launch import TARGETS, record
from revit_fast.ops import _triton
from revit_fast.packing import work_list

CALLS = [
    Case(op, direction, dtype, size, variant=variant)
    for op, size, variants in (
        ("attention", 80, ("", "causal", "grouped", "derived")),
        ("layer_norm", 384, ("", "residual", "rms", "fp32 weights")),
        ("patch_embed", 384, ("",)),
        ("mean_pool", 384, ("",)),
        ("rotary", 80, ("", "interleaved", "learned")),
    )
    for direction in ("fwd", "bwd")
    for dtype in ("bf16", "fp32")
    for variant in variants
    if not (dtype == "fp32" and variant == "fp32 weights")
]


def described(results):
    results = [results] if isinstance(results, torch.Tensor) else results
    return [(tuple(t.shape), t.dtype, t.device) for t in results]


@pytest.mark.parametrize("case", CALLS, ids=str)
def test_launcher_returns_what_the_op_promises(case):
    with FakeTensorMode(), record("sm_90") as launches:
        name, arguments = case.call()
        launched = getattr(_triton.load(_triton.KERNELS[name]), name)(*arguments)
        promised = getattr(torch.ops.revit_fast, name)(*arguments)
        assert described(launched) == described(promised), name
        assert all(device.type == "cuda" for _, _, device in described(promised))
    assert launches, f"{name} launched nothing"


def test_rotation_reads_queries_and_keys_in_the_rows_of_their_product():
    (launch,) = Case("rotary", "fwd", "bf16", 80).launches(TARGETS["sm_90"])
    q, k = launch.arguments["q"], launch.arguments["k"]
    assert q.stride() == k.stride() == (3 * q.shape[1] * 80, 80, 1)
    assert q.untyped_storage()._cdata == k.untyped_storage()._cdata


class Counter(TorchDispatchMode):
    """Counts PyTorch's operators that compute, but for the package's own, whose launches are recorded.

    Attributes:
        n: their number so far.
    """

    n = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "aten" and not function.is_view and "empty" not in function.name():
            self.n += 1
        return function(*args, **(kwargs or {}))


def launches_of_blocks(**options):
    """What every block of a small model launches on a GPU."""
    model, counts = make_model(depth=3, embed_dim=64, num_heads=4, **options), []
    with Counter() as counter, record("sm_90") as launches, torch.no_grad():

        def count(block, args, out=None):
            counts.append(counter.n + len(launches))

        for block in model.blocks:
            block.register_forward_pre_hook(count)
            block.register_forward_hook(count)
        model(images_of(MIX))
    return [after - before for before, after in zip(counts[::2], counts[1::2], strict=True)]


@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize("rope", [{"half": True}, {}, {"kind": "mixed"}], ids=["half", "interleaved", "mixed"])
def test_rotation_is_one_launch_more_per_block(rope, pool, kernels_on_cpu_tensors):
    plain = launches_of_blocks(global_pool=pool)
    rotated = launches_of_blocks(global_pool=pool, rope=rope)
    assert min(plain) >= 8, "two norms, four products, attention and activation are not all counted"
    assert rotated == [n + 1 for n in plain]


SEQLENS = (0, 1, 50, 64, 65, 0, 101, 197, 257, 577)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("n_padding", [0, 1, 130])
def test_programs_are_tiles_with_rows(target, n_padding):
    n_rows, n_heads = sum(SEQLENS) + n_padding, 3
    work = work_list(SEQLENS, n_padding=n_padding)
    tiles_with_rows = sum(-(-n // TILE_ROWS) for n in SEQLENS)
    assert sum(work.counts[:PADDING]) == tiles_with_rows
    with FakeTensorMode():
        q, grad = (torch.empty(n_rows, n_heads, 64, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        lse = torch.empty(n_heads, n_rows, device="cuda")
        cu_seqlens = torch.empty(len(SEQLENS) + 1, dtype=torch.int32, device="cuda")
        tiles = torch.empty(work.tiles.shape, dtype=torch.int32, device="cuda")
        pack = (cu_seqlens, cu_seqlens, max(SEQLENS), max(SEQLENS), 0.125, False, tiles, list(work.counts))
        with record(target) as forward:
            _triton.load("attention").varlen_attention(q, q, q, *pack)
        with record(target) as backward:
            _triton.load(_triton.KERNELS["varlen_attention_backward"]).varlen_attention_backward(
                grad, None, q, q, q, q, lse, *pack
            )
    assert all(0 not in launch.grid for launch in forward + backward)
    assert all(launch.grid[1] == n_heads for launch in backward)

    def programs(launches, *names):
        return sum(launch.grid[0] for launch in launches if any(name in launch.kernel.__name__ for name in names))

    assert programs(forward, "forward") == (tiles_with_rows + work.counts[PADDING]) * n_heads
    assert len(forward) == (4 if target == "sm_120" else 3), "launches for these five classes and padding"
    assert programs(backward, "fused", "grad_q") == tiles_with_rows
    assert programs(backward, "fused", "grad_kv") == tiles_with_rows


def test_launches_do_not_depend_on_neighbours():
    """Alone or in a pack, a sequence meets the same launches but for their grids."""
    alone = [Case("attention", "fwd", "bf16", 64, n).launches(TARGETS["sm_90"]) for n in (50, 197, 577)]
    with FakeTensorMode(), record("sm_90") as together:
        work = work_list((50, 197, 577), n_padding=64)
        q, k, v = torch.empty(50 + 197 + 577 + 64, 3, 6, 64, dtype=torch.bfloat16, device="cuda").unbind(1)
        cu_seqlens = torch.empty(4, dtype=torch.int32, device="cuda")
        tiles = torch.empty(work.tiles.shape, dtype=torch.int32, device="cuda")
        _triton.load("attention").varlen_attention(
            q, k, v, cu_seqlens, cu_seqlens, 577, 577, 0.125, False, tiles, list(work.counts)
        )

    def asked(launch):
        return launch.kernel.__name__, str(launch.constants), launch.num_warps, launch.num_stages

    expected = sorted(key for key, _ in groupby(sorted(asked(launch) for one in alone for launch in one)))
    got = sorted(asked(launch) for launch in together)
    assert got == expected


class OnGpu(torch.Tensor):
    device = torch.device("cuda", 0)


class Kernel:
    """Notes how it is launched: through Triton's own door, or as what that found."""

    arg_names = ("x", "n", "A", "B")

    def __init__(self):
        self.calls = []

    def __getitem__(self, grid):
        def run(*arguments, **options):
            self.calls.append(("found", grid, arguments, options))
            return Found(self.calls)

        return run


class Found:
    def __init__(self, calls):
        self.calls = calls

    def __getitem__(self, grid):
        return lambda *arguments: self.calls.append(("kept", grid, arguments, None))


def test_a_launch_is_looked_for_once(monkeypatch):
    monkeypatch.setattr(launch_module, "_current", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(launch_module, "_compiled", {})
    kernel, x = Kernel(), torch.zeros(64).as_subclass(OnGpu)

    def kind(x=x, n=5, grid=(3,), **options):
        launch_module.launch(kernel, grid, x, n, **({"B": 2, "A": (1, 2)} | options))
        return kernel.calls[-1][0]

    assert kind() == "found"
    assert kernel.calls == [("found", (3,), (x, 5), {"B": 2, "A": (1, 2), "num_warps": 4, "num_stages": 1})]
    assert kind(n=7, grid=(7, 2)) == "kept"
    assert kernel.calls[-1] == ("kept", (7, 2, 1), (x, 7, (1, 2), 2), None)
    changes = [{"x": x[1:]}, {"x": x.half()}, {"A": (1, 3)}, {"num_warps": 8}, {"num_stages": 2}]
    for change in changes + [{"n": n} for n in (1 << 40, 1, 16, 1.0, None)]:
        assert kind(**change) == "found", change
        assert kind(**change) == "kept", change
    n_calls = len(kernel.calls)
    launch_module.launch(kernel, (0, 4), x, 5, A=1, B=2)
    assert len(kernel.calls) == n_calls
