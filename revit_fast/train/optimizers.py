"""Optimizers of timm for models whose norms have a leading axis of lengths."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer


def create_optimizer(
    model: nn.Module, opt: str, lr: float, weight_decay: float, layer_decay: float | None = None, **options: Any
) -> Optimizer:
    """timm's `create_optimizer_v2` for a model with norms of several lengths.

    Many optimizers decide by a parameter's shape: Muon orthogonalises matrices, AdamP and SGDP project them, Adafactor
    and Kron factor their statistics, MARS has another rule for them. The norms of several lengths, tokens and position
    embeddings have the shape of matrices and are none. The optimizer gets them as vectors that share their memory: a
    norm's row of every length, and every other one of `model.no_weight_decay()` as a whole. Clear the gradients with
    `model.zero_grad()`: those of the vectors are set at every step.

    Args:
        model: the model; its `no_weight_decay()` names norms, tokens and position embeddings.
        opt: timm's name of the optimizer.
        lr: learning rate.
        weight_decay: weight decay of matrices; vectors have none.
        layer_decay: factor by which the learning rate falls from a block to the block before it; None: no decay.
        **options: further arguments of `create_optimizer_v2`.

    Raises:
        ValueError: for a name that timm does not know.
    """
    from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay

    named = {id(parameter): name for name, parameter in model.named_parameters()}
    apart = model.no_weight_decay()
    shared: list[tuple[nn.Parameter, list[nn.Parameter]]] = []

    def as_vectors(parameter: nn.Parameter) -> list[nn.Parameter]:
        if parameter.dim() < 2 or named[id(parameter)] not in apart:
            return [parameter]
        vectors = [nn.Parameter(row) for row in _rows(parameter.detach())]
        shared.append((parameter, vectors))
        return vectors

    def groups(model: nn.Module) -> list[dict[str, Any]]:
        rule = {"weight_decay": weight_decay, "no_weight_decay_list": apart}
        if layer_decay is None:
            made = param_groups_weight_decay(model, **rule)
        else:
            made = param_groups_layer_decay(model, layer_decay=layer_decay, **rule)
        return [g | {"params": [v for parameter in g["params"] for v in as_vectors(parameter)]} for g in made]

    def give_gradients(*_: Any) -> None:
        for parameter, vectors in shared:
            rows = [None] * len(vectors) if parameter.grad is None else _rows(parameter.grad)
            for vector, row in zip(vectors, rows, strict=True):
                vector.grad = row

    optimizer = create_optimizer_v2(model, opt, lr, weight_decay=0.0, param_group_fn=groups, **options)
    stepping = getattr(optimizer, "_base_optimizer", optimizer)  # timm's Lookahead has no hooks of its own
    stepping.register_step_pre_hook(give_gradients)
    return optimizer


def _rows(values: Any) -> tuple:
    """The rows of a norm `[n_lengths, C]`; tokens and position embeddings `[1, tokens, C]` as one row."""
    return values.unbind() if values.dim() == 2 else (values.reshape(-1),)
