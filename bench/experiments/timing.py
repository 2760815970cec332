"""Time and memory of training updates, in one process and in several."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from revit_fast.train.config import TrainConfig
from revit_fast.train.data import ArrayImages, ImageSet
from revit_fast.train.distributed import World
from revit_fast.train.loader import Batch, TrainLoader
from revit_fast.train.losses import length_loss
from revit_fast.train.run import build_model
from revit_fast.train.trainer import Trainer

PROBE_IMAGES, PROBE_CLASSES, PROBE_PX = 512, 10, 28
CLEAR_PEAK = "5"
"""Value that is written to clear_refs so that Linux resets a process's peak of memory."""


def stepper(config: TrainConfig, images: ImageSet) -> Callable[[], None]:
    """A function that makes the next update of a separate run, including the loading of images."""
    torch.manual_seed(config.seed)
    model, _ = build_model(config, len(images.classes))
    trainer = Trainer(model, images, config, terminal=None)
    batches = endless(trainer.loader)
    return lambda: trainer._update([next(batches)])


def endless(loader: TrainLoader) -> Iterator[Batch]:
    """The batches of one epoch after another, without end."""
    epoch = 0
    while True:
        yield from loader.epoch(epoch)
        epoch += 1


def probe_images() -> ArrayImages:
    """Images of noise: time and memory do not depend on the pixels."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (PROBE_IMAGES, PROBE_PX, PROBE_PX), dtype=np.uint8)
    return ArrayImages(pixels, np.arange(PROBE_IMAGES) % PROBE_CLASSES, [str(c) for c in range(PROBE_CLASSES)])


def in_process(kind: str, config: TrainConfig, n_processes: int = 1, **options: Any) -> dict[str, Any]:
    """Runs `MEASURES[kind](config, **options)` in new processes; returns the result of the first of them.

    Raises:
        RuntimeError: if a process fails; the message has the end of its output.
    """
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n_processes}"] if n_processes > 1 else []
    )
    task = json.dumps({"kind": kind, "config": config.as_dict(), "options": options})
    package = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([package, os.environ.get("PYTHONPATH", "")])}
    if n_processes > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // n_processes)))
    command = [sys.executable, *launcher, "-m", __name__, task]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise RuntimeError(f"measuring {kind} failed with code {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(lines[-1])


def memory(config: TrainConfig, steps: int) -> dict[str, Any]:
    """Memory that training takes beyond the model and the libraries: `peak_mib`, None if Linux does not report it."""
    step = stepper(config, probe_images())
    before = _status_kib("VmRSS")
    try:
        Path("/proc/self/clear_refs").write_text(CLEAR_PEAK, encoding="ascii")
    except OSError:
        return {"peak_mib": None}
    for _ in range(steps):
        step()
    peak = _status_kib("VmHWM")
    return {"peak_mib": None if peak is None or before is None else (peak - before) / 1024}


def _status_kib(name: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith(name + ":")), None)


def communication(config: TrainConfig, steps: int) -> dict[str, Any]:
    """Seconds of updates in length-parallel mode, with and without its two kinds of communication.

    The processes start every update together; an update takes as long as the slowest process. Without communication a
    process keeps its own gradient and uses its own logits as the teacher's: the work is the same, the result is not.
    The kinds take turns in changing order.

    Returns:
        `seconds`: for every kind, the slowest process's seconds in each update; `own`: seconds of every process without
        communication, median over updates.
    """
    world = World("length-parallel", len(config.grids))
    try:
        torch.manual_seed(config.seed)
        images = probe_images()
        model, _ = build_model(config, PROBE_CLASSES)
        trainer = Trainer(model, images, config, world=world, terminal=None)
        batches = endless(trainer.loader)
        kinds = {"both": (True, True), "gradients": (True, False), "logits": (False, True), "none": (False, False)}
        slowest: dict[str, list[float]] = {kind: [] for kind in kinds}
        own: list[list[float]] = []
        rng = np.random.default_rng(0)  # the same order in all processes
        for n in range(steps + 1):
            for kind in rng.permutation(list(kinds)):
                seconds = _update_seconds(trainer, next(batches), *kinds[kind])
                found = [torch.zeros(1, dtype=torch.float64) for _ in range(world.size)]
                dist.all_gather(found, torch.tensor([seconds], dtype=torch.float64))
                every = [value.item() for value in found]
                if n:  # the first round warms caches and connections
                    slowest[kind].append(max(every))
                    own += [every] if kind == "none" else []
        threads, first = torch.get_num_threads(), world.is_first
        result = {"seconds": slowest, "own": np.median(own, axis=0).tolist(), "threads": threads}
        return result if first else {}
    finally:
        world.close()


def _update_seconds(trainer: Trainer, batch: Batch, gradients: bool, logits: bool) -> float:
    """Time of forward and backward pass of this process; the optimizer's step is the same for all kinds."""
    world, config = trainer.world, trainer.config
    trainer.optimizer.zero_grad()
    trainer.model.train()
    world.wait()
    begin = time.perf_counter()
    with nullcontext() if gradients else world.without_sync(trainer._wrapped):
        z = trainer._wrapped(batch.images)
        teacher = world.teacher(z) if logits else None if world.views[0] == 0 else z.detach()
        length_loss(z, batch.target, teacher, config.distill_weight, config.temperature).backward()
    return time.perf_counter() - begin


MEASURES: Mapping[str, Callable[..., dict[str, Any]]] = {"memory": memory, "communication": communication}


def main() -> None:
    """Does the task in the first argument and prints the result."""
    task = json.loads(sys.argv[1])
    found = MEASURES[task["kind"]](TrainConfig.from_dict(task["config"]), **task["options"])
    if found:
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
