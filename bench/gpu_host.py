"""Time that the host needs for a call of `optimize` on a GPU, measured without one.

The model is on PyTorch's `meta` device, where copies and kernels do nothing, and a replay does nothing either. What is
left is the host's part: noticing changed weights, planning, writing index tensors and rows, queueing. Calls into the
CUDA driver are not in it.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from pathlib import Path

import torch

import revit_fast as rf
from bench.report import RESULTS, header_line, machine_header, spread_ms, write
from bench.turns import HostClock, WallClock, take_turns
from revit_fast.inference import cuda_graphs
from revit_fast.inference.cuda_graphs import bucket_of, write_index
from revit_fast.packing import PackedBatch, PackPlan

GRIDS, COUNTS = (14, 10, 7), (16, 24, 24)
"""Patches per side, and images of each in the fixed mix."""

LENGTHS = tuple(g * g for g in GRIDS)
N_IMAGES = sum(COUNTS)
MIXES = {
    "same": "the same mix again: its plan is known",
    "order": "the fixed mix in a new order",
    "random": "64 images of grids drawn at random, sides 7 to 14, mostly not square",
}


class NothingToReplay(cuda_graphs.DirectCalls):
    """Replays nothing: the output stays as it is."""

    def capture(self, run: Callable) -> Callable:
        output = torch.empty(1024, 1000, device="meta")
        return lambda: output


def grids_of(mix: str, turn: int) -> list[tuple[int, int]]:
    generator = random.Random(turn)
    if mix == "random":
        return [(generator.randint(7, 14), generator.randint(7, 14)) for _ in range(N_IMAGES)]
    grids = [(g, g) for g, count in zip(GRIDS, COUNTS, strict=True) for _ in range(count)]
    if mix == "order":
        generator.shuffle(grids)
    return grids


def seqlens_of(grids: list[tuple[int, int]]) -> list[int]:
    return [h * w for h, w in grids]


def parts(model: rf.ReViT, mix: str, n_turns: int) -> dict[str, Callable[[int], object]]:
    """What is timed, as functions of the turn. Each gets plans of its own, so that none finds another's work done."""
    fast = rf.optimize(model, torch.bfloat16)
    normalization = torch.tensor([[0.5] * 3, [0.25] * 3])
    host_rows = torch.zeros(N_IMAGES * LENGTHS[0], 768, dtype=torch.uint8)

    def draw(part: int, turn: int) -> list[tuple[int, int]]:
        return grids_of(mix, 0 if mix == "same" else part * n_turns + turn)

    def batches(part: int, rows: torch.Tensor) -> list[PackedBatch]:
        drawn = [draw(part, turn) for turn in range(n_turns)]
        options = {"lengths": LENGTHS, "normalization": normalization}
        made = [PackedBatch.from_rows(rows[: sum(n)], n, grids=g, **options) for g in drawn for n in [seqlens_of(g)]]
        for batch in made[:100]:  # captures, and learns grids
            fast(batch)
            batch.plan._kept.clear()
        return made

    on_host, on_device = batches(0, host_rows), batches(1, host_rows.to(model.pos_embed.device))
    plans = [batch.plan for batch in batches(2, host_rows)]
    graphs = fast._graphs.value
    key = next(reversed(graphs.graphs))
    planned = [draw(3, turn) for turn in range(n_turns)]

    def plan(turn: int) -> PackPlan:
        return PackPlan.of(seqlens_of(planned[turn]), LENGTHS, grids=planned[turn])

    def index(turn: int) -> None:
        patches, known = plans[turn], fast._positions.learn(plans[turn].grids)
        bucket = bucket_of(patches.n_rows, N_IMAGES, LENGTHS[-1])
        n_token_rows = bucket.n_rows + bucket.n_sequences
        tokens = patches.tokens(1, n_token_rows - patches.n_rows - N_IMAGES)
        with next(graphs._buffers).turn() as buffer:
            graph = graphs._graph(key._replace(bucket=bucket), tokens.tile_counts, n_token_rows)
            vector = buffer.part(graph.index.shape[0], torch.int32)
            write_index(vector.numpy(), patches, tokens, known.first_rows(patches.grids), bucket, graph.capacity)
            graphs._backend.send(vector, graph.index)

    def rows(turn: int) -> None:
        batch = on_host[turn]
        with next(graphs._buffers).turn() as buffer:
            graphs._copy_rows(batch.data, graphs._rows[torch.uint8][: len(batch.data)], buffer)

    def watch(turn: int) -> None:
        with fast._graphs.of(fast):
            pass

    return {
        "plan of the lengths": plan,
        "index tensors from the plan": index,
        "have the weights changed?": watch,
        "rows to page-locked memory": rows,
        "whole call, rows on the device": lambda turn: fast(on_device[turn]),
        "whole call, rows on the host": lambda turn: fast(on_host[turn]),
    }


def measure(rounds: int, device: str = "meta") -> dict[str, dict[str, tuple[float, list[float]]]]:
    """Median and quartiles in ms of every part, for every kind of mix; on "cuda" the driver's calls are in it."""
    cuda_graphs.BACKENDS["meta"] = NothingToReplay
    with torch.device(device):
        model = rf.ReViT(grids=GRIDS, patch_size=16, embed_dim=384, depth=12, num_heads=6).eval()
    clock = HostClock() if device == "cuda" else WallClock()
    results = {}
    for mix in MIXES:
        samples = take_turns(parts(model, mix, rounds), rounds, clock=clock)
        results[mix] = {name: spread_ms(seconds) for name, seconds in samples.items()}
    return results


def table(header: dict, results: dict) -> str:
    """µs, medians with quartiles."""
    lines = [f"{header_line(header)}", "", f"µs, median (quartiles); {N_IMAGES} images, DeiT-S, one thread", ""]
    lines += ["| part | " + " | ".join(MIXES) + " |", "| --- |" + " --: |" * len(MIXES)]
    for name in next(iter(results.values())):
        cells = [f"{1e3 * m:.0f} ({1e3 * q[0]:.0f}–{1e3 * q[1]:.0f})" for m, q in (r[name] for r in results.values())]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"{name}: {text}" for name, text in MIXES.items()), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    header = machine_header()
    results = measure(arguments.rounds)
    text = table(header, results)
    write("gpu_host", header, {"mixes": MIXES, "ms": results}, text, arguments.out)
    print(text)


if __name__ == "__main__":
    main()
