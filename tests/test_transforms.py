"""Transforms that the ops have no rule for are refused by name: PyTorch would give zeros, or errors of its own."""

import pytest
import torch
from helpers import cu_seqlens_of, only_on, randn
from small_models import images_of, make_model
from torch.autograd import forward_ad

import revit_fast as rf
from revit_fast import ops

SEQLENS = (4, 0, 3)
CU_SEQLENS = cu_seqlens_of(SEQLENS)
INDEX = torch.tensor([0, 1, 1], dtype=torch.int32)
WEIGHT, BIAS = randn(2, 8), randn(2, 8, seed=1)
ANGLES, HEADS = randn(2, 7, 1, 2).unbind(), randn(2, 7, 2, 4).unbind()
PACKED = ops.pack_weight(randn(5, 8))
NO_GRADIENT = ("packed_linear",)

OPS = {
    "varlen_attention": lambda x: ops.varlen_attention(*(x.view(7, 2, 4),) * 3, CU_SEQLENS),
    "tal_layer_norm": lambda x: ops.tal_layer_norm(x, WEIGHT, BIAS, CU_SEQLENS, INDEX),
    "tal_layer_norm_residual": lambda x: ops.tal_layer_norm(x, WEIGHT, BIAS, CU_SEQLENS, INDEX, residual=x)[0],
    "tal_layer_norm of rms": lambda x: ops.tal_rms_norm(x, WEIGHT, CU_SEQLENS, INDEX),
    "assemble_tokens": lambda x: ops.assemble_tokens(x, BIAS, x, INDEX * 0, CU_SEQLENS),
    "mean_pool": lambda x: ops.mean_pool(x, CU_SEQLENS),
    "rotary": lambda x: ops.rotary(*(x.view(7, 2, 4),) * 2, *ANGLES)[0],
    "rotary of learned angles": lambda x: ops.rotary(*HEADS, *(x[:, None, :2],) * 2)[0],
    "packed_linear": lambda x: ops.packed_linear(x, PACKED),
}
pytestmark = [only_on("cpu", reason="the check is the same on every device")]


def dual(function, x):
    with forward_ad.dual_level():
        return function(forward_ad.make_dual(x, torch.ones_like(x)))


TRANSFORMS = {
    "jvp": lambda function, x: torch.func.jvp(function, (x,), (x,)),
    "jacfwd": lambda function, x: torch.func.jacfwd(function)(x),
    "dual tensors": dual,
    "grad": lambda function, x: torch.func.grad(lambda x: function(x).sum())(x),
    "jacrev": lambda function, x: torch.func.jacrev(function)(x),
    "hessian": lambda function, x: torch.func.hessian(lambda x: function(x).sum())(x),
    "vmap": lambda function, x: torch.func.vmap(function)(x.unsqueeze(0)),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", OPS)
def test_an_op_refuses_it(name, transform):
    with pytest.raises(NotImplementedError, match=f"^revit_fast::{name.split()[0]}: .* not implemented; use "):
        TRANSFORMS[transform](OPS[name], randn(7, 8, seed=2))


@pytest.mark.parametrize("name", [name for name in OPS if name not in NO_GRADIENT])
def test_what_the_message_says_works(name):
    x = randn(7, 8, seed=2, dtype=torch.float64) if name == "mean_pool" else randn(7, 8, seed=2)
    jacobian = torch.autograd.functional.jacobian(OPS[name], x)
    assert jacobian.abs().max() > 0
    with forward_ad.dual_level():  # a tensor without a tangent is a constant here
        assert torch.equal(OPS[name](x), OPS[name](x))


@pytest.mark.parametrize("engine", [None, "fused", "modules"])
@pytest.mark.parametrize("transform", ["jvp", "dual tensors", "grad", "vmap"])
def test_a_model_refuses_it(transform, engine):
    model = make_model()
    model = rf.optimize(model, engine=engine) if engine else model
    (image,) = images_of([model.grids[0]])
    with pytest.raises(NotImplementedError, match=r"^revit_fast::.* not implemented; use "):
        TRANSFORMS[transform](lambda x: model([x]), image)


@pytest.mark.parametrize("engine", [None, "fused", "modules"])
@pytest.mark.parametrize("transform", ["jvp", "grad", "vmap"])
def test_nothing_made_in_a_transform_is_kept(transform, engine):
    """What is kept of a batch's shape is made anew by the call after a refused one, whose tensors are gone."""
    model = make_model()
    model = rf.optimize(model, engine=engine) if engine else model
    seed = sum(map(ord, transform + str(engine)))
    (image,) = images_of([(3 + seed % 5, 3 + seed % 7)])
    with pytest.raises(NotImplementedError, match="not implemented"):
        TRANSFORMS[transform](lambda x: model([x]), image)
    fresh = make_model()
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(model([image]), fresh([image]), rtol=1e-4, atol=1e-5)
    if engine is None:
        model([image]).sum().backward()
