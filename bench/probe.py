"""Measures the processor's peak rate of fused multiply-adds, to which fractions of the peak refer."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

from revit_fast.ops import _library

SOURCE = Path(__file__).parent / "fma_peak.c"
KINDS = ("portable vectors", "AVX2 + FMA", "AVX-512")


def compiler() -> str:
    """The C compiler.

    Raises:
        RuntimeError: if there is none.
    """
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        if name and shutil.which(name.split()[0]):
            return name
    raise RuntimeError("the FMA probe needs a C compiler: install gcc or clang, or name one in CC")


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The compiled probe; its file is deleted once it is loaded."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fma_peak.so"
        # Contraction turns v * m + a into one instruction. It is GCC's default outside ISO mode, but not clang's.
        flags = ["-O2", "-ffp-contract=fast", "-shared", "-fPIC"]
        done = subprocess.run(
            [*compiler().split(), *flags, str(SOURCE), "-o", str(path)], capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"the FMA probe does not compile:\n{done.stderr}")
        probe = ctypes.CDLL(str(path))
    probe.fma_run.restype = ctypes.c_double
    probe.fma_run.argtypes = [ctypes.c_int, ctypes.c_int64]
    return probe


class FmaProbe:
    """A fixed number of multiply-adds on `n_threads` threads, so that time is the inverse of the peak rate.

    Uses AVX-512 if our kernels use it and the processor has it, else AVX2 and FMA if the processor has them. Vectors
    wider than ours may run at another clock, so their peak would not be comparable.

    Args:
        n_threads: threads that run chains at the same time.
        seconds: approximate time of one run.

    Attributes:
        kind: instructions of the chains, one of `KINDS`.
        flops: FLOP of one run, all threads together.
    """

    def __init__(self, n_threads: int, seconds: float = 0.03) -> None:
        self._library = library()
        widest = self._library.fma_widest()
        self._kind = widest if _library.cpu_isa() == "avx512" else min(widest, 1)
        self.kind = KINDS[self._kind]
        self._n_threads = n_threads
        self._pool = ThreadPoolExecutor(n_threads)
        trial_steps = 2_000_000
        begin = time.perf_counter()
        self._library.fma_run(self._kind, trial_steps)
        self._steps = max(1, int(trial_steps * seconds / (time.perf_counter() - begin)))
        self.flops = 0.0
        self.run()

    def run(self, turn: int = 0) -> None:
        """One run. Foreign calls release the interpreter's lock, so the threads run at the same time."""
        done = [self._pool.submit(self._library.fma_run, self._kind, self._steps) for _ in range(self._n_threads)]
        self.flops = sum(future.result() for future in done)


def fma_peak(n_threads: int, rounds: int = 5) -> float:
    """FLOP/s of `n_threads` threads, the median of a few runs."""
    probe = FmaProbe(n_threads)
    times_s = []
    for _ in range(rounds):
        begin = time.perf_counter()
        probe.run()
        times_s.append(time.perf_counter() - begin)
    return probe.flops / sorted(times_s)[rounds // 2]
