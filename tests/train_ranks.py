"""What each process of the tests of distributed training runs: `train_ranks.py TASK FOLDER SETTINGS` under torchrun.

`train_ranks.py --forked JOBS` runs many such jobs as processes that it forks: they share one import of PyTorch, which
takes longer than the job.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
from pathlib import Path

import torch
from train_helpers import noise_images, tiny_config

from revit_fast.train.config import TrainConfig
from revit_fast.train.distributed import World
from revit_fast.train.run import build_model
from revit_fast.train.trainer import Trainer


def trainer_of(config: TrainConfig, world: World, dtype: torch.dtype = torch.float32, folder=None) -> Trainer:
    torch.manual_seed(config.seed)
    model, _ = build_model(config, 3)
    with torch.no_grad():  # lengths that differ, as after some training
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    held_out = noise_images(24, seed=1)
    return Trainer(
        model.to(dtype), noise_images(), config, held_out=held_out, folder=folder, world=world, terminal=None
    )


def gradients(config: TrainConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The gradient of the first batch, averaged over all processes."""
    world = World(config.mode, len(config.grids))
    trainer = trainer_of(config, world, dtype)
    batch = next(trainer.loader.epoch(0))
    batch = batch._replace(images=batch.images.with_data(batch.images.data.to(dtype)))
    trainer._update([batch])  # the optimizer leaves the gradients where they are
    grads = {name: parameter.grad.clone() for name, parameter in trainer.model.named_parameters()}
    world.close()
    return grads


def main(task: str, folder: Path, settings: str) -> None:
    options = json.loads(settings)
    dtype = getattr(torch, options.pop("dtype", "float32"))
    config = tiny_config(**options)
    rank = int(os.environ["RANK"])
    if task == "gradients":
        grads = gradients(config, dtype)
        torch.save(grads, folder / f"gradients_{rank}.pt")
        return
    world = World(config.mode, len(config.grids), timeout_s=60)
    trainer = trainer_of(config, world, dtype, folder)
    if task == "resume":
        trainer.resume()
    if task == "die":
        update = trainer._update

        def die_at_the_third(batches):
            if trainer.step == 2 and rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            update(batches)

        trainer._update = die_at_the_third
    accuracy = trainer.fit()
    (folder / f"accuracy_{rank}.json").write_text(json.dumps(accuracy._asdict()))
    world.close()


def process(task: str, folder: Path, settings: str) -> None:
    """A process under torchrun, to its end."""
    main(task, folder, settings)
    # The threads of gloo outlive the group, because DistributedDataParallel keeps a reference to it. If one of them
    # needs the interpreter while that ends, PyTorch aborts the process (pytorch/pytorch#190489). All results are
    # written by now.
    os._exit(0)


def forked(n: int, task: str, folder: str, settings: dict) -> list[int | None]:
    """Exit codes of n processes with the environment that torchrun gives; None of one that does not end."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {"WORLD_SIZE": str(n), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}

    def ranked(rank: int) -> None:
        os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
        process(task, Path(folder), json.dumps(settings))

    processes = [multiprocessing.get_context("fork").Process(target=ranked, args=(rank,)) for rank in range(n)]
    for each in processes:
        each.start()
    for each in processes:
        each.join(120)
    codes = [each.exitcode for each in processes]
    for each in processes:
        each.kill()
    return codes


if __name__ == "__main__":
    if sys.argv[1] == "--forked":
        gradients(tiny_config(), torch.float32)  # imports all that a job needs
        print(json.dumps([forked(*job) for job in json.loads(sys.argv[2])]))
    else:
        process(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
