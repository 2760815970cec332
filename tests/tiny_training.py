"""A ReViT that is trained in seconds, for tests of what comes after training."""

import functools

import numpy as np
import torch
import torch.nn.functional as F

import revit_fast as rf
from bench.experiments.gratings import make_synthetic
from revit_fast.adaptive.preprocess import AdaptivePreprocessor

GRIDS, PATCH, N_CLASSES = (7, 5, 4), 4, 4
SETTINGS = {"mean": [0.5] * 3, "std": [0.25] * 3, "crop_pct": 1.0, "interpolation": "bicubic"}


def train_tiny(images, steps=60, batch=48, lr=4e-3, seed=0, **options):
    """Every step sees the images of a batch at every length, in one pack."""
    torch.manual_seed(seed)
    size = dict(embed_dim=32, depth=2, num_heads=4, hidden_dim=64, global_pool="avg", class_token=False)
    model = rf.ReViT(grids=GRIDS, patch_size=PATCH, num_classes=len(images.classes), **size | options)
    model.pretrained_cfg = dict(SETTINGS)
    prep = AdaptivePreprocessor.for_model(model, policy="cycle")
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps)
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        chosen = rng.integers(0, len(images), batch)
        grids = [g for g in GRIDS for _ in chosen]
        pack = prep.pack([images.image(int(i)) for i in chosen] * len(GRIDS), grids)
        loss = F.cross_entropy(model(pack), torch.from_numpy(np.tile(images.labels[chosen], len(GRIDS))))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@functools.cache
def synthetic(n, seed):
    return make_synthetic(n, GRIDS, PATCH, seed, N_CLASSES)


@functools.cache
def trained():
    """A model that has learnt the synthetic set."""
    return train_tiny(synthetic(3000, 0)[0])
