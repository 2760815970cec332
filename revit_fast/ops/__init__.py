"""Public operators on packed sequences."""

from revit_fast.ops.attention import varlen_attention

__all__ = ["varlen_attention"]
