"""TimeSformer on mixed clips: one pack, beside Hugging Face's model on the same clips grouped by shape.

Blocks have the shape of TimeSformer-base (768 channels, 12 heads); `--depth` is small so that the bench ends in a
minute. Our last block computes only what the class tokens need, which matters more the fewer blocks there are. So "all
tokens" is timed too: there every block does all that Hugging Face's does, and the ratio holds at any depth.
Hugging Face's blocks support one grid and frame count, so each group has its own model on shared weights.
Results go to `bench/results/video.md` and `video.json`. Run: python -m bench.video
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import TimesformerConfig, TimesformerForVideoClassification

from bench.report import error_text, header_line, machine_header, spread_ms, write
from bench.turns import CpuClock, WallClock, take_turns
from revit_fast.layers.positions import resample
from revit_fast.video import PackedClips, TimeSformer, optimize

PATCH = 16
GRIDS = (14, 10, 7)
MIX = ((14, 8), (10, 8), (7, 8), (7, 8), (10, 4), (7, 4))
"""(grid, frames) of every clip."""

LONGEST = (14, 8)
N_SETS = 3
"""Number of input sets. They take turns, so that none is in a cache from the call before."""

TOLERANCE = 1e-4
"""Largest difference of logits, as a share of the largest logit; float32 sums run in another order."""

PACKED, PLAIN, GROUPED, FULL = "packed, optimised", "packed, not optimised", "grouped", "all at full length"
LOGITS, TOKENS = "logits", "all tokens"


class Work:
    """Models, clips and candidates of the bench.

    Args:
        depth: number of blocks.
    """

    def __init__(self, depth: int) -> None:
        torch.manual_seed(0)
        config = TimesformerConfig(num_hidden_layers=depth, num_labels=400, image_size=GRIDS[0] * PATCH, num_frames=8)
        self.longest = TimesformerForVideoClassification(config).eval()
        nn.init.normal_(self.longest.timesformer.embeddings.time_embeddings, std=0.02)
        self.plain = TimeSformer.from_transformers(self.longest, GRIDS).requires_grad_(False)
        self.fast = optimize(self.plain)
        self.groups = {shape: [i for i, other in enumerate(MIX) if other == shape] for shape in dict.fromkeys(MIX)}
        self.models = {shape: self._of_shape(*shape) for shape in self.groups}
        self.sets = [self._clips(MIX) for _ in range(N_SETS)]
        self.packs = [PackedClips.from_list(clips, PATCH) for clips in self.sets]
        self.stacked = [
            {shape: torch.stack([clips[i] for i in own]) for shape, own in self.groups.items()} for clips in self.sets
        ]
        self.full = [torch.stack(self._clips([LONGEST] * len(MIX))) for _ in range(N_SETS)]

    def _of_shape(self, grid: int, n_frames: int) -> TimesformerForVideoClassification:
        """The same model for another grid and frame count: weights are shared, embeddings are resampled as in ours."""
        config = TimesformerConfig(
            num_hidden_layers=len(self.plain.blocks), num_labels=400, image_size=grid * PATCH, num_frames=n_frames
        )
        with torch.device("meta"):
            model = TimesformerForVideoClassification(config)
        state = self.longest.state_dict()
        positions, times = "timesformer.embeddings.position_embeddings", "timesformer.embeddings.time_embeddings"
        patches = resample(state[positions][0, 1:], self.plain.base_grid, (grid, grid))
        state[positions] = torch.cat([state[positions][:, :1], patches[None]], dim=1)
        nearest = torch.arange(n_frames) * state[times].shape[1] // n_frames
        state[times] = state[times][:, nearest]
        model.load_state_dict(state, assign=True)
        return model.eval()

    @staticmethod
    def _clips(shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
        return [torch.randn(n, 3, grid * PATCH, grid * PATCH) for grid, n in shapes]

    def candidates(self) -> dict[tuple[str, str], Callable[[int], object]]:
        """(what is computed, how) -> a function of the turn."""
        grouped = [(shape, model, model.timesformer) for shape, model in self.models.items()]
        return {
            (LOGITS, PACKED): lambda turn: self.fast(self.packs[turn % N_SETS]),
            (LOGITS, PLAIN): lambda turn: self.plain(self.packs[turn % N_SETS]),
            (LOGITS, GROUPED): lambda turn: [m(self.stacked[turn % N_SETS][s]).logits for s, m, _ in grouped],
            (LOGITS, FULL): lambda turn: self.longest(self.full[turn % N_SETS]).logits,
            (TOKENS, PACKED): lambda turn: self.fast.forward_features(self.packs[turn % N_SETS]),
            (TOKENS, GROUPED): lambda turn: [b(self.stacked[turn % N_SETS][s])[0] for s, _, b in grouped],
        }

    def differences(self) -> dict[tuple[str, str], float]:
        """Largest difference of ours from Hugging Face's on the first set, as a share of the largest value."""
        runs = self.candidates()
        order = [i for own in self.groups.values() for i in own]
        logits = torch.cat(runs[LOGITS, GROUPED](0))[torch.tensor(order).argsort()]
        tokens = dict(zip(order, (t for group in runs[TOKENS, GROUPED](0) for t in group), strict=True))
        found = {}
        for how in (PACKED, PLAIN):
            found[LOGITS, how] = ((runs[LOGITS, how](0) - logits).abs().max() / logits.abs().max()).item()
        found[TOKENS, PACKED] = max(
            ((ours - tokens[i]).abs().max() / tokens[i].abs().max()).item()
            for i, ours in enumerate(runs[TOKENS, PACKED](0))
        )
        return found


CLOCKS = {"wall": WallClock, "cpu": CpuClock}


def measure(depth: int, rounds: int, clock: WallClock | CpuClock) -> list[dict]:
    """Checks and times all candidates; ratios are to the packed, optimised one, round by round."""
    work = Work(depth)
    with torch.inference_mode():
        differences = work.differences()
        runs = work.candidates()
        take_turns(runs, 1)
        samples = take_turns(runs, rounds, clock=clock)
    rows = []
    for (what, how), seconds in samples.items():
        median, quartiles = spread_ms(seconds)
        ratios = sorted(s / ours for s, ours in zip(seconds, samples[what, PACKED], strict=True))
        difference = differences.get((what, how))
        rows.append(
            {
                "computed": what,
                "candidate": how,
                "ms": median,
                "quartiles_ms": quartiles,
                "ratio": statistics.median(ratios),
                "ratio_range": [ratios[0], ratios[-1]],
                "difference": difference,
                "right": difference is None or difference <= TOLERANCE,
            }
        )
    return rows


def document(header: dict, depth: int, rows: Sequence[dict]) -> str:
    """The table."""
    clips = ", ".join(f"{grid}×{grid} of {n} frames" for grid, n in MIX)
    lines = [
        "# TimeSformer on mixed clips",
        "",
        header_line(header),
        "",
        f"{depth} blocks of TimeSformer-base, float32, {len(MIX)} clips: {clips}.",
        "",
        "| computed | candidate | ms | quartiles | time ÷ packed | range over rounds | difference |",
        "| --- | --- | --: | --: | --: | --: | --: |",
    ]
    for row in rows:
        whose = "ours" if row["candidate"] in (PACKED, PLAIN) else "Hugging Face"
        low, high = row["quartiles_ms"]
        ratio = f"{row['ratio']:.2f}" if row["right"] else "wrong"
        ratio_low, ratio_high = row["ratio_range"]
        difference = error_text(row["difference"])
        lines.append(
            f"| {row['computed']} | {whose}, {row['candidate']} | {row['ms']:.0f} | {low:.0f}–{high:.0f} | {ratio} "
            f"| {ratio_low:.2f}–{ratio_high:.2f} | {difference} |"
        )
    lines += [
        "",
        "Medians of turns in alternating order on rotated clips. Difference: to Hugging Face's on the same clips, of "
        "its largest value. Logits need the class tokens alone of the last block, which ours makes use of; for all "
        "tokens both compute every block in full, so that ratio does not depend on the number of blocks.",
    ]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the bench; fails if a result of ours was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=2, help="blocks (default %(default)s; TimeSformer-base has 12)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of every candidate (default %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu: the processor's time of this process, for one thread on a machine that others use too",
    )
    parser.add_argument("--name", default="video", help="results are written under this name")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.clock == "cpu" and args.threads > 1:
        parser.error("--clock cpu: threads that wait for each other use the processor too; give --threads 1")
    header = machine_header() | {"threads": args.threads, "clock": args.clock}
    rows = measure(args.depth, args.rounds, CLOCKS[args.clock]())
    table = document(header, args.depth, rows)
    write(args.name, header, {"depth": args.depth, "clips": MIX, "rows": rows}, table)
    print(table)
    wrong = [f"{row['computed']}: {row['candidate']}" for row in rows if not row["right"]]
    if wrong:
        raise SystemExit("other results than Hugging Face's: " + "; ".join(wrong))


if __name__ == "__main__":
    main()
