"""`revit-fast doctor`: what is fast on this machine and what is not, why, and what mends it."""

from __future__ import annotations

import argparse
import json
import os
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Literal

import torch

from revit_fast.environment import attempt, cpu_name, cpu_quota, huge_pages, usable_cpus
from revit_fast.io import memory
from revit_fast.io.jpeg import matching_decoder
from revit_fast.ops import _backends, _library
from revit_fast.ops.linear import cpu_integer_depths, cpu_multiplies_bf16, cpu_untried


@dataclass(frozen=True)
class Finding:
    """What is known of one part.

    Attributes:
        part: its name.
        state: "good"; "slow", which `fix` mends; or "limit", which this machine or installation cannot do better.
        text: what was found, and what it means.
        fix: what to do; empty unless `state` is "slow".
    """

    part: str
    state: Literal["good", "slow", "limit"]
    text: str
    fix: str = ""


def findings() -> Iterator[Finding]:
    """Every part of the installation and the machine that decides about speed."""
    yield _extension()
    if _library.HAS_EXTENSION:
        yield _kernels()
        yield from _precisions()
    yield from _processors()
    yield _malloc()
    yield _huge_pages()
    yield _jpeg()
    yield _gpu()


def _extension() -> Finding:
    if _library.HAS_EXTENSION:
        return Finding("extension", "good", "the C++ kernels are built and loaded")
    text = "CPU operators run a plain PyTorch reference, many times slower"
    if os.environ.get("REVIT_FAST_NO_EXTENSION") == "1":
        return Finding("extension", "slow", f"{text}: REVIT_FAST_NO_EXTENSION=1 leaves the C++ kernels out", "unset it")
    return Finding("extension", "slow", f"{text}: the C++ kernels are not built", _library.HOW_TO_BUILD)


def _kernels() -> Finding:
    isa, best = _library.cpu_isa(), _library.cpu_isas()[0]
    if isa != best:
        text = f"kernels for {isa} are forced by REVIT_FAST_ISA; this processor has {best}"
        return Finding("kernels", "slow", text, "unset REVIT_FAST_ISA")
    if isa == "baseline":
        text = f"{cpu_name()} gets the portable kernels: those with tuning need an x86-64 processor with AVX2 and FMA"
        return Finding("kernels", "limit", text)
    return Finding("kernels", "good", f"those for {isa}, the best that {cpu_name()} has")


def _precisions() -> Iterator[Finding]:
    multiplied = {"bfloat16": cpu_multiplies_bf16(), "int8": cpu_integer_depths() == 4}
    needs = {"bfloat16": "AVX512_BF16 or AMX", "int8": "AVX-512 VNNI, AVX-VNNI or AMX"}
    effect = {
        "bfloat16": "weights take half the memory, but float32 is as fast",
        "int8": "products take half the rate that they have there",
    }
    for dtype, native in multiplied.items():
        if not native:
            yield Finding(dtype, "limit", f"no instruction of its own ({needs[dtype]}): {effect[dtype]}")
        elif cpu_untried(getattr(torch, dtype)):
            yield Finding(dtype, "good", "has instructions of its own; these kernels were only tested in emulation")
        else:
            yield Finding(dtype, "good", f"has instructions of its own: optimize(model, dtype=torch.{dtype})")


def _processors() -> Iterator[Finding]:
    threads, usable, present, quota = torch.get_num_threads(), usable_cpus(), os.cpu_count() or 1, attempt(cpu_quota)
    if usable < present:
        text = f"this process may use {usable} of {present} CPUs"
        yield Finding("affinity", "slow", text, "start it without taskset or numactl, or with more of a job's CPUs")
    granted = usable if quota is None else min(usable, max(1, int(quota)))
    if threads > granted:
        limit = f"{usable} usable CPUs" if granted == usable else f"a control group's quota of {quota:g} CPUs"
        text = f"{threads} threads share {limit} and wait for each other"
        fix = f"set OMP_NUM_THREADS={granted}, or call torch.set_num_threads({granted})"
        yield Finding("threads", "slow", text, fix)
    elif threads == 1 < granted:
        text = f"one thread, though {granted} CPUs are usable"
        yield Finding("threads", "slow", text, "unset OMP_NUM_THREADS, or call torch.set_num_threads")
    else:
        yield Finding("threads", "good", f"{threads} on {granted} usable CPUs")


def _malloc() -> Finding:
    if memory.CHOICE == "default":
        text = "freed pages go back to the system, and each call faults them in again"
        return Finding("malloc", "slow", text, "unset REVIT_FAST_MALLOC")
    return Finding("malloc", "good" if memory.controls_allocator() else "limit", memory.allocator_state())


def _huge_pages() -> Finding:
    choice = attempt(huge_pages)
    if choice == "never":
        text = "off: weights and activations lie on pages of 4 KiB, which cost up to 15 % of the time"
        fix = "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled"
        return Finding("huge pages", "slow", text, fix)
    if choice is None:
        return Finding("huge pages", "limit", "this system does not say whether it has them")
    return Finding("huge pages", "good", f"on ({choice})")


def _jpeg() -> Finding:
    if attempt(matching_decoder):
        return Finding("JPEG", "good", "decoded by simplejpeg, to Pillow's pixels")
    text = "decoded by Pillow: simplejpeg, which takes 0.7 of its time, is missing or gives other pixels here"
    return Finding("JPEG", "slow", text, 'pip install "revit-fast[jpeg]"')


def _gpu() -> Finding:
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        return Finding("GPU", "limit", "none that PyTorch sees" if built else "this PyTorch is built for CPUs alone")
    try:
        _backends.require_triton()
    except ImportError as error:
        oldest = ".".join(map(str, _backends.OLDEST_TRITON))
        return Finding("GPU", "slow", str(error), f'pip install "triton>={oldest}"')
    from revit_fast.kernels.launch import target_of

    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    try:
        targets = ", ".join(sorted({target_of(torch.device("cuda", i)).name for i in range(len(names))}))
    except RuntimeError as error:
        return Finding("GPU", "limit", str(error))
    return Finding("GPU", "good", f"{', '.join(names)}: Triton kernels with the choices for {targets}")


def run(args: argparse.Namespace) -> int:
    """Runs `revit-fast doctor`; returns 1 if something is slow that can be mended."""
    found = list(findings())
    if args.json:
        print(json.dumps([asdict(finding) for finding in found], indent=2))
    else:
        for finding in found:
            lines = textwrap.wrap(finding.text, 100)
            if finding.fix:
                lines += textwrap.wrap(f"to mend it: {finding.fix}", 100, break_on_hyphens=False)
            print(f"{finding.state:<6}{finding.part:<12}" + f"\n{'':<18}".join(lines))
    return int(any(finding.state == "slow" for finding in found))
