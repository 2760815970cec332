"""The machine code of every launch: no spills, wide accesses, tensor cores, full fp32 products.

Plain pytest compiles a sample. `make test-full` compiles all cases of `bench/gpu_launches.py`.
"""

import re

import pytest

from bench.machine_code import access_bytes, kind_of

pytestmark = pytest.mark.beside

NARROW_LOADS = ("attention_tiles_kernel", "attention_padding_kernel")
"""Kernels that read no rows, only a few int32."""

NARROW_STORES = (
    "attention_tiles_kernel",
    "mean_pool_kernel",
    "tal_layer_norm_backward_reduce_kernel",
    "patch_embed_table_backward_kernel",
)
"""Kernels that write no rows of the pack: only a few int32, or sums over many rows, one sum per thread."""

NO_PRODUCTS = ("attention_tiles_kernel", "attention_padding_kernel")
"""Attention kernels without matrix products."""


def narrow_accesses(kernel: str, code) -> list[str]:
    """Faults if no access moves 16 bytes per thread.

    8 bytes are enough for AMD's stores: its matrix products leave 8 bytes of a row in a thread.
    """
    widths = code.global_widths()
    widest_load = max((width for kind, width in widths if kind != "global store"), default=0)
    widest_store = max((width for kind, width in widths if kind == "global store"), default=0)
    faults = []
    if kernel not in NARROW_LOADS and widest_load < 16:
        faults.append(f"has no 16-byte load from global memory: {dict(widths)}")
    if kernel not in NARROW_STORES and widest_store < (8 if code.target.backend == "hip" else 16):
        faults.append(f"has no 16-byte store to global memory: {dict(widths)}")
    return faults


def begun_at_sums(ptx: str) -> int:
    """Number of FMAs at the end of a chain of at least 8 that does not begin at zero, as a product of its own does."""
    addends = dict(re.findall(r"fma\.rn\.f32\s+(%\w+), %\w+, %?\w+, (%?\w+);", ptx))

    def begins_at_sum(register: str) -> bool:
        length = 0
        while register in addends and length < 1024:  # a sum that a loop carries has no beginning
            register, length = addends[register], length + 1
        return length >= 8 and register != "0f00000000"

    return sum(map(begins_at_sum, addends))


@pytest.mark.parametrize(
    ("opcode", "kind", "n_bytes"),
    [
        ("LDG.E", "global load", 4),
        ("LDG.E.64.CONSTANT", "global load", 8),
        ("LDG.E.128", "global load", 16),
        ("LDGSTS.E.BYPASS.128", "global to shared", 16),
        ("STG.E.U16", "global store", 2),
        ("global_load_dword", "global load", 4),
        ("global_load_dwordx4", "global load", 16),
        ("buffer_load_dword_lds", "global to shared", 4),
        ("buffer_store_short", "global store", 2),
        ("global_store_dwordx2", "global store", 8),
    ],
)
def test_access_widths(opcode, kind, n_bytes):
    assert (kind_of(opcode), access_bytes(opcode)) == (kind, n_bytes)


def test_code(compilation, code):
    """Checks one launch on one chip."""
    faults = []
    # Scalars that gfx942 keeps in lanes of vector registers do not count: they take no memory.
    if code.spilled_registers + code.stack_bytes > 0:
        faults.append(f"spills {code.spilled_registers} registers, {code.stack_bytes} bytes of stack")
    if code.shared_bytes > code.target.shared_bytes:
        faults.append(f"takes {code.shared_bytes} bytes of shared memory, {code.target.shared_bytes} are there")
    if code.programs_per_sm < 1:
        faults.append(f"does not fit a multiprocessor ({code.registers} registers, {code.shared_bytes} bytes)")
    faults += narrow_accesses(compilation.kernel, code)
    tensor = [opcode for opcode in code.opcodes if kind_of(opcode) == "tensor"]
    has_products = compilation.case.op == "attention" and compilation.kernel not in NO_PRODUCTS
    if has_products and compilation.case.dtype != "fp32" and not tensor:
        faults.append("has no tensor-core instruction")
    if compilation.case.dtype == "fp32":
        rounded = [o for o in tensor if re.search(r"TF32|xf32|BF16|F16|f16", o)]
        if rounded or "tf32" in code.text:
            faults.append(f"rounds fp32 products: {rounded[:3] or 'tf32 in PTX'}")
        if has_products and code.target.backend == "cuda" and (n_begun := begun_at_sums(code.text)):
            faults.append(f"adds products one by one to a long sum, in {n_begun} FMAs, instead of block by block")
    assert not faults, f"{compilation}: " + "; ".join(faults)
