"""The Token-Length Assigner: it predicts from a thumbnail which token length an image needs.

The paper (arXiv 2307.02092) uses a light classifier. This one, a depthwise-separable CNN on patch rows, is our own.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revit_fast.adaptive.network import STEM_PATCH, FusedCNN, SeparableCNN
from revit_fast.adaptive.policies import Calibration, Evidence, PolicySpec, grey_entropy, make_policy, suffices
from revit_fast.grids import DEFAULT_GRIDS, check_grids
from revit_fast.io.atomic import replaced
from revit_fast.io.names import loads
from revit_fast.io.tensors import misfit, tensors_and_metadata
from revit_fast.layers.derived import Derived
from revit_fast.models.loading import named_numbers, numbers_named_in
from revit_fast.models.macs import forward_macs
from revit_fast.models.vit import ReViT
from revit_fast.models.weights import EXTRA_STATE
from revit_fast.ops._modes import NotScriptable, as_saved, own_modes
from revit_fast.ops.resize import resized_rows

MAX_SHARE = 0.0015
"""Largest cost of an assigner, as a share of the multiply-adds of the model's shortest path. Thumbnails and small
layers run at a fraction of the model's speed; this share keeps their time below a twentieth of the model's."""

ROWS_PER_PIXEL = 2
"""Least number of source rows that are averaged for a row of the thumbnail. At most about twice as many are read."""

LEAST_MACS, LEAST_SHARE = 150_000, 0.02
"""Multiply-adds that an assigner may always use, if they are at most this share of the shortest path. A small model of
small images thus gets an assigner that is large enough to tell its lengths apart."""

SIZES = ((64, (32, 64, 128)), (64, (16, 32, 64)), (32, (16, 32, 64)), (32, (8, 16, 32)), (16, (8, 16)))
"""Sizes of assigners, (thumbnail_px, widths), from large to small."""

BATCH = 64
"""Thumbnails in one pass through the network; so few that their activations stay in the caches."""

FORMAT = "revit-fast token-length assigner 1"


class TokenLengthAssigner(NotScriptable, nn.Module):
    """Predicts, from a thumbnail, the smallest sufficient token length of an image (TLA, arXiv 2307.02092).

    Args:
        grids: token grids to choose from, strictly decreasing: index 0 is the longest.
        thumbnail_px: side of the square thumbnail in pixels.
        widths: channels of the CNN's stem and of each block after it.
        backbone: name of a timm model that replaces the CNN, made with one output per grid (needs timm).
        mean: channel means of pixels in [0, 1].
        std: channel standard deviations of pixels in [0, 1].

    Raises:
        ValueError: if the grids do not decrease, or the stem cannot cut the thumbnail into patches.
    """

    instead_of_script = "use torch.jit.trace(tla, thumbnails), or revit_fast.deploy.export.export_assigner(tla)"

    def __init__(
        self,
        grids: Sequence[int] = DEFAULT_GRIDS,
        *,
        thumbnail_px: int = 64,
        widths: Sequence[int] = (32, 64, 128),
        backbone: str | None = None,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.25, 0.25, 0.25),
    ) -> None:
        super().__init__()
        self.grids = check_grids(grids)
        if thumbnail_px < STEM_PATCH or thumbnail_px % STEM_PATCH:
            raise ValueError(f"thumbnail_px: expected a positive multiple of {STEM_PATCH}, got {thumbnail_px}")
        self.thumbnail_px, self.backbone, self.widths = thumbnail_px, backbone, tuple(widths)
        self.mean, self.std = tuple(map(float, mean)), tuple(map(float, std))
        self.calibration: Calibration | None = None
        self._fused = Derived(FusedCNN)
        if backbone is None:
            self.network = SeparableCNN(len(self.grids), self.widths)
        else:
            import timm

            self.network = timm.create_model(backbone, num_classes=len(self.grids))

    def get_extra_state(self) -> Tensor:
        """The grids, see `models.loading.named_numbers`."""
        return named_numbers(self.grids, torch.float32, torch.device("cpu"))

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing is kept: `_load_from_state_dict` has compared it."""

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        key, grids = prefix + EXTRA_STATE, numbers_named_in(state_dict, prefix)
        if key in missing:  # one of before
            missing.remove(key)
        if grids is not None and tuple(grids) != self.grids:
            errors.append(
                f"the weights assign grids {tuple(grids)}, this assigner {self.grids}; its outputs are these grids"
            )

    @classmethod
    def for_model(cls, model: ReViT, **options: Any) -> TokenLengthAssigner:
        """The largest assigner of `SIZES` that costs at most `MAX_SHARE` (or `LEAST_MACS`), else the smallest.

        Args:
            model: the model to assign for; the assigner has its grids.
            **options: further arguments of the constructor.
        """
        shortest = forward_macs(model, model.lengths[-1])
        limit = max(MAX_SHARE * shortest, min(LEAST_MACS, LEAST_SHARE * shortest))
        for thumbnail_px, widths in SIZES:
            assigner = cls(model.grids, thumbnail_px=thumbnail_px, widths=widths, **options)
            if assigner.macs <= limit:
                break
        return assigner

    @property
    def description(self) -> str:
        """A readable text about the network, its input and its calibration."""
        kind = self.backbone or f"convolutions of {', '.join(map(str, self.widths))} channels"
        calibrated = f"{len(self.calibration.suffices)} held-out images" if self.calibration else "nothing yet"
        return f"{kind} on thumbnails of {self.thumbnail_px} px, calibrated on {calibrated}"

    def check_policy(self, policy: PolicySpec, macs: Sequence[float]) -> None:
        """Raises the error of `make_policy` if the policy is not possible with this assigner.

        Args:
            policy: see `revit_fast.adaptive.policies.make_policy`.
            macs: multiply-adds of the model for an image of each grid.
        """
        make_policy(policy, self.grids, calibration=self.calibration, macs=macs)

    @property
    def macs(self) -> int:
        """Multiply-adds for one image, in the linear layers and convolutions of the network."""
        if isinstance(self.network, SeparableCNN):
            return self.network.macs(self.thumbnail_px)
        counted = []

        def count(layer: nn.Module, inputs: tuple, output: Tensor) -> None:
            channels = 1 if isinstance(layer, nn.Conv2d) else -1
            counted.append(layer.weight.numel() * output[0].numel() // output.shape[channels])

        layers = [m for m in self.network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        hooks = [layer.register_forward_hook(count) for layer in layers]
        training, parameter = self.training, next(self.parameters())
        try:
            with torch.no_grad():
                self.eval()(parameter.new_zeros(1, 3, self.thumbnail_px, self.thumbnail_px))
        finally:
            self.train(training)
            for hook in hooks:
                hook.remove()
        return sum(counted)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[B, n_lengths]` of normalised thumbnails `[B, 3, S, S]`, longest length first; differentiable."""
        return self.network(x)

    def thumbnails(self, images: Sequence[np.ndarray | Tensor], boxes=None, dtype=torch.float32) -> Tensor:
        """Patch rows `[B * (S/4)², 48]` of the thumbnails of uint8 images: normalised, or raw if dtype is uint8.

        The resize is Pillow's, bilinear and antialiased. If an image has many more rows than the thumbnail, only every
        n-th row is read.

        Args:
            images: uint8 arrays `[H, W, 3]` or `[H, W]`.
            boxes: regions to look at, see `ops.resize_patchify`; by default the whole images.
            dtype: type of the rows.
        """
        if boxes is None or isinstance(boxes[0], (int, float)):
            boxes = [boxes] * len(images)
        thinned = [self._thinned(image, box) for image, box in zip(images, boxes, strict=True)]
        images, boxes = [image for image, _ in thinned], [box for _, box in thinned]
        options = {"boxes": boxes, "interpolation": "bilinear", "mean": self.mean, "std": self.std, "dtype": dtype}
        return resized_rows(images, self.thumbnail_px, STEM_PATCH, **options)[0]

    def _thinned(self, image: np.ndarray | Tensor, box) -> tuple[np.ndarray | Tensor, tuple[float, ...] | None]:
        """Every n-th row of a large image, and the box in these rows. Reading all would cost more than the network."""
        height, width = image.shape[:2]
        left, upper, right, lower = (0, 0, width, height) if box is None else box
        step = int((lower - upper) / (ROWS_PER_PIXEL * self.thumbnail_px))
        if step <= 1:
            return image, box
        rows = image[step // 2 :: step]  # each row is the middle one of `step` rows
        return rows, (left, upper / step, right, min(lower / step, rows.shape[0]))

    def entropies(self, images: Sequence[np.ndarray | Tensor], boxes=None) -> np.ndarray:
        """Entropy `[B]` in bits of the grey values of the thumbnails, see `policies.grey_entropy`."""
        pixels = self.thumbnails(images, boxes, torch.uint8).view(len(images), -1, 3)
        return grey_entropy(pixels.numpy())

    def images_of(self, rows: Tensor) -> Tensor:
        """Thumbnails `[B, 3, S, S]` from patch rows, in the form that `forward` takes."""
        side = self.thumbnail_px // STEM_PATCH
        x = rows.view(-1, side, side, STEM_PATCH, STEM_PATCH, 3).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(-1, 3, self.thumbnail_px, self.thumbnail_px)

    def predict_proba(self, images: Sequence[np.ndarray | Tensor], boxes=None) -> Tensor:
        """Calibrated probabilities `[B, n_lengths]` that a length is the smallest sufficient one, longest first.

        The probabilities of an image are bitwise the same in every batch (with the CNN, on the CPU).

        Args:
            images: uint8 arrays `[H, W, 3]` or `[H, W]`, of any sizes.
            boxes: regions to look at, by default the whole images.
        """
        temperature = self.calibration.temperature if self.calibration else 1.0
        return (self._logits(self.thumbnails(images, boxes)) / temperature).softmax(dim=1)

    def _logits(self, rows: Tensor) -> Tensor:
        """Float32 logits, on the CPU, of the normalised patch rows that `thumbnails` returns."""
        if self.training:
            raise ValueError(
                "the assigner is in training mode, where a thumbnail's result depends on its batch; call .eval()"
            )
        side = self.thumbnail_px // STEM_PATCH
        parameter = next(self.parameters())
        batches = rows.split(BATCH * side**2)
        with own_modes():
            if isinstance(self.network, SeparableCNN) and parameter.device.type == "cpu":
                fused = self._fused.get(self.network)
                return torch.cat([fused.logits(batch, side) for batch in batches])
            return torch.cat([self(self.images_of(batch).to(parameter)) for batch in batches]).float().cpu()

    def assign(
        self, images: Sequence[np.ndarray | Tensor], policy: PolicySpec = "argmax", *, boxes=None, first_index: int = 0
    ) -> list[int]:
        """The grid of every image.

        Args:
            images: as for `predict_proba`.
            policy: see `revit_fast.adaptive.policies.make_policy`.
            boxes: regions to look at, by default the whole images.
            first_index: place of the first image in its stream, for policies that depend on the place.
        """
        chosen = make_policy(policy, self.grids, calibration=self.calibration)
        chosen.decides_before("an assigner runs no model")
        index = np.arange(first_index, first_index + len(images))
        probabilities = entropy = None
        if chosen.needs == "probabilities":
            probabilities = self.predict_proba(images, boxes).numpy()
        if chosen.needs == "entropy":
            entropy = self.entropies(images, boxes)
        return [self.grids[i] for i in chosen.choose(Evidence(index, probabilities, entropy))]

    def calibrate(
        self, images: Sequence[np.ndarray | Tensor], labels: Sequence[int] | Tensor | None = None, *, boxes=None
    ) -> Calibration:
        """Fits the values that policies need to held-out images, and stores them.

        Args:
            images: images that the assigner was not trained on.
            labels: index of the smallest sufficient length of each image, 0 is the longest. The temperature is fitted
                to them. Without labels it stays as it is: budgets need no labels.
            boxes: regions to look at, by default the whole images.

        Returns:
            The calibration, also in `self.calibration`.
        """
        if len(images) == 0:
            raise ValueError("images: expected held-out images to calibrate on, got none")
        logits, entropies = [], []
        for begin in range(0, len(images), BATCH):
            some = slice(begin, begin + BATCH)
            box = boxes if boxes is None or isinstance(boxes[0], (int, float)) else boxes[some]
            logits.append(self._logits(self.thumbnails(images[some], box)))
            entropies.append(self.entropies(images[some], box))
        return self._calibrate(torch.cat(logits), np.concatenate(entropies), labels)

    def calibrate_rows(self, rows: Tensor, labels: Sequence[int] | Tensor | None = None) -> Calibration:
        """As `calibrate`, but takes raw thumbnails: uint8 patch rows `[B * (S/4)², 48]`."""
        pixels = rows.view(-1, self.thumbnail_px**2, 3).numpy()
        return self._calibrate(self._logits(self.normalised(rows)), grey_entropy(pixels), labels)

    def normalised(self, rows: Tensor) -> Tensor:
        """Normalises raw thumbnails (uint8 patch rows); bit for bit what `thumbnails` returns normalised."""
        mean, std = (
            torch.tensor(v, dtype=torch.float32, device=rows.device).repeat(rows.shape[1] // 3)
            for v in (self.mean, self.std)
        )
        return (rows.float() / 255 - mean) / std

    def _calibrate(self, logits: Tensor, entropies: np.ndarray, labels: Sequence[int] | Tensor | None) -> Calibration:
        temperature = self.calibration.temperature if self.calibration else 1.0
        if labels is not None:
            labels = torch.as_tensor(labels, dtype=torch.int64, device="cpu")
            if labels.shape != (len(logits),) or not ((labels >= 0) & (labels < len(self.grids))).all():
                raise ValueError(f"labels: expected {len(logits)} indices in [0, {len(self.grids)}), got {labels!r}")
            temperature = fit_temperature(logits.double(), labels)
        probabilities = (logits / temperature).softmax(dim=1).numpy()  # the same bits as in `predict_proba`
        parts = np.arange(len(self.grids) - 1, 0, -1) / len(self.grids)
        self.calibration = Calibration(
            temperature=temperature,
            suffices=suffices(probabilities),
            entropies=tuple(np.quantile(entropies, parts).tolist()),
        )
        return self.calibration

    def save(self, path: str | Path) -> None:
        """Writes weights, calibration and settings to one `.safetensors` file, completely or not at all."""
        from safetensors.torch import save

        metadata = {
            "grids": self.grids,
            "thumbnail_px": self.thumbnail_px,
            "widths": self.widths,
            "backbone": self.backbone,
            "mean": self.mean,
            "std": self.std,
        }
        tensors = {f"network.{name}": value.contiguous() for name, value in self.network.state_dict().items()}
        if self.calibration:
            metadata["calibration"] = {
                "temperature": self.calibration.temperature,
                "entropies": self.calibration.entropies,
            }
            tensors["calibration.suffices"] = torch.from_numpy(self.calibration.suffices)
        content = save(tensors, {"format": FORMAT, "assigner": json.dumps(metadata)})
        with replaced(path) as temporary:
            temporary.write_bytes(content)

    @classmethod
    @as_saved()
    def load(cls, path: str | Path, content: bytes | None = None) -> TokenLengthAssigner:
        """Reads an assigner that `save` wrote; it is in evaluation mode.

        Args:
            path: the file.
            content: what the file holds, if it has been read already.

        Raises:
            FileNotFoundError: if the file does not exist.
            ValueError: if `save` did not write the file, or it cannot be read.
        """
        from safetensors import SafetensorError

        if content is None and not Path(path).is_file():
            raise FileNotFoundError(f"assigner: there is no file {path}")
        content = Path(path).read_bytes() if content is None else content
        problem = misfit(io.BytesIO(content), Path(path).name)
        if problem is not None:
            raise ValueError(f"assigner: {path} cannot be read: it {problem}")
        try:
            tensors, metadata = tensors_and_metadata(content)
            if metadata.get("format") != FORMAT:
                raise ValueError("it was not written by TokenLengthAssigner.save")
            settings = loads(metadata["assigner"])
            calibration = settings.pop("calibration", None)
            assigner = cls(**settings)
            kept = tensors.pop("calibration.suffices", None)
            state = {n.removeprefix("network."): t for n, t in tensors.items()}
            dtype = next((t.dtype for t in state.values() if t.is_floating_point()), None)
            assigner.network.to(dtype=dtype).load_state_dict(state)
            if calibration:
                entropies = tuple(calibration["entropies"])
                assigner.calibration = Calibration(float(calibration["temperature"]), kept.numpy(), entropies)
        except (SafetensorError, AttributeError, KeyError, TypeError, RuntimeError, ValueError) as error:
            raise ValueError(f"assigner: {path} cannot be read: {str(error).splitlines()[0]}") from error
        return assigner.eval()

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._fused = Derived(FusedCNN)  # older pickles have None


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature in [1/20, 20] that minimises the cross-entropy of `logits / temperature`.

    Args:
        logits: float64 `[N, n]`.
        labels: int64 `[N]`.
    """

    def loss(log_temperature: float) -> float:
        return F.cross_entropy(logits / np.exp(log_temperature), labels).item()

    # The loss is convex in 1/t and therefore unimodal in log t, as golden-section search needs.
    ratio = (5**0.5 - 1) / 2
    low, high = -np.log(20.0), np.log(20.0)
    while high - low > 1e-4:
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        if loss(a) <= loss(b):
            high = b
        else:
            low = a
    return float(np.exp((low + high) / 2))
