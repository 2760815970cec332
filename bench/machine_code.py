"""Machine code without the machine: compiles a recorded `Launch` for its chip and reads what came out.

The compiler gets what Triton's own just-in-time path would give it: the launch's arguments pass through the same
binder, so that types, alignment and specialised integers are those of a launch on the chip. Binaries are kept in
Triton's cache on disk; the disassembly of NVIDIA code is nvdisasm's (SASS), of AMD code the compiler's own assembly
text.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.compiler import compile as compile_source
from triton.runtime.jit import create_function_from_signature

from revit_fast.kernels.launch import Launch, Target


class Instruction(NamedTuple):
    """One machine instruction of a warp.

    Attributes:
        opcode: mnemonic with its modifiers: "HMMA.16816.F32.BF16", "v_exp_f32_e32".
        operands: the text behind it.
        guard: predicate that it is executed under, such as "@!P0"; empty on AMD, whose lanes are masked by a register.
    """

    opcode: str
    operands: str
    guard: str = ""

    @property
    def kind(self) -> str:
        """One of `KINDS`."""
        return _kind(self.opcode)


@dataclass
class Block:
    """Instructions that are executed from the first to the last.

    Attributes:
        instructions: in order.
        successors: indices of the blocks that may follow; none after an unconditional end of the program.
        may_end: whether the program may end here.
    """

    instructions: list[Instruction]
    successors: tuple[int, ...] = ()
    may_end: bool = False


@dataclass(frozen=True)
class Code:
    """What the compiler made of one launch.

    Attributes:
        kernel: its name.
        target: the chip.
        num_warps: warps of a program.
        registers: 32-bit registers of a thread; on AMD vector registers, accumulation registers included.
        spilled_registers: vector registers that did not fit; on NVIDIA loads and stores of thread-local memory.
        spilled_scalars: AMD's scalar registers kept in lanes of vector registers, which costs no memory access.
        stack_bytes: bytes of a thread's stack.
        shared_bytes: shared memory of a program.
        blocks: the code as basic blocks in the order of addresses; execution starts at the first.
        binary: the cubin or hsaco file.
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
    blocks: list[Block] = field(repr=False)
    binary: bytes = field(repr=False)
    text: str = field(repr=False)

    @property
    def instructions(self) -> Iterable[Instruction]:
        """All instructions, in the order of addresses."""
        return (instruction for block in self.blocks for instruction in block.instructions)

    @property
    def mix(self) -> Counter[str]:
        """How many instructions there are of each kind."""
        return Counter(instruction.kind for instruction in self.instructions)

    def global_widths(self) -> Counter[tuple[str, int]]:
        """Instructions per (kind, bytes that one thread moves) of accesses to global memory."""
        accesses = (i for i in self.instructions if i.kind in GLOBAL_KINDS)
        return Counter((i.kind, access_bytes(i.opcode)) for i in accesses)

    @property
    def programs_per_sm(self) -> int:
        """Programs that one multiprocessor can hold: what its registers, shared memory and warps allow."""
        target = self.target
        if target.backend == "hip":
            # Registers are the SIMD's, 512 of each of 64 lanes, in steps of 8, as are its 8 waves.
            per_simd = min(target.max_warps // 4, 512 // _round_up(max(self.registers, 1), 8))
            by_warps = 4 * per_simd // self.num_warps
        else:
            # A warp's registers come in steps of 256; a scheduler's quarter of them serves its own warps only.
            warps = 4 * (target.registers // 4 // (32 * _round_up(self.registers, 8)))
            by_warps = min(warps, target.max_warps) // self.num_warps
        reserved = 1024 if target.backend == "cuda" else 0
        by_shared = target.shared_bytes_per_sm // max(self.shared_bytes + reserved, 1)
        return min(by_warps, by_shared)


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
"""Kinds of instructions by opcode (without modifiers, NVIDIA first); the rest is "integer": addresses, masks, moves."""

GLOBAL_KINDS = ("global to shared", "global load", "global store")

_KIND_PATTERNS = [(kind, re.compile(pattern)) for kind, pattern in KINDS.items()]


@lru_cache(maxsize=4096)
def _kind(opcode: str) -> str:
    name = opcode.split(".")[0]
    return next((kind for kind, pattern in _KIND_PATTERNS if pattern.fullmatch(name)), "integer")


def access_bytes(opcode: str) -> int:
    """Bytes that one thread moves by a load or store."""
    if "." in opcode or opcode.isupper():
        modifiers = opcode.split(".")
        sizes = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1, "256": 32}
        return next((sizes[m] for m in modifiers if m in sizes), 4)
    suffixes = (("dwordx4", 16), ("dwordx3", 12), ("dwordx2", 8), ("b128", 16), ("b96", 12), ("b64", 8))
    suffixes += (("dword", 4), ("b32", 4), ("short", 2), ("16", 2), ("d16_hi", 2), ("byte", 1), ("8", 1))
    width = next((size for suffix, size in suffixes if suffix in opcode), 4)
    return 2 * width if re.match(r"ds_(read|write|load|store)_?2", opcode) else width


def _round_up(n: int, step: int) -> int:
    return -(-n // step) * step


class _Pointer:
    """A tensor as Triton's binder sees it: its type, and an address that is aligned as the tensor's rows are."""

    def __init__(self, tensor: torch.Tensor):
        self.dtype = tensor.dtype
        self._offset_bytes = tensor.storage_offset() * tensor.element_size()
        self._n_bytes = tensor.untyped_storage().nbytes()

    def data_ptr(self) -> int:
        return self._offset_bytes

    def ptr_range(self) -> int:
        return self._n_bytes


def compile_launch(launch: Launch, target: Target) -> Code:
    """Compiles a launch as Triton would on its first call on that chip."""
    kernel = launch.kernel
    gpu = GPUTarget(target.backend, target.arch, target.warp_size)
    backend = make_backend(gpu)
    arguments = {k: _Pointer(v) if isinstance(v, torch.Tensor) else v for k, v in launch.arguments.items()}
    keywords = {**launch.constants, "num_warps": launch.num_warps, "num_stages": launch.num_stages}
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, _ = binder(**arguments, **keywords)
    options, signature, constants, attributes = kernel._pack_args(backend, keywords, bound, specialization, None)
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = compile_source(source, target=gpu, options=options.__dict__)
    read = _read_hip if target.backend == "hip" else _read_cuda
    common: dict[str, Any] = {
        "kernel": kernel.__name__,
        "target": target,
        "num_warps": compiled.metadata.num_warps,
        "shared_bytes": compiled.metadata.shared,
    }
    return Code(**common, **read(compiled.asm))


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def _read_cuda(asm) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(asm["cubin"])
        usage = _run(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin))
        sass = _run(knobs.nvidia.nvdisasm.path, "-c", str(cubin))
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    blocks = _basic_blocks(_sass_lines(sass))
    return {
        "registers": int(found["REG"]),
        "spilled_registers": sum(i.kind == "local" for block in blocks for i in block.instructions),
        "spilled_scalars": 0,
        "stack_bytes": int(found["STACK"]) + int(found["LOCAL"]),
        "blocks": blocks,
        "binary": asm["cubin"],
        "text": asm["ptx"],
    }


def _read_hip(asm) -> dict[str, Any]:
    text = asm["amdgcn"]

    def metadata(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", text).group(1))

    return {
        "registers": metadata("vgpr_count"),
        "spilled_registers": metadata("vgpr_spill_count"),
        "spilled_scalars": metadata("sgpr_spill_count"),
        "stack_bytes": metadata("private_segment_fixed_size"),
        "blocks": _basic_blocks(_gcn_lines(text)),
        "binary": asm["hsaco"],
        "text": text,
    }


_SASS_LINE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;?\s*$")
_GCN_LINE = re.compile(r"\s+([a-z]\w*_\w+)\s*([^;]*?)\s*(?:;.*)?$")


def _sass_lines(sass: str) -> Iterable[str | Instruction]:
    """Labels and instructions of the kernel's own section."""
    for line in sass.splitlines():
        if label := re.match(r"(\.L_x_\d+|\$\w+):", line):
            yield label.group(1)
        elif found := _SASS_LINE.search(line):
            guard, opcode, operands = found.groups()
            yield Instruction(opcode, operands, guard or "")


def _gcn_lines(text: str) -> Iterable[str | Instruction]:
    body = text[text.index(".Lfunc_begin0") : text.index(".section\t.rodata")]
    for line in body.splitlines():
        if label := re.match(r"(\.LBB\w+):", line):
            yield label.group(1)
        elif found := _GCN_LINE.match(line):
            yield Instruction(*found.groups())


def _destination(instruction: Instruction) -> str | None:
    """Label that an instruction jumps to, None where it does not jump.

    ptxas writes some jumps as calls that never return. A call of a function by name, as of the traps that guard tensor
    memory, is one instruction here.
    """
    name = instruction.opcode.split(".")[0]
    if name in ("BRA", "CALL") or name.startswith(("s_branch", "s_cbranch")):
        found = re.search(r"\.L\w+", instruction.operands)
        if found is None and name != "CALL":
            raise NotImplementedError(f"machine code: cannot follow {instruction}")
        return found and found.group(0)
    if name in ("BRX", "BRXU", "JMP", "s_setpc_b64", "s_swappc_b64"):
        raise NotImplementedError(f"machine code: cannot follow {instruction}")
    return None


def _is_end(instruction: Instruction) -> bool:
    return instruction.opcode.split(".")[0] in ("EXIT", "RET", "s_endpgm")


def _is_conditional(instruction: Instruction) -> bool:
    # BRA.DIV leaves for code that resynchronises a divergent warp; uniform operands are a second condition.
    conditional_operand = re.match(r"!?U?P\d", instruction.operands) is not None
    return (
        instruction.guard not in ("", "@PT", "@UPT")
        or instruction.opcode.startswith(("s_cbranch", "BRA.DIV"))
        or conditional_operand
    )


def _basic_blocks(lines: Iterable[str | Instruction]) -> list[Block]:
    blocks: list[Block] = [Block([])]
    label_of: dict[str, int] = {}
    for line in lines:
        if isinstance(line, str):
            if blocks[-1].instructions:
                blocks.append(Block([]))
            label_of[line] = len(blocks) - 1
            continue
        blocks[-1].instructions.append(line)
        if _is_end(line) or _destination(line) is not None:
            blocks.append(Block([]))
    for i, block in enumerate(blocks):
        last = block.instructions[-1] if block.instructions else None
        falls_through = i + 1 < len(blocks)
        successors = []
        if last is not None:
            block.may_end = _is_end(last)
            destination = _destination(last)
            if destination is not None:
                successors.append(label_of[destination])
            if block.may_end or destination is not None:
                falls_through = falls_through and _is_conditional(last)
        if falls_through:
            successors.append(i + 1)
        block.successors = tuple(dict.fromkeys(successors))
    return blocks
