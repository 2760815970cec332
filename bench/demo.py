"""The main job on real photographs: mixed token grids in one packed forward pass, beside timm.

Run: python -m bench.demo [--model NAME] [--images N]
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import skimage
import sklearn
import timm
import torch
from PIL import Image

import revit_fast as rf
from bench.turns import take_turns
from revit_fast.io.memory import keep_freed_pages
from revit_fast.ops import _library

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GRIDS = (14, 10, 7)
MIX = (14, 7, 10, 7, 14, 10, 7, 10)  # of 8 images: 2 long, 3 middle, 3 short

PHOTOGRAPHS = [
    Path(skimage.__file__).parent / "data" / name
    for name in ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "camera.png", "motorcycle_left.png")
] + [Path(sklearn.__file__).parent / "datasets" / "images" / name for name in ("china.jpg", "flower.jpg")]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="deit_small_patch16_224", help="timm name of a ViT")
    parser.add_argument("--images", type=int, default=16, help="images in the batch")
    parser.add_argument("--rounds", type=int, default=9, help="timed turns of every candidate")
    args = parser.parse_args()

    keep_freed_pages()  # for timm too; `optimize` would do this, but the model is run as it is
    torch.manual_seed(0)
    vit = timm.create_model(args.model, dynamic_img_size=True).eval()
    with torch.no_grad():  # random weights, scaled so that activations are of order one
        for parameter in vit.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=1.5 / parameter.shape[1] ** 0.5)
    model = rf.ReViT.from_timm(vit, grids=GRIDS)
    patch = model.patch_size

    photographs = [np.asarray(Image.open(path)) for path in PHOTOGRAPHS]
    chosen = [i % len(photographs) for i in range(args.images)]
    images = [photographs[i] for i in chosen]
    grids = [MIX[(i + i // len(MIX)) % len(MIX)] for i in range(args.images)]

    begin = time.perf_counter()
    batch = rf.ops.resize_patchify(images, [(g * patch, g * patch) for g in grids], patch, mean=MEAN, std=STD)
    prepare_ms = (time.perf_counter() - begin) * 1e3
    logits = model(batch)

    n_threads, isa = torch.get_num_threads(), _library.cpu_isa()
    print(f"revit-fast {rf.__version__}, torch {torch.__version__}, {n_threads} threads, {isa}")
    print(f"{args.model}, random weights; {len(batch)} photographs resized to patches in {prepare_ms:.1f} ms")
    tensors = []
    worst = 0.0
    print(f"\n{'photograph':22} {'size':>10} {'grid':>6} {'tokens':>6}  difference to timm alone")
    for index, (rows, grid) in enumerate(zip(batch.split(), grids, strict=True)):
        image = rows.view(grid, grid, patch, patch, 3).permute(4, 0, 2, 1, 3).reshape(3, grid * patch, grid * patch)
        tensors.append(image)
        alone = vit(image[None])[0]
        difference = ((logits[index] - alone).abs().max() / alone.abs().max()).item()
        worst = max(worst, difference)
        height, width = images[index].shape[:2]
        size, shape = f"{width}x{height}", f"{grid}x{grid}"
        n_tokens = grid * grid + model.num_prefix_tokens
        print(f"{PHOTOGRAPHS[chosen[index]].name:22} {size:>10} {shape:>6} {n_tokens:6d}  {difference:.1e}")
    print(f"\nmaximal difference to timm, image by image: {worst:.1e} of the largest logit")
    if worst > 2e-5:
        raise SystemExit("the difference exceeds 2e-5: this is a bug")

    full = rf.ops.resize_patchify(images, (GRIDS[0] * patch, GRIDS[0] * patch), patch, mean=MEAN, std=STD).data
    full = full.view(-1, GRIDS[0], GRIDS[0], patch, patch, 3).permute(0, 5, 1, 3, 2, 4)
    full = full.reshape(-1, 3, GRIDS[0] * patch, GRIDS[0] * patch)
    groups = [torch.stack([t for t, g in zip(tensors, grids, strict=True) if g == grid]) for grid in sorted(set(grids))]
    candidates = {
        "timm, every image at 14x14": lambda _: vit(full),
        "timm, grouped by length": lambda _: [vit(group) for group in groups],
        "revit-fast, one packed forward": lambda _: model(batch),
    }
    for candidate in candidates.values():
        candidate(0)
    medians = {name: 1e3 * statistics.median(times) for name, times in take_turns(candidates, args.rounds).items()}
    ours = medians["revit-fast, one packed forward"]
    print(f"\n{'forward pass':32} {'median ms':>9} {'images/s':>9} {'time / ours':>12}")
    for name, median in medians.items():
        print(f"{name:32} {median:9.1f} {len(batch) / median * 1e3:9.1f} {median / ours:12.2f}")


if __name__ == "__main__":
    main()
