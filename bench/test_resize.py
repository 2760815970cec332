"""resize_patchify against torchvision v2 on uint8 tensors and against Pillow, from decoded pixels to patch rows."""

from __future__ import annotations

import pytest
import torch
import torchvision.transforms.functional as pillow_transforms
from conftest import Comparison
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from bench.model_work import relative_error
from bench.photos import photo
from revit_fast import ops

PATCH = 16
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
N_SETS = 8
CANDIDATES = ("ours", "torchvision v2 uint8", "Pillow + ToTensor + Normalize")


def patchify(image: Tensor) -> Tensor:
    """`[3, H, W]` to patch rows `[gh * gw, P * P * 3]`."""
    channels, height, width = image.shape
    grid = image.view(channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return grid.permute(1, 3, 2, 4, 0).reshape(-1, PATCH * PATCH * channels)


def pack(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def torchvision_rows(image: Tensor, size: tuple[int, int]) -> Tensor:
    image = v2.functional.resize(image, list(size), interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    image = v2.functional.to_dtype(image, torch.float32, scale=True)
    return patchify(v2.functional.normalize(image, MEAN, STD))


def pillow_rows(image: Image.Image, size: tuple[int, int]) -> Tensor:
    resized = image.resize((size[1], size[0]), Image.Resampling.BICUBIC)
    return patchify(pillow_transforms.normalize(pillow_transforms.to_tensor(resized), MEAN, STD))


def compare(case: str, sources: list[tuple[int, int]], targets: list[int], *, threads: int, rounds: int) -> Comparison:
    """All candidates on `sources` (height, width): ours in one call per batch, the others in one call per image."""
    sets = [[photo(100 * s + i, height, width) for i, (height, width) in enumerate(sources)] for s in range(N_SETS)]
    sizes = [(target, target) for target in targets]
    # CHW view of HWC memory: channels_last, the layout that torchvision's uint8 kernel is fastest in.
    chw = [[torch.from_numpy(image).permute(2, 0, 1) for image in images] for images in sets]
    pillow = [[Image.fromarray(image) for image in images] for images in sets]

    def ours(turn: int) -> Tensor:
        return ops.resize_patchify(sets[turn % N_SETS], sizes, PATCH, mean=MEAN, std=STD).data

    def torchvision_v2(turn: int) -> Tensor:
        return pack([torchvision_rows(im, size) for im, size in zip(chw[turn % N_SETS], sizes, strict=True)])

    def pillow_13(turn: int) -> Tensor:
        return pack([pillow_rows(im, size) for im, size in zip(pillow[turn % N_SETS], sizes, strict=True)])

    truth = pillow_13(0)
    one_step = 1.01 / 255 / min(STD)

    def check(name: str, rows: Tensor) -> float:
        if name == "torchvision v2 uint8":  # 16-bit weights: off by one 8-bit step, or by two if both passes differ
            assert (rows - truth).abs().max() <= 2 * one_step, name
        else:
            assert torch.equal(rows, truth), name
        return relative_error(rows, truth)

    candidates = dict(zip(CANDIDATES, (ours, torchvision_v2, pillow_13), strict=True))
    return Comparison("resize", case, candidates, check, "uint8 to float32", threads=threads, rounds=rounds)


def build_224() -> Comparison:
    return compare("375x500 to 224, 1 thread", [(375, 500)], [224], threads=1, rounds=60)


def build_160() -> Comparison:
    return compare("375x500 to 160, 1 thread", [(375, 500)], [160], threads=1, rounds=60)


def build_112() -> Comparison:
    return compare("375x500 to 112, 1 thread", [(375, 500)], [112], threads=1, rounds=60)


def build_photo() -> Comparison:
    return compare("3000x4000 to 224, 1 thread", [(3000, 4000)], [224], threads=1, rounds=10)


def build_batch() -> Comparison:
    sources = [(375, 500), (500, 375), (333, 500), (480, 640)] * 4
    targets = [224] * 4 + [160] * 6 + [112] * 6
    return compare("16 mixed images to 224, 160, 112, 2 threads", sources, targets, threads=2, rounds=20)


@pytest.mark.parametrize("candidate", CANDIDATES)
@pytest.mark.parametrize("build", [build_224, build_160, build_112, build_photo, build_batch])
def test_resize(replay, build, candidate):
    replay(build, candidate)
