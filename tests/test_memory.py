"""Freed memory goes back to the system."""

import ctypes
import sys
from pathlib import Path

import pytest

from revit_fast.memory import release_freed_pages


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_resident_memory_shrinks():
    if not release_freed_pages():
        pytest.skip("the allocator is not glibc's")
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = (
        ctypes.c_void_p,
        [ctypes.c_size_t],
        [ctypes.c_void_p],
    )

    def resident_pages():
        return int(Path("/proc/self/statm").read_text().split()[1])

    size, n = 64 << 10, 1000  # too small to be mapped alone
    pieces = [libc.malloc(size) for _ in range(n)]
    for piece in pieces:
        ctypes.memset(piece, 1, size)
    full = resident_pages()
    for piece in pieces[:-1]:  # the last one holds the top of the heap
        libc.free(piece)
    assert release_freed_pages()
    assert resident_pages() < full - 0.8 * n * size / 4096
    libc.free(pieces[-1])
