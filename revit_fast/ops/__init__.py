"""Public operators on packed sequences."""

from .resize import resize_patchify

__all__ = ["resize_patchify"]
