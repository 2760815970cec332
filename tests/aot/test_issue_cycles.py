"""The walk that the issue-cycle estimate rests on, where its answer can be counted by hand."""

import re
from itertools import takewhile

import pytest
import torch
import triton
import triton.language as tl
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.issue_cycles import RATES, estimate, loops_of, products
from bench.machine_code import Block, Code, Instruction, access_bytes, compile_launch
from revit_fast.kernels.launch import TARGETS, Launch

MMA = Instruction("HMMA.16816.F32.BF16", "R4, R8, R12, R4")
FMA = Instruction("FFMA", "R1, R2, R3, R4")
EXP = Instruction("MUFU.EX2", "R1, R2")
LOAD = Instruction("LDG.E.128", "R4, desc[UR4][R2.64]")


def code_of(blocks, num_warps=4):
    return Code("handwritten", TARGETS["sm_80"], num_warps, 32, 0, 0, 0, 0, blocks, b"", "")


def bottom_tested_loop():
    """head (3 instructions, may skip) -> body (5, one product) -> tail (2)."""
    head = Block([LOAD, FMA, Instruction("BRA", "`(.L_x_1)", "@!P0")], (1, 2))
    body = Block([MMA, FMA, FMA, EXP, Instruction("BRA", "`(.L_x_0)", "@P0")], (1, 2))
    return [head, body, Block([FMA, Instruction("EXIT", "")], (), True)]


@pytest.mark.parametrize("n", [0, 1, 2, 7])
def test_counts_a_loop_by_hand(n):
    macs = 4 * n * 16 * 8 * 16  # four warps
    found = estimate(code_of(bottom_tested_loop()), [n], macs, staged_bytes=0).units
    assert found["issue"] == 4 * (3 + 5 * n + 2) / 4  # warps, instructions, schedulers
    assert found["fp32"] == 4 * (1 + 2 * n + 1) * 32 / 64
    assert found["exp"] == 4 * n * 32 / 16
    assert found["shared"] == 4 * 32 * 16 / 128
    assert found["tensor"] == macs / 1024


@pytest.mark.parametrize("n", [1, 2, 7])
def test_counts_a_loop_that_tests_at_its_top(n):
    """head (1) -> test (2, leaves) -> body (3) -> test."""
    blocks = [
        Block([FMA], (1,)),
        Block([FMA, Instruction("BRA", "`(.L_x_1)", "@P0")], (3, 2)),
        Block([MMA, FMA, FMA, FMA, Instruction("BRA", "`(.L_x_0)")], (1,)),
        Block([Instruction("EXIT", "")], (), True),
    ]
    found = estimate(code_of(blocks), [n], 4 * n * 2048, staged_bytes=0).units
    assert found["issue"] == 1 + n * 7 + 2 + 1


def test_counts_a_peeled_iteration():
    """One product stands behind the loop, which then runs once less than stated."""
    blocks = bottom_tested_loop()
    blocks[2] = Block([MMA, FMA, Instruction("EXIT", "")], (), True)
    found = estimate(code_of(blocks), [5], 4 * 5 * 2048, staged_bytes=0).units
    assert found["issue"] == 3 + 4 * 5 + 3


def test_refuses_what_does_not_add_up():
    with pytest.raises(NotImplementedError, match="times the products"):
        estimate(code_of(bottom_tested_loop()), [3], 4 * 3 * 2048 + 2048, staged_bytes=0)
    with pytest.raises(NotImplementedError, match="2 loops"):
        estimate(code_of(bottom_tested_loop()), [3, 1], 4 * 3 * 2048, staged_bytes=0)


def test_products_and_widths():
    assert products(MMA) == 2048
    assert products(Instruction("HGMMA.64x208x16.F32.BF16", "R24, gdesc[UR4], R24")) == 64 * 208 * 16 // 4
    assert products(Instruction("v_mfma_f32_32x32x8_bf16", "a[0:15], v[0:1], v[2:3], a[0:15]")) == 8192
    assert [access_bytes(o) for o in ("LDG.E", "LDG.E.128", "STG.E.U16", "LDS.64")] == [4, 16, 2, 8]
    gcn = ("global_load_dwordx4", "buffer_store_short", "ds_read2_b64", "global_load_dword", "ds_write_b16")
    assert [access_bytes(o) for o in gcn] == [16, 2, 16, 4, 2]


@triton.jit(do_not_specialize=["n_blocks"])
def products_kernel(a, b, out, n_blocks, BLOCK: tl.constexpr):
    """out = sum of the products of n_blocks pairs of square blocks."""
    rows = tl.arange(0, BLOCK)
    offsets = rows[:, None] * BLOCK + rows[None, :]
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for i in range(n_blocks):
        at = i * BLOCK * BLOCK + offsets
        total = tl.dot(tl.load(a + at), tl.load(b + at), total)
    tl.store(out + offsets, total)


@pytest.fixture(scope="module")
def compiled():
    with FakeTensorMode():
        a = torch.empty(64, 64, dtype=torch.bfloat16, device="cuda")
        arguments = {"a": a, "b": a, "out": a.float(), "n_blocks": 5}
    launch = Launch(products_kernel, (1,), arguments, {"BLOCK": 64}, num_warps=4, num_stages=1)
    return {target: compile_launch(launch, TARGETS[target]) for target in ("sm_80", "sm_90")}


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("n", [1, 2, 9])
def test_counts_a_compiled_loop(compiled, target, n):
    code = compiled[target]
    found = estimate(code, [n], n * 64**3, staged_bytes=2 * n * 64 * 64 * 2).units
    assert found["tensor"] == n * 64**3 / RATES[target].tensor
    (loop,) = (x for x in loops_of(code.blocks) if any(i.kind == "tensor" for i in code.blocks[x.header].instructions))
    one = len(code.blocks[loop.header].instructions)
    assert loop.blocks == {loop.header}, "the loop is one block, so its instructions are those between label and branch"
    straight = [i for n, b in enumerate(code.blocks) if n != loop.header for i in takewhile(_is_code, b.instructions)]
    assert n * one <= found["issue"] <= n * one + len(straight)
    more = estimate(code, [n + 3], (n + 3) * 64**3, staged_bytes=0).units["issue"]
    assert more - found["issue"] == 3 * one


def _is_code(instruction):
    return re.match("NOP", instruction.opcode) is None
