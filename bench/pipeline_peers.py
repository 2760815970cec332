"""Other pipelines from JPEG files to logits: every image at full length, the next ones prepared during a forward pass.

timm runs its own transform. OpenVINO runs behind two ways to prepare, both with the fastest decoder that gives Pillow's
pixels: torchvision's uint8 transform, and our resize.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from PIL import Image
from timm.data import create_transform
from timm.models import VisionTransformer
from torch import Tensor
from torchvision.transforms import v2

import revit_fast as rf
from bench.model_work import relative_error, true_logits
from bench.peers.common import Run, fastest
from bench.peers.exported import N_CALIBRATION
from bench.peers.openvino_ import openvino_compiled, openvino_full_length, openvino_precision
from bench.photos import jpeg
from revit_fast.adaptive.crops import eval_box
from revit_fast.io.images import read_rgb
from revit_fast.models.settings import IMAGENET_MEAN, IMAGENET_STD

BATCH = 16
CROP_PCT = 0.9
IMAGE_PX = 224
TIMM_TRANSFORM = create_transform(IMAGE_PX, crop_pct=CROP_PCT, interpolation="bicubic")
CALIBRATION_SEED = 10_000
"""Of the first photograph that a quantizer calibrates with; those that are measured have smaller ones."""

Load = Callable[[bytes], Tensor]
"""The tensor of a JPEG file that a model takes."""

Parts = Callable[[int], list[Tensor]]
"""The logits of all files, in parts of any number of images, from the number of the round."""


@dataclass
class Candidate:
    """A pipeline from JPEG files to logits.

    Attributes:
        run: computes the logits.
        expected: float64 logits `[BATCH, n_classes]` of the first files, as the pipeline prepares them.
        precision: the lowest among the operands of its matrix products, a key of `TOLERANCES`.
        note: the variant taken.
    """

    run: Parts
    expected: Tensor
    precision: str = "float32"
    note: str = ""

    def error(self) -> float:
        """The largest difference of a logit to the expected one, as a part of the largest."""
        n_classes = self.expected.shape[1]
        logits = torch.cat([part.reshape(-1, n_classes) for part in self.run(0)])
        return relative_error(logits[:BATCH], self.expected)


def torchvision_tensor(image: Tensor) -> Tensor:
    """The evaluation transform of torchvision v2 on uint8: resize the shorter side, crop, normalise."""
    scaled = [int(IMAGE_PX / CROP_PCT)]
    image = v2.functional.resize(image, scaled, v2.InterpolationMode.BICUBIC, antialias=True)
    image = v2.functional.center_crop(image, [IMAGE_PX, IMAGE_PX])
    image = v2.functional.to_dtype(image, torch.float32, scale=True)
    return v2.functional.normalize(image, IMAGENET_MEAN, IMAGENET_STD)


def timm_load(file: bytes) -> Tensor:
    """timm's own transform, on PIL images."""
    return TIMM_TRANSFORM(Image.open(io.BytesIO(file)).convert("RGB"))


def torchvision_load(file: bytes) -> Tensor:
    """torchvision's uint8 transform."""
    return torchvision_tensor(torch.from_numpy(read_rgb(file)).permute(2, 0, 1))


def our_load(file: bytes) -> Tensor:
    """Our resize at full size, as an image tensor."""
    pixels = read_rgb(file)
    boxes = [eval_box(*pixels.shape[:2], IMAGE_PX, CROP_PCT)]
    rows = rf.ops.resize_patchify([pixels], IMAGE_PX, IMAGE_PX, mean=IMAGENET_MEAN, std=IMAGENET_STD, boxes=boxes).data
    return rows.view(IMAGE_PX, IMAGE_PX, 3).permute(2, 0, 1)


LOADS: dict[str, Load] = {"torchvision's uint8 transform": torchvision_load, "our resize": our_load}


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


def timm_run(vit: VisionTransformer, files: Sequence[bytes], n_threads: int) -> Parts:
    """timm behind its own transform."""

    @torch.inference_mode()
    def run(turn: int) -> list[Tensor]:
        return [vit(x) for x in batched(ahead(timm_load, files, n_threads, 2 * BATCH), BATCH)]

    return run


def openvino_run(compiled, files: Sequence[bytes], n_threads: int, load: Load) -> Parts:
    """A model that was compiled for batches of `BATCH`, with as many requests under way as it asks for."""
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

    return run


def peers(vit: VisionTransformer, files: Sequence[bytes], n_threads: int, with_int8: bool) -> dict[str, Candidate]:
    """timm, and OpenVINO at its own choice of precision, held to float32, and in NNCF's int8.

    Of OpenVINO's two hints the faster one is taken for each.

    Args:
        vit: the model.
        files: JPEGs, a multiple of `BATCH` of them.
        n_threads: threads of each model; as many prepare images.
        with_int8: whether to quantize, which takes minutes.
    """

    def expected(load: Load) -> Tensor:
        return true_logits(vit, [torch.stack([load(file) for file in files[:BATCH]])])

    found = {"timm, its own transform": Candidate(timm_run(vit, files, n_threads), expected(timm_load))}
    truths = {name: expected(load) for name, load in LOADS.items()}
    plain = openvino_full_length(vit, BATCH)
    forms = {"OpenVINO, default precision": (plain, None), "OpenVINO, held to float32": (plain, "f32")}
    if with_int8:
        seeds = range(CALIBRATION_SEED, CALIBRATION_SEED + N_CALIBRATION)
        calibration = [our_load(jpeg(seed))[None].contiguous() for seed in seeds]
        forms["OpenVINO, NNCF int8"] = openvino_full_length(vit, BATCH, calibration), None
    for form, (model, asked) in forms.items():
        compiled = {hint: openvino_compiled(model, n_threads, hint, asked) for hint in ("LATENCY", "THROUGHPUT")}
        for name, load in LOADS.items():
            variants: dict[str, Run] = {h: openvino_run(c, files, n_threads, load) for h, c in compiled.items()}
            hint, run = fastest(variants)
            precision = "int8 per tensor" if form.endswith("int8") else openvino_precision(compiled[hint])
            found[f"{form}, {name}"] = Candidate(run, truths[name], precision, f"{hint} hint")
    return found
