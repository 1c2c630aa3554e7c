"""Video files with PyAV: decoding, rotation, cropping, resizing, and reproducible encoding.

Axis letters: T frames, H rows, W columns. Pictures are uint8 RGB [H, W, 3].
"""

from __future__ import annotations

import errno
import io
import math
import os
import secrets
import stat
import struct
import tempfile
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice, pairwise, zip_longest
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

import av
import cv2
import numpy as np
from av.filter import Graph
from av.sidedata.sidedata import SideDataContainer
from av.video.reformatter import Interpolation, VideoReformatter
from jaxtyping import UInt8

from ditflow.errors import DitflowError

Picture = UInt8[np.ndarray, "_ _ 3"]

MAX_PIXELS_PER_FRAME = 8192 * 4320
"""Default limit of a decoded frame: 8K cinema, 106 MB as RGB."""

_STRICT = "crccheck+bitstream+buffer+explode"
"""FFmpeg's err_detect: report damage. By default it conceals damaged parts and continues."""
CRF = 12
"""x264's quality, from 1 (best) to 51; 12 is visually lossless and changes metrics hardly at all."""
_REPRODUCIBLE = "cpu-independent=1"
"""x264's approximate division (macroblock tree) depends on the processor, and with x264 165 sometimes differs between
runs on the same one; this option selects the exact division."""
_SCALER = Interpolation.BICUBIC | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
"""swscale's accurate conversion between YUV and RGB. The default repeats chroma samples, which costs 15 dB in smooth
colours, and rounds differently between processors."""
decoder_threads = 0
"""Threads of each decoder; 0: FFmpeg's default, one for each CPU of the process."""
_BT709 = 1
_UNSPECIFIED = 2
_NO_MATRIX = {0, 3}
"""RGB and a reserved number; in YUV files they are mistakes, treated as unspecified."""
_MATRICES = {0, 1, 2, 3, 4, 5, 6, 7, 9}
"""Supported matrix coefficients (H.273): not YCgCo, constant luminance and the like."""
_LIMITED_RANGE = 1
_HDR = {16: "PQ", 18: "HLG"}
"""Transfer characteristics of high dynamic range."""
_TRANSPARENT = "transparent: shown as if it were opaque"
Deinterlacing = Literal["bwdif", "off"]
_BROADCAST = {"mpegts", "mpeg"}
"""Formats that are cut and joined anywhere; keyframes are found by parsing the pictures."""
_WITHOUT_TIMES = {"avi", "h264", "hevc", "m4v", "mjpeg", "mpegvideo", "obu"}
"""Formats without timestamps: packets are counted at a constant rate, from which decoders guess the times."""
_RAW = _WITHOUT_TIMES - {"avi"}
"""Elementary streams: coded pictures without a container."""
_JOINT_S = 1.0
"""At a joint of transport streams the clock steps back by at least half of this (by less, segments of one recording
overlap), or forward by more next to an incomplete packet: a recording itself may pause that long."""
_NEAR_JOINT = 3
"""Packets between a truncated one and the joint: parsers lag by a picture or two."""
_EVEN_S = 1e-3
"""Rounding error of gaps between frames."""
_PAUSE = 2.5
"""Factor over the usual frame duration from which a gap counts as a pause."""
_FORMATS = (
    "mov,matroska,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,mxf,nut,dv,gif,apng,yuv4mpegpipe,h264,hevc,m4v,mjpeg,ivf,obu,"
    "wav,mp3,flac,aac"
)
"""Allowed containers; audio formats are included for a clear error message. FFmpeg has hundreds more, some with side
effects: an SDP text, under any file name, opens a network port and waits."""
_NO_PROTOCOL = "none"
_MAX_STREAMS = 100
"""Each stream of a file takes a decoder and its buffers while the file is opened."""
_MAX_BOXES = 1000
_PROBE_BYTES = 2**22
"""Bytes of a file that are searched for its format."""
_STILL_BRANDS = {b"heic", b"heix", b"mif1", b"avif"}
_RATES = (1e-3, 1e4)
"""Valid frames per second: from one in a quarter of an hour to a high-speed camera's."""


class VideoError(DitflowError, ValueError):
    """A video or a request for one is not usable; the base of every error of this module."""

    default_code = "video-request-invalid"


class UndecodableVideoError(VideoError):
    """The source is not a video, or no frame of it can be decoded."""

    default_code = "video-undecodable"


class CorruptVideoError(UndecodableVideoError):
    """The video is damaged or cut off before the last requested frame."""

    default_code = "video-damaged"


class TooShortVideoError(VideoError):
    """The video has fewer frames than requested."""

    default_code = "video-too-short"


class OversizedVideoError(VideoError):
    """The video's frames exceed the limit of pixels, or reading it exceeds the memory limit."""

    default_code = "video-too-large"


@dataclass(frozen=True)
class Clip:
    """Frames uint8 [T, H, W, 3] RGB, and their rate in frames per second.

    notes: unusual steps of reading, such as deinterlacing.
    """

    frames: UInt8[np.ndarray, "frames height width 3"]
    fps: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class VideoInfo:
    """Frame count, upright size in coded pixels and mean frames per second of a decoded video."""

    frames: int
    height: int
    width: int
    fps: float


def is_selection(value: Any) -> bool:
    """Return whether a JSON value is a selection of frames and their size, by keywords of `read_video`."""
    counts = {"frames", "height", "width", "stride"}
    return (
        isinstance(value, dict)
        and value.keys() - {"deinterlace"} == counts | {"start", "fit"}
        and all(type(value[key]) is int and 0 < value[key] < 2**31 for key in counts)
        and type(value["start"]) is int
        and 0 <= value["start"] < 2**31
        and value["fit"] in ("crop", "stretch")
        and value.get("deinterlace", "bwdif") in get_args(Deinterlacing)
    )


def read_video(
    source: str | Path | bytes,
    *,
    frames: int,
    height: int,
    width: int,
    start: int = 0,
    stride: int = 1,
    fit: Literal["crop", "stretch"] = "crop",
    deinterlace: Deinterlacing = "bwdif",
    max_pixels_per_frame: int = MAX_PIXELS_PER_FRAME,
    name: str | None = None,
) -> Clip:
    """Return frames start, start + stride, ... of a video, `frames` many, as uint8 [frames, height, width, 3] RGB.

    Frames are counted in presentation order, whatever their times. The clip's fps is the stated rate of the source
    divided by `stride` if the used frames have that rate, else the mean rate of their own times without pauses. Frames
    before the first decodable one are skipped, in a stream that starts or was joined inside a group of pictures.
    Interlaced frames are deinterlaced to one frame each, unless `deinterlace` is off. Colours are read as the file
    specifies; if it does not, high definition is read as BT.709, and the rest as BT.601. The clip's notes record all
    of this.

    Each picture is turned upright (rotation and mirroring of the display matrix) and then fitted: `crop` keeps the
    largest centred part of the requested aspect ratio, pixel aspect ratio included, so directions of motion are kept;
    `stretch` resizes the whole picture. Alpha is dropped and HDR not tone-mapped, with a note. Damage is an error if
    the decoder detects it: headers, missing data, broken syntax. Changed bytes inside a picture can decode to plausible
    wrong pixels, since most codecs have no checksum.

    `source` is a local path (never a URL), or the file's bytes, called `name` in errors. Only one unscaled picture is
    in memory at a time (of interlaced videos a few), and decoding stops after the last requested frame: a video of a
    million frames costs no more than a short one. The caller limits the memory of its index, as `pipeline.stages.read`
    does.

    Raises UndecodableVideoError (not a video), CorruptVideoError (damaged before the last requested frame),
    TooShortVideoError, OversizedVideoError (above `max_pixels_per_frame`, or the memory limit of this process),
    VideoError (an invalid request), and OSError if the file cannot be opened.
    """
    _check_request(frames, height, width, start, stride, fit)
    with _opened(source, max_pixels_per_frame, name) as video:
        requested = islice(video.decode(deinterlace), start, start + (frames - 1) * stride + 1, stride)
        pictures, times = [], []
        for frame in requested:
            pictures.append(_fitted(video, frame, height, width, fit))
            times.append(frame.time)
        if len(pictures) < frames:
            _raise_too_short(video, frames, start, stride)
        fps = video.rate(times, stride)
        return Clip(np.stack(pictures), fps, video.notes)


def probe_video(source: str | Path | bytes, *, max_pixels_per_frame: int = MAX_PIXELS_PER_FRAME) -> VideoInfo:
    """Decode a whole video and return its properties; raises as `read_video`. For checking finished outputs."""
    with _opened(source, max_pixels_per_frame) as video:
        decoded = video.decode("off")
        first = next(decoded)
        swap, _, _ = _orientation(video.name, first)
        times = [first.time, *(frame.time for frame in decoded)]
        height, width = (first.width, first.height) if swap else (first.height, first.width)
        return VideoInfo(len(times), height, width, video.rate(times, 1))


def encode_video(frames: np.ndarray, fps: float | int, *, crf: int = CRF) -> bytes:
    """Return frames uint8 [T, H, W, 3] RGB as an H.264 mp4 (yuv420p, BT.709, index first), for any player.

    crf: see `CRF`. The same frames, fps and crf give the same bytes on one build of FFmpeg: one thread, no dates, no
    version tags. Raises VideoError for frames of another type or shape, odd heights or widths, an fps <= 0, and a crf
    out of range (0, lossless, is a profile that few players support).
    """
    _check_encodable(frames, fps, crf)
    # The muxer moves the index to the front by reopening its output, which needs a real file.
    with tempfile.TemporaryDirectory(prefix="encode-") as folder:
        path = Path(folder) / "video.mp4"
        options = {"movflags": "+faststart", "fflags": "+bitexact"}
        with av.open(str(path), "w", format="mp4", container_options=options) as container:
            _encode_into(container, frames, Fraction(fps).limit_denominator(100_000), crf)
        return path.read_bytes()


def write_video(path: str | Path, frames: np.ndarray, fps: float | int, *, crf: int = CRF) -> None:
    """Encode frames uint8 [T, H, W, 3] and write the file at `path` atomically.

    Raises what `encode_video` raises, and OSError if the folder is missing or not writable.
    """
    path = Path(path)
    content = encode_video(frames, fps, crf=crf)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class _Video:
    """One opened video stream: yields its frames in presentation order, counts them and collects notes."""

    def __init__(self, name: str, container: Any, max_pixels: int):
        self.name = name
        self.decoded = 0
        self._notes: dict[str, None] = {}
        self._skipped: Counter[str] = Counter()
        self._ticks: list[int | None] = []
        self._container = container
        self._max_pixels = max_pixels
        self._stream = _video_stream(name, container)
        self._check_size(self._stream.codec_context)
        self._stream.codec_context.thread_count = decoder_threads
        self._stream.codec_context.options = {"err_detect": _STRICT, "max_pixels": str(max_pixels)}
        self._reformatter = VideoReformatter()

    def rate(self, times: Sequence[float | None], stride: int) -> float:
        """Return the frames per second of frames at these times, `stride` frames apart."""
        raw = self._container.format.name in _RAW
        # The guess is the rate stated in the pictures; without a container FFmpeg's average is 25.
        rates = [self._stream.average_rate, self._stream.guessed_rate, self._stream.base_rate]
        stated = (raw and rates[1]) or next(filter(None, rates), None)
        if raw and not self._stream.codec_context.framerate:
            self._notes[f"frame rate: the file states none; taken as {float(stated or 0):.6g} frames per second"] = None
        known = [time for time in times if time is not None and math.isfinite(time)]
        gaps = np.diff(known) if len(known) == len(times) else np.zeros(0)
        # With a clock coarser than the frames some have the same time.
        longest = _PAUSE * np.median(gaps[gaps > 0]) if np.any(gaps > 0) else -1
        usual = gaps[(gaps >= 0) & (gaps <= longest)]
        if left_out := len(gaps) - len(usual):
            self._notes[f"pauses and joints between used frames, left out of their rate: {left_out}"] = None
        expected = stride * np.arange(1, len(usual) + 1)
        if not len(usual) or (stated and np.all(np.abs(np.cumsum(usual) * float(stated) - expected) <= 0.5)):
            return self._checked_rate(stated and float(stated)) / stride
        measured = self._checked_rate(float(f"{stride / np.mean(usual):.6g}")) / stride
        said = f"{float(stated):.6g} frames per second" if stated else "no frame rate"
        uneven = np.ptp(usual) > max(_EVEN_S, 2 * float(self._stream.time_base or 0))
        self._notes[
            f"{'variable frame rate' if uneven else 'frame rate'}: {measured:.6g} frames per second, by the used "
            f"frames' own times, which are {min(usual):.3g} to {max(usual):.3g} s apart; the file states {said}"
        ] = None
        return measured

    def _checked_rate(self, rate: float | None) -> float:
        if not rate:
            raise UndecodableVideoError(
                f"{self.name}: its {self._stream.codec_context.name} stream states no frame rate and its frames no "
                "times. Convert it to mp4 with a known rate (ffmpeg -r RATE -i IN OUT.mp4).",
                code="video-without-rate",
            )
        lowest, highest = _RATES
        if not lowest <= rate <= highest:
            raise UndecodableVideoError(
                f"{self.name}: its header states {rate:g} frames per second, expected {lowest:g} to {highest:g}. "
                "Most likely the header is damaged. Rewrite it with the true rate (ffmpeg -r RATE -i IN OUT.mp4).",
                code="video-rate-invalid",
            )
        return rate

    @property
    def notes(self) -> tuple[str, ...]:
        """Unusual steps of reading so far."""
        return (*(f"frames skipped {where}: {count}" for where, count in self._skipped.items() if count), *self._notes)

    @property
    def pixel_aspect(self) -> float:
        """Width of a coded pixel over its height."""
        return float(self._stream.sample_aspect_ratio or 1)

    @property
    def stated_frames(self) -> int:
        """Frame count in the container's header; 0 if it has none."""
        return self._stream.frames

    def decode(self, deinterlace: Deinterlacing) -> Iterator[Any]:
        """Yield the av.VideoFrames in presentation order, up to the first sign of damage."""
        try:
            for frame in self._progressive(self._frames(), deinterlace):
                self.decoded += 1
                yield frame
        except (
            VideoError,
            MemoryError,
        ):  # VideoError is a ValueError, but complete; MemoryError is handled by `_opened`
            raise
        except _FILE_ERRORS as error:
            _reraise_storage_error(error)
            self._raise_damaged(str(error), error)
        if self.decoded == 0:
            raise UndecodableVideoError(
                f"{self.name}: it has a {self._stream.codec_context.name} stream, but not one frame of it can be "
                "decoded. Most likely it was cut off. Fetch or export it again."
            )

    def _frames(self) -> Iterator[Any]:
        """Yield frames as they are coded, of each recording in turn if several were joined."""
        recording = _Recording()
        for packet, following in _with_following(self._container.demux(self._stream), _NEAR_JOINT):
            torn = recording.torn or any(one.is_corrupt for one in (packet, *following))
            if self._has_joint([recording.last, packet.dts], torn):
                for frame in self._stream.codec_context.decode(None):
                    frame.time_base = self._stream.time_base
                    if not frame.is_corrupt:
                        yield frame
                self._stream.codec_context.flush_buffers()
                recording = _Recording(joined=True)
            if packet.size == 0:
                if (
                    packet.dts is None
                ):  # end of stream; with a dts the picture is repeated, and a decoder would take it for the end
                    yield from self._timed(self._decode_packet(packet))
                continue
            recording.add(packet)
            if self._has_joint([recording.last, *(one.dts for one in following)], torn):
                self._skipped["at a joint of two recordings"] += 1  # a truncated packet may decode to anything
                continue
            if recording.awaits_keyframe and self._container.format.name in _BROADCAST:
                continue
            self._ticks.append(packet.dts)
            cut_off = packet.is_corrupt and any(one.is_keyframe for one in following)
            try:
                if packet.is_corrupt and not cut_off:
                    self._raise_damaged("a packet is incomplete")
                frames = self._decode_packet(packet)
            except (CorruptVideoError, av.FFmpegError):
                broken = self._container.format.name in _BROADCAST and not recording.settled
                has_times = self._container.format.name not in _WITHOUT_TIMES
                if not (cut_off or broken or recording.may_fail(packet, has_times)):
                    raise
                self._skipped["at a joint of two recordings"] += cut_off
                recording.failed += not cut_off and not recording.settled
                recording.awaits_keyframe |= packet.is_keyframe and not recording.settled
                continue
            if frames and not recording.settled:
                where = "at a joint of two recordings" if recording.joined else "before the first that can be decoded"
                self._skipped[where] += recording.settle(frames[0].pts)
                del self._ticks[: recording.failed]
            yield from self._timed(frames)

    def _has_joint(self, times: Sequence[int | None], torn: bool) -> bool:
        """Return whether recordings join between packets of these times. torn: a packet near them is incomplete."""
        if self._container.format.name not in _BROADCAST:
            return False
        known = [time for time in times if time is not None]
        steps = [(after - before) * self._stream.time_base for before, after in pairwise(known)]
        return any(step < -_JOINT_S / 2 or (torn and step > _JOINT_S) for step in steps)

    def _timed(self, frames: list[Any]) -> list[Any]:
        """Give frames without timestamps the times of the packets, which are as evenly spaced."""
        ticks, self._ticks = self._ticks[: len(frames)], self._ticks[len(frames) :]
        if self._container.format.name in _WITHOUT_TIMES:
            for frame, tick in zip_longest(frames, ticks):
                frame.pts = tick
        return frames

    def _progressive(self, frames: Iterable[Any], deinterlace: Deinterlacing) -> Iterator[Any]:
        """Yield frames as they are up to the first interlaced one, then through a filter that changes only those."""
        graph, shape = None, None
        for frame in frames:
            if frame.interlaced_frame:
                self._notes[
                    "interlaced: " + ("deinterlaced by bwdif" if deinterlace == "bwdif" else "left as it is")
                ] = None
            if graph is not None and shape != (frame.width, frame.height, frame.format.name):
                yield from _filtered(graph, None)
                graph = None
            if graph is None and frame.interlaced_frame and deinterlace == "bwdif":
                graph, shape = self._bwdif(frame), (frame.width, frame.height, frame.format.name)
            yield from [frame] if graph is None else _filtered(graph, frame)
        if graph is not None:
            yield from _filtered(graph, None)

    def _bwdif(self, frame: Any) -> Graph:
        """Return a filter from each interlaced frame to one progressive frame."""
        graph = Graph()
        graph.threads = 1
        source = graph.add_buffer(
            width=frame.width, height=frame.height, format=frame.format, time_base=self._stream.time_base
        )
        deinterlacer = graph.add("bwdif", "mode=send_frame:parity=auto:deint=interlaced")
        graph.link_nodes(source, deinterlacer, graph.add("buffersink")).configure()
        return graph

    def _decode_packet(self, packet: Any) -> list[Any]:
        frames = packet.decode()
        for frame in frames:
            self._check_size(frame)
            if frame.is_corrupt:
                self._raise_damaged("the decoder could not restore a frame")
        return frames

    def _check_size(self, sized: Any) -> None:
        if sized.width * sized.height > self._max_pixels:
            raise OversizedVideoError(
                f"{self.name}: its frames have {sized.width}x{sized.height} pixels, more than the accepted "
                f"{self._max_pixels}. Scale it down first, or raise the limit (in a job's spec references.max_pixels, "
                "elsewhere max_pixels_per_frame) if there is enough memory.",
                key="references.max_pixels",
            )

    def to_rgb(self, frame: Any) -> Picture:
        """Return the frame's picture as coded: not rotated, not scaled."""
        self._resolve_colours(frame)
        self._note_transparency(frame)
        # One converter for all frames, since each has its own threads.
        try:
            rgb = self._reformatter.reformat(frame, format="rgb24", interpolation=int(_SCALER))
            return rgb.to_ndarray()
        except MemoryError:
            raise
        except _FILE_ERRORS as error:
            raise UndecodableVideoError(
                f"{self.name}: its {frame.format.name} pictures cannot be converted to RGB ({error}). Convert it to "
                "H.264.",
                code="video-colours-unsupported",
            ) from error

    def _resolve_colours(self, frame: Any) -> None:
        """Set a frame's colour space if the file leaves it open; VideoError for unsupported ones."""
        if frame.color_trc in _HDR:
            self._notes[f"high dynamic range ({_HDR[frame.color_trc]}): not tone-mapped"] = None
        if frame.format.is_rgb:
            return
        if frame.colorspace not in _MATRICES:
            raise UndecodableVideoError(
                f"{self.name}: its colours are coded by matrix {frame.colorspace} of H.273 (8: YCgCo, 10: BT.2020 with "
                "constant luminance, 14: ICtCp), which is not supported. Convert it "
                "(ffmpeg -i IN -vf zscale=matrix=709 OUT.mp4).",
                code="video-colours-unsupported",
            )
        if frame.colorspace in _NO_MATRIX:
            frame.colorspace = _UNSPECIFIED
        # As players do; FFmpeg's scaler takes BT.601 for unspecified colours of any size.
        short, long = sorted((frame.width, frame.height))
        if frame.colorspace == _UNSPECIFIED and (short > 576 or long >= 1280):
            frame.colorspace = _BT709
            self._notes["colours: the file does not say which; read as BT.709, as is usual for high definition"] = None

    def _note_transparency(self, frame: Any) -> None:
        alpha = frame.format.name == "pal8" or any(component.is_alpha for component in frame.format.components)
        coded_separately = (
            self._stream.metadata.get("alpha_mode") == "1"
        )  # VP8 and VP9: a second picture that is not decoded
        if not (alpha or coded_separately) or _TRANSPARENT in self._notes:
            return
        if coded_separately or self._reformatter.reformat(frame, format="rgba").to_ndarray()[..., 3].min() < 255:
            self._notes[_TRANSPARENT] = None

    def _raise_damaged(self, what: str, cause: Exception | None = None) -> NoReturn:
        raise CorruptVideoError(
            f"{self.name}: damaged near frame {self.decoded}, before the last requested frame ({what}). Most likely "
            "the file was cut off or changed in transfer. Fetch it again, or re-encode the part that plays."
        ) from cause


class _Recording:
    """State of one recording in a stream, until its first frame is decoded."""

    def __init__(self, joined: bool = False):
        self.joined = joined
        self.settled = False
        self.awaits_keyframe = True
        self.last: int | None = None
        self.failed = 0
        """Packets that failed to decode before the first frame."""
        self._incomplete: deque[bool] = deque(maxlen=_NEAR_JOINT)
        self._begins = True
        self._cut = False
        self._keyframe: int | None = None
        self._times: list[int] = []

    def add(self, packet: Any) -> None:
        """Record the next packet."""
        self._incomplete.append(packet.is_corrupt)
        if self._begins:
            self._begins, self._cut = False, not packet.is_keyframe
        self.last = self.last if packet.dts is None else packet.dts
        if self.awaits_keyframe and packet.is_keyframe:
            self.awaits_keyframe, self._keyframe = False, packet.pts
        if not self.settled and not packet.is_discard and packet.pts is not None:
            self._times.append(packet.pts)

    @property
    def torn(self) -> bool:
        """Whether one of the last packets is incomplete."""
        return any(self._incomplete)

    def may_fail(self, packet: Any, has_times: bool) -> bool:
        """Return whether a packet may depend on earlier pictures: it is presented before the first keyframe."""
        if None in (packet.pts, self._keyframe) or not has_times:
            return not self.settled
        return packet.pts < self._keyframe or (self._cut and not self.settled)

    def settle(self, first: int | None) -> int:
        """Return how many frames precede the first decoded one."""
        self.settled = True
        return max(self.failed, 0 if first is None else sum(time < first for time in self._times))


def _with_following(packets: Iterable[Any], count: int) -> Iterator[tuple[Any, list[Any]]]:
    """Yield each packet with up to `count` following ones."""
    waiting: deque[Any] = deque()
    for packet in packets:
        waiting.append(packet)
        if len(waiting) > count:
            yield waiting.popleft(), list(waiting)
    while waiting:
        yield waiting.popleft(), list(waiting)


def _filtered(graph: Graph, frame: Any) -> Iterator[Any]:
    """Yield the output of a filter for one more frame; None flushes it."""
    graph.vpush(frame)
    while True:
        try:
            yield graph.vpull()
        except (av.BlockingIOError, av.EOFError):
            return


class _ReferenceRefusedError(Exception):
    """A playlist refers to another file or address."""


_FILE_ERRORS = (av.FFmpegError, _ReferenceRefusedError, OSError, ValueError)
"""Errors that PyAV raises for a bad file. Damaged headers make demuxers seek to invalid positions, for which Python
raises OSError (files) or ValueError (bytes)."""


def _reraise_storage_error(error: Exception) -> None:
    """Re-raise an error of the disk or network, which is not an error of the video."""
    if isinstance(error, OSError) and not isinstance(error, av.FFmpegError) and error.errno != errno.EINVAL:
        raise error


@contextmanager
def _opened(source: str | Path | bytes, max_pixels: int, name: str | None = None) -> Iterator[_Video]:
    name = name or (f"<{len(source)} bytes>" if isinstance(source, bytes) else str(source))
    # Not opened by FFmpeg, which may take a path for a URL, a device or a numbered sequence.
    try:
        with _file(source) as file, _container(name, file, max_pixels) as container:
            yield _Video(name, container, max_pixels)
    except MemoryError:
        # Without a cause: the file needs this memory on every attempt, so the error is not transient.
        raise OversizedVideoError(
            f"{name}: reading it takes more memory than the reader may use. Its codec keeps many large frames, its "
            f"index has millions of frames, or it has more than {_MAX_STREAMS} streams. Re-encode the used part, or "
            "raise the limit (references.max_memory_bytes in a job's spec).",
            code="video-needs-memory",
            key="references.max_memory_bytes",
        ) from None


def _file(source: str | Path | bytes) -> io.BufferedIOBase:
    if isinstance(source, bytes):
        return io.BytesIO(source)
    mode = os.stat(source).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # opening a FIFO blocks until there is a writer
        raise UndecodableVideoError(
            f"{source}: it is not a regular file. Write its content into one.", code="video-not-a-file"
        )
    return Path(source).open("rb")


def _container(name: str, file: io.BufferedIOBase, max_pixels: int) -> Any:
    container = {"format_whitelist": _FORMATS, "protocol_whitelist": _NO_PROTOCOL, "max_streams": str(_MAX_STREAMS)}
    # FFmpeg decodes a frame of every stream to find its size, whatever its number of pixels.
    streams = {"max_pixels": str(max_pixels)}
    try:
        return av.open(
            file,
            "r",
            options=streams,
            container_options=container,
            io_open=_refuse_references,
            metadata_errors="replace",
        )
    except MemoryError:
        raise
    except _FILE_ERRORS as error:
        _reraise_storage_error(error)
        raise UndecodableVideoError(
            f"{name}: not a video that FFmpeg can open: {_probable_cause(file)}. "
            "Fetch or export it again, and try `ffprobe` on it.",
            code="not-a-video",
        ) from error


def _refuse_references(url: str, flags: int, options: dict[str, str]) -> NoReturn:
    """Refuse to open what a playlist refers to: addresses, or other files of this machine."""
    raise _ReferenceRefusedError(url)


def _video_stream(name: str, container: Any) -> Any:
    """Return the main video stream; cover art, also stored as a video stream, does not count."""
    stream = container.streams.best("video")
    if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
        kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "no streams at all"
        cover = "; its only picture is cover art" if stream is not None else ""
        raise UndecodableVideoError(
            f"{name}: a {container.format.name} file without a video stream: it holds {kinds}{cover}. "
            "Use a file with a video stream.",
            code="no-video-stream",
        )
    if stream.codec_context is None or stream.codec_context.width == 0:
        raise UndecodableVideoError(
            f"{name}: its video stream's format or size cannot be found. Most likely the file is cut off or its "
            "codec is unknown to this FFmpeg. Fetch it again, or convert it to H.264."
        )
    return stream


def _probable_cause(file: io.BufferedIOBase) -> str:
    file.seek(0)
    head = file.read(64)
    if not head:
        return "it is empty (0 bytes), as an interrupted download leaves it"
    boxes = _top_level_boxes(file)
    if head.startswith(b"\xff\xd8\xff") and b"\xff\xd9\xff\xd8" in file.read(_PROBE_BYTES):
        return "it is Motion JPEG without a container, which states no rate: ffmpeg -framerate RATE -i IN OUT.mp4"
    if head.startswith((b"\x89PNG", b"\xff\xd8\xff", b"BM", b"II*\0", b"MM\0*")):
        return "it is a still picture"
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "it is WebP, still or animated, which is not supported; convert it to mp4"
    if head[4:8] == b"ftyp" and head[8:12] in _STILL_BRANDS:
        return "it is a picture (HEIF or AVIF), not a video"
    if b"ftyp" in boxes and b"moov" not in boxes:
        return "its mp4 index (moov) is missing: the file was cut off, or its writer never finished"
    if b"ftyp" in boxes or head.startswith((b"\x1aE\xdf\xa3", b"RIFF")):
        return "its header is there but damaged, or the file is cut off"
    if all(32 <= byte < 127 or byte in b"\t\r\n" for byte in head):
        return "it is text (an error page, a playlist or a Git LFS pointer?)"
    return "its content is no known video format, or the beginning is damaged"


def _top_level_boxes(file: io.BufferedIOBase) -> set[bytes]:
    """Return the names of the top-level boxes of an mp4 or mov file; arbitrary bytes for other files."""
    names: set[bytes] = set()
    end, offset = file.seek(0, io.SEEK_END), 0
    for _ in range(_MAX_BOXES):
        if offset + 16 > end:
            break
        file.seek(offset)
        size, name, long_size = struct.unpack(">I4sQ", file.read(16))
        size = long_size if size == 1 else size
        names.add(name)
        if size < 8:
            break
        offset += size
    return names


def _fitted(video: _Video, frame: Any, height: int, width: int, fit: str) -> Picture:
    """Return one frame as upright uint8 [height, width, 3]."""
    swap, flip_rows, flip_columns = _orientation(video.name, frame)
    picture = video.to_rgb(frame)
    picture = picture.transpose(1, 0, 2) if swap else picture
    picture = picture[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]
    if fit == "crop":
        pixel_aspect = 1 / video.pixel_aspect if swap else video.pixel_aspect
        picture = _cropped(picture, width / height / pixel_aspect)
    return _resized(np.ascontiguousarray(picture), height, width)


def _orientation(name: str, frame: Any) -> tuple[bool, bool, bool]:
    """Return how to turn a decoded frame upright: (swap rows and columns, then flip rows, then flip columns).

    The display matrix maps a coded point (x, y) to (a x + c y, b x + d y), y pointing down. `frame.rotation` is not
    enough: it reports a mirrored picture as rotated.
    """
    # Not frame.side_data: the frame caches it, and the reference cycle would keep every frame's memory.
    matrix = SideDataContainer(frame).get("DISPLAYMATRIX")  # type: ignore[call-arg]  # its stub has no constructor
    if matrix is None:
        return False, False, False
    a, b, _, c, d = struct.unpack("=5i", bytes(matrix)[:20])
    if abs(a) > 100 * abs(b) and abs(d) > 100 * abs(c):
        return False, d < 0, a < 0
    if abs(b) > 100 * abs(a) and abs(c) > 100 * abs(d):
        return True, b < 0, c < 0
    raise UndecodableVideoError(
        f"{name}: its display matrix turns the picture by {math.degrees(math.atan2(-b, a)):.1f} degrees, and only "
        "right angles are supported. Re-encode it upright.",
        code="video-rotation-unsupported",
    )


def _cropped(picture: Picture, aspect: float) -> Picture:
    """Return the largest centred part with about `aspect` columns per row, in whole pixels."""
    rows, columns = picture.shape[:2]
    kept_rows = min(rows, max(1, round(columns / aspect)))
    kept_columns = min(columns, max(1, round(rows * aspect)))
    top, left = (rows - kept_rows) // 2, (columns - kept_columns) // 2
    return picture[top : top + kept_rows, left : left + kept_columns]


def _resized(picture: Picture, height: int, width: int) -> Picture:
    """Shrink by area averaging, which does not alias, then enlarge by cubic interpolation."""
    rows, columns = min(picture.shape[0], height), min(picture.shape[1], width)
    picture = cv2.resize(picture, (columns, rows), interpolation=cv2.INTER_AREA)
    return cv2.resize(picture, (width, height), interpolation=cv2.INTER_CUBIC)


def _encode_into(container: Any, frames: np.ndarray, rate: Fraction, crf: int) -> None:
    stream = container.add_stream("libx264", rate=rate, options={"crf": str(crf), "x264-params": _REPRODUCIBLE})
    stream.height, stream.width = frames.shape[1:3]
    stream.pix_fmt = "yuv420p"
    context = stream.codec_context
    context.thread_count = 1  # the number of threads changes x264's decisions
    # Without a tag players guess the colour space from the size, and differ.
    context.colorspace = context.color_primaries = context.color_trc = _BT709
    context.color_range = _LIMITED_RANGE
    for index, picture in enumerate(frames):
        rgb = av.VideoFrame.from_ndarray(picture, format="rgb24")
        frame = rgb.reformat(
            format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG", interpolation=int(_SCALER)
        )
        frame.pts, frame.time_base = index, 1 / rate
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def _check_request(frames: int, height: int, width: int, start: int, stride: int, fit: str) -> None:
    sizes = {"frames": frames, "height": height, "width": width, "stride": stride}
    for name, value in sizes.items():
        if value < 1:
            raise VideoError(f"{name} is {value}, expected 1 or more.")
    if start < 0:
        raise VideoError(f"start is {start}, expected 0 or more: frames are counted from the first one.")
    if fit not in ("crop", "stretch"):
        raise VideoError(f"fit is {fit!r}, expected 'crop' or 'stretch'.")


def _check_encodable(frames: np.ndarray, fps: float | int, crf: int) -> None:
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or frames.size == 0:
        raise VideoError(
            f"frames are {frames.dtype} {list(frames.shape)}, expected uint8 [T, H, W, 3] RGB with T >= 1. "
            "Pictures in 0..1 must be multiplied by 255 and rounded; channels come last.",
            code="frames-not-encodable",
        )
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise VideoError(
            f"frames are {width}x{height}, and H.264 with 4:2:0 colour needs an even width and height. "
            "Crop or pad one row or column.",
            code="frames-not-encodable",
        )
    if not (math.isfinite(fps) and fps > 0):
        raise VideoError(f"fps is {fps}, expected a number above 0.")
    if not 1 <= crf <= 51:
        raise VideoError(f"crf is {crf}, expected 1 (best) to 51.")


def _raise_too_short(video: _Video, frames: int, start: int, stride: int) -> NoReturn:
    usable = len(range(start, video.decoded, stride))
    fewer = f"ask for at most {usable} frames, lower stride or start" if usable else "start earlier"
    stated = f"Its header states {video.stated_frames}" if video.stated_frames > video.decoded else "If it had more"
    raise TooShortVideoError(
        f"{video.name}: {frames} frames with stride {stride} from frame {start} were requested, it has "
        f"only {video.decoded}. Take a longer video, or {fewer}. {stated}: it is cut off or damaged."
    )
