"""Video files in and out, with PyAV: decode, turn upright, crop, resize; encode the same bytes every time.

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
from typing import Any, Literal, NoReturn

import av
import cv2
import numpy as np
from av.filter import Graph
from av.sidedata.sidedata import SideDataContainer
from av.video.reformatter import Interpolation, VideoReformatter
from jaxtyping import UInt8

Picture = UInt8[np.ndarray, "_ _ 3"]

MAX_PIXELS_PER_FRAME = 8192 * 4320
"""Largest frame that is decoded unless the caller says otherwise: 8K cinema, 106 MB as RGB."""

_STRICT = "crccheck+bitstream+buffer+explode"
"""FFmpeg's err_detect: report damage. Its default is to paint over the damaged parts and to go on."""
CRF = 12
"""x264's quality, from 1 (best) to 51: 12 cannot be told from the source, and metrics barely notice it."""
_REPRODUCIBLE = "cpu-independent=1"
"""x264's fast approximate division (macroblock tree) gives other bytes on another processor, and, as seen with
x264 165, now and then on the same one; this takes the exact division."""
_SCALER = Interpolation.BICUBIC | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
"""swscale's careful way between YUV and RGB. Its default repeats chroma samples, which costs 15 dB in smooth colours,
and may round otherwise on another processor."""
decoder_threads = 0
"""Threads of each decoder; 0: FFmpeg's choice, one for each CPU on which the process may run."""
_BT709 = 1
_UNSPECIFIED = 2
_NO_MATRIX = {0, 3}
"""RGB and a reserved number: files say so of YUV by mistake, and mean no more by it than by saying nothing."""
_MATRICES = {0, 1, 2, 3, 4, 5, 6, 7, 9}
"""How YUV is made of RGB (H.273), where it can be undone: not YCgCo, constant luminance and the like."""
_LIMITED_RANGE = 1
_HDR = {16: "PQ", 18: "HLG"}
"""Transfer characteristics of high dynamic range."""
_TRANSPARENT = "transparent: shown as if it were opaque"
Deinterlacing = Literal["bwdif", "off"]
_BROADCAST = {"mpegts", "mpeg"}
"""Formats that are cut and joined anywhere; what is a keyframe is found by looking into the pictures."""
_WITHOUT_TIMES = {"avi", "h264", "hevc", "m4v", "mjpeg", "mpegvideo", "obu"}
"""Formats whose frames have no times of their own: they count packets at one rate, and decoders guess from these."""
_RAW = _WITHOUT_TIMES - {"avi"}
"""Formats that are nothing but coded pictures."""
_JOINT_S = 1.0
"""Where several transport streams were joined, their clock steps back by half of this or more (by less, segments of one
recording overlap); or forward by more, beside a packet that is incomplete: a recording may stand still so long."""
_NEAR_JOINT = 3
"""Packets between one that the joint cut off and the joint: parsers are late by a picture or two."""
_EVEN_S = 1e-3
"""How much gaps between frames differ by being rounded."""
_PAUSE = 2.5
"""How many times longer than usual a frame is shown where a video stands still."""
_FORMATS = (
    "mov,matroska,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,mxf,nut,dv,gif,apng,yuv4mpegpipe,h264,hevc,m4v,mjpeg,ivf,obu,"
    "wav,mp3,flac,aac"
)
"""Containers that are opened; sound alone is among them so that it can be told from nonsense. FFmpeg knows hundreds
more, and some of these do more than to be read: an SDP text, whatever its name, opens a network port, and waits."""
_NO_PROTOCOL = "none"
_MOST_STREAMS = 100
"""Each stream of a file costs a decoder and its buffers while the file is opened."""
_MOST_BOXES = 1000
_START = 2**22
"""How much of a file is looked at to say what it is."""
_STILL_BRANDS = {b"heic", b"heix", b"mif1", b"avif"}
_RATES = (1e-3, 1e4)
"""Frames per second that a video can have: from one in a quarter of an hour to a high-speed camera's."""


class VideoError(ValueError):
    """A video, or what was asked of one, is not usable. Every error of this module is one of these."""


class UndecodableVideoError(VideoError):
    """The source is no video, or not one frame of it can be decoded."""


class CorruptVideoError(UndecodableVideoError):
    """The video is damaged or cut off before the last wanted frame."""


class TooShortVideoError(VideoError):
    """The video has fewer frames than were asked for."""


class OversizedVideoError(VideoError):
    """The video's frames have more pixels than the caller accepts, or reading it takes more memory than there is."""


@dataclass(frozen=True)
class Clip:
    """Frames uint8 [T, H, W, 3] RGB, and how many of them are shown per second.

    notes: what a reader of the video should know of how it was read, such as that it was deinterlaced.
    """

    frames: UInt8[np.ndarray, "frames height width 3"]
    fps: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class VideoInfo:
    """What decoding a whole video found: frame count, upright size in coded pixels, mean frames per second."""

    frames: int
    height: int
    width: int
    fps: float


def is_selection(value: Any) -> bool:
    """Whether a JSON value says which frames of a video are used and at which size, by keywords of `read_video`."""
    counts = {"frames", "height", "width", "stride"}
    return (
        isinstance(value, dict)
        and value.keys() - {"deinterlace"} == counts | {"start", "fit"}
        and all(type(value[key]) is int and 0 < value[key] < 2**31 for key in counts)
        and type(value["start"]) is int
        and 0 <= value["start"] < 2**31
        and value["fit"] in ("crop", "stretch")
        and value.get("deinterlace", "off") == "off"
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

    Frames are counted as they are shown; their times choose none. The clip's fps is the rate that the source states,
    divided by `stride`, where the used frames are shown at that rate; else it is the mean of their own times, without
    pauses. Frames before the first one that can be decoded are skipped, in a stream that starts or was joined inside a
    group of pictures. Interlaced frames are deinterlaced, one frame of each, unless `deinterlace` is off. Colours are
    read as the file says; where it says nothing, high definition is BT.709, and the rest BT.601. What of this was done
    is in the clip's notes.

    Each picture is turned upright (rotation and mirroring of the display matrix) and then fitted: `crop` keeps the
    largest centred part that has the asked shape, pixel aspect ratio included, so directions of motion stay true;
    `stretch` squeezes the whole picture in. Alpha is dropped and HDR not tone-mapped, with a note. Damage is an error
    where the decoder notices it: headers, missing data, broken syntax. Changed bytes inside a picture can decode to
    plausible wrong pixels, since most codecs carry no checksum.

    `source` is a local path (never a URL), or the file's bytes, which errors then call `name`. Only one unscaled
    picture is held at a time (of interlaced videos a few), and decoding stops with the last wanted frame: a video of a
    million frames costs no more than a short one. The memory that its index may take is for the caller to bound:
    `pipeline.stages.read` does.

    Raises UndecodableVideoError (no video in it), CorruptVideoError (damaged before the last wanted frame),
    TooShortVideoError, OversizedVideoError (above `max_pixels_per_frame`, or more than the memory that this process
    may use), VideoError (a request that makes no sense), and OSError if the file cannot be opened.
    """
    _check_request(frames, height, width, start, stride, fit)
    with _opened(source, max_pixels_per_frame, name) as video:
        wanted = islice(video.decode(deinterlace), start, start + (frames - 1) * stride + 1, stride)
        pictures, times = [], []
        for frame in wanted:
            pictures.append(_fitted(video, frame, height, width, fit))
            times.append(frame.time)
        if len(pictures) < frames:
            _raise_too_short(video, frames, start, stride)
        fps = video.rate(times, stride)
        return Clip(np.stack(pictures), fps, video.notes)


def probe_video(source: str | Path | bytes, *, max_pixels_per_frame: int = MAX_PIXELS_PER_FRAME) -> VideoInfo:
    """Decode a whole video and return what was found; same errors as `read_video`. Checks finished outputs."""
    with _opened(source, max_pixels_per_frame) as video:
        decoded = video.decode("off")
        first = next(decoded)
        swap, _, _ = _orientation(video.name, first)
        times = [first.time, *(frame.time for frame in decoded)]
        height, width = (first.width, first.height) if swap else (first.height, first.width)
        return VideoInfo(len(times), height, width, video.rate(times, 1))


def encode_video(frames: np.ndarray, fps: float | int, *, crf: int = CRF) -> bytes:
    """Return frames uint8 [T, H, W, 3] RGB as an H.264 mp4 (yuv420p, BT.709, index first), made for any player.

    crf: see `CRF`. The same frames, fps and crf give the same bytes, on one build of FFmpeg: one thread, no dates, no
    version tags.
    Raises VideoError for frames of another type or shape, for odd heights or widths, for an fps <= 0, and for a crf
    out of range (0, lossless, is a profile that few players know).
    """
    _check_encodable(frames, fps, crf)
    # The muxer moves the index to the front by opening its own output again, which only a real file allows.
    with tempfile.TemporaryDirectory(prefix="encode-") as folder:
        path = Path(folder) / "video.mp4"
        options = {"movflags": "+faststart", "fflags": "+bitexact"}
        with av.open(str(path), "w", format="mp4", container_options=options) as container:
            _encode_into(container, frames, Fraction(fps).limit_denominator(100_000), crf)
        return path.read_bytes()


def write_video(path: str | Path, frames: np.ndarray, fps: float | int, *, crf: int = CRF) -> None:
    """Encode frames uint8 [T, H, W, 3] and put the file at `path` in one move: it is never there half-written.

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
    """One opened video stream: gives its frames in the order they are shown, counts them, notes how they were read."""

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
        """Frames per second of the frames at these times, each `stride` frames after the one before."""
        raw = self._container.format.name in _RAW
        # The guess is the rate that the pictures state; FFmpeg's average is 25 where there is no container.
        rates = [self._stream.average_rate, self._stream.guessed_rate, self._stream.base_rate]
        stated = (raw and rates[1]) or next(filter(None, rates), None)
        if raw and not self._stream.codec_context.framerate:
            self._notes[f"frame rate: the file states none; taken as {float(stated or 0):.6g} frames per second"] = None
        known = [time for time in times if time is not None and math.isfinite(time)]
        gaps = np.diff(known) if len(known) == len(times) else np.zeros(0)
        # Clocks that are coarser than the frames give some of them one time.
        most = _PAUSE * np.median(gaps[gaps > 0]) if np.any(gaps > 0) else -1
        usual = gaps[(gaps >= 0) & (gaps <= most)]
        if left_out := len(gaps) - len(usual):
            self._notes[f"pauses and joints between used frames, left out of their rate: {left_out}"] = None
        wanted = stride * np.arange(1, len(usual) + 1)
        if not len(usual) or (stated and np.all(np.abs(np.cumsum(usual) * float(stated) - wanted) <= 0.5)):
            return self._checked(stated and float(stated)) / stride
        measured = self._checked(float(f"{stride / np.mean(usual):.6g}")) / stride
        said = f"{float(stated):.6g} frames per second" if stated else "no frame rate"
        uneven = np.ptp(usual) > max(_EVEN_S, 2 * float(self._stream.time_base or 0))
        self._notes[
            f"{'variable frame rate' if uneven else 'frame rate'}: {measured:.6g} frames per second, by the used "
            f"frames' own times, which are {min(usual):.3g} to {max(usual):.3g} s apart; the file states {said}"
        ] = None
        return measured

    def _checked(self, rate: float | None) -> float:
        if not rate:
            raise UndecodableVideoError(
                f"{self.name}: its {self._stream.codec_context.name} stream states no frame rate and its frames no "
                "times. Convert it to mp4 with a known rate (ffmpeg -r RATE -i IN OUT.mp4)."
            )
        least, most = _RATES
        if not least <= rate <= most:
            raise UndecodableVideoError(
                f"{self.name}: its header speaks of {rate:g} frames per second, expected {least:g} to {most:g}. "
                "Most likely the header is damaged. Write it anew with the true rate (ffmpeg -r RATE -i IN OUT.mp4)."
            )
        return rate

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the video should know of how its frames were read so far."""
        return (*(f"frames skipped {where}: {count}" for where, count in self._skipped.items() if count), *self._notes)

    @property
    def pixel_aspect(self) -> float:
        """Width of a coded pixel over its height."""
        return float(self._stream.sample_aspect_ratio or 1)

    @property
    def promised(self) -> int:
        """Frames that the container's header speaks of; 0 if it does not say."""
        return self._stream.frames

    def decode(self, deinterlace: Deinterlacing) -> Iterator[Any]:
        """Yield the av.VideoFrames in the order they are shown, up to the first sign of damage."""
        try:
            for frame in self._progressive(self._frames(), deinterlace):
                self.decoded += 1
                yield frame
        except (VideoError, MemoryError):  # a ValueError too, and said already; no fault of this frame
            raise
        except _FILE_ERRORS as error:
            _let_pass_if_storage_failed(error)
            self._raise_damaged(str(error), error)
        if self.decoded == 0:
            raise UndecodableVideoError(
                f"{self.name}: it announces a {self._stream.codec_context.name} stream, but not one frame of it can "
                "be decoded. Most likely it was cut off. Fetch or export it again."
            )

    def _frames(self) -> Iterator[Any]:
        """Frames as they are coded, of one recording after the other where several were joined."""
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
                if packet.dts is None:  # the end; else nothing new is shown, and a decoder would take it for the end
                    yield from self._timed(self._decode_packet(packet))
                continue
            recording.add(packet)
            if self._has_joint([recording.last, *(one.dts for one in following)], torn):
                self._skipped["at a joint of two recordings"] += 1  # what is cut off may decode to anything
                continue
            if recording.waits and self._container.format.name in _BROADCAST:
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
                recording.waits |= packet.is_keyframe and not recording.settled
                continue
            if frames and not recording.settled:
                where = "at a joint of two recordings" if recording.joined else "before the first that can be decoded"
                self._skipped[where] += recording.settle(frames[0].pts)
                del self._ticks[: recording.failed]
            yield from self._timed(frames)

    def _has_joint(self, times: Sequence[int | None], torn: bool) -> bool:
        """Whether recordings meet between packets of these times. torn: whether a packet near them is incomplete."""
        if self._container.format.name not in _BROADCAST:
            return False
        known = [time for time in times if time is not None]
        steps = [(after - before) * self._stream.time_base for before, after in pairwise(known)]
        return any(step < -_JOINT_S / 2 or (torn and step > _JOINT_S) for step in steps)

    def _timed(self, frames: list[Any]) -> list[Any]:
        """Give frames that have no times of their own those of the packets, in which they come as evenly."""
        ticks, self._ticks = self._ticks[: len(frames)], self._ticks[len(frames) :]
        if self._container.format.name in _WITHOUT_TIMES:
            for frame, tick in zip_longest(frames, ticks):
                frame.pts = tick
        return frames

    def _progressive(self, frames: Iterable[Any], deinterlace: Deinterlacing) -> Iterator[Any]:
        """Frames as they are up to the first interlaced one, then through a filter that alters only such frames."""
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
        """A filter that makes one progressive frame of each interlaced one."""
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
                "elsewhere max_pixels_per_frame) if the memory is there."
            )

    def to_rgb(self, frame: Any) -> Picture:
        """The frame's picture as it is coded: not turned, not scaled."""
        self._see_to_colours(frame)
        self._note_transparency(frame)
        # One converter for all frames, since each holds threads of its own.
        try:
            rgb = self._reformatter.reformat(frame, format="rgb24", interpolation=int(_SCALER))
            return rgb.to_ndarray()
        except MemoryError:
            raise
        except _FILE_ERRORS as error:
            raise UndecodableVideoError(
                f"{self.name}: its {frame.format.name} pictures cannot be turned into RGB ({error}). Convert to H.264."
            ) from error

    def _see_to_colours(self, frame: Any) -> None:
        """Say how a frame's colours are coded where the file does not; VideoError for what cannot be read."""
        if frame.color_trc in _HDR:
            self._notes[f"high dynamic range ({_HDR[frame.color_trc]}): not tone-mapped"] = None
        if frame.format.is_rgb:
            return
        if frame.colorspace not in _MATRICES:
            raise UndecodableVideoError(
                f"{self.name}: its colours are coded by matrix {frame.colorspace} of H.273 (8: YCgCo, 10: BT.2020 with "
                "constant luminance, 14: ICtCp), which cannot be read here. Convert it "
                "(ffmpeg -i IN -vf zscale=matrix=709 OUT.mp4)."
            )
        if frame.colorspace in _NO_MATRIX:
            frame.colorspace = _UNSPECIFIED
        # As players do; FFmpeg's scaler takes BT.601 for whatever is not said, of any size.
        short, long = sorted((frame.width, frame.height))
        if frame.colorspace == _UNSPECIFIED and (short > 576 or long >= 1280):
            frame.colorspace = _BT709
            self._notes["colours: the file does not say which; read as BT.709, as is usual for high definition"] = None

    def _note_transparency(self, frame: Any) -> None:
        alpha = frame.format.name == "pal8" or any(component.is_alpha for component in frame.format.components)
        coded_apart = self._stream.metadata.get("alpha_mode") == "1"  # VP8 and VP9: a picture that is not decoded
        if not (alpha or coded_apart) or _TRANSPARENT in self._notes:
            return
        if coded_apart or self._reformatter.reformat(frame, format="rgba").to_ndarray()[..., 3].min() < 255:
            self._notes[_TRANSPARENT] = None

    def _raise_damaged(self, what: str, cause: Exception | None = None) -> NoReturn:
        raise CorruptVideoError(
            f"{self.name}: damaged near frame {self.decoded}, before the last wanted frame ({what}). Most likely the "
            "file was cut off or changed on its way. Fetch it again, or re-encode the part that plays."
        ) from cause


class _Recording:
    """What has been seen of one recording in a stream, until its first frame was decoded."""

    def __init__(self, joined: bool = False):
        self.joined = joined
        self.settled = False
        self.waits = True
        """Whether no keyframe has come yet."""
        self.last: int | None = None
        self.failed = 0
        """Packets that could not be decoded before the first frame was."""
        self._incomplete: deque[bool] = deque(maxlen=_NEAR_JOINT)
        self._begins = True
        self._cut = False
        self._keyframe: int | None = None
        self._times: list[int] = []

    def add(self, packet: Any) -> None:
        """Take notice of the next packet."""
        self._incomplete.append(packet.is_corrupt)
        if self._begins:
            self._begins, self._cut = False, not packet.is_keyframe
        self.last = self.last if packet.dts is None else packet.dts
        if self.waits and packet.is_keyframe:
            self.waits, self._keyframe = False, packet.pts
        if not self.settled and not packet.is_discard and packet.pts is not None:
            self._times.append(packet.pts)

    @property
    def torn(self) -> bool:
        """Whether one of the last packets is incomplete."""
        return any(self._incomplete)

    def may_fail(self, packet: Any, has_times: bool) -> bool:
        """Whether a packet may need pictures from before the recording: it is shown before the first keyframe is."""
        if None in (packet.pts, self._keyframe) or not has_times:
            return not self.settled
        return packet.pts < self._keyframe or (self._cut and not self.settled)

    def settle(self, first: int | None) -> int:
        """Return how many frames should have been shown before the first one that was decoded."""
        self.settled = True
        return max(self.failed, 0 if first is None else sum(time < first for time in self._times))


def _with_following(packets: Iterable[Any], count: int) -> Iterator[tuple[Any, list[Any]]]:
    """Each packet with up to `count` that follow it."""
    waiting: deque[Any] = deque()
    for packet in packets:
        waiting.append(packet)
        if len(waiting) > count:
            yield waiting.popleft(), list(waiting)
    while waiting:
        yield waiting.popleft(), list(waiting)


def _filtered(graph: Graph, frame: Any) -> Iterator[Any]:
    """Frames that a filter gives for one more frame; None is the end."""
    graph.vpush(frame)
    while True:
        try:
            yield graph.vpull()
        except (av.BlockingIOError, av.EOFError):
            return


class _ReferenceRefusedError(Exception):
    """A playlist asked for another file or address."""


_FILE_ERRORS = (av.FFmpegError, _ReferenceRefusedError, OSError, ValueError)
"""What comes out of PyAV for a bad file. Damaged headers make demuxers seek to impossible places, and Python's own
file errors then come through: OSError from files, ValueError from bytes."""


def _let_pass_if_storage_failed(error: Exception) -> None:
    """Raise errors of the disk or network again, as they are: they say nothing about the video."""
    if isinstance(error, OSError) and not isinstance(error, av.FFmpegError) and error.errno != errno.EINVAL:
        raise error


@contextmanager
def _opened(source: str | Path | bytes, max_pixels: int, name: str | None = None) -> Iterator[_Video]:
    name = name or (f"<{len(source)} bytes>" if isinstance(source, bytes) else str(source))
    # Opened by us and not by FFmpeg: a path can then never be taken for a URL, a device or a numbered sequence.
    try:
        with _file(source) as file, _container(name, file, max_pixels) as container:
            yield _Video(name, container, max_pixels)
    except MemoryError:
        # Without a cause: the file costs this on every try, so it is no passing lack of memory.
        raise OversizedVideoError(
            f"{name}: reading it takes more memory than the reader may use. Its frames are large and kept in numbers, "
            f"its index speaks of millions of frames, or it has more than {_MOST_STREAMS} streams. Re-encode the part "
            "that is used, or raise the limit (references.max_memory_bytes in a job's spec)."
        ) from None


def _file(source: str | Path | bytes) -> io.BufferedIOBase:
    if isinstance(source, bytes):
        return io.BytesIO(source)
    mode = os.stat(source).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # opening a FIFO waits for its writer, perhaps for ever
        raise UndecodableVideoError(f"{source}: it is no regular file. Write its content into one.")
    return Path(source).open("rb")


def _container(name: str, file: io.BufferedIOBase, max_pixels: int) -> Any:
    container = {"format_whitelist": _FORMATS, "protocol_whitelist": _NO_PROTOCOL, "max_streams": str(_MOST_STREAMS)}
    # FFmpeg decodes a frame of every stream to find out its size, with as many pixels as it has.
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
        _let_pass_if_storage_failed(error)
        raise UndecodableVideoError(
            f"{name}: not a video that FFmpeg can open: {_probable_cause(file)}. "
            "Fetch or export it again, and try `ffprobe` on it."
        ) from error


def _refuse_references(url: str, flags: int, options: dict[str, str]) -> NoReturn:
    """A playlist must not make us fetch addresses or read other files of this machine."""
    raise _ReferenceRefusedError(url)


def _video_stream(name: str, container: Any) -> Any:
    """The main video stream; cover art, which containers also keep as a video stream, does not count."""
    stream = container.streams.best("video")
    if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
        kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "no streams at all"
        cover = "; its only picture is cover art" if stream is not None else ""
        raise UndecodableVideoError(
            f"{name}: a {container.format.name} file without a video stream: it holds {kinds}{cover}. "
            "Give a file that holds moving pictures."
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
    if head.startswith(b"\xff\xd8\xff") and b"\xff\xd9\xff\xd8" in file.read(_START):
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
    """Names of the outermost boxes of an mp4 or mov file; nonsense, but no error, for other files."""
    names: set[bytes] = set()
    end, offset = file.seek(0, io.SEEK_END), 0
    for _ in range(_MOST_BOXES):
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
    """One frame as upright uint8 [height, width, 3]."""
    swap, flip_rows, flip_columns = _orientation(video.name, frame)
    picture = video.to_rgb(frame)
    picture = picture.transpose(1, 0, 2) if swap else picture
    picture = picture[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]
    if fit == "crop":
        pixel_aspect = 1 / video.pixel_aspect if swap else video.pixel_aspect
        picture = _cropped(picture, width / height / pixel_aspect)
    return _resized(np.ascontiguousarray(picture), height, width)


def _orientation(name: str, frame: Any) -> tuple[bool, bool, bool]:
    """How to turn a decoded frame upright: (swap rows and columns, then flip rows, then flip columns).

    The display matrix sends a coded point (x, y) to (a x + c y, b x + d y), y pointing down. `frame.rotation` is not
    enough: it calls a mirrored picture a rotated one.
    """
    # Not frame.side_data, which the frame keeps: each would hold the other, and no frame's memory would be let go.
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
        "right angles are supported. Re-encode it upright."
    )


def _cropped(picture: Picture, aspect: float) -> Picture:
    """The largest centred part with about `aspect` columns per row, in whole pixels."""
    rows, columns = picture.shape[:2]
    kept_rows = min(rows, max(1, round(columns / aspect)))
    kept_columns = min(columns, max(1, round(rows * aspect)))
    top, left = (rows - kept_rows) // 2, (columns - kept_columns) // 2
    return picture[top : top + kept_rows, left : left + kept_columns]


def _resized(picture: Picture, height: int, width: int) -> Picture:
    """Shrink by area, which does not alias, then enlarge what is still too small by cubic interpolation."""
    rows, columns = min(picture.shape[0], height), min(picture.shape[1], width)
    picture = cv2.resize(picture, (columns, rows), interpolation=cv2.INTER_AREA)
    return cv2.resize(picture, (width, height), interpolation=cv2.INTER_CUBIC)


def _encode_into(container: Any, frames: np.ndarray, rate: Fraction, crf: int) -> None:
    stream = container.add_stream("libx264", rate=rate, options={"crf": str(crf), "x264-params": _REPRODUCIBLE})
    stream.height, stream.width = frames.shape[1:3]
    stream.pix_fmt = "yuv420p"
    context = stream.codec_context
    context.thread_count = 1  # the number of threads changes x264's decisions
    # Say which colours these are: players guess from the size otherwise, and guess differently.
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
        raise VideoError(f"start is {start}, expected 0 or more: frames are counted from the beginning.")
    if fit not in ("crop", "stretch"):
        raise VideoError(f"fit is {fit!r}, expected 'crop' or 'stretch'.")


def _check_encodable(frames: np.ndarray, fps: float | int, crf: int) -> None:
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or frames.size == 0:
        raise VideoError(
            f"frames are {frames.dtype} {list(frames.shape)}, expected uint8 [T, H, W, 3] RGB with T >= 1. "
            "Pictures in 0..1 must be multiplied by 255 and rounded; channels come last."
        )
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise VideoError(
            f"frames are {width}x{height}, and H.264 with 4:2:0 colour needs an even width and height. "
            "Crop or pad one row or column."
        )
    if not (math.isfinite(fps) and fps > 0):
        raise VideoError(f"fps is {fps}, expected a number above 0.")
    if not 1 <= crf <= 51:
        raise VideoError(f"crf is {crf}, expected 1 (best) to 51.")


def _raise_too_short(video: _Video, frames: int, start: int, stride: int) -> NoReturn:
    usable = len(range(start, video.decoded, stride))
    fewer = f"ask for at most {usable} frames, lower stride or start" if usable else "start earlier"
    promised = f"Its header promises {video.promised}" if video.promised > video.decoded else "If it had more"
    raise TooShortVideoError(
        f"{video.name}: {frames} frames with stride {stride} from frame {start} were asked, it has only "
        f"{video.decoded}. Take a longer video, or {fewer}. {promised}: it is cut off or damaged."
    )
