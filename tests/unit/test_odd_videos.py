"""Videos that every player shows and that are not what their headers say: rates, joints, fields, colours."""

from __future__ import annotations

import io
import os
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from test_video import counting, indices, moving, read, rough, save

from ditflow.media import video
from ditflow.media.video import CorruptVideoError, UndecodableVideoError

# --- rates


def uneven(path, milliseconds, codec="libvpx", **options):
    """Frames of `counting` at these times."""
    with av.open(str(path), "w", container_options=options) as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        for picture, time in zip(counting(len(milliseconds)), milliseconds, strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def test_a_browser_s_recording_without_a_rate_has_that_of_its_frames(tmp_path):
    """What MediaRecorder writes: an endless WebM without DefaultDuration (element 23E383), which becomes Void here."""
    times = [0, *np.cumsum([33, 34, 66, 31, 33, 35, 33, 67, 34, 33, 33, 34]).tolist()]
    content = bytearray(uneven(tmp_path / "a.webm", times, live="1").read_bytes())
    at = content.find(b"\x23\xe3\x83")
    assert at > 0
    length = 4 + (content[at + 3] & 0x7F)
    content[at : at + length] = bytes([0xEC, 0x80 | (length - 2)]) + bytes(length - 2)
    clip = read(bytes(content), frames=13)
    assert clip.fps == pytest.approx(12 / 0.466, rel=1e-4)
    (note,) = clip.notes
    assert note.startswith("variable frame rate: 25.7511 frames per second, ")
    assert "0.031 to 0.067 s apart; the file states " in note


@pytest.mark.parametrize(("start", "notes"), [(0, 2), (1, 1)])
def test_a_pause_does_not_slow_down_the_frames_around_it(tmp_path, start, notes):
    path = uneven(tmp_path / "a.mp4", [0, *(10_000 + 40 * n for n in range(20))], codec="libx264")
    clip = read(path, frames=17, start=start)
    assert clip.fps == 25
    assert len(clip.notes) == notes
    assert read(path, frames=5, start=start, stride=4).fps == 6.25


def test_the_rate_of_a_part_is_that_of_the_part(tmp_path):
    path = uneven(tmp_path / "a.mkv", [*range(0, 400, 40), *range(400, 1400, 100)])
    assert (read(path, frames=10).fps, read(path, frames=10, start=10).fps) == (25, 10)


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4", "a.ts", "a.avi"])
def test_an_even_video_has_the_rate_that_it_states_however_its_times_are_rounded(tmp_path, name):
    path = tmp_path / name
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(30000, 1001))
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for picture in counting(40):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    clip = read(path, frames=13, stride=3)
    assert (clip.fps, clip.notes) == (pytest.approx(10000 / 1001, rel=1e-5), ())


# --- parts of streams

STREAMS = {
    "H.264": ("libx264", {"x264-params": "keyint=10:min-keyint=10:open-gop=1:bframes=3:scenecut=0"}),
    "HEVC": ("libx265", {"x265-params": "keyint=10:min-keyint=10:open-gop=1:bframes=3:scenecut=0:log-level=none"}),
    "MPEG-2": ("mpeg2video", {"g": "10", "bf": "2", "qmax": "2"}),
}


@pytest.fixture(params=STREAMS.values(), ids=STREAMS)
def stream(request, tmp_path):
    """42 frames of `counting` as a transport stream, with B-frames over the borders of its groups of ten."""
    codec, options = request.param

    def prepare(stream):
        if codec == "mpeg2video":
            stream.codec_context.framerate = Fraction(25)

    path = tmp_path / "whole.ts"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width, stream.pix_fmt = 96, 128, "yuv420p"
        prepare(stream)
        for picture in counting(42, 96, 128):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return path.read_bytes()


def part(stream, share):
    return len(stream) * share // 8 // 188 * 188


@pytest.mark.parametrize("share", [2, 3, 4])
def test_a_stream_that_starts_inside_a_group_of_pictures_is_read_from_its_first_whole_frame(stream, share):
    clip = read(stream[part(stream, share) :], frames=10)
    shown = indices(clip)
    assert shown == list(range(shown[0], shown[0] + 10))
    (note,) = clip.notes
    assert note.startswith("frames skipped before the first that can be decoded: ")


@pytest.mark.parametrize(("end", "begin"), [(8, 0), (4, 0), (8, 3), (5, 2)])
def test_joined_streams_are_read_over_the_joint(stream, end, begin):
    first = indices(read(stream, frames=42))
    clip = read(stream[: part(stream, end)] + stream[part(stream, begin) :], frames=45 if end == 8 else 30)
    shown = indices(clip)
    assert shown[0] == first[0]
    assert np.count_nonzero(np.diff(shown) != 1) <= 3
    assert min(shown[20:]) < max(shown[:42])
    assert clip.fps == pytest.approx(25, rel=0.1)
    assert any("joint" in note for note in clip.notes)


def test_segments_that_were_put_together_are_read_as_one(tmp_path):
    """Each counts its packets anew, which looks like a loss; their times go on."""
    segments = []
    for first in (0, 14, 28):
        path = tmp_path / f"{first}.ts"
        save(path, counting(42)[first : first + 14], times=list(range(first, first + 14)))
        segments.append(path.read_bytes())
    clip = read(b"".join(segments), frames=42)
    assert indices(clip) == list(range(42))
    assert clip.fps == 10


def test_a_loss_inside_a_transport_stream_is_damage(tmp_path):
    content = save(tmp_path / "a.ts", rough(), g="100").read_bytes()
    middle = len(content) // 2 // 188 * 188
    with pytest.raises(CorruptVideoError):
        read(content[:middle] + content[middle + 5 * 188 :], height=96, width=128)


def test_a_stream_from_its_beginning_has_no_notes(stream):
    assert read(stream, frames=40).notes == ()


# --- interlaced


def fields(frames=12, height=96, width=128):
    """A bar that moves 4 pixels a field; even rows of a frame are its first field, odd rows its second."""
    pictures = np.full((frames, height, width, 3), 40, np.uint8)
    for frame in range(frames):
        for field in (0, 1):
            left = 8 + 4 * (2 * frame + field)
            pictures[frame, field::2, left : left + 20] = 220
    return pictures


@pytest.fixture
def interlaced(tmp_path):
    def prepare(stream):
        stream.codec_context.flags |= av.codec.context.Flags.interlaced_dct | av.codec.context.Flags.interlaced_me

    options = {"crf": "1", "x264-params": "tff=1"}
    return save(tmp_path / "a.mp4", fields(), pixels="yuv422p", prepare=prepare, **options)


def combing(clip):
    """How much neighbouring rows differ, in the middle of the clip."""
    return np.abs(np.diff(clip.frames[2:10].astype(int), axis=1))[:, 8:88].mean()


def test_interlaced_frames_are_deinterlaced_unless_the_caller_wants_them_as_they_are(interlaced):
    clip, woven = read(interlaced, 12, 96, 128), read(interlaced, 12, 96, 128, deinterlace="off")
    assert combing(clip) < combing(woven) / 3
    assert (clip.notes, woven.notes) == (("interlaced: deinterlaced by bwdif",), ("interlaced: left as it is",))
    assert (clip.fps, len(clip.frames)) == (10, 12)
    np.testing.assert_allclose(woven.frames[:, :, :, 0], fields()[..., 0], atol=12)


def test_an_interlaced_frame_is_the_same_from_wherever_reading_starts(interlaced):
    every = read(interlaced, 12, 96, 128).frames
    np.testing.assert_array_equal(every[5:10:2], read(interlaced, 3, 96, 128, start=5, stride=2).frames)


def test_progressive_frames_do_not_know_of_the_setting(tmp_path):
    path = save(tmp_path / "a.mp4", moving())
    clip, off = read(path, 24, 96, 128), read(path, 24, 96, 128, deinterlace="off")
    np.testing.assert_array_equal(clip.frames, off.frames)
    assert clip.notes == off.notes == ()


# --- colours


def coloured(path, height, width, matrix, tag=2, full=False, codec="libx264", pixels="yuv420p"):
    """Two frames of (200, 40, 40), coded by a matrix that the file names by no more than this tag."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10, options={"preset": "ultrafast"} if codec == "libx264" else {})
        stream.height, stream.width, stream.pix_fmt = height, width, pixels
        stream.codec_context.colorspace = tag
        stream.codec_context.color_range = 2 if full else 1
        picture = np.full((height, width, 3), (200, 40, 40), np.uint8)
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(
            format=pixels, dst_colorspace=matrix, dst_color_range="JPEG" if full else "MPEG"
        )
        frame.colorspace = tag
        for time in (0, 1):
            frame.pts = time
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


COLOURS = {
    "untagged 720p": (720, 1280, "ITU709", {}, 1),
    "untagged 720p, upright": (1280, 720, "ITU709", {}, 1),
    "untagged 720p, full range": (720, 1280, "ITU709", {"full": True}, 1),
    "untagged cinema": (544, 1280, "ITU709", {}, 1),
    "untagged 10 bit": (720, 1280, "ITU709", {"pixels": "yuv420p10le"}, 1),
    "tagged 720p": (720, 1280, "ITU709", {"tag": 1}, 0),
    "720p tagged as BT.601": (720, 1280, "ITU601", {"tag": 6}, 0),
    "HD tagged as BT.2020": (720, 1280, "BT2020", {"tag": 9, "pixels": "yuv420p10le"}, 0),
    "untagged PAL": (576, 1024, "ITU601", {}, 0),
    "untagged SD, upright": (640, 480, "ITU601", {}, 0),
    "untagged SD, full range": (48, 64, "ITU601", {"full": True}, 0),
    "MJPEG in HD": (720, 1280, "ITU601", {"codec": "mjpeg", "pixels": "yuvj420p", "full": True}, 0),
}


@pytest.mark.parametrize(("height", "width", "matrix", "more", "notes"), COLOURS.values(), ids=COLOURS)
def test_colours_come_back_as_players_show_them(tmp_path, height, width, matrix, more, notes):
    clip = read(coloured(tmp_path / "a.mkv", height, width, matrix, **more), frames=2)
    np.testing.assert_allclose(clip.frames[1, 24, 32].astype(int), (200, 40, 40), atol=5)
    assert [note.split(":")[0] for note in clip.notes] == ["colours"] * notes


def test_high_dynamic_range_is_noted(tmp_path):
    def prepare(stream):
        stream.codec_context.color_trc, stream.codec_context.colorspace = 16, 9

    path = save(tmp_path / "a.mkv", counting(4), "libx264", "yuv420p10le", prepare=prepare)
    assert read(path, frames=4).notes == ("high dynamic range (PQ): not tone-mapped",)


# --- pictures


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"RIFF\x40\0\0\0WEBPVP8X" + bytes(52), "it is WebP, still or animated, which is not supported; convert"),
        (b"\0\0\0\x18ftypheic" + bytes(64), "it is a picture .HEIF or AVIF., not a video"),
    ],
)
def test_a_picture_format_is_named(content, cause):
    with pytest.raises(UndecodableVideoError, match=cause):
        read(content)


# --- siblings: other formats of the same kinds


def raw(path, codec="libx264", rate=Fraction(10), frames=12, **options):
    """Frames of `counting` at a rate that the pictures alone can tell."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        stream.codec_context.framerate = rate
        for picture in counting(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize(
    ("name", "codec", "rate"), [("a.h264", "libx264", 10), ("a.hevc", "libx265", 60), ("a.m2v", "mpeg2video", 30)]
)
def test_pictures_without_a_container_have_the_rate_that_they_state(tmp_path, name, codec, rate):
    clip = read(raw(tmp_path / name, codec, Fraction(rate)), frames=10)
    assert (clip.fps, clip.notes) == (rate, ())


def test_a_rate_that_nothing_states_is_noted(tmp_path):
    clip = read(raw(tmp_path / "a.obu", "libsvtav1", **{"preset": "12"}), frames=10)
    assert (clip.fps, clip.notes) == (25, ("frame rate: the file states none; taken as 25 frames per second",))


def shown_at(path, times, codec="libx264", rate=10, **options):
    """Frames of `counting` at these times in tenths of a second, of which an AVI file has only the whole ones."""
    return save(path, counting(len(times)), codec, times=times, **options)


def test_frames_that_an_avi_leaves_out_last_longer(tmp_path):
    """Recorders that are late write nothing for a tick; the header keeps its rate."""
    clip = read(shown_at(tmp_path / "a.avi", list(range(0, 40, 2)), "mpeg4", qscale="2"), frames=17)
    assert clip.fps == pytest.approx(5, rel=0.01)
    assert read(shown_at(tmp_path / "b.avi", list(range(20)), "libx264", bf="2"), frames=17).notes == ()


@pytest.mark.parametrize("times", [range(0, 240, 20), [*range(6), *range(106, 112)]], ids=["2 s", "a pause"])
def test_a_transport_stream_may_stand_still(tmp_path, times):
    """More than a second between two frames is no joint."""
    clip = read(shown_at(tmp_path / "a.ts", list(times), g="4", bf="2"), frames=12)
    assert indices(clip) == list(range(12))
    assert clip.fps == (0.5 if times[1] == 20 else 10)
    assert not any("joint of" in note for note in clip.notes)


def test_a_stream_that_goes_on_later_after_a_cut_is_joined(tmp_path):
    first = save(tmp_path / "a.ts", counting(42, 96, 128)[:20], g="10", bf="2").read_bytes()
    second = save(tmp_path / "b.ts", counting(42, 96, 128), times=list(range(100, 142)), g="10", bf="2").read_bytes()
    shown = indices(read(first[: part(first, 5)] + second[part(second, 3) :], frames=25, height=96, width=128))
    assert np.count_nonzero(np.diff(shown) != 1) <= 3


@pytest.mark.parametrize("name", ["a.mkv", "a.avi"])
def test_a_part_of_an_open_group_of_pictures_is_read_where_a_container_gives_no_times(tmp_path, name):
    """As `ffmpeg -ss ... -c copy` cuts: the pictures that need earlier ones have no times, or made-up ones."""
    codec, options = STREAMS["H.264"]
    source = save(tmp_path / ("a.ts" if name == "a.avi" else "a.mp4"), counting(30, 96, 128), codec, **options)
    timing = {"avoid_negative_ts": "disabled"}
    with av.open(str(source)) as whole, av.open(str(tmp_path / name), "w", container_options=timing) as cut:
        packets = [packet for packet in whole.demux(whole.streams.video[0]) if packet.size]
        copy = cut.add_stream_from_template(whole.streams.video[0])
        begin = next(number for number, packet in enumerate(packets) if number and packet.is_keyframe)
        first = packets[begin].pts if name == "a.mkv" else packets[begin].dts
        for packet in packets[begin:]:
            packet.pts, packet.dts, packet.stream = packet.pts - first, packet.dts - first, copy
            cut.mux(packet)
    clip = read(tmp_path / name, frames=10, height=96, width=128)
    assert list(np.diff(indices(clip))) == [1] * 9
    assert clip.notes[0].startswith("frames skipped before the first that can be decoded: ")
    assert clip.fps == 10


def test_frames_between_two_ticks_of_a_coarse_clock_do_not_double_their_rate(tmp_path):
    clip = read(uneven(tmp_path / "a.mkv", [n // 2 for n in range(20)], codec="ffv1"), frames=20)
    assert clip.fps == pytest.approx(2000, rel=0.06)


def test_a_sample_without_bytes_shows_nothing_new(tmp_path):
    content = bytearray(save(tmp_path / "a.mov", moving(8), "mjpeg", "yuvj420p").read_bytes())
    sizes = content.index(b"stsz") + 16
    third, fourth = struct.unpack_from(">II", content, sizes + 8)
    struct.pack_into(">II", content, sizes + 8, third + fourth, 0)
    assert len(read(bytes(content), frames=7, height=96, width=128).frames) == 7


@pytest.mark.parametrize(("matrix", "shown"), [(0, True), (8, False), (10, False), (14, False)])
def test_colours_that_cannot_be_read_are_refused_and_senseless_ones_count_as_not_said(tmp_path, matrix, shown):
    path = coloured(tmp_path / "a.mkv", 720, 1280, "ITU709", tag=matrix, codec="ffv1")
    if shown:
        np.testing.assert_allclose(read(path, frames=2).frames[1, 24, 32].astype(int), (200, 40, 40), atol=5)
    else:
        with pytest.raises(UndecodableVideoError, match=f"matrix {matrix} of H.273 .*zscale=matrix=709") as caught:
            read(path, frames=2)
        assert caught.value.code == "video-colours-unsupported"


def test_transparency_is_noted_where_there_is_some(tmp_path):
    for level, notes in ((10, ("transparent: shown as if it were opaque",)), (255, ())):
        path = tmp_path / f"{level}.mov"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("png", rate=10)
            stream.height, stream.width, stream.pix_fmt = 48, 64, "rgba"
            picture = np.dstack([counting(1)[0], np.full((48, 64), level, np.uint8)])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgba")))
            container.mux(stream.encode(None))
        assert read(path, frames=1).notes == notes


def test_transparency_that_is_coded_apart_is_noted(tmp_path):
    path = tmp_path / "a.webm"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libvpx-vp9", rate=10)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuva420p"
        picture = np.dstack([counting(1)[0], np.full((48, 64), 10, np.uint8)])
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgba").reformat(format="yuva420p")))
        container.mux(stream.encode(None))
    assert read(path, frames=1).notes == ("transparent: shown as if it were opaque",)


def test_only_a_regular_file_is_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(UndecodableVideoError, match="is not a regular file") as caught:
        read(tmp_path / "pipe.mp4")
    assert caught.value.code == "video-not-a-file"


def test_motion_jpeg_without_a_container_is_no_still_picture(tmp_path):
    path = save(tmp_path / "a.mjpeg", moving(3), "mjpeg", "yuvj420p")
    assert "the file states none" in read(path, frames=3, height=96, width=128).notes[0]  # known by its name
    picture = path.read_bytes()[: path.stat().st_size // 3]
    cause = video._probable_cause
    assert "Motion JPEG without a container" in cause(io.BytesIO(path.read_bytes()))
    assert cause(io.BytesIO(picture)) == "it is a still picture"
