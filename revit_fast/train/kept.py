"""Results of a run that are kept in its folder and taken again as long as what they follow from is the same."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from revit_fast.adaptive.assigner import TokenLengthAssigner
from revit_fast.deploy.results_folder import digest_of, module_digest
from revit_fast.inference.inference_copy import InferenceCopy, dtype_name
from revit_fast.io.atomic import make_folder, read_json, replaced, write_json
from revit_fast.io.images import ImageError
from revit_fast.io.names import dumps, loads
from revit_fast.models.settings import input_settings
from revit_fast.train.data import ImageSet
from revit_fast.train.labels import Predictions, predict_lengths
from revit_fast.train.pace import Pace
from revit_fast.train.report import Time
from revit_fast.version import __version__

COMPARED = 256
"""Number of images of a set that have no file of their own, by whose pixels it is known."""


class Kept:
    """A folder of predictions, times and an assigner. What is damaged, or follows from something else, is made anew.

    Args:
        folder: the folder; it is made when something is written.
        fast: the optimised copy that predicts.
        settings: preprocessing that replaces the model's.
        say: function that prints a line.
    """

    def __init__(
        self,
        folder: Path,
        fast: InferenceCopy,
        settings: Mapping[str, Any] | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.folder, self.fast, self.settings, self.say = folder, fast, settings, say
        about = [__version__, fast.grids, input_settings(fast), dict(settings or {}), dtype_name(fast)]
        self.model = module_digest(fast, dumps(about, default=str).encode())

    def predictions(self, name: str, images: ImageSet) -> Predictions:
        """The predictions for `images`: those in the file `name`.npz if they fit; otherwise they are made and kept."""
        path, key = self.folder / f"{name}.npz", digest_of([self.model.encode(), *_identity(images)])
        try:
            with np.load(path) as file:
                about = loads(file["about"].tobytes())
                if about["key"] == key:
                    unreadable = {int(i): reason for i, reason in about["unreadable"].items()}
                    return Predictions(self.fast.grids, file["logits"], unreadable)
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
            pass
        stage = Pace(self.say, f"predicted {name} images")
        made = predict_lengths(self.fast, images, settings=self.settings, progress=stage)
        about = dumps({"key": key, "unreadable": {str(i): reason for i, reason in made.unreadable.items()}}).encode()
        try:
            make_folder(self.folder)
            with replaced(path) as temporary, open(temporary, "wb") as file:
                np.savez(file, about=np.frombuffer(about, dtype=np.uint8), logits=made.logits)
        except OSError as error:
            self.say(f"warning: predictions are not kept, and are made again with --resume: {error}")
        return made

    def assigner(
        self, about: Any, sets: Iterable[ImageSet], make: Callable[[], tuple[TokenLengthAssigner, np.ndarray]]
    ) -> tuple[TokenLengthAssigner, np.ndarray]:
        """An assigner and the places of its calibration images: those in the folder if they fit, else those of `make`.

        Args:
            about: arguments of its training, as JSON values.
            sets: the images of its training and calibration.
            make: function that trains and calibrates it.
        """
        path, record = self.folder / "assigner.safetensors", self.folder / "assigner.json"
        parts = (part for images in sets for part in _identity(images))
        key = digest_of([self.model.encode(), dumps(about, default=str).encode(), *parts])
        try:
            kept, content = read_json(record), path.read_bytes()
            if kept["key"] == key and kept["sha256"] == digest_of([content]):
                return TokenLengthAssigner.load(path, content), np.array(kept["places"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        tla, places = make()
        make_folder(self.folder)
        tla.save(path)
        write_json(record, {"key": key, "sha256": digest_of([path.read_bytes()]), "places": places.tolist()})
        return tla, places

    def times(self, about: Any, measure: Callable[[], tuple[Mapping[str, Time], Mapping[str, Any]]]) -> tuple:
        """Times by name and the machine, from times.json if they were measured for the same `about`; else by `measure`.

        Args:
            about: what was measured, as JSON values.
            measure: function that measures.
        """
        path, key = self.folder / "times.json", digest_of([self.model.encode(), dumps(about, default=str).encode()])
        try:
            kept = read_json(path)
            if kept["key"] == key:
                return {name: Time.of(values) for name, values in kept["times"].items()}, kept["machine"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass
        times, machine = measure()
        make_folder(self.folder)
        write_json(path, {"key": key, "times": {n: asdict(t) for n, t in times.items()}, "machine": machine})
        return times, machine


def _identity(images: ImageSet) -> Iterable[bytes]:
    """What tells a set of images from others: classes, labels, names, and size and time of every image's file.

    Of images without a file of their own, the pixels of `COMPARED` ones, evenly spaced, are read.
    """
    yield dumps(images.classes).encode()
    yield images.labels.tobytes()
    others = []
    for i in range(len(images)):
        name = images.name(i)
        yield os.fsencode(name) + b"\0"
        # The name of an image in a shard is that of the shard, a colon and its key.
        path = name if os.path.isfile(name) else name.rpartition(":")[0]
        try:
            found = os.stat(path)
            yield f"{found.st_size} {found.st_mtime_ns}".encode()
        except (OSError, ValueError):
            others.append(i)
    for i in others[:: max(1, len(others) // COMPARED)]:
        try:
            yield np.ascontiguousarray(images.image(i)).tobytes()
        except ImageError as error:
            yield str(error).encode()
