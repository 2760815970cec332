"""What a training run says of itself: rows and lines of updates and evaluations, and lines by seconds in between."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from revit_fast.train.config import TrainConfig
from revit_fast.train.log import EPOCHS, STEPS, RunLog, percentages
from revit_fast.train.meter import Means, Meter
from revit_fast.train.pace import EVERY_S, ahead

TIMED_UPDATES, TIMED_S = 2, 20.0
"""Updates, or seconds, that are timed before a run says what is ahead."""


class RunProgress:
    """Reports of a run to its log.

    Args:
        config: choices of the run.
        log: the log.
        step: update that the run starts from.
        n_updates: number of updates of the whole run.
        n_groups: number of groups of processes, each of which has images of its own.
        clock: function that gives the time in seconds.
    """

    def __init__(
        self,
        config: TrainConfig,
        log: RunLog,
        step: int,
        n_updates: int,
        n_groups: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config, self._log, self._n_updates, self._n_groups, self._clock = config, log, n_updates, n_groups, clock
        self._first_step, self._begin, self._said, self._is_timed = step, clock(), clock(), False
        self._per_update = config.batch_size * config.grad_accum_steps  # images of one group

    def updated(self, step: int, epoch: int, lr: float, means: Means, rate: float) -> None:
        """Writes the row and the line of an update.

        Args:
            step: number of finished updates.
            epoch: number of finished epochs.
            lr: learning rate.
            means: means since the last row.
            rate: images per second of all processes since then.
        """
        row = {"step": step, "epoch": epoch + 1, "lr": lr, "loss": means.loss.mean().item()}
        for grid, loss, accuracy in zip(self._config.grids, means.loss.tolist(), means.accuracy.tolist(), strict=True):
            row |= {f"loss_{grid}": loss, f"accuracy_{grid}": accuracy}
        self._log.add(STEPS, row | {"gradient_norm": means.gradient_norm, "images_per_s": rate})
        self._said = self._clock()
        left = (self._n_updates - step) * self._per_update * self._n_groups
        self._log.say(
            f"{self._place(step, epoch)}  loss {row['loss']:.4f}  accuracy at {self._grids()}: "
            f"{percentages(means.accuracy.tolist())}  lr {lr:.2e}  {rate:.0f} images/s  {ahead(left / rate)}"
        )

    def passed(self, step: int, epoch: int, n_images: int, meter: Meter) -> None:
        """Called after every pack of images: says what is ahead once that is known, and by seconds where the run is.

        Args:
            step: number of finished updates.
            epoch: number of finished epochs.
            n_images: images of the unfinished update that this process has passed through the model.
            meter: sums since the last row.
        """
        now = self._clock()
        done = step - self._first_step + n_images / self._per_update
        left_s = (now - self._begin) / max(done, 1e-9) * (self._n_updates - step - n_images / self._per_update)
        if not self._is_timed and (step - self._first_step >= TIMED_UPDATES or (done and now - self._begin >= TIMED_S)):
            self._is_timed = True
            if left_s >= EVERY_S:
                self._said = now
                self._log.say(
                    f"ahead: {self._n_updates - step} updates of about {(now - self._begin) / done:.2g} s, "
                    f"{ahead(left_s)}, evaluations not counted"
                )
        elif now - self._said >= EVERY_S:
            self._said = now
            part = f" and {n_images} of {self._per_update} images" if n_images else ""
            self._log.say(
                f"{self._place(step, epoch)}{part}  loss {meter.loss():.4f}  "
                f"{meter.images_per_s() * self._n_groups:.2g} images/s  {ahead(left_s)}"
            )

    def evaluated(
        self, step: int, epoch: int, accuracy: Sequence[float], loss: Sequence[float], n_images: int, n_unreadable: int
    ) -> None:
        """Writes the row and the line of an epoch's evaluation."""
        row = {"step": step, "epoch": epoch + 1}
        for grid, share, value in zip(self._config.grids, accuracy, loss, strict=True):
            row |= {f"accuracy_{grid}": share, f"loss_{grid}": value}
        self._log.add(EPOCHS, row)
        self._log.say(
            f"epoch {epoch + 1}/{self._config.epochs}  held out at {self._grids()}: {percentages(accuracy)} of "
            f"{n_images} images" + (f", {n_unreadable} more could not be read" if n_unreadable else "")
        )

    def _place(self, step: int, epoch: int) -> str:
        return f"epoch {epoch + 1}/{self._config.epochs}  update {step}/{self._n_updates}"

    def _grids(self) -> str:
        return "/".join(map(str, self._config.grids))
