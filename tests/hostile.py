"""The corpus of hostile inputs: small files that are damaged, that lie, or that cost far more than they weigh.

Each is made here from bytes and FFmpeg's own encoders, the same every time, in a few seconds. What a job must say of
each stands beside it: nothing (its frames come), or the class of the error and a part of its message.
"""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np
import yaml

from ditflow.media.video import (
    CorruptVideoError,
    OversizedVideoError,
    TooShortVideoError,
    UndecodableVideoError,
    VideoError,
    read_video,
)
from pipeline.job import References
from pipeline.stages.read import bounded_memory

HEIGHT, WIDTH, FRAMES, RATE = 48, 64, 20, 10
READ = {"frames": 9, "height": 32, "width": 32, "stride": 2}
"""What is asked of every file: a clip that the whole ones have."""


@dataclass(frozen=True)
class Hostile:
    """A file, and what must come of reading it. error None: its frames. ask: what is asked beside `READ`."""

    build: Callable[[], bytes]
    error: type[VideoError] | None = None
    says: str = ""
    ask: Mapping[str, Any] = field(default_factory=dict)


# ----------------------------------------------------------------------------------------------- whole videos


def pictures(height: int, width: int, frames: int = FRAMES) -> np.ndarray:
    """A bright square on a gradient, moving to the right; uint8 [T, H, W, 3]."""
    gradient = np.linspace(40, 160, width, dtype=np.uint8)
    clip = np.broadcast_to(gradient[None, None, :, None], (frames, height, width, 3)).copy()
    for index in range(frames):
        left = index * max(1, width // frames) % width
        clip[index, height // 4 : height // 2, left : left + max(1, width // 6)] = (230, 220, 60)
    return clip


@cache
def video(
    container: str,
    codec: str,
    pixels: str,
    *,
    height: int = HEIGHT,
    width: int = WIDTH,
    frames: int = FRAMES,
    times: tuple[int, ...] | None = None,
    flags: str = "",
    turn: int = 0,
    aspect: Fraction | None = None,
) -> bytes:
    """Encode `pictures`. times: when each is shown, in tenths of a second. flags: the muxer's movflags."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container, container_options={"movflags": flags} if flags else {}) as output:
        stream = output.add_stream(codec, rate=RATE, options=_QUIET.get(codec, {}))
        stream.height, stream.width, stream.pix_fmt = height, width, pixels
        if turn:
            stream.set_display_rotation(turn)
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        for index, picture in enumerate(pictures(height, width, frames)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pixels)
            frame.pts, frame.time_base = index if times is None else times[index], Fraction(1, RATE)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return buffer.getvalue()


_QUIET = {"libx265": {"x265-params": "log-level=none"}, "libx264": {"preset": "ultrafast"}}


def mp4() -> bytes:
    """The plain video that most of the others are made of."""
    return video("mp4", "libx264", "yuv420p")


def _uneven() -> bytes:
    times = tuple(np.cumsum([0, 1, 1, 9, 1, 20, 1, 1, 3, 1] * 2).tolist())
    return video("matroska", "libx264", "yuv420p", times=times)


def sound(container: str, codec: str, layout: str = "s16") -> bytes:
    """Half a second of silence, and no picture."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=8000, layout="mono")
        kind = np.int16 if layout == "s16" else np.float32
        for start in range(0, 4096, 1024):
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), kind), format=layout, layout="mono")
            silence.sample_rate, silence.pts = 8000, start
            output.mux(stream.encode(silence))
        output.mux(stream.encode(None))
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------ bytes, put in by hand


def overwritten(data: bytes, mark: bytes, skip: int, new: bytes, occurrence: int = 1) -> bytes:
    """Replace the bytes that stand `skip` bytes behind an occurrence of a mark."""
    place = -1
    for _ in range(occurrence):
        place = data.index(mark, place + 1)
    place += len(mark) + skip
    return data[:place] + new + data[place + len(new) :]


def u32(*values: int) -> bytes:
    """Whole numbers as an mp4 writes them."""
    return struct.pack(f">{len(values)}I", *values)


def box(name: bytes, content: bytes) -> bytes:
    """A box of an mp4."""
    return u32(8 + len(content)) + name + content


def replaced_box(data: bytes, path: tuple[bytes, ...], new: bytes) -> bytes:
    """Replace a box by others, and grow the boxes around it; the data behind it must not move."""
    places = [data.index(name) - 4 for name in path]
    (size,) = struct.unpack(">I", data[places[-1] : places[-1] + 4])
    for place in places[:-1]:
        (outer,) = struct.unpack(">I", data[place : place + 4])
        data = data[:place] + u32(outer + len(new) - size) + data[place + 4 :]
    return data[: places[-1]] + new + data[places[-1] + size :]


def _index_of_millions() -> bytes:
    """2 kB whose index speaks of 2^26 frames in one piece: 24 bytes are filled for each, 1.6 GB."""
    count = 1 << 26
    data = overwritten(mp4(), b"stsz", 4, u32(1, count))
    return overwritten(data, b"stsc", 12, u32(count))


def _fragment_of_millions() -> bytes:
    """2 kB whose one fragment speaks of 2^26 frames, without a size for any: 40 bytes are filled for each."""
    data = video("mp4", "libx264", "yuv420p", flags="frag_keyframe+empty_moov+default_base_moof")
    return overwritten(data, b"trun", 0, u32(1, 1 << 26))


def _edits_of_millions() -> bytes:
    """A list of 20,000 edits, each of which shows all 1000 frames again: 20 million entries of 24 bytes."""
    data = video("mp4", "libx264", "yuv420p", height=16, width=16, frames=1000)
    edits = u32(0, 20_000) + struct.pack(">IiI", 0x7FFFFFFF, 0, 0x10000) * 20_000
    return replaced_box(data, (b"moov", b"trak", b"edts", b"elst"), box(b"elst", edits))


def _many_tracks(count: int) -> bytes:
    """The video's track, so many times; each gets a decoder of its own while the file is opened."""
    data = mp4()
    place = data.index(b"trak") - 4
    (size,) = struct.unpack(">I", data[place : place + 4])
    return replaced_box(data, (b"moov", b"trak"), data[place : place + size] * count)


def _element(name: str, content: bytes) -> bytes:
    """An element of a Matroska file."""
    return bytes.fromhex(name) + struct.pack(">Q", len(content) | 1 << 56) + content


def _many_matroska_tracks(count: int) -> bytes:
    size = _element("e0", _element("b0", struct.pack(">H", 4096)) + _element("ba", struct.pack(">H", 4096)))
    kind = _element("83", b"\x01") + _element("86", b"V_MJPEG") + size
    tracks = b"".join(_element("ae", _element("d7", u32(number + 1)) + kind) for number in range(count))
    body = _element("1654ae6b", tracks) + _element("1f43b675", _element("e7", b"\0"))
    return _element("1a45dfa3", _element("4282", b"matroska")) + _element("18538067", body)


def _boxes_in_boxes(depth: int = 100_000) -> bytes:
    nested = b"".join(u32(8 * (depth - level)) + b"trak" for level in range(depth))
    return box(b"ftyp", b"isom\0\0\0\0isom") + box(b"moov", nested)


def _boxes_without_end(count: int = 1 << 20) -> bytes:
    return box(b"ftyp", b"isom\0\0\0\0isom") + box(b"free", b"") * count


def _gif(frames: int, canvas: tuple[int, int] = (8, 8)) -> bytes:
    """An animation of so many frames, 23 bytes each."""
    head = b"GIF89a" + struct.pack("<HHBBB", *canvas, 0x80, 0, 0) + bytes([0, 0, 0, 255, 255, 255])
    frame = b"\x21\xf9\x04\x00\x0a\x00\x00\x00" + struct.pack("<BHHHHB", 0x2C, 0, 0, 8, 8, 0) + b"\x02\x02\x4c\x01\x00"
    return head + frame * frames + b";"


def _png(side: int) -> bytes:
    """A black square; one bit a pixel, and next to nothing when packed."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return u32(len(content)) + name + content + u32(zlib.crc32(name + content))

    packed = zlib.compress(bytes((1 + side // 8) * side), 9)
    head = chunk(b"IHDR", u32(side, side) + bytes([1, 0, 0, 0, 0]))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def _jpegs(frame: int, height: int, width: int) -> bytes:
    """Motion JPEG in which one frame's header speaks of another size."""
    data = video("avi", "mjpeg", "yuvj420p")
    return overwritten(data, b"\xff\xc0", 3, struct.pack(">HH", height, width), occurrence=frame)


def _avi(mark: bytes, skip: int, *values: int) -> bytes:
    return overwritten(video("avi", "mpeg4", "yuv420p"), mark, skip, struct.pack(f"<{len(values)}I", *values))


def _user_data(megabytes: int) -> bytes:
    """A raw H.264 stream whose first message to the decoder's user is of so many megabytes."""
    size = megabytes << 20
    message = b"\x06\x05" + b"\xff" * (size // 255) + bytes([size % 255]) + b"\x01" * size + b"\x80"
    return b"\0\0\0\1" + message + video("h264", "libx264", "yuv420p")


_SDP = b"""v=0
o=- 0 0 IN IP4 127.0.0.1
s=a description of pictures that come over the network
c=IN IP4 127.0.0.1
t=0 0
m=video 50004 RTP/AVP 96
a=rtpmap:96 H264/90000
"""
_DASH = b"""<?xml version="1.0"?>
<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" profiles="urn:mpeg:dash:profile:isoff-on-demand:2011">
<Period><AdaptationSet><Representation id="1"><BaseURL>http://127.0.0.1:1/a.mp4</BaseURL></Representation>
</AdaptationSet></Period></MPD>"""

_NONE, _TEXT = UndecodableVideoError, "it is text"
_UNKNOWN = "no known video format"
_NO_SIZE = "format or size cannot be found"
_COSTS = "more memory than the reader may use"

CORPUS: dict[str, Hostile] = {
    # ---- unusual and sound
    "plain.mp4": Hostile(mp4),
    "variable frame rate.mkv": Hostile(_uneven),
    "odd sizes.mkv": Hostile(lambda: video("matroska", "ffv1", "yuv420p", height=35, width=51)),
    "ten bits.mkv": Hostile(lambda: video("matroska", "libx264", "yuv420p10le")),
    "ten bits hevc.mp4": Hostile(lambda: video("mp4", "libx265", "yuv420p10le")),
    "sixteen bits gray.mkv": Hostile(lambda: video("matroska", "ffv1", "gray16le")),
    "gray.mkv": Hostile(lambda: video("matroska", "libx264", "gray")),
    "black and white.nut": Hostile(lambda: video("nut", "rawvideo", "monow")),
    "floating point.nut": Hostile(lambda: video("nut", "rawvideo", "gbrpf32le")),
    "full colour.mkv": Hostile(lambda: video("matroska", "libx264", "yuv444p")),
    "transparent.mkv": Hostile(lambda: video("matroska", "ffv1", "bgra")),
    "upright phone.mp4": Hostile(lambda: video("mp4", "libx264", "yuv420p", turn=90)),
    "phone on its head.mp4": Hostile(lambda: video("mp4", "libx264", "yuv420p", turn=180)),
    "squeezed pixels.mkv": Hostile(lambda: video("matroska", "libx264", "yuv420p", aspect=Fraction(1, 250))),
    "one row high.mkv": Hostile(lambda: video("matroska", "ffv1", "bgra", height=1, width=400)),
    "four pixels.mkv": Hostile(lambda: video("matroska", "ffv1", "yuv444p", height=2, width=2)),
    "matroska called mp4.mp4": Hostile(lambda: video("matroska", "libx264", "yuv420p")),
    "animation.gif": Hostile(lambda: _gif(20)),
    "raw stream.h264": Hostile(lambda: video("h264", "libx264", "yuv420p")),
    "ten tracks.mp4": Hostile(lambda: _many_tracks(10)),
    # ---- more than it seems
    "frame bomb.gif": Hostile(lambda: _gif(200_000)),
    "frame bomb from far.gif": Hostile(
        lambda: _gif(200_000), TooShortVideoError, "it has only 200000", ask={"start": 500_000}
    ),
    "header of 2^31 frames.avi": Hostile(lambda: _avi(b"avih", 20, 0x7FFFFFFF)),
    "too short for its header.mp4": Hostile(
        lambda: overwritten(mp4(), b"stts", 4, u32(1, 1 << 31, 1024)),
        TooShortVideoError,
        "header states 2147483648",
        ask={"frames": 99},
    ),
    "index of millions.mp4": Hostile(_index_of_millions, _NONE, "not one frame of it can be decoded"),
    "fragment of millions.mp4": Hostile(_fragment_of_millions, OversizedVideoError, _COSTS),
    "edits of millions.mp4": Hostile(_edits_of_millions),
    "thousand tracks.mp4": Hostile(lambda: _many_tracks(999), OversizedVideoError, "more than 100 streams"),
    "ten thousand tracks.mkv": Hostile(lambda: _many_matroska_tracks(10_000), _NONE, "not one frame of it"),
    "boxes in boxes.mp4": Hostile(_boxes_in_boxes, _NONE, "without a video stream"),
    "boxes without end.mp4": Hostile(_boxes_without_end, _NONE, "moov"),
    "user data.h264": Hostile(lambda: _user_data(20), _NONE, _UNKNOWN),
    "giant canvas.gif": Hostile(lambda: _gif(20, (65535, 65535)), _NONE, _NO_SIZE),
    "giant first frame.avi": Hostile(lambda: _jpegs(1, 60_000, 60_000)),  # passed over, as the start of a cut file is
    "giant third frame.avi": Hostile(lambda: _jpegs(3, 60_000, 60_000), CorruptVideoError, "damaged near frame 2"),
    "giant picture.png": Hostile(lambda: _png(20_000), _NONE, "it is a still picture"),
    "large frames.mp4": Hostile(
        lambda: video("mp4", "libx264", "yuv420p", height=480, width=640, frames=2),
        OversizedVideoError,
        "640x480 pixels, more than the accepted 300000",
        ask={"max_pixels_per_frame": 300_000},
    ),
    # ---- lies
    "billion frames a second.avi": Hostile(lambda: _avi(b"strh", 24, 1, 0x7FFFFFFF), _NONE, "frames per second"),
    "frame of a century.avi": Hostile(lambda: _avi(b"strh", 24, 0x7FFFFFFF, 1), _NONE, "frames per second"),
    "slanted.mp4": Hostile(lambda: video("mp4", "libx264", "yuv420p", turn=30), _NONE, "only right angles"),
    "unknown codec.mp4": Hostile(lambda: mp4().replace(b"avc1", b"zzzz"), _NONE, _NO_SIZE),
    "encrypted.mp4": Hostile(lambda: mp4().replace(b"avc1", b"encv"), _NONE, _NO_SIZE),
    "sound.wav": Hostile(lambda: sound("wav", "pcm_s16le"), _NONE, "wav file without a video stream: it holds audio"),
    "sound.mp4": Hostile(lambda: sound("mp4", "aac", "fltp"), _NONE, "without a video stream: it holds audio"),
    # ---- no video at all
    "empty.mp4": Hostile(lambda: b"", _NONE, "it is empty"),
    "one byte.mp4": Hostile(lambda: b"\0", _NONE, _UNKNOWN),
    "zeros.mp4": Hostile(lambda: bytes(100_000), _NONE, _UNKNOWN),
    "noise.mp4": Hostile(lambda: np.random.default_rng(0).bytes(100_000), _NONE, _UNKNOWN),
    "page.mp4": Hostile(lambda: b"<html><body>404 Not Found</body></html>" * 9, _NONE, _TEXT),
    "playlist.mp4": Hostile(lambda: b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n", _NONE, _TEXT),
    "list of files.mp4": Hostile(lambda: b"ffconcat version 1.0\nfile '/etc/passwd'\n", _NONE, _TEXT),
    "network session.mp4": Hostile(lambda: _SDP, _NONE, _TEXT),
    "network manifest.mp4": Hostile(lambda: _DASH, _NONE, _TEXT),
    "subtitles.mp4": Hostile(lambda: b"1\n00:00:01,000 --> 00:00:02,000\nhello\n", _NONE, _TEXT),
    "drawing.mp4": Hostile(lambda: b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', _NONE, _TEXT),
    # ---- cut off
    "cut in the middle.mp4": Hostile(lambda: mp4()[: len(mp4()) // 2], _NONE, "moov"),
    "cut at the end.mp4": Hostile(lambda: mp4()[:-100], _NONE, "cut off"),
    "cut in the middle.mkv": Hostile(
        lambda: video("matroska", "ffv1", "yuv420p")[:8000], TooShortVideoError, "it has only"
    ),
    "few frames.mp4": Hostile(
        lambda: video("mp4", "libx264", "yuv420p", frames=8), TooShortVideoError, "it has only 8"
    ),
}  # fmt: skip
"""Every hostile file by its name."""

NAMES = (
    "with spaces.mp4",
    "ünïcödé 雪の中の豹 🐆.mp4",
    "new\nline.mp4",
    "tab\tand\rreturn.mp4",
    "escape \x1b[31mred\x1b[0m.mp4",
    'quote\'s "both".mp4',
    "100% 20%20 #hash ?query &and.mp4",
    "chain::of::systems.mp4",
    "[brackets] {braces} *star.mp4",
    "-leading-dash.mp4",
    "$(whoami) `id` ${HOME}.mp4",
    "<b>bold<script>.mp4",
    "rtl \u202e gnp.mp4",
    "back\\slash.mp4",
    "name" * 50 + ".mp4",
)
"""Names of sound files."""

PROMPTS = (
    "a long story " * 770,
    "new\nline",
    "control \x01\x02\x1b[2J characters \x7f",
    "a NUL \0 within",
    "<script>alert('x')</script><b>bold</b>&amp;",
    "[bold red]markup[/] [/nonsense]",
    "emoji 🐆👩‍👩‍👧‍👦 and 雪の中の豹",
    "\u202eright to left\u202c \ufeff \u2028",
    "=cmd|' /C calc'!A0",
    "'; DROP TABLE rows; --",
    "../../etc/passwd",
    "{braces} %s %d ${HOME} {{ template }}",
)
"""Prompts that are texts like any other."""


# ------------------------------------------------------------------------------------------------------ specs

_SPEC = """\
kind: synthesize
name: hostile
model: {path: mini}
references: {frames: 9, height: 32, width: 32}
method: {name: none}
sampling: {steps: 1}
output: {uri: OUT}
prompts: PROMPTS
"""


def spec(prompts: str, more: str = "") -> str:
    """A job spec with this text for its prompts; OUT stands for the output's folder."""
    return _SPEC.replace("PROMPTS", prompts) + more


def _listed(*prompts: str) -> str:
    return yaml.safe_dump([*prompts], default_flow_style=True, width=10**9)


def _aliases_of_aliases() -> str:
    """Nine levels of ten aliases each: a billion prompts in 600 bytes."""
    levels = [f"  l{level}: &l{level} [{', '.join([f'*l{level - 1}'] * 10)}]" for level in range(1, 10)]
    return "\n".join(["storage_options:", "  l0: &l0 [a ball]", *levels]) + "\n" + spec("*l9")


@dataclass(frozen=True)
class HostileSpec:
    """A job spec's text, and what must be said of it; nothing if it is planned, with so many rows."""

    build: Callable[[], str]
    says: str | None = None
    rows: int = 1


SPECS: dict[str, HostileSpec] = {
    "100,000 prompts": HostileSpec(
        lambda: spec("[" + ", ".join(f'"a ball, number {number}"' for number in range(100_000)) + "]"), rows=100_000
    ),
    "a prompt of 10,000 characters": HostileSpec(lambda: spec(_listed(PROMPTS[0]))),
    "hostile prompts": HostileSpec(lambda: spec(_listed(*PROMPTS[1:])), rows=len(PROMPTS) - 1),
    "half a surrogate pair": HostileSpec(lambda: spec(r'["a \ud800 ball"]'), "job.yaml:8: "),
    "raw control characters": HostileSpec(lambda: spec('["a \x01 ball"]'), "it is no YAML"),
    "a day that is none": HostileSpec(lambda: spec("[!!timestamp 2024-13-45]"), "job.yaml:8: .* is no valid timestamp"),
    "a number of 5000 digits": HostileSpec(lambda: spec("[" + "9" * 5000 + "]"), "job.yaml:8: '99999.* no valid int"),
    "a tag without a value": HostileSpec(lambda: spec("[!!timestamp soon]"), "job.yaml:8: 'soon' is no valid"),
    "a tag of Python": HostileSpec(lambda: spec("!!python/object/apply:os.system [true]"), "job.yaml:8: .*python/obj"),
    "aliases of aliases": HostileSpec(_aliases_of_aliases, r"job.yaml:\d+: it stands for \d+ values"),
    "a list that holds itself": HostileSpec(lambda: spec("&a [*a]"), "job.yaml:8: it holds itself"),
    "a section that holds itself": HostileSpec(
        lambda: spec("[a ball]", "storage_options: &a {a: *a}\n"), "job.yaml:9: it holds itself"
    ),
    "nested 100,000 deep": HostileSpec(lambda: spec("[" * 100_000), "job.yaml:8: it is nested more than 50 deep"),
    "indented 100 deep": HostileSpec(
        lambda: spec("", "".join(f"{' ' * level}a:\n" for level in range(1, 100))), "nested more than 50 deep"
    ),
    "100,000 numbers for prompts": HostileSpec(lambda: spec(str([*range(100_000)])), r"and \d+ more$"),
    "10,000 misspelt keys": HostileSpec(
        lambda: spec("[a ball]", "".join(f"prompt{number}: x\n" for number in range(10_000))), "there is no such key"
    ),
    "a section where a text should be": HostileSpec(
        lambda: spec("[" + "{a: [" + "1," * 10_000 + "]}]"), r"prompts.*is not valid: expected"
    ),
    "infinitely many guided steps": HostileSpec(
        lambda: spec("[a ball]").replace("name: none", "name: ditflow, guided_steps: .inf"), "job.yaml:5: method"
    ),
    "a NUL in the model's name": HostileSpec(
        lambda: spec("[a ball]").replace("path: mini", r'path: "mi\0ni"'), "model"
    ),
    "a model's name of 10,000 characters": HostileSpec(
        lambda: spec("[a ball]").replace("path: mini", "path: " + "m" * 10_000), "job.yaml:3: model.path"
    ),
}
"""Every hostile spec by its name."""


@dataclass(frozen=True)
class Outcome:
    """What came of reading a file: frames (error None), or the class of the error and its message."""

    error: str | None
    message: str


def outcome(name: str) -> Outcome:
    """Read a file of the corpus as a job's reader does: from its bytes, in bounded memory."""
    hostile = CORPUS[name]
    data = hostile.build()
    try:
        with bounded_memory(References.max_memory_bytes):
            clip = read_video(data, name=name, **{**READ, **hostile.ask})
    except VideoError as error:
        return Outcome(type(error).__name__, str(error))
    return Outcome(None, f"{len(clip.frames)} frames")


def peak_bytes() -> int:
    """Return the most memory that this process has had, libraries included."""
    # Not ru_maxrss, which a new program takes over from the process that started it.
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1])


def main() -> None:
    """Read the whole corpus in this process, and print what came and the peak of its memory as JSON."""
    outcomes = {name: asdict(outcome(name)) for name in CORPUS}
    print(json.dumps({"outcomes": outcomes, "peak_bytes": peak_bytes()}))


if __name__ == "__main__":
    main()
