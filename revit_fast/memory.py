"""Giving freed memory back to the system."""

from __future__ import annotations

import ctypes
from functools import lru_cache


@lru_cache(maxsize=1)
def _malloc_trim():
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # not glibc
        return None


def release_freed_pages() -> bool:
    """Gives pages that the allocator holds free back to the system; False where it cannot be asked to.

    glibc keeps up to a threshold of free memory for every thread that ever allocated (64 MiB once the extension is
    loaded, see csrc/library.cpp): images decoded on threads and freed elsewhere would make a long stream grow by it.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)
    return trim is not None
