"""From images to logits: what the assigner costs, what preparing costs, and whole pipelines beside others.

Run: python -m bench.pipeline [--quick] [--parts assigner prepare jpeg stream]

The mix of grids is that of the model bench (4 at 14, 6 at 10, 6 at 7 of 16 images). No assigner can be trained here, so
one of random weights is run, its cost counted, and the mix taken whatever it says.

The error of a pipeline from JPEG files is that of its model on the first batch: the largest difference of a logit to
the same model in float64 on the same prepared images, as a part of the largest logit. A pipeline whose error is beyond
the tolerance of its precision has no time.
"""

from __future__ import annotations

import argparse
import gc
import io
import resource
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2

import revit_fast as rf
from bench.model_work import MODELS, TOLERANCES, grids_of, model_title, random_vit, relative_error, true_logits
from bench.photos import SIZE, jpeg, photo
from bench.report import header_line, machine_header, spread_ms, write
from bench.turns import take_turns
from revit_fast.adaptive.crops import eval_box
from revit_fast.adaptive.policies import Policy, make_policy
from revit_fast.io.trace import StageTimes
from revit_fast.models.settings import IMAGENET_MEAN, IMAGENET_STD
from revit_fast.streaming.pipeline import AdaptivePipeline

BATCH = 16
CROP_PCT = 0.9
N_SETS = 4
TIMM_TRANSFORM = create_transform(224, crop_pct=CROP_PCT, interpolation="bicubic")


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
Load = Callable[[bytes], Tensor]
"""The tensor of a JPEG file that a model takes."""


def table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """A Markdown table of these columns."""
    lines = ["| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|"]
    return "\n".join(lines + ["| " + " | ".join(str(row.get(c, "")) for c in columns) + " |" for row in rows]) + "\n"


def timed_rows(what: str, candidates: dict[str, Callable[[int], Any]], rounds: int, per: int) -> list[Row]:
    """Candidates in turns; milliseconds per image and the ratio to the first, which is ours."""
    for run in candidates.values():
        run(0)
    samples = take_turns(candidates, rounds, pause_s=0.1)
    first = next(iter(samples.values()))
    rows = []
    for name, seconds in samples.items():
        median, (low, high) = spread_ms([s / per for s in seconds])
        ratio = statistics.median(b / a for a, b in zip(first, seconds, strict=True))
        row = {"case": what, "candidate": name, "ms/image": round(median, 3)}
        rows.append(row | {"quartiles": f"{low:.3f} to {high:.3f}", "time / ours": round(ratio, 3)})
    return rows


def checked_rows(what: str, candidates: dict[str, Candidate], rounds: int, per: int) -> list[Row]:
    """Rows of candidates with their precision and error; those beyond its tolerance come last, without times.

    Raises:
        SystemExit: where the first, which is ours, is beyond its tolerance: there is nothing to compare with.
    """
    errors = {name: candidate.error() for name, candidate in candidates.items()}
    right = {name: c.run for name, c in candidates.items() if errors[name] <= TOLERANCES[c.precision]}
    first = next(iter(candidates))
    if first not in right:
        raise SystemExit(f"{what}: {first} is wrong, its error is {errors[first]:.1e}")
    rows = timed_rows(what, right, rounds, per)
    for row in rows:
        row["images/s"] = round(1e3 / row["ms/image"], 1)
    rows += [{"case": what, "candidate": name, "ms/image": "wrong"} for name in candidates if name not in right]
    for row in rows:
        name = row["candidate"]
        row |= {"precision": candidates[name].precision, "error": f"{errors[name]:.1e}"}
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


def torchvision_tensor(image: Tensor, image_px: int) -> Tensor:
    """The evaluation transform of torchvision v2 on uint8: resize the shorter side, crop, normalise."""
    image = v2.functional.resize(image, [int(image_px / CROP_PCT)], v2.InterpolationMode.BICUBIC, antialias=True)
    image = v2.functional.center_crop(image, [image_px, image_px])
    image = v2.functional.to_dtype(image, torch.float32, scale=True)
    return v2.functional.normalize(image, IMAGENET_MEAN, IMAGENET_STD)


def prepare_rows(rounds: int) -> list[Row]:
    """From decoded pixels to what a model takes."""
    pipe = make_pipeline("deit-s", BATCH)
    sets = [[photo(BATCH * s + i) for i in range(BATCH)] for s in range(N_SETS)]
    chw = [[torch.from_numpy(image).permute(2, 0, 1) for image in images] for images in sets]
    transform = v2.Compose([lambda image: torchvision_tensor(image, 224)])

    def ours(turn: int) -> Tensor:
        images = sets[turn % N_SETS]
        return pipe.prep.pack(images, pipe.prep.assign(images).grids).data

    candidates = {
        "ours: assigner, mixed grids, packed": ours,
        "torchvision v2 uint8, 224 px, stacked": lambda turn: torch.stack([transform(i) for i in chw[turn % N_SETS]]),
    }
    return timed_rows(f"{BATCH} images of {SIZE[1]}x{SIZE[0]}, 2 threads", candidates, rounds, BATCH)


def batched(items: Iterable[Tensor], n: int) -> Iterator[Tensor]:
    """Stacks of n."""
    batch: list[Tensor] = []
    for item in items:
        batch.append(item)
        if len(batch) == n:
            yield torch.stack(batch)
            batch = []
    if batch:
        yield torch.stack(batch)


def ahead(function: Callable, items: Iterable, n_threads: int, n_ahead: int) -> Iterator:
    """`function` of every item in order, computed on threads that far ahead."""
    with ThreadPoolExecutor(n_threads) as pool:
        waiting: deque = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) == n_ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@dataclass
class Candidate:
    """A pipeline from JPEG files to logits.

    Attributes:
        run: computes the logits of all files, in parts of any number of images.
        expected: float64 logits `[BATCH, n_classes]` of the first files, as the pipeline prepares them.
        precision: the lowest among the operands of its matrix products, a key of `TOLERANCES`.
    """

    run: Callable[[int], list[Tensor]]
    expected: Tensor
    precision: str = "float32"

    def error(self) -> float:
        """The largest difference of a logit to the expected one, as a part of the largest."""
        n_classes = self.expected.shape[1]
        logits = torch.cat([part.reshape(-1, n_classes) for part in self.run(0)])
        return relative_error(logits[:BATCH], self.expected)


def timm_run(vit, files: Sequence[bytes], n_threads: int, load: Load) -> Callable[[int], list[Tensor]]:
    """timm at full length; the next images are prepared during the forward pass."""

    @torch.inference_mode()
    def run(turn: int) -> list[Tensor]:
        return [vit(x) for x in batched(ahead(load, files, n_threads, 2 * BATCH), BATCH)]

    return run


def openvino_run(
    vit, files: Sequence[bytes], n_threads: int, hint: str, load: Load, precision: str | None
) -> tuple[Callable[[int], list[Tensor]], str]:
    """OpenVINO at full length, compiled for batches of 16, and the precision that it takes (its own choice for None).

    The next images are prepared during the forward pass.
    """
    import openvino

    from bench.model_peers import openvino_compiled, openvino_precision, quiet_export

    with quiet_export():
        model = openvino.convert_model(vit, example_input=torch.zeros(1, 3, 224, 224), input=[BATCH, 3, 224, 224])
    compiled = openvino_compiled(model, n_threads, hint, precision)
    n_requests = compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")
    requests = [compiled.create_infer_request() for _ in range(n_requests)]

    def logits_of(request) -> Tensor:
        return torch.from_numpy(request.get_output_tensor().data.copy())

    def run(turn: int) -> list[Tensor]:
        outputs, running = [], deque()
        free = deque(requests)
        for x in batched(ahead(load, files, n_threads, 2 * BATCH), BATCH):
            if not free:
                request, _ = running.popleft()
                request.wait()
                outputs.append(logits_of(request))
                free.append(request)
            request = free.popleft()
            request.start_async([x.numpy()], share_inputs=True)
            running.append((request, x))  # the input must live until it is done
        for request, _ in running:
            request.wait()
            outputs.append(logits_of(request))
        return outputs

    return run, openvino_precision(compiled)


def timm_load(file: bytes) -> Tensor:
    """timm's own transform, on PIL images."""
    return TIMM_TRANSFORM(Image.open(io.BytesIO(file)).convert("RGB"))


def torchvision_load(file: bytes) -> Tensor:
    """torchvision's own JPEG decoder and uint8 transform."""
    data = torch.frombuffer(bytearray(file), dtype=torch.uint8)
    return torchvision_tensor(decode_jpeg(data, ImageReadMode.RGB), 224)


def our_load(file: bytes) -> Tensor:
    """Our resize at full size, as an image tensor: the fastest transform here."""
    pixels = np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))
    options = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "boxes": [eval_box(*pixels.shape[:2], 224, CROP_PCT)]}
    rows = rf.ops.resize_patchify([pixels], 224, 224, **options).data
    return rows.view(224, 224, 3).permute(2, 0, 1)


def expected_of_ours(vit, pipe: AdaptivePipeline, files: Sequence[bytes]) -> Tensor:
    """Float64 logits `[B, n_classes]` of files as the pipeline prepares them."""
    batch = pipe.prep(files).batch
    with torch.inference_mode():
        return rf.ReViT.from_timm(vit).double()(replace(batch, data=batch.data.double()))


def jpeg_rows(key: str, n_images: int, rounds: int, n_threads: int) -> tuple[list[Row], list[Row]]:
    """JPEG files to logits: ours on the mix, the others at full length."""
    files = [jpeg(i) for i in range(n_images)]
    pipe = make_pipeline(key, n_images)
    vit = random_vit(MODELS[key])
    stages: list[dict[str, float]] = []

    def ours(turn: int) -> list[Tensor]:
        times = StageTimes()
        begin = time.perf_counter()
        logits = [result.logits for result in pipe(files, times=times)]
        stages.append({**times.seconds, "wall": time.perf_counter() - begin})
        return logits

    def expected(load: Load) -> Tensor:
        return true_logits(vit, [torch.stack([load(file) for file in files[:BATCH]])])

    candidates = {
        "ours: assigner, mixed grids": Candidate(ours, expected_of_ours(vit, pipe, files[:BATCH])),
        "timm full-length, its own transform": Candidate(
            timm_run(vit, files, n_threads, timm_load), expected(timm_load)
        ),
    }
    for name, load in (("torchvision v2 uint8", torchvision_load), ("our resize", our_load)):
        truth = expected(load)
        for hint, asked in product(("LATENCY", "THROUGHPUT"), ("f32", None)):
            run, precision = openvino_run(vit, files, n_threads, hint, load, asked)
            default = "" if asked else ", default precision"
            candidates[f"OpenVINO full-length ({hint}{default}), {name}"] = Candidate(run, truth, precision)
    rows = checked_rows(f"{model_title(key)}, {n_images} JPEGs, {n_threads} threads", candidates, rounds, n_images)
    stage_rows = [
        {
            "case": rows[0]["case"],
            "stage": stage,
            "ms/image": round(1e3 * statistics.median(s[stage] for s in stages[1:]) / n_images, 3),
        }
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
        rows, stages = jpeg_rows(key, args.images, args.rounds, args.threads)
        add("jpeg", f"JPEG files to logits, {model_title(key)}", rows)
        add("stages", "Time of each stage, all threads", stages)
    if "stream" in args.parts:
        add("stream", "A long stream", stream_rows(args.stream))


if __name__ == "__main__":
    main()
