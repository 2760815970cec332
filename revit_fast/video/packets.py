"""Reads the packets of a clip without decoding them: how many pictures there are, and whether the clip is complete.

The number of frames in a header is not used. A fragmented MP4 or QuickTime file gives that of its first fragment,
Matroska gives none, and in an AVI file whose recording was interrupted it can be any number.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # PyAV is imported where it is first needed
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.stream import VideoStream

REPEAT_BYTES = 8
"""MPEG-4 repeats a frame by a packet of at most this size, which decodes to nothing."""


class Packets(NamedTuple):
    """What the packets of a clip say, in seconds.

    Attributes:
        n_pictures: packets of the video stream that are to be shown. For most clips this is the number of frames.
        last_s: when the last of them is shown, -inf if unknown.
        end_s: where the clip ends by its packets.
        declared_s: where the clip ends by its header, 0 if the header does not say.
        slack_s: how much earlier than declared a complete clip may end.
    """

    n_pictures: int
    last_s: float
    end_s: float
    declared_s: float
    slack_s: float


@dataclass
class _Track:
    """The packets of one stream. Times are in seconds.

    Attributes:
        n_pictures: packets that are to be shown.
        start_s: the smallest time of a packet.
        end_s: the largest end of a packet.
        last_s: the largest time of a packet with a picture of its own.
        gap_s: the largest step from one packet to the next in the order of decoding.
    """

    n_pictures: int = 0
    start_s: float = inf
    end_s: float = -inf
    last_s: float = -inf
    gap_s: float = 0.0
    _dts_s: float = field(default=inf, repr=False)

    def add(self, packet: Packet) -> None:
        """Counts a packet. One without data repeats a frame, or has no time and marks the end."""
        self.n_pictures += packet.size > 0 and not packet.is_discard
        stamp = packet.dts if packet.pts is None else packet.pts
        if stamp is None:
            return
        time_s = float(stamp * packet.time_base)
        self.start_s = min(self.start_s, time_s)
        self.end_s = max(self.end_s, time_s + float((packet.duration or 0) * packet.time_base))
        if packet.size > REPEAT_BYTES and not packet.is_discard:
            self.last_s = max(self.last_s, time_s)
        if packet.dts is not None:
            dts_s = float(packet.dts * packet.time_base)
            self.gap_s = max(self.gap_s, dts_s - self._dts_s)
            self._dts_s = dts_s


def read_packets(container: InputContainer) -> Packets:
    """Reads all packets of an opened container; memory does not grow with the clip.

    Args:
        container: a container with at least one video stream, at its start.
    """
    stream = container.streams.video[0]
    tracks = {stream.index: _Track()}
    for packet in container.demux():
        tracks.setdefault(packet.stream.index, _Track()).add(packet)
    video = tracks[stream.index]
    declared_s, of_stream = _declared(container, stream)
    counted = [video] if of_stream else list(tracks.values())  # a container is as long as its longest stream
    start_s, end_s = min(track.start_s for track in counted), max(track.end_s for track in counted)
    if start_s < 0 or declared_s < start_s < inf:  # otherwise the duration may count from 0: so it does in Matroska
        end_s -= start_s
    # The time for which the last frame is shown is not always known. Two per cent, or a second, are for headers that
    # are rounded, or that count samples of sound which a decoder drops.
    slack_s = video.gap_s + min(1.0, max(declared_s, end_s, 0.0) / 50)
    return Packets(video.n_pictures, video.last_s, end_s, declared_s, slack_s)


def _declared(container: InputContainer, stream: VideoStream) -> tuple[float, bool]:
    """The duration in the header in seconds, 0 if there is none, and whether it is that of the stream alone."""
    import av

    own_s = float(stream.duration * stream.time_base) if stream.duration else 0.0
    if "matroska" in container.format.name:
        # The header has no duration of a stream. If FFmpeg gives one, the header has none at all, and FFmpeg has
        # estimated both from bit rates.
        own_s, of_container = 0.0, 0 if own_s else container.duration
    elif container.format.name == "avi":
        # FFmpeg shortens the duration of a file that was cut off, and leaves the number of frames.
        own_s, of_container = max(own_s, float(stream.frames * stream.time_base)), None
    else:
        of_container = container.duration
    return (own_s, True) if own_s else ((of_container or 0) / av.time_base, False)
