"""The training loop of a ReViT at all its lengths, which can be interrupted at any moment."""

from __future__ import annotations

import copy
import hashlib
import itertools
import math
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from revit_fast.io.atomic import make_folder
from revit_fast.io.memory import keep_freed_pages
from revit_fast.io.names import on_one_line, say
from revit_fast.models.vit import ReViT
from revit_fast.train.accuracy import Accuracy, accuracy_on
from revit_fast.train.checkpoint import load_state, save_state, save_weights
from revit_fast.train.checks import updates_per_epoch
from revit_fast.train.config import TrainConfig, absolute_paths
from revit_fast.train.data import ImageSet
from revit_fast.train.distributed import World
from revit_fast.train.loader import Batch, TrainLoader
from revit_fast.train.log import RunLog
from revit_fast.train.losses import length_loss, tlsd_loss
from revit_fast.train.meter import Meter
from revit_fast.train.modes import check_trainable, in_training_modes
from revit_fast.train.optimizers import create_optimizer
from revit_fast.train.progress import RunProgress
from revit_fast.train.stopping import NotFiniteError, Stop, stoppable

CACHED_ACTIVATIONS, FEWEST_ROWS = 2**20, 2048
"""Largest number of values in one activation of a pack on a CPU, and number of rows that a pack may have in any case.

Measured with the step of `bench.train_step` on 128 images at 64 channels: one pack with 2.9 million values leaves the
last-level cache between one layer and the next, and takes 1.2 times as long as packs with 0.5 to 1.5 million values.
Packs of 700 rows take 1.05 times as long; packs of 1,400 rows take the same time.
"""

CHECKPOINT, FINAL, BEST, CONFIG = "checkpoint.safetensors", "model.safetensors", "best.safetensors", "train.json"


class Trainer:
    """Trains a model. `fit` runs to the end, from the checkpoint if `resume` has loaded it.

    Files in `folder`: `train.json` (the configuration), `checkpoint.safetensors` (all of the run's state),
    `steps.csv`, `epochs.csv`, `tensorboard/`, `best.safetensors` (the weights of the best epoch at the longest length),
    and at the end `model.safetensors`. With a moving average, these are the averaged weights.

    Random numbers depend only on the seed and the number of the update. An interrupted and resumed run therefore gives
    bit for bit the results of an uninterrupted one (on a CPU, with as many threads and processes).

    Args:
        model: the model, which is trained in place.
        images: images to train on.
        config: choices of the run.
        held_out: images to evaluate on after every epoch; None: no evaluation.
        folder: folder for the files; None: no files are written.
        world: processes of the run; default: those that torchrun started.
        terminal: where progress is printed; None: nowhere.
    """

    @in_training_modes
    def __init__(
        self,
        model: ReViT,
        images: ImageSet,
        config: TrainConfig,
        *,
        held_out: ImageSet | None = None,
        folder: Path | None = None,
        world: World | None = None,
        terminal: TextIO | None = None,
    ) -> None:
        from timm.scheduler import create_scheduler_v2
        from timm.utils import ModelEmaV3

        check_trainable(model, "model")
        if model.grids != config.grids:
            raise ValueError(f"config: its grids are {config.grids}, the model's {model.grids}")
        self.config, self.folder, self.held_out = config, folder, held_out
        self.world = world or World(config.mode, len(model.grids))
        self.model = model.to(self.world.device)
        model.set_grad_checkpointing(config.grad_checkpointing)
        self.updates_per_epoch = updates_per_epoch(config, len(images), self.world.n_groups)
        settings = config.input_settings(model)
        self._eval_settings = {
            "grids": model.grids,
            "patch_size": model.patch_size,
            "workers": config.workers,
            **settings,
        }
        self.loader = TrainLoader(
            images,
            grids=model.grids,
            patch_size=model.patch_size,
            batch_size=config.batch_size,
            augment=config.augmentation(),
            mean=settings["mean"],
            std=settings["std"],
            interpolation=settings["interpolation"],
            seed=config.seed,
            workers=config.workers,
            rank=self.world.group,
            world_size=self.world.n_groups,
            views=self.world.views,
            max_unreadable=config.max_unreadable,
        )
        self.n_updates = self.updates_per_epoch * config.epochs
        images_per_update = config.batch_size * config.grad_accum_steps * self.world.n_groups
        self.optimizer = create_optimizer(
            model, config.opt, config.learning_rate(images_per_update), config.weight_decay, config.layer_decay
        )
        self.schedule, _ = create_scheduler_v2(
            self.optimizer,
            config.sched,
            num_epochs=config.epochs,
            warmup_epochs=min(config.warmup_epochs, config.epochs - 1),
            warmup_lr=config.warmup_lr,
            min_lr=config.min_lr,
            step_on_epochs=False,
            updates_per_epoch=self.updates_per_epoch,
        )
        self.average = ModelEmaV3(model, config.ema_decay, use_warmup=True) if config.ema_decay else None
        self.step = 0  # finished updates
        self.epoch = 0  # finished epochs, including their evaluation
        self.best = -math.inf
        self._meter = Meter(len(model.grids))
        on_cpu = self.world.device.type == "cpu"
        self._micro_batch = config.micro_batch or (cached_images(model) if on_cpu else config.batch_size)
        self._wrapped = self.world.wrap(model)
        self._terminal = terminal if self.world.is_first else None
        self._stop = Stop()
        self._progress = RunProgress(config, RunLog(None), 0, self.n_updates, self.world.n_groups)  # silent

    @in_training_modes
    def fit(self) -> Accuracy | None:
        """Trains to the last update and returns the accuracy after it.

        The process keeps freed memory from this call on, see `revit_fast.io.memory.keep_freed_pages`.

        Raises:
            NotFiniteError: if the loss is NaN or infinite.
            Interrupted: after SIGINT or SIGTERM (with one process). The unfinished update is thrown away, and the state
                after the last finished one is written first.
            KeyboardInterrupt: after a second SIGINT, at once; the last checkpoint is kept.
            UnreadableError: if too many images are unreadable.
            OSError: if a file cannot be written.
        """
        keep_freed_pages()
        folder = self.folder if self.world.is_first else None
        if folder is not None:
            make_folder(folder)
            self.config.save(folder / CONFIG)
        self.log = RunLog(folder, self.step, self.epoch * self.updates_per_epoch, self._terminal)
        self._progress = RunProgress(self.config, self.log, self.step, self.n_updates, self.world.n_groups)
        try:
            # Several processes could stop at different updates, so they keep the default handling of signals.
            several = self.world.size > 1
            with nullcontext(Stop()) if several else stoppable(self.log.say, self._where) as self._stop:
                return self._to_the_end(folder)
        finally:
            self.log.close()

    def _to_the_end(self, folder: Path | None) -> Accuracy | None:
        """Trains all epochs, and writes a checkpoint if it is asked to stop before their end."""
        accuracy = None
        try:
            while self.epoch < self.config.epochs:
                accuracy = self._epoch()
            if accuracy is None and self.held_out is not None:
                accuracy = self.evaluate()
            if folder is not None:
                save_weights(folder / FINAL, self.weights(), self.loader.images.classes)
            self._stop.check()
        except KeyboardInterrupt:
            if self._stop.asked:
                self.save_checkpoint()
            raise
        return accuracy

    def _where(self) -> str:
        return f" after update {self.step} of {self.n_updates}"

    def _epoch(self) -> Accuracy | None:
        """Trains the rest of the current epoch, evaluates, and writes a checkpoint."""
        epoch, done = self.epoch, self.step - self.epoch * self.updates_per_epoch
        accumulate = self.config.grad_accum_steps
        with closing(self.loader.epoch(epoch, done * accumulate)) as batches:
            for _ in range(done, self.updates_per_epoch):
                with self._stop.at_once():
                    some = list(itertools.islice(batches, accumulate))
                self._update(some)
                if self.step % self.config.log_steps == 0:
                    self._report(epoch)
                if self.config.checkpoint_steps and self.step % self.config.checkpoint_steps == 0:
                    self.save_checkpoint()
        if self.unreadable:
            name, reason = next(iter(self.unreadable.items()))
            n = len(self.unreadable)
            self.log.say(f"{n} training images could not be read so far, first {on_one_line(name)}: {reason}")
        accuracy = self._end_epoch(epoch) if self.held_out is not None else None
        self.epoch += 1
        self.save_checkpoint()
        return accuracy

    def _update(self, batches: list[Batch]) -> None:
        """Makes one step of the optimizer with the mean gradient over the batches.

        If the run is asked to stop before the step, everything that a checkpoint holds is as before.
        """
        buffers, meter = [(buffer, buffer.clone()) for buffer in self.model.buffers()], copy.deepcopy(self._meter)
        try:
            with self._stop.at_once():
                norm = self._gradient(batches)
        except KeyboardInterrupt:
            for buffer, value in buffers:  # statistics of batch norms
                buffer.copy_(value)
            self._meter = meter
            raise
        self.optimizer.step()
        self.step += 1
        if self.average is not None:
            self.average.update(self.model, step=self.step)
        self._meter.gradient(norm)
        self._progress.passed(self.step, self.epoch, 0, self._meter)

    def _gradient(self, batches: list[Batch]) -> Tensor:
        """Sets the gradient, pack by pack, and returns its norm."""
        self.model.train()
        torch.manual_seed(_seed_of(self.config.seed, self.step, self.world.rank))
        if self.schedule is not None:  # it is None for "none"
            self.schedule.step_update(self.step)
        self.model.zero_grad()
        parts = [(part, len(batch.target)) for batch in batches for part in batch.parts(self._micro_batch)]
        n_passed = 0
        for i, (part, n_images) in enumerate(parts):
            self._stop.check()  # where a signal's exception was lost, as in a destructor
            last = i + 1 == len(parts)
            with nullcontext() if last else self.world.without_sync(self._wrapped):
                loss, _ = self.forward(part)
                if not torch.isfinite(loss.detach()).item():
                    raise NotFiniteError(self._not_finite(loss, part))
                (loss * (len(part.target) / n_images / len(batches))).backward()
            n_passed += len(part.target)
            if not last:
                self._progress.passed(self.step, self.epoch, n_passed, self._meter)
        limit = math.inf if self.config.clip_grad is None else self.config.clip_grad
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        if not torch.isfinite(norm).item():
            raise NotFiniteError(self._not_finite(norm, batches[-1], "norm of the gradient"))
        return norm

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss and the logits `[n_views, B, K]` of a batch.

        The gradient of this loss, averaged over processes, is the gradient of the total loss.
        """
        config, device = self.config, self.world.device
        autocast = torch.autocast(device.type, torch.bfloat16) if config.amp == "bfloat16" else nullcontext()
        target = batch.target.to(device)
        with autocast:
            logits = self._wrapped(batch.images.to(device))
        logits = logits.view(len(self.world.views), len(target), -1)
        if self.world.group_size == 1:
            loss, losses = tlsd_loss(logits, target, config.distill_weight, config.temperature)
        else:
            teacher = self.world.teacher(logits[0]) if config.distill_weight > 0 else None
            loss = length_loss(logits[0], target, teacher, config.distill_weight, config.temperature)
            losses = loss.detach().unsqueeze(0)
        self._meter.batch(self.world.views, losses, logits, target)
        return loss, logits

    def _not_finite(self, value: Tensor, batch: Batch, what: str = "loss") -> str:
        names = [on_one_line(self.loader.images.name(int(i))) for i in batch.index[:3]]
        there = self.folder is not None and (self.folder / CHECKPOINT).exists()
        kept = f"the last checkpoint is in {self.folder}" if there else "there is no checkpoint yet"
        return (
            f"{what} is {value.item()} at update {self.step + 1}, in a batch that begins with {', '.join(names)}; "
            f"{kept}. Lower lr (now {self._lr():.2g}) or set clip_grad in another run, or look at these images"
        )

    def _lr(self) -> float:
        """The current learning rate; with layer decay it is that of the head."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    def _report(self, epoch: int) -> None:
        """Writes a line of the log with the means since the last line."""
        means, rate = self._meter.means(self.world), self._meter.images_per_s() * self.world.n_groups
        self._meter = Meter(len(self.config.grids))
        if self.world.is_first:
            self._progress.updated(self.step, epoch, self._lr(), means, rate)

    def _end_epoch(self, epoch: int) -> Accuracy:
        accuracy = self.evaluate()
        if self.world.is_first:
            n_unreadable = len(self.held_out) - accuracy.n_images
            self._progress.evaluated(self.step, epoch, *accuracy, n_unreadable)
        if accuracy.accuracy[0] > self.best:
            self.best = accuracy.accuracy[0]
            if self.folder is not None and self.world.is_first:
                save_weights(self.folder / BEST, self.weights(), self.loader.images.classes)
        return accuracy

    def evaluate(self) -> Accuracy:
        """Accuracy at every length on the held-out images, which are divided among the processes."""
        options = {"max_unreadable": self.config.max_unreadable, "settings": self._eval_settings}
        with self._stop.at_once():
            return accuracy_on(self.held_out, self.plain(), self.world, partial(say, self._terminal), **options)

    @property
    def unreadable(self) -> dict[str, str]:
        """Reason for every training image that this process could not read so far, by name."""
        return self.loader.unreadable

    def plain(self) -> ReViT:
        """A copy of the model for deployment: in evaluation mode, with the averaged weights if there are any."""
        return copy.deepcopy(self.average.module if self.average is not None else self.model).eval()

    def weights(self) -> dict[str, Tensor]:
        """The state dict of `plain`."""
        return self.plain().state_dict()

    def state(self) -> dict[str, Any]:
        """Everything that is needed to resume the run."""
        return {
            "config": self.config.as_dict(),
            "data": self._data(),
            "step": self.step,
            "epoch": self.epoch,
            "best": self.best if math.isfinite(self.best) else None,
            "unreadable": self.unreadable,
            "model": self.model.state_dict(),
            "average": self.average.module.state_dict() if self.average is not None else None,
            "optimizer": self.optimizer.state_dict()["state"],
            # Some optimizers (LAMB, Adan) count their steps in their groups.
            "groups": [
                {name: value for name, value in group.items() if isinstance(value, (int, float, Tensor))}
                for group in self.optimizer.param_groups
            ],
            "meter": self._meter.state(self.world),
            "world_size": self.world.size,
        }

    def save_checkpoint(self) -> None:
        """Writes the run's state, all or nothing."""
        state = self.state()  # every process takes part
        if self.folder is not None and self.world.is_first:
            save_state(self.folder / CHECKPOINT, state)

    def resume(self) -> None:
        """Resumes the run whose checkpoint is in the folder.

        Raises:
            FileNotFoundError: if there is no checkpoint.
            ValueError: if the checkpoint belongs to a run with other choices, images or number of processes.
        """
        state = load_state(self.folder / CHECKPOINT)
        then, now = absolute_paths(state["config"]), absolute_paths(self.config.as_dict())
        changed = sorted(name for name in now if now[name] != then.get(name) and name not in MAY_CHANGE)
        if state["world_size"] != self.world.size:
            raise ValueError(
                f"resume: the run had {state['world_size']} processes, now there are {self.world.size}; "
                f"its batches would be other ones; start {state['world_size']}"
            )
        if changed:
            was = ", ".join(f"{name} = {then.get(name)!r}" for name in changed)
            raise ValueError(f"resume: the run in {self.folder} has {was}; resume it with the same, or start another")
        if state["data"] != self._data():
            counts = [f"{data['images']} of {data['classes']} classes" for data in (state["data"], self._data())]
            raise ValueError(
                f"resume: the images are not those that the run in {self.folder} began with: then {counts[0]}, now "
                f"{counts[1]}; bring them back, or start another run"
            )
        self.step, self.epoch = state["step"], state["epoch"]
        self.best = -math.inf if state["best"] is None else state["best"]
        self.unreadable.update(state["unreadable"])
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.module.load_state_dict(state["average"])
        self._restore_optimizer(state["optimizer"], state["groups"])
        self._meter = Meter.restored(state["meter"], self.world)

    def _data(self) -> dict[str, Any]:
        """Identifies the training images of the run; other images would give other batches."""
        images = self.loader.images
        digest = hashlib.blake2b(repr(images.classes).encode() + images.labels.tobytes(), digest_size=8).hexdigest()
        return {"images": len(images), "classes": len(images.classes), "labels": digest}

    def _restore_optimizer(self, state: dict[int, dict[str, Any]], groups: list[dict[str, Any]]) -> None:
        parameters = list(itertools.chain.from_iterable(group["params"] for group in self.optimizer.param_groups))
        for index, values in state.items():
            for name, value in values.items():
                if isinstance(value, Tensor) and value.shape == parameters[index].shape:
                    # Memory layout as the optimizer makes it: fused updates need the parameter's layout.
                    values[name] = torch.empty_like(parameters[index], dtype=value.dtype).copy_(value)
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state})
        for group, values in zip(self.optimizer.param_groups, groups, strict=True):
            group.update(values)


MAY_CHANGE = {"workers", "checkpoint_steps", "log_steps", "max_unreadable"}
"""Choices that may change when a run is resumed, because they do not change its results."""


def cached_images(model: ReViT) -> int:
    """Number of images per pack, each at all lengths, with which a CPU runs the model fastest."""
    rows = sum(grid * grid + model.num_prefix_tokens for grid in model.grids)
    return max(1, max(CACHED_ACTIVATIONS // model.embed_dim, FEWEST_ROWS) // rows)


def _seed_of(*numbers: int) -> int:
    """A different seed for every tuple of numbers."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
