"""Layers of a packed ViT. They work on rows `[T, C]` and a `Layout` that says which sequence each row belongs to."""

from revit_fast.layers.attention import Attention, Queries
from revit_fast.layers.block import Block, DropPath, LayerScale, ResidualScale
from revit_fast.layers.conv_stem import ConvStem
from revit_fast.layers.mlp import ACTIVATIONS, Mlp, activation_name, make_activation
from revit_fast.layers.norm import TALLayerNorm, TALRMSNorm
from revit_fast.layers.patch_embed import FoldedEmbedding, PatchEmbed
from revit_fast.layers.positions import PositionTables, Resampling
from revit_fast.layers.segments import sequence_max, sequences_of_rows

__all__ = [
    "ACTIVATIONS",
    "Attention",
    "Block",
    "ConvStem",
    "DropPath",
    "FoldedEmbedding",
    "LayerScale",
    "Mlp",
    "PatchEmbed",
    "PositionTables",
    "Queries",
    "Resampling",
    "ResidualScale",
    "TALLayerNorm",
    "TALRMSNorm",
    "activation_name",
    "make_activation",
    "sequence_max",
    "sequences_of_rows",
]
