"""Tiles of the work list and their classes: the host plans with them, kernels compute with them. No Triton here."""

TILE_ROWS = 64
"""Query rows of one tile of the work list."""

KEY_CLASSES = (32, 64, 112, 160, 208, 256)
"""The largest number of keys in each short class. The kernel of a short class holds all keys of a head at once.

They are multiples of 16, the depth of a tensor-core product. With their prefix tokens, 7² = 49 patches fit 64,
10² = 100 fit 112 and 14² = 196 fit 208, so that padded keys cost 4 to 28 %. Powers of two would cost up to twice the
work.
"""

STREAMING, PADDING = len(KEY_CLASSES), len(KEY_CLASSES) + 1
"""The class of tiles that process their keys block by block, and the class of padding rows, whose result is zero."""

N_CLASSES = PADDING + 1
