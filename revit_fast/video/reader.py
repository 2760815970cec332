"""Decodes clips to uint8 frames spread evenly over each clip. Files need PyAV: `pip install "revit-fast[video]"`."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from math import inf
from typing import TYPE_CHECKING

import numpy as np

from revit_fast.io.images import ImageError, Kind, Source, check_file, is_file, os_reason, read_all
from revit_fast.video.packets import Packets, read_packets

if TYPE_CHECKING:  # arrays need no PyAV, and it is imported where it is first needed
    from av.container import InputContainer
    from av.video.frame import VideoFrame

CLIPS = Kind("a clip", "clips", (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm"))

CONTAINERS = "avi,matroska,mov,mp4,m4a,3gp,3g2,mj2,webm"
"""Formats that may be read, whatever the file is called. FFmpeg's playlists are excluded: they open other files."""

ClipSource = "str | os.PathLike | bytes | BinaryIO | np.ndarray | Source"
"""A clip given as a path, as the bytes of a file, as an open file, or as uint8 frames `[F, H, W, 3]`."""

WIDEST_PIXEL = 8
"""Pixels are at most this many times as wide as high, or as high as wide; real ones stay below 4."""

SKEW = 0.0175
"""Sine of the angle, one degree, by which a display matrix may miss a quarter turn, as in ffplay."""


class ClipError(ImageError):
    """A source cannot be read as a clip; the text is the reason, without the source's name."""


def spread(n_total: int, n_frames: int) -> list[int]:
    """Indices of `n_frames` frames spread evenly over a clip of `n_total` frames.

    Source: `sample_frame_indices` of Hugging Face's examples for TimeSformer, applied to the whole clip instead of a
    window.

    Raises:
        ClipError: if the clip has fewer frames.
    """
    if n_total < n_frames:
        raise ClipError(f"has {n_total} frames, and the model takes {n_frames}; give a longer clip, or fewer frames")
    return np.linspace(0, n_total, num=n_frames).clip(0, n_total - 1).astype(int).tolist()


def read_clip(source: ClipSource, n_frames: int) -> np.ndarray:
    """RGB frames spread evenly over a clip, as players show them.

    They are turned and mirrored as the display matrix of the clip says (with PyAV 14 or later). Where pixels are not
    square, frames are first scaled to the width that square pixels need, `round(width * sample aspect ratio)`, by
    FFmpeg's bicubic filter; their height stays.

    The number of frames is counted, not taken from the header. A file is read once for its packets and decoded once; if
    there are more or fewer frames than packets, it is decoded a second time.

    Args:
        source: a path or the bytes of an AVI, Matroska, WebM, MP4 or QuickTime file, or an open one, whose first video
            stream is taken; or uint8 frames `[F, H, W, 3]`.
        n_frames: frames to take, see `spread`.

    Returns:
        uint8 array `[n_frames, H, W, 3]`.

    Raises:
        ClipError: with the reason: missing, empty, no video, damaged, too few frames, frames of several sizes, an
            end well before the duration in the header, a display matrix that is no quarter turn, pixels more than 8
            times as wide as high, or an array of another type or shape.
    """
    if isinstance(source, np.ndarray):
        return _checked_array(source)[spread(len(source), n_frames)]
    with _reasons():
        if isinstance(source, Source):
            if source.error is not None:
                raise ClipError(source.error)
            source = source.path
        if is_file(source):
            source = read_all(source)
        if isinstance(source, (str, os.PathLike)):
            check_file(source, CLIPS)
            return _read(os.fspath(source), n_frames)
        if isinstance(source, (bytes, bytearray, memoryview)):
            if len(source) == 0:
                raise ClipError("empty file")
            return _read(source, n_frames)
    raise ClipError(f"expected a path, bytes, an open file or uint8 frames [F, H, W, 3], got {type(source).__name__}")


def _read(file: str | bytes, n_frames: int) -> np.ndarray:
    with _opened(file) as container:
        packets = read_packets(container)
    _check_end(packets.end_s, packets.declared_s, packets.slack_s)
    n_total = packets.n_pictures
    indices = spread(n_total, n_frames) if n_total >= n_frames else []
    frames, n_found = _frames_at(file, indices, packets)
    if len(frames) < n_frames or n_found != n_total:  # a packet is not always a frame
        frames, _ = _frames_at(file, spread(n_found, n_frames))
    return _stacked(frames)


def _frames_at(
    file: str | bytes, indices: Sequence[int], packets: Packets | None = None
) -> tuple[list[np.ndarray], int]:
    """The frames at increasing indices, as far as the file has them, and the number of frames, as far as it is known.

    Args:
        file: the clip.
        indices: the frames to take; decoding stops after the last.
        packets: the packets, whose count is to be verified. If the last index is that of the last picture, one more
            frame is asked for. If there is one, or there are no indices, all frames are counted.

    Raises:
        ClipError: if the frames end before the packets.
    """
    n_expected = packets.n_pictures if packets is not None else None
    wanted, frames, n_found, last_s = set(indices), [], 0, None
    with _opened(file) as container:
        aspect = _pixel_aspect(container)
        for i, frame in enumerate(container.decode(video=0)):
            n_found, last_s = i + 1, frame.time
            if i in wanted:
                frames.append(_shown(frame, aspect))
            if indices and i == indices[-1] and n_found != n_expected:
                return frames, n_expected or n_found
    if packets is not None and last_s is not None:
        end_s = packets.end_s - (packets.last_s - last_s)
        _check_end(end_s, packets.declared_s or packets.end_s, packets.slack_s)
    return frames, n_found


def _check_end(end_s: float, declared_s: float, slack_s: float) -> None:
    if -inf < end_s < declared_s - slack_s:
        durations = f"ends after {max(end_s, 0):.2f} s, and its duration is {declared_s:.2f} s"
        raise ClipError(f"{durations}; it is cut off or damaged")


def _stacked(frames: list[np.ndarray]) -> np.ndarray:
    sizes = {frame.shape[:2] for frame in frames}
    if len(sizes) > 1:
        raise ClipError(f"has frames of several sizes: {', '.join(f'{h}x{w}' for h, w in sorted(sizes))}")
    return np.stack(frames)


def _pixel_aspect(container: InputContainer) -> Fraction:
    """Width of the video's pixels by their height; 1 if the file does not say."""
    aspect = container.streams.video[0].sample_aspect_ratio or Fraction(1)
    if not Fraction(1, WIDEST_PIXEL) <= aspect <= WIDEST_PIXEL:
        shape = f"{aspect.numerator}:{aspect.denominator}"
        raise ClipError(f"its pixels are {shape}, expected 1:{WIDEST_PIXEL} to {WIDEST_PIXEL}:1; its header is damaged")
    return aspect


def _shown(frame: VideoFrame, aspect: Fraction) -> np.ndarray:
    """The RGB pixels of a frame as players show them."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if aspect != 1:
        width = max(1, round(frame.width * aspect))
        frame = frame.reformat(width, frame.height, "rgb24", interpolation="BICUBIC")
    pixels = frame.to_ndarray(format="rgb24")
    return pixels if matrix is None else _displayed(pixels, np.frombuffer(matrix, np.int32).reshape(3, 3))


def _displayed(pixels: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """A frame turned and mirrored by FFmpeg's display matrix: the row (x, y, 1) times it is where a pixel is shown.

    Only the signs of its linear part count: FFmpeg has put its scale into the shape of pixels.
    """
    (xx, xy), (yx, yy) = matrix[:2, :2].astype(np.int64).tolist()
    straight, across = abs(xx) + abs(yy), abs(xy) + abs(yx)
    if min(straight, across) > SKEW * max(straight, across):
        degrees = np.degrees(np.arctan2(xy, xx))
        raise ClipError(f"is shown turned by {degrees:.0f} degrees, expected quarter turns; encode its frames upright")
    if across > straight:
        pixels, xx, yy = pixels.swapaxes(0, 1), yx, xy
    return pixels[:: -1 if yy < 0 else 1, :: -1 if xx < 0 else 1]


@contextmanager
def _opened(file: str | bytes) -> Iterator[InputContainer]:
    import av

    # The prefix keeps FFmpeg from reading a file name with a colon as a protocol.
    target = f"file:{file}" if isinstance(file, str) else io.BytesIO(file)
    with av.open(target, options={"format_whitelist": CONTAINERS}) as container:
        if not container.streams.video:
            raise ClipError("has no video stream")
        yield container


@contextmanager
def _reasons() -> Iterator[None]:
    """Turns the errors that decoders raise into `ClipError`."""
    try:
        yield
    except ClipError:
        raise
    except ImageError as error:
        raise ClipError(str(error)) from error
    except ModuleNotFoundError as error:
        raise ClipError('decoding needs PyAV: pip install "revit-fast[video]"') from error
    except FileNotFoundError as error:
        raise ClipError(os_reason(error)) from error
    except ValueError as error:  # FFmpeg's error for content in none of the formats
        raise ClipError(
            f"not an AVI, Matroska, WebM, MP4 or QuickTime clip, or damaged: {_first_line(error)}"
        ) from error
    except OSError as error:
        raise ClipError(os_reason(error)) from error
    except Exception as error:  # a damaged file can make decoders raise any error
        raise ClipError(_first_line(error)) from error


def _first_line(error: Exception) -> str:
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return reason.splitlines()[0]


def _checked_array(frames: np.ndarray) -> np.ndarray:
    if frames.dtype != np.uint8:
        raise ClipError(f"expected uint8 frames, got {frames.dtype}")
    if frames.ndim != 4 or frames.shape[3] != 3 or 0 in frames.shape:
        raise ClipError(f"expected frames [F, H, W, 3], got {list(frames.shape)}")
    return frames
