"""Training runs that experiments share: a finished run is not repeated, an interrupted run is resumed."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from bench.experiments.shared_norms import SharedNormsTrainer, share
from revit_fast.io.atomic import read_json, write_json
from revit_fast.models.vit import ReViT
from revit_fast.models.weights import read_checkpoint
from revit_fast.train.config import TrainConfig
from revit_fast.train.data import ImageSet
from revit_fast.train.log import EPOCHS, STEPS, read_rows
from revit_fast.train.run import build_model
from revit_fast.train.stopping import NotFiniteError
from revit_fast.train.trainer import CHECKPOINT, FINAL, MAY_CHANGE, Trainer

DONE = "done.json"
"""Result of a finished run; it is the last file to be written."""

NORMS = ("tal", "shared")
"""LayerNorms with separate parameters for every length, and LayerNorms with shared parameters."""


@dataclass(frozen=True)
class Run:
    """A finished training run.

    Attributes:
        folder: folder of its files, see `Trainer`.
        config: configuration of the run.
        n_classes: number of classes of its model.
        accuracy: accuracy on the test part at the end, `[n_lengths]`, the longest first; None if it diverged.
        diverged: reason why training was stopped, if the loss was not finite; else None.
    """

    folder: Path
    config: TrainConfig
    n_classes: int
    accuracy: list[float] | None
    diverged: str | None

    @property
    def steps(self) -> list[dict[str, float]]:
        """Rows of the run's log by update."""
        return read_rows(self.folder / STEPS)

    @property
    def epochs(self) -> list[dict[str, float]]:
        """Rows of the run's log by epoch."""
        return read_rows(self.folder / EPOCHS)

    def model(self) -> ReViT:
        """The trained model in evaluation mode, with its preprocessing as timm configuration.

        Raises:
            ValueError: for a run that diverged.
        """
        if self.diverged is not None:
            raise ValueError(f"the run in {self.folder} has no final weights: {self.diverged}")
        model, _ = build_model(self.config, self.n_classes)
        model.load_weights(read_checkpoint(self.folder / FINAL), self.folder / FINAL)
        model.pretrained_cfg = self.config.input_settings(model)
        return model.eval()


def run_key(config: TrainConfig, norms: str = "tal") -> str:
    """The name of a run, which differs for every choice that changes its results."""
    choices = {name: value for name, value in config.as_dict().items() if name not in MAY_CHANGE or name == "log_steps"}
    choices["norms"] = norms
    digest = hashlib.blake2b(json.dumps([choices, None], sort_keys=True).encode(), digest_size=6).hexdigest()
    grids = "-".join(map(str, config.grids))
    return f"{config.data.split(':')[0]}_{norms}_{grids}_seed{config.seed}_{digest}"


def train_cached(
    config: TrainConfig,
    train: ImageSet,
    test: ImageSet,
    runs: Path,
    terminal: TextIO | None = None,
    norms: str = "tal",
) -> Run:
    """The run of this configuration: a finished one is read, an unfinished one is resumed, a new one is trained.

    A loss that is not finite ends a run. The run then counts as diverged and is not repeated.

    Args:
        config: choices of the run; its `data` names the images and must change with them.
        train: images to train on.
        test: images to evaluate on after every epoch.
        runs: folder of all runs.
        terminal: where progress is printed; None: nowhere.
        norms: one of `NORMS`.

    Raises:
        ValueError: for unknown norms.
        Interrupted, others: see `Trainer.fit`; the same call then resumes from the last checkpoint.
    """
    if norms not in NORMS:
        raise ValueError(f"norms: expected one of {', '.join(NORMS)}, got {norms!r}")
    folder = runs / run_key(config, norms)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        if not (folder / DONE).exists():
            outcome: dict[str, Any] = {"accuracy": None, "diverged": None}
            torch.manual_seed(config.seed)
            model, _ = build_model(config, len(train.classes))
            if norms == "shared":
                share(model)
            kind = SharedNormsTrainer if norms == "shared" else Trainer
            trainer = kind(model, train, config, held_out=test, folder=folder, terminal=terminal)
            if (folder / CHECKPOINT).exists():
                trainer.resume()
            try:
                outcome["accuracy"] = trainer.fit().accuracy
            except NotFiniteError as error:
                outcome["diverged"] = str(error)
            write_json(folder / DONE, outcome)
    outcome = read_json(folder / DONE)
    return Run(folder, config, len(train.classes), outcome["accuracy"], outcome["diverged"])


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lets only one process at a time work on a run; another one waits and then finds the run finished."""
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def accuracy_by_length(runs: Sequence[Run]) -> list[list[float | None]]:
    """Test accuracy `[n_runs][n_lengths]`; None for runs that diverged."""
    return [run.accuracy or [None] * len(run.config.grids) for run in runs]
