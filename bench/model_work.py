"""What the model bench measures: models and images, the FLOP of a forward pass, errors, and the turns of candidates."""

from __future__ import annotations

import copy
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import timm
import torch
from timm.models import VisionTransformer
from torch import Tensor

from bench.turns import take_turns

MODELS = {
    "deit-ti": "deit_tiny_patch16_224",
    "deit-s": "deit_small_patch16_224",
    "deit-b": "deit_base_patch16_224",
    "dinov3-s": "vit_small_patch16_dinov3",
}
LONGEST = 14
MIX = ((14, 4), (10, 6), (7, 6))
"""Side of the grid and images of it in a batch of 16."""

MIXES = {
    "all-14": "all 14×14",
    "all-7": "all 7×7",
    "mix": "4/6/6 at 14, 10, 7",
    "random": "random grids, sides 7 to 14",
    "mix-16": "4/6/6 at 16, 12, 8",
}
OF_256_PX = {"dinov3-s": ("mix-16",)}
"""Mixes of the models that are made for images of 256 px; the others have the mixes up to 14×14."""
N_SETS = 3
"""Sets of inputs that the rounds rotate through, so that no candidate finds its input in a cache."""
SLOW_S = 2.0
"""Seconds of a call beyond which a candidate takes few rounds."""

TOLERANCES = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 4e-3, "int8": 9e-2, "int8 per tensor": 0.5}
"""Largest error of a candidate by its precision, see `relative_error`.

- float32: the sums of 12 blocks in another order; errors are about 1e-6.
- bfloat16: twice the error of timm under autocast, which is 0.9e-2 to 1.4e-2 on the models and mixes of this bench.
- float16: an eighth of that, as it has three bits more.
- int8: twice the largest error that docs/notes/cpu-engine.md states for random weights without outliers, 4.5e-2.
- int8 per tensor: one scale for all activations of a tensor, which few images can be read from. NNCF had 0.07 to 0.2,
  and images in the wrong order give about 1, so that a mistake is still found.
"""

Grid = tuple[int, int]


def apportion(n_images: int) -> list[int]:
    """Images at 14, 10 and 7 of a batch in the proportions of `MIX`, by largest remainder."""
    total = sum(count for _, count in MIX)
    counts = [n_images * count // total for _, count in MIX]
    by_remainder = sorted(range(len(MIX)), key=lambda i: -(n_images * MIX[i][1] % total))
    for i in by_remainder[: n_images - sum(counts)]:
        counts[i] += 1
    return counts


def grids_of(mix: str, n_images: int, seed: int = 0) -> list[Grid]:
    """Grids (rows, columns) of a batch, in the random order in which images would come.

    Args:
        mix: key of `MIXES`.
        n_images: images of the batch.
        seed: of the order, and of the random grids.
    """
    draw = random.Random(seed)
    if mix == "random":
        return [(draw.randint(7, LONGEST), draw.randint(7, LONGEST)) for _ in range(n_images)]
    if mix in ("mix", "mix-16"):
        sides = (16, 12, 8) if mix == "mix-16" else [side for side, _ in MIX]
        grids = [(side, side) for side, n in zip(sides, apportion(n_images), strict=True) for _ in range(n)]
        draw.shuffle(grids)
        return grids
    side = int(mix.removeprefix("all-"))
    return [(side, side)] * n_images


def mixes_of(model: str) -> tuple[str, ...]:
    """The mixes that a key of `MODELS` is measured on."""
    return OF_256_PX.get(model) or tuple(mix for mix in MIXES if mix != "mix-16")


def mixed_stream() -> Iterator[Grid]:
    """Grids without end, every 16 of them in the proportions of `MIX`."""
    while True:
        yield from grids_of("mix", sum(count for _, count in MIX))


def random_vit(name: str, seed: int = 0, **kwargs) -> VisionTransformer:
    """A timm ViT or EVA in eval mode, any input size, with weights that keep activations of order one."""
    torch.manual_seed(seed)
    vit = timm.create_model(name, dynamic_img_size=True, **kwargs).eval()
    with torch.no_grad():
        for key, parameter in vit.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=1.5 / parameter.shape[1] ** 0.5)
            elif "gamma" in key:
                parameter.fill_(1.0)  # LayerScale would hide the blocks
    return vit.requires_grad_(False)


def model_title(key: str) -> str:
    """A key of `MODELS` as papers write it, "DeiT-S"."""
    return key.title().replace("Deit", "DeiT").replace("Dinov3", "DINOv3")


class Flops(NamedTuple):
    """FLOP of a forward pass, two for a multiply-add; norms, softmax and activations are not counted.

    Attributes:
        linear: of the linear layers, patch embedding and head included.
        attention: of the products of queries with keys and of weights with values.
    """

    linear: float
    attention: float

    @property
    def total(self) -> float:
        return self.linear + self.attention


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a ViT that its FLOP follow from.

    Attributes:
        dim: channels C.
        depth: blocks.
        hidden: width of the MLP.
        patch_values: values of a patch, P·P·3.
        n_classes: outputs of the head.
        n_prefix: tokens of a sequence that are not patches.
    """

    dim: int
    depth: int
    hidden: int
    patch_values: int
    n_classes: int
    n_prefix: int

    @classmethod
    def of(cls, vit: VisionTransformer) -> ModelShape:
        """The shape of a timm ViT."""
        return cls(
            dim=vit.embed_dim,
            depth=len(vit.blocks),
            hidden=vit.blocks[0].mlp.fc1.out_features,
            patch_values=vit.patch_embed.proj.weight[0].numel(),
            n_classes=vit.num_classes,
            n_prefix=vit.num_prefix_tokens,
        )

    def flops(self, seqlens: Sequence[int], pooled_last: bool = False) -> Flops:
        """FLOP of a forward pass over sequences.

        Args:
            seqlens: tokens of every sequence, prefix tokens included.
            pooled_last: count the last block as ours executes it with class-token pooling: keys and values of all
                tokens, but queries, projection and MLP of one token a sequence. Else every block on every token.
        """
        c, n_images, n_tokens = self.dim, len(seqlens), sum(seqlens)
        queries = c * c  # multiply-adds for a token; the projection takes as many, keys and values together twice that
        keys_values, projection, mlp = 2 * c * c, c * c, 2 * c * self.hidden
        block = n_tokens * (queries + keys_values + projection + mlp)
        attention = 2 * c * sum(n * n for n in seqlens)
        blocks, attentions = self.depth * block, self.depth * attention
        if pooled_last:
            blocks += n_tokens * keys_values + n_images * (queries + projection + mlp) - block
            attentions += 2 * c * n_tokens - attention
        embedding = (n_tokens - n_images * self.n_prefix) * self.patch_values * c
        head = n_images * c * self.n_classes
        return Flops(2.0 * (embedding + blocks + head), 2.0 * attentions)


@dataclass
class Case:
    """A model and a batch of images for it.

    Attributes:
        vit: the model.
        grids: (rows, columns) of patches of every image.
        open_ended: whether the grids stand for any that may come, so that no engine can know their shapes beforehand.
        n_threads: threads that every candidate may use.
    """

    vit: VisionTransformer
    grids: list[Grid]
    open_ended: bool = False
    n_threads: int = 2

    @cached_property
    def shape(self) -> ModelShape:
        return ModelShape.of(self.vit)

    @property
    def longest(self) -> int:
        """Side of the grid at which the model is run without mixed lengths."""
        return max(LONGEST, *map(max, self.grids))

    @property
    def patch(self) -> int:
        """Side of a patch in pixels."""
        return self.vit.patch_embed.patch_size[0]

    @cached_property
    def seqlens(self) -> list[int]:
        """Tokens of every image."""
        return [h * w + self.shape.n_prefix for h, w in self.grids]

    @cached_property
    def sets(self) -> list[list[Tensor]]:
        """`N_SETS` batches of images `[3, gh*P, gw*P]`."""
        draw = torch.Generator().manual_seed(0)
        p = self.patch
        return [[torch.randn(3, h * p, w * p, generator=draw) for h, w in self.grids] for _ in range(N_SETS)]

    @cached_property
    def groups(self) -> dict[Grid, list[int]]:
        """Images of every grid, the longest grid first."""
        order = sorted(set(self.grids), key=lambda grid: (-grid[0] * grid[1], grid))
        return {grid: [i for i, other in enumerate(self.grids) if other == grid] for grid in order}

    @property
    def grouped_order(self) -> list[int]:
        """Indices of the images in the order of `groups`."""
        return [i for indices in self.groups.values() for i in indices]

    @cached_property
    def stacked(self) -> list[dict[Grid, Tensor]]:
        """The sets with the images of a grid as one tensor `[n, 3, gh*P, gw*P]`."""
        return [
            {grid: torch.stack([images[i] for i in indices]) for grid, indices in self.groups.items()}
            for images in self.sets
        ]

    @cached_property
    def full_length(self) -> Tensor:
        """Images `[B, 3, side, side]`: what stands for the batch where every image is run at the longest grid."""
        side = self.longest * self.patch
        return torch.randn(N_SETS, len(self.grids), 3, side, side, generator=torch.Generator().manual_seed(1))

    @cached_property
    def expected(self) -> Tensor:
        """The true logits `[B, n_classes]` of the first set."""
        return ungroup(true_logits(self.vit, self.stacked[0].values()), self.grouped_order)


def true_logits(vit: VisionTransformer, batches: Iterable[Tensor]) -> Tensor:
    """timm's logits of batches of images, computed in float64 (timm resamples position embeddings in float32)."""
    exact = copy.deepcopy(vit).double()
    with torch.inference_mode():
        return torch.cat([exact(images.double()) for images in batches])


def relative_error(values: Tensor, expected: Tensor) -> float:
    """Largest difference of a value to the true one, as a part of the largest true value."""
    return ((values.double() - expected).abs().max() / expected.abs().max()).item()


def agreement(logits: Tensor, expected: Tensor) -> float:
    """Part of the images whose largest logit is that of the largest true one."""
    return (logits.argmax(1) == expected.argmax(1)).double().mean().item()


def ungroup(logits: Tensor, order: Sequence[int]) -> Tensor:
    """Rows in the order of the images, of `logits` whose row i belongs to image `order[i]`."""
    return logits[torch.tensor(order).argsort()]


def grids_up_to(n_tokens: int, n_prefix: int = 1) -> list[Grid]:
    """Images whose tokens come nearest to `n_tokens`: one image where one will do, else of the 4/6/6 mix."""
    for side, _ in MIX:
        if n_tokens == side * side + n_prefix:
            return [(side, side)]
    stream = mixed_stream()
    grids = [next(stream) for _ in range(2 + n_tokens // (7 * 7 + n_prefix))]
    totals = list(accumulate(h * w + n_prefix for h, w in grids))
    best = min(range(len(totals)), key=lambda i: abs(totals[i] - n_tokens))
    return grids[: best + 1]


def rounds_for(seconds: float, rounds: int) -> int:
    """Rounds for a candidate whose call takes `seconds`: all, but 3 beyond `SLOW_S`, and 1 beyond a minute."""
    return min(rounds, 1 if seconds > 60 else 3 if seconds > SLOW_S else rounds)


def timed(candidates: dict[str, Callable[[int], object]], rounds: int, pause_s: float) -> dict[str, list[float]]:
    """Seconds per call of every candidate in each round that it took part in, the first rounds being those of all.

    A turn is one call, or as many as fill 50 ms (10 at most), so that waking threads after the pause does not decide.

    Args:
        candidates: name -> function of the round, which says what input to take.
        rounds: turns of every candidate; slow ones take fewer, see `rounds_for`.
        pause_s: rest before each turn, in which the threads of the candidate before stop spinning.
    """
    calls, n_rounds, turns = {}, {}, {}
    for name, run in candidates.items():
        for warm_up in range(2):
            begin = time.perf_counter()
            run(warm_up)
            seconds = time.perf_counter() - begin
            if seconds > SLOW_S:
                break  # what a first call does besides is little of that
        n_rounds[name] = rounds_for(seconds, rounds)
        calls[name] = n = min(10, math.ceil(0.05 / seconds))
        turns[name] = lambda turn, run=run, n=n: [run(turn + call) for call in range(n)]
    samples = {name: [] for name in candidates}
    done = 0
    for level in sorted(set(n_rounds.values())):
        takers = {name: turns[name] for name in candidates if n_rounds[name] >= level}
        for name, seconds in take_turns(takers, level - done, pause_s).items():
            samples[name] += [s / calls[name] for s in seconds]
        done = level
    return samples
