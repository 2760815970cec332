"""The batches that int8 weights are calibrated on, and the rows that enter linear layers for them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from revit_fast.layers.block import Block
from revit_fast.models.vit import ReViT
from revit_fast.packing import PackedBatch


def calibration_batches(model: ReViT, batches: Iterable) -> tuple[PackedBatch, ...]:
    """Copies of calibration batches as packs.

    Raises:
        TypeError: if `batches` is one batch, or no iterable; or for a batch of a kind that the model does not take.
        ValueError: if there is no batch, or one that the model refuses or that holds no images.
    """
    if isinstance(batches, (Tensor, PackedBatch, str)) or not isinstance(batches, Iterable):
        raise TypeError(
            f"calibrate: expected an iterable of batches, got {type(batches).__name__}; put a single batch into a list"
        )
    packs = [_pack(model, batch, i) for i, batch in enumerate(batches)]
    if not packs:
        raise ValueError("calibrate: expected at least one batch, got none; a few dozen images are enough")
    return tuple(packs)


def _pack(model: ReViT, batch: object, index: int) -> PackedBatch:
    try:
        pack = model.pack(batch)
    except (TypeError, ValueError) as error:
        raise type(error)(f"calibrate: batch {index}: {error}") from error
    if not pack.plan.n_rows:
        raise ValueError(f"calibrate: batch {index} holds no images; leave it out")
    with torch.inference_mode(False):
        return pack.to("cpu").with_data(pack.data.detach().to("cpu", copy=True))


def block_inputs(model: ReViT, batches: Iterable[PackedBatch]) -> Iterator[dict[str, Tensor]]:
    """Yields for each block the rows that enter its linear layers, in float32, under the layers' names.

    The model's own code computes them for all tokens, one block after another. Copies of the blocks have the hooks, so
    that other threads may call the model meanwhile.
    """
    prepared = [model._inputs(batch) for batch in batches]
    rotations = [model._rotations(inputs) for inputs in prepared]
    streams = [(model._embed(inputs).float(), None) for inputs in prepared]
    for i, original in enumerate(model.blocks):
        block = copy.deepcopy(original).float()
        rows = _recorded(block)
        streams = [
            block(*stream, inputs.layout, rotation=rotation[i])
            for stream, inputs, rotation in zip(streams, prepared, rotations, strict=True)
        ]
        joined = {name: torch.cat(parts) for name, parts in rows.items()}
        for name, values in joined.items():
            if not values.isfinite().all():
                raise ValueError(f"calibrate: rows that enter {name} of blocks.{i} are not finite; check the weights")
        yield joined


def _recorded(block: Block) -> dict[str, list[Tensor]]:
    """Lists by the layers' names, to which every call of the block will append the layers' input rows."""
    layers = {"qkv": block.attn.qkv, "proj": block.attn.proj, "fc1": block.mlp.fc1, "fc2": block.mlp.fc2}
    rows = {name: [] for name in layers}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda _, inputs, name=name: rows[name].append(inputs[0]))
    return rows
