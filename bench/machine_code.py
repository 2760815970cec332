"""Compiles a recorded `Launch` for a chip that need not be present, and reads the machine code.

The compiler gets the same input as on the chip: the launch's arguments pass through the binder of Triton's just-in-time
path, which decides types, alignment and specialised integers. Triton keeps the binaries in its cache on disk. NVIDIA
code is disassembled by nvdisasm (SASS); for AMD the compiler's own assembly text is read.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.compiler import compile as compile_source
from triton.runtime.jit import create_function_from_signature

from revit_fast.kernels.launch import Launch, Target


@dataclass(frozen=True)
class Code:
    """The machine code of one launch, and the resources that it needs.

    Attributes:
        kernel: name of the kernel.
        target: the chip.
        num_warps: warps per program.
        registers: 32-bit registers per thread; on AMD vector registers, including accumulation registers.
        spilled_registers: spilled vector registers; on NVIDIA the number of loads and stores of thread-local memory.
        spilled_scalars: AMD's scalar registers kept in lanes of vector registers, which costs no memory access.
        stack_bytes: bytes of stack per thread.
        shared_bytes: bytes of shared memory per program.
        tensor_columns: columns of sm_100's tensor memory per program.
        opcodes: mnemonics with their modifiers, such as "HMMA.16816.F32.BF16" or "v_exp_f32_e32", ordered by address.
        binary: contents of the cubin or hsaco file.
        text: PTX, or AMD's assembly.
    """

    kernel: str
    target: Target
    num_warps: int
    registers: int
    spilled_registers: int
    spilled_scalars: int
    stack_bytes: int
    shared_bytes: int
    tensor_columns: int
    opcodes: list[str] = field(repr=False)
    binary: bytes = field(repr=False)
    text: str = field(repr=False)

    @property
    def mix(self) -> Counter[str]:
        """Number of instructions of each kind."""
        return Counter(map(kind_of, self.opcodes))

    def global_widths(self) -> Counter[tuple[str, int]]:
        """Number of accesses to global memory by (kind, bytes per thread)."""
        kinds = ((kind_of(opcode), opcode) for opcode in self.opcodes)
        return Counter((kind, access_bytes(opcode)) for kind, opcode in kinds if kind in GLOBAL_KINDS)

    @property
    def programs_per_sm(self) -> int:
        """Number of programs that fit one multiprocessor by registers, warps, shared and tensor memory."""
        target = self.target
        if target.backend == "hip":
            # A SIMD has 512 registers per lane, allocated in steps of 8, and holds max_warps / 4 = 8 waves.
            per_simd = min(target.max_warps // 4, 512 // _round_up(max(self.registers, 1), 8))
            by_warps = 4 * per_simd // self.num_warps
        else:
            # A warp's registers are allocated in steps of 256, from the quarter that belongs to its scheduler.
            warps = 4 * (target.registers // 4 // (32 * _round_up(self.registers, 8)))
            by_warps = min(warps, target.max_warps) // self.num_warps
        reserved = 1024 if target.backend == "cuda" else 0
        by_shared = target.shared_bytes_per_sm // max(self.shared_bytes + reserved, 1)
        by_tensor = TENSOR_COLUMNS // self.tensor_columns if self.tensor_columns else by_warps
        return min(by_warps, by_shared, by_tensor)


TENSOR_COLUMNS = 512
"""Columns of the tensor memory of one multiprocessor of sm_100."""


KINDS = {
    "tensor": r"H?[HIQDO]?G?MMA|UTC\w*MMA|v_mfma\w*",
    "exp": r"MUFU|v_(exp|log|rcp|rsq|sqrt|sin|cos)_.*",
    "fp32": r"F(FMA|MUL|ADD)(2|32I)?|v_(pk_)?(fma|fmac|mac|mul|add|sub|subrev|fmaak|fmamk)_(legacy_)?f32.*",
    "fp32 compare": r"FMNMX3?|FSEL|FSETP|FSET|FCHK|v_(max|min|max3|min3|med3)_f32.*|v_cmpx?_\w+_f32.*",
    "convert": r"F2FP?|I2FP?|F2I|I2I|FRND|v_cvt_.*",
    "global to shared": r"LDGSTS|UBLKCP|UTMALDG|buffer_load_\w+_lds",
    "global load": r"LDG|(global|buffer|flat)_load_.*",
    "global store": r"STG|(global|buffer|flat)_store_.*",
    "global atomic": r"ATOMG?|RED|REDG|(global|buffer|flat)_atomic_.*",
    "shared load": r"LDSM?|ds_(read|load).*",
    "shared store": r"STSM?|ds_(write|store).*",
    "shuffle": r"SHFL|REDUX|ds_(b?permute|swizzle).*",
    "tensor memory": r"LDTM|STTM|UTCCP",
    "local": r"LDL|STL|scratch_.*",
    "barrier": r"(UTC)?BAR|BARRIER|(LDG)?DEPBAR|SYNCS|WARPSYNC|WARPGROUP|MEMBAR|FENCE|ERRBAR|CCTL|UCGABAR\w*|s_barrier",
    "wait": r"NOP|s_waitcnt.*|s_nop|s_sleep|s_setprio",
    "control": r"BRA|BRX|BRXU|JMP|EXIT|RET|CALL|BSSY|BSYNC|BREAK|s_c?branch.*|s_endpgm|s_setpc.*|s_swappc.*",
}
"""Patterns of the opcodes of each kind, without modifiers; NVIDIA's come first.

All other instructions are "integer": addresses, masks, moves.
"""

GLOBAL_KINDS = ("global to shared", "global load", "global store")

_KIND_PATTERNS = [(kind, re.compile(pattern)) for kind, pattern in KINDS.items()]


@lru_cache(maxsize=4096)
def kind_of(opcode: str) -> str:
    """The kind of an instruction: a key of `KINDS`, or "integer"."""
    name = opcode.split(".")[0]
    return next((kind for kind, pattern in _KIND_PATTERNS if pattern.fullmatch(name)), "integer")


def access_bytes(opcode: str) -> int:
    """Bytes that one thread moves by a load or store of global memory."""
    if "." in opcode or opcode.isupper():
        modifiers = opcode.split(".")
        sizes = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1, "256": 32}
        return next((sizes[m] for m in modifiers if m in sizes), 4)
    suffixes = (("dwordx4", 16), ("dwordx3", 12), ("dwordx2", 8), ("b128", 16), ("b96", 12), ("b64", 8))
    suffixes += (("dword", 4), ("b32", 4), ("short", 2), ("16", 2), ("d16_hi", 2), ("byte", 1), ("8", 1))
    return next((size for suffix, size in suffixes if suffix in opcode), 4)


def _round_up(n: int, step: int) -> int:
    return -(-n // step) * step


class Pointer:
    """Stands for a tensor in Triton's binder, with the tensor's dtype and the alignment of its first element."""

    def __init__(self, tensor: torch.Tensor):
        self.dtype = tensor.dtype
        self._offset_bytes = tensor.storage_offset() * tensor.element_size()
        self._n_bytes = tensor.untyped_storage().nbytes()

    def data_ptr(self) -> int:
        return self._offset_bytes

    def ptr_range(self) -> int:
        return self._n_bytes


def compile_launch(launch: Launch, target: Target) -> CompiledKernel:
    """Compiles a launch as Triton does on the first call on that chip; that call then finds it in the cache on disk."""
    kernel = launch.kernel
    gpu = GPUTarget(target.backend, target.arch, target.warp_size)
    backend = make_backend(gpu)
    arguments = {k: Pointer(v) if isinstance(v, torch.Tensor) else v for k, v in launch.arguments.items()}
    keywords = {**launch.constants, "num_warps": launch.num_warps, "num_stages": launch.num_stages}
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, _ = binder(**arguments, **keywords)
    options, signature, constants, attributes = kernel._pack_args(backend, keywords, bound, specialization, None)
    source = ASTSource(kernel, signature, constants, attributes)
    return compile_source(source, target=gpu, options=options.__dict__)


def code_of(launch: Launch, target: Target) -> Code:
    """Compiles a launch and reads its machine code."""
    compiled = compile_launch(launch, target)
    read = _read_hip if target.backend == "hip" else _read_cuda
    common: dict[str, Any] = {
        "kernel": launch.kernel.__name__,
        "target": target,
        "num_warps": compiled.metadata.num_warps,
        "shared_bytes": compiled.metadata.shared,
        "tensor_columns": getattr(compiled.metadata, "tmem_size", None) or 0,
    }
    return Code(**common, **read(compiled.asm))


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


_SASS_OPCODE = re.compile(r"/\*[0-9a-f]{4,}\*/[ \t]+(?:@!?U?P\w+[ \t]+)?([A-Z][\w.]*)")
_GCN_OPCODE = re.compile(r"^[ \t]+([a-z]\w*_\w+)", re.MULTILINE)


def _read_cuda(asm) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(asm["cubin"])
        usage = _run(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin))
        sass = _run(knobs.nvidia.nvdisasm.path, "-c", str(cubin))
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    opcodes = _SASS_OPCODE.findall(sass)
    return {
        "registers": int(found["REG"]),
        "spilled_registers": sum(kind_of(opcode) == "local" for opcode in opcodes),
        "spilled_scalars": 0,
        "stack_bytes": int(found["STACK"]) + int(found["LOCAL"]),
        "opcodes": opcodes,
        "binary": asm["cubin"],
        "text": asm["ptx"],
    }


def _read_hip(asm) -> dict[str, Any]:
    text = asm["amdgcn"]
    body = text[text.index(".Lfunc_begin0") : text.index(".section\t.rodata")]

    def metadata(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", text).group(1))

    return {
        "registers": metadata("vgpr_count"),
        "spilled_registers": metadata("vgpr_spill_count"),
        "spilled_scalars": metadata("sgpr_spill_count"),
        "stack_bytes": metadata("private_segment_fixed_size"),
        "opcodes": _GCN_OPCODE.findall(body),
        "binary": asm["hsaco"],
        "text": text,
    }
