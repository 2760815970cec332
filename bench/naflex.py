"""SigLIP 2's base model on a NaFlex batch of mixed aspect ratios: one pack, beside transformers' own padded path.

Both take what `Siglip2ImageProcessor` returns, with random weights and pixels, and give the pooled embeddings. Results
go to `bench/results/naflex.md` and `naflex.json`. Run: python -m bench.naflex (it needs the extra `transformers`)
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import Siglip2VisionConfig, Siglip2VisionModel

import revit_fast as rf
from bench.probe import PeakProbe, engine_instruction
from bench.report import error_text, header_line, machine_header, spread_ms, write
from bench.turns import take_turns
from revit_fast.models.macs import forward_macs

GRIDS = ((16, 16), (14, 18), (21, 12), (10, 25), (18, 14), (12, 21), (25, 10), (13, 19))
"""Rows and columns of the images: sides as the processor chooses them for at most 256 patches."""

N_PADDED = 256
N_SETS = 3
"""Sets of inputs that the rounds rotate through, so that no candidate finds its input in a cache."""

OURS, OURS_ROUNDED, PADDED = "ours, packed", "ours, packed, bfloat16", "transformers, padded"
TOLERANCES = {OURS: 1e-4, OURS_ROUNDED: 3e-2, PADDED: 1e-4}
"""Largest difference of an embedding to transformers' in float64, as a part of the largest, by precision."""


def siglip2(depth: int) -> Siglip2VisionModel:
    """transformers' model of the base size with random weights that keep activations of order one."""
    torch.manual_seed(0)
    model = Siglip2VisionModel(Siglip2VisionConfig(num_hidden_layers=depth)).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.normal_(std=1.0 / parameter.shape[1] ** 0.5)
    return model


def batch_of(seed: int, config: Siglip2VisionConfig) -> dict[str, Tensor]:
    """What the processor returns for images of `GRIDS`."""
    draw = torch.Generator().manual_seed(seed)
    mask = torch.tensor([[int(i < h * w) for i in range(N_PADDED)] for h, w in GRIDS])
    values = torch.randn(len(GRIDS), N_PADDED, config.num_channels * config.patch_size**2, generator=draw)
    return {
        "pixel_values": values * mask.unsqueeze(2),
        "pixel_attention_mask": mask,
        "spatial_shapes": torch.tensor(GRIDS),
    }


def candidates_of(model: Siglip2VisionModel) -> dict[str, Callable[[int], Tensor]]:
    """Functions of the turn that give the embeddings `[B, C]`."""
    sets = [batch_of(seed, model.config) for seed in range(N_SETS)]
    ours = rf.ReViT.from_transformers(model)
    packs = [rf.PackedBatch.from_naflex(**inputs, lengths=ours.lengths) for inputs in sets]
    fast, rounded = rf.optimize(ours), rf.optimize(ours, dtype=torch.bfloat16)
    return {
        OURS: lambda turn: fast(packs[turn % N_SETS]),
        OURS_ROUNDED: lambda turn: rounded(packs[turn % N_SETS]),
        PADDED: lambda turn: model(**sets[turn % N_SETS]).pooler_output,
    }


def measure(depth: int, rounds: int, threads: int) -> list[dict]:
    """Checks and times all candidates; ratios are to ours in float32, round by round.

    Parts of the peak count the multiply-adds of the images' own patches, for all candidates.
    """
    model = siglip2(depth)
    runs = candidates_of(model)
    flops = 2 * sum(forward_macs(rf.ReViT.from_transformers(model), h * w) for h, w in GRIDS)
    probes = {
        f"peak of {precision}": PeakProbe(engine_instruction(precision), threads)
        for precision in ("float32", "bfloat16")
    }
    with torch.inference_mode():
        inputs = batch_of(0, model.config)
        double = siglip2(depth).double()
        expected = double(**inputs | {"pixel_values": inputs["pixel_values"].double()}).pooler_output
        errors = {n: ((run(0) - expected).abs().max() / expected.abs().max()).item() for n, run in runs.items()}
        take_turns(runs, 1)
        samples = take_turns(runs | {name: probe.run for name, probe in probes.items()}, rounds, pause_s=0.3)
    peaks = {name: probe.ops / statistics.median(samples.pop(name)) for name, probe in probes.items()}
    rows = []
    for name, seconds in samples.items():
        median, quartiles = spread_ms(seconds)
        ratio = statistics.median(s / ours for s, ours in zip(seconds, samples[OURS], strict=True))
        right = errors[name] <= TOLERANCES[name]
        precision = "bfloat16" if name == OURS_ROUNDED else "float32"
        of_peak = flops / statistics.median(seconds) / peaks[f"peak of {precision}"]
        found = {"candidate": name, "precision": precision, "error": errors[name], "right": right}
        times = {"median_ms": median, "quartiles_ms": quartiles, "ratio_to_ours": ratio, "of_peak": of_peak}
        rows.append(found | times)
    return rows


def document(header: dict, depth: int, rows: Sequence[dict]) -> str:
    """The table."""
    n_tokens = sum(h * w for h, w in GRIDS)
    lines = [
        "# SigLIP 2 on a NaFlex batch",
        "",
        header_line(header),
        "",
        f"{depth} blocks of the base model, {len(GRIDS)} images, {n_tokens} patches, padded to {N_PADDED} each. Error: "
        "the largest difference to transformers in float64, as a part of the largest value. Of peak: the operations of "
        "these patches, without padding, as a part of what the instruction of our kernels can do, measured in turns.",
        "",
        "| candidate | precision | error | median ms | quartiles | time ÷ ours | of peak |",
        "| --- | --- | --: | --: | --: | --: | --: |",
    ]
    for row in rows:
        low, high = row["quartiles_ms"]
        ratio = f"{row['ratio_to_ours']:.2f}" if row["right"] else "wrong"
        lines.append(
            f"| {row['candidate']} | {row['precision']} | {error_text(row['error'])} | {row['median_ms']:.0f} "
            f"| {low:.0f}–{high:.0f} | {ratio} | {row['of_peak']:.0%} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the bench; fails if a result of ours was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=12, help="blocks (default %(default)s, as the base model)")
    parser.add_argument("--rounds", type=int, default=9, help="turns of every candidate (default %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="threads of every candidate (default %(default)s)")
    parser.add_argument("--name", default="naflex", help="results are written under this name")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    header = machine_header() | {"threads": args.threads}
    rows = measure(args.depth, args.rounds, args.threads)
    table = document(header, args.depth, rows)
    write(args.name, header, {"depth": args.depth, "grids": GRIDS, "rows": rows}, table)
    print(table)
    wrong = [row["candidate"] for row in rows if not row["right"]]
    if wrong:
        raise SystemExit("other results than transformers': " + "; ".join(wrong))


if __name__ == "__main__":
    main()
