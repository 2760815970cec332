"""TAL-LayerNorm of a mixed pack against what PyTorch offers for it: the sum, then `layer_norm` per length group.

The rows of a length are contiguous, so that the peer needs no gather. This is its cheapest honest form.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import Comparison
from torch import Tensor

from bench.model_work import relative_error
from revit_fast import ops
from revit_fast.packing import cumulative

# Sequences of 14x14, 10x10 and 7x7 patches with a class token.
MIX = ((4, 197), (6, 101), (6, 50))
EPS = 1e-6
INPUT_SETS = 6
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def build(channels: int, dtype: str, residual: bool, backward: bool = False) -> Comparison:
    torch_dtype = DTYPES[dtype]
    cu_seqlens = cumulative([length for count, length in MIX for _ in range(count)])
    length_index = torch.tensor([i for i, (count, _) in enumerate(MIX) for _ in range(count)], dtype=torch.int32)
    group_rows = [count * length for count, length in MIX]
    n_rows = sum(group_rows)
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(torch_dtype)

    weight, bias = randn(len(MIX), channels), randn(len(MIX), channels)
    inputs = [(randn(n_rows, channels), randn(n_rows, channels)) for _ in range(INPUT_SETS)]
    grads = (randn(n_rows, channels), randn(n_rows, channels))

    def ours(turn: int):
        x, other = inputs[turn % INPUT_SETS]
        out = ops.tal_layer_norm(x, weight, bias, cu_seqlens, length_index, EPS, other if residual else None)
        return out if residual else (out, x)

    def norms(total: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
        groups = total.split(group_rows)
        return [F.layer_norm(g, (channels,), weight[i], bias[i], EPS) for i, g in enumerate(groups)]

    def grouped(turn: int):
        x, other = inputs[turn % INPUT_SETS]
        total = x + other if residual else x
        return norms(total, weight, bias), total

    total = grouped(0)[1]
    exact = [t.double().requires_grad_() for t in (total, weight, bias)]
    truth = torch.cat(norms(*exact))
    true_grads = list(torch.autograd.grad(truth, exact, grads[0].double()))
    if residual:  # the sum is an output too, and its two terms have one gradient
        true_grads[0] = true_grads[0] + grads[1]
        true_grads.insert(0, true_grads[0])

    def check(name: str, output) -> float:
        y, total_of = output
        torch.testing.assert_close(total_of, total, rtol=0, atol=0)
        error = relative_error(torch.cat(y) if isinstance(y, list) else y, truth)
        assert error <= (1e-6 if dtype == "float32" else 2**-7), f"{name}: error {error:.2e}"
        return error

    def without_grad(candidate: Callable) -> Callable:
        return lambda turn: torch.inference_mode()(candidate)(turn)

    def with_backward(candidate: Callable) -> Callable:
        def run(turn: int):
            leaves = [t.requires_grad_() for t in (*inputs[turn % INPUT_SETS][: 1 + residual], weight, bias)]
            y, total = candidate(turn)
            outputs = [*(y if isinstance(y, list) else [y]), *([total] if residual else [])]
            out_grads = [*(grads[0].split(group_rows) if isinstance(y, list) else grads[:1]), grads[1]]
            return y, total, torch.autograd.grad(outputs, leaves, out_grads[: len(outputs)])

        return run

    def check_backward(name: str, output) -> float:
        y, total, got = output
        check(name, (y, total))
        error = max(relative_error(a, b) for a, b in zip(got, true_grads, strict=True))
        assert error <= 1e-5, f"{name}: error of a gradient {error:.2e}"
        return error

    wrap = with_backward if backward else without_grad
    case = f"{'residual + ' if residual else ''}norm, C={channels}{', with backward' if backward else ''}"
    return Comparison(
        group="layer_norm",
        case=case,
        candidates={"ours": wrap(ours), "layer_norm per length group": wrap(grouped)},
        check=check_backward if backward else check,
        precision=dtype,
        rounds=61,
    )


def build_residual_384() -> Comparison:
    return build(384, "float32", True)


def build_residual_768() -> Comparison:
    return build(768, "float32", True)


def build_384() -> Comparison:
    return build(384, "float32", False)


def build_768() -> Comparison:
    return build(768, "float32", False)


def build_residual_384_bfloat16() -> Comparison:
    return build(384, "bfloat16", True)


def build_384_bfloat16() -> Comparison:
    return build(384, "bfloat16", False)


def build_residual_384_backward() -> Comparison:
    return build(384, "float32", True, backward=True)


CASES = (
    build_residual_384,
    build_residual_768,
    build_384,
    build_768,
    build_residual_384_bfloat16,
    build_384_bfloat16,
    build_residual_384_backward,
)


@pytest.mark.parametrize("candidate", ["ours", "layer_norm per length group"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__.removeprefix("build_"))
def test_layer_norm(replay, case, candidate):
    replay(case, candidate)
