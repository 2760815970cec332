"""Public operators on packed sequences."""

from revit_fast.ops import _triton
from revit_fast.ops.attention import varlen_attention
from revit_fast.ops.layer_norm import tal_layer_norm, tal_rms_norm
from revit_fast.ops.linear import pack_weight, packed_linear
from revit_fast.ops.resize import resize_patchify
from revit_fast.ops.rotary import rotary
from revit_fast.ops.tokens import assemble_tokens, mean_pool
from revit_fast.ops.vit import vit_forward

_triton.register()

__all__ = [
    "assemble_tokens",
    "mean_pool",
    "pack_weight",
    "packed_linear",
    "resize_patchify",
    "rotary",
    "tal_layer_norm",
    "tal_rms_norm",
    "varlen_attention",
    "vit_forward",
]
