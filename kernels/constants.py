"""Tiles of the work list and their classes: the host plans with them, kernels compute with them. No Triton here."""

TILE_ROWS = 64
"""Query rows of one tile of the work list."""

KEY_CLASSES = (32, 64, 112, 160, 208, 256)
"""Most keys of a sequence in each short class, whose kernel holds all keys of a head at once.

Multiples of 16, the depth of a tensor-core product: 7² = 49 patches fit 64, 10² = 100 fit 112, 14² = 196 fit 208, each
with its prefix tokens, so that padded keys cost 4 to 28 % rather than up to twice the work.
"""

STREAMING, PADDING = len(KEY_CLASSES), len(KEY_CLASSES) + 1
"""Classes of tiles whose keys are walked block by block, and of tiles of padding rows, whose result is zero."""

N_CLASSES = PADDING + 1
