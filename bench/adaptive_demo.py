"""The shipped model on 1,000 real images of the Fashion-MNIST test set: adaptively, and at every fixed length.

Run: python -m bench.adaptive_demo
"""

from __future__ import annotations

import argparse
from collections import Counter

import numpy as np
import torch

import revit_fast as rf
from bench.report import spread_ms
from bench.turns import take_turns
from revit_fast.models.hub import SHIPPED
from revit_fast.ops import _library
from revit_fast.train.datasets import open_images

MODEL = "fashion-mnist"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="timed turns of every candidate")
    args = parser.parse_args()

    pipe = rf.load(MODEL)
    images = open_images(SHIPPED / MODEL / "images", "test", pipe.classes)
    pixels = [images.image(i) for i in range(len(images))]
    longest = pipe.model.grids[0]
    pipes = {"adaptive": pipe} | {f"all at {g}x{g}": pipe.with_policy(("fixed", g)) for g in pipe.model.grids}
    results = {name: list(candidate(pixels)) for name, candidate in pipes.items()}
    failed = [r.error for found in results.values() for r in found if r.error is not None]
    if failed:
        raise SystemExit(f"{len(failed)} images failed: {failed[0]}")

    print(f"revit-fast {rf.__version__}, {torch.get_num_threads()} threads, {_library.cpu_isa()}")
    print(f"the shipped model {MODEL!r} on {len(images)} images of the test set, policy {pipe.prep.policy.spec}\n")
    grids = Counter(r.grid for r in results["adaptive"])
    for grid in pipe.model.grids:
        share = grids[grid] / len(images)
        print(f"{grid:>3}x{grid:<3} {grids[grid]:5d} images  {'█' * round(50 * share)}")

    runs = {name: lambda _, candidate=candidate: list(candidate(pixels)) for name, candidate in pipes.items()}
    samples = take_turns(runs, args.rounds)
    baseline = np.array(samples[f"all at {longest}x{longest}"])
    print(f"\n{'pixels to logits':16} {'accuracy':>9} {'tokens':>7} {'images/s':>9} {'times as fast':>14}  quartiles")
    for name, seconds in samples.items():
        right = np.mean(
            [int(r.logits.argmax()) == label for r, label in zip(results[name], images.labels, strict=True)]
        )
        tokens = np.mean([r.grid**2 for r in results[name]])
        low, ratio, high = np.quantile(baseline / np.array(seconds), [0.25, 0.5, 0.75])
        rate = len(images) / spread_ms(seconds)[0] * 1e3
        print(f"{name:16} {right:>9.1%} {tokens:7.1f} {rate:9.0f} {ratio:14.2f}  {low:.2f}–{high:.2f}")


if __name__ == "__main__":
    main()
