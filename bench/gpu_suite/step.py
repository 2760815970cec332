"""The process of one step: prepares the device, calls the step's function and keeps what it found."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs

from bench.files import write_file
from bench.report import header_line, machine_header
from bench.turns import CallClock, DeviceClock, WallClock

MEANINGLESS = (
    "THESE TIMES MEAN NOTHING: Triton's interpreter on a CPU, tiny sizes. Only that the program runs is shown."
)


def serve_cpu_tensors() -> None:
    """Makes the ops launch Triton kernels for CPU tensors, for the rest of this process."""
    from revit_fast.inference import cuda_graphs
    from revit_fast.ops import _triton

    _triton.register("CPU")
    cuda_graphs.BACKENDS["cpu"] = cuda_graphs.DirectCalls


class Context:
    """What a step needs: the device, its clocks, the time that is left, and a file of results.

    Args:
        name: name of the step.
        out: folder of the results.
        device: "cuda" or "interpreter".
        until: time (of `time.time`) after which the step should begin nothing more. The program's start counts too.
    """

    def __init__(self, name: str, out: Path, device: str, until: float) -> None:
        self.begin = time.monotonic()
        self.until = until
        self.on_gpu = device == "cuda"
        self.device = torch.device("cuda" if self.on_gpu else "cpu")
        self.path = out / f"{name}.json"
        self.content: dict[str, Any] = {"machine": machine_header() | {"triton": triton.__version__, "device": device}}
        if self.on_gpu and torch.cuda.is_available():
            self.content["machine"] |= {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
        self.content |= {"warning": None if self.on_gpu else MEANINGLESS, "complete": False}
        self.say(header_line(self.content["machine"]))
        if not self.on_gpu:
            self.say(MEANINGLESS)
        self.count_compilations()

    def require_device(self) -> None:
        """Sets the kernels up for the device; ends the step with a message if there is none."""
        if not self.on_gpu:
            serve_cpu_tensors()
        elif not torch.cuda.is_available():
            raise SystemExit(
                "no GPU that torch can use. To see the program run without one: "
                "TRITON_INTERPRET=1 python -m bench.gpu_suite --device interpreter --out DIR"
            )

    def clocks(self) -> tuple[WallClock | DeviceClock, WallClock | CallClock]:
        """Clocks of the device's time and of the wall time from a call to its end."""
        return (DeviceClock(), CallClock()) if self.on_gpu else (WallClock(), WallClock())

    def count_compilations(self) -> None:
        """Counts what Triton compiles in this process and what it finds in its cache on disk."""
        found = self.content["compilations"] = {"from_cache": 0, "anew": 0, "kernels_anew": []}

        def listen(*, src, cache_hit: bool, **_: Any) -> None:
            found["from_cache" if cache_hit else "anew"] += 1
            if not cache_hit:
                found["kernels_anew"].append(getattr(src, "name", "?"))

        knobs.compilation.listener = listen

    def say(self, text: str) -> None:
        """Prints a line of progress."""
        print(f"[{time.monotonic() - self.begin:6.1f} s] {text}", flush=True)

    def left_s(self) -> float:
        """Seconds that are left."""
        return self.until - time.time()

    def keep(self, **content: Any) -> None:
        """Writes the results so far."""
        self.content |= content
        write_file(self.path, json.dumps(self.content, indent=1))


def main() -> int:
    """Runs one step; returns 1 if something failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_suite.step")
    parser.add_argument("name")
    parser.add_argument("function", help="module:function")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--until", type=float, required=True)
    options = parser.parse_args()
    context = Context(options.name, options.out, options.device, options.until)
    context.keep()
    module, _, function = options.function.partition(":")
    failures = getattr(importlib.import_module(module), function)(context)
    context.keep(complete=True, failures=failures)
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    return int(bool(failures))


if __name__ == "__main__":
    raise SystemExit(main())
