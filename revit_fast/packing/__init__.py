"""The pack: many sequences of different lengths as one tensor of rows, and everything kernels need to know about it.

Rows of sequence `b` are `data[cu_seqlens[b] : cu_seqlens[b + 1]]`; rows beyond `cu_seqlens[-1]` are padding. Lengths
are known on the host when a pack is made. All that follows from them is in one `PackPlan`, which the pack carries, so
no kernel reads them back.
"""

from revit_fast.grids import DEFAULT_GRIDS, check_grids
from revit_fast.packing.batch import PackedBatch, image_grid, patch_rows
from revit_fast.packing.plan import (
    Layout,
    PackPlan,
    WorkList,
    cached_tensors,
    cumulative,
    device_cu_seqlens,
    nearest_length,
    work_list,
)

__all__ = [
    "DEFAULT_GRIDS",
    "Layout",
    "PackPlan",
    "PackedBatch",
    "WorkList",
    "cached_tensors",
    "check_grids",
    "cumulative",
    "device_cu_seqlens",
    "image_grid",
    "nearest_length",
    "patch_rows",
    "work_list",
]
