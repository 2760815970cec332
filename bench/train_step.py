"""One update of multi-length training: all lengths in packs, beside a dense pass for each length.

Every candidate makes the same update: the logits of every image at every length, TLSD, the gradient, AdamW.
"packed" does what the trainer does, in packs of at most `trainer.cached_images`; "one pack" has all images at once.
`python -m bench.train_step --case deit-ti --memory packed` prints the peak memory of one candidate. That process does
nothing else. The bench runs this command. The allocator keeps freed pages, as in a run of the trainer.
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch
from torch import Tensor

import revit_fast as rf
from bench.report import header_line, machine_header, spread_ms, write
from bench.scaling import status_bytes
from bench.turns import take_turns
from revit_fast.io.memory import keep_freed_pages
from revit_fast.train.loader import Batch
from revit_fast.train.losses import length_loss, tlsd_loss
from revit_fast.train.trainer import cached_images

ROOT = Path(__file__).parent.parent
GRIDS = (14, 10, 7)
N_SETS = 3
"""Number of input sets. They take turns, so that none is in a cache from the update before."""

BOUND = 1e-3
"""Largest difference of float32 gradients, as a share of the largest gradient; beyond it no ratio of times is given."""


@dataclass(frozen=True)
class Case:
    """A model and its batch: arguments of `timm.create_model`, and images of an update."""

    name: str
    kwargs: dict
    patch_size: int
    n_images: int


CASES = {
    "deit-s": Case("deit_small_patch16_224", {}, 16, 8),
    "deit-ti": Case("deit_tiny_patch16_224", {}, 16, 16),
    "small": Case(
        "vit_tiny_patch16_224",
        {"img_size": 28, "patch_size": 2, "embed_dim": 64, "depth": 4, "num_heads": 2, "num_classes": 10},
        2,
        128,
    ),
}


class Work:
    """A case's inputs and candidates."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        self.vit = timm.create_model(case.name, dynamic_img_size=True, **case.kwargs).train()
        self.ours = rf.ReViT.from_timm(self.vit, GRIDS).train()
        self.images = [
            [torch.randn(case.n_images, 3, g * case.patch_size, g * case.patch_size) for g in GRIDS]
            for _ in range(N_SETS)
        ]
        self.target = torch.randint(self.vit.num_classes, (case.n_images,))
        packs = [self.ours.pack([image for view in views for image in view]) for views in self.images]
        self.batches = [Batch(pack, self.target, np.arange(case.n_images), []) for pack in packs]
        self.candidates: dict[str, tuple[torch.nn.Module, Callable[[int], None]]] = {
            "packed": (self.ours, lambda turn: self._packed(turn, cached_images(self.ours))),
            "one pack": (self.ours, lambda turn: self._packed(turn, case.n_images)),
            "ours, a pass for each length": (self.ours, lambda turn: self._dense(self.ours, turn)),
            "timm, a pass for each length": (self.vit, lambda turn: self._dense(self.vit, turn)),
            "timm, a backward pass for each length": (self.vit, lambda turn: self._one_by_one(self.vit, turn)),
        }
        self._optimizers = {net: torch.optim.AdamW(net.parameters(), lr=0.0) for net in (self.ours, self.vit)}

    def gradient(self, name: str, turn: int = 0) -> None:
        """Leaves the gradient of an update in the candidate's parameters."""
        net, backward = self.candidates[name]
        net.zero_grad()
        backward(turn)

    def update(self, name: str, turn: int) -> None:
        """One update, at a learning rate of zero, so that all updates are alike."""
        self.gradient(name, turn)
        self._optimizers[self.candidates[name][0]].step()

    def _packed(self, turn: int, micro_batch: int) -> None:
        for part in self.batches[turn % N_SETS].parts(micro_batch):
            logits = self.ours(part.images).view(len(GRIDS), len(part.target), -1)
            (tlsd_loss(logits, part.target)[0] * (len(part.target) / len(self.target))).backward()

    def _dense(self, net: torch.nn.Module, turn: int) -> None:
        logits = torch.stack([net(view) for view in self.images[turn % N_SETS]])
        tlsd_loss(logits, self.target)[0].backward()

    def _one_by_one(self, net: torch.nn.Module, turn: int) -> None:
        teacher: Tensor | None = None
        for view in self.images[turn % N_SETS]:
            logits = net(view)
            (length_loss(logits, self.target, teacher) / len(GRIDS)).backward()
            teacher = logits.detach() if teacher is None else teacher


def check(work: Work) -> dict[str, float]:
    """Largest difference of each candidate's gradient from timm's, relative to the largest, over four weights."""
    names = ("blocks.0.attn.qkv.weight", "blocks.1.mlp.fc1.weight", "head.weight", "patch_embed.proj.weight")
    found = {}
    for name in reversed(work.candidates):
        work.gradient(name)
        net = work.candidates[name][0]
        found[name] = [net.get_parameter(p).grad.clone() for p in names]
    truth = found["timm, a pass for each length"]
    return {
        name: max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(grads, truth, strict=True))
        for name, grads in found.items()
    }


def peak_memory(case: Case, name: str) -> int:
    """Bytes that an update adds to the resident memory of this process at its peak, without weights and inputs."""
    keep_freed_pages()
    work = Work(case)
    work.update(name, 0)  # creates the optimizer's state and all else that is created once
    ctypes.CDLL(None).malloc_trim(0)
    before = status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    work.update(name, 1)
    return max(status_bytes("VmHWM") - before, 0)


def measure(key: str, rounds: int) -> dict:
    """Measures times in turns, and the memory of each candidate in a process of its own."""
    work = Work(CASES[key])
    differences = check(work)
    runs = {name: lambda turn, name=name: work.update(name, turn) for name in work.candidates}
    take_turns(runs, 2)
    samples = take_turns(runs, rounds)
    baseline = samples["timm, a pass for each length"]
    rows = []
    for name, seconds in samples.items():
        median, quartiles = spread_ms(seconds)
        ratios = sorted(b / s for b, s in zip(baseline, seconds, strict=True))
        command = [sys.executable, "-m", "bench.train_step", "--case", key, "--memory", name]
        peak = int(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()[-1])
        right = differences[name] <= BOUND
        rows.append(
            {
                "candidate": name,
                "ms": median,
                "quartiles_ms": quartiles,
                "ratio": ratios[len(ratios) // 2] if right else None,
                "ratio_quartiles": [ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]],
                "peak_bytes": peak,
                "gradient_difference": differences[name],
            }
        )
    return {"case": key, "n_images": CASES[key].n_images, "rows": rows}


def document(header: dict, results: Sequence[dict]) -> str:
    """The tables."""
    lines = ["# An update of multi-length training", "", header_line(header), ""]
    for result in results:
        lines += [
            f"## {result['case']}, {result['n_images']} images at grids {', '.join(map(str, GRIDS))}",
            "",
            "| candidate | ms | quartiles | times as fast | quartiles | peak MiB | gradient's difference |",
            "| --- | --: | --- | --: | --- | --: | --: |",
        ]
        for row in result["rows"]:
            low, high = row["quartiles_ms"]
            ratio = "wrong" if row["ratio"] is None else f"{row['ratio']:.2f}"
            ratio_low, ratio_high = row["ratio_quartiles"]
            lines.append(
                f"| {row['candidate']} | {row['ms']:.0f} | {low:.0f}–{high:.0f} | {ratio} | {ratio_low:.2f}–"
                f"{ratio_high:.2f} | {row['peak_bytes'] / 2**20:.0f} | {row['gradient_difference']:.1e} |"
            )
        lines.append("")
    lines.append("Times as fast: as timm with a dense pass for each length and one backward pass, in the same round.")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the bench; fails if a gradient was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=CASES, action="append", help="(default: all)")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--memory", metavar="CANDIDATE", help="print its peak memory in bytes, and nothing else")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.memory:
        print(peak_memory(CASES[args.case[0]], args.memory))
        return
    header, results = machine_header() | {"threads": args.threads}, []
    for key in args.case or CASES:
        results.append(measure(key, args.rounds))
        write("train_step", header, {"results": results}, document(header, results))
    print(document(header, results))
    wrong = [f"{r['case']}: {row['candidate']}" for r in results for row in r["rows"] if row["ratio"] is None]
    if wrong:
        raise SystemExit("another gradient than timm's: " + "; ".join(wrong))


if __name__ == "__main__":
    main()
