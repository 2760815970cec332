"""Measures the processor's peak rates of multiply-add instructions, to which fractions of a peak refer."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from revit_fast.ops import _library, linear

SOURCE = Path(__file__).parent / "peak.c"


@dataclass(frozen=True)
class Instruction:
    """A multiply-add instruction.

    Attributes:
        name: as tables name it.
        flags: of the compiler, for `SOURCE`.
        needs: what the processor must have, keys of `torch.cpu.get_capabilities()`.
    """

    name: str
    flags: tuple[str, ...]
    needs: tuple[str, ...] = ()

    @property
    def supported(self) -> bool:
        """Whether the processor has it."""
        has = torch.cpu.get_capabilities()
        return all(has.get(name, False) for name in self.needs)


FMA = Instruction("FMA, portable vectors", ("-DFMA=16",))
FMA_256 = Instruction("FMA, AVX2", ("-DFMA=32", "-mavx2", "-mfma"), ("avx2", "fma3"))
FMA_512 = Instruction("FMA, AVX-512", ("-DFMA=64", "-mavx512f"), ("avx512_f",))
VDPBF16PS = Instruction(
    "vdpbf16ps, AVX-512", ("-DVDPBF16PS=64", "-mavx512f", "-mavx512bf16"), ("avx512_f", "avx512_bf16")
)
VPDPBUSD_256 = Instruction("vpdpbusd, AVX-VNNI", ("-DVPDPBUSD=32", "-mavx2", "-mavxvnni"), ("avx_vnni",))
VPDPBUSD_512 = Instruction(
    "vpdpbusd, AVX-512", ("-DVPDPBUSD=64", "-mavx512f", "-mavx512vnni"), ("avx512_f", "avx512_vnni")
)
VPMADDWD_256 = Instruction("vpmaddwd, AVX2", ("-DVPMADDWD=32", "-mavx2"), ("avx2",))
VPMADDWD_512 = Instruction("vpmaddwd, AVX-512", ("-DVPMADDWD=64", "-mavx512bw"), ("avx512_f", "avx512_bw"))
INSTRUCTIONS = (FMA_512, FMA_256, FMA, VDPBF16PS, VPDPBUSD_512, VPDPBUSD_256, VPMADDWD_512, VPMADDWD_256)


def has_vnni() -> bool:
    """Whether the processor multiplies and adds 8-bit integers without intermediate sums of 16 bits."""
    return VPDPBUSD_512.supported or VPDPBUSD_256.supported


def first_supported(*instructions: Instruction | None) -> Instruction:
    """The first that the processor has, None aside; portable vectors where it has none."""
    return next((i for i in instructions if i and i.supported), FMA)


def is_wide() -> bool:
    """Whether our kernels use vectors of 512 bits."""
    return _library.cpu_isa().startswith(("avx512", "amx"))


def engine_instruction(precision: str) -> Instruction:
    """The instruction that our kernels multiply with at a precision, "int8", by the instruction set in use.

    Vectors wider than ours may run at another clock, so their peak would not be comparable.
    """
    wide = is_wide()
    if precision == "int8":
        vnni = (VPDPBUSD_512 if wide else VPDPBUSD_256) if linear.cpu_integer_depths() == 4 else None
        return first_supported(vnni, VPMADDWD_512 if wide else None, VPMADDWD_256)
    bf16 = precision == "bfloat16" and wide and linear.cpu_multiplies_bf16()
    return first_supported(VDPBF16PS if bf16 else None, FMA_512 if wide else None, FMA_256)


def best_instruction(precision: str) -> Instruction:
    """The instruction of the highest rate that the processor has for a precision, "int8 per tensor".

    That is of those in `INSTRUCTIONS`: AMX has a higher rate.
    """
    if precision.startswith("int8"):
        return first_supported(VPDPBUSD_512, VPDPBUSD_256, engine_instruction("int8"))
    if precision == "bfloat16":
        return first_supported(VDPBF16PS, engine_instruction("float32"))
    return engine_instruction("float32")


def instructions_in_use() -> list[Instruction]:
    """Those that the processor has, FMA and `vpmaddwd` at the width of our kernels."""
    unused = (
        (FMA, FMA_256, VPMADDWD_256)
        if _library.cpu_isa().startswith(("avx512", "amx"))
        else (FMA, FMA_512, VPMADDWD_512)
    )
    ours = [engine_instruction(precision) for precision in ("float32", "bfloat16", "int8")]
    return list(dict.fromkeys([*ours, *(i for i in INSTRUCTIONS if i.supported and i not in unused)]))


def compiler() -> str:
    """The C compiler.

    Raises:
        RuntimeError: if there is none.
    """
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        if name and shutil.which(name.split()[0]):
            return name
    raise RuntimeError("the probes of peaks need a C compiler: install gcc or clang, or name one in CC")


def compile_probe(instruction: Instruction, path: Path) -> None:
    """Compiles the probe of an instruction; the processor need not have it.

    Raises:
        RuntimeError: where the compiler does not know the instruction.
    """
    # Contraction turns v * m + a into one instruction. It is GCC's default outside ISO mode, but not clang's.
    flags = ["-O2", "-ffp-contract=fast", "-shared", "-fPIC", *instruction.flags]
    done = subprocess.run([*compiler().split(), *flags, str(SOURCE), "-o", str(path)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the probe of {instruction.name} does not compile:\n{done.stderr}")


@lru_cache(maxsize=len(INSTRUCTIONS))
def library(instruction: Instruction) -> ctypes.CDLL:
    """The compiled probe of an instruction; its file is deleted once it is loaded."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "peak.so"
        compile_probe(instruction, path)
        probe = ctypes.CDLL(str(path))
    probe.peak_run.restype = ctypes.c_double
    probe.peak_run.argtypes = [ctypes.c_int64]
    return probe


class PeakProbe:
    """A fixed number of multiply-adds on `n_threads` threads, so that time is the inverse of the peak rate.

    Args:
        instruction: one that the processor has.
        n_threads: threads that run chains at the same time.
        seconds: approximate time of one run.

    Attributes:
        ops: operations of one run, all threads together, two for a multiply-add.
    """

    def __init__(self, instruction: Instruction, n_threads: int, seconds: float = 0.03) -> None:
        if not instruction.supported:
            raise ValueError(f"instruction: this processor has no {instruction.name}")
        self._run = library(instruction).peak_run
        self._n_threads = n_threads
        self._pool = ThreadPoolExecutor(n_threads)
        trial_steps = 1_000_000
        begin = time.perf_counter()
        self._run(trial_steps)
        self._steps = max(1, int(trial_steps * seconds / (time.perf_counter() - begin)))
        self.ops = 0.0
        self.run()

    def run(self, turn: int = 0) -> None:
        """One run. Foreign calls release the interpreter's lock, so the threads run at the same time."""
        done = [self._pool.submit(self._run, self._steps) for _ in range(self._n_threads)]
        self.ops = sum(future.result() for future in done)
