"""What every test shares: the error rule, one generator of ragged batches, and forcing an instruction set."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from bench.error_rule import assert_as_accurate
from revit_fast.ops import _library
from revit_fast.packing import cumulative

# Zero, one, a vector's remainder, DeiT at 7², 10², 14², ViT at 384 px, and more than any tile.
SEQLENS = (0, 1, 2, 50, 101, 197, 577, 1025)
HEAD_DIMS = (1, 7, 32, 40, 64, 72, 80, 128, 256)
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ALL_ISAS = _library.cpu_isas() or ["reference"]
# Sets that differ from another in the products of narrow weights alone; their other kernels are those of the other.
PRODUCTS_ONLY = ("amx", "avx512_vnni", "avxvnni", "avx2_vnni", "avx2_amx")
ISAS = [isa for isa in ALL_ISAS if isa not in PRODUCTS_ONLY]
# Sets whose narrow products are computed in other instructions, tens of times slower, so that all machines test them.
EMULATED = ("avx2x16", "avx2_vnni", "avx2_amx")

device = "cpu"
"""Where the ops run, by the option --device: cpu, interpreter (CPU tensors, Triton kernels) or cuda."""

quick = True
"""Whether tests marked `full` are left out."""


def fewer_if_emulated(isa: str, *values) -> tuple:
    """The values; in the quick suite every other one for an instruction set that is emulated."""
    return values[::2] if quick and isa in EMULATED else values


def examples(n: int) -> int:
    """Examples of a property of dear ops: `n`, of which the quick suite tries a third."""
    return -(-n // 3) if quick else n


def only_on(*devices: str, reason: str) -> pytest.MarkDecorator:
    """Marks a test, or a parameter of one, that says something about these devices alone."""
    return pytest.mark.skipif(device not in devices, reason=f"{reason} (--device={device})")


def full(*values) -> object:
    """A case of a parametrised test that `make test-full` alone runs: others cover its kind."""
    return pytest.param(*values, marks=pytest.mark.full)


def full_if(rare: bool, *values) -> object:
    """A case that `make test-full` alone runs where `rare` holds."""
    return full(*values) if rare else pytest.param(*values)


def alike_on_all_devices(test: Callable) -> Callable:
    """Marks a test of what kernels share, such as an op's registration: in the interpreter `make test-full` has it."""
    return pytest.mark.full(test) if device == "interpreter" else test


def cut(seqlens: Sequence[int]) -> tuple[int, ...]:
    """The lengths; in the interpreter, which takes milliseconds for each program, long ones are cut.

    They stay ragged; a pack of several still takes several programs.
    """
    return tuple(n if device != "interpreter" or n < 30 else n // 8 + 17 for n in seqlens)


def thin(values: Sequence[int]) -> tuple[int, ...]:
    """The values of a test's grid; in the interpreter every other one."""
    return tuple(values[::2] if device == "interpreter" else values)


def cu_seqlens_of(seqlens: Sequence[int]) -> Tensor:
    return cumulative(seqlens).to(torch.get_default_device())


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal values drawn in float64 on the CPU and rounded, so that every dtype and device sees the same numbers."""
    generator = torch.Generator("cpu").manual_seed(seed)
    values = scale * torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")
    return values.to(torch.get_default_device(), dtype)


def to_float64(value):
    """Floating tensors of `value` (a tensor or anything else) in float64."""
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def check_op(
    ours: Tensor | Sequence[Tensor],
    reference: Callable[..., Tensor | Sequence[Tensor]],
    *args,
    what: str = "",
    **kwargs,
) -> None:
    """Holds `ours` to the error rule against `reference(*args, **kwargs)` in the same dtype and in float64."""
    same = reference(*args, **kwargs)
    truth = reference(*map(to_float64, args), **{key: to_float64(value) for key, value in kwargs.items()})
    if isinstance(ours, Tensor):
        ours, same, truth = [ours], [same], [truth]
    for i, (o, s, t) in enumerate(zip(ours, same, truth, strict=True)):
        assert_as_accurate(o, s, t, f"{what} output {i}")
