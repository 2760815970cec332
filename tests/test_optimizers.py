"""No optimizer of timm takes norms of several lengths, tokens or position embeddings for matrices."""

import copy

import pytest
import timm.optim
import torch

import revit_fast as rf
from revit_fast.train.optimizers import create_optimizer

NEEDS_ANOTHER_PACKAGE = ("bnb", "fused")
SECOND_DERIVATIVES = ("adahessian",)
NAMES = [n for n in timm.optim.list_optimizers() if not n.startswith(NEEDS_ANOTHER_PACKAGE + SECOND_DERIVATIVES)]


def model_of(grids=(8, 7, 6, 5, 4)):
    """Five lengths of 16 channels: norms that Muon, which wants four rows, takes for matrices."""
    torch.manual_seed(0)
    kwargs = {"patch_size": 2, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 3, "reg_tokens": 2}
    return rf.ReViT(grids=grids, base_grid=(4, 4), **kwargs)


def give_gradients(parameters, step):
    generator = torch.Generator().manual_seed(step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def as_written_by_hand(model, name):
    """Three steps on parameters of which norms, tokens and embeddings are vectors by themselves; the new values."""
    apart = model.no_weight_decay()
    values = dict(model.named_parameters())
    split = {key: [v.detach().clone() for v in value] if value.dim() == 2 else [value.detach().clone().flatten()]
             for key, value in values.items() if key in apart}  # fmt: skip
    own = {key: [torch.nn.Parameter(v) for v in parts] for key, parts in split.items()}
    own |= {key: [torch.nn.Parameter(v.detach().clone())] for key, v in values.items() if key not in apart}
    decays = {key: values[key].dim() > 1 and key not in apart and not key.endswith(".bias") for key in values}
    groups = [
        {"params": [p for key in values if decays[key] == decay for p in own[key]], "weight_decay": 0.05 * decay}
        for decay in (False, True)
    ]
    torch.manual_seed(0)
    optimizer = timm.optim.create_optimizer_v2(groups, name, 1e-2, weight_decay=0.0)
    for step in range(3):
        give_gradients(values.values(), step)
        for key, parameters in own.items():
            rows = values[key].grad.unbind() if len(parameters) > 1 else [values[key].grad]
            for parameter, row in zip(parameters, rows, strict=True):
                parameter.grad = row.reshape(parameter.shape).clone()
        optimizer.step()
    return {key: torch.cat([p.detach().flatten() for p in own[key]]).view(values[key].shape) for key in values}


@pytest.mark.parametrize("name", NAMES)
@torch.compiler.set_stance("force_eager")  # Kron compiles itself
def test_every_optimizer_takes_norms_tokens_and_positions_for_vectors(name):
    model = model_of()
    wanted = as_written_by_hand(copy.deepcopy(model), name)
    torch.manual_seed(0)
    optimizer = create_optimizer(model, name, 1e-2, 0.05)
    for step in range(3):
        give_gradients(model.parameters(), step)
        optimizer.step()
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), wanted[key], rtol=1e-5, atol=1e-7, msg=lambda m: f"{key}: {m}")  # noqa: B023


def test_parameters_without_gradients_stay_and_layers_decay():
    model = model_of()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = create_optimizer(model, "adamw", 1e-2, 0.0, layer_decay=0.5)
    scales = {group["lr_scale"] for group in optimizer.param_groups}
    assert len(scales) == 3  # the stem, the block, the head
    give_gradients([model.norm.weight], 0)
    optimizer.step()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {"norm.weight"}
    model.zero_grad()
    optimizer.step()
    assert all(v.grad is None for group in optimizer.param_groups for v in group["params"])
