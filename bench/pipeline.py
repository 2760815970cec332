"""From images to logits: what the assigner costs, what preparing costs, and whole pipelines beside others.

Run: python -m bench.pipeline [--quick] [--parts assigner prepare jpeg stream] [--dtypes float32 bfloat16 int8]

The mix of grids is that of the model bench (4 at 14, 6 at 10, 6 at 7 of 16 images). No assigner can be trained here, so
one of random weights is run, its cost counted, and the mix taken whatever it says.

The error of a pipeline from JPEG files is that of its model on the first batch: the largest difference of a logit to
the same model in float64 on the same prepared images, as a part of the largest logit. A pipeline whose error is beyond
the tolerance of its precision has no time. Ours runs at each precision of --dtypes, and every row has its ratio to each
of them; the other pipelines are in bench/pipeline_peers.py.
"""

from __future__ import annotations

import argparse
import gc
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import revit_fast as rf
from bench.model_work import MODELS, TOLERANCES, grids_of, model_title, random_vit
from bench.photos import SIZE, jpeg, photo
from bench.pipeline_peers import BATCH, CROP_PCT, Candidate, peers, torchvision_tensor
from bench.report import header_line, machine_header, spread_ms, write
from bench.turns import take_turns
from revit_fast.adaptive.policies import Policy, make_policy
from revit_fast.io.trace import StageTimes
from revit_fast.streaming.pipeline import AdaptivePipeline

N_SETS = 4
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


def mixed_policy(n_images: int) -> Policy:
    """Asks the assigner and takes the mix."""
    batches = [grids_of("mix", BATCH, seed)[i][0] for seed in range(-(-n_images // BATCH)) for i in range(BATCH)]
    return replace(make_policy(("fixed", batches[:n_images]), rf.packing.DEFAULT_GRIDS), needs="probabilities")


def make_pipeline(key: str, n_images: int, **options: Any) -> AdaptivePipeline:
    """Ours over a model of random weights, with an assigner made for it."""
    model = rf.ReViT.from_timm(random_vit(MODELS[key]))
    pipe = rf.pipeline(model, rf.TokenLengthAssigner.for_model(model).eval(), crop_pct=CROP_PCT, **options)
    pipe.prep.policy = mixed_policy(n_images)
    return pipe


Row = dict[str, Any]


def table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """A Markdown table of these columns."""
    lines = ["| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|"]
    return "\n".join(lines + ["| " + " | ".join(str(row.get(c, "")) for c in columns) + " |" for row in rows]) + "\n"


def timed_rows(
    what: str,
    candidates: dict[str, Callable[[int], Any]],
    rounds: int,
    per: int,
    bases: dict[str, str] | None = None,
) -> list[Row]:
    """Candidates in turns; milliseconds per image and ratios.

    Args:
        what: the case.
        candidates: functions of the round by name.
        rounds: turns of each.
        per: images of a turn.
        bases: for each ratio its column's name and the candidate to compare with; by default the first one, as "ours".
    """
    for run in candidates.values():
        run(0)
    samples = take_turns(candidates, rounds, pause_s=0.1)
    rows = []
    for name, seconds in samples.items():
        median, (low, high) = spread_ms([s / per for s in seconds])
        row = {"case": what, "candidate": name, "ms/image": round(median, 3)}
        row["quartiles"] = f"{low:.3f} to {high:.3f}"
        for column, base in (bases or {"ours": next(iter(samples))}).items():
            ratio = statistics.median(s / b for s, b in zip(seconds, samples[base], strict=True))
            row[f"time / {column}"] = round(ratio, 3)
        rows.append(row)
    return rows


def checked_rows(what: str, candidates: dict[str, Candidate], rounds: int, per: int) -> list[Row]:
    """Rows of candidates with their precision and error; those beyond its tolerance come last, without times.

    Ratios are to every candidate whose name begins with "ours".

    Raises:
        SystemExit: where the first, which is ours, is beyond its tolerance: there is nothing to compare with.
    """
    errors = {name: candidate.error() for name, candidate in candidates.items()}
    right = {name: c.run for name, c in candidates.items() if errors[name] <= TOLERANCES[c.precision]}
    first = next(iter(candidates))
    if first not in right:
        raise SystemExit(f"{what}: {first} is wrong, its error is {errors[first]:.1e}")
    rows = timed_rows(what, right, rounds, per, {name: name for name in right if name.startswith("ours")})
    for row in rows:
        row["images/s"] = round(1e3 / row["ms/image"], 1)
    rows += [{"case": what, "candidate": name, "ms/image": "wrong"} for name in candidates if name not in right]
    for row in rows:
        candidate = candidates[row["candidate"]]
        error = f"{errors[row['candidate']]:.1e}"
        row |= {"precision": candidate.precision, "error": error, "note": candidate.note}
    return rows


def assigner_rows(key: str, rounds: int) -> list[Row]:
    """Thumbnail and assigner beside the shortest forward pass of the same images."""
    pipe = make_pipeline(key, BATCH)
    sets = [[photo(BATCH * s + i) for i in range(BATCH)] for s in range(N_SETS)]
    packs = [pipe.prep.pack(images, [pipe.prep.grids[-1]] * BATCH) for images in sets]
    macs = pipe.prep.tla.network.macs(pipe.prep.tla.thumbnail_px)
    shortest = f"forward pass at {pipe.prep.grids[-1]}x{pipe.prep.grids[-1]}"
    candidates = {
        shortest: lambda turn: pipe.model(packs[turn % N_SETS]),
        "thumbnail + assigner": lambda turn: pipe.prep.assign(sets[turn % N_SETS]),
        "thumbnail alone": lambda turn: pipe.prep.tla.thumbnails(sets[turn % N_SETS]),
    }
    what = f"{model_title(key)}, batch {BATCH}, {pipe.prep.tla.thumbnail_px} px, {macs / 1e6:.2f} MMAC"
    rows = timed_rows(what, candidates, rounds, BATCH)
    for row in rows:
        row["share of forward"] = f"{100 * row.pop('time / ours'):.1f} %"
    return rows


def prepare_rows(rounds: int) -> list[Row]:
    """From decoded pixels to what a model takes."""
    pipe = make_pipeline("deit-s", BATCH)
    sets = [[photo(BATCH * s + i) for i in range(BATCH)] for s in range(N_SETS)]
    chw = [[torch.from_numpy(image).permute(2, 0, 1) for image in images] for images in sets]

    def ours(turn: int) -> Tensor:
        images = sets[turn % N_SETS]
        return pipe.prep.pack(images, pipe.prep.assign(images).grids).data

    def torchvision(turn: int) -> Tensor:
        return torch.stack([torchvision_tensor(image) for image in chw[turn % N_SETS]])

    candidates = {
        "ours: assigner, mixed grids, packed": ours,
        "torchvision v2 uint8, 224 px, stacked": torchvision,
    }
    return timed_rows(f"{BATCH} images of {SIZE[1]}x{SIZE[0]}, 2 threads", candidates, rounds, BATCH)


def expected_of_ours(vit, pipe: AdaptivePipeline, files: Sequence[bytes]) -> Tensor:
    """Float64 logits `[B, n_classes]` of files as the pipeline prepares them."""
    batch = pipe.prep(files).batch
    with torch.inference_mode():
        return rf.ReViT.from_timm(vit).double()(replace(batch, data=batch.data.double()))


def jpeg_rows(
    key: str, n_images: int, rounds: int, n_threads: int, dtypes: Sequence[str]
) -> tuple[list[Row], list[Row]]:
    """JPEG files to logits, and the stages of ours: ours on the mix at each precision, the others at full length."""
    files = [jpeg(i) for i in range(n_images)]
    vit = random_vit(MODELS[key])
    stages: dict[str, list[dict[str, float]]] = {dtype: [] for dtype in dtypes}

    def ours(turn: int, pipe: AdaptivePipeline, dtype: str) -> list[Tensor]:
        times = StageTimes()
        begin = time.perf_counter()
        logits = [result.logits for result in pipe(files, times=times)]
        stages[dtype].append({**times.seconds, "wall": time.perf_counter() - begin})
        return logits

    candidates = {}
    for dtype in dtypes:
        pipe = make_pipeline(key, n_images, dtype=DTYPES[dtype])
        run = partial(ours, pipe=pipe, dtype=dtype)
        candidates[f"ours, {dtype}"] = Candidate(run, expected_of_ours(vit, pipe, files[:BATCH]), dtype)
    candidates |= peers(vit, files, n_threads, with_int8="int8" in dtypes)
    rows = checked_rows(f"{model_title(key)}, {n_images} JPEGs, {n_threads} threads", candidates, rounds, n_images)
    stage_rows = [
        {
            "case": rows[0]["case"],
            "precision": dtype,
            "stage": stage,
            "ms/image": round(1e3 * statistics.median(s[stage] for s in stages[dtype][1:]) / n_images, 3),
        }
        for dtype in dtypes
        for stage in ("decode", "assign", "pack", "forward", "wall")
    ]
    return rows, stage_rows


def rss_mb() -> float:
    """Resident memory of this process now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


def stream_rows(n_images: int) -> list[Row]:
    """Generated JPEG files, 1 % of them corrupt, through the pipeline: memory, order, what is reported."""
    pipe = make_pipeline("deit-ti", BATCH, token_budget=2048)
    pipe.prep.policy = replace(make_policy("random", pipe.prep.grids), needs="probabilities")
    files = [jpeg(i) for i in range(200)]
    torn = [file[: len(file) // 3] for file in files[:20]]
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for i, content in enumerate(files + torn):
            paths.append(Path(folder) / f"{i}.jpg")
            paths[-1].write_bytes(content)
        is_bad = np.zeros(n_images, bool)
        is_bad[np.random.default_rng(0).choice(n_images, n_images // 100, replace=False)] = True

        def sources() -> Iterator[Path]:
            for i, bad in enumerate(is_bad):
                yield paths[len(files) + i % len(torn)] if bad else paths[i % len(files)]

        peaks, reported, in_order, n_results = [], [], True, 0
        begin, peak = time.perf_counter(), 0.0
        for result in pipe(sources()):
            in_order &= result.index == n_results
            n_results += 1
            if result.error is not None:
                reported.append(result.index)
            peak = max(peak, rss_mb())
            if n_results % 1000 == 0:
                peaks.append(round(peak, 1))
                peak = 0.0
        seconds = time.perf_counter() - begin
    return [
        {
            "images": n_images,
            "results": n_results,
            "in order": in_order,
            "corrupt": int(is_bad.sum()),
            "reported": len(reported),
            "the same ones": reported == np.flatnonzero(is_bad).tolist(),
            "peak MiB of each 1000": f"{peaks[0]} first, {min(peaks[1:])} to {max(peaks[1:])} after",
            "images/s": round(n_results / seconds, 1),
        }
    ]


PARTS = ("assigner", "prepare", "jpeg", "stream")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the bench and writes `bench/results/pipeline.{md,json}`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["deit-ti", "deit-s"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="precisions of ours")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--images", type=int, default=64, help="JPEGs of a round")
    parser.add_argument("--stream", type=int, default=20_000, help="images of the memory test")
    parser.add_argument("--quick", action="store_true", help="few images, few rounds")
    args = parser.parse_args(argv)
    if args.quick:
        args.rounds, args.images, args.stream, args.models = 2, 16, 3000, ["deit-ti"]
    torch.set_num_threads(args.threads)
    header = machine_header()
    content: dict[str, list[Row]] = {}
    text = [f"# Pipelines\n\n{header_line(header)}\n"]

    def add(name: str, title: str, rows: list[Row]) -> None:
        content.setdefault(name, []).extend(rows)
        text.append(f"\n## {title}\n\n{table(rows, list(rows[0]))}")
        print(text[-1], flush=True)
        write("pipeline", header, content, "".join(text))
        gc.collect()

    for key in args.models if "assigner" in args.parts else ():
        add("assigner", f"Cost of the assigner, {model_title(key)}", assigner_rows(key, 3 * args.rounds))
    if "prepare" in args.parts:
        add("prepare", "Pixels to model input", prepare_rows(3 * args.rounds))
    for key in args.models if "jpeg" in args.parts else ():
        rows, stages = jpeg_rows(key, args.images, args.rounds, args.threads, args.dtypes)
        add("jpeg", f"JPEG files to logits, {model_title(key)}", rows)
        add("stages", "Time of each stage, all threads", stages)
    if "stream" in args.parts:
        add("stream", "A long stream", stream_rows(args.stream))


if __name__ == "__main__":
    main()
