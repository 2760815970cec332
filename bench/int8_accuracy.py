"""Accuracy of low precision on weights with and without outliers: classes and logits beside those of float64.

Run: python -m bench.int8_accuracy [--model deit-ti] [--images 512]

No trained weights are at hand: weights and images are random, by the seeds that the table states. "Outliers" multiplies
four channels of every norm's weight by 10, and a thousandth of the weights of every linear layer by 5. Calibration has
images of its own. The table goes to the standard output, and to `bench/results/int8_accuracy.md` and `.json`.
"""

from __future__ import annotations

import argparse
import copy
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import torch
from timm.models import VisionTransformer
from torch import Tensor, nn

import revit_fast as rf
from bench.model_work import MODELS, Grid, agreement, grids_of, model_title, random_vit, relative_error, true_logits
from bench.peers.exported import CALIBRATION_SEED, N_CALIBRATION, calibration_images, positions_of
from bench.peers.openvino_ import openvino_compiled, openvino_int8_model, openvino_model, openvino_precision
from bench.report import header_line, machine_header, write

CHUNK = 16
"""Images of a call."""
WEIGHTS = ("random", "outliers")
Chunk = tuple[Grid, Tensor]
"""A grid and images `[n, 3, H, W]` of it."""
Logits = Callable[[Chunk], Tensor]
"""The logits of a chunk."""


def with_outliers(vit: VisionTransformer, seed: int) -> VisionTransformer:
    """A copy whose norms have four channels ten times as large, and whose linear layers a thousandth five times."""
    vit, draw = copy.deepcopy(vit), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in vit.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight[torch.randperm(len(module.weight), generator=draw)[:4]] *= 10
            elif isinstance(module, nn.Linear):
                module.weight[torch.rand(module.weight.shape, generator=draw) < 1e-3] *= 5
    return vit


def chunks_of(vit: VisionTransformer, n_images: int, seed: int) -> list[Chunk]:
    """Images of the three lengths in the proportions of the mix."""
    draw, p = torch.Generator().manual_seed(seed), vit.patch_embed.patch_size[0]
    chunks = []
    for (h, w), n in Counter(grids_of("mix", n_images)).items():
        sizes = [min(CHUNK, n - first) for first in range(0, n, CHUNK)]
        chunks += [((h, w), torch.randn(size, 3, h * p, w * p, generator=draw)) for size in sizes]
    return chunks


def ours(vit: VisionTransformer, dtype: torch.dtype, calibrated: bool = False) -> tuple[Logits, str]:
    """Our optimised model; with outliers smoothed by calibration or not."""
    model = rf.ReViT.from_timm(vit)
    options = {}
    if calibrated:
        images = [image[0] for _, image in calibration_images(vit)]
        options["calibrate"] = [model.pack(images[i : i + CHUNK]) for i in range(0, len(images), CHUNK)]
    fast = rf.optimize(model, dtype=dtype, **options)
    return lambda chunk: fast(fast.pack(list(chunk[1]))), str(dtype).removeprefix("torch.")


def openvino(vit: VisionTransformer, n_threads: int, int8: bool = False) -> tuple[Logits, str]:
    """OpenVINO at its own choice of precision, quantized by NNCF or not."""
    model = openvino_int8_model(vit) if int8 else openvino_model(vit)
    compiled = openvino_compiled(model, n_threads, "LATENCY", None)

    def logits(chunk: Chunk) -> Tensor:
        grid, images = chunk
        return torch.from_numpy(compiled((images.numpy(), positions_of(vit, grid).numpy()))[0].copy())

    return logits, "int8 per tensor" if int8 else openvino_precision(compiled)


def accuracy_rows(vit: VisionTransformer, chunks: Sequence[Chunk], n_threads: int) -> list[dict]:
    """A row for every candidate on these images; one that does not run has the reason in place of numbers."""
    expected = true_logits(vit, [images for _, images in chunks])
    candidates = {
        "ours": lambda: ours(vit, torch.float32),
        "ours, bfloat16": lambda: ours(vit, torch.bfloat16),
        "ours, int8": lambda: ours(vit, torch.int8),
        "ours, int8, calibrated": lambda: ours(vit, torch.int8, calibrated=True),
        "OpenVINO, default precision": lambda: openvino(vit, n_threads),
        "OpenVINO, NNCF int8": lambda: openvino(vit, n_threads, int8=True),
    }
    rows = []
    for name, build in candidates.items():
        row = {"candidate": name, "classes": len(expected.argmax(1).unique()), "reason": None}
        try:
            logits_of, row["precision"] = build()
            with torch.inference_mode():
                logits = torch.cat([logits_of(chunk) for chunk in chunks])
            row |= {"error": relative_error(logits, expected), "agreement": agreement(logits, expected)}
        except Exception as e:  # a candidate that is not installed or fails must not end the run of the others
            row["reason"] = f"{type(e).__name__}: {e}".splitlines()[0]
        rows.append(row)
    return rows


def table(rows: Iterable[dict]) -> str:
    """Rows as Markdown."""
    lines = ["| model | weights | classes | candidate | precision | error | top-1 |", "|---|---|--:|---|---|--:|--:|"]
    for row in rows:
        who = f"| {row['model']} | {row['weights']} | {row['classes']} | {row['candidate']}"
        if row["reason"]:
            lines.append(f"{who} | {row['reason']} | | |")
        else:
            lines.append(f"{who} | {row['precision']} | {row['error']:.1e} | {row['agreement']:.1%} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures a model with both kinds of weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="deit-s")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=list(WEIGHTS))
    parser.add_argument(
        "--seed", type=int, default=0, help="of the weights and the outliers; images have the next but two"
    )
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    header, rows = machine_header(), []
    for weights in args.weights:
        vit = random_vit(MODELS[args.model], seed=args.seed)
        if weights == "outliers":
            vit = with_outliers(vit, args.seed)
        chunks = chunks_of(vit, args.images, image_seed := args.seed + 3)
        about = {"model": model_title(args.model), "weights": weights, "images": args.images}
        rows += [about | row for row in accuracy_rows(vit, chunks, args.threads)]
    about = (
        f"{args.images} images of the mix (seed {image_seed}); weights and outliers of seed {args.seed}; calibration "
        f"on {N_CALIBRATION} other images (seed {CALIBRATION_SEED}). Classes: how many the true logits name. Error: "
        "the largest difference to a logit of float64, as a part of the largest. Top-1: the part of the images whose "
        "largest logit is the one of float64."
    )
    text = f"# Accuracy of low precision\n\n{header_line(header)}\n\n{about}\n\n{table(rows)}\n"
    print(text)
    write("int8_accuracy", header, {"settings": vars(args), "results": rows}, text)


if __name__ == "__main__":
    main()
