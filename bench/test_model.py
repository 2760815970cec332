"""The whole model on the mix of four images at 14x14, six at 10x10 and six at 7x7 tokens, beside timm."""

import pytest
import timm
import torch
from conftest import Comparison

import revit_fast as rf

GRIDS = [14] * 4 + [10] * 6 + [7] * 6
CANDIDATES = ["ours", "timm grouped by length", "timm one by one", "timm full length"]


def build_deit_small() -> Comparison:
    return compare("deit_small_patch16_224", "DeiT-S, 4/6/6 mix")


def build_deit_tiny() -> Comparison:
    return compare("deit_tiny_patch16_224", "DeiT-Ti, 4/6/6 mix")


def compare(name: str, case: str) -> Comparison:
    torch.manual_seed(0)
    vit = timm.create_model(name, dynamic_img_size=True).eval()
    model = rf.ReViT.from_timm(vit)
    batches = [[torch.randn(3, g * 16, g * 16) for g in GRIDS] for _ in range(3)]
    packed = [model.pack(images) for images in batches]
    groups = [[torch.stack([x for x in images if x.shape[1] == g * 16]) for g in (14, 10, 7)] for images in batches]
    full = [torch.randn(len(GRIDS), 3, 224, 224) for _ in batches]
    with torch.inference_mode():
        expected = torch.cat([vit(group) for group in groups[0]])

    def check(candidate: str, logits: torch.Tensor) -> None:
        if candidate != "timm full length":  # the same work at another resolution: no common answer
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)

    return Comparison(
        group="model",
        case=case,
        candidates={
            "ours": torch.inference_mode()(lambda i: model(packed[i % 3])),
            "timm grouped by length": torch.inference_mode()(lambda i: torch.cat([vit(g) for g in groups[i % 3]])),
            "timm one by one": torch.inference_mode()(lambda i: torch.cat([vit(x[None]) for x in batches[i % 3]])),
            "timm full length": torch.inference_mode()(lambda i: vit(full[i % 3])),
        },
        check=check,
        rounds=9,
    )


@pytest.mark.parametrize("candidate", CANDIDATES)
def test_deit_small(replay, candidate):
    replay(build_deit_small, candidate)


@pytest.mark.parametrize("candidate", CANDIDATES)
def test_deit_tiny(replay, candidate):
    replay(build_deit_tiny, candidate)
