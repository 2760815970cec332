"""Decoders of JPEG photographs beside each other: processor time to pixels, and whether they are Pillow's pixels.

Run: python -m bench.decode [--rounds 15]

The photographs are parts of the samples of scikit-learn and scikit-image, encoded at quality 90. torchcodec,
imagecodecs and opencv are measured where they are installed. A decoder alone does less than a pipeline needs: ours also
opens the file with Pillow for its size, its EXIF orientation and its metadata.
"""

from __future__ import annotations

import argparse
import io
import statistics
from collections.abc import Callable, Sequence
from importlib.util import find_spec

import numpy as np
import torch
from PIL import Image

from bench.photos import encoded, real_photo
from bench.report import header_line, machine_header, spread_ms, write
from bench.turns import CpuClock, take_turns
from revit_fast.io import jpeg
from revit_fast.io.images import read_rgb

Decode = Callable[[bytes], np.ndarray]

SHAPES = {
    "500x333, 4:2:0": ((500, 333), {"subsampling": "4:2:0"}),
    "500x333, 4:4:4": ((500, 333), {"subsampling": "4:4:4"}),
    "500x333, progressive": ((500, 333), {"progressive": True}),
    "2000x1333, 4:2:0": ((2000, 1333), {}),
    "4000x3000, 4:2:0": ((4000, 3000), {}),
}
"""Size and encoding of each case."""


def photographs(size: tuple[int, int], **options) -> list[bytes]:
    """JPEG files of three photographs of one size."""
    return [encoded(real_photo(seed, *size), quality=90, **options) for seed in range(3)]


def by_pillow(file: bytes) -> np.ndarray:
    """The usual way to an array."""
    with Image.open(io.BytesIO(file)) as image:
        return np.array(image.convert("RGB"))


def ours_by_pillow(file: bytes) -> np.ndarray:
    """Ours as it is without simplejpeg."""
    matching = jpeg.matching_decoder
    jpeg.matching_decoder = lambda: None
    try:
        return read_rgb(file)
    finally:
        jpeg.matching_decoder = matching


def by_torchvision(file: bytes) -> np.ndarray:
    from torchvision.io import ImageReadMode, decode_jpeg

    data = torch.frombuffer(bytearray(file), dtype=torch.uint8)
    return decode_jpeg(data, ImageReadMode.RGB).permute(1, 2, 0).numpy()


def decoders() -> dict[str, Decode]:
    """Decoders by name; the first is what others are compared with."""
    found: dict[str, Decode] = {"Pillow, numpy.array": by_pillow, "ours, Pillow": ours_by_pillow}
    if jpeg.matching_decoder():
        found |= {"ours, simplejpeg": read_rgb, "simplejpeg alone": jpeg.matching_decoder()}
    found["torchvision alone"] = by_torchvision
    if find_spec("torchcodec"):
        from torchcodec.decoders import decode_jpeg

        found["torchcodec alone"] = lambda file: decode_jpeg(file).permute(1, 2, 0).numpy()
    if find_spec("imagecodecs"):
        from imagecodecs import jpeg8_decode

        found["imagecodecs alone"] = jpeg8_decode
    if find_spec("cv2"):
        import cv2

        cv2.setNumThreads(1)
        found["opencv alone"] = lambda file: cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_COLOR_RGB)
    return found


def rows_of(case: str, files: Sequence[bytes], rounds: int) -> list[dict]:
    """Milliseconds of processor time for a file, the ratio to the first decoder, and equality with Pillow."""
    candidates = decoders()
    expected = [by_pillow(file) for file in files]
    equal = {name: all(map(np.array_equal, map(run, files), expected)) for name, run in candidates.items()}
    turns = {name: lambda turn, run=run: [run(file) for file in files] for name, run in candidates.items()}
    samples = take_turns(turns, rounds, clock=CpuClock())
    first = next(iter(samples.values()))
    rows = []
    for name, seconds in samples.items():
        median, (low, high) = spread_ms([s / len(files) for s in seconds])
        ratio = statistics.median(s / f for s, f in zip(seconds, first, strict=True))
        row = {"case": case, "decoder": name, "ms": f"{median:.2f}", "quartiles": f"{low:.2f} to {high:.2f}"}
        rows.append(row | {"time / Pillow": f"{ratio:.2f}", "pixels": "equal" if equal[name] else "differ"})
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the bench and writes `bench/results/decode.{md,json}`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    header = machine_header()
    rows = [
        row
        for case, (size, options) in SHAPES.items()
        for row in rows_of(case, photographs(size, **options), args.rounds)
    ]
    lines = ["| " + " | ".join(rows[0]) + " |", "| --- " * len(rows[0]) + "|"]
    text = "\n".join(lines + ["| " + " | ".join(row.values()) + " |" for row in rows]) + "\n"
    print(text)
    write("decode", header, {"rows": rows}, f"# JPEG decoders\n\n{header_line(header)}\n\n{text}")


if __name__ == "__main__":
    main()
