"""Controls whether glibc keeps the pages of freed memory for the next allocation or returns them to the system.

Tensors of a forward pass are freed and allocated again at once. By default glibc returns their pages to the system in
between, and the page faults of the next allocation cost more than some kernels do: 1,240 faults and three times the
time for a fused norm of 1,694 x 384 floats. `keep_freed_pages` prevents that. It changes the allocator of the whole
process, so importing the package does not call it. `revit_fast.optimize`, pipelines, training and the commands do.

The environment variable `REVIT_FAST_MALLOC` is read once, when this module is imported:

| value | pages are kept |
| --- | --- |
| unset | from the first call of `keep_freed_pages` on |
| `keep` | from the import of `revit_fast` on |
| `default` | never: the allocator is left alone |
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from functools import lru_cache

MMAP_THRESHOLD, TRIM_THRESHOLD = 32 << 20, 64 << 20
"""Size, in bytes, of the smallest block that has its own mapping, and of the free memory kept at the top of the heap.

glibc adapts both to the blocks that a program frees. It reaches its maximum, these values, when a program has freed a
block of 32 MiB.
"""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Options of `mallopt`, from glibc's malloc.h."""

CHOICES = ("default", "keep")


def _choice() -> str | None:
    choice = os.environ.get("REVIT_FAST_MALLOC") or None
    if choice is not None and choice not in CHOICES:
        raise ImportError(
            f"REVIT_FAST_MALLOC: {choice!r} is unknown; it may be 'default' (the allocator is left alone) or 'keep' "
            "(freed pages are kept from the import on), or unset (optimize, pipelines, training and commands keep them)"
        )
    return choice


CHOICE = _choice()
"""The value of `REVIT_FAST_MALLOC`; None if it is unset or empty."""

_log = logging.getLogger("revit_fast")
_lock = threading.Lock()
_keeps = False


@lru_cache(maxsize=1)
def _glibc() -> ctypes.CDLL | None:
    """glibc, if tensors come from its allocator; otherwise None.

    Another allocator, for example a preloaded jemalloc, replaces `posix_memalign`, which PyTorch calls. glibc's
    settings then have no effect.
    """
    try:
        glibc, process = ctypes.CDLL("libc.so.6"), ctypes.CDLL(None)
        own, used = (ctypes.cast(c.posix_memalign, ctypes.c_void_p).value for c in (glibc, process))
    except (AttributeError, OSError, TypeError):  # another C library
        return None
    return glibc if own == used and hasattr(glibc, "mallopt") and hasattr(glibc, "malloc_trim") else None


def _raise_thresholds() -> bool:
    glibc = _glibc()
    return glibc is not None and all(
        glibc.mallopt(option, n_bytes) == 1
        for option, n_bytes in ((M_MMAP_THRESHOLD, MMAP_THRESHOLD), (M_TRIM_THRESHOLD, TRIM_THRESHOLD))
    )


def keep_freed_pages() -> bool:
    """Makes the allocator of this process keep freed memory, so that the next allocation costs no page faults.

    Raises glibc's thresholds to `MMAP_THRESHOLD` and `TRIM_THRESHOLD`, once per process; further calls change nothing.
    The process then keeps up to 64 MiB of free memory for each thread that ever allocated; `release_freed_pages`
    gives it back. `revit_fast.optimize`, pipelines, training and the commands call this function; call it yourself if
    you use the operators alone. The first effective call logs one line, level INFO, to the logger "revit_fast". Several
    threads may call it concurrently.

    Returns:
        Whether the allocator keeps freed pages. False if it is not glibc's, and with `REVIT_FAST_MALLOC=default`.
    """
    global _keeps
    with _lock:
        is_new = not _keeps and CHOICE != "default" and _raise_thresholds()
        _keeps = _keeps or is_new
    if is_new:  # outside the lock, because a log handler may call this function
        _log.info("this process keeps freed memory pages from now on; REVIT_FAST_MALLOC=default prevents it")
    return _keeps


def controls_allocator() -> bool:
    """Whether tensors come from glibc's allocator, the one that `keep_freed_pages` has a say in."""
    return _glibc() is not None


def allocator_state() -> str:
    """One line that says whether the allocator keeps freed pages, and what would change that."""
    if _keeps:
        return "keeps freed pages; REVIT_FAST_MALLOC=default prevents it"
    if _glibc() is None:
        return "not glibc's, left alone"
    if CHOICE == "default":
        return "left alone by REVIT_FAST_MALLOC=default; keeps freed pages when that is unset"
    return (
        "unchanged until optimize, a pipeline, training or a command makes it keep freed pages; "
        "REVIT_FAST_MALLOC=default prevents it, REVIT_FAST_MALLOC=keep does it at import"
    )


def release_freed_pages() -> bool:
    """Returns the pages of freed memory to the system.

    glibc keeps free memory up to a threshold for each thread that ever allocated, 64 MiB after `keep_freed_pages`.
    Images are decoded on some threads and freed on others, so the memory of a long stream would grow by that much for
    each thread.

    Returns:
        Whether the allocator is glibc's. For any other this function does nothing.
    """
    glibc = _glibc()
    if glibc is not None:
        glibc.malloc_trim(0)
    return glibc is not None


if CHOICE == "keep":
    keep_freed_pages()
