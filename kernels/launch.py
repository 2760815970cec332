"""Launches kernels: the target GPU that launch choices are made for, and the one function that launches all kernels.

Everything a launcher decides is a pure function of the target, the arguments' dtypes and shapes, and host-known counts.
From fake tensors, `record` therefore collects every launch that a chip would get, on a machine without a GPU. The
machine-code tests compile exactly those launches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch


@dataclass(frozen=True)
class Target:
    """The properties of a chip that launch choices depend on.

    Attributes:
        name: "sm_80", "sm_90", "sm_100", "sm_120" or "gfx942".
        backend: Triton's "cuda" or "hip".
        arch: Triton's name of the architecture: 90, or "gfx942".
        warp_size: threads of a warp (wavefront).
        shared_bytes: shared memory that one block may take.
        registers: 32-bit registers of one multiprocessor.
        max_warps: warps resident on one multiprocessor.
        shared_bytes_per_sm: shared memory of one multiprocessor.
    """

    name: str
    backend: str
    arch: int | str
    warp_size: int
    shared_bytes: int
    registers: int
    max_warps: int
    shared_bytes_per_sm: int


# Sources: CUDA C++ programming guide, table "technical specifications per compute capability"; AMD CDNA 3 ISA guide.
TARGETS = {
    t.name: t
    for t in (
        Target("sm_80", "cuda", 80, 32, 163 * 1024, 65536, 64, 164 * 1024),
        Target("sm_90", "cuda", 90, 32, 227 * 1024, 65536, 64, 228 * 1024),
        Target("sm_100", "cuda", 100, 32, 227 * 1024, 65536, 64, 228 * 1024),
        Target("sm_120", "cuda", 120, 32, 99 * 1024, 65536, 48, 100 * 1024),
        Target("gfx942", "hip", "gfx942", 64, 64 * 1024, 4 * 64 * 512, 32, 64 * 1024),
    )
}


INTERPRETER = replace(TARGETS["sm_90"], name="interpreter")
"""Triton's interpreter, which has unlimited registers but takes milliseconds for every operation."""


@dataclass(frozen=True)
class Launch:
    """One recorded launch.

    Attributes:
        kernel: the `triton.jit` function.
        grid: programs along each axis.
        arguments: run-time arguments by name, in the kernel's order.
        constants: `tl.constexpr` arguments by name.
        num_warps: warps per program.
        num_stages: software-pipeline stages of its loops.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int


_assumed: Target | None = None
_recorded: list[Launch] | None = None


@lru_cache(maxsize=64)
def _device_target(index: int | None) -> Target:
    if torch.version.hip:
        return TARGETS["gfx942"]
    major, minor = torch.cuda.get_device_capability(index)
    # A chip between two tuned ones uses the choices of the lower one; sm_89 has the small shared memory of sm_120.
    if (major, minor) in ((8, 6), (8, 9)):
        return TARGETS["sm_120"]
    known = [t for t in TARGETS.values() if t.backend == "cuda" and t.arch <= 10 * major]
    if not known:
        raise RuntimeError(
            f"device: the Triton kernels need compute capability 8.0 or later, {torch.device('cuda', index)} has "
            f"{major}.{minor}; move the model and its inputs to the CPU"
        )
    return max(known, key=lambda t: t.arch)


def target_of(device: torch.device) -> Target:
    """The target whose launch choices fit `device`, or the target of `assume_target` if one is assumed.

    CPU tensors occur only in Triton's interpreter.
    """
    if _assumed is not None:
        return _assumed
    return INTERPRETER if device.type == "cpu" else _device_target(device.index)


@contextlib.contextmanager
def assume_target(target: Target | str) -> Iterator[Target]:
    """Makes every launch choice for `target`, whatever the device is."""
    global _assumed
    before, _assumed = _assumed, TARGETS[target] if isinstance(target, str) else target
    try:
        yield _assumed
    finally:
        _assumed = before


@contextlib.contextmanager
def record(target: Target | str) -> Iterator[list[Launch]]:
    """Collects the launches for `target` instead of running them."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        with assume_target(target):
            yield _recorded
    finally:
        _recorded = before


def launch(kernel, grid: tuple[int, ...], *arguments: Any, num_warps: int = 4, num_stages: int = 1, **constants: Any):
    """Runs `kernel` over `grid` with the run-time `arguments` in order; does nothing for an empty grid."""
    if 0 in grid:
        return
    if _recorded is not None:
        names = dict(zip(kernel.arg_names, arguments, strict=False))
        _recorded.append(Launch(kernel, grid, names, constants, num_warps, num_stages))
        return
    device = next(a.device for a in arguments if isinstance(a, torch.Tensor))
    keeps = device.type == "cuda" and not torch.version.hip
    key = None
    if keeps:
        key = (id(kernel), device.index, num_warps, num_stages, *constants.items(), *map(_specialization, arguments))
    with _current(device):
        compiled = _compiled.get(key)
        if compiled is not None:
            rest = map(constants.get, kernel.arg_names[len(arguments) :])
            compiled[(*grid, 1, 1)[:3]](*arguments, *rest)
            return
        found = kernel[grid](*arguments, **constants, num_warps=num_warps, num_stages=num_stages)
        if keeps:
            _compiled[key] = found


_compiled: dict[tuple, Any] = {}
"""Compiled kernels of earlier launches, by everything that `triton.jit` would look at.

It binds arguments, renders them as text and checks globals, which takes several times as long as the launch itself. A
forward pass would repeat this for every layer. The table is not used on ROCm, where Triton also looks at how much
memory is behind a pointer.
"""


def _specialization(argument: Any) -> Any:
    """The property of this argument that Triton specializes a kernel's code on."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, int):
        return argument == 1, argument % 16 == 0, argument.bit_length() < 32
    return type(argument)


def _current(device: torch.device) -> contextlib.AbstractContextManager:
    """Makes a GPU the current one, at no cost if it already is."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)
