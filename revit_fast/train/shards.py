"""WebDataset shards: tar files in which the files of a sample share their name up to its first dot."""

from __future__ import annotations

import glob
import os
import re
import tarfile
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from revit_fast.io.finding import SUFFIXES
from revit_fast.io.images import ImageError, read_rgb
from revit_fast.io.names import read_names, shortened, whole_number
from revit_fast.train.data import EVAL_SPLITS, TRAIN_SPLITS, ImageSet, pick_split, renumbered

CLASS_NAMES = "classes.txt"

MOST_SHARDS, MOST_CLASSES = 10_000_000, 10_000_000
"""Bounds of what a pattern's braces and the labels of a set without class names stand for, all of which are listed."""

NAMED_SAMPLES = 5
"""Number of bad samples that an error lists."""


class Place(NamedTuple):
    """Position of a sample's image in its shard, in bytes, and the sample's label."""

    shard: int
    key: str
    offset: int
    size: int
    label: int


class ShardImages(ImageSet):
    """Images in uncompressed tar files, read at their offsets.

    Args:
        shards: paths of the files.
        places: positions of the images.
        labels: see `ImageSet`.
        classes: see `ImageSet`.
    """

    def __init__(
        self, shards: Sequence[str], places: Sequence[Place], labels: np.ndarray, classes: Sequence[str]
    ) -> None:
        self._shards, self._keys = list(shards), [place.key for place in places]
        self._where = np.array([(place.shard, place.offset, place.size) for place in places], dtype=np.int64)
        super().__init__(labels, classes)

    def image(self, i: int) -> np.ndarray:
        shard, offset, size = self._where[i].tolist()
        try:
            with open(self._shards[shard], "rb") as file:
                data = os.pread(file.fileno(), size, offset)
        except OSError as error:
            raise ImageError((error.strerror or str(error)).lower()) from error
        if len(data) < size:
            raise ImageError(f"the shard ends {size - len(data)} bytes before the image does")
        return read_rgb(data)

    def name(self, i: int) -> str:
        return f"{self._shards[self._where[i, 0]]}:{self._keys[i]}"


def find_in_folder(path: str, names: Sequence[str]) -> list[str]:
    """The shards of a split in a folder, sorted; [] if the folder has no shards.

    They are in a folder named like the split, or have its name as a word in theirs. Without such names, all are used.

    Raises:
        ValueError: if there are shards of other splits only.
    """
    known = dict.fromkeys((*TRAIN_SPLITS, *EVAL_SPLITS, names[0]))
    by_folder = {name: _tars(os.path.join(path, name)) for name in known}
    if any(by_folder.values()):
        return by_folder[pick_split([name for name, found in by_folder.items() if found], names, path)]
    shards = _tars(path)
    by_name = {name: [shard for shard in shards if _has_word(shard, name)] for name in known}
    if any(by_name.values()):
        return by_name[pick_split([name for name, found in by_name.items() if found], names, path)]
    return shards


def _tars(folder: str) -> list[str]:
    return sorted(glob.glob(os.path.join(glob.escape(folder), "*.tar")))


def _has_word(shard: str, word: str) -> bool:
    stem = os.path.basename(shard)[: -len(".tar")].lower()
    return word.lower() in re.split(r"[^a-z]+", stem)


def find_by_pattern(pattern: str) -> list[str]:
    """The shards that a pattern with braces (`{000..127}`, `{a,b}`) and wildcards stands for.

    Raises:
        FileNotFoundError: if a shard that the braces name is missing, or wildcards have no match.
    """
    shards = []
    for path in expand_braces(pattern):
        found = [path] if os.path.isfile(path) else sorted(glob.glob(path)) if glob.has_magic(path) else []
        if not found:
            raise FileNotFoundError(f"path: no shard is at {path}")
        shards += found
    return shards


def expand_braces(pattern: str) -> list[str]:
    """The names that a pattern stands for by the shell's rules for `{a,b}`, `{8..12}` and `{08..12}`."""
    match = re.search(r"\{(?:([0-9]+)\.\.([0-9]+)|([^{}]*,[^{}]*))\}", pattern)
    if match is None:
        return [pattern]
    first, last, listed = match.groups()
    if listed is not None:
        options = listed.split(",")
    else:
        width = len(first) if first.startswith("0") else 0
        begin, end = whole_number(first), whole_number(last)
        if end - begin >= MOST_SHARDS:
            raise ValueError(f"path: {shortened(match.group())} names over {MOST_SHARDS:,} shards")
        options = [f"{n:0{width}d}" for n in range(begin, end + 1)]
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [name for option in options for name in expand_braces(before + option + after)]


def open_shards(shards: Sequence[str], classes: tuple[str, ...] | None) -> ImageSet:
    """Opens a set of WebDataset shards; see `datasets.open_images`.

    Raises:
        ValueError: for damaged shards, and for samples without an image or a label; the message names shard and key.
    """
    places: list[Place] = []
    problems: list[str] = []
    for s, shard in enumerate(shards):
        found, bad = _index(shard, s)
        places += found
        problems += bad
    if problems:
        more = f"; and {len(problems) - NAMED_SAMPLES} more" if len(problems) > NAMED_SAMPLES else ""
        raise ValueError(
            f"path: incomplete samples: {'; '.join(problems[:NAMED_SAMPLES])}{more}; write the shards anew"
        )
    if not places:
        raise ValueError(f"path: no samples (an image and a .cls each) in {', '.join(shards[:NAMED_SAMPLES])}")
    labels = np.array([place.label for place in places], dtype=np.int64)
    own = _class_names(shards[0])
    if own is not None:
        labels = renumbered(labels, own, classes, os.path.dirname(shards[0]))
    if classes is None and own is None:
        highest = int(labels.argmax())
        if labels[highest] >= MOST_CLASSES:
            raise ValueError(
                f"path: {shards[places[highest].shard]}: key {places[highest].key!r} has label {labels[highest]}; "
                f"without {CLASS_NAMES}, labels are below {MOST_CLASSES:,}"
            )
        own = [str(n) for n in range(max(int(labels.max()) + 1, 1))]
    return ShardImages(shards, places, labels, classes or own)


def _class_names(shard: str) -> tuple[str, ...] | None:
    """Class names: lines of a file beside a shard or, for folders of splits, in the folder above; None without it."""
    folder = os.path.dirname(os.path.abspath(shard))
    above = [os.path.dirname(folder)] if os.path.basename(folder) in TRAIN_SPLITS + EVAL_SPLITS else []
    for path in (os.path.join(place, CLASS_NAMES) for place in (folder, *above)):
        if os.path.isfile(path):
            try:
                names = tuple(name.strip() for name in read_names(path) if name.strip())
            except ValueError as error:
                raise ValueError(f"path: {path}: {error}") from error
            if not names:
                raise ValueError(f"path: {path} is empty; write a class name per line, or remove it to number classes")
            return names
    return None


def _index(shard: str, s: int) -> tuple[list[Place], list[str]]:
    """Places of the samples of shard number s in its order, and the problems of incomplete samples."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, bytes] = {}
    keys: dict[str, None] = {}
    problems = []
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                tar.members = []  # tarfile would keep all of them
                key, kind = _key_and_kind(member.name)
                if not member.isreg() or kind is None:
                    continue
                keys[key] = None
                if key in (labels if kind == "cls" else images):
                    problems.append(f"{shard}: key {key!r} has more than one {kind}")
                elif kind == "cls":
                    labels[key] = tar.extractfile(member).read()
                else:
                    images[key] = member.offset_data, member.size
            _check_end(shard, tar.offset)
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"path: shard {shard} is truncated or no uncompressed tar file: {error}") from error
    places = []
    for key in keys:
        label = _number(labels.get(key))
        if key not in images or label is None:
            what = "no image" if key not in images else "no .cls" if key not in labels else "a .cls that is no number"
            problems.append(f"{shard}: key {key!r} has {what}")
        else:
            places.append(Place(s, key, *images[key], label))
    return places, problems


def _check_end(shard: str, offset: int) -> None:
    """Raises an error if a block of zeros, the true end, is missing: tarfile takes a damaged header for the end."""
    with open(shard, "rb") as file:
        if os.pread(file.fileno(), tarfile.BLOCKSIZE, offset) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"neither a file nor the end mark at byte {offset}")


def _key_and_kind(name: str) -> tuple[str, str | None]:
    """WebDataset's key of a file, and its kind: "image", "cls" or, for any other file, None."""
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    extension = f".{extension.lower()}"
    kind = "image" if extension in SUFFIXES else "cls" if extension == ".cls" else None
    return folder + slash + stem, kind if stem else None


def _number(text: bytes | None) -> int | None:
    try:
        number = int(text or b"")
    except ValueError:
        return None
    return number if abs(number) < 2**63 else None
