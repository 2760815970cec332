"""Small models and mixed batches for the tests of `optimize`."""

import copy

import torch
from helpers import assert_as_accurate, randn
from torch import nn

import revit_fast as rf
from revit_fast.packing import PackedBatch

GRIDS = (6, 4, 2)
PATCH = 2
MIX = [4, 6, 2, (3, 5), 2, 6]


def drawn(model: nn.Module, scale: float = 0.3) -> nn.Module:
    """The model with every parameter drawn at random, norms of every length apart."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def make_model(**options) -> rf.ReViT:
    arguments = dict(grids=GRIDS, patch_size=PATCH, num_classes=40, embed_dim=24, depth=2, num_heads=3, hidden_dim=40)
    return drawn(rf.ReViT(**{**arguments, **options}))


def images_of(grids, patch=PATCH, seed=0):
    sides = [(g, g) if isinstance(g, int) else g for g in grids]
    return [randn(3, patch * h, patch * w, seed=seed + i) for i, (h, w) in enumerate(sides)]


def check(fast, model, x):
    """Holds the optimised copy to the error rule beside the eager model."""
    with torch.no_grad():
        truth = copy.deepcopy(model).double()
        double = x.with_data(x.data.double()) if isinstance(x, PackedBatch) else [image.double() for image in x]
        assert_as_accurate(fast(x), model(x), truth(double), "logits")
