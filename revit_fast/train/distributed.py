"""The processes of a training run: the work of each process, and their communication."""

from __future__ import annotations

import hashlib
import os
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

TIMEOUT_S = 600
"""Seconds that a process waits for another before it gives up."""


class World:
    """This process and the others that `torchrun` started; or this process alone.

    In packed mode every process has its own images, at all lengths. In length-parallel mode `n_lengths` processes with
    consecutive ranks form a group: they have the same images, each at one length, the first of them at the longest.

    Args:
        mode: "packed" or "length-parallel".
        n_lengths: number of lengths of the model.
        device: "cpu" or "cuda"; each process takes the GPU of its local rank.
        timeout_s: seconds that this process waits for another.

    Raises:
        ValueError: if the processes do not form whole groups, or there is no GPU for this process.
    """

    def __init__(self, mode: str = "packed", n_lengths: int = 1, device: str = "cpu", timeout_s: float = TIMEOUT_S):
        self.size, self.rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        self.group_size = n_lengths if mode == "length-parallel" else 1
        if self.size % self.group_size:
            raise ValueError(
                f"mode: length-parallel needs a multiple of {n_lengths} processes, one for each length, got "
                f"{self.size}; start with torchrun --nproc-per-node={n_lengths}"
            )
        self.device = (
            torch.device(device, int(os.environ.get("LOCAL_RANK", 0))) if device == "cuda" else torch.device(device)
        )
        if self.device.type == "cuda":
            if (self.device.index or 0) >= torch.cuda.device_count():
                raise ValueError(
                    f"device: process {self.rank} needs GPU {self.device.index}, PyTorch sees "
                    f"{torch.cuda.device_count()}; start as many processes as there are GPUs, or train on the CPU"
                )
            torch.cuda.set_device(self.device)
        self._started = self.size > 1 and not dist.is_initialized()
        if self._started:
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
        self.n_groups, self.group = self.size // self.group_size, self.rank // self.group_size
        self.views = [self.rank % self.group_size] if self.group_size > 1 else list(range(n_lengths))
        self._groups = []
        if self.group_size > 1:  # every process must take part in making every group
            first_ranks = range(0, self.size, self.group_size)
            self._groups = [dist.new_group(list(range(r, r + self.group_size))) for r in first_ranks]

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model, wrapped so that the backward pass averages gradients over all processes."""
        if self.size == 1:
            return model
        devices = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices)

    def without_sync(self, model: nn.Module) -> AbstractContextManager:
        """Context in which gradients are not averaged, because another backward pass follows before the update."""
        return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()

    def teacher(self, logits: Tensor) -> Tensor | None:
        """The logits of the longest length, sent by the group's process that has it; None in that process itself."""
        sent = logits.detach().clone()
        dist.broadcast(sent, self.group * self.group_size, self._groups[self.group])
        return None if self.views[0] == 0 else sent

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.size > 1:
            values = values.to(self.device, copy=True)
            dist.all_reduce(values)
        return values

    def check_same(self, what: str, value: object) -> None:
        """Raises the same error in every process unless the value, told by its `repr`, is the same in all of them.

        Args:
            what: name of the value, for the message.
            value: anything with a `repr` that says all.
        """
        digests = torch.zeros(self.size, dtype=torch.int64, device="cpu")
        own = hashlib.blake2b(repr(value).encode("utf-8", "surrogateescape"), digest_size=8).digest()
        digests[self.rank] = int.from_bytes(own, "little", signed=True)
        digests = self.sum(digests).tolist()
        others = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
        if others:
            raise ValueError(
                f"{what}: process {', '.join(map(str, others))} of {self.size} has another one than process 0; start "
                "all processes with the same options and the same images, and give absolute paths"
            )

    def wait(self) -> None:
        """Waits until all processes are here."""
        if self.size > 1:
            dist.barrier()

    def close(self) -> None:
        """Leaves the group of processes that this object joined."""
        if self._started:
            dist.destroy_process_group()
